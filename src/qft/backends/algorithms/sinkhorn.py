"""Scales of columns that even out a weight's rows and columns, before it is rounded (SINQ, arXiv 2509.22944)."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 16

CONSTANT = 2.0
"""Standard deviations from zero beyond which a row's or column's mean counts as deviation, too."""

WORSE = 1.2
"""Squared rounding error with scales of columns over that without, up to which they are kept."""


def column_scales(weight: Tensor, size: int, steps: int = STEPS) -> Tensor:
    """What to divide the columns of a weight by, float32 (in,), of mean 1.

    In each tile of `size` columns the standard deviations of columns and of rows are in turn brought towards the smallest of
    all of them, in the logarithm, which shrinks outliers along both; the step with the least ratio between the largest
    and the smallest counts. The rows' factors are dropped: scales of groups along rows take them in.

    Two cases that the paper does not treat: a mean far beyond the standard deviation counts as deviation, since a nearly
    constant column would otherwise be divided by almost nothing; rows and columns of zeros are left out of the minimum.
    A tile whose rounding error the scales raise, as where a single value is an outlier, keeps even columns.

    Args:
        weight: float (out, in), in a multiple of `size`.
    """
    rows, width = weight.shape
    tiles = weight.float().view(rows, width // size, size).transpose(0, 1).contiguous()
    tiles = tiles / torch.where((peak := tiles.abs().amax()) > 0, peak, 1.0)
    squares = tiles.square()
    column = tiles.new_zeros(len(tiles), 1, size)
    row = tiles.new_zeros(len(tiles), rows, 1)
    best = column.clone()
    least: Tensor | None = None
    target: Tensor | None = None
    for step in range(2 * steps + 1):
        # moments of the scaled tiles, from products with the unscaled ones: nothing of their size is made in a step
        by_column, by_row = torch.exp(-column), torch.exp(-row)
        across = _deviation(by_row.mT @ tiles, by_row.square().mT @ squares, rows) * by_column
        along = _deviation(tiles @ by_column.mT, squares @ by_column.square().mT, size) * by_row
        largest = torch.maximum(across.amax((1, 2)), along.amax((1, 2)))
        smallest = torch.minimum(_smallest(across), _smallest(along))
        ratio = largest / smallest.clamp(min=1e-12)
        if target is None or least is None:
            target, least = smallest.clamp(min=1e-8)[:, None, None], ratio
        better = ratio < least
        least = torch.where(better, ratio, least)
        best = torch.where(better[:, None, None], column, best)
        if step % 2 == 0:
            column = column + _towards(across, target)
        else:
            row = row + _towards(along, target)
    scale = torch.exp(best)
    even = scale.mean(2, keepdim=True)
    helps = _rounding_error(tiles, scale) <= WORSE * _rounding_error(tiles, torch.ones_like(scale))
    scale = torch.where(helps[:, None, None], scale, even).reshape(width)
    return scale / scale.mean()


def _rounding_error(tiles: Tensor, columns: Tensor) -> Tensor:
    """Squared error of each tile, rounded to 4 bits in groups along rows after a division by `columns`."""
    scaled = tiles / columns
    low, high = scaled.amin(2, keepdim=True), scaled.amax(2, keepdim=True)
    step = (high - low) / 15
    step = torch.where(step > 0, step, 1.0)
    rounded = ((scaled - low) / step).round().mul_(step).add_(low).mul_(columns)
    return rounded.sub_(tiles).square_().sum((1, 2))


def _towards(deviation: Tensor, target: Tensor) -> Tensor:
    return (deviation / target).clamp(1e-3, 1e3).log().clamp(min=-0.3)


def _smallest(deviation: Tensor) -> Tensor:
    return torch.where(deviation > 0, deviation, torch.inf).amin((1, 2))


def _deviation(total: Tensor, squares: Tensor, count: int) -> Tensor:
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    return torch.hypot(deviation, (mean.abs() - CONSTANT * deviation).clamp(min=0))

"""Scales of columns that even out a weight's rows and columns, before it is rounded (SINQ, arXiv 2509.22944)."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 16


def column_scales(weight: Tensor, size: int, steps: int = STEPS) -> Tensor:
    """What to divide the columns of a weight by, float32 (in,), of mean 1.

    In each tile of `size` columns the standard deviations of columns and of rows are in turn brought towards the smallest of
    all of them, in the logarithm, which shrinks outliers along both; the step with the least ratio between the largest
    and the smallest counts. The rows' factors are dropped: scales of groups along rows take them in.

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
        smallest = torch.minimum(across.amin((1, 2)), along.amin((1, 2)))
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
    scale = torch.exp(best).reshape(width)
    return scale / scale.mean()


def _towards(deviation: Tensor, target: Tensor) -> Tensor:
    return (deviation / target).clamp(1e-3, 1e3).log().clamp(min=-0.3)


def _deviation(total: Tensor, squares: Tensor, count: int) -> Tensor:
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()

"""Rounding with error feedback: what each column's rounding broke, the columns after it make good (GPTQ).

arXiv 2210.17323, Algorithm 1, over second moments that were gathered once for every consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from qft.errors import BadOption
from qft.ops import kernels

BLOCK = 128
"""Columns that are rounded before the columns behind them hear of it (lazy updates)."""

Grid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Scale and zero point, float32 (out_features,), of a group of columns, float32 (group_size, out_features), and of what
they read, E[x²], float32 (group_size,)."""

Order = Literal["given", "groups", "columns"]


def nearest(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes of columns (groups, group_size, out), each rounded alone; constants are (groups, out)."""
    top = 2**bits - 1
    codes = columns * (1 / scale)[:, None]
    return codes.round_().add_(zero[:, None]).clamp_(0, top)


def with_feedback(
    weight: Tensor, second_moment: Tensor, grid: Grid, *, bits: int, group_size: int, order: Order, damp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes that keep ‖(W − Ŵ) X‖ small, where rounding to nearest keeps ‖W − Ŵ‖ small.

    Columns that no token activated have nothing to exchange with the others, and are rounded to nearest.

    Args:
        weight: float (out_features, in_features).
        second_moment: E[x xᵀ], float32 (in_features, in_features).
        grid: a group's constants, asked for when its first column is due, of its columns as they are by then.
        group_size: divides in_features; it and `BLOCK` are multiples one of the other, or it is in_features.
        order: columns as they are ("given"), the most active first within groups that stay ("groups"), or the most
            active first altogether, groups being made of columns that follow each other then ("columns").
        damp: what is added to the diagonal, as a share of its mean; more where that is too little.

    Returns:
        Codes float32 (in_features, out_features), scale and zero point float32 (groups, out_features), and each
        column's group, int32 (in_features,).
    """
    n, device = weight.shape[1], weight.device
    moment = second_moment.to(device, torch.float32)
    taken = _taken(moment.diagonal(), order, group_size)
    if taken is not None:
        moment = moment[taken][:, taken]
    columns = weight.T.clone(memory_format=torch.contiguous_format) if taken is None else weight.T[taken].contiguous()
    columns = columns.float()
    share, activity = shares(moment, damp), moment.diagonal().clone()
    del moment
    groups = n // group_size
    scale = columns.new_empty(groups, weight.shape[0])
    zero = torch.empty_like(scale)
    top = 2**bits - 1
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        error = torch.empty_like(columns[start:end])
        for first in range(start, end, min(group_size, BLOCK)):
            last, group = min(first + group_size, end), first // group_size
            if first % group_size == 0:
                mine = slice(first, first + group_size)
                scale[group], zero[group] = grid(columns[mine], activity[mine])
            span = error[first - start : last - start]
            _round(columns[first:last], share[first:last, first:last], scale[group], zero[group], top, span)
            if last < end:
                columns[last:end].addmm_(share[first:last, last:end].T, span, alpha=-1)
        if end < n:
            columns[end:].addmm_(share[start:end, end:].T, error, alpha=-1)
    # a column is as it was rounded: nothing reaches it afterwards
    codes = nearest(columns.view(groups, group_size, -1), scale, zero, bits).view(n, -1)
    owner = torch.arange(n, device=device, dtype=torch.int32) // group_size
    if taken is None:
        return codes, scale, zero, owner
    back = torch.argsort(taken)
    if order == "columns":
        return codes[back], scale, zero, owner[back]
    where = torch.argsort(taken[::group_size] // group_size)  # groups moved as wholes
    return codes[back], scale[where], zero[where], owner


def _round(columns: Tensor, share: Tensor, scale: Tensor, zero: Tensor, top: int, error: Tensor) -> None:
    """Round columns (n, out_features) that share their constants, in place as far as they reach each other.

    `columns` become what each was when it was rounded, `error`, of their shape, what that broke; `share` is (n, n).
    """
    inverse, minus, low = 1 / scale, -scale, -zero
    high = low + top
    if kernels.round_with_feedback(columns, share, inverse, scale, low, high, error):
        return
    code = torch.empty_like(scale)
    for i in range(len(columns)):
        torch.mul(columns[i], inverse, out=code)
        torch.clamp(code.round_(), low, high, out=code)
        torch.addcmul(columns[i], code, minus, out=error[i])
        if i + 1 < len(columns):
            columns[i + 1 :].addr_(share[i, i + 1 :], error[i], alpha=-1)


def doubt(shape: Sequence[int], statistics: Any) -> str | None:
    """Why these statistics, or None for none at all, are too thin for a weight of `shape`; None if they will do."""
    if statistics is None:
        return "no token came through, and weights are rounded to nearest; give more calibration data"
    if statistics.tokens < shape[-1]:
        return (
            f"{statistics.tokens} tokens came through a layer of {shape[-1]} inputs, fewer than its second moments "
            "need, and damping fills the rest; give more calibration data"
        )
    return None


def _taken(activity: Tensor, order: Order, group_size: int) -> Tensor | None:
    """The columns in the order in which they are rounded; None for as they are."""
    if order == "given":
        return None
    if order == "columns":
        return torch.argsort(activity, descending=True, stable=True)
    per_group = activity.view(-1, group_size)
    within = torch.argsort(per_group, dim=1, descending=True, stable=True)
    groups = torch.argsort(per_group.amax(1), descending=True, stable=True)
    return (within[groups] + groups[:, None] * group_size).view(-1)


def shares(moment: Tensor, damp: float) -> Tensor:
    """How much of a column's rounding error each later column takes over: unit upper triangular, float32.

    With (H + λI)⁻¹ = Uᵀ U, U upper triangular, it is U with each row divided by its diagonal entry. U comes as the
    inverse of H's own triangular factor, so that no inverse has to be factored.

    Raises:
        BadOption: the second moment is not finite.
    """
    mean = moment.diagonal().mean()
    while damp <= 1:
        damped = moment.clone()
        damped.diagonal().add_(torch.where(mean > 0, damp * mean, 1.0))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            eye = torch.eye(len(moment), device=moment.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return (upper / upper.diagonal()[:, None]).contiguous()
        damp = max(damp * 10, 1e-3) if damp < 0.1 else damp + 0.3
    raise BadOption("the calibration data's second moments have no Cholesky factor: they hold NaN or infinity")

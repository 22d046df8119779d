"""The linear of fused experts: rows sorted by expert, one weight an expert, low-rank updates on top.

    y[i] = x[i] Ŵ[e(i)]ᵀ + Σⱼ sⱼ (x[i] Aⱼ[e(i)]ᵀ) Bⱼ[e(i)]ᵀ

`x` is (rows, in_features), Ŵ (experts, out_features, in_features), A (experts, rank, in_features), B (experts,
out_features, rank). As in `qft.ops.linear`, Ŵ is dequantized again for the backward pass, and neither BA nor a
gradient of its size is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = 8
"""16-bit numbers in the 16 bytes that the grouped kernels want rows to be multiples of."""


class ExpertUpdate(NamedTuple):
    """One adapter's share: A (experts, rank, in_features), B (experts, out_features, rank), of all experts."""

    A: Tensor
    B: Tensor
    scaling: float


class Groups:
    """Rows sorted by expert.

    Args:
        experts: int64 (rows,), ascending, each below `count`.
        count: number of experts.
    """

    def __init__(self, experts: Tensor, count: int):
        self.experts, self.count = experts, count
        ids = torch.arange(count, device=experts.device)
        self.ends = torch.searchsorted(experts, ids, right=True, out_int32=True)

    @cached_property
    def slices(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of those that have rows. The device is waited for once."""
        ends = self.ends.tolist()
        starts = [0, *ends[:-1]]
        return [(i, a, b) for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x[i] @ weight[e(i)] for `x` (rows, k) and `weight` (experts, k, m): (rows, m)."""
        if _kernel(x, weight):
            return _grouped_mm(x, weight, self.ends)
        y = x.new_empty(x.shape[0], weight.shape[2])
        for e, a, b in self.slices:
            torch.mm(x[a:b], weight[e], out=y[a:b])
        return y

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ x[i]ᵀ y[i] over the rows of each expert, for `x` (rows, p) and `y` (rows, q): (experts, p, q)."""
        if _kernel(x, y):
            return _grouped_mm(x.T, y, self.ends)
        found = x.new_zeros(self.count, x.shape[1], y.shape[1])
        for e, a, b in self.slices:
            torch.mm(x[a:b].T, y[a:b], out=found[e])
        return found


def _kernel(x: Tensor, y: Tensor) -> bool:
    """Whether torch's grouped kernel takes these: bfloat16 on CUDA, rows of whole 16 bytes."""
    if not (x.is_cuda and x.dtype == y.dtype == torch.bfloat16 and x.shape[0]):
        return False
    if not hasattr(torch, "_grouped_mm") or torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    return all(n % ALIGNMENT == 0 for n in (x.shape[-1], *y.shape[1:])) and x.is_contiguous()


def _grouped_mm(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(x, y, offs=ends)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dequantize, groups, scalings, *factors):
        y = groups.linear(x, dequantize(x.dtype).transpose(1, 2))
        products = []
        for scaling, a, b in zip(scalings, factors[::2], factors[1::2], strict=True):
            h = groups.linear(x, a.transpose(1, 2))
            y.add_(groups.linear(h, b.transpose(1, 2)), alpha=scaling)
            products.append(h)
        ctx.save_for_backward(x, *factors, *products)
        ctx.dequantize, ctx.groups, ctx.scalings = dequantize, groups, scalings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        groups, count = ctx.groups, 2 * len(ctx.scalings)
        x, *saved = ctx.saved_tensors
        factors, products = saved[:count], saved[count:]
        need_x = ctx.needs_input_grad[0]
        g = g.to(x.dtype).contiguous()
        gx = groups.linear(g, ctx.dequantize(x.dtype)) if need_x else None
        grads = []
        for i, (scaling, h) in enumerate(zip(ctx.scalings, products, strict=True)):
            a, b = factors[2 * i], factors[2 * i + 1]
            need_a, need_b = ctx.needs_input_grad[4 + 2 * i], ctx.needs_input_grad[5 + 2 * i]
            gh = groups.linear(g, b).mul_(scaling) if need_a or need_x else None
            grads.append(groups.outer(gh, x) if need_a else None)
            grads.append(groups.outer(g, h).mul_(scaling) if need_b else None)
            if gx is not None:
                gx.add_(groups.linear(gh, a))
        return gx, None, None, None, *grads


def expert_linear(
    x: Tensor,
    dequantize: Callable[[torch.dtype], Tensor],
    groups: Groups,
    updates: Sequence[ExpertUpdate] = (),
    hit: Tensor | None = None,
) -> Tensor:
    """Rows through the experts that they belong to, differentiable once in `x` and the updates' tensors.

    Args:
        x: (rows, in_features), in the order of `groups`, in the dtype to compute in.
        dequantize: gives Ŵ of the experts of `groups`, (experts, out_features, in_features), in a dtype.
        groups: which rows belong to which of these experts.
        updates: the active adapters, over all experts of the layer.
        hit: int64, which of the layer's experts those of `groups` are; None is all of them.

    Returns:
        (rows, out_features) in the dtype of `x`.
    """
    factors: list[Tensor] = []
    for a, b, _ in updates:
        if hit is not None:
            a, b = a.index_select(0, hit), b.index_select(0, hit)
        odd = -a.shape[1] % ALIGNMENT if x.is_cuda else 0  # ranks that the kernels do not take: rows of zeros
        factors.append(torch.nn.functional.pad(a.to(x.dtype), (0, 0, 0, odd)).contiguous())
        factors.append(torch.nn.functional.pad(b.to(x.dtype), (0, odd)).contiguous())
    with torch.autocast(x.device.type, enabled=False):
        scalings = tuple(u.scaling for u in updates)
        return _ExpertLinear.apply(x.contiguous(), dequantize, groups, scalings, *factors)

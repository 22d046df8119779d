"""The arithmetic of the linear, forward and backward, on matrices: what autograd's function and the operator share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qft import kernels


class Layout(NamedTuple):
    """How the updates' tensors follow each other: A, B, then what these flags say, for each update."""

    scalings: Sequence[float]
    has_dropped: Sequence[bool]
    has_bias: Sequence[bool]


def inner(x: Tensor, tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """xᵢ Aᵢᵀ (n, rank) for each update, in the dtype of `x` (n, in_features)."""
    found, at = [], 0
    for dropped, biased in zip(layout.has_dropped, layout.has_bias, strict=True):
        found.append((tensors[at + 2] if dropped else x) @ tensors[at].to(x.dtype).T)
        at += 2 + dropped + biased
    return found


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    products: Sequence[Tensor],
    layout: Layout,
) -> Tensor:
    """y (n, out_features) in the dtype of `x` (n, in_features); `products` are those of `inner`."""
    dtype, at = x.dtype, 0
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))
    for scaling, dropped, biased, h in zip(*layout, products, strict=True):
        kernels.add_low_rank(y, h, tensors[at + 1].to(dtype), scaling)
        at += 2 + dropped
        if biased:
            y.add_(tensors[at].to(dtype), alpha=scaling)
            at += 1
    return y


def backward(
    g: Tensor,
    x: Tensor,
    weight: Callable[[], Tensor],
    tensors: Sequence[Tensor],
    products: Sequence[Tensor],
    layout: Layout,
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of the updates' tensors, in the tensors' own dtypes; None where none is needed."""
    dtype = x.dtype
    if g.dtype != dtype:
        g = g.to(dtype)
    gx = g @ weight() if need_x else None
    grads: list[Tensor | None] = []
    at = 0
    for scaling, dropped, biased, h in zip(*layout, products, strict=True):
        a, b = tensors[at], tensors[at + 1]
        xi = tensors[at + 2] if dropped else x
        needs_a, needs_b, needs_xi = needs[at], needs[at + 1], dropped and needs[at + 2]
        gh = g @ b.to(dtype) if needs_a or needs_xi or need_x else None
        grads.append((gh.T @ xi).mul_(scaling).to(a.dtype) if needs_a and gh is not None else None)
        grads.append((g.T @ h).mul_(scaling).to(b.dtype) if needs_b else None)
        at += 2
        if dropped:
            grads.append((gh @ a.to(dtype)).mul_(scaling) if needs_xi and gh is not None else None)
            at += 1
        elif gx is not None and gh is not None:
            kernels.add_low_rank(gx, gh, a.to(dtype).T, scaling)
        if biased:
            grads.append(bias_gradient(g, tensors[at].dtype, scaling) if needs[at] else None)
            at += 1
    return gx, grads


def bias_gradient(g: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """The sum over rows, taken in float32."""
    return g.sum(0, dtype=torch.float32).mul_(scaling).to(dtype)

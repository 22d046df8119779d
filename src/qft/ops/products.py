"""The arithmetic of the linear, forward and backward, on matrices: what autograd's function and the operator share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How the updates' tensors follow each other: A, B, then what these flags say, for each update."""

    scalings: Sequence[float]
    has_dropped: Sequence[bool]
    has_bias: Sequence[bool]


def _unsupported() -> frozenset[torch.dtype]:
    """The half precisions that this processor has no instructions for: products in them take up to 60 times as long."""
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return frozenset(d for d, ask in asks.items() if not getattr(torch.ops.mkldnn, ask, lambda: False)())


_UNSUPPORTED = _unsupported()


def working_dtype(x: Tensor) -> torch.dtype:
    """What to multiply in: the dtype of `x`, or float32 where that is faster; results are rounded once, at their end."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in _UNSUPPORTED else x.dtype


def settled(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off, where it is on: the dtypes are settled here."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def inner(x: Tensor, tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """xᵢ Aᵢᵀ (n, rank) for each update, in the working dtype of `x` (n, in_features)."""
    found, at, dtype = [], 0, working_dtype(x)
    with settled(x):
        for dropped, biased in zip(layout.has_dropped, layout.has_bias, strict=True):
            found.append((tensors[at + 2] if dropped else x).to(dtype) @ tensors[at].to(dtype).T)
            at += 2 + dropped + biased
    return found


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    products: Sequence[Tensor],
    layout: Layout,
    base: Tensor | None = None,
) -> Tensor:
    """Compute y (n, out_features) in the dtype of `x` (n, in_features); `products` are those of `inner`.

    `base` is x Ŵᵀ where that was computed in another way, in the place of `weight`; it is overwritten.
    """
    dtype, at = working_dtype(x), 0
    if base is not None:
        y, beta = base.to(dtype), 1
    else:
        y, beta = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), 0
    for scaling, dropped, biased, h in zip(*layout, products, strict=True):
        y.addmm_(h, tensors[at + 1].to(dtype).T, beta=beta, alpha=scaling)
        at, beta = at + 2 + dropped, 1
        if biased:
            y.add_(tensors[at].to(dtype), alpha=scaling)
            at += 1
    # the large product comes last, since adding to what is there costs it less than a pass over y for each update
    if base is None:
        y.addmm_(x.to(dtype), weight.to(dtype).T, beta=beta)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype)


def backward(
    g: Tensor,
    x: Tensor,
    weight: Callable[[], Tensor],
    tensors: Sequence[Tensor],
    products: Sequence[Tensor],
    layout: Layout,
    need_x: bool,
    needs: Sequence[bool],
    base: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of the updates' tensors, in the tensors' own dtypes; None where none is needed.

    `base` computes g Ŵ in another way, in the place of `weight`.
    """
    dtype = working_dtype(x)
    gx, beta = None, 0
    if need_x and base is not None:
        gx, beta = base(g).to(dtype), 1
    elif need_x:
        gx = x.new_empty(x.shape, dtype=dtype)
    g = g.to(dtype)
    grads: list[Tensor | None] = []
    at = 0
    for scaling, dropped, biased, h in zip(*layout, products, strict=True):
        a, b = tensors[at], tensors[at + 1]
        xi = (tensors[at + 2] if dropped else x).to(dtype)
        needs_a, needs_b, needs_xi = needs[at], needs[at + 1], dropped and needs[at + 2]
        gh = g @ b.to(dtype) if needs_a or needs_xi or need_x else None
        grads.append(_scaled(gh.T, xi, scaling).to(a.dtype) if needs_a and gh is not None else None)
        grads.append(_scaled(g.T, h, scaling).to(b.dtype) if needs_b else None)
        at += 2
        if dropped:
            grads.append(_scaled(gh, a.to(dtype), scaling).to(x.dtype) if needs_xi and gh is not None else None)
            at += 1
        elif gx is not None and gh is not None:
            gx.addmm_(gh, a.to(dtype), beta=beta, alpha=scaling)
            beta = 1
        if biased:
            grads.append(bias_gradient(g, tensors[at].dtype, scaling) if needs[at] else None)
            at += 1
    if gx is not None and base is None:
        gx.addmm_(g, weight().to(dtype), beta=beta)
    return None if gx is None else gx.to(x.dtype), grads


def _scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute s A B, rounded once."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scaling)


def bias_gradient(g: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """The sum over rows, taken in float32."""
    return g.sum(0, dtype=torch.float32).mul_(scaling).to(dtype)

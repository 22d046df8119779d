"""The linear that every quantized layer computes with: dequantize, one GEMM, and the low-rank updates on top.

    y = x Ŵᵀ + bias + Σᵢ sᵢ (xᵢ Aᵢᵀ Bᵢᵀ + bᵢ)

`x` is (..., in_features), Ŵ (out_features, in_features), Aᵢ (rank, in_features), Bᵢ (out_features, rank), and xᵢ is
`x` after adapter i's dropout; where that adapter pools its input, xᵢ and Aᵢ have as many features as there are groups.
Nothing of size Ŵ is kept for the backward pass: Ŵ is dequantized again there. The adapters' masters may be float32: they
are cast to the compute dtype inside, and their gradients come back in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Update(NamedTuple):
    """One adapter's share: `dropped` is the input after dropout and pooling, or None where that is the input itself."""

    A: Tensor
    B: Tensor
    scaling: float
    dropped: Tensor | None = None
    bias: Tensor | None = None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, dequantize, scalings, has_dropped, has_bias, *tensors):
        dtype = x.dtype
        weight = dequantize(dtype)
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))
        del weight
        saved, rest = [], list(tensors)
        for scaling, dropped, biased in zip(scalings, has_dropped, has_bias, strict=True):
            a, b = rest.pop(0).to(dtype), rest.pop(0).to(dtype)
            xi = rest.pop(0) if dropped else x
            h = xi @ a.T
            y.addmm_(h, b.T, alpha=scaling)
            if biased:
                y.add_(rest.pop(0).to(dtype), alpha=scaling)
            saved += [a, b, h] + ([xi] if dropped else [])
        ctx.save_for_backward(x, *saved)
        ctx.dequantize, ctx.scalings = dequantize, scalings
        ctx.has_dropped, ctx.has_bias = has_dropped, has_bias
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, *saved = ctx.saved_tensors
        if g.dtype != x.dtype:
            g = g.to(x.dtype)
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        gx = g @ ctx.dequantize(x.dtype) if need_x else None
        gbias = g.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None
        needs, grads, at = ctx.needs_input_grad[6:], [], 0
        for scaling, dropped, biased in zip(ctx.scalings, ctx.has_dropped, ctx.has_bias, strict=True):
            a, b, h = saved.pop(0), saved.pop(0), saved.pop(0)
            xi = saved.pop(0) if dropped else x
            gh = g @ b if needs[at] or need_x or (dropped and needs[at + 2]) else None
            grads.append((gh.T @ xi).mul_(scaling).to(ctx.dtypes[at]) if needs[at] else None)
            grads.append((g.T @ h).mul_(scaling).to(ctx.dtypes[at + 1]) if needs[at + 1] else None)
            at += 2
            if dropped:
                grads.append((gh @ a).mul_(scaling) if needs[at] else None)
                at += 1
            elif need_x:
                gx.addmm_(gh, a, alpha=scaling)
            if biased:
                grads.append(g.sum(0, dtype=torch.float32).mul_(scaling).to(ctx.dtypes[at]) if needs[at] else None)
                at += 1
        return gx, gbias, None, None, None, None, *grads


def lora_linear(
    x: Tensor,
    dequantize: Callable[[torch.dtype], Tensor],
    bias: Tensor | None = None,
    updates: Sequence[Update] = (),
) -> Tensor:
    """Compute `x Ŵᵀ + bias + Σ updates`, differentiable once in x, bias and the updates' tensors.

    Args:
        x: (..., in_features), a float tensor. Under autocast it is cast to the autocast dtype first.
        dequantize: gives Ŵ of shape (out_features, in_features) in the dtype that it is called with.
        bias: (out_features,) or None.
        updates: the active adapters.

    Returns:
        (..., out_features) in the dtype of the computation: the autocast dtype, else that of `x`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        updates = [u._replace(dropped=None if u.dropped is None else u.dropped.to(x.dtype)) for u in updates]
    # flattened out here: what an autograd function returns must be no view, or it cannot be changed in place
    shape = x.shape[:-1]
    tensors: list[Tensor] = []
    for u in updates:
        tensors += [u.A, u.B]
        if u.dropped is not None:
            tensors.append(u.dropped.reshape(-1, u.dropped.shape[-1]))
        if u.bias is not None:
            tensors.append(u.bias)
    with torch.autocast(device, enabled=False):
        y = _LoraLinear.apply(
            x.reshape(-1, x.shape[-1]),
            bias,
            dequantize,
            tuple(u.scaling for u in updates),
            tuple(u.dropped is not None for u in updates),
            tuple(u.bias is not None for u in updates),
            *tensors,
        )
    return y.view(*shape, y.shape[-1])

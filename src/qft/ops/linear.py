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

from qft.ops import float8
from qft.ops.operator import operator
from qft.ops.products import Layout, backward, bias_gradient, forward, inner, settled
from qft.ops.source import Source


class Update(NamedTuple):
    """One adapter's share: `dropped` is the input after dropout and pooling, or None where that is the input itself."""

    A: Tensor
    B: Tensor
    scaling: float
    dropped: Tensor | None = None
    bias: Tensor | None = None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, dequantize, layout, in_float8, *tensors):
        products = inner(x, tensors, layout)
        if in_float8:
            base = float8.forward_product(*float8.rows(x), dequantize.layer)
            y = forward(x, None, bias, tensors, products, layout, base)
        else:
            y = forward(x, dequantize(x.dtype), bias, tensors, products, layout)
        ctx.save_for_backward(x, *tensors, *products)
        ctx.dequantize, ctx.layout, ctx.count, ctx.in_float8 = dequantize, layout, len(tensors), in_float8
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, *saved = ctx.saved_tensors
        tensors, products = saved[: ctx.count], saved[ctx.count :]
        need_x, need_bias = ctx.needs_input_grad[:2]
        base = (lambda g: float8.gradient_product(g, ctx.dequantize.layer)) if ctx.in_float8 else None
        with settled(x):
            gx, grads = backward(
                g, x, lambda: ctx.dequantize(x.dtype), tensors, products, ctx.layout, need_x, ctx.needs_input_grad[5:],
                base,
            )  # fmt: skip
        return gx, bias_gradient(g, ctx.bias_dtype) if need_bias else None, None, None, None, *grads


def lora_linear(
    x: Tensor,
    dequantize: Callable[[torch.dtype], Tensor],
    bias: Tensor | None = None,
    updates: Sequence[Update] = (),
    *,
    in_float8: bool = False,
) -> Tensor:
    """Compute `x Ŵᵀ + bias + Σ updates`, differentiable once in x, bias and the updates' tensors.

    Args:
        x: (..., in_features), a float tensor. Under autocast it is cast to the autocast dtype first.
        dequantize: gives Ŵ of shape (out_features, in_features) in the dtype that it is called with. Under
            torch.compile, a `Source` makes the whole linear one operator; other functions are traced.
        bias: (out_features,) or None.
        updates: the active adapters.
        in_float8: with gradients, and where the computation is in bfloat16, x Ŵᵀ and its gradient are the products of
            `qft.ops.float8`; `dequantize` is a `Source` then, of a layer that they fit.

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
    flat = x.reshape(-1, x.shape[-1])
    layout = Layout(
        tuple(u.scaling for u in updates),
        tuple(u.dropped is not None for u in updates),
        tuple(u.bias is not None for u in updates),
    )
    in_float8 = in_float8 and x.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if torch.compiler.is_compiling() and isinstance(dequantize, Source):
        y = operator(flat, dequantize, bias, tensors, layout, in_float8)
    else:
        with settled(x):
            y = _LoraLinear.apply(flat, bias, dequantize, layout, in_float8 and len(flat) > 0, *tensors)
    return y.view(*shape, y.shape[-1])

"""The linear as one operator of torch's, so that torch.compile neither breaks a graph at a backend nor looks into it.

Inside, the weight is dequantized by the backend's own code. A layer cannot be an argument of an operator: it goes in as a
tensor that holds its number. The tensor is an input of the compiled code, which all layers of a kind then share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qft.ops import float8
from qft.ops.products import Layout, backward, bias_gradient, forward, inner, settled
from qft.ops.source import Source, _layer

if TYPE_CHECKING:
    pass


def operator(
    x: Tensor, source: Source, bias: Tensor | None, tensors: Sequence[Tensor], layout: Layout, in_float8: bool = False
) -> Tensor:
    """`x` (n, in_features) through the linear of `source`; see `qft.ops.linear.lora_linear`."""
    # The backward pass wants these; were they results of the operator, recomputing them would multiply by the weight again.
    products = inner(x.detach(), [t.detach() for t in tensors], layout)
    # an operator by itself, so that the compiler sees that linears with one input share it
    codes, scale = torch.ops.qft.float8_rows(x.detach()) if in_float8 else (None, None)
    return torch.ops.qft.lora_linear(
        x, codes, scale, source.number, source.out_features, bias, list(tensors), products, list(layout.scalings),
        list(layout.has_dropped), list(layout.has_bias),
    )  # fmt: skip


_library = torch.library.Library("qft", "DEF")
_LAYOUT = "float[] scalings, bool[] has_dropped, bool[] has_bias"
_library.define(
    "lora_linear(Tensor x, Tensor? codes, Tensor? scale, Tensor number, SymInt out_features, Tensor? bias, "
    "Tensor[] tensors, Tensor[] products, "
    f"{_LAYOUT}) -> Tensor"
)
_library.define(
    f"lora_linear_backward(Tensor g, Tensor x, Tensor number, Tensor[] tensors, Tensor[] products, {_LAYOUT}, "
    "bool in_float8, bool need_x, bool[] needs) -> Tensor[]"
)
_library.define("float8_rows(Tensor x) -> (Tensor, Tensor)")


@torch.library.impl(_library, "float8_rows", "CompositeExplicitAutograd")
def _rows(x):
    return float8.rows(x)


@torch.library.register_fake("qft::float8_rows", lib=_library)
def _rows_shapes(x):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.impl(_library, "lora_linear", "CompositeExplicitAutograd")
def _forward(x, codes, scale, number, out_features, bias, tensors, products, scalings, has_dropped, has_bias):
    layout, layer, weight, base = Layout(scalings, has_dropped, has_bias), _layer(number), None, None
    with settled(x):
        if codes is not None and len(x):
            base = float8.forward_product(codes, scale, layer)
        else:
            weight = layer.dequantized(x.dtype)
        return forward(x.contiguous(), weight, bias, tensors, products, layout, base)


@torch.library.register_fake("qft::lora_linear", lib=_library)
def _forward_shape(x, codes, scale, number, out_features, bias, tensors, products, scalings, has_dropped, has_bias):
    return x.new_empty(x.shape[0], out_features)


@torch.library.impl(_library, "lora_linear_backward", "CompositeExplicitAutograd")
def _backward(g, x, number, tensors, products, scalings, has_dropped, has_bias, in_float8, need_x, needs):
    layout, layer = Layout(scalings, has_dropped, has_bias), _layer(number)
    base = (lambda g: float8.gradient_product(g, layer)) if in_float8 and len(x) else None
    with settled(x):
        gx, grads = backward(
            g.contiguous(), x.contiguous(), lambda: layer.dequantized(x.dtype), tensors, products, layout, need_x,
            needs, base,
        )  # fmt: skip
    return [t for t in (gx, *grads) if t is not None]


@torch.library.register_fake("qft::lora_linear_backward", lib=_library)
def _backward_shapes(g, x, number, tensors, products, scalings, has_dropped, has_bias, in_float8, need_x, needs):
    wanted = [torch.empty_like(t, memory_format=torch.contiguous_format) for t, n in zip(tensors, needs) if n]
    return ([x.new_empty(x.shape)] if need_x else []) + wanted


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, _, number, _, bias, tensors, products, scalings, has_dropped, has_bias = inputs
    ctx.save_for_backward(x, number, *tensors, *products)
    ctx.count, ctx.layout, ctx.in_float8 = len(tensors), (scalings, has_dropped, has_bias), codes is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, number, *saved = ctx.saved_tensors
    tensors, products = saved[: ctx.count], saved[ctx.count :]
    need_x, need_bias, needs = (ctx.needs_input_grad[i] for i in (0, 5, 6))
    needs = list(needs) if tensors else []
    found: list[Tensor] = []
    if need_x or any(needs):
        arguments = (g, x, number, tensors, products, *ctx.layout, ctx.in_float8, need_x, needs)
        found = list(torch.ops.qft.lora_linear_backward(*arguments))
    gx = found.pop(0) if need_x else None
    gbias = bias_gradient(g, ctx.bias_dtype) if need_bias else None
    grads = [found.pop(0) if n else None for n in needs]
    # torch takes an empty list for one of tensors, whose gradient is an empty list, too
    layout = ([] if not values else None for values in ctx.layout)
    return gx, None, None, None, None, gbias, grads, [None] * len(products), *layout


torch.library.register_autograd("qft::lora_linear", _differentiate, setup_context=_save, lib=_library)

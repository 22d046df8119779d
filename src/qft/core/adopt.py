"""Recognize models that other tools quantized, and convert their layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Container

import torch
from torch import nn
from transformers import PretrainedConfig

from qft.core import record as marks
from qft.core.names import bare_name
from qft.core.packed import PackedLinear
from qft.core.quantizer import Quantizer, is_conv1d, replace_module
from qft.core.registry import converted, quantizer_of
from qft.core.transformers_quantizer import mark


def adopt(model: nn.Module) -> marks.Record | None:
    """The note on a model; where somebody else quantized it, written now. None for a float model."""
    record = marks.record_of(model)
    if record is not None:
        return record
    base = marks.base_model(model)
    _convert_layers(base)
    dtype = getattr(getattr(base, "config", None), "dtype", None)
    found: dict[str, Quantizer] = {}
    for name, module in base.named_modules():
        quantizer = quantizer_of(module)
        if quantizer is None:
            continue
        if isinstance(dtype, torch.dtype) and not hasattr(module, "qft_dtype"):
            module.qft_dtype = dtype
        found[bare_name(name)] = quantizer
    if not found:
        return None
    record = marks.Record(quantizers=found)
    mark(base, record)
    return record


def _convert_layers(model: nn.Module) -> None:
    """Put our own layers in the place of other tools'; none before all of them can be converted."""
    found = {n: converted(m) for n, m in model.named_modules() if n}
    ours = {n: m for n, m in found.items() if m is not None}
    ours = {n: m for n, m in ours.items() if not any(n[:i] in ours for i, c in enumerate(n) if c == ".")}  # outermost
    dtype, transposed = _float_dtype(model, ours), _conv1d_names(model) if ours else set()
    for name, layer in ours.items():
        if isinstance(layer, PackedLinear):
            if isinstance(dtype, torch.dtype):  # other tools' layers do not know what the model computes in
                layer.dtype = dtype
                if layer.bias is not None:
                    layer.bias.data = layer.bias.data.to(dtype)
            if name in transposed:
                layer.kind = "conv1d"
        replace_module(model, name, layer)


def _float_dtype(model: nn.Module, layers: Container[str]) -> torch.dtype | None:
    """What a model with these layers computes in: the dtype that it tells, where that is not of codes or constants."""
    dtype = getattr(model, "dtype", None)
    if isinstance(getattr(model, "config", None), PretrainedConfig) or dtype is None:
        return dtype
    others = (m for n, m in model.named_modules() if n not in layers and n.rpartition(".")[0] not in layers)
    own = (p.dtype for m in others for p in m.parameters(recurse=False) if p.is_floating_point())
    return next(own, None)


def _conv1d_names(model: nn.Module) -> set[str]:
    """The layers that are `Conv1D` in the float model: those of other tools do not say so."""
    if not hasattr(sys.modules.get(type(model).__module__), "Conv1D"):
        return set()
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return {n for n, m in type(model)(config).named_modules() if is_conv1d(m)}

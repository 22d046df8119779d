"""A model's linear weights by name, float and quantized alike, and whether two models came from the same ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from qft.core import record
from qft.core.experts import PackedExperts
from qft.core.quantizer import QuantizedWeight, Quantizer
from qft.core.registry import quantizer_of
from qft.core.unquantized import Unquantized, is_float_linear
from qft.lora.experts import QftExperts
from qft.lora.layer import QftLinear
from qft.lora.merging.detach import detach_from


def linear_weights(model: nn.Module) -> dict[str, tuple[Quantizer, QuantizedWeight]]:
    """The base weights of linear layers by the names that they have without adapters; modules trained whole left out."""
    found: dict[str, tuple[Quantizer, QuantizedWeight]] = {}
    inside: tuple[str, ...] = ()
    for name, module in record.base_model(model).named_modules():
        if name.startswith(inside) or isinstance(module, QftExperts):
            continue
        if isinstance(module, PackedExperts):
            continue
        if isinstance(module, QftLinear):
            found[name] = module.quantizer, module.handle
        elif not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            quantizer = quantizer_of(module) or (Unquantized() if is_float_linear(module) else None)
            if quantizer is None:
                continue
            found[name] = quantizer, quantizer.weights(module)[0]
        inside += (f"{name}.",)
    return found


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of `model` is quantized, whoever did it."""
    return any(quantizer_of(m) is not None for m in model.modules())


@contextmanager
def float_twin(model: nn.Module, quantizers: Iterable[Quantizer | None]) -> Iterator[nn.Module]:
    """A copy of a float model, to be quantized within the block; linear weights are shared until they are.

    A quantizer that works layer by layer makes new layers of them; what it leaves in float is copied at the end.
    """
    shared: list[tuple[nn.Parameter, nn.Parameter]] = []
    memo: dict[int, nn.Parameter] = {}
    if all(q is None or type(q).quantize is Quantizer.quantize for q in quantizers):
        for module in model.modules():
            if is_float_linear(module) and id(module.weight) not in memo and not module.weight.is_inference():
                memo[id(module.weight)] = nn.Parameter(module.weight.detach(), module.weight.requires_grad)
                shared.append((module.weight, memo[id(module.weight)]))
    twin = copy.deepcopy(model, memo)
    detach_from(model, twin)
    yield twin
    kept = {id(p) for p in twin.parameters()}
    for parameter, view in shared:
        if id(view) in kept and view.data_ptr() == parameter.data_ptr():
            view.data = view.data.clone()

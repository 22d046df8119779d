"""A model's linear weights by name, float and quantized alike, and whether two models came from the same ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from qft import marks
from qft.backends.unquantized import Unquantized, is_float_linear
from qft.detach import detach_from
from qft.errors import AdapterMismatch, QftWarning
from qft.experts import PackedExperts
from qft.lora.experts import QftExperts
from qft.lora.layer import QftLinear
from qft.quantizer import QuantizedWeight, Quantizer
from qft.registry import quantizer_of


def linear_weights(model: nn.Module) -> dict[str, tuple[Quantizer, QuantizedWeight]]:
    """The base weights of linear layers by the names that they have without adapters; modules trained whole left out."""
    found: dict[str, tuple[Quantizer, QuantizedWeight]] = {}
    inside: tuple[str, ...] = ()
    for name, module in marks.base_model(model).named_modules():
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


class Origin:
    """What is known of the float weights that a quantized model came from."""

    def __init__(self, model: nn.Module):
        record = marks.record_of(model)
        self.known: dict[str, tuple[tuple[int, ...], list[float] | None]] = {}
        self.compared: set[str] = set()
        for name, (quantizer, handle) in linear_weights(model).items():
            entry = record.fingerprint.get(name)
            if entry is None and isinstance(quantizer, Unquantized):
                entry = marks.of_weight(quantizer.dequantize(handle))
            self.known[name] = entry or (handle.shape, None)
        if not record.fingerprint:
            warnings.warn(
                "whether the float weights are those that the source was quantized from cannot be checked: it has no "
                "fingerprint of them",
                QftWarning,
                stacklevel=5,
            )

    def compare(self, name: str, weight: Tensor) -> None:
        """Raise `AdapterMismatch` where this float weight is another than the model came from."""
        if name not in self.known or name in self.compared:  # unknown: trained whole, so that its base does not matter
            return
        shape, values = self.known[name]
        same = tuple(shape) == tuple(weight.shape)
        if same and values is not None and not weight.is_meta:
            same = not marks.same_origin({name: (shape, values)}, {name: marks.of_weight(weight)})
            self.compared.add(name)
        if not same:
            raise AdapterMismatch(
                f"the source was made from other float weights than these: {name} differs; give the float model that its "
                "base was quantized from"
            )

    def compare_all(self, model: nn.Module) -> None:
        """`compare` every weight of `model` that is float, and find those of all layers."""
        found = linear_weights(model)
        missing = [n for n in self.known if n not in found]
        if missing:
            raise AdapterMismatch(
                f"the float weights are those of another model: it has no linear layer {missing[0]}, which the source has"
            )
        for name, (quantizer, handle) in found.items():
            if isinstance(quantizer, Unquantized):
                self.compare(name, quantizer.dequantize(handle))

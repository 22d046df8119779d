"""The float model that a merge makes, on "meta", and its tensors, one layer at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from qft.core import record
from qft.core.experts import float_experts, stacks
from qft.core.originals import Originals
from qft.core.registry import quantizer_of
from qft.core.ties import check_parting, settle_tie
from qft.errors import UnsupportedDevice, UnsupportedOperation
from qft.lora.experts import QftExperts
from qft.lora.layer import QftLinear
from qft.lora.merging.float_copy import FloatLayers, cast, copy_bare, empty_layer
from qft.lora.merging.report import MergeReport


class HollowModel:
    """What `qft.merge_to_float` would return, without its weights: call with a name of its state dict for one.

    Attributes:
        model: the plain float model on "meta": classes, config, ties and dtypes are those of the merged one.
        state: name → tensor on "meta", as `model.state_dict()` has it.

    Args:
        model: wrapped or quantized, as `merge_to_float` takes it; left as it is.
        dtype: of the float model; None is each weight's own.
        originals: the original weights to merge into, or None.

    Raises:
        UnsupportedDevice: weights on "meta" or on disk.
        NonFiniteWeights, UnsupportedOperation: as `merge_to_float`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, originals: Originals | None = None):
        self.base, self.dtype = record.base_model(model), dtype
        self._report = MergeReport("float", source="dequantized" if originals is None else "original")
        self._floats = FloatLayers(dtype, originals)
        self._layers: dict[int, tuple[str, nn.Module, nn.Module]] = {}  # id of a tensor on meta → where it comes from
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}  # the same, for tensors that are taken over as they are
        self._ready: dict[int, Tensor] = {}
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor on meta → it, and the one with its values
        self.model = self._build()
        self.state: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name, in its dtype, on the device that the quantized layer is on."""
        wanted = self.state[name]
        return self._value(wanted).to(wanted.dtype)

    @property
    def report(self) -> MergeReport:
        """Of the layers that were merged so far, in the model's order."""
        order = {name: i for i, (name, _, _) in enumerate(self._layers.values())}
        found = self._floats.weights  # of layers by their names, of fused experts by the names of their parameters
        place = {name: order.get(name, order.get(name.rpartition(".")[0], -1)) for name in found}
        self._report.weights = {name: found[name] for name in sorted(found, key=place.__getitem__)}
        return self._report

    def _build(self) -> nn.Module:
        check_parting(self.base)
        memo: dict[int, Any] = {}
        inside: set[int] = set()
        for name, module in self.base.named_modules():
            if id(module) in inside:
                continue
            new = self._hollow_layer(module, name)
            if new is None:
                continue
            memo[id(module)] = new
            inside.update(id(m) for m in module.modules())
            for tensor in _tensors_of(new):
                self._layers[id(tensor)] = (name, module, new)
        outside = [m for m in self.base.modules() if id(m) not in inside]
        for tensor in [t for m in outside for t in [*m._parameters.values(), *m._buffers.values()] if t is not None]:
            if tensor.is_meta:
                raise UnsupportedDevice(
                    "weights of this model are on 'meta', or offloaded to disk: load it whole onto a device"
                )
            if id(tensor) not in memo:
                memo[id(tensor)] = new_tensor = _on_meta(tensor)
                self._tensors[id(new_tensor)] = (new_tensor, tensor.detach())  # an id holds while its tensor lives
        plain = copy_bare(self.base, memo)
        settle_tie(plain, lambda a, b: torch.equal(self._value(a), self._value(b)), self._twin)
        self._ready.clear()
        if self.dtype is not None:
            cast(plain, self.dtype)
        return plain

    def _hollow_layer(self, module: nn.Module, name: str) -> nn.Module | None:
        """What `FloatLayers` returns, on "meta"; None where a module is copied as it is."""
        if isinstance(module, QftLinear):
            if not (module.merged or module.disable_adapters):
                module.merged_bias([a for a in module.active_adapters if a in module.lora_A])  # refuses what cannot be
            quantizer, handle = module.quantizer, module.handle
        elif isinstance(module, QftExperts) or stacks(module):
            base = module.get_base_layer() if isinstance(module, QftExperts) else module
            weights = {
                k: torch.empty(s.shape, dtype=self.dtype or s.dtype, device="meta") for k, s in stacks(base).items()
            }
            memo = {id(t): _on_meta(t) for t in _tensors_of(base)}
            return float_experts(base, weights, memo)
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):  # embeddings, modules trained whole
            real = self._floats(module, name)
            return copy.deepcopy(real, {id(t): _on_meta(t) for t in _tensors_of(real)})
        else:
            quantizer = quantizer_of(module)
            if quantizer is None:
                return None
            handle = quantizer.weights(module)[0]
        if not quantizer.capabilities.merge_to_float:
            raise UnsupportedOperation(f"{quantizer!r} cannot give its weights as floats (capability merge_to_float)")
        return empty_layer(handle, self.dtype, handle.bias is not None).train(handle.module.training)

    def _twin(self, hollow: Tensor) -> nn.Parameter:
        """Another parameter on meta with the same values."""
        twin = nn.Parameter(torch.empty_like(hollow), requires_grad=hollow.requires_grad)
        self._twins[id(twin)] = (twin, hollow)
        return twin

    def _value(self, hollow: Tensor) -> Tensor:
        while id(hollow) in self._twins:
            hollow = self._twins[id(hollow)][1]
        key = id(hollow)
        if key in self._tensors:
            return self._tensors[key][1]
        if key not in self._ready:
            name, module, new = self._layers[key]
            real = self._floats(module, name)
            values = real.state_dict()
            self._ready.update({id(t): values[k] for k, t in new.state_dict(keep_vars=True).items()})
        return self._ready.pop(key).detach()


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _on_meta(tensor: Tensor) -> Tensor:
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta

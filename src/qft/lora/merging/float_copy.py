"""A plain float copy of a quantized or wrapped model, on its device or, where that has no room, in host memory."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from qft.core.devices import free_bytes
from qft.core.experts import PackedExperts, as_stack, float_experts, stacks
from qft.core.originals import Originals
from qft.core.quantizer import QuantizedWeight, Quantizer
from qft.core.registry import quantizer_of
from qft.core.structure import recomputes_activations
from qft.core.ties import check_parting, settle_tie
from qft.core.transformers_quantizer import unmark
from qft.core.unquantized import Unquantized
from qft.errors import NonFiniteWeights, QftWarning, UnsupportedDevice, UnsupportedOperation
from qft.lora.experts import QftExperts, chain
from qft.lora.generating import Generate
from qft.lora.layer import QftLinear
from qft.lora.merge_weight import WeightMerge, compare_merge
from qft.lora.merging.detach import detach_from
from qft.lora.view import LinearView
from qft.lora.view_merging import available, is_over_view, merged_by_peft

HOST = torch.device("cpu")


class FloatLayers:
    """The float module in the place of each quantized or wrapped one.

    Args:
        dtype: of the floats; None is that of the float model.
        originals: the weights to put what was learnt on; None takes the dequantized ones.

    Attributes:
        weights: layer name → what merging did to it; adapted layers only.
    """

    def __init__(self, dtype: torch.dtype | None, originals: Originals | None):
        self.dtype, self.originals = dtype, originals
        self.weights: dict[str, WeightMerge] = {}

    def __call__(self, module: nn.Module, name: str) -> nn.Module | None:
        """The float module; None for what is copied as it is.

        Raises:
            UnsupportedOperation: a backend that gives no floats, or an adapter that cannot be merged.
            NonFiniteWeights: NaN or infinity in an adapter, or a weight that is too large for the dtype.
        """
        if isinstance(module, QftLinear):
            return self._merged(module, name)
        if isinstance(module, QftExperts) or stacks(module):
            return self._experts(module, name)
        if isinstance(module, ModulesToSaveWrapper):
            active = None if module.disable_adapters or not module.active_adapters else module.active_adapters[0]
            return copy.deepcopy(module.modules_to_save[active] if active else module.original_module)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if is_over_view(module):
                return self._merged_by_peft(module, name)
            twin = copy.deepcopy(module)
            if hasattr(twin, "unload_and_optionally_merge_module"):
                return twin.unload_and_optionally_merge_module(
                    not twin.disable_adapters, safe_merge=True, adapter_names=None
                )
            if not twin.merged and not twin.disable_adapters:
                twin.merge(safe_merge=True)
            return twin.get_base_layer()
        quantizer = quantizer_of(module)
        if quantizer is None:
            return None
        handle = quantizer.weights(module)[0]
        return self._layer(quantizer, handle, self._original(name, quantizer.dequantize(handle, dtype=torch.float32)))

    def _experts(self, module: nn.Module, name: str) -> nn.Module:
        """The experts module with float parameters."""
        around = {layer.parameter_name: layer for layer in chain(module)}
        base = module.get_base_layer() if isinstance(module, QftExperts) else module
        weights = {}
        for key, stack in stacks(base).items():
            value, figures = self._value(around.get(key), stack.quantizer, stack.handle, f"{name}.{key}")
            dtype = self.dtype or stack.dtype
            if value.numel() and float(value.abs().max()) > torch.finfo(dtype).max:
                raise NonFiniteWeights(f"a merged weight is too large for {dtype}; dtype=torch.float32 holds it")
            stored = value.to(dtype, copy=True)
            if figures is not None:
                self.weights[f"{name}.{key}"] = compare_merge(*figures, stored.float())
            weights[key] = as_stack(stored, stack.transposed).contiguous()
        return float_experts(base, weights)

    def _merged(self, module: QftLinear, name: str) -> nn.Module:
        quantizer, handle = module.quantizer, module.handle
        value, figures = self._value(module, quantizer, handle, name)
        if figures is None:
            return self._layer(quantizer, handle, value)
        new = self._layer(quantizer, handle, value, module.merged_bias(_names(module)))
        after = new.weight.T if handle.transposed else new.weight
        self.weights[name] = compare_merge(*figures, after.float())
        return new

    def _value(
        self, layer: Any, quantizer: Quantizer, handle: QuantizedWeight, name: str
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The float weight with what `layer` adds to it, and Ŵ and Ŵ + Δ where it adds anything."""
        names = [] if layer is None else _names(layer)
        if layer is not None and layer.merged and (layer.disable_adapters or self.originals is not None):
            layer = _unmerged(layer)
            handle = layer.handle
        elif layer is not None and layer.merged:
            names = []  # the base weight holds the adapters, as they survived
        before = quantizer.dequantize(handle, dtype=torch.float32)
        source = before if isinstance(quantizer, Unquantized) else self._original(name, before)
        if not names:
            return source, None
        tuned = wanted = layer.merged_weight(names, before)
        if source is not before:
            wanted = layer.merged_weight(names, source, learnt=True)
        return wanted, (before, tuned)

    def _merged_by_peft(self, module: Any, name: str) -> nn.Module:
        """Another method than LoRA: PEFT's own merge into a float linear of the dequantized weight."""
        if module.merged and module.disable_adapters:
            module = _unmerged(module)
        view = module.get_base_layer()
        handle = view.handle
        names = [] if module.disable_adapters or module.merged else available(module)
        if not names:  # the stored weight holds what was merged, as it survived
            return self._layer(view.quantizer, handle, view.dequantized(torch.float32))
        try:
            before, wanted, bias = merged_by_peft(module, names)
        except (NonFiniteWeights, UnsupportedOperation) as error:
            raise type(error)(f"{name}: {error}") from error
        new = self._layer(view.quantizer, handle, wanted, bias)
        after = new.weight.T if handle.transposed else new.weight
        self.weights[name] = compare_merge(before, wanted, after.float())
        return new

    def _original(self, name: str, quantized: Tensor) -> Tensor:
        return quantized if self.originals is None else self.originals.like(name, quantized)

    def _layer(
        self, quantizer: Quantizer, handle: QuantizedWeight, value: Tensor, bias: Tensor | None = None
    ) -> nn.Module:
        if not quantizer.capabilities.merge_to_float:
            raise UnsupportedOperation(f"{quantizer!r} cannot give its weights as floats (capability merge_to_float)")
        bias = handle.bias if bias is None else bias
        dtype = self.dtype or handle.dtype
        if float(value.abs().max()) > torch.finfo(dtype).max:
            raise NonFiniteWeights(f"a merged weight is too large for {dtype}; dtype=torch.float32 holds it")
        new = empty_layer(handle, dtype, bias is not None)
        # one's own memory: the value may be the original model's weight, or a view of a float layer's
        weight = (value.T if handle.transposed else value).to(dtype, copy=True, memory_format=torch.contiguous_format)
        new.weight = nn.Parameter(weight)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        new.train(handle.module.training)
        return new


def _names(layer: Any) -> list[str]:
    """The adapters that count: those that are merged, or else the active ones."""
    names = layer.merged_adapters or [a for a in layer.active_adapters if a in layer.lora_A]
    return [] if layer.disable_adapters else list(names)


def _unmerged(layer: Any) -> Any:
    twin = copy.deepcopy(layer)
    twin.unmerge()
    return twin


def empty_layer(handle: QuantizedWeight, dtype: torch.dtype | None, bias: bool) -> nn.Module:
    """The float layer that a quantized one came from, on "meta"."""
    out_features, in_features = handle.shape
    with torch.device("meta"):
        if handle.kind == "conv1d":
            from transformers.pytorch_utils import Conv1D

            new: nn.Module = Conv1D(out_features, in_features)
        else:
            new = nn.Linear(in_features, out_features, bias=bias)
    return new.to(dtype or handle.dtype)


class FloatCopy:
    """One float copy in the making.

    Args:
        base: the model under PEFT's wrapper; it stays as it is.
        dtype, originals: as in `FloatLayers`.

    Raises:
        UnsupportedDevice: neither the device nor the host has room; nothing was allocated.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype | None, originals: Originals | None):
        self.base, self.dtype = base, dtype
        floats = dtype or cast_since(base)
        self.layers = FloatLayers(floats, originals)
        self.on_host = _overflows(base, floats)

    @property
    def weights(self) -> dict[str, WeightMerge]:
        """Layer name → what merging did to it; adapted layers only."""
        return self.layers.weights

    def build(self) -> nn.Module:
        """The copy; raises what `FloatLayers` raises."""
        base, inside = self.base, set()
        check_parting(base)
        memo: dict[int, Any] = {}
        for name, module in base.named_modules():
            if id(module) in inside:
                continue
            new = self.layers(module, name)
            if new is not None:
                memo[id(module)] = new.to(HOST) if self.on_host else new
                inside.update(id(m) for m in module.modules())
            elif self.on_host:
                for p in module.parameters(recurse=False):
                    memo.setdefault(id(p), nn.Parameter(p.detach().to(HOST, copy=True), p.requires_grad))
                for b in module.buffers(recurse=False):
                    memo.setdefault(id(b), b.detach().to(HOST, copy=True))
        plain = copy_bare(base, memo)
        settle_tie(plain)
        if self.on_host:
            _undispatch(plain)
        if self.dtype is not None:
            cast(plain, self.dtype)
        return plain.requires_grad_(True)


def copy_bare(base: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy with the modules and tensors of `memo` in their places, and without anybody's marks."""
    memo[id(getattr(base, "hf_quantizer", None))] = None
    kept = base.__dict__.pop("_qft", None)
    try:
        plain = copy.deepcopy(base, memo)
    finally:
        if kept is not None:
            base.__dict__["_qft"] = kept
    detach_from(base, plain)
    _clean(plain)
    return plain


def cast(plain: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a file would hold, as `from_pretrained(dtype=dtype)` does.

    Buffers that no file holds, such as rotary frequencies, stay as they were computed: 16 bit would spoil them.
    """
    plan = plain._get_dtype_plan(dtype) if hasattr(plain, "_get_dtype_plan") else {}
    in_float32 = re.compile("|".join(glob.replace("*", ".*") for glob in plan) or "(?!)")
    for prefix, module in plain.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for name, tensor in [*module._parameters.items(), *buffers.items()]:
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if in_float32.search(f"{prefix}.{name}") else dtype)
    if hasattr(plain, "config"):
        plain.config.dtype = dtype


# ---- memory ----------------------------------------------------------------------------------------------


def cast_since(base: nn.Module) -> torch.dtype | None:
    """The dtype that a model was cast to after it was quantized, which some formats do not note; None if it was not."""
    layers: set[torch.dtype] = set()
    others: set[torch.dtype] = set()
    inside: set[int] = set()
    for module in base.modules():
        if id(module) in inside or isinstance(module, QftExperts):
            continue
        handle = _handle(module)
        if handle is not None:
            layers.add(handle.dtype)
        elif isinstance(module, PackedExperts):
            layers.update(stack.dtype for stack in stacks(module).values())
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            kept = [p for n, p in module.named_parameters() if "base_layer" in n or "original_module" in n]
            others.update(p.dtype for p in kept if p.is_floating_point())
        else:
            others.update(p.dtype for p in module.parameters(recurse=False) if p.is_floating_point())
            continue
        inside.update(id(m) for m in module.modules())
    return next(iter(others)) if len(others) == 1 and layers.isdisjoint(others) else None


def float_bytes(base: nn.Module, dtype: torch.dtype | None) -> Counter[torch.device]:
    """Bytes of a float copy of `base`, by the device that its weights are on."""
    total: Counter[torch.device] = Counter()
    inside: set[int] = set()

    def add(tensors: Iterator[Tensor]) -> None:
        for t in tensors:
            if id(t) not in inside:
                inside.add(id(t))
                size = dtype.itemsize if dtype is not None and t.is_floating_point() else t.element_size()
                total[t.device] += t.numel() * size

    for module in base.modules():
        if id(module) in inside:
            continue
        handle = _handle(module)
        if handle is not None:
            device = next(handle.module.parameters()).device
            bias = 0 if handle.bias is None else handle.bias.numel()
            total[device] += (math.prod(handle.shape) + bias) * (dtype or handle.dtype).itemsize
        elif isinstance(module, ModulesToSaveWrapper):
            add(module.original_module.parameters())
        elif isinstance(module, QftExperts):
            inside.update(id(m) for group in (module.lora_A, module.lora_B) for m in group.modules())
            continue
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            add(p for n, p in module.named_parameters() if "base_layer" in n or "original_module" in n)
        else:
            add(module.parameters(recurse=False))
            add(module.buffers(recurse=False))
            continue
        inside.update(id(m) for m in module.modules())
    return total


def _handle(module: nn.Module) -> QuantizedWeight | None:
    if isinstance(module, QftLinear):
        return module.handle
    if isinstance(module, QftExperts):
        return None
    if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), LinearView):
        return module.get_base_layer().handle
    quantizer = quantizer_of(module)
    return None if quantizer is None else quantizer.weights(module)[0]


def _overflows(base: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether the copy has to be built in host memory; raises where that has no room either."""
    need = float_bytes(base, dtype)
    full = [d for d, n in need.items() if n > free_bytes(d)]
    if not full:
        return False
    total, room = need.total(), free_bytes(HOST)
    if total > room:
        raise UnsupportedDevice(
            f"the float model takes {total} bytes ({total / 2**30:.1f} GiB), {free_bytes(full[0])} are free on {full[0]} "
            f"and {room} on the host: qft.export writes it to a folder shard by shard, in little memory"
        )
    warnings.warn(
        f"the float model takes {need[full[0]] / 2**30:.1f} GiB on {full[0]}, which has {free_bytes(full[0]) / 2**30:.1f} "
        "GiB free: it is built in host memory instead",
        QftWarning,
        stacklevel=5,
    )
    return True


# ---- what a copy must not have ---------------------------------------------------------------------------


def _clean(plain: nn.Module) -> None:
    """Remove what quantizing, wrapping and training left on the copy."""
    unmark(plain)
    Generate.take_off(plain)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        plain.__dict__.pop(name, None)
    for module in plain.modules():
        module.__dict__.pop("_qft_quantizer", None)
        _own_forward(module)
        for key, hook in list(module._forward_hooks.items()):
            if "require_grads" in getattr(hook, "__qualname__", "") or type(hook).__module__.startswith("qft."):
                del module._forward_hooks[key]
        for name in ("_require_grads_hook", "_require_grads_hooks", "enable_input_require_grads"):
            module.__dict__.pop(name, None)
    if recomputes_activations(plain):
        disable = getattr(plain, "activation_checkpointing_disable", None) or plain.gradient_checkpointing_disable
        disable()


def _own_forward(module: nn.Module) -> None:
    """Take the forwards of `optimize_training` off a module; those under them stay."""
    while type(forward := module.__dict__.get("forward")).__module__.startswith("qft."):
        del module.__dict__["forward"]
        before = getattr(forward, "before", None)
        if before is not None:
            module.__dict__["forward"] = before


def _undispatch(plain: nn.Module) -> None:
    """Take accelerate's hooks off, which would send inputs to the devices of the model that was copied."""
    if getattr(plain, "hf_device_map", None) is not None:
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(plain)
        del plain.hf_device_map

"""The quantized layers of a model, and how far each is from its original: the figures behind `qft.audit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.names import HELD, bare_name
from qft.core.originals import Originals
from qft.core.quantizer import QuantizedWeight, Quantizer
from qft.core.registry import quantizer_of
from qft.errors import AdapterMismatch, BadOption, NonFiniteWeights, UnsupportedOperation


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer, and the adapter layer around it where there is one."""

    module: nn.Module
    quantizer: Quantizer
    around: nn.Module | None

    def active(self) -> list[str]:
        """LoRA adapters that the layer computes with beside its weight."""
        from qft.lora.merge_weight import Merging

        if not isinstance(self.around, Merging):
            return []
        outer: Any = self.around
        if outer.merged or outer.disable_adapters:
            return []
        return [a for a in outer.active_adapters if a in outer.lora_A]


def quantized_layers(base: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers by the names that they have without adapters."""
    from qft.lora.experts import adapted_weights

    found, around = {}, dict(adapted_weights(base))
    for full_name, module in base.named_modules():
        quantizer = quantizer_of(module)
        if quantizer is not None and not hasattr(module, "base_layer"):
            name = bare_name(full_name)
            outer = None
            if name != full_name:
                outer = around[name] if name in around else _around(base, full_name)
            found[name] = QuantizedLayer(module, quantizer, outer)
    return found


def _around(base: nn.Module, full_name: str) -> nn.Module | None:
    """Another tuner's layer around this one, such as AdaLoRA's."""
    name = full_name.removesuffix(f".{HELD}").removesuffix(".base_layer")
    return base.get_submodule(name) if name != full_name else None


def check_forward(model: nn.Module, base: nn.Module) -> None:
    """Refuse models whose forward would change them, or is not that of the base model."""
    for name, module in base.named_modules():
        if getattr(module, "merged_adapters", None) and getattr(module, "disable_adapters", False):
            raise BadOption(
                f"the adapter of {name} is merged and disabled, and PEFT takes it out of the weight at the next forward: "
                "enable the adapters, or call qft.unmerge(model), before auditing with data="
            )
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", []) if configs else []
    for name in active() if callable(active) else active:
        if getattr(configs.get(name), "is_prompt_learning", False):
            raise UnsupportedOperation(
                f"{configs[name].peft_type.value} puts virtual tokens before the data, and they cannot be told apart from "
                "it: qft.audit(model.get_base_model(), data=...) audits the model without them"
            )


def has_own_inputs(layer: QuantizedLayer) -> bool:
    """Whether the layer's inputs are those of its one weight."""
    handles = layer.quantizer.weights(layer.module)
    return len(handles) == 1 and len(handles[0].shape) == 2 and layer.quantizer.capabilities.dequantize


def weight_errors(
    name: str, full_name: str, layer: QuantizedLayer, handle: QuantizedWeight, originals: Originals, h: Tensor | None
) -> dict[str, float | None]:
    """The relative errors of one weight, of (out, in) or (experts, out, in), on the layer's device."""
    w_hat = layer.quantizer.dequantize(handle, dtype=torch.float32)
    w = originals(full_name)
    if w.shape != w_hat.shape:
        raise AdapterMismatch(
            f"{full_name} of the original is {tuple(w.shape)}, and the quantized weight {tuple(w_hat.shape)}: it is "
            "another model"
        )
    w = w.to(w_hat.device, torch.float32)
    errors = {"": w - w_hat}
    if active := layer.active():
        try:
            errors["adapted_"] = w - layer.around.merged_weight(active, w_hat)  # type: ignore[union-attr, operator]
        except NonFiniteWeights as error:
            raise NonFiniteWeights(
                f"{name}: {', '.join(active)} holds NaN or infinity; disable or delete the adapter to audit the rest"
            ) from error
    del w_hat
    norm = float(w.norm().clamp(min=1e-30))
    found: dict[str, float | None] = {f"{which}error": float(e.norm()) / norm for which, e in errors.items()}
    if h is not None:
        output = _quadratic(w, h)
        for which, e in errors.items():
            found[f"{which}output_error"] = (_quadratic(e, h) / output) ** 0.5 if output else None
    return found


def _quadratic(w: Tensor, h: Tensor) -> float:
    """tr(W H Wᵀ), which is E‖W x‖²; never below zero, where rounding would have it."""
    return max(0.0, float((w @ h.to(w.device)).mul_(w).sum(dtype=torch.float64)))

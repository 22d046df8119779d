"""The identity: a float linear as one more format, so that adapters, merging and export treat it by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qft.core.kept import KeptParameter, give_back, give_own, keep
from qft.core.quantizer import Capabilities, QuantizedWeight, Quantizer, float_weight, is_conv1d


@dataclass(frozen=True)
class Unquantized(Quantizer):
    """A float `nn.Linear` or `Conv1D`, "quantized" without any loss."""

    name: ClassVar[str] = "unquantized"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=16, devices=frozenset({"cpu", "cuda", "mps", "xpu"}), requantize=True)

    def weights(self, module: nn.Module) -> Sequence[QuantizedWeight]:
        if not is_float_linear(module):
            return ()
        conv1d = is_conv1d(module)
        weight = float_weight(module)
        kind = "conv1d" if conv1d else "linear"
        return (QuantizedWeight(module, "weight", tuple(weight.shape), kind, conv1d, weight.dtype, module.bias),)

    def quantize_layer(self, module: nn.Module, *, statistics: Any = None) -> nn.Module:
        return module

    def dequantize(
        self, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        value = float_weight(weight.module)
        return value.to(dtype or weight.dtype) if out is None else out.copy_(value)

    def requantize(self, weight: QuantizedWeight, value: Tensor) -> None:
        give_own(weight.module, "weight", (value.T if weight.transposed else value).contiguous())

    def snapshot(self, weight: QuantizedWeight) -> KeptParameter:
        return keep(weight.module.weight)

    def restore(self, weight: QuantizedWeight, saved: KeptParameter) -> None:
        give_back(weight.module, "weight", saved)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return 2 * prod(shape)


def is_float_linear(module: nn.Module) -> bool:
    """Whether `module` computes x Wᵀ + b from a float weight: `nn.Linear`, `Conv1D`, or a subclass with that arithmetic."""
    if not is_conv1d(module) and not (isinstance(module, nn.Linear) and computes_linear(type(module))):
        return False
    weight = module.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.ndim == 2


@cache
def computes_linear(cls: type[nn.Linear]) -> bool:
    """Whether a subclass of `nn.Linear`, such as Falcon's, does what `nn.Linear` does; tried once on small numbers."""
    if cls is nn.Linear or cls.forward is nn.Linear.forward:
        return cls is nn.Linear or cls.__module__.startswith("transformers.")
    if not cls.__module__.startswith(
        "transformers."
    ):  # what others change, such as fake quantization, may depend on state
        return False
    x = torch.arange(24, dtype=torch.float32).view(2, 4, 3) / 7
    try:
        for bias in (True, False):
            layer = cls.__new__(cls)
            nn.Module.__init__(layer)
            layer.in_features, layer.out_features = 3, 5
            layer.weight = nn.Parameter(torch.arange(15, dtype=torch.float32).view(5, 3).sin())
            layer.register_parameter("bias", nn.Parameter(torch.arange(5.0)) if bias else None)
            for value in (x, x[0]):
                wanted = nn.functional.linear(value, layer.weight, layer.bias)
                given = cls.forward(layer, value)
                if not isinstance(given, Tensor) or given.shape != wanted.shape or not torch.allclose(given, wanted):
                    return False
    except Exception:
        return False
    return True

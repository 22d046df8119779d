"""The identity: a float linear as one more format, so that adapters, merging and export treat it by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qft.kept import KeptParameter, give_back, give_own, keep
from qft.quantizer import Capabilities, QuantizedWeight, Quantizer, float_weight, is_conv1d


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
    """Whether `module` is a plain linear layer: `nn.Linear` or `Conv1D` themselves, no subclass, a float weight."""
    if type(module) is not nn.Linear and not is_conv1d(module):
        return False
    weight = module.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.ndim == 2

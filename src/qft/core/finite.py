"""Check that quantized weights are finite: trials before the first weight changes, and one look at all results."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.experts import PackedExperts
from qft.core.quantizer import QuantizedWeight, Quantizer
from qft.core.registry import quantizer_of
from qft.errors import NonFiniteWeights, about

ORDINARY = (2.0**-60, 2.0**14)
"""Between these bounds lies the largest absolute value of ordinary weights; 16-bit constants hold any of them."""

ROOM = 2**26
"""Weights that are dequantized at a time."""

_ADVICE = "leave this weight in float with skip=, or take another quantizer"


def largest_values(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest absolute value of each weight, 0 for an empty one. One read of each weight, one wait a device.

    Raises:
        NonFiniteWeights: a weight holds NaN or infinity, by name.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, weight in weights.items():
        if weight.numel():
            low, high = weight.aminmax()
            by_device[weight.device][name] = torch.maximum(-low, high).float()
    found = dict.fromkeys(weights, 0.0)
    for values in by_device.values():
        found.update(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
    for name, value in found.items():
        if not value < float("inf"):
            raise NonFiniteWeights(
                f"{name} holds NaN or infinity: quantizing it would spread them; repair the checkpoint, or "
                "leave this weight in float with skip="
            )
    return found


def check_trained(model: nn.Module, step: int) -> None:
    """Refuse trained weights that are NaN or infinite: the loss shows them one step later only.

    Raises:
        NonFiniteWeights: the first of them, by name.
    """
    try:
        largest_values({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    except NonFiniteWeights as error:
        name = str(error).partition(" holds")[0]
        raise NonFiniteWeights(
            f"{name} holds NaN or infinity after step {step}: lower lr, or warm up longer; the checkpoints before it are as "
            "they were"
        ) from None


def is_ordinary(largest: float) -> bool:
    """Whether a weight with this largest absolute value fits the constants of every format."""
    return largest == 0 or ORDINARY[0] <= largest <= ORDINARY[1]


def try_layer(name: str, layer: nn.Module, quantizer: Quantizer, device: torch.device | None = None) -> None:
    """Quantize a copy of a float layer and check the result; for the rare layers whose values are not ordinary.

    Raises:
        NonFiniteWeights: the result holds NaN or infinity. QftError: what the quantizer raises, with the layer's name.
    """
    with about(name), torch.no_grad():
        if device is not None and layer.weight.device != device:
            layer = copy.deepcopy(layer).to(device)
        new = quantizer.quantize_layer(layer)
        for handle in quantizer.weights(new):
            if not _is_finite(quantizer, handle):
                raise _refusal(name, quantizer)


def try_experts(name: str, weight: Tensor, quantizer: Any) -> None:
    """`try_layer` of fused experts, (experts, out_features, in_features), one by one."""
    with about(name), torch.no_grad():
        for expert in weight:
            packed = quantizer._pack(expert, None)
            if not quantizer.unpack(packed, shape=tuple(expert.shape), dtype=torch.float32).isfinite().all():
                raise _refusal(name, quantizer)


class ResultCheck:
    """Sums of dequantized weights, gathered without waiting for a device, and looked at once."""

    def __init__(self) -> None:
        self._sums: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        self._handles: dict[str, tuple[Quantizer, QuantizedWeight]] = {}

    def add(self, name: str, module: nn.Module) -> None:
        """Note the weights of a quantized layer or of packed experts; a layer on the meta device is left out."""
        quantizer = quantizer_of(module)
        for handle in quantizer.weights(module) if quantizer is not None else ():
            total = _total(quantizer, handle)
            if total is None or total.is_meta:
                continue
            self._sums[total.device][name] = total
            self._handles[name] = quantizer, handle

    def look(self) -> None:
        """Raise `NonFiniteWeights`, by name, if a weight that was added holds NaN or infinity, and forget them all."""
        handles, sums, self._handles, self._sums = self._handles, self._sums, {}, defaultdict(dict)
        for totals in sums.values():
            for name, ok in zip(totals, torch.stack(list(totals.values())).isfinite().tolist(), strict=True):
                if not ok and not _is_finite(*handles[name]):  # a sum may overflow where no term does
                    raise _refusal(name, handles[name][0])


def _refusal(name: str, quantizer: Quantizer) -> NonFiniteWeights:
    return NonFiniteWeights(
        f"{name}: {quantizer!r} makes NaN or infinity of this finite weight, whose values its constants do not hold: {_ADVICE}"
    )


@torch.no_grad()
def _total(quantizer: Quantizer, handle: QuantizedWeight) -> Tensor | None:
    """The sum of a weight as floats, in float32; of its stored floats where it cannot be dequantized."""
    if isinstance(handle.module, PackedExperts):
        return torch.stack([part.sum(dtype=torch.float32) for part in _parts(handle.module)]).sum()
    if quantizer.capabilities.dequantize:
        return quantizer.dequantize(handle).sum(dtype=torch.float32)
    stored = [t for t in quantizer.tensors(handle) if t.is_floating_point()]
    return torch.stack([t.sum(dtype=torch.float32) for t in stored]).sum() if stored else None


@torch.no_grad()
def _is_finite(quantizer: Quantizer, handle: QuantizedWeight) -> bool:
    if isinstance(handle.module, PackedExperts):
        return all(bool(part.isfinite().all()) for part in _parts(handle.module))
    if quantizer.capabilities.dequantize:
        return bool(quantizer.dequantize(handle).isfinite().all())
    return all(bool(t.isfinite().all()) for t in quantizer.tensors(handle) if t.is_floating_point())


def _parts(stack: PackedExperts) -> Any:
    """The experts of a stack as floats, as many at a time as there is room for."""
    step = max(1, ROOM // max(1, stack.out_features * stack.in_features))
    for start in range(0, stack.experts, step):
        chosen = torch.arange(start, min(start + step, stack.experts), device=stack.device)
        yield stack.unpacked(stack.dtype, experts=chosen)

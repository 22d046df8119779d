"""Whether what an adapter learnt can be put on the original weights: the right original, and a start that is known."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from qft.core import record as marks
from qft.core.experts import PackedExperts
from qft.core.originals import Originals
from qft.core.registry import quantizer_of
from qft.errors import AdapterMismatch, BadOption, QftWarning, UnsupportedOperation
from qft.lora.experts import QftExperts, split
from qft.lora.layer import QftLinear

STARTED_AT_THE_ERROR = 0.25
"""⟨Δ, W − Ŵ⟩ / ‖Δ‖² above which an adapter is taken for one that was started at W − Ŵ: there it is 1, else about 0."""

LEFT_OF_START = 0.25
"""⟨Δ, Δ0⟩ / ‖Δ0‖² below which Δ did not start at Δ0: there it is 1. Judged where Δ is not far larger than Δ0."""


def learnt_over(base: nn.Module, original: Any, plan: dict[str, tuple[QftLinear, list[str]]]) -> Originals:
    """The original weights, once it is known that W + Δ − Δ0 is right for this model and these adapters.

    Args:
        base: the model under PEFT's wrapper.
        original: what `Originals.of` takes.
        plan: layer name → the layer, and its adapters that are to be merged.

    Raises:
        AdapterMismatch, BadFolder: as `Originals.of`; or W and Ŵ have nothing to do with each other.
        UnsupportedOperation: an adapter whose start is not known, or a base that other adapters were merged into.
    """
    record = marks.record_of(base)
    if record is None:
        raise BadOption("original= is for quantized models, and this one is float: its weights are the original ones")
    if record.merged:
        raise UnsupportedOperation(
            "adapters were merged into this base for good, and the original weights know nothing of them: merge without "
            "original="
        )
    originals = Originals.of(original, record)
    _check_starts(plan)
    unrecorded = any(a not in layer.starts for layer, names in plan.values() for a in names)
    if not record.fingerprint:
        warnings.warn(
            "the model has no fingerprint of its original weights: whether original= holds them is judged by how near "
            "they are",
            QftWarning,
            stacklevel=3,
        )
    if unrecorded or not record.fingerprint:
        _compare(base, originals, plan)
    return originals


@torch.no_grad()
def _check_starts(plan: dict[str, tuple[QftLinear, list[str]]]) -> None:
    """Refuse adapters with a start that is not known, or whose weights are not those that started there.

    Raises:
        UnsupportedOperation: what the message says.
    """
    sums: dict[str, list[float]] = {}  # adapter → Σ⟨Δ, Δ0⟩, Σ‖Δ0‖², Σ‖Δ‖²
    for layer, names in plan.values():
        for name in names:
            if name not in layer.starts:
                continue
            a, b = _factors(layer, layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float())
            a0, b0 = _factors(layer, *(t.float() for t in layer.known_start(name)))
            found = sums.setdefault(name, [0.0, 0.0, 0.0])
            for i, (x, y) in enumerate((((a, b), (a0, b0)), ((a0, b0), (a0, b0)), ((a, b), (a, b)))):
                product = ((x[1].mT @ y[1]) * (x[0] @ y[0].mT)).sum()  # ⟨BA, B′A′⟩ without the products
                found[i] += float(product) * layer.scaling[name] ** 2
    for name, (still, start, now) in sums.items():
        if still < LEFT_OF_START * start and now < 9 * start:
            raise UnsupportedOperation(
                f"adapter {name!r} was started at the quantization error and holds {still / start:.0%} of that, as if other "
                "weights were loaded into it since: load them with qft.load, or merge without original="
            )


def _factors(layer: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B whose product is the update, or that of each expert."""
    return split(a, b, layer.num_experts) if isinstance(layer, QftExperts) else (a, b)


@torch.no_grad()
def _compare(base: nn.Module, originals: Originals, plan: dict[str, tuple[QftLinear, list[str]]]) -> None:
    """Compare W with Ŵ, and W − Ŵ with the adapters of which nobody recorded where they started.

    Raises:
        AdapterMismatch: W and Ŵ have nothing to do with each other.
        UnsupportedOperation: an adapter that lies along W − Ŵ, as those started by LoftQ do.
    """
    sums: dict[str, list[float]] = {}  # adapter → Σ⟨Δ, E⟩, Σ‖Δ‖², and the variance of the first were E noise
    for full_name, module in base.named_modules():
        name = full_name.replace(".base_layer", "") if isinstance(module, PackedExperts) else full_name
        layer, names = plan.get(name, (None, []))
        if layer is not None and layer.merged:  # its weight holds the adapter
            layer = copy.deepcopy(layer)
            layer.unmerge()
        holder = module if layer is None or isinstance(module, PackedExperts) else layer.base_layer
        if isinstance(layer, QftExperts):
            holder = layer.get_param()
        quantizer = quantizer_of(holder)
        if quantizer is None or name.endswith(".base_layer"):
            continue
        quantized = quantizer.dequantize(quantizer.weights(holder)[0], dtype=torch.float32)
        weight = originals.like(name, quantized)
        error = weight - quantized
        if float(error.norm()) > float(weight.norm()):
            raise AdapterMismatch(
                f"{originals.where} holds another {name} than the model was quantized from: they have nothing in common"
            )
        for adapter in names:
            if adapter in layer.starts:
                continue
            delta = layer.delta(adapter, quantized)
            square, noise = float(delta.square().sum()), float(error.square().sum()) / error.numel()
            found = sums.setdefault(adapter, [0.0, 0.0, 0.0])
            for i, value in enumerate((float((delta * error).sum()), square, square * noise)):
                found[i] += value
    for adapter, (inner, square, variance) in sums.items():
        if inner > STARTED_AT_THE_ERROR * square and inner > 6 * variance**0.5:
            raise UnsupportedOperation(
                f"adapter {adapter!r} makes up for the quantization error (⟨Δ, W − Ŵ⟩ is {inner / square:.2f} of ‖Δ‖²), as "
                "one does that LoftQ started, and nobody recorded where it started: added to the original weights it "
                "would count that error twice. Load it with qft.load, which knows, or merge without original="
            )

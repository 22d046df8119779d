"""One adapted weight over another base: what its adapter becomes there, and how far the two bases stay apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qft.data.statistics import Statistics
from qft.lora.inits import Auto, LoftQ
from qft.lora.inits.lowrank import fit, low_rank
from qft.lora.layer import QftLinear
from qft.lora.merge_weight import divisors

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WeightTransfer:
    """What a transfer did to one weight. V is what the source computes with, V₂ what the new model does.

    Attributes:
        before, after: ‖V − V₂‖ / ‖V‖ with the adapter carried unchanged, and as it is now.
        rank: of the adapter on this layer now.
        fitted: False where the adapter computes what it did: the bases are equal here, or a fit did not lower the error.
        output_before, output_after: the same, weighted by what the layer read of the calibration data; None without.
        note: anything else to know, or "".
    """

    before: float
    after: float
    rank: int
    fitted: bool
    output_before: float | None = None
    output_after: float | None = None
    note: str = ""


@dataclass
class TransferReport:
    """What a transfer did, weight by weight; `str()` is a short summary.

    Attributes:
        source, target: the quantizers of the two bases.
        weights: adapted layer → `WeightTransfer`.
        unadapted: layers without an adapter, quantized in one of the bases → ‖Ŵ₁ − Ŵ₂‖ / ‖Ŵ₁‖, which stays.
    """

    source: str
    target: str
    weights: dict[str, WeightTransfer] = field(default_factory=dict)
    unadapted: dict[str, float] = field(default_factory=dict)

    @property
    def unfitted(self) -> list[str]:
        """Adapted layers that differ and whose adapter is as it was: no fit lowered the error."""
        return [n for n, w in self.weights.items() if not w.fitted and w.before]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "source": self.source,
            "target": self.target,
            "weights": {n: vars(w) for n, w in self.weights.items()},
            "unadapted": dict(self.unadapted),
        }

    def __str__(self) -> str:
        weights = list(self.weights.values())
        before, after = _mean([w.before for w in weights]), _mean([w.after for w in weights])
        text = f"transfer from {self.source} to {self.target}: error {before:.4f} → {after:.4f} on average over "
        parts = [text + f"{len(weights)} adapted weights"]
        read = [w for w in weights if w.output_before is not None]
        if read:
            before, after = _mean([w.output_before for w in read]), _mean([w.output_after for w in read])
            parts.append(f"of the outputs {before:.4f} → {after:.4f}")
        if not any(w.before for w in weights):
            parts.append("the bases are equal there, and so is the adapter")
        if self.unfitted:
            parts.append(f"{len(self.unfitted)} carried unchanged, {self.unfitted[0]} first: no fit lowered the error")
        if self.unadapted:
            left = _mean(list(self.unadapted.values()))
            parts.append(f"{len(self.unadapted)} weights without an adapter differ by {left:.4f} on average")
        parts += sorted({w.note for w in weights if w.note})
        return "; ".join(parts)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class Carried:
    """An adapter's part on one layer of the new base.

    Attributes:
        factors: A (at most rank, in_features) and B (out_features, the same), float32 on the host; further rows and
            columns, up to the rank, stay at PEFT's start, where they compute nothing.
        start: for `QftLinear.starts`; empty where the start is B = 0.
    """

    figures: WeightTransfer
    factors: Factors
    start: dict[str, Factors | None]


def scaling_at(layer: QftLinear, adapter: str, rank: int) -> float:
    """The scaling that PEFT gives this layer's adapter at another rank, its alpha being the same."""
    return layer.lora_alpha[adapter] / (rank**0.5 if layer.use_rslora[adapter] else rank)


@torch.no_grad()
def carry(
    layer: QftLinear,
    adapter: str,
    quantized: Tensor,
    *,
    rank: int | None,
    equal: bool,
    calibrated: bool,
    statistics: Statistics | None,
    start_known: bool,
) -> Carried:
    """Fit the adapter of one source layer to another base weight.

    Args:
        layer: of the source; left as it is.
        quantized: Ŵ₂ of the new base, float32 (out_features, in_features).
        rank: wanted; None keeps the trained update and adds as many directions as it has.
        equal: the weight is float in both bases: the adapter is carried as it is.
        calibrated: there is calibration data, which layers without `statistics` did not read.
        statistics: with a second moment, or None.
        start_known: an adapter without an entry in `layer.starts` started at B = 0.
    """
    weight = layer.quantizer.dequantize(layer.handle, dtype=torch.float32).to(quantized.device)
    a, b = layer.lora_A[adapter].weight.to(quantized), layer.lora_B[adapter].weight.to(quantized)
    old, full = len(a), min(weight.shape)
    new = old if equal else min(2 * old if rank is None else rank, full)
    scaling = scaling_at(layer, adapter, new)
    ratio = layer.scaling[adapter] / scaling
    b = b * ratio
    delta = low_rank(b, a, scaling)

    init = LoftQ() if statistics is None else Auto().chosen(statistics)
    wanted = _computed(layer, adapter, weight + delta)
    carried = wanted - _computed(layer, adapter, quantized + delta)
    whole, before = float(wanted.norm()) or 1.0, float(carried.norm())
    output_whole, output_before = init.error(wanted, statistics) or 1.0, init.error(carried, statistics)
    del carried

    factors, joint, added = (a, b), False, None
    if new == full and not equal:  # every matrix of this shape fits: no weighting changes that
        factors, joint = fit(weight + delta - quantized, full, scaling), True
    elif new > old:
        added = init(weight, quantized, new - old, scaling, statistics=statistics)[:2]
        factors = torch.cat([a, added[0]]), torch.cat([b, added[1]], 1)
    elif not equal:
        factors, joint = init(weight + delta, quantized, new, scaling, statistics=statistics)[:2], True
    left = wanted - _computed(layer, adapter, quantized + low_rank(factors[1], factors[0], scaling))
    after, output_after = float(left.norm()), init.error(left, statistics)
    if not output_after < output_before and new >= old:  # else there is no going back to the update as it was
        factors, joint, added, after, output_after = (a, b), False, None, before, output_before

    notes = []
    if calibrated and statistics is None:
        notes.append("layers that read no calibration tokens were fitted unweighted")
    if new < min(old, full):
        notes.append(f"rank {new} does not hold the whole update where the adapter had more")
    figures = WeightTransfer(
        before=before / whole,
        after=after / whole,
        rank=new,
        fitted=joint or added is not None,
        output_before=output_before / output_whole if statistics else None,
        output_after=output_after / output_whole if statistics else None,
        note="; ".join(notes),
    )
    start = _start(layer, adapter, start_known, ratio)
    if start is not None:
        if joint:  # all of it but what was learnt
            parts = [(factors[0], factors[1]), (a, -b), start]
            start = _within(_joined(parts), full, scaling)
        elif added is not None:
            start = _joined([_padded(start, old), added])
        elif len(start[0]):
            start = _padded(start, new)
    return Carried(
        figures,
        (factors[0].cpu(), factors[1].cpu()),
        {} if start is not None and not len(start[0]) else {adapter: start and (start[0].cpu(), start[1].cpu())},
    )


def _computed(layer: QftLinear, adapter: str, value: Tensor) -> Tensor:
    """What the layer computes with where base and update make up `value`: for DoRA, its direction."""
    if adapter not in layer.lora_variant:
        return value
    magnitude = layer.lora_magnitude_vector[adapter].weight.to(value)
    return value * (magnitude / divisors(value))[:, None]


def _start(layer: QftLinear, adapter: str, known: bool, ratio: float) -> Factors | None:
    """Where the adapter started, for the new scaling: of rank 0 for B = 0, None where that is not known."""
    if adapter not in layer.starts:
        if not known:
            return None
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return a.new_zeros(0, a.shape[1], dtype=torch.float32), b.new_zeros(len(b), 0, dtype=torch.float32)
    pair = layer.starts[adapter]
    return pair and (pair[0].float(), pair[1].float() * ratio)


def _joined(parts: list[Factors]) -> Factors:
    """Factors of the sum of several products."""
    device = parts[0][0].device
    return torch.cat([a.to(device) for a, _ in parts]), torch.cat([b.to(device) for _, b in parts], 1)


def _padded(pair: Factors, rank: int) -> Factors:
    """Factors of the same product, of at least this rank."""
    (a, b), more = pair, max(0, rank - len(pair[0]))
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), more)], 1)


def _within(pair: Factors, rank: int, scaling: float) -> Factors:
    """Factors of the same product, of at most the full rank."""
    return pair if len(pair[0]) <= rank else fit(low_rank(pair[1], pair[0], scaling), rank, scaling)

"""The report of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qft.lora.merge_weight import WeightMerge
from qft.lora.merging.drift import Drift

DRIFT = 0.05
"""KL in nats per token above which a merge is not recommended, however much of the update survived."""


@dataclass
class MergeReport:
    """What a merge did, weight by weight; `str()` is a table.

    Attributes:
        route: "quantized" or "float": what was merged into.
        weights: layer name → `WeightMerge`.
        source: "dequantized" (Ŵ + Δ) or "original" (W + Δ − Δ0): what was merged.
        routes: source → `Drift` from the tuned model before the merge to the merged one, with `data=`. A merge into
            the quantized base with `original=` and `data=` measures both sources.
    """

    route: str
    weights: dict[str, WeightMerge] = field(default_factory=dict)
    source: str = "dequantized"
    routes: dict[str, Drift] = field(default_factory=dict)

    @property
    def survived(self) -> float:
        """The mean share of the update that the stored weights took over."""
        return _mean([w.survived for w in self.weights.values()])

    @property
    def relative_error(self) -> float:
        """The mean of ‖Ŵ′ − (Ŵ + Δ)‖ / ‖Ŵ + Δ‖, whichever the source."""
        return _mean([w.relative_error for w in self.weights.values()])

    @property
    def drift(self) -> Drift | None:
        """How far the predictions moved by what was done; None without `data=`."""
        return self.routes.get(self.source)

    @property
    def recommendation(self) -> str:
        """What to do, in a sentence: by the drift where both routes were measured, else by what survived."""
        if not self.weights:
            return "nothing was merged"
        return self._on_floats() if self.route == "float" else self._on_codes()

    def _on_floats(self) -> str:
        if self.survived < 0.9:
            return f"{self.survived:.1%} of the update survived: dtype=torch.float32 keeps all of it"
        held = "the original weights with what was learnt" if self.source == "original" else "the tuned weights"
        return f"these floats hold {held}; nothing is lost but what their dtype rounds"

    def _on_codes(self) -> str:
        share = f"{self.survived:.1%} of the update survived the rounding"
        if len(self.routes) == 2:
            kl = {name: drift.kl for name, drift in self.routes.items()}
            if kl["original"] <= kl["dequantized"]:
                return (
                    f"keep this merge: from the original weights it drifts less than from the dequantized ones "
                    f"({kl['original']:.2e} against {kl['dequantized']:.2e} nats per token)"
                )
            return (
                f"merge without original= (after qft.unmerge): from the dequantized weights it drifts less than from the "
                f"original ones ({kl['dequantized']:.2e} against {kl['original']:.2e} nats per token)"
            )
        if self.source == "original":
            return f"{share}, beside fresh rounding noise: data= measures whether merging without original= drifts less"
        if self.drift is not None and self.drift.kl > DRIFT:
            return (
                f"{share}, but the predictions drift by KL {self.drift.kl:.2g} nats per token: use qft.merge_to_float (after "
                "qft.unmerge), or keep the adapter apart from its base"
            )
        if self.survived < 0.9:
            return f"only {share}: merge with original= (after qft.unmerge), or use qft.merge_to_float"
        return f"keep this merge: {share}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "route": self.route,
            "source": self.source,
            "survived": self.survived,
            "relative_error": self.relative_error,
            "drift": None if self.drift is None else vars(self.drift).copy(),
            "routes": {n: vars(d).copy() for n, d in self.routes.items()},
            "recommendation": self.recommendation,
            "weights": {n: vars(w).copy() for n, w in self.weights.items()},
        }

    def __str__(self) -> str:
        head = (
            f"merged {len(self.weights)} weights into {'floats' if self.route == 'float' else 'the quantized base'}"
            f"{' from the original ones' if self.source == 'original' else ''}: "
            f"{self.survived:.1%} of the update survived, relative error {self.relative_error:.2e}"
        )
        worst = sorted(self.weights.items(), key=lambda item: item[1].survived)[:5]
        rows = [f"  {w.survived:7.1%}  {w.relative_error:.2e}  {name}" for name, w in worst]
        lines = [head, *(["  survived  error     (the five least)", *rows] if rows else [])]
        lines += [f"  drift, {name}: {drift}" for name, drift in self.routes.items()]
        return "\n".join([*lines, f"  {self.recommendation}"])

    def _repr_html_(self) -> str:
        from qft.core.html import html_card

        tiles = [(f"{self.survived:.1%}", "of the update survived"), (f"{self.relative_error:.2e}", "relative error")]
        title, _, rest = str(self).partition("\n")
        return html_card(title.partition(":")[0], tiles, lines=[self.recommendation], details=rest)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0

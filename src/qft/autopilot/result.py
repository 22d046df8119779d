"""The result of `qft.auto`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qft.autopilot.reasons import Decision

_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


@dataclass(frozen=True)
class AutoResult:
    """What `qft.auto` decided and did; `str()` is a few lines.

    Attributes:
        folder: what was written: `report.html`, `auto.json`, and `training/` with `adapter/` and `merged/`.
        decisions: each with its value and the reason, in the order in which they were made.
        perplexity: on held-out rows: "before" (the float model), "quantized", "after" (quantized, with its adapter),
            "merged". What did not fit beside the rest is missing, and a note says so.
        drift: "tuning" (from the float model to the tuned one) and "merging" (from that to the merged one) → "kl" in nats
            per token, "mse" of logits, "agreement" of first choices.
        nbytes: by what they are of. seconds: by stage.
        steps, loss: of the training. history: its log, by step.
        adapter, merged, report: paths.
        notes: what was doubted, or could not be measured. setup: device, versions, date.
        resumed: an interrupted call was gone on with. already_finished: nothing was left to do.
    """

    folder: str
    model: str
    data: str
    dry_run: bool
    decisions: list[Decision]
    perplexity: dict[str, float] = field(default_factory=dict)
    drift: dict[str, dict[str, float]] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    loss: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    adapter: str | None = None
    merged: str | None = None
    report: str | None = None
    notes: list[str] = field(default_factory=list)
    setup: dict[str, str] = field(default_factory=dict)
    resumed: bool = False
    already_finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AutoResult:
        """What `to_dict` gave."""
        return cls(**{**values, "decisions": [Decision(**d) for d in values["decisions"]]})

    def __str__(self) -> str:
        width = max(len(d.name) for d in self.decisions)
        lines = [f"{'would train' if self.dry_run else 'trained'} {self.model} on {self.data}"]
        for d in self.decisions:
            lines += [f"  {d.name:<{width}}  {d.value}", f"  {'':<{width}}  {d.reason}"]
        if self.already_finished:
            lines.append("this run was finished before: nothing was done")
        if self.perplexity:
            lines.append("held-out perplexity: " + ", ".join(f"{k} {v:.3f}" for k, v in self.perplexity.items()))
        lines += [f"note: {text}" for text in self.notes]
        if self.dry_run:
            return "\n".join([*lines, "nothing was written"])
        return "\n".join([*lines, *(f"{k}: {v}" for k, v in (("merged model", self.merged), ("report", self.report)))])

"""`Evaluation`: what `qft.evaluate` measured, as text, JSON, a notebook's card and a page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qft.core.console import size
from qft.core.files import write
from qft.core.names import place
from qft.evaluation.measure import SampleDrift, Score
from qft.evaluation.ranges import Range
from qft.evaluation.report import Report, check_writable
from qft.evaluation.svg import number
from qft.pipeline.audit.result import Audit


@dataclass
class Evaluation:
    """What `qft.evaluate` measured; what was not is None or empty. `str()` is a table, and a notebook shows a page.

    Attributes:
        model, baseline: their folders or classes; `baseline` is None where there is none, and `no_baseline` says why.
        data: where the data came from.
        sequences, length: how many token sequences were read, and of how many tokens the longest may be.
        score, baseline_score: next-token loss and perplexity of both.
        drift: from the baseline to the model.
        ranges: block → largest activation and what overflowed, in the model itself.
        weights: the audit of a quantized model; with each layer's error where the baseline is its original.
        tasks, baseline_tasks: lm-eval task → {metric: value}.
        notes: what could not be measured, and why.
        setup: device, dtype, versions and date.
    """

    model: str
    baseline: str | None = None
    no_baseline: str = ""
    data: str | None = None
    sequences: int = 0
    length: int = 0
    score: Score | None = None
    baseline_score: Score | None = None
    drift: SampleDrift | None = None
    ranges: dict[str, Range] = field(default_factory=dict)
    weights: Audit | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline_tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    setup: dict[str, str] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """Return exp of the mean next-token loss, each predicted token weighing the same."""
        return None if self.score is None else self.score.perplexity

    @property
    def baseline_perplexity(self) -> float | None:
        """The same of the baseline."""
        return None if self.baseline_score is None else self.baseline_score.perplexity

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the model's numbers: NaN, infinities, values that float16 does not hold."""
        found = []
        for who, score in (("the model", self.score), ("the baseline", self.baseline_score)):
            if score is not None and score.not_finite:
                found.append(f"{who}'s logits hold NaN or infinity for {score.not_finite} of {score.tokens} tokens")
        broken = [name for name, r in self.ranges.items() if r.not_finite]
        if broken:
            name = broken[0]
            where = ".".join(p for p in (name, self.ranges[name].first_not_finite) if p)
            found.append(f"NaN or infinity in {len(broken)} of {len(self.ranges)} blocks, first in {where}")
        beyond = [name for name, r in self.ranges.items() if r.beyond_float16]
        if beyond:
            name = max(beyond, key=lambda n: self.ranges[n].largest)
            found.append(
                f"{', '.join(beyond[:3])}{f' and {len(beyond) - 3} more' if len(beyond) > 3 else ''}: values beyond "
                f"float16's largest number, 65504, up to {number(self.ranges[name].largest)}: compute in bfloat16 or float32"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinity and NaN, which JSON lacks, are the strings "inf" and "nan"."""
        values = {
            k: v for k, v in vars(self).items() if k not in ("score", "baseline_score", "drift", "ranges", "weights")
        }
        for key in ("score", "baseline_score"):
            score = getattr(self, key)
            values[key] = None if score is None else {**asdict(score), "perplexity": score.perplexity}
        values["drift"] = None if self.drift is None else asdict(self.drift)
        values["ranges"] = {name: asdict(r) for name, r in self.ranges.items()}
        values["weights"] = None if self.weights is None else self.weights.to_dict()
        values["perplexity"], values["baseline_perplexity"] = self.perplexity, self.baseline_perplexity
        values["warnings"] = self.warnings
        return _json(values)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as text, written to `path` too where it is given.

        Raises:
            BadFolder: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            check_writable(path)
            write(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
        return text

    def __str__(self) -> str:
        rows = [("", "model", "baseline" if self.baseline is not None else ""), *_figures(self)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"qft: {self.model}" + (f" against {self.baseline}" if self.baseline is not None else "")]
        lines += [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
        if self.data is not None:
            tokens = self.score.tokens if self.score is not None else 0
            lines.append(f"  data: {self.data}, {tokens:,} predicted tokens in {self.sequences:,} sequences")
        if self.baseline is None:
            lines.append(f"  no baseline: {self.no_baseline}")
        lines += [f"  ATTENTION: {text}" for text in self.warnings]
        lines += [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained HTML page.

        Raises:
            BadFolder: the file cannot be written; one that was there before is left.
        """
        return self.page().write(path)

    def page(self) -> Report:
        """The page, to add to."""
        page = Report(f"Evaluation of {Path(self.model).name or self.model}", _subtitle(self))
        page.tiles(_tiles(self))
        for text in self.warnings:
            page.warn(text)
        if self.baseline is None:
            page.text(f"Nothing here is compared with a float baseline: {self.no_baseline}.")
        for text in self.notes:
            page.text(f"Note: {text}.")
        if self.score is not None:
            _predictions(page, self)
        if self.ranges:
            _ranges(page, self.ranges)
        if self.weights is not None:
            _weights(page, self.weights)
        if self.tasks:
            rows = [
                (
                    f"{task}, {metric}",
                    _with_error(scores, metric),
                    _with_error(self.baseline_tasks.get(task, {}), metric),
                )
                for task, scores in self.tasks.items()
                for metric in scores
                if not metric.endswith(" stderr")
            ]
            page.section("Tasks").table(
                rows, ("task", "model", "baseline"), caption="value ± standard error, by lm-eval"
            )
        return page.section("Setup").table({"model": self.model, "baseline": self.baseline or "none", **self.setup})

    def _repr_html_(self) -> str:
        return self.page()._repr_html_()


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _figures(e: Evaluation) -> list[tuple[str, str, str]]:
    """What it is, of the model, of the baseline."""
    rows = []
    if e.score is not None:
        other = e.baseline_score
        rows.append(("perplexity", f"{e.score.perplexity:.4f}", "" if other is None else f"{other.perplexity:.4f}"))
        rows.append(("loss, nats per token", f"{e.score.loss:.5f}", "" if other is None else f"{other.loss:.5f}"))
    if e.drift is not None:
        rows.append(("KL(baseline ‖ model), nats per token", f"{e.drift.kl:.3e}", ""))
        rows.append(("mean squared difference of logits", f"{e.drift.mse:.3e}", ""))
        rows.append((f"same first choice, {e.drift.tokens:,} tokens", f"{e.drift.agreement:.2%}", ""))
    if e.ranges:
        largest = max(e.ranges, key=lambda n: e.ranges[n].largest)
        rows.append((f"largest activation, {largest}", number(e.ranges[largest].largest), ""))
    if e.weights is not None:
        rows.append(("bits per quantized weight", f"{e.weights.bits_per_weight:.2f}", ""))
        rows.append(("the whole model", size(e.weights.nbytes), ""))
    for task, scores in e.tasks.items():
        for metric in (m for m in scores if not m.endswith(" stderr")):
            rows.append(
                (f"{task}, {metric}", _with_error(scores, metric), _with_error(e.baseline_tasks.get(task, {}), metric))
            )
    return rows


def _with_error(scores: Mapping[str, float], metric: str) -> str:
    if metric not in scores:
        return ""
    error = scores.get(f"{metric} stderr", math.nan)
    return f"{scores[metric]:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


# ---- the page ------------------------------------------------------------------------------------------------


def _subtitle(e: Evaluation) -> str:
    parts = [f"against {e.baseline}"] if e.baseline is not None else []
    if e.score is not None:
        parts.append(f"{e.score.tokens:,} predicted tokens in {e.sequences:,} sequences of {Path(str(e.data)).name}")
    return ", on ".join(parts)


def _tiles(e: Evaluation) -> dict[str, Any]:
    tiles: dict[str, Any] = {}
    if e.score is not None:
        tiles["perplexity"] = f"{e.score.perplexity:.3f}"
        if e.baseline_score is not None:
            change = e.score.perplexity / e.baseline_score.perplexity - 1
            tiles["perplexity of the baseline"] = f"{e.baseline_score.perplexity:.3f}"
            tiles["change"] = f"{change:+.2%}" if math.isfinite(change) else "none can be said"
    if e.drift is not None:
        tiles["KL, nats per token"] = number(e.drift.kl)
        tiles["same first choice"] = f"{e.drift.agreement:.2%}"
    if e.weights is not None:
        tiles["bits per quantized weight"] = f"{e.weights.bits_per_weight:.2f}"
        tiles["the whole model"] = size(e.weights.nbytes)
    return tiles


def _predictions(page: Report, e: Evaluation) -> None:
    page.section(
        "Predictions",
        "Perplexity is exp of the mean next-token loss over all predicted tokens, each weighing the same: all tokens of a "
        "text but its first, the assistant's of a chat, those of a completion. Longer texts are cut into windows of "
        f"{e.length} tokens.",
    )
    scores = [("model", e.score), ("baseline", e.baseline_score)]
    rows = [(who, f"{s.perplexity:.4f}", f"{s.loss:.5f}", s.tokens, s.not_finite) for who, s in scores if s is not None]
    page.table(rows, ("", "perplexity", "loss, nats", "tokens", "with NaN or infinity"))
    if e.drift is not None:
        d = e.drift
        page.table(
            {
                "KL(baseline ‖ model), nats per token": d.kl,
                "mean squared difference of the logits": d.mse,
                "same first choice": f"{d.agreement:.2%}",
                "compared": f"{d.tokens:,} tokens in {d.samples:,} sequences",
            },
            caption="How far the model's predictions are from the baseline's",
        )
        page.bars(d.by_position, title="KL by position in the sequence", x="position", y="KL, nats per token")


def _ranges(page: Report, ranges: Mapping[str, Range]) -> None:
    page.section("Ranges", "The largest absolute value that any module of a block put out; float16 holds up to 65504.")
    blocks = {n: r for n, r in ranges.items() if place(n)[0] is not None}
    if len(blocks) > 1:
        points = {"largest value": [r.largest for r in blocks.values()], "float16's limit": [65504.0] * len(blocks)}
        page.plot(points, title="Largest activation by block", x="block", y="absolute value", log=True)
    header = ("", "largest", "in", "beyond float16", "NaN or infinite")
    rows = [
        (n, r.largest, r.module or "its output", _share(r.beyond_float16), _share(r.not_finite)) for n, r in ranges.items()
    ]  # fmt: skip
    page.table(rows, header)


def _share(value: float) -> str:
    return "none" if value == 0 else f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"


def _weights(page: Report, audit: Audit) -> None:
    page.section("Weights").code(audit.summary())
    errors = {n: w.error for n, w in audit.weights.items() if w.error is not None}
    if not errors:
        return
    places = {n: place(n) for n in errors}
    columns = sorted({b for b, _ in places.values() if b is not None})
    kinds = list(dict.fromkeys(kind for block, kind in places.values() if block is not None))
    at = {(kind, block): errors[n] for n, (block, kind) in places.items()}
    rows = {kind: [at.get((kind, block)) for block in columns] for kind in kinds}
    rows |= {n: [errors[n]] for n, (block, _) in places.items() if block is None}
    page.heat(
        rows,
        title="Relative error of the weights, by block",
        x="block",
        columns=[str(b) for b in columns],
        caption="‖W − Ŵ‖ / ‖W‖ of each quantized weight, adapters left out",
    )

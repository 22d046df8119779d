"""The page of a run of `qft.auto`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.core.console import size
from qft.evaluation.report import Report, check_writable

if TYPE_CHECKING:
    from qft.autopilot.result import AutoResult

STAGES = {
    "before": "before: the float model",
    "quantized": "quantized, not tuned",
    "after": "after: quantized, with its adapter",
    "merged": "merged, written and loaded back",
}
DRIFTS = {"tuning": "float model → tuned", "merging": "tuned → merged"}


def write_report(result: AutoResult, evaluation: Any, path: Path) -> None:
    """Write the page.

    Raises:
        BadFolder: the file cannot be written.
    """
    check_writable(path)
    page(result, evaluation).write(path)


def page(result: AutoResult, evaluation: Any = None) -> Report:
    """Decisions with their reasons, loss curve, perplexity, drift, bytes, seconds, versions."""
    report = Report(
        f"qft auto: {Path(result.model).name}", f"tuned on {Path(result.data).name}, {result.steps:,} steps"
    )
    tiles: dict[str, Any] = {f"perplexity, {k}": f"{v:.3f}" for k, v in result.perplexity.items()}
    if "merging" in result.drift:
        tiles["same first choice after the merge"] = f"{result.drift['merging']['agreement']:.2%}"
    tiles["seconds in all"] = f"{result.seconds['total']:.0f}"
    report.tiles(tiles)
    for text in result.notes:
        report.warn(text)
    report.section("Decisions").table(
        [(d.name, d.value, d.reason) for d in result.decisions], ("", "chosen", "because")
    )
    report.section("Training")
    curves = {
        "training loss": [(e["step"], e["loss"]) for e in result.history if "loss" in e],
        "held-out loss": [(e["step"], e["eval_loss"]) for e in result.history if "eval_loss" in e],
    }
    report.plot({k: v for k, v in curves.items() if v}, title="Loss", x="step", y="nats per token")
    report.section(
        "Held-out perplexity",
        "exp of the mean next-token loss over the tokens to be learnt of rows that were not trained on.",
    )
    report.table([(STAGES[k], v) for k, v in result.perplexity.items()], ("", "perplexity"))
    if result.drift:
        report.section("Drift", "How far predictions on the held-out rows moved. A merge should hardly move them.")
        report.table(
            [(DRIFTS[k], d["kl"], d["mse"], f"{d['agreement']:.2%}") for k, d in result.drift.items()],
            ("", "KL, nats per token", "mean squared difference of logits", "same first choice"),
        )
    report.section("Bytes").table({k: size(v) for k, v in result.nbytes.items()})
    if evaluation is not None and evaluation.weights is not None:
        report.section("Weights").code(evaluation.weights.summary())
    report.section("Seconds").table({k: round(v, 1) for k, v in result.seconds.items()})
    files = {"merged model": result.merged, "adapter": result.adapter, "data": result.data}
    return report.section("Setup").table({"model": result.model, **files, **result.setup})

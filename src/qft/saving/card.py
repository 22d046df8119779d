"""The model card of an export: README.md with the Hub's front matter."""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from qft.core import record as marks
from qft.errors import BadOption, QftWarning
from qft.pipeline.audit.measure import audit

if TYPE_CHECKING:
    from qft.lora.merging.lazy_float_model import HollowModel

CARD = "README.md"
MARK = "<!-- written by qft.export -->"


def write_card(partial: Path, final: Path, model: nn.Module, hollow: HollowModel, format: str) -> None:
    """Write the card into `partial`, unless `final` has a README.md of somebody else's."""
    old = final / CARD
    if old.is_file() and MARK not in old.read_text(errors="replace"):
        warnings.warn(
            f"{old} was not written by qft and is kept: the export has no new model card", QftWarning, stacklevel=4
        )
        return
    (partial / CARD).write_text(model_card(model, hollow, format, final.resolve().name), encoding="utf-8")


def model_card(model: nn.Module, hollow: HollowModel, format: str, title: str) -> str:
    """The card's text: what the model came from, how it was quantized and adapted, and what the merge cost."""
    record = marks.record_of(model)
    base = marks.base_model(model)
    configs = getattr(model, "peft_config", {})
    name = next((c.base_model_name_or_path for c in configs.values()), None)
    name = name or getattr(getattr(base, "config", None), "_name_or_path", None)
    known = bool(name) and not os.path.exists(name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    # a path is the business of the machine that it is on
    shown = (name if known else Path(name).name) if name else type(base).__name__
    quantizers = _quantizers(model)
    library = "gguf" if format == "gguf" else "transformers" if isinstance(base, PreTrainedModel) else "pytorch"
    tags = [
        "qft",
        *(["lora"] if configs else []),
        *sorted({n for n, _, _ in quantizers}),
        *(["gguf"] if format == "gguf" else []),
    ]
    front = [
        *([f"base_model: {name}"] if known else []),
        f"library_name: {library}",
        "tags:",
        *(f"- {t}" for t in tags),
    ]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in hollow.state.values()})
    rows = [
        ("Base model", shown),
        (
            "Quantized while tuning",
            "; ".join(f"{text}, {bits:.2f} bits a weight" for _, text, bits in quantizers) or "no",
        ),
        ("Adapter", "; ".join(_adapters(base, configs)) or "none"),
        *([("Adapter started from", str(record.init))] if record is not None and record.init and configs else []),
        ("Weights", f"{', '.join(dtypes)}, merged, in {format}"),
        ("Merge error", _merge_error(hollow.report)),
        ("Made with", ", ".join(f"{k} {v}" for k, v in _versions().items())),
        ("Date", datetime.now(UTC).date().isoformat()),
    ]
    table = ["| | |", "|---|---|", *(f"| {k} | {v.replace('|', '/')} |" for k, v in rows)]
    return "\n".join(["---", *front, "---", "", MARK, "", f"# {title}", "", *table, ""])


def _quantizers(model: nn.Module) -> list[tuple[str, str, float]]:
    """Name, constructor call and bits a weight of each quantizer."""
    try:
        weights = audit(model).weights.values()
    except BadOption:  # adapters over a float model
        return []
    record = marks.record_of(model)
    names = {repr(q): q.name for q in record.quantizers.values()}
    found = []
    for text in dict.fromkeys(w.quantizer for w in weights):
        mine = [w for w in weights if w.quantizer == text]
        bits = 8 * sum(w.nbytes for w in mine) / sum(prod(w.shape) for w in mine)
        found.append((names.get(text, "quantized"), text, bits))
    return found


def _method(config: Any) -> str:
    """The method of an adapter with its rank, such as "DoRA, r 16, alpha 16"."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "LORA":
        kind = "DoRA" if config.use_dora else "LoRA"
        kind += ", rank-stabilised" if config.use_rslora else ""
    sizes = {"r": getattr(config, "r", None), "alpha": getattr(config, "lora_alpha", None)}
    return ", ".join([kind, *(f"{k} {v}" for k, v in sizes.items() if v)])


def _adapters(base: nn.Module, configs: dict[str, Any]) -> list[str]:
    """The adapters that are in the weights, in short."""
    layers = [m for m in base.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    active = dict.fromkeys(name for layer in layers for name in (layer.merged_adapters or layer.active_adapters))
    lines = []
    for config in (configs[name] for name in active if name in configs):
        targets = getattr(config, "target_modules", None)
        targets = targets if isinstance(targets, str) else ", ".join(sorted({t.split(".")[-1] for t in targets or ()}))
        saved = getattr(config, "modules_to_save", None)
        trained = f", {', '.join(saved)} trained completely" if saved else ""
        lines.append(f"{_method(config)}{f', on {targets}' if targets else ''}{trained}")
    return lines


def _merge_error(report: Any) -> str:
    if not report.weights:
        return "none: no weight has an update merged into it here"
    text = (
        f"relative error {report.relative_error:.2e}, {report.survived:.2%} of the update survived, "
        f"on average over {len(report.weights)} weights"
    )
    drift = getattr(report, "drift", None)
    return text if drift is None else f"{text}; drift {drift if isinstance(drift, str) else format(drift, '.2e')}"


def _versions() -> dict[str, str]:
    from qft.core.version import __version__

    versions = {n: importlib.metadata.version(n) for n in ("transformers", "peft")}
    return {"qft": __version__, "torch": torch.__version__, **versions}

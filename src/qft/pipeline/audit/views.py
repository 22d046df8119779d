"""An audit as lines, a table, JSON, a data frame, and a notebook's card; `audit_plot` draws it."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qft.core.console import size
from qft.core.files import write
from qft.core.names import place
from qft.errors import MissingDependency

if TYPE_CHECKING:
    from pandas import DataFrame

    from qft.pipeline.audit.figures import WeightAudit
    from qft.pipeline.audit.result import Audit


ERRORS = {
    "error": "of the weights",
    "adapted_error": "of the weights with the adapters",
    "output_error": "of the outputs",
    "adapted_output_error": "of the outputs with the adapters",
}
# field → header and form; a column that no weight has a value for is not shown
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "shape": ("shape", lambda v: " × ".join(map(str, v))),
    "bits_per_weight": ("bits", "{:.2f}".format),
    "error": ("error", "{:.4f}".format),
    "adapted_error": ("with adapters", "{:.4f}".format),
    "output_error": ("output error", "{:.4f}".format),
    "adapted_output_error": ("with adapters", "{:.4f}".format),
    "input_max": ("largest in", "{:.4g}".format),
    "output_max": ("largest out", "{:.4g}".format),
}


def _figures(audit: Audit, key: str) -> dict[str, float]:
    return {n: v for n, w in audit.weights.items() if (v := getattr(w, key)) is not None}


def _columns(audit: Audit) -> dict[str, tuple[str, Callable[[Any], str]]]:
    return {key: column for key, column in COLUMNS.items() if _figures(audit, key)}


# ---- lines ---------------------------------------------------------------------------------------------------


def summary(audit: Audit) -> str:
    """`Audit.summary`."""
    kinds: dict[str, int] = {}
    for w in audit.weights.values():
        kinds[w.quantizer] = kinds.get(w.quantizer, 0) + 1
    lines = [f"qft: {n} layers in {kind}" for kind, n in kinds.items()]
    before = f", {size(audit.float_bytes)} before" if audit.float_bytes else ""
    lines.append(
        f"  {audit.bits_per_weight:.2f} bits a weight, {size(audit.quantized_bytes)}{before}; "
        f"{size(audit.nbytes)} the whole model"
    )
    lines += [f"  {line}" for line in error_lines(audit)]
    if tokens := _figures(audit, "tokens"):
        lines.append(
            f"  data: {int(max(tokens.values())):,} tokens; {len(tokens)} of {len(audit.weights)} layers read any"
        )
    lines += [f"  left as it is: {line}" for line in left_lines(audit)]
    if audit.experts:
        total = sum(audit.experts.values())
        lines.append(
            f"  ATTENTION: {len(audit.experts)} fused expert weights stay in 16 bit, {size(total)} "
            f"({next(iter(audit.experts))}, ...): this quantizer packs no experts, or skip= leaves them; nf4, int8, hqq and "
            "other backends that need no calibration pack them"
        )
    if audit.warnings:
        lines.append(
            f"  ATTENTION: activations of {_some(list(audit.warnings))} exceed float16's largest number, 65504, or come "
            "within a factor of 2: compute in bfloat16 or float32"
        )
    if audit.trainable:
        lines.append(f"  trainable: {audit.trainable:,} of {audit.parameters:,} parameters")
    lines.append(f"  merges: {', '.join(audit.merges) or 'none'}")
    return "\n".join(lines)


def error_lines(audit: Audit) -> list[str]:
    """Mean and worst of each kind of error that there is."""
    lines = []
    for key, what in ERRORS.items():
        if found := _figures(audit, key):
            worst = max(found, key=lambda n: found[n])
            mean = sum(found.values()) / len(found)
            lines.append(f"relative error {what}: {mean:.4f} on average, {found[worst]:.4f} the largest ({worst})")
    return lines


def left_lines(audit: Audit) -> list[str]:
    """The layers left in 16 bit, those with one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, reason in audit.left.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{_some(names)} ({reason})" for reason, names in reasons.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def table(audit: Audit) -> list[str]:
    """The lines of a table with a row a weight, under a header."""
    columns = _columns(audit)
    rows = [["", *(header for header, _ in columns.values()), ""]]
    for name, w in audit.weights.items():
        rows.append([name, *_cells(w, columns), w.warning or ""])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        f"  {row[0]:<{widths[0]}}  {'  '.join(f'{c:>{n}}' for c, n in zip(row[1:-1], widths[1:-1]))}  {row[-1]}".rstrip()
        for row in rows
        if len(rows) > 1
    ]


def _cells(w: WeightAudit, columns: dict[str, tuple[str, Callable[[Any], str]]]) -> list[str]:
    values = ((getattr(w, key), form) for key, (_, form) in columns.items())
    return ["" if value is None else form(value) for value, form in values]


# ---- data ----------------------------------------------------------------------------------------------------


def as_dict(audit: Audit) -> dict[str, Any]:
    """`Audit.to_dict`."""
    return {
        "bits_per_weight": audit.bits_per_weight,
        "quantized_bytes": audit.quantized_bytes,
        "float_bytes": audit.float_bytes,
        "nbytes": audit.nbytes,
        "trainable": audit.trainable,
        "parameters": audit.parameters,
        "merges": list(audit.merges),
        "left": dict(audit.left),
        "experts": dict(audit.experts),
        "warnings": audit.warnings,
        "weights": {
            n: {k: _json(v) for k, v in {**vars(w), "bits_per_weight": w.bits_per_weight}.items()}
            for n, w in audit.weights.items()
        },
    }


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def to_json(audit: Audit, path: str | os.PathLike[str] | None) -> str:
    """`Audit.to_json`."""
    text = json.dumps(as_dict(audit), indent=1, allow_nan=False)
    if path is not None:
        write(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    return text


def to_dataframe(audit: Audit) -> DataFrame:
    """`Audit.to_dataframe`."""
    try:
        import pandas as pd
    except ImportError as error:
        raise need("to_dataframe", "pandas") from error
    rows = []
    for name, w in audit.weights.items():
        block, kind = place(name)
        figures = {k: v for k, v in vars(w).items() if k not in ("quantizer", "shape", "nbytes")}
        rows.append(
            {
                "block": block,
                "kind": kind,
                "quantizer": w.quantizer,
                "shape": w.shape,
                "nbytes": w.nbytes,
                "bits_per_weight": w.bits_per_weight,
                **figures,
                "warning": w.warning,
            }
        )
    frame = pd.DataFrame(rows, index=pd.Index(list(audit.weights), name="layer"))
    counts = {c: "Int64" for c in ("block", "tokens", "left_out") if c in frame}  # an integer column that may lack some
    floats = {c: "float64" for c in (*ERRORS, "input_max", "output_max") if c in frame}
    return frame.astype({**counts, **floats})


def need(what: str, package: str) -> MissingDependency:
    """The error for a view whose package is not installed."""
    return MissingDependency(
        f"{what} needs {package}, not installed here: pip install {package}, or 'qft[plot]' for all views"
    )


# ---- a notebook's card ---------------------------------------------------------------------------------------

_STYLE = """
.qft-audit{font:13px/1.45 system-ui,sans-serif;border:1px solid rgba(128,128,128,.45);border-radius:8px;
padding:12px 16px;max-width:1100px}
.qft-audit h4{margin:0 0 8px;font-size:14px}
.qft-audit p{margin:3px 0}
.qft-audit .tiles{display:flex;flex-wrap:wrap;gap:8px 28px;margin:8px 0}
.qft-audit .tiles b{display:block;font-size:18px}
.qft-audit .tiles span{opacity:.7}
.qft-audit .warn{border-left:4px solid #d97706;padding-left:8px;margin:8px 0}
.qft-audit .rows{max-height:420px;overflow:auto;margin-top:6px}
.qft-audit table{border-collapse:collapse;font-size:12px}
.qft-audit th,.qft-audit td{padding:2px 10px;text-align:right;white-space:nowrap;background:none}
.qft-audit th{border-bottom:1px solid rgba(128,128,128,.45)}
.qft-audit th:first-child,.qft-audit td:first-child,.qft-audit td:last-child{text-align:left}
.qft-audit td:first-child{font-family:monospace}
.qft-audit .bar{display:inline-block;height:8px;background:#3b82f6;opacity:.75;margin-left:6px;vertical-align:baseline}
.qft-audit .slot{display:inline-block;width:66px;text-align:left}
"""


def card(audit: Audit) -> str:
    """HTML that needs nothing from outside: figures, warnings, and the table behind a click."""
    e = html.escape
    kinds = dict.fromkeys(re.sub(r"\(.*", "", w.quantizer, flags=re.S) for w in audit.weights.values())
    tiles = [
        (f"{audit.bits_per_weight:.2f}", "bits a weight"),
        (size(audit.quantized_bytes), f"weights, {size(audit.float_bytes)} before" if audit.float_bytes else "weights"),
        (size(audit.nbytes), "the whole model"),
    ]
    for key, what in ERRORS.items():
        if found := _figures(audit, key):
            tiles.append((f"{sum(found.values()) / len(found):.4f}", f"mean error {what}"))
    if audit.trainable:
        tiles.append((f"{audit.trainable:,}", f"trainable of {audit.parameters:,} parameters"))
    lines = [f"left as it is: {line}" for line in left_lines(audit)]
    lines.append(f"merges: {', '.join(audit.merges) or 'none'}")
    alarms = [f"{name}: {text}" for name, text in audit.warnings.items()]
    if audit.experts:
        alarms.append(
            f"{len(audit.experts)} fused expert weights stay in 16 bit, {size(sum(audit.experts.values()))}: "
            f"{_some(list(audit.experts))}"
        )
    more = f"<p>and {len(alarms) - 8} more</p>" if len(alarms) > 8 else ""
    warn = f'<div class="warn">{"".join(f"<p>{e(a)}</p>" for a in alarms[:8])}{more}</div>' if alarms else ""
    return (
        f'<div class="qft-audit"><style>{_STYLE}</style>'
        f"<h4>{len(audit.weights)} layers in {e(', '.join(kinds))}</h4>"
        f'<div class="tiles">{"".join(f"<div><b>{e(big)}</b><span>{e(small)}</span></div>" for big, small in tiles)}</div>'
        f"{warn}{''.join(f'<p>{e(line)}</p>' for line in lines)}"
        f'<details><summary>layer by layer</summary><div class="rows">{_html_table(audit)}</div></details></div>'
    )


def _html_table(audit: Audit) -> str:
    columns = _columns(audit)
    largest = {key: max(_figures(audit, key).values(), default=0.0) for key in ERRORS if key in columns}
    head = "".join(f"<th>{html.escape(header)}</th>" for header, _ in columns.values())
    rows = []
    for name, w in audit.weights.items():
        cells = []
        for key, text in zip(columns, _cells(w, columns)):
            bar = ""
            if text and largest.get(key):
                bar = f'<span class="slot"><span class="bar" style="width:{60 * getattr(w, key) / largest[key]:.0f}px">'
                bar += "</span></span>"
            cells.append(f"<td>{html.escape(text)}{bar}</td>")
        rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}<td>{html.escape(w.warning or '')}</td></tr>")
    return f"<table><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"

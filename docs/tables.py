"""Tables of measured figures, from the files that the benchmarks wrote; `generate.py` puts them on the pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
INITS = ("zero", "loftq", "loftq:steps=5", "qera", "qera-full", "pissa", "olora")
NAMES = {
    "nf4": "NF4",
    "fp4": "FP4",
    "int8": "int8",
    "reference:format=int,bits=4,group_size=64": "4-bit affine, 64",
    "reference:format=int,bits=3,group_size=64": "3-bit affine, 64",
    "reference:format=int,bits=2,group_size=32": "2-bit affine, 32",
    "hqq": "HQQ 4-bit, 64",
    "quanto:format=int4": "quanto int4",
    "gptq:group_size=64,symmetric=false": "GPTQ 4-bit, 64",
    "float": "float",
}


def read(name: str) -> dict[str, Any]:
    """A file of figures, without runs that failed."""
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    found["runs"] = [r for r in found["runs"] if "error" not in r]
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if mean < 1000 else f"{mean:.0f}"


def _quality() -> list[dict[str, Any]]:
    return read("quality-h100.json")["runs"] + read("quality-cpu.json")["runs"]


def starts() -> str:
    runs, rows = _quality(), []
    for folded in (False, True):
        for quantizer, label in NAMES.items():
            for rank in (16, 64):

                def found(init: str, q: str = quantizer, r: int = rank, f: bool = folded) -> list[float]:
                    ranks = (16, 64) if init == "zero" else (r,)
                    hits = [
                        x["perplexity"]["start"]
                        for x in runs
                        if (x["quantizer"], x["init"], x["folded"]) == (q, init, f) and x["rank"] in ranks
                    ]
                    return hits[:1]

                cells = [_mean(found(i)) for i in INITS]
                if quantizer != "float" and set(cells[1:]) != {"–"}:
                    rows.append([label + (", folded" if folded else ""), str(rank), *cells])
    return table(["weights", "rank", *INITS], rows) + _files("quality-h100.json", "quality-cpu.json")


def rates() -> str:
    runs = [r for r in _quality() if not r["merge"]]
    steps = sorted({r["rate"] for r in runs})
    rows = []
    for quantizer, label in NAMES.items():
        for init in ("float", *INITS):
            cells = []
            for rate in steps:
                hits = [
                    r["perplexity"]["tuned"]
                    for r in runs
                    if (r["quantizer"], r["init"], r["rate"]) == (quantizer, init, rate)
                ]
                cells.append(_mean(hits) + (f" ({len(hits)} seeds)" if len(hits) > 1 else ""))
            if set(cells) != {"–"}:
                rows.append([label, "" if init == "float" else init, *cells])
    return table(["weights", "init", *(f"{r:g}" for r in steps)], rows) + _files("quality-h100.json")


def merges() -> str:
    kinds = ("start", "tuned", "merged to float", "merged", "merged from the original", "unmerged")
    rows = []
    for run in sorted(_quality(), key=lambda r: (r["quantizer"], INITS.index(r["init"]) if r["init"] in INITS else 9)):
        if run["merge"] and run["rank"] == 16 and not run["folded"] and "merged" in run["perplexity"]:
            rows.append([NAMES[run["quantizer"]], run["init"], *(f"{run['perplexity'][k]:.2f}" for k in kinds)])
    return table(["weights", "init", *kinds], rows) + _files("quality-h100.json")


def seconds() -> str:
    rows = [
        [r["init"], f"{r['seconds']:.1f}", f"{r['calibration_tokens']:,}"] for r in read("init_8b-h100.json")["runs"]
    ]
    return table(["init", "seconds", "calibration tokens"], rows) + _files("init_8b-h100.json")


def _files(*names: str) -> str:
    lines = []
    for name in names:
        found = read(name)
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in ("torch", "peft", "bitsandbytes"))
        lines.append(f"`benchmarks/results/{name}`: {found['device']}, {found['date'][:10]}, {versions}")
    return "\n\n" + "; ".join(lines) + "."


TABLES: dict[str, Callable[[], str]] = {"starts": starts, "rates": rates, "merges": merges, "seconds": seconds}

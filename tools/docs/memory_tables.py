"""Tables of `memory.md`: plans against peaks, context lengths, two gigabytes; a file that is not there leaves its table out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from speed_tables import RESULTS, _about, _missing, _table

STACKS = {
    "hand": "by hand",
    "qft": "qft, all recomputed",
    "qft-auto": 'qft, `memory="auto"`',
    "qft-offload": 'qft, `offload="activations"`',
}
LONG = 4
"""Seconds of a step from which on one alone is a rate."""


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def plans() -> str:
    """Every combination: what was planned, what was measured."""
    found = _read("memory_plan-h200.json")
    if found is None:
        return _missing("python benchmarks/memory_plan.py --out benchmarks/results/memory_plan-h200.json")
    head = ["model", "quantizer", "tokens", "recomputed", "optimizer", "path", "plan, GiB", "measured, GiB", "off by"]
    rows = [
        [
            r["model"],
            f"`{r['quantizer']}`",
            f"{r['batch']} × {r['sequence']}",
            r["recompute"],
            r["optimizer"],
            "fast" if r["fast"] else "plain",
            f"{r['plan_gib']:.2f}",
            f"{r['peak_gib']:.2f}",
            f"{r['error']:+.1%}",
        ]
        for r in found["runs"]
        if "error" in r
    ]
    within = sum(abs(r["error"]) <= 0.05 for r in found["runs"] if "error" in r)
    failed = [f"{r.get('model', r.get('of'))}: {r['failed']}" for r in found["runs"] if "failed" in r]
    text = f"{_table(head, rows)}\n\n{within} of {len(rows)} are within 5 %."
    return "\n\n".join([text, *failed, _about("memory_plan-h200.json", found)])


def context() -> str:
    """Peak and rate of one sequence, by its length."""
    found = _read("context-h200.json")
    if found is None:
        return _missing("python benchmarks/context.py --out benchmarks/results/context-h200.json")
    planned = (r for rows in found.get("plans", {}).values() for r in rows)
    sizes = sorted({r["sequence"] for r in [*found["runs"], *planned]})
    cells = {(r["stack"], r["sequence"]): r for r in found["runs"]}
    plans = {(s, r["sequence"]): r["plan_gib"] for s, rows in found.get("plans", {}).items() for r in rows}

    def cell(stack: str, n: int) -> str:
        row = cells.get((stack, n))
        if row is None:
            return f"{plans[stack, n]:.2f} GiB by plan" if (stack, n) in plans else "–"
        if "peak_gib" not in row:
            return "too little memory" if "OutOfMemory" in row.get("error", "") else "–"
        # one step was timed, and in a short one what comes once counts
        rate = f", {row['tokens_per_second']:,.0f}/s" if row.get("step_s", 0) > LONG else ""
        return f"{row['peak_gib']:.2f} GiB{rate}"

    names = [n for n in STACKS if any(s == n for s, _ in cells)]
    rows = [[f"{n:,}", *(cell(s, n) for s in names)] for n in sizes]
    if found["largest_by_plan"]:
        rows.append(["longest by plan", *(f"{found['largest_by_plan'].get(s, 0):,}" for s in names)])
    notes = [f"{STACKS[s]}: {text}" for s, text in found["notes"].items()]
    table = _table(["tokens", *(STACKS[s] for s in names)], rows)
    cap = f"Each may have {found['cap']} of the card. " if found["cap"] else ""
    return "\n\n".join([table, *notes, cap + _about("context-h200.json", found)])


def small() -> str:
    """SmolLM2 in two gigabytes."""
    found = _read("small_memory-cpu.json")
    if found is None:
        return _missing("python benchmarks/small_memory.py --out benchmarks/results/small_memory-cpu.json")
    gb = 10**9
    head = ["limit, GB", "peak, GB", "of it imports", "plan of the training, GB", "tokens/s"]
    row = [found[k] / gb for k in ("limit_bytes", "peak_rss_bytes", "imports_rss_bytes", "plan_bytes")]
    table = _table(head, [[*(f"{v:.2f}" for v in row), f"{found['tokens_per_second']:.0f}"]])
    return f"{table}\n\n{_about('small_memory-cpu.json', found)}"


def seventy() -> str:
    """A 70B shape, with and without streamed weights."""
    found = _read("seventy-h100.json")
    if found is None:
        return _missing("python benchmarks/seventy.py --out benchmarks/results/seventy-h100.json")
    head = ["tokens", "limit", "on the host", "peak, GiB", "plan, GiB", "host, GiB", "tokens/s"]
    rows = [
        [
            f"1 × {r['sequence']}",
            r["limit"],
            f"{r['streamed_blocks']} of 80 blocks" if "streamed_blocks" in r else "–",
            f"{r['peak_gib']:.2f}",
            f"{r['plan_gib']:.2f}",
            f"{r['streamed_gib']:.1f}" if "streamed_gib" in r else "–",
            f"{r['tokens_per_second']:,.0f}",
        ]
        for r in found["runs"]
        if "peak_gib" in r
    ]
    return f"{_table(head, rows)}\n\n{_about('seventy-h100.json', found)}"


TABLES: dict[str, Callable[[], str]] = {"plans": plans, "context": context, "seventy": seventy, "small": small}

"""Tables of `speed.md`, from what `benchmarks/train_step.py` wrote; a file that is not there leaves a line that says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LABELS = {
    "hand": "by hand: PEFT, bitsandbytes NF4, autocast",
    "hand-bf16": "by hand, nothing upcast, bf16 adapters",
    "liger": "… with liger-kernel",
    "compiled": "… with torch.compile a layer",
    "liger-compiled": "… with both",
    "bf16": "LoRA over bf16 weights, by hand",
    "bf16-lean": "LoRA over bf16 weights, bf16 adapters",
    "bf16-compiled": "… with torch.compile a layer",
    "unsloth": "Unsloth, offloaded checkpoints",
    "unsloth-plain": "Unsloth, plain checkpoints",
    "qft": "qft",
    "qft-fp8": 'qft, `compute="fp8"`',
    "qft-offload": 'qft, `offload="activations"`',
    "qft-plain": "qft without optimize_training",
}


def label(stack: str) -> str:
    name, _, spec = stack.partition("@")[0].partition(":")
    return LABELS.get(name, name) + (f", `{spec}`" if spec else "")


def files(prefix: str) -> dict[str, dict[str, Any]]:
    """Files of figures by name, those that hold runs."""
    found = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob(f"{prefix}*.json"))}
    return {name: f for name, f in found.items() if f["runs"]}


def good(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in found["runs"] if "error" not in r]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _number(row: dict[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return "–" if value is None else form.format(value)


def _about(name: str, found: dict[str, Any]) -> str:
    wanted = ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth")
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in wanted)
    return f"`benchmarks/results/{name}`: {found['device']}, {found['date'][:10]}, {versions}."


def _missing(what: str) -> str:
    return f"No figures yet: `{what}` makes them."


def step() -> str:
    """Every stack of every shape, at its batch and sequence."""
    parts = []
    for name, found in files("train_step-").items():
        rows = [
            [
                label(r["stack"]),
                {"all": "all", "half": "half", "none": "none"}.get(r["recompute"], r["recompute"]),
                f"{r['tokens_per_second']:,.0f}",
                _number(r, "ratio", "{:.2f}"),
                _number(r, "peak_gib", "{:.1f}"),
                _number(r, "share", "{:.0%}"),
                f"{r['compile_s']:.0f}",
            ]
            for r in good(found)
            if not _by_length(found)
        ]
        if not rows:
            continue
        first = good(found)[0]
        rate = max(found["matrix_rate"].values()) / 1e12
        title = (
            f"Shape {found['shape'].upper()}, batch {first['batch']} × {first['sequence']}, rank {found['rank']}; "
            f"measured matrix rate {rate:,.0f} TFLOP/s"
        )
        head = ["stack", "recomputed layers", "tokens/s", "to by hand", "peak GiB", "of the matrix rate", "compile s"]
        parts.append(f"**{title}**\n\n{_table(head, rows)}\n\n{_about(name, found)}")
    return "\n\n".join(parts) or _missing(
        "python benchmarks/train_step.py --out benchmarks/results/train_step-8b-h100.json"
    )


def lengths() -> str:
    """Tokens a second by sequence length, at the same number of tokens a step."""
    parts = []
    for name, found in files("train_step-").items():
        if not _by_length(found):
            continue
        sizes = sorted({(r["sequence"], r["batch"]) for r in found["runs"]})
        stacks = list(dict.fromkeys(r["stack"] for r in good(found)))
        rates = {(r["stack"], r["sequence"]): f"{r['tokens_per_second']:,.0f}" for r in good(found)}
        rows = [
            [label(s) + (f" ({s.partition('@')[2]})" if "@" in s else ""), *(rates.get((s, n), "–") for n, _ in sizes)]
            for s in stacks
        ]
        head = ["tokens/s", *(f"{b} × {n}" for n, b in sizes)]
        parts.append(f"**Shape {found['shape'].upper()}**\n\n{_table(head, rows)}\n\n{_about(name, found)}")
    return "\n\n".join(parts) or _missing("python benchmarks/train_step.py --lengths 512,2048,8192,16384")


def kinds() -> str:
    """Shares of a step by kind of kernel, where a run was profiled."""
    parts = []
    for name, found in files("train_step-").items():
        runs = [r for r in good(found) if "profile" in r and not _by_length(found)]
        if not runs:
            continue
        shares = [{k["name"]: k["share"] for k in r["profile"]["kinds"]} for r in runs]
        names = sorted({k for s in shares for k in s}, key=lambda k: -max(s.get(k, 0) for s in shares))
        rows = [
            [f"{label(r['stack'])} ({r['recompute']})", *(f"{s.get(k, 0):.0%}" for k in names)]
            for r, s in zip(runs, shares, strict=True)
        ]
        title = f"Shape {found['shape'].upper()}"
        parts.append(f"**{title}**\n\n{_table(['share of the time', *names], rows)}\n\n{_about(name, found)}")
    return "\n\n".join(parts) or _missing("python benchmarks/train_step.py --profile")


def fp8_loss() -> str:
    """What float8 changes in a fine-tune."""
    found = files("fp8_loss-")
    if not found:
        return _missing("python benchmarks/fp8_loss.py --out benchmarks/results/fp8_loss-h100.json")
    parts = []
    for name, file in found.items():
        rows = [[r["compute"], f"{r['seed']}", f"{r['loss']:.4f}", f"{r['perplexity']:.3f}"] for r in file["runs"]]
        size = f"{file['steps']} steps of {file['batch']} × {file['length']} tokens, `{file['spec']}`"
        text = f"**SmolLM2-135M, {size}; held-out perplexity before {file['before']:.3f}**"
        head = ["base products", "seed", "loss of the last ten steps", "held-out perplexity"]
        parts.append(f"{text}\n\n{_table(head, rows)}\n\n{_about(name, file)}")
    return "\n\n".join(parts)


def cpu() -> str:
    """SmolLM2 on a CPU."""
    parts = []
    for name, found in files("train_step_cpu").items():
        rows = []
        for r in found["runs"]:
            took = {k: sorted(v)[len(v) // 2] for k, v in r["quantizing"]["seconds"].items()}
            for way, rate in r["tokens_per_second"].items():
                words = {"hand": "PEFT over bitsandbytes", "qft": "qft", "float": "PEFT over float weights"}[way]
                ratio = f"{r['ratio'][way]:.2f}" if "ratio" in r else "–"
                rows.append([words, r["dtype"], f"{rate:.0f}", ratio, f"{took[way]:.2f}" if way in took else "–"])
        head = ["stack", "dtype", "tokens/s", "to by hand", "quantizing, s"]
        size = f"Batch {found['batch']} × {found['sequence']}, {found['threads']} threads"
        parts.append(f"**{size}**\n\n{_table(head, rows)}\n\n{_about(name, found)}")
    return "\n\n".join(parts) or _missing(
        "python benchmarks/train_step_cpu.py --out benchmarks/results/train_step_cpu.json"
    )


def _by_length(found: dict[str, Any]) -> bool:
    return len({r["sequence"] for r in found["runs"]}) > 1


TABLES: dict[str, Callable[[], str]] = {
    "step": step,
    "lengths": lengths,
    "kinds": kinds,
    "fp8_loss": fp8_loss,
    "cpu": cpu,
}

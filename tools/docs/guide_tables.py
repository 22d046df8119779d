"""Tables of the pages that explain: which quantizer, what tuning and merging do, what fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from speed_tables import RESULTS, _about, _table

CHOICE = (
    "float", "eetq", "int8", "hqq:bits=8", "awq:group_size=64", "gptq:group_size=64,symmetric=false", "hqq", "nf4",
    "nf4:double_quant=true", "reference:format=int,bits=4,group_size=64", "mxfp4",
    "gptq:group_size=64,bits=3,symmetric=false", "reference:format=int,bits=3,group_size=64",
)  # fmt: skip
"""Of `backends.md`, one of each kind."""
STAGES = {
    "float": "float",
    "quantized": "quantized",
    "tuned": "quantized, with its tuned adapter",
    "merged": "merged to float, exported, loaded back",
}
STACKS = {
    "hand": "PEFT over bitsandbytes, by hand",
    "qft": "`qft.optimize_training(model, memory=\"least\")`",
    "qft-offload": "the same, `offload=\"activations\"`",
    "qft@auto": "`qft.optimize_training(model)`",
}  # fmt: skip
MIB, GIB = 2**20, 2**30


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def choice() -> str:
    found = _read("backends-h100.json")
    runs = {r["quantizer"]: r for r in found["runs"] if "error" not in r}
    head = ["quantizer", "bits a weight", "perplexity", "folded", "seconds", "survives a merge into it"]
    rows = []
    for run in (runs[name] for name in CHOICE):
        survived = f"{run['merged']['survived']:.0%}" if isinstance(run.get("merged"), dict) else ""
        perplexity = [f"{run['perplexity'][k]:.2f}" for k in ("plain", "folded")]
        seconds = f"{run['quantize_s']:.1f}" if "quantize_s" in run else ""
        rows.append([f"`{run['quantizer']}`", f"{run['bits_per_weight']:.2f}", *perplexity, seconds, survived])
    return f"{_table(head, rows)}\n\n{_about('backends-h100.json', found)}"


def stages() -> str:
    """The demo: what each step does to a held-out text, and to the bytes of the weights."""
    found = _read("demo-cpu.json")
    rows = [
        [text, f"{found['perplexity'][stage]:.2f}", f"{found['nbytes'][stage] / MIB:.0f}"]
        for stage, text in STAGES.items()
    ]
    head = ["", "held-out perplexity", "weights, MiB"]
    about = f"{found['model']}, `{found['quantizer']}`, {found['steps']} steps of {found['batch_size']} × "
    about += f"{found['sequence_length']} tokens."
    return f"{_table(head, rows)}\n\n{about} {_about('demo-cpu.json', found)}"


def step_memory() -> str:
    """One training step of the 8B shape, by what is recomputed or offloaded."""
    found = _read("train_step-8b-memory-h100.json")
    runs = {r["stack"]: r for r in found["runs"] if "peak_gib" in r}
    rows = [
        [text, f"{runs[stack]['peak_gib']:.1f}", f"{runs[stack]['tokens_per_second']:,.0f}"]
        for stack, text in STACKS.items()
    ]
    run = runs["qft"]
    head = [f"8B, {run['batch']} × {run['sequence']} tokens", "peak, GiB", "tokens/s"]
    return f"{_table(head, rows)}\n\n{_about('train_step-8b-memory-h100.json', found)}"


def seventy() -> str:
    """A 70B shape within two limits."""
    found = _read("seventy-h100.json")
    head = [
        "`memory=`",
        "`offload=`",
        "tokens a step",
        "planned, GiB",
        "measured, GiB",
        "in host memory, GiB",
        "tokens/s",
    ]
    rows = [
        [
            f'`"{r["limit"]}"`',
            f'`"{r["offload"]}"`' if r["offload"] else "–",
            f"{r['batch']} × {r['sequence']}",
            *(f"{r[k]:.2f}" for k in ("plan_gib", "peak_gib", "plan_host_gib")),
            f"{r['tokens_per_second']:,.0f}",
        ]
        for r in found["runs"]
    ]
    about = f"Random weights, `{found['quantizer']}`, rank {found['rank']}. {_about('seventy-h100.json', found)}"
    return f"{_table(head, rows)}\n\n{about}"


def exports() -> str:
    """Peaks of writing or building the float model."""
    found = _read("export_peak-cpu.json")
    head = ["way", "finished", "memory beyond the model, MiB"]
    names = {"merge_to_float": "`qft.merge_to_float`"}
    rows = [
        [
            names.get(r["way"], f'`qft.export(..., format="{r["way"]}")`'),
            "yes" if r["completed"] else "no",
            f"{r['export'] / MIB:.0f}",
        ]
        for r in found["runs"]
    ]
    limit, size = found["runs"][0]["limit"] / MIB, found["model"]["float"] / MIB
    about = f"A model of {size:.0f} MiB in floats, by a process that may take {limit:.0f} MiB more than the quantized model."
    return f"{_table(head, rows)}\n\n{about} {_about('export_peak-cpu.json', found)}"


def auto_decisions() -> str:
    """What `qft auto` chose on a CPU, from `benchmarks/auto_smollm.py`."""
    found = _read("auto-cpu.json")
    rows = [[d["name"], d["value"], d["reason"]] for d in found["decisions"]]
    return _table(["", "chosen", "because"], rows)


def auto_outcome() -> str:
    found = _read("auto-cpu.json")
    perplexity, seconds = found["perplexity"], found["seconds"]
    rows = [[f"held-out perplexity, {k}", f"{v:.2f}"] for k, v in perplexity.items()]
    rows += [[f"seconds, {k}", f"{v:.0f}"] for k, v in seconds.items() if k != "total"]
    rows.append(["seconds of the whole command", f"{found['wall_seconds']:.0f}"])
    about = (
        f"`{found['command']}`, {found['steps']} steps, {found['threads']} threads. {_about('auto-cpu.json', found)}"
    )
    return f"{_table(['', ''], rows)}\n\n{about}"


def tuned() -> str:
    """Held-out scores after the same fine-tune, from `benchmarks/tuned_score.py`."""
    names = {"float": "16 bit", "nf4": "`nf4`", "nf4, qera-full": '`nf4`, `init="qera-full"`'}
    files = {"chats": "tuned_score-cpu.json", "text": "tuned_score_text-cpu.json"}
    rows, notes = [], []
    for data, file in files.items():
        found = _read(file)
        runs = {(r["column"], r["seed"]): r for r in found["runs"]}
        seeds = list(dict.fromkeys(r["seed"] for r in found["runs"]))
        for column in dict.fromkeys(r["column"] for r in found["runs"]):
            own = [runs[column, seed] for seed in seeds]
            right, exact, perplexity = (
                sum(r[key] for r in own) / len(own) for key in ("accuracy", "exact", "perplexity")
            )
            shares = [r["accuracy"] / runs["float", r["seed"]]["accuracy"] for r in own]
            rows.append(
                [
                    data,
                    names[column],
                    f"{right:.1%}",
                    f"{exact:.1%}" if data == "chats" else "",
                    f"{perplexity:.3f}",
                    "" if column == "float" else ", ".join(f"{share:.1%}" for share in shares),
                ]
            )
        notes.append(
            f"{data.capitalize()}: {found['steps']} steps of {found['batch']} rows, learning rate {found['lr']:g}, means of "
            f"{len(seeds)} seeds. {_about(file, found)}"
        )
    head = ["data", "weights under the adapter", "tokens right", "answers right", "perplexity", "of 16 bit's, by seed"]
    return "\n\n".join([_table(head, rows), *notes])


def peft_tests() -> str:
    """What PEFT's own tests came to, from `benchmarks/peft_quantization.py`; not a table but sentences."""
    found = _read("peft_quantization-cpu.json")
    runs = found["runs"]
    counts = {kind: sum(r[kind] for r in runs) for kind in ("passed", "failed", "skipped", "excluded")}
    names = ", ".join(f"`{r['quantizer']}`" for r in runs)
    excluded = "; ".join(f"`{name}` ({reason})" for name, reason in found["excluded"].items())
    text = (
        f"The tests of PEFT {found['versions']['peft']}'s `{found['file']}`, over small OPT models that `qft.quantize` made "
        f"with {names}: {counts['passed']} pass, {counts['failed']} fail, and PEFT itself skips {counts['skipped']}. Not "
        f"counted are the {counts['excluded']} of {excluded}."
    )
    return f"{text}\n\n{_about('peft_quantization-cpu.json', found)}"


TABLES: dict[str, Callable[[], str]] = {
    "tuned": tuned,
    "choice": choice,
    "stages": stages,
    "step_memory": step_memory,
    "seventy": seventy,
    "exports": exports,
    "auto_decisions": auto_decisions,
    "auto_outcome": auto_outcome,
    "peft_tests": peft_tests,
}

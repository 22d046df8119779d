"""One training step of LoRA over a random Llama shape, by every stack: tokens a second, memory, share of the matrix rate.

Each stack runs in a process of its own, with the same weights and token ids; one that fails leaves a row with its error.
The by-hand stack is a part of every call and recomputes every layer; ratios are to it.

    python benchmarks/train_step.py --stacks hand,liger,unsloth,bf16,qft,qft@none --out benchmarks/results/train_step-8b.json
    python benchmarks/train_step.py --shape tiny --stacks hand,qft-plain          # tries the script out on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import stacks
import stepping

TOKENS = 16384
"""In a step of `--lengths`: batch × sequence."""
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "triton",
    "liger-kernel",
    "unsloth",
    "unsloth-zoo",
    "torchao",
)


def main() -> None:
    options = _options()
    if options.worker:
        _serve(*options.worker)
        return
    cells = [(options.batch, options.sequence)]
    if options.lengths:
        cells = [(max(1, TOKENS // n), n) for n in options.lengths]
    names = parse(options.stacks)
    for name in names:
        stacks.check(name)
    if "hand" not in names:
        names.insert(0, "hand")
    with tempfile.TemporaryDirectory(prefix="train_step-") as place:
        _run(options, names, cells, Path(place))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", default=["hand,qft-plain"], help=f"of {', '.join(stacks.NAMES)}")
    parser.add_argument("--shape", choices=list(stacks.shapes.SHAPES), default=None)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument(
        "--lengths", type=lambda s: [int(n) for n in s.split(",")], help=f"sequences, of {TOKENS} tokens"
    )
    parser.add_argument("--lengths-of", help="stacks for all of the lengths; the others run the first; default all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--recompute", choices=list(stacks.MEMORY), default="all", help="of stacks without an @")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--tokenizer", help="folder with tokenizer files for stacks that load a folder")
    parser.add_argument("--keep-folder", help="where to write the model that Unsloth loads, to be used again")
    parser.add_argument("--profile", action="store_true", help="where two more steps spend their time")
    parser.add_argument("--cap", help="memory of the GPU that a stack may have, such as 80GB")
    parser.add_argument("--timeout", type=int, default=400, help="seconds a stack may take")
    parser.add_argument("--out")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device is None and not options.worker:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape is None:
        options.shape = "8b" if options.device == "cuda" else "tiny"
    if options.shape == "tiny" and options.device == "cpu":
        options.batch, options.sequence = min(options.batch, 2), min(options.sequence, 64)
    return options


def parse(texts: Sequence[str]) -> list[str]:
    """Stacks, between commas or spaces; a comma may also stand between the options of a quantizer."""
    names: list[str] = []
    for text in texts:
        for i, piece in enumerate(text.split(",")):
            if i and "=" in piece and ":" not in piece.partition("=")[0]:
                names[-1] += f",{piece}"
            else:
                names.append(piece)
    return list(dict.fromkeys(names))


# ---- the calling process -----------------------------------------------------------------------------------


def _run(options: argparse.Namespace, names: list[str], cells: list[tuple[int, int]], place: Path) -> None:
    about = _call({"do": "about", "device": options.device}, place, options.timeout)
    if "error" in about:
        sys.exit(about["error"])
    result: dict[str, Any] = {
        **about,
        "shape": options.shape,
        "layers": options.layers,
        "rank": options.rank,
        "steps": options.steps,
        "warmup": options.warmup,
        "double_quant": options.double_quant,
        "cap": options.cap,
        "runs": [],
    }
    print(json.dumps(about), flush=True)
    folder = Path(options.keep_folder) if options.keep_folder else place / "model"
    every = parse([options.lengths_of]) if options.lengths_of else names
    jobs = [_job(options, stack, cells if stack in every else cells[:1], folder) for stack in names]
    following = _start(jobs[0], place, 0)
    for i, job in enumerate(jobs):
        ahead, following = following, None
        task = stacks.Task(**job["task"])
        found: dict[str, Any] = {}
        if task.name in stacks.UNSLOTH and not (folder / "config.json").exists():
            found = _call({**job, "do": "folder"}, place, options.timeout)
        if i + 1 < len(jobs):
            following = _start(jobs[i + 1], place, i + 1)  # imports what it needs while this one measures
        if "error" in found:
            ahead.kill()
        else:
            found = _finish(ahead, place, i, options.timeout)
        rows = found.get("cells", [])
        for k, (batch, sequence) in enumerate(job["cells"]):
            row = {"stack": job["stack"], "recompute": task.recompute, "batch": batch, "sequence": sequence}
            result["runs"].append(row | (rows[k] if k < len(rows) else found))
            _relate(result)
            _show(result["runs"][-1])
        if options.out:
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _job(options: argparse.Namespace, stack: str, cells: list[tuple[int, int]], folder: Path) -> dict[str, Any]:
    name, _, amount = stack.partition("@")
    task = stacks.Task(
        stack,
        options.shape,
        options.layers,
        options.device,
        options.rank,
        amount or ("all" if name == "hand" else options.recompute),
        max(sequence for _, sequence in cells),
        options.seed,
        options.double_quant,
        str(folder),
        options.tokenizer,
    )
    job = {"do": "step", "stack": stack, "task": asdict(task), "cells": cells, "device": options.device}
    return job | {k: getattr(options, k) for k in ("steps", "warmup", "profile", "cap")}


def _start(job: dict[str, Any], place: Path, index: int) -> subprocess.Popen[str]:
    """A process for a job, which begins when it is told to."""
    command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(job), str(place / f"{index}.json")]
    name = stacks.Task(**job["task"]).name if "task" in job else ""
    log = (place / f"{index}.log").open("w")
    # its own folder, since some stacks write compiled code into the current one
    return subprocess.Popen(
        command, env=stacks.environment(name), cwd=place, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
    )


def _finish(process: subprocess.Popen[str], place: Path, index: int, timeout: int) -> dict[str, Any]:
    """Tell it to begin; what it found, or its error, beside what it had found by then."""
    answer, log = place / f"{index}.json", place / f"{index}.log"
    problem = None
    try:
        process.communicate("go\n", timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        problem = f"took over {timeout} s"
    found = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
    if process.returncode == 0 and found:
        return found
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit status {process.returncode}"
    return found | {"error": problem or last[:500], "log": "\n".join(lines[-40:])[-6000:]}


def _call(job: dict[str, Any], place: Path, timeout: int) -> dict[str, Any]:
    """What a process of its own found, or its error."""
    index = sum(1 for _ in place.glob("*.log")) + 1000
    return _finish(_start(job, place, index), place, index, timeout)


def _relate(result: dict[str, Any]) -> None:
    """Ratios to the by-hand stack of the same sequence length, for every row so far."""
    hand = {r["sequence"]: r for r in result["runs"] if r["stack"] == "hand" and "error" not in r}
    for row in result["runs"]:
        base = hand.get(row["sequence"])
        if "error" in row or base is None:
            continue
        row["ratio"] = row["tokens_per_second"] / base["tokens_per_second"]
        if "peak_gib" in row:
            row["memory_ratio"] = row["peak_gib"] / base["peak_gib"]
        best = max(result["matrix_rate"].values())
        for share, flops in (("share", "flops_per_token"), ("useful_share", "useful_flops_per_token")):
            row[share] = None if row[flops] is None else row["tokens_per_second"] * row[flops] / best


def _show(row: dict[str, Any]) -> None:
    where = f"{row['stack']:<28} {row['recompute']:<5} {row['batch']:>3} × {row['sequence']:<6}"
    if "error" in row:
        print(f"{where} failed: {row['error']}", flush=True)
        return
    ratio = f"{row['ratio']:5.2f} ×" if "ratio" in row else "       "
    peak = f"{row['peak_gib']:6.2f} GiB ({row['peak_reserved_gib']:.2f})" if "peak_gib" in row else ""
    share = f"{row['share']:4.0%}" if row.get("share") is not None else "    "
    print(
        f"{where} {row['tokens_per_second']:9,.0f} tokens/s {ratio} {share} {peak}  setup {row['seconds']['setup']:.1f} s, "
        f"compile {row['compile_s']:.1f} s, loss {row['first_loss']:.4f} → {row['last_loss']:.4f}",
        flush=True,
    )
    if "profile" in row:
        print(stepping.profile_text(row["profile"]), flush=True)


# ---- the process of one stack ------------------------------------------------------------------------------


def _serve(text: str, answer: str) -> None:
    job = json.loads(text)
    if job["do"] == "step":
        stacks.preload(stacks.Task(**job["task"]))
    sys.stdin.readline()

    def put(found: dict[str, Any]) -> None:
        Path(answer).write_text(json.dumps(found), encoding="utf-8")

    if job["do"] == "about":
        put(_about(job["device"]))
    elif job["do"] == "folder":
        task = stacks.Task(**job["task"])
        stacks.write_folder(task, Path(task.folder))
        put({"done": True})
    else:
        _work(job, put)


def _work(job: dict[str, Any], put: Callable[[dict[str, Any]], None]) -> None:
    import torch

    task = stacks.Task(**job["task"])
    stepping.cap_memory(job["cap"])
    ready = stacks.build(task)
    shape, rows = task.config, []
    for batch, sequence in job["cells"]:
        if rows:
            torch._dynamo.reset()  # each length compiled for itself, as where it is the only one
        ids = stepping.token_ids(shape.vocab_size, job["warmup"] + job["steps"], batch, sequence, task.seed)
        found = stepping.measure(ready, ids, job["warmup"], job["device"], job["profile"] and not rows)

        def flops(recomputed: float, sequence: int = sequence) -> float:
            return stacks.shapes.flops_per_token(shape, sequence, task.rank, recomputed)

        rows.append(
            found
            | {
                "seconds": ready.seconds,
                "trainable": sum(p.numel() for p in ready.model.parameters() if p.requires_grad),
                "flops_per_token": None if ready.recomputed is None else flops(ready.recomputed),
                "useful_flops_per_token": flops(0.0),
                "notes": ready.notes,
            }
        )
        put({"cells": rows})


def _about(device: str) -> dict[str, Any]:
    import importlib.metadata
    import platform
    from datetime import UTC, datetime

    import torch

    import qft

    versions = {"python": platform.python_version(), "qft": qft.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "matrix_rate": stepping.matrix_rate(device),
    }


if __name__ == "__main__":
    main()

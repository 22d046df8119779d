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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import stacks
import stepping

TOKENS = 8192
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
        Path(options.worker[1]).write_text(json.dumps(_work(json.loads(options.worker[0]))), encoding="utf-8")
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
    about = _call({"do": "about", "device": options.device}, place, "", options.timeout)
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
        "runs": [],
    }
    print(json.dumps(about), flush=True)
    folder = Path(options.keep_folder) if options.keep_folder else place / "model"
    for batch, sequence in cells:
        for stack in names:
            name, _, amount = stack.partition("@")
            task = stacks.Task(
                stack,
                options.shape,
                options.layers,
                options.device,
                options.rank,
                amount or ("all" if name == "hand" else options.recompute),
                sequence,
                options.seed,
                options.double_quant,
                str(folder),
                options.tokenizer,
            )
            job = {"task": asdict(task), "batch": batch, "device": options.device}
            job |= {k: getattr(options, k) for k in ("steps", "warmup", "profile")}
            row = {"stack": stack, "recompute": task.recompute, "batch": batch, "sequence": sequence}
            found: dict[str, Any] = {}
            if task.name in stacks.UNSLOTH and not (folder / "config.json").exists():
                found = _call({"do": "folder", **job}, place, "", options.timeout)
            if "error" not in found:
                found = _call({"do": "step", **job}, place, task.name, options.timeout)
            result["runs"].append(row | found)
            _relate(result)
            _show(result["runs"][-1])
            if options.out:
                Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _call(job: dict[str, Any], place: Path, name: str, timeout: int) -> dict[str, Any]:
    """What a process of its own found, or its error."""
    answer = place / "answer.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(job), str(answer)]
    try:
        # its own folder, since some stacks write compiled code into the current one
        ran = subprocess.run(
            command, env=stacks.environment(name), cwd=place, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took over {timeout} s"}
    if ran.returncode == 0 and answer.exists():
        return json.loads(answer.read_text(encoding="utf-8"))
    lines = [line for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit status {ran.returncode}"
    return {"error": last[:500], "log": "\n".join(lines[-40:])[-6000:]}


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


def _work(job: dict[str, Any]) -> dict[str, Any]:
    if job["do"] == "about":
        return _about(job["device"])
    task = stacks.Task(**job["task"])
    if job["do"] == "folder":
        stacks.write_folder(task, Path(task.folder))
        return {}
    ready = stacks.build(task)
    shape = task.config
    ids = stepping.token_ids(shape.vocab_size, job["warmup"] + job["steps"], job["batch"], task.sequence, task.seed)
    found = stepping.measure(ready, ids, job["warmup"], job["device"], job["profile"])

    def flops(recomputed: float) -> float:
        return stacks.shapes.flops_per_token(shape, task.sequence, task.rank, recomputed)

    return found | {
        "seconds": ready.seconds,
        "trainable": sum(p.numel() for p in ready.model.parameters() if p.requires_grad),
        "flops_per_token": None if ready.recomputed is None else flops(ready.recomputed),
        "useful_flops_per_token": flops(0.0),
        "notes": ready.notes,
    }


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

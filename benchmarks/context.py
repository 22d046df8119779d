"""Context length against memory: one sequence a step, doubled until it does not fit, by hand and by qft.

Each stack has a process of its own and trains one sequence a step, of lengths that double. The first two lengths have a
step to warm up: with the second one, blocks are compiled for any length. With offloaded activations all lengths have one,
which takes its buffers from the host's memory. Beside each peak stands what the plan of the model in memory says; a length
whose plan is more than a tenth over the device is not tried, nor one whose step would take over `--longest` seconds: for
those that the device would hold there is the plan alone.

`--together` runs all stacks at once, on a card that has room for them, in less time: peaks are those of each process,
as `max_memory_allocated` counts them, and times, which would be of nothing, are left out.

    python benchmarks/context.py --out benchmarks/results/context-h100.json
    python benchmarks/context.py --stacks hand,qft,qft-offload --cap 80GB --together --longest 60 --out context-h200.json
    python benchmarks/context.py --shape tiny --device cpu --last 256          # tries the script out
    python benchmarks/context.py --plot benchmarks/results/context-h100.json   # the picture, beside the file
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

GIB = 1024**3
TIMES = ("step_s", "tokens_per_second", "warmup_s")
STACKS: dict[str, dict[str, Any]] = {
    "hand": {},
    "qft": {"memory": "least"},
    "qft-auto": {"memory": "auto"},
    "qft-offload": {"memory": "least", "offload": "activations"},
}
"""Name → what `qft.optimize_training` is told."""
LABELS = {
    "hand": "by hand",
    "qft": "qft, all recomputed",
    "qft-auto": 'qft, memory="auto"',
    "qft-offload": 'qft, offload="activations"',
}
COLOURS = {"hand": "#b0b7bf", "qft": "#2a6f97", "qft-auto": "#e07a5f", "qft-offload": "#81b29a"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--first", type=int)
    parser.add_argument("--last", type=int, default=2**20)
    parser.add_argument("--longest", type=float, default=20, help="seconds of a step")
    parser.add_argument("--cap", help="memory of the GPU that a stack may have, such as 80GB")
    parser.add_argument("--timeout", type=float, default=200, help="seconds of a stack")
    parser.add_argument("--together", action="store_true", help="all stacks at once, for their memory alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path, help="an earlier file of the same device, whose other stacks are kept")
    parser.add_argument("--plot", type=Path, help="draw this file, measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.first = options.first or (2048 if options.shape != "tiny" else 64)
    if options.plot:
        print(plot(json.loads(options.plot.read_text(encoding="utf-8")), options.plot.with_suffix(".svg")))
    elif options.one:
        serve(options.one, options)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    import smollm

    names = options.stacks.split(",")
    result: dict[str, Any] = {
        **smollm.about(), "shape": options.shape, "cap": options.cap, "rank": 16, "batch": 1, "together": options.together,
        "runs": [], "notes": {}, "largest_by_plan": {}, "plans": {},
    }  # fmt: skip
    if options.resume:
        same = ("device", "shape", "cap", "rank", "batch", "together")
        earlier = smollm.resumed(options.resume, {k: result[k] for k in same})
        result["runs"] = [r for r in earlier["runs"] if r["stack"] not in names]
        for key in ("notes", "largest_by_plan", "plans"):
            result[key] = {k: v for k, v in earlier[key].items() if k not in names}

    def keep(name: str, lines: list[str], note: str) -> None:
        for line in lines:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            note = row.get("note", note)
            if "largest_by_plan" in row:
                result["largest_by_plan"][name] = row["largest_by_plan"]
                result["plans"][name] = row["plans"]
            elif "sequence" in row:
                result["runs"].append(
                    {"stack": name, **{k: v for k, v in row.items() if not (options.together and k in TIMES)}}
                )
                print(result["runs"][-1], flush=True)
        if note:
            result["notes"][name] = note
            print(name, note, flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if options.together:
        running = [start(name, options) for name in names]
        with ThreadPoolExecutor(len(names)) as pool:
            futures = {
                pool.submit(ended, process, options.timeout): n for n, process in zip(names, running, strict=True)
            }
            for future in as_completed(futures):
                keep(futures[future], *future.result())
    else:
        following = start(names[0], options)
        for i, name in enumerate(names):
            process = following
            if i + 1 < len(names):
                following = start(names[i + 1], options)  # it imports while this one measures
            keep(name, *ended(process, options.timeout))
    if options.out:
        plot(result, options.out.with_suffix(".svg"))


def ended(process: subprocess.Popen[str], timeout: float) -> tuple[list[str], str]:
    """Let a stack begin; what it printed, and why it did not come to an end."""
    note = ""
    try:
        out, err = process.communicate("go\n", timeout=timeout)
        if process.returncode:
            note = (err.strip().splitlines() or ["no output"])[-1][:400]
    except subprocess.TimeoutExpired:
        process.kill()
        out = process.communicate()[0]
        note = f"stopped after {timeout:g} s"
    return out.splitlines(), note


def start(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, os.path.abspath(__file__), "--one", name]
    for key in ("shape", "device", "first", "last", "longest"):
        command += [f"--{key}", str(getattr(options, key))]
    command += ["--cap", options.cap] if options.cap else []
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


# ---- the process of one stack ------------------------------------------------------------------------------


def serve(name: str, options: argparse.Namespace) -> None:
    import stacks
    import stepping
    import torch

    import qft
    from qft.optimize import optimize

    cuda = options.device == "cuda"
    task = stacks.Task("hand" if name == "hand" else "qft", options.shape, device=options.device)
    stacks.preload(task)
    sys.stdin.readline()
    stepping.cap_memory(options.cap)
    optimize.switches.compile = cuda
    ready = stacks.build(task)
    if name != "hand":
        try:
            qft.optimize_training(ready.model, **STACKS[name])
        except qft.QftError as error:
            print(json.dumps({"note": f"refused: {error}"}), flush=True)
            return
    total = int(torch.cuda.mem_get_info()[1] * torch.cuda.get_per_process_memory_fraction()) if cuda else 2**40
    lengths = [options.first]
    while lengths[-1] * 2 <= options.last:
        lengths.append(lengths[-1] * 2)
    steps, seconds = Steps(ready, options.device), 0.0
    say_largest(ready.model, name, total, options)
    for i, length in enumerate(lengths):
        if seconds * 3 > options.longest:
            print(json.dumps({"note": f"{length} tokens would take over {options.longest:g} s a step"}), flush=True)
            return
        row: dict[str, Any] = {"sequence": length, "plan_gib": planned(ready.model, name, length) / GIB}
        if row["plan_gib"] * GIB > 1.1 * total:
            row["error"] = "not tried: the plan is more than a tenth over the device"
        else:
            try:
                row |= steps.measure(length, warmup=i < 2 or offloads(name))
                seconds = row["step_s"]
            except (torch.OutOfMemoryError, qft.QftError) as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps(row), flush=True)
        if "error" in row:
            return


class Steps:
    def __init__(self, ready: Any, device: str):
        import stepping

        self.steps, self.device = stepping.Steps(ready, device), device

    def measure(self, length: int, warmup: bool) -> dict[str, Any]:
        import stepping
        import torch

        cuda = self.device == "cuda"
        gc.collect()
        ids = stepping.token_ids(self.steps.model.config.vocab_size, 2, 1, length)
        begin = time.perf_counter()
        if cuda:
            torch.cuda.empty_cache()
        if warmup:
            self.steps(ids[0])
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        early = time.perf_counter() - begin
        (took,), (loss,) = self.steps.timed(ids[1:])
        found = {"step_s": took, "tokens_per_second": length / took, "warmup_s": early, "loss": float(loss)}
        blocks = [f for m in self.steps.model.modules() if hasattr(f := m.__dict__.get("forward"), "plan")]
        keeps = next((f.plan.keeps for f in blocks if f.plan.keeps is not None), None)
        if keeps is not None:
            found["kept"] = len(keeps)
        if cuda:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        return found


def offloads(name: str) -> bool:
    return "offload" in STACKS[name]


def planned(model: Any, name: str, length: int) -> int:
    """What the plan of the model in memory says of a step with all blocks recomputed, as max_memory_allocated counts."""
    import torch

    from qft.optimize import blocks, recompute

    fast = name != "hand"
    asks = planned.__dict__.setdefault("asks", None)
    if asks is None:
        away = object() if offloads(name) else None
        plan = blocks.BlockPlan(compiles=fast, loss=object() if fast else None, checkpoints=away)  # type: ignore[arg-type]
        asks = planned.__dict__["asks"] = recompute.Chooser("auto", model.get_base_model(), plan)
    used = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return used + asks._adds(recompute.Size(1, length, False, not fast), 0)


def say_largest(model: Any, name: str, total: int, options: argparse.Namespace) -> None:
    """The largest length whose plan fits, by bisection, and the plans of those that will be tried and fit."""
    from qft.memory.report import needed

    low, high, plans = 0, options.first, []
    while high <= options.last and needed(plan := planned(model, name, high)) <= total:
        plans.append({"sequence": high, "plan_gib": plan / GIB})
        low, high = high, high * 2
    while high - low > max(1024, low // 16) and high <= options.last:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(planned(model, name, middle)) <= total else (low, middle)
    print(json.dumps({"largest_by_plan": low, "plans": plans}), flush=True)


# ---- the picture -------------------------------------------------------------------------------------------


def plot(found: dict[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "qft"  # the same figures give the same file
    from matplotlib import pyplot

    from qft.memory.report import memory_of

    rows = [r for r in found["runs"] if "peak_gib" in r]
    if not rows:  # tried out on a CPU
        return path
    figure, axis = pyplot.subplots(figsize=(6.5, 4))
    for name in STACKS:
        points = {r["sequence"]: r["peak_gib"] for r in rows if r["stack"] == name}
        if not points:
            continue
        last = max(points)
        axis.plot(list(points), list(points.values()), marker="o", color=COLOURS[name], label=LABELS[name])
        later = {r["sequence"]: r["plan_gib"] for r in found["plans"].get(name, ()) if r["sequence"] > last}
        if later:
            x, y = [last, *later], [points[last], *later.values()]
            label = f"{LABELS[name]}, plan"
            axis.plot(x, y, "--", marker="o", fillstyle="none", color=COLOURS[name], label=label)
    if found["cap"]:
        limit = memory_of(found["cap"]) / GIB
        axis.axhline(limit, color="#b0b7bf", linewidth=0.8)
        axis.annotate(f"what each may have: {found['cap']}", (0.02, limit - 3), fontsize=8,
                      xycoords=("axes fraction", "data"))  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens in a sequence")
    axis.set_ylabel("peak memory, GiB")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.92))
    axis.set_title(f"{found['shape'].upper()} shape, one sequence a step: {found['device']}, {found['date'][:10]}",
                   fontsize=10)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()

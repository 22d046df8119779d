"""`qft auto` on SmolLM2 and the instruction file of examples/make_instructions.py: one command, on two cores of a CPU.

    OMP_NUM_THREADS=2 python benchmarks/auto_smollm.py --out benchmarks/results/auto-cpu.json

Writes seconds by stage, wall-clock seconds of the whole command, perplexities, drift, decisions, device and versions.
The report is kept where `--report` says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "auto-cpu.json")
    parser.add_argument("--report", type=Path, help="keep the page here")
    parser.add_argument("--memory", default="8GB")
    parser.add_argument("--time-limit", default="8min")
    parser.add_argument("--quantizer", help="instead of the one that is chosen")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        data, folder = Path(place, "instructions.jsonl"), Path(place, "tuned")
        subprocess.run([sys.executable, HERE.parent / "examples" / "make_instructions.py", data], check=True)
        words = [
            "auto",
            "smollm2",
            data,
            "--memory",
            options.memory,
            "--out",
            folder,
            "--time-limit",
            options.time_limit,
        ]
        words += ["--quantizer", options.quantizer] if options.quantizer else []
        command = [sys.executable, "-m", "qft_cli", *map(str, words), "--device", "cpu", "--json"]
        load, start = os.getloadavg()[0], time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall = time.perf_counter() - start
        if options.report is not None:
            shutil.copy(folder / "report.html", options.report)
    result = json.loads(done.stdout)
    kept = ("perplexity", "drift", "nbytes", "seconds", "steps", "loss", "decisions", "notes")
    setup = result["setup"]
    found = {
        "command": "qft auto smollm2 instructions.jsonl " + " ".join(map(str, words[3:5] + words[7:])),
        "wall_seconds": wall,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "load_at_start": load,
        "history": [{k: e[k] for k in ("step", "loss", "eval_loss") if k in e} for e in result["history"]],
        **{k: result[k] for k in kept},
        "device": setup.pop("device"),
        "date": setup.pop("date"),
        "dtypes": setup.pop("dtypes"),
        "versions": setup,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{wall:.0f} s in all; perplexity", {k: round(v, 3) for k, v in found["perplexity"].items()})


if __name__ == "__main__":
    main()

"""A training run killed with SIGKILL at random moments, started again each time, against one that was left alone.

python benchmarks/kill_resume.py                # ten kills, into results/kill_resume-cpu.json
python benchmarks/kill_resume.py --kills 3 --steps 40
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
CHILD = "import json, sys, qft; qft.train(json.loads(sys.argv[1]))"
RESULT = Path(__file__).parent / "results" / "kill_resume-cpu.json"


def start(config):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(config)], env=env, stderr=subprocess.DEVNULL)


def checkpoints(folder):
    return sorted(int(p.name.split("-")[1]) for p in Path(folder).glob("checkpoint-*"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()

    import torch
    from tiny_training import adapter_of, chats, quick, same, save_model, write_jsonl

    import qft

    chosen = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config = {
            **quick(max_steps=options.steps, save_steps=3, lora_dropout=0.1, scheduler="cosine", lr=3e-3),
            "model": save_model(folder / "model"),
            "data_path": write_jsonl(folder / "data.jsonl", chats(24)),
            "eval_share": 0.25,
        }
        alone = qft.train(config, project_name=str(folder / "alone"))
        out, killed = folder / "killed", []
        config["project_name"] = str(out)
        each = options.steps / (options.kills + 1)
        while len(killed) < options.kills:
            # until it is about so far, and then a random while: loading, training, evaluating, in a checkpoint's write
            child, before = start(config), (checkpoints(out) or [0])[-1]
            reach = min(len(killed) * each, before + each) if chosen.random() < 0.8 else 0
            while child.poll() is None and (checkpoints(out) or [0])[-1] < reach:
                time.sleep(0.01)
            time.sleep(chosen.uniform(0, 1.5))
            if child.poll() is not None:
                break
            child.send_signal(signal.SIGKILL)
            child.wait()
            left = [p.name.rsplit("-", 1)[0] for p in out.glob(".partial-*")]
            step = (checkpoints(out) or [0])[-1]
            killed.append({"last_checkpoint": step, "in_a_checkpoints_write": bool(left)})
            print(
                f"kill {len(killed)}: last whole checkpoint {step}",
                "a checkpoint was half-written" * bool(left),
                flush=True,
            )
        child = start(config)
        code = child.wait()
        result = json.loads((out / "training.json").read_text())["result"]
        losses = [[e["loss"] for e in history if "loss" in e] for history in (alone.history, result["history"])]
        figures = {
            "steps": options.steps,
            "exit_code": code,
            "kills": killed,
            "loss": {"left alone": alone.loss, "killed": result["loss"]},
            "eval_loss": {"left alone": alone.evaluation["eval_loss"], "killed": result["evaluation"]["eval_loss"]},
            "every_loss_equal": losses[0] == losses[1],
            "adapters_equal_to_the_bit": same(adapter_of(folder / "alone" / "adapter"), adapter_of(out / "adapter")),
            "device": f"cpu ({platform.machine()})",
            "versions": {"qft": qft.__version__, "torch": torch.__version__},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({k: v for k, v in figures.items() if k != "kills"}, indent=1))


if __name__ == "__main__":
    main()

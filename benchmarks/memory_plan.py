"""Plans against `torch.cuda.max_memory_allocated`: each combination in a process of its own.

    python benchmarks/memory_plan.py --out benchmarks/results/memory_plan-h100.json
    python benchmarks/memory_plan.py --shape tiny --device cpu     # tries the script out: no peaks, two steps each

Weights are random, as `shapes.py` and `experts.py` draw them; token ids, too. A combination that runs out of memory is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import shapes
import torch
from peft import LoraConfig

import qft

GIB = 1024**3
LARGE: dict[str, dict[str, Any]] = {
    "llama-8b": {"hidden": 4096, "wide": 14336, "layers": 32, "heads": 32, "kv": 8, "vocabulary": 128256},
    "llama-1b": {"hidden": 2048, "wide": 8192, "layers": 16, "heads": 32, "kv": 8, "vocabulary": 128256, "tied": True},
    "qwen2-7b": {"hidden": 3584, "wide": 18944, "layers": 28, "heads": 28, "kv": 4, "vocabulary": 152064},
    "qwen2-0.5b": {"hidden": 896, "wide": 4864, "layers": 24, "heads": 14, "kv": 2, "vocabulary": 151936, "tied": True},
    "mistral-7b": {"hidden": 4096, "wide": 14336, "layers": 32, "heads": 32, "kv": 8, "vocabulary": 32768},
    "qwen3_moe-3b": {"hidden": 1024, "wide": 3072, "layers": 16, "heads": 16, "kv": 4, "vocabulary": 151936},
}
TINY = {"hidden": 128, "wide": 256, "layers": 2, "heads": 4, "kv": 2, "vocabulary": 512}
MEMORY: dict[str, Any] = {"all": "least", "half": 0.5, "none": "most"}
COMBINATIONS = [
    # model, quantizer, batch, sequence, recomputed, optimizer, fast
    ("llama-8b", "nf4", 4, 2048, "all", "paged_adamw8bit", True),
    ("llama-8b", "nf4", 4, 2048, "half", "paged_adamw8bit", True),
    ("llama-8b", "nf4", 4, 2048, "none", "adamw", True),
    ("llama-8b", "nf4", 1, 512, "all", "adamw", True),
    ("llama-8b", "hqq", 2, 2048, "all", "adamw8bit", True),
    ("llama-8b", "nf4:double_quant=true", 2, 2048, "all", "adamw", False),
    ("llama-8b", "nf4", 1, 2048, "none", "adamw8bit", False),
    ("llama-1b", "nf4", 4, 2048, "all", "adamw", True),
    ("llama-1b", "hqq", 4, 2048, "half", "adamw", True),
    ("llama-1b", "nf4", 16, 512, "none", "adamw8bit", True),
    ("llama-1b", "nf4", 2, 2048, "none", "sgd", False),
    ("llama-1b", "int8", 2, 1024, "all", "adamw", False),
    ("qwen2-7b", "nf4", 4, 2048, "all", "paged_adamw8bit", True),
    ("qwen2-7b", "hqq", 2, 2048, "half", "adamw", True),
    ("qwen2-7b", "nf4", 1, 4096, "none", "adamw8bit", True),
    ("qwen2-0.5b", "nf4", 4, 1024, "all", "adamw", True),
    ("qwen2-0.5b", "hqq", 8, 1024, "none", "adamw8bit", True),
    ("qwen2-0.5b", "nf4", 4, 1024, "all", "adamw", False),
    ("mistral-7b", "nf4", 4, 2048, "all", "adamw", True),
    ("mistral-7b", "hqq", 1, 8192, "half", "adamw8bit", True),
    ("mistral-7b", "nf4", 2, 2048, "none", "adamw", True),
    ("mistral-7b", "int8", 2, 2048, "all", "adamw", True),
    ("qwen3_moe-3b", "nf4", 2, 2048, "all", "adamw8bit", False),
    ("qwen3_moe-3b", "nf4", 2, 2048, "all", "adamw8bit", True),
    ("qwen3_moe-3b", "hqq", 1, 2048, "none", "adamw", False),
]


def config(name: str, tiny: bool) -> Any:
    import transformers

    family = name.partition("-")[0]
    sizes = {**LARGE[name], **TINY} if tiny else LARGE[name]
    cls = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "mistral": transformers.MistralConfig,
        "qwen3_moe": transformers.Qwen3MoeConfig,
    }[family]
    more: dict[str, Any] = {}
    if family == "qwen3_moe":
        more = {"num_experts": 8 if tiny else 32, "num_experts_per_tok": 2 if tiny else 4, "norm_topk_prob": True}
        more |= {"moe_intermediate_size": 64 if tiny else 512, "head_dim": sizes["hidden"] // sizes["heads"]}
    if family == "mistral":
        more = {"sliding_window": None}
    return cls(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["wide"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        vocab_size=sizes["vocabulary"],
        tie_word_embeddings=sizes.get("tied", False),
        max_position_embeddings=32768,
        dtype="bfloat16",
        **more,
    )


def adapter(name: str) -> LoraConfig:
    experts = ["experts.gate_up_proj", "experts.down_proj"] if name.startswith("qwen3_moe") else None
    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", target_parameters=experts)


def optimizer_of(name: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(weights, lr=1e-4)
    if name == "sgd":
        return torch.optim.SGD(weights, lr=1e-4)
    from bitsandbytes import optim

    return {"adamw8bit": optim.AdamW8bit, "paged_adamw8bit": optim.PagedAdamW8bit}[name](weights, lr=1e-4)


def one(index: int, tiny: bool, device: str, steps: int) -> dict[str, Any]:
    """The plan of a combination, and what training it for some steps takes."""
    name, spec, batch, sequence, recompute, optimizer, fast = COMBINATIONS[index]
    if tiny:
        batch, sequence = 1, 32
    if device == "cpu" and "8bit" in optimizer:
        optimizer = "adamw"
    found: dict[str, Any] = {
        "model": name, "quantizer": spec, "batch": batch, "sequence": sequence, "recompute": recompute,
        "optimizer": optimizer, "fast": fast,
    }  # fmt: skip
    settings, cuda = config(name, tiny), device == "cuda"
    memory = MEMORY[recompute]
    start = time.perf_counter()
    plan = qft.plan(
        settings, spec, batch_size=batch, sequence_length=sequence, adapter=adapter(name), optimizer=optimizer,
        memory=memory, fast=fast, device=device,
    )  # fmt: skip
    found |= {"plan_gib": plan.training_peak / GIB, "moment": plan.moment, "plan_s": time.perf_counter() - start}
    found["totals_gib"] = {k: v / GIB for k, v in plan.totals.items()}
    model = shapes.random_model(settings, device)
    model = qft.quantize_and_wrap(
        model, spec, adapter=adapter(name), use_gradient_checkpointing=recompute != "none", progress=False
    )
    if fast:
        qft.optimize_training(model, memory=memory)
    elif recompute == "half":
        raise SystemExit("the plain path recomputes all or nothing")
    weights = [p for p in model.train().parameters() if p.requires_grad]
    step = optimizer_of(optimizer, weights)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        found["model_gib"] = torch.cuda.memory_allocated() / GIB
    generator = torch.Generator().manual_seed(0)
    for at in range(1 + steps):
        if cuda and at == 1:  # what the first step compiles and tunes is no part of it
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(settings.vocab_size, (batch, sequence), generator=generator).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        step.step()
        step.zero_grad(set_to_none=True)
        found["loss"] = float(loss.detach())
        del loss
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["error"] = found["plan_gib"] / found["peak_gib"] - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["large", "tiny"], default="large")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of combinations, from 0")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one(options.one, options.shape == "tiny", options.device, options.steps)))
        return
    runs = []
    for index in options.only if options.only is not None else range(len(COMBINATIONS)):
        command = [sys.executable, __file__, "--one", str(index), "--shape", options.shape, "--device", options.device]
        command += ["--steps", str(options.steps)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, env={**os.environ})
            failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
            run = {"combination": COMBINATIONS[index], "failed": failed[0] if failed else "no output"}
            if not done.returncode:
                run = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            run = {"combination": COMBINATIONS[index], "failed": f"over {options.timeout:g} s"}
        runs.append(run)
        print(json.dumps(run), flush=True)
        if options.out is not None:  # after each, so that a run that is cut off leaves what it has
            write(options, runs)
    failed = [r for r in runs if "failed" in r]
    measured = [r for r in runs if "error" in r]
    missed = [r for r in measured if abs(r["error"]) > 0.05]
    print(f"{len(runs)} combinations, {len(measured)} measured, {len(measured) - len(missed)} of them within 5 %")
    for title, rows in (("missed", missed), ("failed", failed)):
        for row in rows:
            print(title, json.dumps(row))


def write(options: Any, runs: list[dict[str, Any]]) -> None:
    import smollm

    found = {"shape": options.shape, **smollm.about()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**found, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

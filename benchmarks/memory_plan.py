"""Plans against `torch.cuda.max_memory_allocated`: a process for each model and quantizer, several at a time.

    python benchmarks/memory_plan.py --out benchmarks/results/memory_plan-h100.json
    python benchmarks/memory_plan.py --shape tiny --device cpu     # tries the script out: no peaks, two steps each

Weights are random, as `shapes.py` and `experts.py` draw them; token ids, too. A combination that runs out of memory is noted.

A process makes its model once and trains it in one combination after the other, with the adapter's weights and an optimizer
made anew; `max_memory_allocated` counts one process. Those whose plans fit on the card together run together.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import shapes
import stacks
import torch
from peft import LoraConfig

import qft
from qft.optimize import optimize

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


def serve(numbers: list[int], tiny: bool, device: str, steps: int) -> None:
    """The process of some combinations of one model and quantizer: what they need, and once told to go, a line for each."""
    rows = [planned(i, tiny, device) for i in numbers]
    settings = config(COMBINATIONS[numbers[0]][0], tiny)
    elements = (
        2 * settings.hidden_size * settings.vocab_size + 13 * settings.num_hidden_layers * settings.hidden_size**2
    )
    print(
        json.dumps({"needs": max([int(2.6 * elements), *(int(r["plan_gib"] * 1.15 * GIB) + 2**30 for r in rows)])}),
        flush=True,
    )
    sys.stdin.readline()
    optimize.switches.compile = device == "cuda"
    model = made(numbers[0], tiny, device)
    for i, row in zip(numbers, rows, strict=True):
        try:
            row |= trained(model, i, tiny, device, steps)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        for p in model.parameters():
            p.grad = None
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)


def replan(path: Path) -> None:
    """Put the plans of today's code beside the peaks of a file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    for i, row in enumerate(document["runs"]):
        if "peak_gib" in row:
            plan = planned(row["combination"], False, "cuda")
            document["runs"][i] = row | plan | {"error": plan["plan_gib"] / row["peak_gib"] - 1}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def sizes(index: int, tiny: bool, device: str) -> tuple[int, int, str]:
    """Batch, sequence and optimizer."""
    _, _, batch, sequence, _, optimizer, _ = COMBINATIONS[index]
    if device == "cpu" and "8bit" in optimizer:
        optimizer = "adamw"
    return (1, 32, optimizer) if tiny else (batch, sequence, optimizer)


def planned(index: int, tiny: bool, device: str) -> dict[str, Any]:
    name, spec, _, _, recompute, _, fast = COMBINATIONS[index]
    batch, sequence, optimizer = sizes(index, tiny, device)
    start = time.perf_counter()
    plan = qft.plan(
        config(name, tiny), spec, batch_size=batch, sequence_length=sequence, adapter=adapter(name), optimizer=optimizer,
        memory=MEMORY[recompute], fast=fast, device=device,
    )  # fmt: skip
    return {
        "combination": index, "model": name, "quantizer": spec, "batch": batch, "sequence": sequence,
        "recompute": recompute, "optimizer": optimizer, "fast": fast, "plan_gib": plan.training_peak / GIB,
        "moment": plan.moment, "totals_gib": {k: v / GIB for k, v in plan.totals.items()},
        "plan_s": time.perf_counter() - start,
    }  # fmt: skip


def made(index: int, tiny: bool, device: str) -> Any:
    """The model, quantized and with its adapter. Of formats that take their time, one layer of a shape is quantized."""
    name, spec, *_ = COMBINATIONS[index]
    model = shapes.random_model(config(name, tiny), device)
    if spec == "hqq" and not name.startswith("qwen3_moe"):
        stacks.copied(model, qft.get_quantizer(spec))
        return qft.wrap(qft.prepare_model_for_kbit_training(model, False), adapter(name)).train()
    return qft.quantize_and_wrap(
        model, spec, adapter=adapter(name), use_gradient_checkpointing=False, progress=False
    ).train()


def trained(model: Any, index: int, tiny: bool, device: str, steps: int) -> dict[str, Any]:
    """What training it for some steps takes."""
    recompute, fast = COMBINATIONS[index][4], COMBINATIONS[index][6]
    batch, sequence, optimizer = sizes(index, tiny, device)
    cuda, base = device == "cuda", model.get_base_model()
    qft.unoptimize(model)
    if fast:
        qft.optimize_training(model, memory=MEMORY[recompute])
    elif recompute == "all":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    elif recompute == "none":
        base.gradient_checkpointing_disable()
    else:
        raise ValueError("the plain path recomputes all or nothing")
    step = optimizer_of(optimizer, [p for p in model.parameters() if p.requires_grad])
    found: dict[str, Any] = {}
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found["model_gib"] = torch.cuda.memory_allocated() / GIB
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for at in range(1 + steps):
        if cuda and at == 1:  # what the first step compiles and tunes is no part of it
            found["first_gib"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(base.config.vocab_size, (batch, sequence), generator=generator).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        step.step()
        step.zero_grad(set_to_none=True)
        found["loss"] = float(loss.detach())
        del loss
    found["train_s"] = time.perf_counter() - start
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


class Process:
    """Combinations of one model and quantizer, in a process that has planned them and waits to be told to go."""

    def __init__(self, numbers: list[int], options: argparse.Namespace, place: Path):
        command = [sys.executable, __file__, "--serve", *map(str, numbers), "--shape", options.shape]
        command += ["--device", options.device, "--steps", str(options.steps)]
        self.numbers, self.log = numbers, (place / f"{numbers[0]}.log").open("w+")
        self.lines: queue.Queue[str] = queue.Queue()
        env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env
        )
        self.needs: int | None = None
        self.went, self.rows = 0.0, list[dict[str, Any]]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(line)

    def look(self) -> list[dict[str, Any]]:
        """The rows that came since."""
        new = []
        while not self.lines.empty():
            row = json.loads(self.lines.get())
            if "needs" in row:
                self.needs = row["needs"]
            else:
                new.append(row)
        self.rows += new
        return new

    def go(self) -> None:
        self.went = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None and self.lines.empty()

    def missing(self, late: str | None) -> list[dict[str, Any]]:
        """A row for each combination that none came of."""
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or [f"exit status {self.process.returncode}"])[-1][:300]
        done = {r["combination"] for r in self.rows}
        return [
            {"combination": i, "of": COMBINATIONS[i], "failed": late or last} for i in self.numbers if i not in done
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["large", "tiny"], default="large")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of combinations, from 0")
    parser.add_argument("--jobs", type=int, default=5 if torch.cuda.is_available() else 1, help="processes that train")
    parser.add_argument("--serve", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--timeout", type=float, default=400, help="seconds for all of it; what is not done is noted")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--replan", type=Path, help="this file's plans anew, as where liger-kernel is installed; no GPU"
    )
    options = parser.parse_args()
    if options.replan is not None:
        replan(options.replan)
        return
    if options.serve is not None:
        serve(options.serve, options.shape == "tiny", options.device, options.steps)
        return
    with tempfile.TemporaryDirectory(prefix="memory_plan-") as place:
        runs = measure(options, Path(place))
    failed = [r for r in runs if "failed" in r]
    measured = [r for r in runs if "error" in r]
    missed = [r for r in measured if abs(r["error"]) > 0.05]
    print(f"{len(runs)} combinations, {len(measured)} measured, {len(measured) - len(missed)} of them within 5 %")
    for title, rows in (("missed", missed), ("failed", failed)):
        for row in rows:
            print(title, json.dumps(row))


def measure(options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    start, groups = time.perf_counter(), dict[tuple[str, str], list[int]]()
    for i in options.only if options.only is not None else range(len(COMBINATIONS)):
        groups.setdefault(COMBINATIONS[i][:2], []).append(i)
    todo = [[*g] for g in groups.values()]
    ahead = os.cpu_count() if options.device == "cuda" else 1  # of imports and plans at once
    room = int(torch.cuda.mem_get_info()[1] * 0.95) if options.device == "cuda" else 2**62
    waiting, going, runs = list[Process](), list[Process](), list[dict[str, Any]]()
    try:
        while todo or waiting or going:
            while todo and len(waiting) + len(going) < ahead:
                waiting.append(Process(todo.pop(0), options, place))
            late = time.perf_counter() - start > options.timeout
            for p in [*waiting, *going]:
                found = p.look()
                if late:
                    p.process.kill()
                    p.process.wait()
                if p.ended:
                    found += p.missing(f"not done after {options.timeout:g} s" if late else None)
                    (going if p in going else waiting).remove(p)
                for row in found:
                    if "peak_gib" in row:
                        row["error"] = row["plan_gib"] / row["peak_gib"] - 1
                    runs.append(row)
                    print(f"{time.perf_counter() - start:6.1f} s {json.dumps(row)}", flush=True)
                if found and options.out is not None:  # after each, so that a run that is cut off leaves what it has
                    write(options, sorted(runs, key=lambda r: r["combination"]))
            ready = sorted((p for p in waiting if p.needs is not None), key=lambda p: -p.needs)
            for p in ready:
                if len(going) < options.jobs and (not going or p.needs + sum(g.needs for g in going) <= room):
                    waiting.remove(p)
                    going.append(p)
                    p.go()
            if late:
                todo.clear()
            time.sleep(0.05)
    finally:
        for p in [*waiting, *going]:
            p.process.kill()
    return sorted(runs, key=lambda r: r["combination"])


def write(options: Any, runs: list[dict[str, Any]]) -> None:
    import smollm

    found = {"shape": options.shape, "steps": options.steps, **smollm.about()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**found, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

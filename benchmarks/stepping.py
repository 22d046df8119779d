"""Training steps, timed and profiled, and the matrix rate that they are held against."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

GIB = 1024**3
GEMMS = ((8192, 4096, 14336), (16384, 4096, 14336))
"""(rows, in_features, out_features) of the products whose rate is what the GPU can do."""
KINDS = (
    ("attention", r"attention|flash|fmha|sdpa"),
    ("loss", r"cross_entropy|softmax|nll_loss|_cce_|next_token"),
    ("optimizer", r"optimizer|adam|multi_tensor"),
    ("dequantize", r"dequant|unpack|^(stream|parts|gptq|awq|eetq)\b"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|splitk|wgmma|aten::(add|b|badd)?mm|mkldnn.*(linear|matmul)"),
)
"""Kinds of kernels by their names, the first match winning; everything else is elementwise."""
TOP = 40
SLICES = 20


def cap_memory(text: str | None) -> None:
    """Let this process have no more of the GPU than "80GB" or "24GiB": a card that is larger stands in for one that is not."""
    if text is not None:
        from qft.memory.report import memory_of

        share = memory_of(text) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def token_ids(vocabulary: int, count: int, batch: int, sequence: int, seed: int = 0) -> Tensor:
    """(count, batch, sequence), on the CPU, the same for a seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, batch, sequence), generator=generator)


def optimizer_of(model: torch.nn.Module, device: str) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if device != "cuda":
        return torch.optim.AdamW(weights, lr=1e-4)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(weights, lr=1e-4)


class Steps:
    """Training steps over a model that is ready, with the optimizer that every stack has."""

    def __init__(self, ready: Any, device: str):
        self.ready, self.device = ready, device
        self.model = ready.model.train()
        self.model.config.use_cache = False
        self.optimizer = optimizer_of(self.model, device)

    def __call__(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.device, non_blocking=True)
        with self.ready.context():
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed(self, ids: Tensor) -> tuple[list[float], list[Tensor]]:
        """Seconds of each step over ids (steps, batch, sequence), and the losses; the device is not waited for between."""
        if self.device != "cuda":
            marks, losses = [time.perf_counter()], []
            for batch in ids:
                losses.append(self(batch))
                marks.append(time.perf_counter())
            return [b - a for a, b in pairwise(marks)], losses
        ids = ids.pin_memory()  # as data loaders do, so that copying a batch does not wait for the step before
        torch.cuda.synchronize()
        events, losses = [torch.cuda.Event(enable_timing=True) for _ in range(len(ids) + 1)], []
        events[0].record()
        for batch, event in zip(ids, events[1:], strict=True):
            losses.append(self(batch))
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)], losses


def measure(ready: Any, ids: Tensor, warmup: int, device: str, profile: bool = False) -> dict[str, Any]:
    """Seconds, memory and losses of training on ids (warmup + steps, batch, sequence), as JSON can hold them.

    `step_s` is the median; `first_step_s` holds what is compiled in the first one, `compile_s` what all warmup steps
    took beyond the median. The peak is that of the steps after warmup.
    """
    gc.collect()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"model_gib": torch.cuda.memory_allocated() / GIB} if cuda else {}
    steps = Steps(ready, device)
    early, first = steps.timed(ids[:warmup])
    if cuda:
        found["peak_warmup_gib"] = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, losses = steps.timed(ids[warmup:])
    median = statistics.median(times)
    found |= {
        "step_s": median,
        "step_s_all": times,
        "tokens_per_second": ids[0].numel() / median,
        "first_step_s": early[0],
        "compile_s": max(0.0, sum(early) - median * len(early)),
        "first_loss": float(first[0]),
        "last_loss": float(losses[-1]),
    }
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    if profile:
        found["profile"] = profiled(lambda: steps.timed(ids[-2:]), cuda)
    return found


def matrix_rate(device: str, repeats: int = 30) -> dict[str, float]:
    """FLOP/s of bfloat16 products on random data, by shape; of a small one on a CPU."""
    rates = {}
    for rows, inner, columns in GEMMS if device == "cuda" else ((512, 512, 512),):
        a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
        for _ in range(5):
            torch.nn.functional.linear(a, b)
        times = []
        for _ in range(repeats):
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                torch.nn.functional.linear(a, b)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / 1000)
            else:
                begin = time.perf_counter()
                torch.nn.functional.linear(a, b)
                times.append(time.perf_counter() - begin)
        rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / statistics.median(times)
    return rates


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower)), "elementwise")


def profiled(run: Any, cuda: bool) -> dict[str, Any]:
    """Where the time of `run` goes: milliseconds and shares by kind, idle included, and of its longest kernels.

    On a GPU these are kernels, and idle is when none ran, which is given by the kernel that came next, too, and for each
    of `SLICES` equal parts of the time; on a CPU operators without those that they call.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        span = time.perf_counter() - start
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    busy = 0.0
    gaps: list[tuple[int, int, str]] = []
    if cuda:
        kernels = sorted(
            (e.start_ns(), e.duration_ns(), e.name())
            for e in found.profiler.kineto_results.events()
            if e.device_type() == torch.profiler.DeviceType.CUDA and not e.is_user_annotation()
        )
        until = 0
        for begin, length, name in kernels:
            seconds[name] += length / 1e9
            calls[name] += 1
            busy += max(0, begin + length - max(begin, until)) / 1e9
            if until and begin > until:
                gaps.append((until, begin, name))
            until = max(until, begin + length)
        if kernels:
            span = (until - kernels[0][0]) / 1e9
    else:
        for e in found.key_averages():
            seconds[e.key], calls[e.key] = e.self_cpu_time_total / 1e6, e.count
        busy = sum(seconds.values())
        span = max(span, busy)
    kinds: Counter[str] = Counter()
    for name, s in seconds.items():
        kinds[kind_of(name)] += s
    kinds["idle"] = max(0.0, span - busy)

    def row(name: str, s: float) -> dict[str, Any]:
        return {"name": name[:160], "ms": s * 1e3, "share": s / span}

    waits: Counter[str] = Counter()
    slices = [0.0] * SLICES
    for end, begin, name in gaps:
        waits[name] += (begin - end) / 1e9
        middle = (begin + end) / 2 - kernels[0][0]
        slices[min(SLICES - 1, int(middle / (span * 1e9) * SLICES))] += (begin - end) / 1e6
    idle = {"idle_before": [row(n, w) for n, w in waits.most_common(12)], "idle_ms": slices} if cuda else {}
    return idle | {
        "span_ms": span * 1e3,
        "kinds": [row(k, s) for k, s in kinds.most_common()],
        "kernels": [row(n, s) | {"calls": calls[n], "kind": kind_of(n)} for n, s in seconds.most_common(TOP)],
    }


def profile_text(found: dict[str, Any]) -> str:
    lines = [f"{r['share']:6.1%} {r['ms']:9.2f} ms  {r['name']}" for r in found["kinds"]]
    lines += [
        f"{r['share']:6.1%} {r['ms']:9.2f} ms {r['calls']:6d} × {r['kind']:<12} {r['name'][:90]}"
        for r in found["kernels"]
    ]
    return "\n".join(lines)

"""Dequantization to bfloat16 by qft's kernels: µs a weight, GB/s, the share of a copy's, and what torch code takes.

Bytes are those of the packed tensors read and of the weight written. The copy's bandwidth is that of `copy_` between two
tensors of the weight's size, read and write counted. Packed tensors take turns with copies of themselves, so that none is
found in the L2 cache. `host_us` is what one call costs the CPU. Rows "bitsandbytes ..." hold bitsandbytes' own code
as `torch_us`.

    python benchmarks/dequantize.py --out benchmarks/results/dequantize.json [--only gptq] [--sweep]
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from smollm import about
from torch import nn

from qft.backends.awq import AWQ
from qft.backends.bnb import BitsAndBytes4bit, BitsAndBytes8bit
from qft.backends.eetq import EETQ
from qft.backends.gptq import GPTQ
from qft.backends.hqq import HQQ
from qft.backends.quanto import Quanto
from qft.backends.reference import Reference
from qft.ops.kernels import launch as launching
from qft.ops.kernels.launch import CONFIGS

SHAPES = ((4096, 14336), (14336, 4096))
CALLS, ROUNDS, COLD = 20, 5, 200e6
DTYPE = torch.bfloat16

PACKINGS: dict[str, tuple[Any, str]] = {
    "nf4": (Reference(), "stream"),
    "nf4, double": (Reference(double_quant=True), "stream"),
    "fp4": (Reference(format="fp4"), "stream"),
    **{f"int{b}": (Reference(format="int", bits=b, group_size=64), "stream") for b in range(2, 9)},
    "int4, double": (Reference(format="int", group_size=64, double_quant=True), "stream"),
    **{f"gptq {b} bits": (GPTQ(bits=b, group_size=128), "gptq") for b in (2, 3, 4, 8)},
    "gptq 4 bits, groups of 32": (GPTQ(bits=4, group_size=32), "gptq"),
    "gptq 4 bits, act-order": (GPTQ(bits=4, group_size=128, desc_act=True), "gptq_ordered"),
    "awq": (AWQ(group_size=128), "awq"),
    **{f"hqq {b} bits": (HQQ(bits=b, group_size=64), "parts") for b in (1, 2, 3, 4, 8)},
    "hqq 4 bits, axis 0": (HQQ(bits=4, group_size=64, axis=0), "parts"),
    "quanto int2": (Quanto(format="int2"), "parts"),
    "quanto int4": (Quanto(format="int4"), "parts"),
    "quanto int8": (Quanto(format="int8"), "stream"),
    "quanto float8": (Quanto(format="float8"), "stream"),
    "eetq": (EETQ(), "eetq"),
    "bitsandbytes nf4": (BitsAndBytes4bit(), "stream"),
    "bitsandbytes nf4, double": (BitsAndBytes4bit(double_quant=True), "stream"),
    "bitsandbytes int8": (BitsAndBytes8bit(), "stream"),
}

SWEPT = {
    "stream": {"BLOCK": (64, 128, 256, 512, 1024), "num_warps": (1, 2, 4, 8)},
    "parts": {"BLOCK": (32, 64, 128, 256, 512), "num_warps": (1, 2, 4, 8)},
    "eetq": {"BLOCK": (32, 64, 128, 256, 512), "num_warps": (1, 2, 4, 8)},
    "gptq": {"BLOCK_ROWS": (16, 32, 64, 128), "BLOCK_COLUMNS": (64, 128, 256), "num_warps": (2, 4, 8)},
    "gptq_ordered": {"BLOCK_ROWS": (32, 64, 128), "BLOCK_COLUMNS": (32, 64, 128), "num_warps": (2, 4, 8)},
    "awq": {"BLOCK_ROWS": (64, 128, 256), "BLOCK_COLUMNS": (32, 64, 128), "num_warps": (2, 4, 8)},
}


def device_us(calls: list[Callable[[], Any]]) -> float:
    """Median µs of a call on the device; the calls take turns, and are queued before the first one starts."""
    found = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(10_000_000)  # clock cycles: some milliseconds
        start.record()
        for i in range(CALLS):
            calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(found[1:])


def host_us(call: Callable[[], Any]) -> float:
    found = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    return statistics.median(found)


def copy_gb_s(shape: tuple[int, int]) -> float:
    a, b = (torch.empty(shape, dtype=DTYPE, device="cuda") for _ in range(2))
    return 2 * a.nbytes / device_us([lambda: b.copy_(a)]) / 1e3


def prepared(quantizer: Any, shape: tuple[int, int]) -> tuple[list[Callable[[], Any]], int]:
    """Calls that dequantize one weight each into the same buffer, and the bytes that one of them moves."""
    weight = torch.randn(shape, device="cuda", dtype=DTYPE) * 0.02
    out = torch.empty(shape, dtype=DTYPE, device="cuda")
    if hasattr(quantizer, "unpack"):
        packed = quantizer.pack(weight)
        if getattr(quantizer, "desc_act", False):
            packed["g_idx"] = packed["g_idx"][torch.randperm(shape[1], device="cuda")]
        read = sum(t.nbytes for t in packed.values())
        copies = [{n: t.clone() for n, t in packed.items()} for _ in range(1 + int(COLD // read))]
        calls = [partial(quantizer.unpack, p, shape=shape, dtype=DTYPE, out=out) for p in copies]
    else:
        read = quantizer.nbytes(shape)
        linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        layers = [quantizer.quantize_layer(linear) for _ in range(1 + int(COLD // read))]
        calls = [partial(quantizer.dequantize, quantizer.weights(m)[0], out=out) for m in layers]
    return calls, read + out.nbytes


def configs(program: str) -> Iterator[dict[str, int]]:
    names, values = zip(*SWEPT[program].items(), strict=True)
    return (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values))


def sweep(name: str, program: str, calls: list[Callable[[], Any]], moved: int, copy: float) -> list[dict[str, Any]]:
    kept, found = dict(CONFIGS[program]), []
    for config in configs(program):
        CONFIGS[program].update(config)
        us = device_us(calls)
        if launching._broken:  # too large a block, say: torch code was measured
            launching._broken.clear()
            continue
        found.append({**config, "us": round(us, 1), "share": round(moved / us / 1e3 / copy, 3)})
    CONFIGS[program].update(kept)
    found.sort(key=lambda row: row["us"])
    for row in found[:5]:
        print("   ", row, "(now)" if kept.items() <= row.items() else "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/dequantize.json")
    parser.add_argument("--only", default="", help="packings whose name holds this")
    parser.add_argument("--sweep", action="store_true", help="try block sizes, and print the best five")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/dequantize.py needs a CUDA device")
        return
    results: dict[str, Any] = {**about(), "dtype": "bfloat16", "configs": CONFIGS, "copy_gb_s": {}, "rows": []}
    for shape in SHAPES:
        copy = copy_gb_s(shape)
        results["copy_gb_s"][f"{shape[0]}x{shape[1]}"] = round(copy)
        print(f"{shape[0]} × {shape[1]}: copy {copy:.0f} GB/s")
        for name, (quantizer, program) in PACKINGS.items():
            if options.only not in name:
                continue
            calls, moved = prepared(quantizer, shape)
            launching.enabled = True
            us, host = device_us(calls), host_us(calls[0])
            row = {"packing": name, "shape": list(shape), "us": round(us, 1), "gb_s": round(moved / us / 1e3)}
            row |= {"share_of_copy": round(moved / us / 1e3 / copy, 3), "host_us": round(host, 1)}
            if launching._broken:
                raise SystemExit(f"the kernel of {name} does not run here")
            launching.enabled = False
            row["torch_us"] = round(device_us(calls), 1)
            row["torch_host_us"] = round(host_us(calls[0]), 1)
            launching.enabled = True
            print(f"  {name:28} " + "  ".join(f"{k} {v}" for k, v in list(row.items())[2:]))
            if options.sweep:
                row["sweep"] = sweep(name, program, calls, moved, copy)
            results["rows"].append(row)
            del calls
    with open(options.out, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()

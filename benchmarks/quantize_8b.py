"""Quantize an 8B Llama shape that sits on the GPU: seconds against bitsandbytes' own over the same tensors, and memory.

`kernel_s` is `bitsandbytes.functional.quantize_4bit` over every linear's weight; `operator_s` the bare operator, which
makes no state.

    python benchmarks/quantize_8b.py --out benchmarks/results/quantize_8b.json [--layers 32]
"""

import argparse
import json
from datetime import date

import shapes
import torch

import qft

GIB = 1024**3


def seconds(run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def kernels(model) -> dict[str, float]:
    """bitsandbytes over the same tensors, results dropped: its function, and the bare operator under it."""
    from bitsandbytes.functional import quantize_4bit

    weights = [m.weight.data for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]

    def function():
        for w in weights:
            quantize_4bit(w, blocksize=64, quant_type="nf4")

    def operator():
        for w in weights:
            torch.ops.bitsandbytes.quantize_4bit.default(w, 64, "nf4", torch.uint8)

    times = {}
    for name, run in (("kernel_s", function), ("operator_s", operator)):
        run()
        times[name] = min(seconds(run) for _ in range(3))
    return times


def main() -> None:
    import time

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for _ in range(4):
        model = shapes.random_model(shapes.config("8b", options.layers), "cuda")
        times = kernels(model)
        largest = max(
            m.weight.nbytes for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"
        )
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        wall = time.perf_counter()
        qft.quantize(model, "nf4", progress=False)
        torch.cuda.synchronize()
        wall = time.perf_counter() - wall
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        bits = qft.audit(model).bits_per_weight
        rows.append(
            {
                **times,
                "quantize_s": wall,
                "ratio": wall / times["kernel_s"],
                "ratio_to_operator": wall / times["operator_s"],
                "float_gib": before / GIB,
                "peak_gib": peak / GIB,
                "quantized_gib": after / GIB,
                "largest_layer_gib": largest / GIB,
                "peak_over_float_in_layers": (peak - before) / largest,
                "bits_per_weight": bits,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        del model
        torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "qft": qft.__version__, **_versions()},
        "layers": options.layers,
        "runs": rows,
        "best": min(rows, key=lambda r: r["ratio"]),
    }
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("bitsandbytes", "transformers", "peft")}


if __name__ == "__main__":
    main()

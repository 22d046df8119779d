"""Seconds and memory of each init over an 8B Llama shape that sits on the GPU, quantized and wrapped in one go.

python benchmarks/init_8b.py --out benchmarks/results/init_8b.json [--layers 32]
"""

import argparse
import gc
import json
import time

import shapes
import smollm
import torch
from peft import LoraConfig

import qft

GIB = 1024**3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 512 tokens")
    parser.add_argument("--inits", nargs="*", default=["zero", "loftq", "qera", "qera-full", "loftq:steps=5", "pissa"])
    parser.add_argument("--out")
    options = parser.parse_args()
    calibration = torch.randint(0, 128256, (options.samples, 512), generator=torch.Generator().manual_seed(0))
    rows = []
    for init in options.inits:
        model = shapes.random_model(shapes.config("8b", options.layers), "cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        wrapped = qft.quantize_and_wrap(
            model,
            "nf4",
            adapter=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"),
            init=init,
            calibration=calibration if "qera" in init else None,
            progress=False,
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        report = getattr(wrapped, "init_report", None)
        rows.append(
            {
                "init": init,
                "seconds": seconds,
                "float_gib": before / GIB,
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                "rolled_back": None if report is None else len(report.rolled_back),
                "layers": options.layers,
                "rank": 16,
                "calibration_tokens": calibration.numel() if "qera" in init else 0,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        del model, wrapped, report
        gc.collect()
        torch.cuda.empty_cache()
        if options.out:
            with open(options.out, "w") as file:
                json.dump({**smollm.about(), "runs": rows}, file, indent=1)


if __name__ == "__main__":
    main()

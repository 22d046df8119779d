"""The peak memory of quantizing a folder: the float model is never whole in memory.

A Llama shape with random float32 weights is saved in shards, and each quantizer reads it in a process of its own that
samples its anonymous memory (`RssAnon`; pages of mapped files are the system's to take back) every millisecond.

    python benchmarks/load_peak.py [--layers 6] [--hidden 1024] [--quantizer nf4 ...] [--out FILE]

Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

MIB = 2**20
SPECS = ["nf4", "fp4:double_quant=true", "int8", "reference", "reference:format=int,bits=4,group_size=64"]


def write_models(folder: Path, hidden: int, layers: int) -> None:
    """The model to measure in `folder/model`, and a tiny one of its kind in `folder/tiny`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, size, depth in (("model", hidden, layers), ("tiny", 64, 1)):
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=size,
            intermediate_size=3 * size,
            num_hidden_layers=depth,
            num_attention_heads=8,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name, max_shard_size="64MB")


def anonymous() -> int:
    """Bytes of this process that are backed by no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


class Peak(threading.Thread):
    """The largest value of `anonymous` while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.samples, self.over = 0, 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            self.bytes, self.samples = max(self.bytes, anonymous()), self.samples + 1
            time.sleep(0.001)


def measure(folder: Path, spec: str) -> dict[str, float]:
    """Quantize `folder/model` in this process, after `folder/tiny`, so that no import counts. Sizes in bytes."""
    import qft

    qft.quantize(folder / "tiny", spec, device="cpu", progress=False)
    before, peak = anonymous(), Peak()
    peak.start()
    start = time.perf_counter()
    model = qft.quantize(folder / "model", spec, device="cpu", progress=False)
    seconds = time.perf_counter() - start
    peak.over.set()
    peak.join()
    state = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    targets = [shape for shape, _ in model._qft.fingerprint.values()]
    return {
        "quantizer": spec,
        "seconds": seconds,
        "float": sum(p.numel() for p in _skeleton(folder).parameters()) * 4,
        "largest_layer": max(rows * columns for rows, columns in targets) * 4,
        "quantized": sum(state.values()),
        "peak": peak.bytes - before,
        "after": anonymous() - before,
        "samples": peak.samples,
    }


def _skeleton(folder: Path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--quantizer", nargs="+", default=SPECS)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "load_peak-cpu.json"))
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure), options.quantizer[0])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options.hidden, options.layers)
        for spec in options.quantizer:
            command = [sys.executable, __file__, "--measure", folder, "--quantizer", spec]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            r = rows[-1]
            print(
                f"{spec:42} float {r['float'] / MIB:6.0f} MiB, quantized {r['quantized'] / MIB:5.0f}, "
                f"peak {r['peak'] / MIB:5.0f}, over it {(r['peak'] - r['quantized']) / r['largest_layer']:4.1f} layers"
            )
    result = {
        "device": f"CPU, {platform.machine()}, {platform.system()}",
        "date": date.today().isoformat(),
        "versions": _versions(),
        "model": {"hidden_size": options.hidden, "layers": options.layers, "dtype": "float32", "shards": "64 MB"},
        "runs": rows,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import qft

    names = ("torch", "transformers", "safetensors", "bitsandbytes")
    return {"python": platform.python_version(), "qft": qft.__version__, **{n: version(n) for n in names}}


if __name__ == "__main__":
    main()

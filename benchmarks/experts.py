"""A mixture of experts in 4 bits: what it weighs on the device, and how fast LoRA on attention and experts trains.

The float model never exists whole: it is built on "meta", and each layer gets random weights, is quantized, and gives
them up before the next one. Token ids are random, too; what is measured does not hang on either, but for the routing,
which random weights spread evenly over the experts.

    python benchmarks/experts.py --out benchmarks/results/experts-h100.json     # a 30B-A3B shape, on one 80 GB card
    python benchmarks/experts.py --shape tiny                                   # tries the script out on a CPU
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import smollm
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import qft
from qft.core.experts import ExpertsForward

SHAPES: dict[str, dict[str, int]] = {
    "30b-a3b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 256,
    },
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--spec", default="nf4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--optimizer", choices=["adamw8bit", "adamw", "sgd"], help="default: adamw8bit on CUDA")
    parser.add_argument("--no-experts", action="store_true", help="adapters on attention alone")
    parser.add_argument("--fast", action="store_true", help="with qft.optimize_training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    options.shape = options.shape or ("30b-a3b" if device.type == "cuda" else "tiny")
    options.optimizer = options.optimizer or ("adamw8bit" if device.type == "cuda" else "adamw")
    if options.shape == "tiny":
        options.sequence = min(options.sequence, 128)
    found = {"shape": options.shape, "spec": options.spec, "rank": options.rank, **smollm.about()}
    found["model"] = config = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    started = time.perf_counter()
    model = build(config, options.spec, device)
    found |= weighed(model, device) | {"build_seconds": round(time.perf_counter() - started, 1)}
    show(found, "quantized")
    model = qft.prepare_model_for_kbit_training(model)
    adapter = LoraConfig(
        r=options.rank, target_modules="all-linear", target_parameters=None if options.no_experts else EXPERTS
    )
    model = qft.wrap(model, adapter)
    if options.fast:
        qft.optimize_training(model)
    found["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["decode"] = decoded(model, config, device)
    found["training"] = trained(model, config, device, options)
    print(json.dumps({k: found[k] for k in ("trainable", "decode", "training")}, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def build(config: dict[str, int], spec: str, device: torch.device) -> nn.Module:
    """The quantized model: one float layer at a time."""
    settings = Qwen3MoeConfig(**config, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=4096)
    settings.dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(settings).to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)  # not drawn, but computed
    blocks, model.model.layers = model.model.layers, nn.ModuleList()
    draw(model, generator, device)
    quantizers = {}
    for index, block in enumerate(blocks):
        draw(block, generator, device)
        one = nn.Module()  # a name as in the model, so that qft knows the layer's place
        one.model = nn.Module()
        one.model.layers = nn.ModuleDict({str(index): block})
        qft.quantize(one, spec, progress=False)
        quantizers |= one._qft.quantizers
        if index == 0:
            record = one._qft
        else:
            record.fingerprint |= one._qft.fingerprint
            record.float_bytes += one._qft.float_bytes
            record.left |= one._qft.left
            record.experts |= one._qft.experts
    model.model.layers = blocks
    record.quantizers = quantizers
    record.left["lm_head"] = "the output head"
    qft.core.transformers_quantizer.mark(model, record)
    return model.eval()


@torch.no_grad()
def draw(module: nn.Module, generator: torch.Generator, device: torch.device) -> None:
    """Values for what is on "meta": norms are ones, weights N(0, 1 / in_features)."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if value.ndim == 1:
                value.fill_(1.0)
            else:
                value.normal_(std=1 / math.sqrt(value.shape[-1]), generator=generator)
            part._parameters[name] = nn.Parameter(value, requires_grad=False)


def weighed(model: nn.Module, device: torch.device) -> dict[str, Any]:
    audit = qft.audit(model)
    found = {
        "parameters": audit.parameters,
        "bits_per_weight": round(audit.bits_per_weight, 4),
        "quantized_bytes": audit.quantized_bytes,
        "model_bytes": audit.nbytes,
        "float_bytes": 2 * audit.parameters,
        "experts_left_in_16_bit": len(audit.experts),
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
        found["allocated_bytes"] = torch.cuda.memory_allocated(device)
        found["peak_while_building_gib"] = gib(torch.cuda.max_memory_allocated(device))
    return found


@torch.no_grad()
def decoded(model: nn.Module, config: dict[str, int], device: torch.device) -> dict[str, Any]:
    """One token through the model: how many experts a layer dequantized."""
    model.eval()
    ids = tokens(config, device, (1, 1), seed=1)
    model(input_ids=ids)
    synchronize(device)
    started, count = time.perf_counter(), 5
    for _ in range(count):
        model(input_ids=ids)
    synchronize(device)
    hit = [f.last_hit for m in model.modules() if isinstance(f := m.__dict__.get("forward"), ExpertsForward)]
    return {
        "experts_dequantized": hit,
        "of": config["num_experts"],
        "milliseconds": round(1000 * (time.perf_counter() - started) / count, 2),
    }


def trained(model: nn.Module, config: dict[str, int], device: torch.device, options: Any) -> dict[str, Any]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if options.optimizer == "adamw8bit":
        import bitsandbytes as bnb

        optimizer = bnb.optim.AdamW8bit(parameters, lr=1e-4)
    else:
        kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.SGD
        optimizer = kind(parameters, lr=1e-4)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = [], []
    for step in range(options.warmup + options.steps):
        ids = tokens(config, device, (options.batch, options.sequence), seed=10)
        synchronize(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        synchronize(device)
        if step >= options.warmup:
            seconds.append(time.perf_counter() - started)
    found = {
        "batch": options.batch,
        "sequence": options.sequence,
        "optimizer": options.optimizer,
        "fast": options.fast,
        "seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": round(options.batch * options.sequence * len(seconds) / sum(seconds), 1),
        "losses": [round(float(x), 4) for x in losses],
    }
    if device.type == "cuda":
        found["peak_gib"] = gib(torch.cuda.max_memory_allocated(device))
    return found


def tokens(config: dict[str, int], device: torch.device, shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config["vocab_size"], shape, generator=generator).to(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gib(n: int) -> float:
    return round(n / 2**30, 2)


def show(found: dict[str, Any], what: str) -> None:
    keys = ("parameters", "bits_per_weight", "quantized_bytes", "model_bytes", "allocated_bytes", "build_seconds")
    print(what, {k: found[k] for k in keys if k in found}, flush=True)


if __name__ == "__main__":
    main()

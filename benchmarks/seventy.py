"""Training a 70B Llama shape with random NF4 weights: within 48 GiB, and within 24 GiB with streamed weights.

One block is quantized, with double quantization, and the others are copies of it in memory of their own. The limit is
enforced (`torch.cuda.set_per_process_memory_fraction`); beside each peak stands what `qft.plan` says of it.

    python benchmarks/seventy.py --out benchmarks/results/seventy-h100.json
    python benchmarks/seventy.py --shape tiny --device cpu     # tries the script out: no peaks, copies without streams
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(  # pages of pinned memory are made by several threads
    "PYTORCH_CUDA_ALLOC_CONF", "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
)

import torch
from peft import LoraConfig
from torch import Tensor, nn

import qft
from qft.optimize import optimize

GIB = 2**30
SPEC = "nf4:double_quant=true"
SHAPES: dict[str, dict[str, Any]] = {
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8},
}
RUNS: dict[str, dict[str, Any]] = {
    "a": {"sequence": 512, "limit": "48GiB", "offload": None},
    "b": {"sequence": 2048, "limit": "48GiB", "offload": None},
    "c": {"sequence": 512, "limit": "24GiB", "offload": "weights"},
    "d": {"sequence": 2048, "limit": "24GiB", "offload": "weights"},
    "e": {"sequence": 2048, "limit": "24GiB", "offload": "all"},
}
"""Name → batch 1 of how many tokens, within what, with what offloaded."""


def config(name: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[name],
        num_key_value_heads=8,
        vocab_size=512 if name == "tiny" else 128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
    )


def adapter(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def alike(layer: nn.Module, to: Callable[[Tensor], Tensor]) -> nn.Module:
    """A bitsandbytes layer like this one, with `to` of its tensors."""
    from bitsandbytes.functional import QuantState

    old = layer.weight.quant_state

    def state(s: Any, **more: Any) -> Any:
        return QuantState(
            absmax=to(s.absmax), shape=s.shape, code=to(s.code), blocksize=s.blocksize, quant_type=s.quant_type,
            dtype=s.dtype, **more,
        )  # fmt: skip

    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    twin = state(old, offset=to(old.offset), state2=state(old.state2))
    weight = type(layer.weight)(
        to(layer.weight.data), requires_grad=False, quant_state=twin, blocksize=old.blocksize, compress_statistics=True,
        quant_type=old.quant_type, quant_storage=layer.weight.dtype, module=new, bnb_quantized=True,
    )  # fmt: skip
    new._parameters["weight"], new.quant_state = weight, twin
    return new


def build(shape: Any, device: str, blocks: str) -> Any:
    """The quantized model without adapters, its blocks on `blocks` and all else on `device`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    quantizer = qft.get_quantizer(SPEC)
    layers, done = model.model.layers, {}
    generator = torch.Generator(device).manual_seed(0)
    for name, module in layers[0].named_modules():
        if type(module) is not nn.Linear:
            continue
        module.to_empty(device=device)
        with torch.no_grad():
            module.weight.normal_(std=0.02, generator=generator)
            done[name] = alike(quantizer.quantize_layer(module), lambda t: t.to(blocks))
        module.to("meta")
    for layer in layers:
        for name, quantized in done.items():
            where, _, last = name.rpartition(".")
            setattr(layer.get_submodule(where), last, alike(quantized, lambda t: t.clone()))
    for module in model.modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
            with torch.no_grad():
                for p in module.parameters(recurse=False):
                    p.normal_(std=0.02, generator=generator) if p.dim() > 1 else p.fill_(1.0)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=shape)  # its buffers are computed
    return model


def optimizer_of(model: nn.Module, device: str) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if device != "cuda":
        return torch.optim.AdamW(weights, lr=1e-4)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=1e-4)


def run(name: str, model: Any, options: Any) -> dict[str, Any]:
    """Some steps of one run over a wrapped model, whose first is not counted."""
    how, device, cuda = RUNS[name], options.device, options.device == "cuda"
    sequence = how["sequence"] if options.shape != "tiny" else 32
    found: dict[str, Any] = {"run": name, **how, "batch": 1, "sequence": sequence}
    start = time.perf_counter()
    weights = how["offload"] in ("weights", "all")
    memory = how["limit"] if weights else "least"
    plan = qft.plan(
        config(options.shape), SPEC, sequence_length=sequence, adapter=adapter(options.rank), device=device, memory=memory,
        optimizer="adamw8bit" if cuda else "adamw", offload=how["offload"],
    )  # fmt: skip
    if weights:
        found["resident"] = optimize.switches.resident = plan.resident if options.shape != "tiny" else 2
    found |= {"plan_gib": plan.training_peak / GIB, "plan_host_gib": plan.host / GIB, "moment": plan.moment}
    found["fits"] = plan.fits(how["limit"])
    found["plan_s"] = time.perf_counter() - start
    if cuda:
        limit = int(how["limit"].removesuffix("GiB")) * GIB
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    start = time.perf_counter()
    qft.optimize_training(model, memory="least", offload=how["offload"])
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    found["optimize_s"] = time.perf_counter() - start  # pinned memory is made here
    optimizer = optimizer_of(model.train(), device)
    ids = torch.randint(config(options.shape).vocab_size, (1 + options.steps, 1, sequence)).to(device)
    seconds, losses = [], []
    for step, batch in enumerate(ids):
        if cuda and step == 1:  # what the first step compiles and tunes is no part of it
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        del loss
    step_s = statistics.median(seconds[1:])
    found |= {"first_step_s": seconds[0], "step_s": step_s, "step_s_all": seconds[1:], "losses": losses}
    found["tokens_per_second"] = sequence / step_s
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["error"] = found["plan_gib"] / found["peak_gib"] - 1
    stream = model.get_base_model().model.layers[0].forward.plan.weights
    if stream is not None:
        found |= {"streamed_gib": stream.nbytes / GIB, "streamed_blocks": len(stream.blocks)}
        found["streamed_gb_per_second"] = 2 * stream.nbytes / step_s / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="70b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", default="abcd", help="letters of runs: " + json.dumps(RUNS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    optimize.switches.compile = not options.no_compile
    optimize.switches.offload_on_cpu = options.device == "cpu"
    rows: list[dict[str, Any]] = []
    model, there = None, None
    for name in options.runs:
        blocks = "cpu" if RUNS[name]["offload"] in ("weights", "all") else options.device
        start = time.perf_counter()
        try:
            if model is None or there != blocks:
                model = None
                clear(options.device)
                model = qft.wrap(
                    qft.prepare_model_for_kbit_training(build(config(options.shape), options.device, blocks)),
                    adapter(options.rank),
                )
                there = blocks
            build_s = time.perf_counter() - start
            rows.append({"build_s": build_s, **run(name, model, options)})
        except Exception as error:
            rows.append({"run": name, **RUNS[name], "failed": f"{type(error).__name__}: {error}"[:500]})
            model = None
        print(json.dumps(rows[-1]), flush=True)
        torch._dynamo.reset()  # each length compiled for itself
        if options.out is not None:  # after each, so that a run that is cut off leaves what it has
            write(options, rows)


def clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def write(options: Any, rows: list[dict[str, Any]]) -> None:
    import smollm

    found = {"shape": options.shape, "rank": options.rank, "quantizer": SPEC, **smollm.about()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**found, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Every PEFT method over every backend: right, or refused with a reason; a small random Llama, float32, on a CPU.

    python benchmarks/peft_methods.py --out benchmarks/results/peft_methods-cpu.json
    python benchmarks/peft_methods.py --methods VERA IA3 --quantizers nf4 gptq

For each pair, `qft.wrap` over a copy of the backend's quantized model. Where that refuses, `qft.quantize_and_wrap` of the
float model must, too: the reason is kept, and that both models are what they were. Else the same method is put by plain
PEFT on a float copy of the dequantized weights, both get the same random adapter, and these are compared; every figure is a
relative error:

- `output`, `training`, `gradients`: logits in eval and in training mode; the gradient of the parameter that is worst.
- `moved`: how far the move took the logits, so that the rest is not empty.
- `base`: codes and constants after two training steps (0: the same bits).
- `disabled`: logits in `disable_adapter()` against those of the dequantized weights. `unloaded`: after `unload()`
  against the quantized model's before, which is the vendor's forward.
- `loaded`: logits after `qft.save` and `qft.load` over the float model, with another random seed.
- `merged`: weights after PEFT's `merge_adapter()`, the worst of them, against the tuned ones as the backend rounds them;
  `rounding`: logits then against those of the tuned model. `merged_to_float`: logits after `qft.merge_to_float`. Or the
  refusal.

A cell is `right` where all of them but `moved` and `rounding` are below 1e-4 (gradients 1e-3), `refused`, `wrong` with the
figures that are not, `crash` with what was raised, or `absent` where the method's own package is (AdaMSS wants
scikit-learn).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import smollm
import torch
from peft import PeftConfig, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qft
from qft.core.registry import _entries, quantizer_of
from qft.lora.tuners import UNCHECKPOINTED
from qft.lora.view import LinearView

SPECS = {
    "aqlm": "aqlm:num_codebooks=2,nbits_per_codebook=6,rounds=1,beam=2",
    "auto-round": "auto-round:group_size=32",
    "awq": "awq:group_size=32",
    "compressed-tensors": "compressed-tensors:group_size=32",
    "fp4": "fp4:double_quant=true",
    "gguf": "gguf:type=Q4_0",
    "gptq": "gptq:group_size=32",
    "hqq": "hqq:group_size=32",
    "inc": "inc:group_size=32",
    "inc-fp8": "inc:method=fp8",
    "reference": "reference:format=int,bits=4,group_size=32",
    "sinq": "sinq:group_size=32",
}
"""Options for a small model; other names as they are."""

ATTENTION, BOUND, BOUNDS = ["q_proj", "v_proj"], 1e-4, {"gradients": 1e-3}
UNBOUND = ("moved", "rounding")
VOCABULARY = 96
_LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
_VIRTUAL = {**_LM, "num_virtual_tokens": 4}

OPTIONS: dict[PeftType, dict[str, Any]] = {
    PeftType.LORA: {"r": 4},
    PeftType.ADALORA: {"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1, "total_step": 6},
    PeftType.ADAMSS: {"r": 8, "num_subspaces": 2},
    PeftType.ADAPTION_PROMPT: {**_LM, "target_modules": "self_attn", "adapter_len": 4, "adapter_layers": 2},
    PeftType.BOFT: {"boft_block_size": 4},
    PeftType.C3A: {"block_size": 4},
    PeftType.CARTRIDGE: _VIRTUAL,
    PeftType.CPT: {**_LM, "cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    PeftType.DEFT: {"r": 4},
    PeftType.DELORA: {"r": 4},
    PeftType.FOURIERFT: {"n_frequency": 20},
    PeftType.GLORA: {"r": 4},
    PeftType.GRALORA: {"r": 4, "gralora_k": 2},
    PeftType.HIRA: {"r": 4},
    PeftType.HRA: {"r": 4},
    PeftType.IA3: {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    PeftType.LILY: {"r": 4, "num_B": 2, "stride_A": 1},
    PeftType.LN_TUNING: {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    PeftType.LOHA: {"r": 4},
    PeftType.LOKR: {"r": 4},
    PeftType.MISS: {"r": 4},
    PeftType.MULTITASK_PROMPT_TUNING: {**_VIRTUAL, "num_tasks": 2},
    PeftType.OFT: {"oft_block_size": 4},
    PeftType.OSF: {"effective_rank": 8},
    PeftType.P_TUNING: {**_VIRTUAL, "encoder_hidden_size": 16},
    PeftType.PEANUT: {"r": 4},
    PeftType.POLY: {**_LM, "r": 4, "n_tasks": 2, "n_skills": 2},
    PeftType.PREFIX_TUNING: _VIRTUAL,
    PeftType.PROMPT_TUNING: _VIRTUAL,
    PeftType.PSOFT: {"r": 4},
    PeftType.PVERA: {"r": 8, "d_initial": 0.1},
    PeftType.RANDLORA: {"r": 4},
    PeftType.ROAD: {"group_size": 16},
    PeftType.SHADOW: {**_LM, "r": 4},
    PeftType.SHIRA: {"r": 4, "random_seed": 0},
    PeftType.TRAINABLE_TOKENS: {"token_indices": list(range(48)), "target_modules": ["embed_tokens"]},
    PeftType.UNILORA: {"r": 4, "theta_d_length": 64},
    PeftType.VBLORA: {"r": 4, "num_vectors": 8, "vector_length": 32},
    PeftType.VERA: {"r": 8, "d_initial": 0.1, "target_modules": ["q_proj", "o_proj"]},
    PeftType.WAVEFT: {"n_frequency": 20},
    PeftType.XLORA: {**_LM, "hidden_size": 64, "adapters": {"0": "adapter"}},
}
"""What a method's config needs beyond targets on the attention, or for so small a model."""

TASKS = {PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING}


def shipped() -> list[str]:
    """The backends that come with qft and are ready here."""
    found = qft.available_quantizers()
    names = [name for name in found if name in _entries and found[name].state == "ready"]
    return sorted([*names, "inc-fp8"] if "inc" in names else names)


def methods() -> list[PeftType]:
    """All that the installed PEFT has."""
    return list(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)


def config_of(kind: PeftType) -> PeftConfig:
    cls = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = copy.deepcopy(OPTIONS.get(kind, {}))
    if "target_modules" in cls.__dataclass_fields__:
        options.setdefault("target_modules", list(ATTENTION))
    return cls(**options)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))


def calibration() -> list[Tensor]:
    return [torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(s)) for s in range(4)]


def logits(model: nn.Module, extra: dict[str, Any], seed: int = 1) -> Tensor:
    """The last tokens' logits, since prompts come before them."""
    return model(input_ids=ids(seed), **extra).logits[:, -12:]


@torch.no_grad()
def unchanged(model: nn.Module, other: nn.Module) -> bool:
    """Whether they have the same modules and compute the same."""
    modules = [type(m) for m in other.modules()]
    return [type(m) for m in model.modules()] == modules and torch.equal(logits(model, {}), logits(other, {}))


def kind_of(model: nn.Module) -> PeftType:
    return model.active_peft_config.peft_type


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


class Bench:
    """One backend: the quantized model's own figures, and the methods over it."""

    def __init__(self, name: str):
        self.name, self.spec = name, SPECS.get(name, name)
        needs = qft.capabilities(self.spec).needs_calibration
        self.data: dict[str, Any] = {"calibration": calibration()} if needs else {}
        self.base = base = qft.quantize(llama(), self.spec, progress=False, **self.data)
        twin = llama()
        with torch.no_grad():
            for layer, module in base.named_modules():
                quantizer = quantizer_of(module)
                if quantizer is not None:
                    handle = quantizer.weights(module)[0]
                    twin.get_submodule(layer).weight.copy_(quantizer.dequantize(handle, dtype=torch.float32))
        self.floats = twin
        with torch.no_grad():
            self.plain, self.bare = logits(twin, {}), logits(base, {})

    def cell(self, kind: PeftType) -> dict[str, Any]:
        """One pair: `status`, and figures or a reason."""
        try:
            config_of(kind)
        except ImportError as error:
            return {"status": "absent", "reason": str(error)}
        checkpointed = kind.value not in UNCHECKPOINTED
        model = copy.deepcopy(self.base)
        torch.manual_seed(7)
        try:
            qft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointed)
            ours = qft.wrap(model, config_of(kind))
        except (qft.UnsupportedOperation, qft.MissingDependency) as error:
            floats = llama()
            try:
                qft.quantize_and_wrap(
                    floats, self.spec, adapter=config_of(kind), use_gradient_checkpointing=checkpointed,
                    progress=False, **self.data,
                )  # fmt: skip
                return {"status": "wrong", "what": "refused by wrap alone"}
            except (qft.UnsupportedOperation, qft.MissingDependency):
                same = unchanged(model, self.base) and unchanged(floats, llama())
            return {"status": "refused", "reason": str(error)} if same else {"status": "wrong", "what": "model changed"}
        except Exception as error:
            return {"status": "crash", "what": f"wrapping: {type(error).__name__}: {error}"[:300]}
        torch.manual_seed(7)
        figures: dict[str, Any] = {}
        try:
            theirs = get_peft_model(copy.deepcopy(self.floats).requires_grad_(False), config_of(kind))
        except Exception as error:
            return {"status": "crash", "what": f"over floats: {type(error).__name__}: {error}"[:300]}
        try:
            self._compare(kind, ours, theirs, figures)
        except Exception as error:
            return {"status": "crash", "what": f"{type(error).__name__}: {error}"[:300], "errors": figures}
        bad = [
            k for k, v in figures.items() if isinstance(v, float) and k not in UNBOUND and not v < BOUNDS.get(k, BOUND)
        ]
        if not figures["moved"] > 1e-3:
            bad.append("moved")
        merges = {k: figures.pop(k) for k in ("merged", "merged_to_float") if isinstance(figures.get(k), str)}
        out: dict[str, Any] = {"status": "wrong" if bad else "right", "errors": figures, "refusals": merges}
        return {**out, "what": f"{', '.join(bad)}"} if bad else out

    def _compare(self, kind: PeftType, ours: nn.Module, theirs: nn.Module, figures: dict[str, Any]) -> None:
        extra = {"task_ids": torch.tensor([0, 1])} if kind in TASKS else {}
        before = _codes(ours)
        for model in (ours, theirs):
            model.eval()
        with torch.no_grad():
            start = logits(ours, extra)
        _move(ours)
        _share(ours, theirs)
        with torch.no_grad():
            expected = logits(ours, extra)
            figures["output"] = relative(expected, logits(theirs, extra))
            figures["moved"] = relative(expected, start)
        y, mine = _step(ours, extra)
        z, other = _step(theirs, extra)
        figures["training"] = relative(y, z)
        if mine.keys() != other.keys() or not mine:
            raise RuntimeError(f"gradients for {len(mine)} parameters, and {len(other)} over floats")
        whole = sum(float(g.double().square().sum()) for g in other.values()) ** 0.5
        figures["gradients"] = max(
            float((mine[n] - g).double().norm()) / max(float(g.double().norm()), 1e-3 * whole) for n, g in other.items()
        )
        _train(ours, extra)
        ours.eval()
        after = _codes(ours)
        figures["base"] = float(any(not torch.equal(after[k], v) for k, v in before.items()))
        with torch.no_grad():
            tuned = logits(ours, extra)
            if not ours.active_peft_config.is_prompt_learning or kind != PeftType.XLORA:
                with ours.disable_adapter():
                    figures["disabled"] = relative(logits(ours, extra), self.plain)
            figures["loaded"] = relative(_round_trip(ours, extra), tuned)
            figures["merged_to_float"] = _tried(lambda: relative(logits(qft.merge_to_float(ours).eval(), {}), tuned))
            if hasattr(ours, "merge_adapter") or hasattr(ours.base_model, "merge_adapter"):
                figures["merged"] = _tried(lambda: self._merged(ours, extra, tuned, figures))
            figures["again"] = relative(logits(ours, extra), tuned)
            if hasattr(ours.base_model, "unload"):
                figures["unloaded"] = _tried(lambda: relative(logits(ours.base_model.unload(), {}), self.bare))

    def _merged(self, ours: nn.Module, extra: dict[str, Any], tuned: Tensor, figures: dict[str, Any]) -> float:
        """The worst of the merged weights, against the tuned ones as the backend rounds them."""
        expected: dict[str, Tensor] = {}
        rounded, plain = copy.deepcopy(self.base), None
        if kind_of(ours) != PeftType.LORA and _changes_weights(ours):
            plain = qft.merge_to_float(ours)  # held against the outputs as `merged_to_float`
        for name, layer in ours.get_base_model().named_modules():
            if not isinstance(layer, BaseTunerLayer) or quantizer_of(module := rounded.get_submodule(name)) is None:
                continue
            quantizer = quantizer_of(module)
            handle = quantizer.weights(module)[0]
            if plain is None:
                value = quantizer.dequantize(handle, dtype=torch.float32) + layer.get_delta_weight("default")
            else:
                value = plain.get_submodule(name).weight.detach().float()
            quantizer.requantize(handle, value)
            expected[name] = quantizer.dequantize(handle, dtype=torch.float32)
        ours.base_model.merge_adapter()
        figures["rounding"] = relative(logits(ours, extra), tuned)
        found = dict(ours.get_base_model().named_modules())
        errors = []
        for name, value in expected.items():
            module = found[name].get_base_layer()
            module = module.layer if isinstance(module, LinearView) else module
            quantizer = quantizer_of(module)
            errors.append(relative(quantizer.dequantize(quantizer.weights(module)[0], dtype=torch.float32), value))
        ours.base_model.unmerge_adapter()
        return max(errors) if errors else figures["rounding"]  # of methods that change float layers alone


def _changes_weights(model: nn.Module) -> bool:
    return any(isinstance(m, BaseTunerLayer) for m in model.get_base_model().modules())


def _tried(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except qft.QftError as error:
        return f"{type(error).__name__}: {error}"


def _codes(model: nn.Module) -> dict[str, Tensor]:
    """Codes, constants and biases of every quantized layer."""
    found = {}
    for i, module in enumerate(
        m for m in model.modules() if quantizer_of(m) is not None and not hasattr(m, "base_layer")
    ):
        for key, value in module.state_dict().items():
            found[f"{i}.{key}"] = value.clone()
    return found


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for _, p in sorted(_trainable(model).items()):
        p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))


@torch.no_grad()
def _share(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = _trainable(ours), _trainable(theirs)
    if mine.keys() != other.keys():
        raise RuntimeError(f"trainable are {sorted(mine.keys() ^ other.keys())[:4]} in one of them alone")
    for name, p in other.items():
        p.copy_(mine[name])
    if hasattr(ours, "prompt_encoder"):  # a cartridge has frozen parts, which start at random
        theirs.prompt_encoder.load_state_dict(ours.prompt_encoder.state_dict())


def _step(model: nn.Module, extra: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    out = logits(model, extra)
    torch.nn.functional.cross_entropy(out.flatten(0, 1), ids(4).flatten()).backward()
    gradients = {n: p.grad.clone() for n, p in _trainable(model).items() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return out.detach(), gradients


def _train(model: nn.Module, extra: dict[str, Any]) -> None:
    model.train()
    optimizer = torch.optim.SGD(_trainable(model).values(), lr=1e-3)
    for seed in (5, 6):
        torch.nn.functional.cross_entropy(logits(model, extra, seed).flatten(0, 1), ids(4).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def _round_trip(model: nn.Module, extra: dict[str, Any]) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        qft.save(model, folder, base=True)
        torch.manual_seed(99)
        return logits(qft.load(folder).eval(), extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="*", help="names of PeftType; default all")
    parser.add_argument("--quantizers", nargs="*", default=shipped())
    parser.add_argument("--resume", type=Path, help="an earlier file, whose other rows are kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = [PeftType[m] for m in args.methods] if args.methods else methods()
    runs = []
    for name in args.quantizers:
        started = time.time()
        bench = Bench(name)
        for kind in kinds:
            found = bench.cell(kind)
            runs.append({"method": kind.value, "quantizer": bench.spec, **found})
            said = found.get("what") or found.get("reason", "")
            print(f"{kind.value:24s} {bench.spec:24s} {found['status']:8s} {said[:150]}", flush=True)
            if found["status"] == "wrong":
                print("    ", found.get("errors"), flush=True)
        print(f"{name}: {time.time() - started:.0f} s", flush=True)
    if args.resume:
        mine = {(r["method"], r["quantizer"]) for r in runs}
        kept = json.loads(args.resume.read_text(encoding="utf-8"))["runs"]
        runs = sorted(
            runs + [r for r in kept if (r["method"], r["quantizer"]) not in mine], key=lambda r: r["quantizer"]
        )
    if args.out:
        args.out.write_text(json.dumps({**smollm.about(), "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

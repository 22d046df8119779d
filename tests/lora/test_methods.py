"""PEFT's methods besides LoRA over quantized weights, held against PEFT's own over a dequantized float copy."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers import refuses, unchanged
from models import batch, gpt2, llama, logits, relative
from peft import (
    AdaLoraConfig,
    C3AConfig,
    DeloraConfig,
    FrodConfig,
    GloraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    OSFConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from twins import dequantized_copy, gradient_error, loss_and_gradients, output_error

import qft
from qft.errors import BadOption, UnsupportedOperation
from qft.lora.tuners import BESIDE, OVER_VIEWS, REFUSED
from qft.lora.view import LinearView

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPECS = ["nf4", "fp4:double_quant=true", "int8", "reference", "gptq:group_size=32", "hqq:group_size=32"]
METHODS = {
    "AdaLoRA": AdaLoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"], init_r=6, target_r=4, tinit=1, tfinal=1, deltaT=1, total_step=6
    ),
    "VeRA": VeraConfig(target_modules=["q_proj", "o_proj"], r=8, d_initial=0.1),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(target_modules=["q_proj", "down_proj"], r=4),
    "OFT": OFTConfig(target_modules=["q_proj", "up_proj"], oft_block_size=4),
    "HRA": HRAConfig(target_modules=["q_proj"], r=4),
    "RandLoRA": RandLoraConfig(target_modules=["q_proj", "v_proj"], r=4),
    "C3A": C3AConfig(target_modules=["q_proj"], block_size=4),
    "DeLoRA": DeloraConfig(target_modules=["q_proj"], r=4),
    "FRoD": FrodConfig(target_modules=["q_proj"], progressbar=False),
}
OLD = ("AdaLoRA", "VeRA", "IA3")
PROMPT = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")


def adapters(model):
    return {k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}


def frozen(model):
    """Every tensor of the base by its own name, codes and constants included."""
    return {
        k: v.clone()
        for k, v in qft.core.transformers_quantizer.bare_state_dict(qft.core.record.base_model(model)).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def calibration(spec):
    needs = isinstance(spec, str) and qft.capabilities(spec).needs_calibration
    return {"calibration": [batch(seed, (8, 32)) for seed in range(4)]} if needs else {}


def quantized(spec, builder=llama):
    return qft.quantize(builder(), spec, progress=False, **calibration(spec))


def pair(spec, config, builder=llama):
    """A quantized model wrapped by qft, and PEFT's own over its dequantized float copy, with the same adapters."""
    model = quantized(spec, builder)
    twin = dequantized_copy(model, builder())
    torch.manual_seed(0)
    ours = qft.wrap(model, copy.deepcopy(config))
    torch.manual_seed(0)
    theirs = get_peft_model(twin, copy.deepcopy(config))
    state = adapters(theirs)
    assert state.keys() == get_peft_model_state_dict(ours).keys()
    set_peft_model_state_dict(ours, state)
    return ours.eval(), theirs.eval()


def move(*models, size=0.3):
    """The same random change to the trainable weights of each."""
    for model in models:
        generator = torch.Generator().manual_seed(0)
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.data += size * torch.randn(p.shape, generator=generator).to(p)
    return models[0]


def wrapped(spec="nf4", method="VeRA", builder=llama):
    return move(qft.wrap(quantized(spec, builder), copy.deepcopy(METHODS[method]))).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_method_is_what_it_is_over_floats(spec, method):
    ours, theirs = pair(spec, METHODS[method])
    assert output_error(ours, theirs) < 1e-5
    start = logits(ours)
    move(ours, theirs)
    assert relative(logits(ours), start) > 1e-3
    assert output_error(ours, theirs) < 1e-5
    y, mine = loss_and_gradients(ours)
    z, other = loss_and_gradients(theirs)
    assert mine and relative(y, z) < 1e-5
    assert gradient_error(mine, other) < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", ["nf4", "gptq:group_size=32", "int8"])
def test_what_is_merged_to_float_is_what_was_trained(spec, method):
    model = wrapped(spec, method)
    expected, base = logits(model), frozen(model)
    plain = qft.merge_to_float(model)
    assert relative(logits(plain), expected) < 1e-5
    assert not [m for m in plain.modules() if isinstance(m, BaseTunerLayer | LinearView)]
    assert {type(m) for m in plain.modules()} == {type(m) for m in llama().modules()}
    assert plain.merge_report.weights and plain.merge_report.survived == pytest.approx(1, abs=1e-3)
    assert torch.equal(logits(model), expected) and same(frozen(model), base)


@pytest.mark.parametrize(
    "config", [LilyConfig(target_modules=["q_proj"], r=4, num_B=2, stride_A=1), PROMPT], ids=["Lily", "prompt tuning"]
)
def test_a_method_that_is_in_no_weight_is_not_merged(config):
    model = qft.wrap(quantized("nf4"), config).eval()
    with refuses(UnsupportedOperation, "merge", model=model, outputs=False):
        qft.merge_to_float(model)


@pytest.mark.parametrize("method", OLD)
@pytest.mark.parametrize("spec", SPECS)
def test_a_method_trains_and_leaves_the_base_alone(spec, method):
    model = quantized(spec)
    base = frozen(model)
    wrapped = qft.wrap(qft.prepare_model_for_kbit_training(model), copy.deepcopy(METHODS[method]))
    start, losses = adapters(wrapped), []
    ids = 10 + (torch.arange(8)[:, None] + torch.arange(12)) % 6
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.2, weight_decay=0)
    wrapped.eval()(input_ids=ids)  # an evaluation first: on some CPUs bitsandbytes repacks its weights there
    wrapped.train()
    for step in range(6):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if method == "AdaLoRA":
            wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0], losses
    assert not same(adapters(wrapped), start)
    assert same(frozen(wrapped), base)


@pytest.mark.parametrize("base", [False, True], ids=["adapter", "with base"])
@pytest.mark.parametrize("method", ["VeRA", "IA3", "LoHa", "FRoD"])
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_a_method_round_trips(tmp_path, spec, method, base):
    model = move(qft.quantize_and_wrap(llama(), spec, adapter=copy.deepcopy(METHODS[method]), progress=False))
    expected = logits(model.eval())
    qft.save(model, tmp_path, base=base)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == METHODS[method].peft_type.value
    assert torch.equal(logits(qft.load(tmp_path, base=None if base else llama())), expected)


def test_every_layer_may_have_its_own_backend(tmp_path):
    spec = {"*.mlp.*": "reference", "*": "nf4"}
    ours, theirs = pair(spec, METHODS["IA3"])
    move(ours, theirs)
    assert output_error(ours, theirs) < 1e-5
    assert relative(logits(qft.merge_to_float(ours)), logits(ours)) < 1e-5


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_conv1d_layers_look_like_linears(spec):
    config = LoHaConfig(target_modules=["c_attn", "c_fc"], r=4)
    model = move(qft.wrap(quantized(spec, gpt2), copy.deepcopy(config))).eval()
    twin = dequantized_copy(quantized(spec, gpt2), gpt2())
    assert relative(logits(model), logits(twin)) > 1e-3
    with model.disable_adapter():
        assert relative(logits(model), logits(twin)) < 1e-5
    plain = qft.merge_to_float(model)
    assert relative(logits(plain), logits(model)) < 1e-5
    assert {type(m) for m in plain.modules()} == {type(m) for m in gpt2().modules()}


def test_all_linear_is_every_quantized_layer():
    model = qft.wrap(quantized("reference"), LoHaConfig(target_modules="all-linear", r=2))
    held = [m for m in model.modules() if isinstance(m, LinearView)]
    assert len(held) == 14 and all(isinstance(m, nn.Linear) for m in held)


def test_a_second_adapter_and_unloading():
    model = quantized("hqq:group_size=32")
    plain, kinds = logits(model), [type(m) for m in model.modules()]
    model = move(qft.wrap(model, copy.deepcopy(METHODS["LoHa"]))).eval()
    first = logits(model)
    model.add_adapter("second", LoHaConfig(target_modules=["q_proj", "up_proj"], r=2))
    model.set_adapter("second")
    move(model)
    assert relative(logits(model), first) > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert relative(logits(model), plain) < 1e-5
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), first)
    base = model.unload()
    assert [type(m) for m in base.modules()] == kinds and relative(logits(base), plain) < 1e-5
    assert torch.equal(logits(twin), first)


def test_codes_take_no_second_place_in_memory():
    model = quantized("reference")
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    wrapped = qft.wrap(model, copy.deepcopy(METHODS["IA3"]))
    trainable = sum(p.numel() * p.element_size() for p in wrapped.parameters() if p.requires_grad)
    assert sum(p.numel() * p.element_size() for p in wrapped.parameters()) == before + trainable
    assert qft.audit(wrapped).weights.keys() == qft.audit(quantized("reference")).weights.keys()


def test_a_view_cannot_be_written():
    model = wrapped()
    view = next(m for m in model.modules() if isinstance(m, LinearView))
    with unchanged(model):
        for write in (
            lambda: setattr(view.weight, "data", torch.zeros(64, 64)),
            lambda: setattr(view, "weight", nn.Parameter(torch.zeros(64, 64))),
        ):
            with pytest.raises(UnsupportedOperation, match="nothing was written"):
                write()
        with pytest.raises(UnsupportedOperation, match="nothing was written"):
            view.weight.data += 1


@pytest.mark.parametrize("spec", ["reference", "nf4", "int8"])
@pytest.mark.parametrize(
    "config",
    [GloraConfig(target_modules=["q_proj"], r=4), OSFConfig(target_modules=["q_proj"], effective_rank=4)],
    ids=lambda c: c.peft_type.value,
)
def test_a_method_that_is_not_right_is_refused(spec, config):
    says = (config.peft_type.value, REFUSED[config.peft_type.value], "LoRA works over every backend")
    model = llama()
    with refuses(UnsupportedOperation, *says, model=model):
        qft.quantize_and_wrap(model, spec, adapter=config, progress=False)
    model = quantized(spec)
    for put_on in (qft.wrap, get_peft_model):
        with refuses(UnsupportedOperation, *says, model=model):
            put_on(model, copy.deepcopy(config))


def test_a_mixture_of_methods_is_refused():
    model = quantized("nf4")
    with refuses(UnsupportedOperation, "mixed=True", model=model):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]), mixed=True)


def test_plain_peft_over_a_quantized_model_is_as_right():
    ours = move(get_peft_model(quantized("nf4"), copy.deepcopy(METHODS["VeRA"]))).eval()
    assert torch.equal(logits(ours), logits(wrapped()))


def test_weights_that_cannot_be_had_as_floats_are_refused(monkeypatch):
    model, blind = quantized("reference"), qft.Capabilities(bits=4, devices=frozenset({"cpu"}), dequantize=False)
    monkeypatch.setattr("qft.backends.reference.Reference.capabilities", property(lambda self: blind))
    with refuses(UnsupportedOperation, "VERA", "dequantize", model=model):
        qft.wrap(model, copy.deepcopy(METHODS["VeRA"]))
    assert qft.wrap(model, copy.deepcopy(PROMPT)).active_peft_config.peft_type == PROMPT.peft_type


def test_modules_trained_whole_are_not_quantized():
    model = llama()
    config = VeraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])
    with refuses(UnsupportedOperation, "down_proj", "quantized", model=model):
        qft.quantize_and_wrap(model, "nf4", adapter=config, progress=False)
    model = quantized("nf4")
    with refuses(UnsupportedOperation, "down_proj", "quantized", model=model):
        qft.wrap(model, config)


def test_a_method_that_checkpointing_breaks():
    model, config = llama(), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with refuses(BadOption, "use_gradient_checkpointing=False", model=model):
        qft.quantize_and_wrap(model, "nf4", adapter=config, progress=False)
    wrapped = qft.quantize_and_wrap(model, "nf4", adapter=config, use_gradient_checkpointing=False, progress=False)
    assert loss_and_gradients(wrapped)[1]


@pytest.mark.parametrize("put_on", [qft.wrap, get_peft_model])
def test_checkpointing_is_found_without_the_deprecated_property(put_on, monkeypatch):
    """transformers removes `is_gradient_checkpointing` in its version 6; until then, reading it warns."""
    config = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    if put_on is get_peft_model:  # PEFT itself handles prompts there; this one injects layers
        config = PolyConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=4, n_tasks=2, n_skills=2)
    model = qft.prepare_model_for_kbit_training(quantized("nf4"))
    monkeypatch.delattr(PreTrainedModel, "is_gradient_checkpointing", raising=False)
    with refuses(BadOption, "use_gradient_checkpointing=False", model=model):
        put_on(model, config)


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
@pytest.mark.parametrize(
    "config", [PROMPT, LNTuningConfig(target_modules=["ln_1"])], ids=["prompt tuning", "LN tuning"]
)
def test_a_method_without_weights_of_the_base_works_over_every_backend(spec, config):
    model = quantized(spec, gpt2)
    base = frozen(model)
    wrapped = qft.wrap(model, copy.deepcopy(config)).eval()  # without GPT-2's dropout
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    ids = 10 + (torch.arange(8)[:, None] + torch.arange(12)) % 6
    losses = []
    for _ in range(6):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0], losses
    after = frozen(model)
    assert all(torch.equal(after[k], v) for k, v in base.items() if "ln_1" not in k)


@pytest.mark.parametrize("method", OLD)
def test_an_init_is_for_lora_alone(method):
    model = llama()
    with pytest.raises(BadOption, match="LoRA"):
        qft.quantize_and_wrap(model, "nf4", adapter=METHODS[method], init="loftq", progress=False)
    assert not hasattr(model, "_qft")
    with pytest.raises(BadOption, match="LoRA"):
        qft.wrap(qft.quantize(model, "nf4", progress=False), METHODS[method], init="loftq", original=llama())


# ---- what was measured -----------------------------------------------------------------------------------


def measured():
    return json.loads((BENCHMARKS / "results" / "peft_methods-cpu.json").read_text())


def test_no_cell_is_wrong():
    cells = {(r["method"], r["quantizer"].partition(":")[0]): r["status"] for r in measured()["runs"]}
    expected = (
        "aqlm auto-round awq bitnet compressed-tensors eetq fp4 fp8 gguf gptq hqq inc int8 mxfp4 nf4 quanto reference "
    )
    assert {q for _, q in cells} >= set(f"{expected} sinq torchao".split())
    assert {m for m, _ in cells} == {k.value for k in peft.PeftType}
    assert set(cells.values()) == {"right", "refused"}
    assert {m for (m, _), s in cells.items() if s == "right"} == BESIDE | OVER_VIEWS | {"LORA"}
    assert {m for (m, _), s in cells.items() if s == "refused"} == REFUSED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["nf4", "quanto", "gptq"])
def test_a_sample_is_measured_anew(spec, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    found = importlib.util.spec_from_file_location("peft_methods", BENCHMARKS / "peft_methods.py")
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    bench = script.Bench(spec)
    kept = {r["method"]: r["status"] for r in measured()["runs"] if r["quantizer"] == bench.spec}
    for kind in ("LORA", "ADALORA", "VERA", "IA3", "BOFT", "PSOFT", "SHIRA", "POLY", "PREFIX_TUNING", "GLORA"):
        cell = bench.cell(peft.PeftType[kind])
        assert cell["status"] == kept[kind], (kind, cell)

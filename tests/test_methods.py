"""PEFT's methods besides LoRA over bitsandbytes, held against PEFT's own over a dequantized float copy."""

import copy
import json

import pytest
import torch
from models import gpt2, llama, logits, relative
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, PromptTuningConfig, VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from twins import dequantized_copy, gradient_error, loss_and_gradients, output_error

import qft
from qft.errors import BadOption, UnsupportedOperation

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
SPECS = ["nf4", "fp4:double_quant=true", "int8"]
METHODS = {
    "AdaLoRA": AdaLoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"], init_r=6, target_r=4, tinit=1, tfinal=1, deltaT=1, total_step=6
    ),
    "VeRA": VeraConfig(target_modules=["q_proj", "o_proj"], r=8, d_initial=0.1),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def adapters(model):
    return {k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}


def frozen(model):
    """Every tensor of the base by its own name, codes and constants included."""
    own = ("lora_", "ia3_", "vera_", "ranknum")
    return {
        k.replace(".base_layer", ""): v.clone() for k, v in model.state_dict().items() if not any(o in k for o in own)
    }


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def pair(spec, config):
    """A quantized model wrapped by qft, and PEFT's own over its dequantized float copy, with the same adapters."""
    model = llama()
    twin = copy.deepcopy(model)
    qft.quantize(model, spec, progress=False)
    dequantized_copy(model, twin)
    ours, theirs = qft.wrap(model, copy.deepcopy(config)), get_peft_model(twin, copy.deepcopy(config))
    state = adapters(theirs)
    assert state.keys() == get_peft_model_state_dict(ours).keys()
    set_peft_model_state_dict(ours, state)
    return ours.eval(), theirs.eval()


def move(*models):
    """The same random change to the trainable weights of each."""
    for model in models:
        generator = torch.Generator().manual_seed(0)
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.data += 0.3 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_method_is_what_it_is_over_floats(spec, method):
    ours, theirs = pair(spec, METHODS[method])
    with ours.disable_adapter():  # at their start these methods change nothing
        start = logits(ours)
    # LLM.int8()'s own forward quantizes activations
    exact = 0.03 if spec == "int8" else 1e-5
    assert relative(logits(ours), start) < 1e-5 and output_error(ours, theirs) < exact
    move(ours, theirs)
    assert relative(logits(ours), start) > 0.1
    assert output_error(ours, theirs) < exact
    y, mine = loss_and_gradients(ours)
    z, other = loss_and_gradients(theirs)
    assert mine and relative(y, z) < exact
    assert gradient_error(mine, other) < 10 * exact


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_method_trains_and_leaves_the_base_alone(spec, method):
    model = qft.quantize(llama(), spec, progress=False)
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
    assert same(frozen(model), base)


@pytest.mark.parametrize("method", ["VeRA", "IA3"])
def test_a_method_round_trips(tmp_path, method):
    model = qft.quantize_and_wrap(llama(), "nf4", adapter=METHODS[method], progress=False)
    move(model)
    expected = logits(model.eval())
    qft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == METHODS[method].peft_type.value
    assert torch.equal(logits(qft.load(tmp_path, base=llama())), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", ["reference", {"*.mlp.*": "reference", "*": "nf4"}], ids=["reference", "mixed"])
def test_a_method_over_another_backend_is_refused(spec, method):
    model = llama()
    before = logits(model)
    with pytest.raises(UnsupportedOperation, match="bitsandbytes"):
        qft.quantize_and_wrap(model, spec, adapter=METHODS[method], progress=False)
    assert torch.equal(logits(model), before) and not hasattr(model, "_qft")
    model = qft.quantize(model, spec, progress=False)
    before = logits(model)
    with pytest.raises(UnsupportedOperation, match="bitsandbytes"):
        qft.wrap(model, METHODS[method])
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), LNTuningConfig(target_modules=["ln_1"])],
    ids=["prompt tuning", "LN tuning"],
)
def test_a_method_without_weights_of_the_base_works_over_every_backend(spec, config):
    model = qft.quantize(gpt2(), spec, progress=False)
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


@pytest.mark.parametrize("method", METHODS)
def test_an_init_is_for_lora_alone(method):
    model = llama()
    with pytest.raises(BadOption, match="LoRA"):
        qft.quantize_and_wrap(model, "nf4", adapter=METHODS[method], init="loftq", progress=False)
    assert not hasattr(model, "_qft")
    with pytest.raises(BadOption, match="LoRA"):
        qft.wrap(qft.quantize(model, "nf4", progress=False), METHODS[method], init="loftq", original=llama())

"""torch.compile by the caller or by a trainer, over wrapped, merged and optimized models."""

import copy
import warnings

import pytest
import torch
from foreign import LORA
from models import llama, relative
from peft import LoraConfig
from torch import nn

import qft
from qft.optimize.optimize import switches

BACKEND = "eager"
"""What breaks is found by tracing; the operator's own backward pass is compiled in small models below."""
LORA_ALL = LoraConfig(r=4, target_modules="all-linear")
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def fast_compiler(monkeypatch):
    monkeypatch.setattr(switches, "backend", BACKEND)
    torch._dynamo.reset()


def wrapped(spec="nf4"):
    model = qft.quantize_and_wrap(llama(num_hidden_layers=1), spec, adapter=LORA, progress=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model


def step(model):
    """The loss and the gradients of one step."""
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    inner = getattr(model, "_orig_mod", model)
    grads = {n: p.grad.clone() for n, p in inner.named_parameters() if p.grad is not None}
    inner.zero_grad()
    return float(loss.detach()), grads


def check_step(model, wanted):
    loss, grads = step(model)
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    assert grads.keys() == wanted[1].keys() and grads
    assert all(relative(g, wanted[1][n]) < 1e-4 for n, g in grads.items())


def compiled(model):
    return torch.compile(model, backend=BACKEND)


def compiled_in_place(model):
    model.compile(backend=BACKEND)
    return model


def blocks_compiled(model):
    for block in model.base_model.model.model.layers:
        block.compile(backend=BACKEND)
    return model


@pytest.mark.parametrize(
    ("way", "first"),
    [(compiled, "optimize"), (compiled, "compile"), (compiled_in_place, "optimize"), (blocks_compiled, "optimize")],
)
def test_an_optimized_model_compiled_by_the_caller(way, first):
    model = wrapped()
    wanted = step(model)
    if first == "optimize":
        model = way(qft.optimize_training(model))
    else:
        compiled_one = way(model)
        qft.optimize_training(model)
        model = compiled_one
    with pytest.warns(qft.QftWarning, match="superfluous"):
        check_step(model, wanted)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_step(model, wanted)
    assert not [w for w in found if "superfluous" in str(w.message) and "LlamaForCausalLM" in str(w.message)]
    inner = getattr(model, "_orig_mod", model)
    with torch.no_grad():
        y = copy.deepcopy(inner).eval()(IDS).logits if way is not compiled_in_place else None
        z = model.eval()(IDS).logits
    qft.unoptimize(inner)
    with torch.no_grad():
        plain = inner.eval()(IDS).logits
    assert relative(z, plain) < 1e-5 and (y is None or relative(y, plain) < 1e-5)
    check_step(model, wanted)


@pytest.mark.parametrize("spec", ["nf4", "int8", "hqq", "torchao", "reference"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_merged_or_wrapped_model_compiled_by_the_caller(spec, merged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model = qft.wrap(qft.quantize(model, spec, progress=False), LORA_ALL)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    if merged:
        qft.merge(model.eval())  # in training mode a merged adapter is refused
    x = torch.randn(5, 64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    wanted, x.grad = x.grad, None
    again = torch.compile(model, backend="aot_eager")(x)
    again.square().sum().backward()
    assert relative(again, y) < 1e-5 and relative(x.grad, wanted) < 1e-4


def test_a_trainer_that_compiles_an_optimized_model(tmp_path):
    from transformers import Trainer, TrainingArguments

    losses = []
    for compiles in (False, True):
        model = qft.optimize_training(wrapped())
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        options = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
            torch_compile=compiles, torch_compile_backend=BACKEND if compiles else None, use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        losses.append(Trainer(model=model, args=options, train_dataset=rows).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

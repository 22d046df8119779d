"""Models made, changed or run under inference mode, and used in the other mode afterwards."""

import copy

import pytest
import torch
from models import llama, relative
from peft import LoraConfig
from torch import nn

import qft
from qft.core.modes import normal_mode, without_inference_tensors

SPECS = [
    "nf4", "fp4", "int8", "hqq", "torchao", "torchao:format=int,bits=4", "torchao:format=float8", "quanto",
    "quanto:format=int4", "gptq", "awq", "aqlm:rounds=1,beam=1", "eetq", "inc", "fp8", "mxfp4", "bitnet",
    "compressed-tensors", "gguf", "auto-round", "sinq", "reference", "reference:format=int",
]  # fmt: skip
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SPECS)
def spec(request):
    info = qft.available_quantizers()[request.param.partition(":")[0]]
    if info.state != "ready":
        pytest.skip(info.hint)
    return request.param


def quantized(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64, bias=False))
    needs = qft.capabilities(spec).needs_calibration
    return qft.quantize(model, spec, calibration=[{"input": X}] if needs else None, progress=False)


def wrapped(spec):
    model = qft.wrap(quantized(spec), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.eval()


def check_trains(model):
    model.train()
    model(X).square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert grads and all(g is not None and g.isfinite().all() and g.any() for g in grads)
    model.zero_grad()
    model.eval()


def test_runs_in_inference_mode_and_trains_after(spec):
    model = wrapped(spec)
    with torch.no_grad():
        y = model(X)
    with torch.inference_mode():
        inside = [model(X) for _ in range(2)]
        with model.disable_adapter():
            model(X)
        again = copy.deepcopy(model)(X)
        model.train()(X)
        model.eval()
    assert all(relative(z.clone(), y) < 1e-6 for z in (*inside, again))
    check_trains(model)


def test_made_in_inference_mode_trains_and_merges_after(spec):
    with torch.inference_mode():
        model = wrapped(spec)
        y = model(X).clone()
    check_trains(model)
    with torch.no_grad():
        assert relative(model(X), y) < 1e-6
        if qft.capabilities(spec).merge_to_quantized:
            qft.merge(model)
            qft.unmerge(model)
            assert torch.equal(model(X), model(X)) and relative(model(X), y) < 1e-6
    check_trains(copy.deepcopy(model))


def test_merged_in_inference_mode(spec):
    model = wrapped(spec)
    with torch.no_grad():
        y = model(X)
    with torch.inference_mode():
        floats = qft.merge_to_float(model)
        assert relative(floats(X), y) < 1e-5
        if qft.capabilities(spec).merge_to_quantized:
            qft.merge(model)
            qft.unmerge(model)
            qft.merge(model)
    qft.unmerge(model)
    with torch.no_grad():
        assert torch.equal(model(X), y)
    check_trains(model)
    floats.requires_grad_(True)(X).sum().backward()


def test_saved_and_loaded_in_inference_mode(spec, tmp_path):
    if not qft.capabilities(spec).serializable:
        pytest.skip("its models cannot be saved")
    model = wrapped(spec)
    with torch.no_grad():
        y = model(X)
    with torch.inference_mode():
        qft.save(model, tmp_path / "adapter")
        loaded = qft.load(tmp_path / "adapter", quantized(spec), is_trainable=True).eval()
    with torch.no_grad():
        assert relative(loaded(X), y) < 1e-6
    check_trains(loaded)


@pytest.mark.parametrize("spec", ["nf4", "reference:format=int"])
@pytest.mark.parametrize("init", [None, "loftq", qft.LoftQ(2), "pissa"])
def test_a_float_model_made_in_inference_mode(spec, init):
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        model = llama()
    tuned = qft.quantize_and_wrap(model, spec, init=init, progress=False)
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    with torch.inference_mode():
        tuned = qft.quantize_and_wrap(llama(), spec, init=init, progress=False)
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_a_folder_loaded_in_inference_mode_and_a_transfer(tmp_path):
    ids = torch.arange(12).view(2, 6)
    llama().save_pretrained(tmp_path)
    with torch.inference_mode():
        model = qft.quantize_and_wrap(tmp_path, "nf4", progress=False)
        moved = qft.transfer(model, "reference", original=llama(), progress=False)
    for tuned in (model, moved):
        tuned.train()(input_ids=ids, labels=ids).loss.backward()


def test_normal_mode_is_left_again_and_nests():
    @normal_mode()
    def inside(depth):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        return inside(depth - 1) if depth else torch.ones(1)

    with torch.inference_mode():
        assert not inside(2).is_inference()
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    with torch.inference_mode():
        layer = nn.BatchNorm1d(4)
        layer.tied = layer.weight
    without_inference_tensors(layer)
    assert layer.tied is layer.weight and not any(t.is_inference() for t in layer.state_dict().values())

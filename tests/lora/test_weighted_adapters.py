"""`add_weighted_adapter` is the weighted sum of its parts, or is refused; what it makes is saved and loaded."""

import copy

import pytest
import torch
from helpers import refuses
from models import llama, logits, relative
from peft import LoraConfig

import qft
from qft.errors import UnsupportedOperation

WEIGHTS = [0.7, 0.5]


def pair(spec="reference", **options):
    first = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
    model = qft.quantize_and_wrap(llama(), spec, adapter=first, progress=False)
    model.add_adapter("second", copy.deepcopy(first))
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def summed(model):
    """A float twin with the sum of both updates and biases added to its weights."""
    twin = copy.deepcopy(model).unload()
    twin = qft.merge_to_float(twin)
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        with torch.no_grad():
            linear = twin.get_submodule(name)
            for adapter, weight in zip(("default", "second"), WEIGHTS):
                linear.weight += weight * layer.get_delta_weight(adapter)
                bias = layer.lora_B[adapter].bias
                if bias is not None:
                    extra = weight * layer.scaling[adapter] * bias
                    linear.bias = torch.nn.Parameter(extra.clone() if linear.bias is None else linear.bias + extra)
    return twin


OPTIONS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "all of them": {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "lora_bias": True},
}


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spec", ["reference", "nf4"])
def test_the_sum_of_two_adapters(tmp_path, spec, options, kind):
    model = pair(spec, **OPTIONS[options])
    expected = logits(summed(model))
    exact = {"svd_rank": 8, "svd_clamp": None} if kind == "svd" else {}
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type=kind, **exact)
    model.set_adapter("sum")
    assert relative(logits(model), expected) < 1e-4
    if "lora_bias" not in OPTIONS[options]:
        assert relative(logits(qft.merge_to_float(model)), expected) < 1e-4
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = qft.load(tmp_path / "sum", base=qft.quantize(llama(), spec, progress=False))
    assert relative(logits(again.eval()), logits(model)) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear"])
def test_other_combinations_scale_rslora_once(tmp_path, kind):
    plain, stabilised = pair(), pair(use_rslora=True)
    options = {"combination_type": kind} | ({} if kind == "linear" else {"density": 1.0})
    for model in (plain, stabilised):
        model.add_weighted_adapter(["default"], [1.0], "one", **options)
        before = logits(model)
        model.set_adapter("one")
        assert relative(logits(model), before) < 1e-5
        model.save_pretrained(tmp_path, selected_adapters=["one"])
        again = qft.load(tmp_path / "one", base=qft.quantize(llama(), "reference", progress=False))
        assert relative(logits(again.eval()), before) < 1e-5


def test_what_is_not_a_sum_is_refused():
    for options, says in (
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ):
        model = pair(**options)
        for kind in ("cat", "linear", "svd"):
            with refuses(UnsupportedOperation, says, model=model):
                model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type=kind)
        assert "sum" not in model.peft_config
    model = pair(lora_bias=True)
    with refuses(UnsupportedOperation, "lora_bias", model=model):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="ties", density=0.5)


def test_rank_patterns_of_embeddings_are_saved(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 2})
    model = qft.quantize_and_wrap(llama(), "reference", adapter=config, progress=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.add_(0.1 * torch.randn_like(p))
    before = logits(model.eval())
    model.add_weighted_adapter(["default"], [1.0], "one", combination_type="linear")
    model.set_adapter("one")
    assert relative(logits(model), before) < 1e-5
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    again = qft.load(tmp_path / "one", base=qft.quantize(llama(), "reference", progress=False))
    assert relative(logits(again.eval()), before) < 1e-5

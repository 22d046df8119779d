"""PEFT's methods besides LoRA merged into quantized weights: the report, the outputs, and the way back."""

import copy
import pickle

import pytest
import torch
from helpers import refuses
from models import gpt2, llama, logits, relative
from peft import BeftConfig, IA3Config, LilyConfig, LoHaConfig, MissConfig, ShiraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from test_methods import METHODS, PROMPT, frozen, move, quantized, same

import qft
from qft.errors import BadOption, NonFiniteWeights, UnsupportedOperation
from qft.lora.view_merging import ViewMerging

MORE = METHODS | {
    "MiSS": MissConfig(target_modules=["q_proj", "down_proj"], r=4),
    "SHiRA": ShiraConfig(target_modules=["q_proj", "up_proj"], r=4),
}
SPECS = ["nf4", "int8", "reference:format=int,bits=8", "gptq:group_size=32", "hqq:group_size=32"]


def tuned(spec="nf4", method="VeRA", builder=llama):
    return move(qft.wrap(quantized(spec, builder), copy.deepcopy(MORE[method]))).eval()


@pytest.mark.parametrize("method", MORE)
@pytest.mark.parametrize("spec", SPECS)
def test_a_merge_stores_what_peft_makes_of_the_float_weight(spec, method):
    model = tuned(spec, method)
    before, base, wanted = logits(model), frozen(model), qft.merge_to_float(model)
    report = qft.merge(model)
    assert report.route == "quantized" and report.weights.keys() == wanted.merge_report.weights.keys()
    for name in report.weights:
        layer = model.get_base_model().get_submodule(name)
        view = layer.get_base_layer()
        stored = view.dequantized(torch.float32)
        twin = copy.deepcopy(view.layer)
        view.quantizer.requantize(view.quantizer.weights(twin)[0], wanted.get_submodule(name).weight.detach().float())
        again = view.quantizer.dequantize(view.quantizer.weights(twin)[0], dtype=torch.float32)
        assert relative(stored, again) < 1e-2, name
    rounded = relative(logits(model), before)
    assert rounded < (0.12 if "8" in spec else 1.0)
    assert relative(logits(qft.merge_to_float(model)), logits(model)) < 1e-5
    qft.unmerge(model)
    assert same(frozen(model), base) and torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["OFT", "VeRA", "IA3"])
def test_eight_bits_keep_the_update(method):
    model = tuned("reference:format=int,bits=8", method)
    report = qft.merge(model)
    assert report.survived == pytest.approx(1, abs=0.05) and report.relative_error < 0.01
    assert "keep this merge" in report.recommendation


@pytest.mark.parametrize("method", ["OFT", "AdaLoRA", "FRoD", "IA3"])
def test_pefts_own_verbs_merge(method):
    model = tuned("nf4", method)
    before, base = logits(model), frozen(model)
    twin = copy.deepcopy(model)
    qft.merge(twin)
    merged = logits(twin)
    model.merge_adapter()
    assert torch.equal(logits(model), merged)
    with model.disable_adapter():
        assert relative(logits(model), merged) > 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model), before) and same(frozen(model), base)
    with pytest.warns(qft.QftWarning, match="survived the rounding"):
        plain = model.merge_and_unload()
    assert torch.equal(logits(plain), merged)
    assert not [m for m in plain.modules() if isinstance(m, BaseTunerLayer)]
    assert {type(m) for m in plain.modules()} == {type(m) for m in quantized("nf4").modules()}


def test_biases_are_merged_and_come_back():
    config = IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])
    model = move(qft.wrap(quantized("reference:format=int,bits=8", gpt2), config)).eval()
    before, base = logits(model), frozen(model)
    qft.merge(model)
    assert relative(logits(model), before) < 0.05
    qft.unmerge(model)
    assert torch.equal(logits(model), before) and same(frozen(model), base)


def test_two_adapters_are_merged_in_turn():
    model = tuned("reference:format=int,bits=8", "LoHa")
    model.add_adapter("second", LoHaConfig(target_modules=["q_proj", "up_proj"], r=2))
    model.base_model.set_adapter(["default", "second"])
    move(model)
    both, base = logits(model), frozen(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["default", "second"])
    assert relative(logits(model), both) < 0.05
    layer = next(m for m in model.modules() if isinstance(m, ViewMerging) and len(m.merged_adapters) == 2)
    assert layer.merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert same(frozen(model), base) and torch.equal(logits(model), both)


def test_a_report_with_data():
    model = tuned("reference:format=int,bits=8", "OFT")
    report = qft.merge(model, data=[torch.arange(16)[None]])
    assert report.drift is not None and report.drift.kl < 0.05
    with pytest.raises(BadOption, match="unmerge"):
        qft.merge(model, data=[torch.arange(16)[None]])


def test_what_cannot_be_merged_is_refused_before_anything_changes(monkeypatch):
    fixed = qft.Capabilities(bits=4, devices=frozenset({"cpu"}), requantize=False)
    model = tuned("nf4", "OFT")
    for merge in (qft.merge, qft.merge_to_float):
        with refuses(UnsupportedOperation, "original=", model=model):
            merge(model, original=llama())
    last = [m for m in model.modules() if isinstance(m, ViewMerging)][-1]
    next(p for p in last.parameters() if p.requires_grad).data.fill_(float("nan"))
    for merge in (qft.merge, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()):
        with refuses(NonFiniteWeights, model=model, outputs=False):
            merge(model)
    for config in (
        LilyConfig(target_modules=["q_proj"], r=4, num_B=2, stride_A=1),
        PROMPT,
        BeftConfig(target_modules=["q_proj"]),
    ):
        model = qft.wrap(quantized("nf4"), config).eval()
        with refuses(UnsupportedOperation, "merge", model=model, outputs=False):
            qft.merge(model)
    model = tuned("reference", "OFT")
    monkeypatch.setattr("qft.backends.reference.Reference.capabilities", property(lambda self: fixed))
    with refuses(UnsupportedOperation, "merge_to_quantized", model=model):
        qft.merge(model)


def test_saving_while_merged_is_refused(tmp_path):
    model = tuned("nf4", "LoHa")
    qft.merge(model)
    with pytest.raises(BadOption, match="unmerge"):
        qft.save(model, tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_merge_on_their_own(merged):
    model = tuned("reference:format=int,bits=8", "OFT")
    before = logits(model)
    if merged:
        qft.merge(model)
    expected = logits(model)
    layer = next(m for m in model.modules() if isinstance(m, ViewMerging))
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer) and again.merged == merged
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    qft.unmerge(twin) if merged else qft.merge(twin)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(twin), before) == merged


def test_an_export_of_a_merged_model_is_what_runs(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tuned("nf4", "OFT")
    qft.merge(model)
    qft.export(model, tmp_path)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model)) < 1e-5


@pytest.mark.parametrize("method", ["AdaLoRA", "RandLoRA"])
def test_methods_whose_layers_look_like_loras_are_saved(tmp_path, method):
    model = tuned("reference", method)
    qft.save(model, tmp_path)
    assert torch.equal(logits(qft.load(tmp_path, base=llama()).eval()), logits(model))

"""An adapter is held against the codes of the base that it is loaded over, not against its options alone."""

import copy
import json
import warnings

import pytest
import torch
from helpers import refuses
from models import batch, llama, logits, qwen3_moe, relative
from peft import LoraConfig

import qft
from qft.core.codes import codes_difference, codes_fingerprint
from qft.errors import AdapterMismatch

SPECS = ["nf4", "int8", "hqq:group_size=32", "reference", "torchao", "quanto"]


def adapted(base):
    model = qft.wrap(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def quantized(spec, seed=0):
    needs = qft.capabilities(spec).needs_calibration
    options = {"calibration": [batch(seed + i, (8, 32)) for i in range(4)]} if needs else {}
    return qft.quantize(llama(), spec, progress=False, **options)


@pytest.mark.parametrize("spec", ["gptq:group_size=32", "awq:group_size=32"])
def test_other_calibration_data_is_said_with_the_difference(tmp_path, spec):
    model = adapted(quantized(spec))
    qft.save(model, tmp_path)
    other = quantized(spec, seed=50)
    difference = codes_difference(codes_fingerprint(model.get_base_model()), codes_fingerprint(other))
    assert difference > 1e-3
    with pytest.warns(qft.QftWarning, match=f"other codes.*{difference:.1%}"):
        qft.load(tmp_path, base=other)
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        again = qft.load(tmp_path, base=quantized(spec))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("spec", SPECS)
def test_a_base_with_another_adapter_in_it_is_refused(tmp_path, spec):
    model = adapted(quantized(spec))
    qft.save(model, tmp_path)
    other = adapted(quantized(spec))
    with pytest.warns(qft.QftWarning, match="survived"):
        merged = other.merge_and_unload()
    with refuses(AdapterMismatch, "merged into it", model=merged):
        qft.load(tmp_path, base=merged)
    again = adapted(merged)  # and the other way round
    expected = logits(again)
    again.save_pretrained(tmp_path / "over merged")
    with refuses(AdapterMismatch, "merged into it"):
        qft.load(tmp_path / "over merged", base=quantized(spec))
    with refuses(AdapterMismatch, "qft.save"):
        qft.load(tmp_path / "over merged", base=llama())
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_a_merged_base_that_comes_from_files_is_measured(tmp_path, spec):
    model = adapted(quantized(spec))
    qft.save(model, tmp_path / "adapter")
    with pytest.warns(qft.QftWarning, match="survived"):
        merged = adapted(quantized(spec)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with pytest.warns(qft.QftWarning, match="other codes"):
        qft.load(tmp_path / "adapter", base=tmp_path / "merged")


@pytest.mark.parametrize("spec", [*SPECS, "fp8", "mxfp4", "sinq:group_size=32", "bitnet"])
def test_the_same_base_has_the_same_fingerprint(tmp_path, spec):
    model = adapted(quantized(spec))
    qft.save(model, tmp_path, base=qft.capabilities(spec).serializable)
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        for base in (quantized(spec), copy.deepcopy(model).unload(), llama()):
            assert relative(logits(qft.load(tmp_path, base=base)), logits(model)) < 1e-6
    note = json.loads((tmp_path / "qft.json").read_text())
    assert len(note["codes"]) == len(note["layers"])


def test_the_difference_is_measured():
    one = quantized("reference:format=int,bits=8")
    other = copy.deepcopy(one)
    layer = other.get_submodule("model.layers.0.mlp.up_proj")
    quantizer = layer.quantizer
    handle = quantizer.weights(layer)[0]
    weight = quantizer.dequantize(handle, dtype=torch.float32)
    change = 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    quantizer.requantize(handle, weight + change)
    real = (quantizer.dequantize(handle, dtype=torch.float32) - weight).norm() / weight.norm()
    a, b = ({"w": codes_fingerprint(m)["model.layers.0.mlp.up_proj"]} for m in (one, other))
    assert codes_difference(a, b) == pytest.approx(float(real), rel=0.5)
    assert codes_difference(a, a) == 0


def test_an_older_note_without_codes_loads_as_before(tmp_path):
    model = adapted(quantized("nf4"))
    qft.save(model, tmp_path)
    path = tmp_path / "qft.json"
    note = json.loads(path.read_text())
    del note["codes"]
    path.write_text(json.dumps(note))
    assert torch.equal(logits(qft.load(tmp_path, base=quantized("nf4"))), logits(model))


@pytest.mark.parametrize(
    "spec", ["nf4", "fp4:double_quant=true", "int8", "hqq:group_size=32", "reference", "torchao", "quanto"]
)
@pytest.mark.parametrize("strict", [True, False])
def test_another_models_state_is_loaded_with_its_scales_or_refused(spec, strict):
    one, other = quantized(spec), qft.quantize(llama(seed=7), spec, progress=False)
    expected = logits(other)
    try:
        one.load_state_dict(other.state_dict(), strict=strict)
    except (qft.QftError, RuntimeError):
        assert torch.equal(logits(one), logits(quantized(spec)))
        return
    assert relative(logits(one), expected) < 1e-6


STATES = [
    ("nf4:block_size=64", "nf4:block_size=128"),  # blocks that cross rows
    ("nf4", "fp4"),
    ("nf4:double_quant=true", "nf4:double_quant=false"),
    ("int8", "int8"),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("spec, of", STATES)
def test_a_model_that_ran_takes_over_a_state(spec, of, assign):
    one, other = quantized(spec), qft.quantize(llama(seed=7), of, progress=False)
    logits(one)
    expected = logits(other)
    one.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(logits(one), expected)


@pytest.mark.parametrize("spec", ["nf4", "int8"])
def test_codes_without_scales_and_floats_are_refused(spec):
    one, other = quantized(spec), qft.quantize(llama(seed=7), spec, progress=False)
    layer, source = (m.get_submodule("model.layers.0.self_attn.q_proj") for m in (one, other))
    before = one.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    for state in ({"weight": source.state_dict()["weight"]}, {"weight": torch.randn(layer.weight.shape)}):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="scales"):
                layer.load_state_dict(state, strict=strict)
            assert torch.equal(layer.state_dict()["weight"], before)


def test_experts_count(tmp_path):
    target = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])

    def tuned():
        model = qft.quantize_and_wrap(qwen3_moe(), "reference", adapter=copy.deepcopy(target), progress=False).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        return model

    model = tuned()
    qft.save(model, tmp_path)
    assert torch.equal(logits(qft.load(tmp_path, base=qwen3_moe())), logits(model))
    with pytest.warns(qft.QftWarning, match="survived"):
        merged = tuned().merge_and_unload()
    with refuses(AdapterMismatch, "merged into it", model=merged):
        qft.load(tmp_path, base=merged)


@pytest.mark.parametrize("expert", range(4))
def test_one_changed_expert_is_seen(expert):
    one = qft.quantize(qwen3_moe(), "reference", progress=False)
    before = codes_fingerprint(one)
    stack = one.get_submodule("model.layers.1.mlp.experts.down_proj")
    codes = stack.packed["qweight"].data
    codes[expert] = codes[expert].flip(0)
    assert codes_difference(before, codes_fingerprint(one)) > 0.01

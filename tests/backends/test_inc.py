"""INC: codes and floats against its own, models that it quantized, training over both, refusals."""

import gc
import logging
import os

import pytest
import torch
from helpers import refuses, run_python
from models import batch, llama, logits, relative, train_a_little
from peft import LoraConfig
from torch import nn
from twins import both_errors, pair

import qft
from qft.backends.inc import INC
from qft.testing import check_quantizer

pytest.importorskip("neural_compressor", reason="pip install neural-compressor-pt")

SPECS = [
    "inc",
    "inc:bits=3,group_size=32,symmetric=false",
    "inc:bits=8,group_size=32,symmetric=false",
    "inc:method=nf4",
    "inc:method=gptq,group_size=32",
    "inc:method=gptq,act_order=true,symmetric=false",
    "inc:method=awq,group_size=32",
    "inc:method=hqq,group_size=64",
    "inc:method=fp8",
]
MERGED = [spec for spec in SPECS if "fp8" not in spec]
DATA = [batch(seed, (4, 24)) for seed in range(40, 44)]


def quantized(spec, model=None, **options):
    needs = qft.capabilities(spec).needs_calibration
    options |= {"calibration": torch.cat(DATA)} if needs else {}
    return qft.quantize(llama() if model is None else model, spec, progress=False, **options)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(s, marks=pytest.mark.slow) if "hqq" in s else s  # INC collects garbage at every weight
        for s in [*SPECS, "inc:bits=5,group_size=-1", "inc:method=hqq,bits=3,group_size=32"]
    ],
)
def test_conformance(spec):
    check_quantizer(qft.get_quantizer(spec), max_error=0.04 if "fp8" in spec else None)


# ---- against INC itself ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet():
    """INC logs every step, and collects garbage at each: seconds a layer once this many packages are imported."""
    logging.disable(logging.WARNING)
    gc.freeze()
    yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)


def inc():
    from neural_compressor.torch import quantization

    return quantization


def by_inc(config, model=None):
    model = llama() if model is None else model
    return inc().convert(inc().prepare(model, config))


def by_awq(**options):
    model = inc().prepare(llama(), inc().AWQConfig(bits=4, group_size=32, **options), example_inputs=DATA[0])
    for ids in DATA:
        model(ids)
    return inc().convert(model)


def by_gptq(folder, **options):
    model = llama()
    model.config.use_cache = False
    config = inc().GPTQConfig(bits=4, group_size=32, model_path=str(folder), **options)
    model.name_or_path = str(folder)
    model = inc().prepare(model, config)
    for ids in DATA:
        model(ids)
    return inc().convert(model)


def by_fp8(folder, model=None, data=DATA, **options):
    model = llama() if model is None else model
    options = {"use_qdq": True, "scale_method": "maxabs_pow2", "observer": "maxabs", **options}
    config = inc().FP8Config(
        dump_stats_path=f"{folder}/stats", blocklist={"names": ["lm_head"], "types": []}, **options
    )
    model = inc().prepare(model, config)
    for ids in data:
        model(**ids) if isinstance(ids, dict) else model(ids)
    inc().finalize_calibration(model)
    return inc().convert(model)


def floats(model):
    """Every quantized weight as INC gives it, by layer name."""
    return {n: m.recover() for n, m in model.named_modules() if type(m).__name__ == "INCWeightOnlyLinear"}


RTN = {
    "inc:group_size=32": {"bits": 4, "group_size": 32},
    "inc:group_size=32,symmetric=false": {"bits": 4, "group_size": 32, "use_sym": False},
    "inc:bits=3,group_size=32,symmetric=false": {"bits": 3, "group_size": 32, "use_sym": False},
    "inc:bits=8,group_size=-1": {"bits": 8, "group_size": -1},
    "inc:method=nf4,group_size=32": {"dtype": "nf4", "group_size": 32},
}


@pytest.mark.parametrize("spec", RTN)
def test_codes_and_floats_are_those_of_inc(spec):
    theirs = by_inc(inc().RTNConfig(**RTN[spec]))
    expected = floats(theirs)
    ours = quantized(spec)
    adopted = qft.audit(theirs)
    assert len(expected) == 14 and adopted is not None
    for name, value in expected.items():
        mine, his = ours.get_submodule(name), theirs.get_submodule(name)
        assert mine.packed.keys() == his.packed.keys() and his.bias is None
        assert all(torch.equal(mine.packed[n], his.packed[n]) for n in mine.packed)
        assert torch.equal(mine.dequantized(value.dtype), value)
    assert qft.core.registry.quantizer_of(his) == qft.get_quantizer(spec)


def test_hqq_is_that_of_inc():
    theirs = by_inc(inc().HQQConfig(bits=4, group_size=32, quant_zero=False))
    layers = {n: m.dequantize_weight() for n, m in theirs.named_modules() if type(m).__name__ == "HQQLinear"}
    ours = quantized("inc:method=hqq,group_size=32")
    qft.audit(theirs)
    for name, value in layers.items():
        for model in (ours, theirs):
            assert torch.equal(model.get_submodule(name).dequantized(value.dtype), value)


def test_hqq_with_quantized_zero_points_is_taken_over():
    theirs = by_inc(inc().HQQConfig(bits=4, group_size=32))
    expected = logits(by_inc(inc().HQQConfig(bits=4, group_size=32)))
    qft.audit(theirs)
    assert relative(logits(theirs), expected) < 1e-3  # float16, in which INC leaves the whole model


def test_eight_bits_without_symmetry_are_right_where_inc_overflows():
    """Its `recover` takes codes less zero points for int8: beyond 127 they come out negative."""
    layer = nn.Sequential(nn.Linear(64, 32, bias=False))
    with torch.no_grad():
        layer[0].weight.abs_()
    weight = layer[0].weight.detach().clone()
    theirs = by_inc(inc().RTNConfig(bits=8, group_size=32, use_sym=False), layer)
    assert relative(theirs[0].recover().float(), weight) > 1
    qft.audit(theirs)
    assert relative(theirs[0].weight, weight) < 5e-3


def test_awq_of_inc_is_taken_over_with_its_scales():
    theirs = by_awq()
    layers = [m for m in theirs.modules() if type(m).__name__ == "MulLinear"]
    assert layers, "INC put no scales in"
    expected = {
        n: m.linear.recover().float() * m.input_scale
        for n, m in theirs.named_modules()
        if type(m).__name__ == "MulLinear"
    }
    qft.audit(theirs)
    for name, value in expected.items():
        assert torch.equal(theirs.get_submodule(name).dequantized(torch.float32), value)
        assert theirs.get_submodule(name).quantizer == INC("awq", 4, 32)


def output_error(model):
    return relative(logits(model, DATA[0]), logits(llama(), DATA[0]))


def layer_errors(model):
    """How far each layer is off in what it gives out on the calibration data, its inputs being the float model's."""
    original, read = llama(), {}
    for name, module in original.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(
                lambda m, args, y, name=name: read.setdefault(name, []).append(args[0].flatten(0, -2))
            )
    with torch.no_grad():
        for ids in DATA:
            original(ids)
        found = {}
        for name, x in read.items():
            x, weight = torch.cat(x), original.get_submodule(name).weight
            found[name] = relative(x @ model.get_submodule(name).dequantized(torch.float32).T, x @ weight.T)
    return found


def test_awq_is_as_good_as_that_of_inc():
    theirs = by_awq()
    qft.audit(theirs)
    theirs, rounded = layer_errors(theirs), layer_errors(quantized("inc:group_size=32"))
    for name, error in layer_errors(quantized("inc:method=awq,group_size=32")).items():
        assert error < 1.005 * theirs[name] and error < rounded[name]


@pytest.mark.parametrize("options", [{}, {"act_order": True, "use_sym": False}])
def test_gptq_of_inc_is_taken_over_and_ours_is_as_good(tmp_path, options):
    llama().save_pretrained(tmp_path)
    theirs = by_gptq(tmp_path, **options)
    expected = floats(theirs)
    assert len(expected) == 14
    qft.audit(theirs)
    for name, value in expected.items():
        assert torch.equal(theirs.get_submodule(name).dequantized(value.dtype), value)
    spec = "inc:method=gptq,group_size=32" + (",act_order=true,symmetric=false" if options else "")
    assert output_error(quantized(spec)) < 1.15 * output_error(theirs)


def test_fp8_is_what_incs_four_steps_make(tmp_path):
    """Weights, their scales and those of the inputs, to the bit; and the layer's own forward."""
    theirs = by_fp8(tmp_path)
    layers = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "PatchedLinear"}
    assert len(layers) == 14
    facts = {
        n: (m.weight.T.float(), float(m.dequant_weights.scale), float(m.quant_input.scale)) for n, m in layers.items()
    }
    x = torch.randn(7, 64)
    name = "model.layers.0.mlp.up_proj"
    forward = layers[name](x)
    ours = quantized("inc:method=fp8")
    qft.audit(theirs)
    for n, (codes, scale, inputs) in facts.items():
        for model in (ours, theirs):
            packed = model.get_submodule(n).packed
            assert torch.equal(packed["qweight"].float(), codes) and float(packed["weight_scale"]) == scale
            assert float(packed["input_scale"]) == inputs
    y = ours.get_submodule(name)(x)
    assert relative(y, forward) < 0.01  # theirs is in bfloat16
    exact = x @ ours.get_submodule(name).weight.T
    assert 0.01 < relative(y, exact) < 0.1


def test_fp8_inputs_pass_gradients_on():
    layer = quantized("inc:method=fp8").model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).sum().backward()
    assert relative(x.grad, layer.weight.sum(0).expand(5, -1)) < 1e-6


def test_models_that_are_measured_still_are_refused(tmp_path):
    config = inc().FP8Config(use_qdq=True, scale_method="maxabs_pow2", dump_stats_path=f"{tmp_path}/stats")
    with refuses(qft.UnsupportedOperation, "finalize_calibration"):
        qft.wrap(inc().prepare(llama(), config))


# ---- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_outputs_and_gradients_equal_those_over_a_float_copy(spec, dora):
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_dora=dora)
    options = {"calibration": torch.cat(DATA)} if qft.capabilities(spec).needs_calibration else {}
    assert max(both_errors(*pair(llama, spec, config, **options))) < 1e-5


@pytest.mark.parametrize("made", ["rtn", "nf4", "hqq", "awq", "fp8"])
def test_models_of_inc_train_and_merge(made, tmp_path):
    configs = {"rtn": {"group_size": 32}, "nf4": {"dtype": "nf4", "group_size": 32}}
    if made in configs:
        base = by_inc(inc().RTNConfig(**configs[made]))
    else:
        base = {"hqq": lambda: by_inc(inc().HQQConfig(group_size=32)), "awq": by_awq, "fp8": lambda: by_fp8(tmp_path)}[
            made
        ]()
    dtypes = {n: p.dtype for n, p in base.named_parameters() if "norm" in n or "embed" in n}
    model = qft.prepare_model_for_kbit_training(base)
    assert {n: p.dtype for n, p in model.named_parameters() if n in dtypes} == dtypes
    model = train_a_little(qft.wrap(nn.Module.float(model)))  # INC's HQQ leaves the whole model in float16
    start = logits(model)
    assert relative(logits(qft.merge_to_float(model, dtype=torch.float32)), start) < 1e-5


@pytest.mark.parametrize("spec", MERGED)
def test_merge_and_unmerge(spec):
    model = train_a_little(qft.wrap(quantized(spec)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = logits(model)
    assert 0 < qft.merge(model).survived < 1.2
    qft.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), tuned)


def test_fp8_is_merged_to_float_only():
    model = train_a_little(qft.wrap(quantized("inc:method=fp8")))
    tuned = logits(model)
    known = qft.capabilities("inc:method=fp8").as_dict()
    assert known["merge_to_float"] and not known["merge_to_quantized"] and not known["unmerge"]
    with refuses(qft.UnsupportedOperation, "merge_to_float", model=model):
        qft.merge(model)
    with refuses(qft.UnsupportedOperation, model=model):
        model.merge_adapter()
    assert relative(logits(qft.merge_to_float(model, dtype=torch.float32)), tuned) < 1e-5


@pytest.mark.parametrize("spec", ["inc:group_size=64", "inc:method=nf4", "inc:method=fp8"])
@pytest.mark.parametrize("init", ["loftq", "qera"])
def test_starts_lower_the_error(init, spec):
    """At rank 32, of 64."""
    config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    data = {"calibration": torch.cat(DATA)} if init == "qera" or "fp8" in spec else {}
    model = qft.quantize_and_wrap(llama(), spec, adapter=config, init=init, progress=False, **data)
    target = logits(llama())
    with model.disable_adapter():
        without = relative(logits(model), target)
    assert relative(logits(model), target) < 0.9 * without


def test_preparing_upcasts_nothing():
    """PEFT's own function makes float32 of everything over INC, twice the memory, and leaves checkpointing off."""
    model = quantized("inc", llama(torch.bfloat16))
    before = {n: p.dtype for n, p in model.named_parameters()}
    model = qft.prepare_model_for_kbit_training(model)
    assert {n: p.dtype for n, p in model.named_parameters()} == before
    assert model.is_gradient_checkpointing


# ---- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_saved_models_load_as_they_were(spec, tmp_path):
    """What `save_pretrained` writes of a model that INC quantized in place loads with random weights in transformers."""
    model = quantized(spec)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.model.layers[0].mlp.up_proj.quantizer == model.model.layers[0].mlp.up_proj.quantizer


def test_models_of_inc_are_saved_once_they_are_taken_over(tmp_path):
    model = by_inc(inc().RTNConfig(group_size=32))
    expected = logits(by_inc(inc().RTNConfig(group_size=32)))
    qft.audit(model)
    model.save_pretrained(tmp_path)
    assert relative(logits(type(model).from_pretrained(tmp_path)), expected) < 1e-6


def test_folders_load_without_the_package(tmp_path):
    quantized("inc:method=hqq").save_pretrained(tmp_path)
    code = """
    import sys, importlib.metadata as m
    real = m.version
    def version(name):
        if "neural" in name: raise m.PackageNotFoundError(name)
        return real(name)
    m.version = version
    import qft
    model = qft.quantize(sys.argv[1], "inc:method=hqq,group_size=64", device="cpu", progress=False)
    assert not any(n.startswith("neural_compressor") for n in sys.modules)
    """
    run_python(code, tmp_path)


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("inc:method=nf4,bits=3", "bits=3"),
        ("inc:bits=1", "bits=1"),
        ("inc:method=fp8,group_size=32", "fp8"),
        ("inc:method=awq,act_order=true", "act_order"),
        ("inc:method=teq", "method"),
        ("inc:method=gptq,damp_percent=2", "damp_percent"),
        ("inc:group_size=0", "group_size=0"),
        ("inc:scale=2", "no option"),
    ],
)
def test_options_that_there_are_not(spec, says):
    with refuses(qft.BadOption, says):
        qft.get_quantizer(spec)


def test_groups_that_do_not_divide():
    model = llama()
    with refuses(qft.BadShape, "model.layers.0.self_attn.q_proj", "groups of 48", model=model):
        qft.quantize(model, "inc:group_size=48", progress=False)


@pytest.mark.parametrize("spec", ["inc:method=gptq", "inc:method=awq", "inc:method=fp8"])
def test_methods_that_want_data(spec):
    model = llama()
    with refuses(qft.NeedsCalibration, model=model):
        qft.quantize(model, spec, progress=False)


def test_gaudi_is_named_and_is_not_here():
    assert "hpu" in qft.capabilities("inc").devices
    model = llama()
    with refuses(qft.UnsupportedDevice, "hpu", model=model):
        qft.quantize(model, "inc", device="hpu", progress=False)


@pytest.mark.parametrize("version", [None, "2.6", "4.0"])
def test_hqq_asks_for_its_package(version, monkeypatch):
    import importlib.metadata as metadata

    real = metadata.version

    def other(name):
        if name != "neural-compressor-pt":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", other)
    model = llama()
    with refuses(qft.MissingDependency, "neural-compressor-pt", "pip install", model=model):
        qft.quantize(model, "inc:method=hqq", progress=False)
    assert relative(logits(qft.quantize(model, "inc", progress=False)), logits(llama())) < 0.3


def test_weights_whose_constants_do_not_fit_float16():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e7
    with refuses(qft.BadOption, "float16"):
        qft.quantize(model, "inc", progress=False)


def test_importing_inc_changes_nothing_else():
    code = """
    import logging, os, torch, transformers, peft
    import qft
    before = dict(os.environ), list(logging.root.handlers), logging.root.level, logging.root.manager.disable
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
    qft.quantize(layer, "inc:method=hqq", progress=False)
    import sys
    assert "neural_compressor" in sys.modules
    assert before == (dict(os.environ), list(logging.root.handlers), logging.root.level, logging.root.manager.disable)
    """
    assert run_python(code) == ""
    assert os.environ.get("HQQ_NOT_USE_HALF") is None

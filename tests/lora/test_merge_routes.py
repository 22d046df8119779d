"""Merging over the original weights, what a merge does to the predictions, and where the float copy finds room."""

import copy
import json
import warnings

import pytest
import torch
from helpers import refuses, unchanged
from models import BUILDERS, batch, gpt2, llama, logits, plain, qwen2, relative, train_a_little
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel
from twins import SPECS, fill, quantized

import qft
from qft.core.registry import quantizer_of
from qft.lora.layer import QftLinear
from qft.lora.merging import drift, float_copy

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2}
VARIANTS = {
    "lora": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "dora": {"lora_alpha": 12, "use_dora": True},
    "lora_bias": {"lora_alpha": 12, "lora_bias": True},
}
BIASED = {
    "qwen2": {"target_modules": ["q_proj", "k_proj", "v_proj"], "skip": ["o_proj", "mlp"]},
    "gpt2": {},
}
CASES = [(b, v) for b in MODELS for v in VARIANTS if v != "lora_bias" or b in BIASED]


def config(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def tuned(builder, spec, variant="lora", init="loftq", size=0.03, skip=None, **options):
    """A wrapped model whose adapters started by `init` and learnt random things."""
    if variant == "lora_bias":
        special = dict(BIASED[builder.__name__])
        skip = special.pop("skip", skip)
        options = {**special, **options}
    adapter = config(**VARIANTS[variant], **options)
    model = qft.quantize_and_wrap(builder(), spec, adapter=adapter, init=init, skip=skip, progress=False).eval()
    return fill(model, size=size) if size else model


def layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, QftLinear)}


def weight_of(model, name):
    """A float layer's weight (out, in) in float64."""
    module = model.get_submodule(name)
    return (module.weight.T if type(module).__name__ == "Conv1D" else module.weight).detach().double()


def product(layer, pair=None, adapter="default"):
    a, b = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) if pair is None else pair
    return layer.scaling[adapter] * (b.detach().double() @ a.detach().double())


def expected(layer, w, adapter="default"):
    """W + Δ − Δ0, and DoRA's m/‖V‖·V of it, in float64."""
    value = w + product(layer, adapter=adapter)
    if adapter in layer.starts:
        value -= product(layer, layer.starts[adapter], adapter)
    if adapter in layer.lora_variant:
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach().double()
        value *= (magnitude / value.norm(dim=1))[:, None]
    return value


def stored(layer):
    return layer.quantizer.dequantize(layer.handle, dtype=torch.float32)


@torch.no_grad()
def run(model, **kwargs):
    return logits(model, **kwargs)


DATA = [batch(seed=i) for i in range(3)]


# ---- the formula -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("builder", "variant"), CASES)
@pytest.mark.parametrize("init", [None, "loftq"], ids=["zero", "loftq"])
def test_to_float_over_the_original_is_the_float_model_and_what_was_learnt(spec, builder, variant, init):
    float_model = MODELS[builder]()
    model = tuned(MODELS[builder], spec, variant, init)
    with unchanged(model), unchanged(float_model):
        merged = qft.merge_to_float(model, original=float_model)
    report = merged.merge_report
    assert (report.route, report.source) == ("float", "original")
    assert report.weights.keys() == layers(model).keys()
    for name, layer in layers(model).items():
        wanted = expected(layer, weight_of(float_model, name))
        assert relative(weight_of(merged, name), wanted) < 1e-6
        bias = layer.base_layer.bias
        if variant == "lora_bias":
            bias = bias + layer.lora_B["default"].bias * layer.scaling["default"]
        if bias is not None:
            torch.testing.assert_close(merged.get_submodule(name).bias, bias)
        before = stored(layer).double()
        now = before + product(layer)
        if variant == "dora":
            now *= (layer.lora_magnitude_vector["default"].weight.double() / now.norm(dim=1))[:, None]
        figures = report.weights[name]  # against Ŵ + Δ, the tuned weight
        assert figures.relative_error == pytest.approx(relative(weight_of(merged, name), now), rel=1e-3, abs=1e-6)
    if variant != "lora_bias":
        mine = {p.untyped_storage().data_ptr() for p in merged.parameters()}
        assert not mine & {p.untyped_storage().data_ptr() for p in float_model.parameters()}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("builder", "variant"), CASES)
@pytest.mark.parametrize("init", [None, "loftq"], ids=["zero", "loftq"])
def test_into_the_base_over_the_original_and_back_to_the_bit(spec, builder, variant, init):
    float_model = MODELS[builder]()
    model = tuned(MODELS[builder], spec, variant, init)
    wanted = {n: expected(m, weight_of(float_model, n)).float() for n, m in layers(model).items()}
    dry = {n: (stored(m).double(), product(m)) for n, m in layers(model).items()}
    with unchanged(model):
        report = qft.merge(model, original=float_model)
        assert (report.route, report.source) == ("quantized", "original")
        for name, layer in layers(model).items():
            fresh = nn.Linear(wanted[name].shape[1], wanted[name].shape[0])
            fresh.weight.data = wanted[name]
            again = layer.quantizer.quantize_layer(fresh)
            q = layer.quantizer.dequantize(layer.quantizer.weights(again)[0], dtype=torch.float32)
            # a weight on the edge between two codes falls to either side; int8 has its scales from float16 maxima
            off = ((stored(layer) - q).abs() > 1e-5 * q.abs().max()).float().mean()
            assert off < 2e-3 or (spec == "int8" and relative(stored(layer), q) < 1e-3)
            before, delta = dry[name]
            if variant != "dora":
                found = float(((stored(layer).double() - before) * delta).sum() / delta.square().sum())
                assert report.weights[name].survived == pytest.approx(found, abs=1e-3)
                error = relative(stored(layer), before + delta)
                assert report.weights[name].relative_error == pytest.approx(error, rel=1e-3)
        qft.unmerge(model)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", MODELS)
@pytest.mark.parametrize(("variant", "steps"), [("lora", 1), ("rslora", 1), ("lora", 3)])
def test_an_untrained_loftq_adapter_over_the_original_is_the_original(spec, builder, variant, steps):
    """The adapter starts at W − Ŵ; added to W it would count the quantization error twice."""
    float_model = MODELS[builder]()
    model = tuned(MODELS[builder], spec, variant, qft.LoftQ(steps=steps), size=0)
    merged = qft.merge_to_float(model, original=float_model)
    for name in layers(model):
        assert relative(weight_of(merged, name), weight_of(float_model, name)) < 1e-6
    assert relative(run(merged), run(float_model)) < 1e-6
    assert relative(run(qft.merge_to_float(model)), run(float_model)) > 1e-4
    qft.merge(model, original=float_model)
    twin = qft.quantize(MODELS[builder](), spec, progress=False)
    for name, layer in layers(model).items():
        assert torch.equal(stored(layer), stored_in(twin, name))


@pytest.mark.parametrize("over_original", [True, False])
def test_nothing_is_merged_on_top_of_the_other_route(over_original):
    model, float_model = tuned(llama, "nf4"), llama()
    model.add_adapter("other", config(r=2))
    fill(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    for layer in layers(model).values():
        name = next(n for n, m in layers(model).items() if m is layer)
        layer.merge(adapter_names=["default"], original=weight_of(float_model, name).float() if over_original else None)
    verbs = [lambda m: qft.merge(m, original=float_model)]
    if over_original:
        verbs += [qft.merge, lambda m: m.merge_adapter(["other"]), lambda m: m.merge_and_unload()]
    for verb in verbs:
        with refuses(qft.BadOption, "unmerge", model=model, outputs=False):
            verb(model)


def stored_in(model, name):
    module = model.get_submodule(name)
    quantizer = quantizer_of(module)
    return quantizer.dequantize(quantizer.weights(module)[0], dtype=torch.float32)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", MODELS)
def test_layers_without_an_adapter_become_the_original_ones(spec, builder):
    float_model = MODELS[builder]()
    targets = ["c_proj"] if builder == "gpt2" else ["q_proj"]
    model = tuned(MODELS[builder], spec, target_modules=targets)
    merged = qft.merge_to_float(model, original=float_model)
    bare = [n for n, *_ in quantized(model.get_base_model()) if n not in layers(model) and "base_layer" not in n]
    assert bare
    for name in bare:
        assert torch.equal(merged.get_submodule(name).weight, float_model.get_submodule(name).weight)
    with model.disable_adapter():
        off = qft.merge_to_float(model, original=float_model)
    assert torch.equal(run(off), run(float_model))
    alone = qft.merge_to_float(qft.quantize(MODELS[builder](), spec, progress=False), original=float_model)
    assert all(torch.equal(v, float_model.state_dict()[k]) for k, v in alone.state_dict().items())


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_several_adapters_each_with_its_own_start(spec, order):
    """LoftQ's beside a zero-started DoRA, in both orders; float layers with adapters too."""
    float_model = llama()
    model = tuned(llama, spec, skip=["v_proj"])
    model.add_adapter("other", config(r=2, use_dora=True))
    fill(model, "other", seed=4)
    model.eval()
    model.base_model.set_adapter(order)
    merged = qft.merge_to_float(model, original=float_model)
    for name, layer in layers(model).items():
        w = weight_of(float_model, name)
        value = w.clone()
        for adapter in order:
            learnt = product(layer, adapter=adapter)
            if adapter in layer.starts:
                learnt = learnt - product(layer, layer.starts[adapter], adapter)
            value += learnt
            if adapter == "other":
                magnitude = layer.lora_magnitude_vector["other"].weight.detach().double()
                value *= (magnitude / (w + learnt).norm(dim=1))[:, None]
        assert relative(weight_of(merged, name), value) < 1e-6
    with unchanged(model):
        qft.merge(model, original=float_model)
        again = qft.merge_to_float(model, original=float_model)  # of merged adapters: from the original, unrounded
        assert all(torch.equal(v, merged.state_dict()[k]) for k, v in again.state_dict().items())
        rounded = qft.merge_to_float(model)
        assert relative(run(rounded), run(model)) < 2e-6
        assert relative(run(rounded), run(merged)) > 1e-4
        qft.unmerge(model)


@pytest.mark.parametrize("builder", MODELS)
def test_the_original_may_be_a_folder_an_index_or_a_file(builder, tmp_path):
    float_model = MODELS[builder]()
    model = tuned(MODELS[builder], "nf4")
    merged = qft.merge_to_float(model, original=float_model).state_dict()
    float_model.save_pretrained(tmp_path / "one")
    float_model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    index = tmp_path / "many" / "model.safetensors.index.json"
    assert index.is_file()
    for original in (tmp_path / "one", str(tmp_path / "many"), index, tmp_path / "one" / "model.safetensors"):
        again = qft.merge_to_float(model, original=original).state_dict()
        assert all(torch.equal(v, again[k]) for k, v in merged.items())
        with unchanged(model):
            qft.merge(model, original=original)
            qft.unmerge(model)
    with refuses(qft.BadFolder, "nowhere", model=model):
        qft.merge(model, original=tmp_path / "nowhere")
    with refuses(qft.BadFolder, "no safetensors", model=model):
        (tmp_path / "empty").mkdir()
        qft.merge(model, original=tmp_path / "empty")


def one_layer(spec, share, size=512, rank=16):
    """One layer of normal weights, its float twin, and a random adapter with ‖Δ‖ / ‖Ŵ‖ = share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    nn.init.normal_(model[0].weight, std=0.02)
    twin = copy.deepcopy(model)
    model = qft.wrap(qft.quantize(model, spec, progress=False), config(r=rank, lora_alpha=rank))
    (layer,) = layers(model).values()
    a, b = layer.lora_A["default"].weight.data.normal_(), layer.lora_B["default"].weight.data.normal_()
    b.mul_(share * stored(layer).norm() / (b @ a).norm())
    return model, twin


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.01, 0.013, 0.019), (0.03, 0.034, 0.046), (0.09, 0.69, 0.84), (0.32, 0.98, 1)]
)
def test_how_much_of_an_update_survives_by_either_route(spec, share, low, high):
    """Over Ŵ rounding swallows what is small beside the steps between codes; over W all of it comes through."""
    model, twin = one_layer(spec, share)
    over_codes = qft.merge(model)
    assert low <= over_codes.survived <= high
    qft.unmerge(model)
    over_floats = qft.merge(model, original=twin)
    assert over_floats.survived == pytest.approx(1, abs=0.05)
    assert ("original=" in over_codes.recommendation) == (over_codes.survived < 0.9)
    assert "merge_to_float" in over_codes.recommendation or over_codes.survived > 0.9


# ---- starts that are not known, and originals that are not the original ------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_a_weighted_sum_of_started_adapters_has_no_known_start(kind, tmp_path):
    float_model = llama()
    model = tuned(llama, "nf4")
    model.add_adapter("other", config(lora_alpha=12))
    fill(model, "other", seed=4)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=kind)
    model.base_model.add_weighted_adapter(["other"], [0.5], "single", combination_type="linear")
    model.eval()
    model.set_adapter("both")
    for verb in (qft.merge, qft.merge_to_float):
        with refuses(qft.UnsupportedOperation, "started is not known", model=model):
            verb(model, original=float_model)
        with unchanged(model):
            verb(model)
            qft.unmerge(model)
    model.base_model.add_weighted_adapter(["other"], [0.5], "both")  # a name that is taken: PEFT does nothing
    assert all(m.starts["both"] is None for m in layers(model).values())
    model.set_adapter("single")
    qft.merge_to_float(model, original=float_model)

    qft.save(model, tmp_path)
    for folder, adapter, known in ((tmp_path, "default", True), (tmp_path / "both", "both", False)):
        again = qft.load(folder, qft.quantize(llama(), "nf4", progress=False))
        for name, layer in layers(again).items():
            mine = layers(model)[name].starts[adapter]
            found = layer.starts["default"]
            assert found is None if not known else all(torch.equal(x, y) for x, y in zip(mine, found))
    assert not (tmp_path / "other" / "start.safetensors").exists()
    with refuses(qft.UnsupportedOperation, "started is not known"):
        qft.merge(again, original=float_model)


@pytest.mark.parametrize(  # int8's error is a trifle beside what was learnt: counting it twice is one, too
    ("spec", "trained"), [(s, t) for s in SPECS for t in (False, True) if (s, t) != ("int8", True)]
)
def test_a_start_that_peft_loaded_without_is_noticed(spec, trained, tmp_path):
    """PEFT's own loading knows nothing of starts: an adapter that lies along W − Ŵ is not added to W."""
    float_model = llama()
    model = tuned(llama, spec, size=0.01 if trained else 0)
    qft.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(qft.quantize(llama(), spec, progress=False), tmp_path).eval()
    second = qft.wrap(qft.quantize(llama(), spec, progress=False), config())
    second.load_adapter(tmp_path, "theirs")
    second.set_adapter("theirs")
    for loaded in (theirs, second.eval()):
        for verb in (qft.merge, qft.merge_to_float):
            with refuses(qft.UnsupportedOperation, "qft.load", model=loaded):
                verb(loaded, original=float_model)
        qft.merge(loaded)
        with refuses(qft.UnsupportedOperation, "qft.load", model=loaded):
            qft.merge_to_float(loaded, original=float_model)
    again = qft.load(tmp_path, qft.quantize(llama(), spec, progress=False))
    a, b = (qft.merge_to_float(m, original=float_model).state_dict() for m in (again, model))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [0.003, 0.03, 0.1])
def test_adapters_that_started_at_zero_are_not_taken_for_others(spec, size, tmp_path):
    """Small, large, and trained; made here, and loaded by PEFT."""
    model = qft.wrap(qft.quantize(llama(), spec, progress=False), config())
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].weight.normal_(std=size)
    qft.merge_to_float(model, original=llama())
    train_a_little(model)
    merged = qft.merge_to_float(model, original=llama()).state_dict()
    qft.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(qft.quantize(llama(), spec, progress=False), tmp_path).eval()
    again = qft.merge_to_float(theirs, original=llama()).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in merged.items())


def test_weights_that_were_loaded_over_a_recorded_start_are_noticed(tmp_path):
    zero = fill(qft.wrap(qft.quantize(llama(), "nf4", progress=False), config(lora_alpha=12)), seed=6, size=0.005)
    qft.save(zero, tmp_path)
    model = tuned(llama, "nf4")
    qft.merge_to_float(model, original=llama())
    model.load_adapter(tmp_path, "default")
    for verb in (qft.merge, qft.merge_to_float):
        with refuses(qft.UnsupportedOperation, "other weights were loaded", model=model):
            verb(model, original=llama())


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_the_original_of_another_model_is_refused(spec):
    model = tuned(llama, spec)
    for verb in (qft.merge, qft.merge_to_float):
        with refuses(qft.AdapterMismatch, "another", model=model):
            verb(model, original=llama(seed=7))
        with refuses(qft.BadOption, "no layer", model=model):
            verb(model, original=gpt2())
        with refuses(qft.BadOption, "quantized itself", model=model):
            verb(model, original=qft.quantize(llama(), spec, progress=False))
        with refuses(qft.BadOption, "int", model=model):
            verb(model, original=3)
        with refuses(qft.UnsupportedDevice, "meta", model=model):
            verb(model, original=llama().to("meta"))
        bad = llama()
        bad.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
        with refuses(qft.NonFiniteWeights, "down_proj", model=model):
            verb(model, original=bad)


def test_an_original_that_no_fingerprint_can_check(tmp_path):
    """A base that transformers quantized: judged by how near its weights are."""
    base = qft.quantize(llama(), "reference", progress=False)
    base._qft.fingerprint.clear()
    model, wide = fill(qft.wrap(base, config()).eval()), llama()
    wide.model.layers[1].self_attn.k_proj = nn.Linear(64, 64)
    for verb in (qft.merge, qft.merge_to_float):
        with refuses(qft.AdapterMismatch, "nothing in common", model=model):
            verb(model, original=llama(seed=7))
        with refuses(qft.AdapterMismatch, "k_proj", "(64, 64)", "(32, 64)", model=model):
            verb(model, original=wide)
    with pytest.warns(qft.QftWarning, match="no fingerprint"):
        warnings.simplefilter("always")
        qft.merge(model, original=llama())


@pytest.mark.parametrize("spec", SPECS)
def test_a_base_that_others_were_merged_into_has_no_original(spec, tmp_path):
    """The original weights lack those adapters: adding the next one to them would drop the first without a word."""
    base = tuned(llama, spec, init=None).merge_and_unload()
    with refuses(qft.UnsupportedOperation, "for good", model=base):
        qft.merge_to_float(base, original=llama())
    model = fill(qft.wrap(base, config(r=2)), seed=8).eval()
    qft.save(model, tmp_path)
    for m in (model, qft.load(tmp_path), qft.load(tmp_path, llama())):
        for verb in (qft.merge, qft.merge_to_float):
            with refuses(qft.UnsupportedOperation, "for good", model=m):
                verb(m, original=llama())


def test_original_makes_no_sense_over_floats():
    from peft import get_peft_model

    with pytest.raises(qft.BadOption, match="float"):
        qft.merge_to_float(llama(), original=llama())
    with refuses(qft.BadOption, "float"):
        qft.merge_to_float(get_peft_model(llama(), config()), original=llama())


# ---- starts on disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", MODELS)
@pytest.mark.parametrize(("variant", "steps"), [("lora", 1), ("dora", 1), ("rslora", 3)])
def test_a_saved_start_comes_back(spec, builder, variant, steps, tmp_path):
    float_model = MODELS[builder]()
    model = tuned(MODELS[builder], spec, variant, qft.LoftQ(steps=steps))
    qft.save(model, tmp_path / "a")
    found = load_file(tmp_path / "a" / "start.safetensors")
    assert found.keys() == {f"{n}.{part}" for n in layers(model) for part in ("lora_A", "lora_B")}
    again = qft.load(tmp_path / "a", MODELS[builder]())
    qft.save(again, tmp_path / "b")
    third = qft.load(tmp_path / "b", MODELS[builder]())
    expected_state = qft.merge_to_float(model, original=float_model).state_dict()
    qft.merge(model, original=float_model)
    y = run(model)
    for loaded in (again, third):
        state = qft.merge_to_float(loaded, original=float_model).state_dict()
        assert all(torch.equal(v, state[k]) for k, v in expected_state.items())
        qft.merge(loaded, original=float_model)
        assert torch.equal(run(loaded), y)


def test_a_start_at_zero_is_not_written_and_an_old_one_does_not_stay(tmp_path):
    zero = fill(qft.wrap(qft.quantize(llama(), "nf4", progress=False), config()))
    qft.save(zero, tmp_path / "zero")
    assert not (tmp_path / "zero" / "start.safetensors").exists()
    qft.save(tuned(llama, "nf4"), tmp_path / "a")
    qft.save(zero, tmp_path / "a")
    again = qft.load(tmp_path / "a", llama())
    assert all(not m.starts for m in layers(again).values())


def test_each_saved_adapter_has_its_own_start(tmp_path):
    model = tuned(llama, "nf4")
    model.add_adapter("second", config(r=2))
    for layer in layers(model).values():
        layer.starts["second"] = (layer.lora_A["second"].weight.detach().clone() + 1, torch.ones(layer.out_features, 2))
    qft.save(model, tmp_path)
    for folder, rank in ((tmp_path, 4), (tmp_path / "second", 2)):
        with safe_open(folder / "start.safetensors", "pt") as file:
            assert {file.get_slice(k).get_shape()[0] for k in file.keys() if k.endswith("lora_A")} == {rank}
    again = qft.load(tmp_path / "second", qft.quantize(llama(), "nf4", progress=False))
    assert all(
        torch.equal(m.starts["default"][0], layers(model)[n].starts["second"][0]) for n, m in layers(again).items()
    )


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _rewritten(change):
    def breaks(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return breaks


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "breaks",
    [
        _cut,
        lambda p: p.write_bytes(b"no such thing"),
        lambda p: save_file({}, p, metadata={"unknown": "[oh"}),
        _rewritten(lambda t: t.update({f"{FIRST}.lora_A": torch.zeros(3, 64)})),
        _rewritten(lambda t: t.update({"model.layers.9.q_proj.lora_A": torch.zeros(4, 64)})),
        _rewritten(lambda t: t.update({f"{FIRST}.lora_C": torch.zeros(4, 64)})),
        _rewritten(lambda t: t.pop(f"{FIRST}.lora_B")),
        _rewritten(lambda t: t[f"{FIRST}.lora_B"].fill_(float("nan"))),
    ],
    ids=["cut", "garbage", "metadata", "shape", "layer", "part", "half", "nan"],
)
def test_a_damaged_start_is_refused(breaks, tmp_path):
    qft.save(tuned(llama, "nf4"), tmp_path)
    breaks(tmp_path / "start.safetensors")
    base, bare = qft.quantize(llama(), "nf4", progress=False), llama()
    with refuses(qft.BadFolder, "start.safetensors", model=base):
        qft.load(tmp_path, base)
    with refuses(qft.BadFolder, "start.safetensors", model=bare):
        qft.load(tmp_path, bare)


# ---- drift -------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_drift(before, after, data):
    """KL and agreement by torch's own functions in float64, from logits and masks."""
    kl, same, tokens = 0.0, 0, 0
    for item, p, q in zip(data, before, after, strict=True):
        mask = item["attention_mask"].bool() if isinstance(item, dict) else torch.ones(p.shape[:2], dtype=torch.bool)
        p, q = p[mask].double(), q[mask].double()
        kl += float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return kl / tokens, same / tokens, tokens


def outputs(model, data):
    return [run(model, ids=d["input_ids"], attention_mask=d["attention_mask"]) if isinstance(d, dict) else run(model, ids=d)
            for d in data]  # fmt: skip


def masked(shape, seed, left=False):
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, : 3 if left else None] = 0 if left else 1
    mask[-1, -4:] = 1 if left else 0
    return {"input_ids": batch(seed=seed, shape=shape), "attention_mask": mask}


PROBES = {
    "ids": DATA,
    "masked": [masked((2, 12), 1), masked((3, 9), 2, left=True)],
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("builder", "probe"), [(b, p) for b in [*MODELS, "t5", "plain"] for p in PROBES if (b, p) != ("plain", "masked")]
)
def test_drift_by_a_plain_computation(spec, builder, probe, monkeypatch):
    data = PROBES[probe]
    monkeypatch.setattr(drift, "CHUNK", 96 * 5)  # five positions at a time
    model, float_model = tuned(BUILDERS[builder], spec), BUILDERS[builder]()
    before = outputs(model, data)
    report = qft.merge(model, original=float_model, data=data)
    over_floats = plain_drift(before, outputs(model, data), data)
    qft.unmerge(model)
    alone = qft.merge(model, data=data)
    over_codes = plain_drift(before, outputs(model, data), data)
    qft.unmerge(model)
    for found, wanted in (
        (report.routes["original"], over_floats),
        (report.routes["dequantized"], over_codes),
        (alone.routes["dequantized"], over_codes),
    ):
        assert found.kl == pytest.approx(wanted[0], rel=1e-4, abs=1e-7)
        assert (found.agreement, found.tokens) == wanted[1:]
    assert report.drift is report.routes["original"] and alone.routes.keys() == {"dequantized"}

    merged = qft.merge_to_float(model, original=float_model, data=data)
    wanted = plain_drift(before, outputs(merged, data), data)
    assert merged.merge_report.drift.kl == pytest.approx(wanted[0], rel=1e-4, abs=1e-7)
    assert (merged.merge_report.drift.agreement, merged.merge_report.drift.tokens) == wanted[1:]
    exact = qft.merge_to_float(model, data=data).merge_report.drift
    assert exact.kl < 1e-6 and exact.agreement == 1


@pytest.mark.parametrize("held", [1, 2**13, 2**31])
def test_drift_does_not_depend_on_how_many_logits_are_held(held, monkeypatch):
    model = tuned(qwen2, "nf4", target_modules=["q_proj", "v_proj", "embed_tokens"])
    wanted = qft.merge(model, original=qwen2(), data=DATA)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    qft.unmerge(model)
    monkeypatch.setattr(drift, "HELD_BYTES", held)
    with unchanged(model):
        found = qft.merge(model, original=qwen2(), data=DATA)
        for name, d in wanted.routes.items():
            assert found.routes[name].kl == pytest.approx(d.kl, rel=1e-6)
            assert (found.routes[name].agreement, found.routes[name].tokens) == (d.agreement, d.tokens)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert found.weights == wanted.weights
        qft.unmerge(model)


def test_the_recommendation_goes_by_the_drift():
    small, twin = tuned(llama, "nf4", init=None, size=0.002), llama()
    report = qft.merge(small, original=twin, data=DATA)
    kl = {n: d.kl for n, d in report.routes.items()}
    better = min(kl, key=kl.get)
    says = "keep this merge" if better == "original" else "merge without original="
    assert report.recommendation.startswith(says)
    assert all(f"{v:.2e}" in report.recommendation for v in kl.values())
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["routes"]["original"] == {
        "kl": kl["original"],
        "agreement": report.drift.agreement,
        "tokens": report.drift.tokens,
    }
    assert values["drift"] == values["routes"]["original"]
    assert values["recommendation"] == report.recommendation
    assert (values["route"], values["source"]) == ("quantized", "original")
    text = str(report)
    for part in (report.recommendation, *(str(d) for d in report.routes.values()), "from the original ones"):
        assert part in text
    other = qft.MergeReport(
        "quantized",
        report.weights,
        "original",
        {"dequantized": drift.Drift(0.1, 1, 5), "original": drift.Drift(0.3, 1, 5)},
    )
    assert other.recommendation.startswith("merge without original=")
    other.routes["dequantized"] = drift.Drift(0.5, 1, 5)
    assert other.recommendation.startswith("keep this merge")


def test_the_recommendation_without_data():
    model, twin = one_layer("nf4", 0.01)
    assert "original=" in qft.merge(model).recommendation
    assert qft.merge(model).recommendation == "nothing was merged"
    qft.unmerge(model)
    assert "data=" in qft.merge(model, original=twin).recommendation
    assert "original weights" in qft.merge_to_float(model, original=twin).merge_report.recommendation
    model, _ = one_layer("int8", 0.3)
    assert "keep" in qft.merge(model).recommendation
    qft.unmerge(model)
    assert "tuned weights" in qft.merge_to_float(model).merge_report.recommendation
    model, _ = one_layer("nf4", 1e-5)
    assert "float32" in qft.merge_to_float(model, dtype="bfloat16").merge_report.recommendation


class Words:
    """A tokenizer of one character a token."""

    eos_token_id = 0

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(c) % 96 for c in text]}


def test_data_of_several_kinds():
    model = tuned(llama, "nf4")
    texts = ["one text", "and another one"]
    report = qft.merge(model, data=texts, tokenizer=Words())
    assert report.drift.tokens == sum(map(len, texts)) + 2
    qft.unmerge(model)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": batch(seed=i)[0]} for i in range(4)], batch_size=2, shuffle=True
    )
    assert qft.merge_to_float(model, data=loader).merge_report.drift.tokens == 48
    from qft.data.calibration import Calibration

    assert qft.merge(model, data=Calibration(texts, Words(), samples=1, length=8)).drift.tokens == 8


def test_modes_and_random_state_stay():
    model = tuned(llama, "nf4", lora_dropout=0.5)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    loader = torch.utils.data.DataLoader([{"input_ids": batch(seed=i)[0]} for i in range(4)], shuffle=True)
    float_model = llama()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    report = qft.merge(model, original=float_model, data=loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    qft.unmerge(model)
    merged = qft.merge_to_float(model, original=float_model, data=loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert merged.training and not merged.model.layers[0].training
    model.eval()
    again = qft.merge(model, original=llama(), data=[d["input_ids"] for d in loader])
    assert again.drift.kl == pytest.approx(report.drift.kl, rel=1e-5)


@pytest.mark.parametrize("verb", [qft.merge, qft.merge_to_float], ids=["merge", "merge_to_float"])
def test_bad_data_changes_nothing(verb):
    model = tuned(llama, "nf4")
    for data, error, says in (
        ([], qft.NeedsCalibration, "no tokens"),
        ([torch.tensor([[5, 96]])], qft.BadOption, "96"),
        (["text"], qft.BadOption, "tokenizer"),
        (3, qft.BadOption, "int"),
    ):
        for original in (None, llama()):
            with refuses(error, says, model=model):
                verb(model, original=original, data=data)


def test_columns_that_the_model_does_not_take():
    model = fill(qft.wrap(qft.quantize(plain(), "nf4", progress=False), config())).eval()
    for verb in (qft.merge, qft.merge_to_float):
        with refuses(qft.BadOption, "colour", model=model):
            verb(model, data=[{"input_ids": batch(), "colour": batch()}])


class Bare(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = plain(), kind

    def forward(self, input_ids):
        out = self.inner(input_ids)
        return {"flat": out.mean(1), "named": {"scores": out}, "encoder": out}[self.kind]


@pytest.mark.parametrize("kind", ["flat", "named", "bert"])
def test_models_without_logits(kind):
    torch.manual_seed(0)
    small = BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    float_model = (BertModel(small) if kind == "bert" else Bare(kind)).eval()
    model = fill(qft.wrap(qft.quantize(copy.deepcopy(float_model), "nf4", progress=False), config())).eval()
    for verb in (qft.merge, qft.merge_to_float):
        with refuses(qft.BadOption, "logits per token", model=model, outputs=False):
            verb(model, data=DATA)


def test_the_merged_model_breaking_down_changes_nothing(monkeypatch):
    """An error in the middle: of the second route, of the second group of batches."""
    monkeypatch.setattr(drift, "HELD_BYTES", 1)
    model = tuned(qwen2, "nf4", target_modules=["q_proj", "v_proj", "embed_tokens"])
    real, calls = drift.token_logits, []

    def breaks(at):
        def logits(m, b):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(m, b)

        return logits

    for at in range(1, 9):
        calls.clear()
        monkeypatch.setattr(drift, "token_logits", breaks(at))
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            qft.merge(model, original=qwen2(), data=DATA)
    monkeypatch.setattr(drift, "token_logits", lambda m, b: real(m, b) * float("nan"))
    with refuses(qft.NonFiniteWeights, "NaN", model=model):
        qft.merge(model, data=DATA)


def test_layers_of_peft_between_the_routes_come_back_to_the_bit(monkeypatch):
    """PEFT unmerges its own layers over experts by subtraction: with data they are put back from a copy."""
    from models import qwen3_moe

    model = qft.wrap(
        qft.quantize(qwen3_moe(), "nf4", progress=False),
        config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )
    fill(model, size=0.02)
    model.eval()
    once = qft.merge(model, data=DATA).drift
    qft.unmerge(model)
    real = drift.token_logits
    monkeypatch.setattr(drift, "token_logits", lambda m, b: real(m, b) * float("nan"))
    with refuses(qft.NonFiniteWeights, "NaN", model=model):
        qft.merge(model, data=DATA)
    with torch.no_grad():
        [p for n, p in model.named_parameters() if "experts" in n and "lora_B" in n][-1][0, 0] = float("nan")
    with refuses(qft.NonFiniteWeights, "NaN", model=model, outputs=False):
        qft.merge(model)
    assert once.kl > 0


def test_merged_or_disabled_adapters_have_no_state_to_start_from():
    model = tuned(llama, "nf4")
    qft.merge(model)
    for options in ({"original": llama()}, {"data": DATA}):
        with refuses(qft.BadOption, "qft.unmerge", model=model):
            qft.merge(model, **options)
    with model.disable_adapter():
        assert torch.equal(run(model), run(model))
    with model.disable_adapter():
        with refuses(qft.BadOption, "disable", model=model):
            qft.merge(model, data=DATA)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_adapters_change_nothing(spec, value):
    model = tuned(llama, spec)
    parameter = [p for n, p in model.named_parameters() if "lora_B" in n][-1]
    with torch.no_grad():
        parameter[3, 1] = value
    for options in ({"original": llama()}, {"original": llama(), "data": DATA}):
        with refuses(qft.NonFiniteWeights, model=model, outputs=False):
            qft.merge(model, **options)
        with refuses(qft.NonFiniteWeights, model=model, outputs=False):
            qft.merge_to_float(model, **options)


# ---- room for the float copy -------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_bytes_of_the_float_copy(builder, dtype):
    model = tuned(MODELS[builder], "nf4", target_modules=["c_attn"] if builder == "gpt2" else ["q_proj"])
    merged = qft.merge_to_float(model, dtype=dtype)
    tensors = {id(t): t for t in [*merged.parameters(), *merged.buffers()]}
    found = float_copy.float_bytes(model.get_base_model(), dtype)
    assert found.keys() == {torch.device("cpu")}
    assert found.total() == pytest.approx(sum(t.nbytes for t in tensors.values()), rel=0.01)


def test_no_room_anywhere(monkeypatch):
    model = tuned(llama, "nf4")
    need = float_copy.float_bytes(model.get_base_model(), None).total()
    monkeypatch.setattr(float_copy, "free_bytes", lambda device: need - 1)
    with refuses(qft.UnsupportedDevice, f"{need} bytes", f"{need - 1}", "qft.export", model=model):
        qft.merge_to_float(model)
    monkeypatch.setattr(float_copy, "free_bytes", lambda device: need)
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        qft.merge_to_float(model)


@pytest.mark.parametrize(("builder", "variant"), CASES)
def test_no_room_on_the_device(builder, variant, monkeypatch):
    """Another copy is made, module by module, of the same values, that shares nothing with its source."""
    model = tuned(MODELS[builder], "nf4", variant)
    with torch.no_grad():
        wanted = qft.merge_to_float(model)
    answers = iter([0, 2**40, 0, 0])
    monkeypatch.setattr(float_copy, "free_bytes", lambda device: next(answers))
    with pytest.warns(qft.QftWarning, match="host memory"), unchanged(model):
        warnings.simplefilter("always")
        merged = qft.merge_to_float(model)
    assert merged.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in merged.state_dict().items())
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in wanted.named_parameters()}, "ties"
    assert all(p.requires_grad and p.device.type == "cpu" for p in merged.parameters())
    mine = {p.untyped_storage().data_ptr() for p in merged.parameters()}
    assert not mine & {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert torch.equal(run(merged), run(wanted))

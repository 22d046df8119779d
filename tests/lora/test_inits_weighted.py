"""Starts weighted by what the layers read: QERA in both forms, auto, and where their statistics come from."""

import json
from functools import lru_cache

import pytest
import torch
from helpers import refuses
from models import BUILDERS, batch, gpt2, llama, plain, qwen2, relative, t5, train_a_little
from starts import (
    SCALINGS,
    base_weight,
    config,
    layers,
    original,
    quantized_weights,
    run,
    same_start,
    start,
    started,
    tail,
)
from torch import nn
from twins import SPECS

import qft
from qft.core.quantizer import is_conv1d
from qft.data.calibration import batches
from qft.data.collect import Statistics, collect
from qft.lora.inits.qera import damped

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = batch(3, (8, 40))
WEIGHTED = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2}


@lru_cache
def statistics(builder, shape=(8, 40)):
    """Of the float model's layers, for DATA or the first of it; a test of its own holds them against a plain pass."""
    model = BUILDERS[builder]()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    data = batches(DATA[: shape[0], : shape[1]])
    return {n: s for g in collect(model, names, data, "full") for n, s in g.statistics.items()}


def gaps(model, float_model):
    """Name, layer, what quantizing lost, and what is lost with the adapter; all in float64."""
    for name, layer in layers(model).items():
        lost = original(float_model, name) - base_weight(layer)
        yield name, layer, lost, lost - start(layer)


def expected_loss(difference, second_moment):
    """E‖D x‖² over the data."""
    return float(((difference @ second_moment.double()) * difference).sum())


def weights_of(s):
    """√E[x²], the silent features at a thousandth of the loudest."""
    d = s.mean_square.double().sqrt()
    return d.clamp(min=1e-3 * float(d.max()))


OPTIONS = {**SCALINGS, "dora": {"lora_alpha": 8, "use_dora": True}}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", WEIGHTED)
@pytest.mark.parametrize("scaling", ["alpha > r", "negative", "rslora", "patterns", "dora"])
def test_qera_is_the_best_weighted_fit(spec, builder, scaling):
    """‖(W − Ŵ − sBA) diag d‖ is what the SVD of (W − Ŵ) diag d leaves out; Ŵ is as it was."""
    model = started(BUILDERS[builder], spec, "qera", calibration=DATA, **OPTIONS[scaling])
    untouched = dict(quantized_weights(qft.quantize(BUILDERS[builder](), spec, progress=False)))
    for name, layer, lost, left in gaps(model, BUILDERS[builder]()):
        d = weights_of(statistics(builder)[name])
        best = tail(lost * d, layer.r["default"])
        assert float((left * d).norm()) == pytest.approx(best, rel=1e-5)
        assert torch.equal(base_weight(layer), untouched[name])
        report = model.init_report.weights[name]
        size = float((original(BUILDERS[builder](), name) * d).norm())
        assert report.kept
        assert report.before == pytest.approx(float((lost * d).norm()) / size, rel=1e-4)
        assert report.after == pytest.approx(best / size, rel=1e-4)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", WEIGHTED)
@pytest.mark.parametrize("scaling", ["alpha < r", "patterns, rslora"])
def test_qera_full_is_the_best_fit_of_the_output(spec, builder, scaling):
    """E‖(W − Ŵ − sBA) x‖², with the damping, is what the SVD of (W − Ŵ) H^½ leaves out."""
    model = started(BUILDERS[builder], spec, "qera-full", calibration=DATA, **OPTIONS[scaling])
    for name, layer, lost, left in gaps(model, BUILDERS[builder]()):
        h = damped(statistics(builder)[name], 0.01).double()
        best = tail(lost @ torch.linalg.cholesky(h), layer.r["default"])
        assert expected_loss(left, h) ** 0.5 == pytest.approx(best, rel=1e-4)
        report = model.init_report.weights[name]
        assert report.after / report.before == pytest.approx(best / expected_loss(lost, h) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", WEIGHTED)
def test_the_full_one_changes_the_outputs_least(spec, builder):
    """On its data, layer by layer: qera-full below qera, and qera below LoftQ over all layers."""
    float_model, lost = BUILDERS[builder](), {}
    for init in ("loftq", "qera", "qera-full"):
        model = started(BUILDERS[builder], spec, init, calibration=DATA if init != "loftq" else None, lora_alpha=9)
        lost[init] = {
            name: expected_loss(left, statistics(builder)[name].second_moment)
            for name, _, _, left in gaps(model, float_model)
        }
    assert all(lost["qera-full"][n] < lost["qera"][n] for n in lost["qera"])
    assert sum(lost["qera"].values()) < sum(lost["loftq"].values())


@pytest.mark.parametrize("init", ["qera", "qera-full"])
@pytest.mark.parametrize("builder", [t5, plain], ids=["t5", "plain"])
def test_other_models(init, builder):
    y = run(builder())
    model = started(builder, "nf4", init, calibration=DATA, r=32)
    zero = started(builder, "nf4", "zero", r=32)
    assert relative(run(model), y) < 0.8 * relative(run(zero), y)
    assert all(w.kept for w in model.init_report.weights.values())
    with model.disable_adapter():
        assert torch.equal(run(model), run(zero))


@pytest.mark.parametrize("spec", ["nf4", SPECS[-1]])
@pytest.mark.parametrize("init", ["loftq", "qera", "qera-full", "auto"])
def test_the_error_never_rises_with_the_rank(spec, init):
    last = None
    for rank in (1, 2, 5, 16, 32):
        data = None if init == "loftq" else DATA
        found = started(llama, spec, init, calibration=data, r=rank, lora_alpha=7).init_report.weights
        found = {n: w.after for n, w in found.items()}
        assert last is None or all(found[n] < last[n] for n in found)
        last = found


@pytest.mark.parametrize("init", ["qera", "qera-full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_models(init, dtype):
    model = started(llama, "nf4", init, dtype=dtype, calibration=DATA)
    assert all(w.kept and w.after < w.before for w in model.init_report.weights.values())
    zero = started(llama, "nf4", "zero", dtype=dtype)
    assert relative(run(model), run(llama(dtype))) < relative(run(zero), run(llama(dtype)))
    for layer in layers(model).values():
        assert layer.lora_A["default"].weight.dtype == torch.float32


# ---- data that says little ----------------------------------------------------------------------------------


def silent(dtype=torch.float32):
    """The first eight features of the first block's input are always zero."""
    model = plain(dtype)
    with torch.no_grad():
        model.embed.weight[:, :8] = 0
    return model


@pytest.mark.parametrize("init", ["qera", "qera-full", "auto"])
def test_features_that_are_always_zero(init):
    """Finite adapters, the error of what is there at its best, and nothing wild where the data shows nothing."""
    model = started(silent, "nf4", init, calibration=DATA)
    for name, layer, lost, left in gaps(model, silent()):
        assert left.isfinite().all()
        report = model.init_report.weights[name]
        assert report.kept
        if name == "blocks.0.0":
            fitted = started(silent, "nf4", "loftq")
            plain_fit = {n: d for n, _, _, d in gaps(fitted, silent())}[name]
            x = silent().embed.weight.detach()[DATA.flatten()].double()
            assert expected_loss(left, x.T @ x) < expected_loss(plain_fit, x.T @ x)
            assert float(start(layer)[:, :8].norm()) < 2 * float(lost[:, :8].norm())


def mute(dtype=torch.float32):
    """The first block reads zeros only."""
    model = plain(dtype)
    with torch.no_grad():
        model.embed.weight.zero_()
    return model


@pytest.mark.parametrize("init", ["qera", "qera-full", "auto"])
def test_a_layer_that_reads_zeros_only(init):
    """Any weight does for them: the fit is LoftQ's own."""
    model = started(mute, "nf4", init, calibration=DATA)
    fitted = started(mute, "nf4", "loftq")
    torch.testing.assert_close(
        start(layers(model)["blocks.0.0"]), start(layers(fitted)["blocks.0.0"]), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("init", ["qera", "qera-full"])
def test_fewer_tokens_than_features(init):
    """Five tokens for 64 and 128 features: what they show is fitted, and the rest is bounded."""
    model = started(llama, "nf4", init, calibration=DATA[:1, :5], r=8)
    for name, _, lost, left in gaps(model, llama()):
        h = statistics("llama", (1, 5))[name].second_moment
        assert expected_loss(left, h) < (0.1 if init == "qera-full" else 1.0) * expected_loss(lost, h)
        assert float(left.norm()) < 3 * float(lost.norm())


def test_one_token():
    for init in ("qera", "qera-full", "auto"):
        model = started(llama, "nf4", init, calibration=DATA[:1, :1])
        assert all(torch.isfinite(start(m)).all() for m in layers(model).values())


def test_damping_is_a_positive_number():
    assert qft.QERAFull(damping=1).damping == 1
    for damping in (0, -1.0, True, "0.1", None, float("nan"), float("inf")):
        with refuses(qft.BadOption, f"damping={damping!r}"):
            qft.QERAFull(damping=damping)
    model = started(llama, "nf4", "qera-full:damping=0.5", calibration=DATA)
    assert model.init_report.init == "QERAFull(damping=0.5)"
    weak = started(llama, "nf4", "qera-full:damping=1e5", calibration=DATA)
    for _, _, lost, left in gaps(weak, llama()):  # all damping: the plain fit
        assert float(left.norm()) == pytest.approx(tail(lost, 4), rel=1e-4)


def test_a_second_moment_that_float32_cannot_factor_is_damped_until_it_can():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 64)
    x[:, 0] *= 1e6
    s = Statistics(200, x.square().mean(0), x.abs().mean(0), x.T @ x / 200)
    difference = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    a, b, _ = qft.QERAFull(damping=1e-12)(difference, torch.zeros_like(difference), 4, 1.0, statistics=s)
    assert a.isfinite().all()
    assert expected_loss((difference - b @ a).double(), s.second_moment) < 1e-3 * expected_loss(
        difference.double(), s.second_moment
    )


# ---- auto ---------------------------------------------------------------------------------------------------


def test_auto_takes_what_the_inputs_allow():
    """By the tokens that each layer read; without data LoftQ; without the float weights PEFT's own start."""
    few = DATA[:1, :13]
    assert same_start(started(llama, "nf4", "auto"), started(llama, "nf4", "loftq"))
    mine, full, diagonal = (started(llama, "nf4", i, calibration=DATA) for i in ("auto", "qera-full", "qera"))
    for name, layer in layers(mine).items():  # 320 tokens: enough for 64 features, and not for 128
        wide = layer.in_features == 128
        assert torch.equal(start(layer), start(layers(diagonal if wide else full)[name]))
    assert same_start(started(llama, "nf4", "auto", calibration=few), started(llama, "nf4", "qera", calibration=few))
    always = "auto:tokens_per_feature=0.01"
    assert same_start(
        started(llama, "nf4", always, calibration=few), started(llama, "nf4", "qera-full", calibration=few)
    )
    model = qft.quantize(llama(), "nf4", progress=False)
    with pytest.warns(qft.QftWarning, match=r"auto.*B = 0.*original="):
        model = qft.wrap(model, config(), init="auto")
    assert all(float(m.lora_B["default"].weight.abs().max()) == 0 for m in layers(model).values())
    again = qft.wrap(qft.quantize(llama(), "nf4", progress=False), config(), init="auto", original=llama())
    assert same_start(again.eval(), started(llama, "nf4", "loftq"))


# ---- where the statistics come from -------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["qera", "qera-full", "auto"])
@pytest.mark.parametrize("builder", WEIGHTED)
def test_folders_and_originals_give_what_one_go_gives(init, builder, tmp_path):
    """The same bits, from a model in memory, a folder, and the float model brought along later."""
    builder = WEIGHTED[builder]
    expected = started(builder, "nf4", init, calibration=DATA, lora_alpha=9)
    builder().save_pretrained(tmp_path, max_shard_size="60KB")
    streamed = qft.quantize_and_wrap(
        tmp_path, "nf4", adapter=config(lora_alpha=9), init=init, calibration=DATA, progress=False
    )
    assert same_start(streamed.eval(), expected)
    assert streamed.init_report == expected.init_report
    placed = qft.quantize_and_wrap(
        builder(), "nf4", adapter=config(lora_alpha=9), init=init, calibration=DATA, device="cpu", progress=False
    )
    assert same_start(placed.eval(), expected)
    model = qft.quantize(builder(), "nf4", progress=False)
    over = qft.wrap(model, config(lora_alpha=9), init=init, original=builder(), calibration=DATA)
    assert same_start(over.eval(), expected)
    assert over.init_report == expected.init_report


def test_a_folder_as_original_reads_the_statistics_of_the_quantized_model(tmp_path):
    llama().save_pretrained(tmp_path)
    model = qft.quantize(llama(), "nf4", progress=False)
    names = list(layers(started(llama, "nf4", "zero")))
    read = {n: s for g in collect(model, names, batches(DATA), "full") for n, s in g.statistics.items()}
    model = qft.wrap(model, config(), init="qera", original=tmp_path, calibration=DATA)
    for name, _, lost, left in gaps(model, llama()):
        d = weights_of(read[name])
        assert float((left * d).norm()) == pytest.approx(tail(lost * d, 4), rel=1e-5)


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    """transformers would draw them at random."""
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with refuses(qft.BadFolder, "lacks 1", "layers.1.mlp.up_proj.weight"):
        qft.quantize_and_wrap(tmp_path, "nf4", init="qera", calibration=DATA, progress=False)
    state["model.layers.1.mlp.up_proj.weight"] = torch.full((128, 64), float("nan"))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with refuses(qft.NonFiniteWeights, "layers.1.mlp.up_proj"):
        qft.quantize_and_wrap(tmp_path, "nf4", init="qera", calibration=DATA, progress=False)


def test_only_quantized_targets_are_read():
    """A float layer has nothing to start from, and a config may name no quantized one at all."""
    model = started(llama, "nf4", "qera", calibration=DATA, skip=["v_proj"], target_modules=["v_proj", "o_proj"])
    assert {n.split(".")[-1] for n in model.init_report.weights} == {"o_proj"}
    quantized = qft.quantize(llama(), "nf4", skip=["v_proj"], progress=False)
    model = qft.wrap(quantized, config(target_modules=["v_proj"]), init="qera", original=llama(), calibration=DATA)
    assert not model.init_report.weights
    assert str(model.init_report) == "QERA(): no layer to start on"


@pytest.mark.parametrize("init", ["qera", "qera-full", qft.QERA(), qft.QERAFull])
def test_data_and_floats_are_asked_for(init):
    float_model, quantized = llama(), qft.quantize(llama(), "nf4", progress=False)
    with refuses(qft.NeedsCalibration, "QERA", "calibration=", "tokenizer=", "init='loftq'", model=float_model):
        qft.quantize_and_wrap(float_model, "nf4", init=init, progress=False)
    with refuses(qft.NeedsCalibration, "QERA", "calibration=", model=quantized):
        qft.wrap(quantized, init=init, original=llama())
    with refuses(qft.NeedsOriginal, "QERA", "original=", "quantize_and_wrap", model=quantized):
        qft.wrap(quantized, init=init, calibration=DATA)
    with refuses(qft.NeedsOriginal, "QERA", "original=", model=quantized):
        qft.quantize_and_wrap(quantized, "nf4", init=init, calibration=DATA, progress=False)


def test_originals_of_another_kind():
    """Also where the quantized model has no fingerprint to tell by."""
    model = qft.quantize(llama(), "nf4", progress=False)
    model._qft.fingerprint.clear()
    with refuses(qft.BadOption, "has no layer", model=model):
        qft.wrap(model, init="qera", original=gpt2(), calibration=DATA)
    narrow = llama(intermediate_size=64)
    with refuses(qft.AdapterMismatch, "down_proj", model=model):
        qft.wrap(model, config(target_modules=["down_proj"]), init="qera", original=narrow, calibration=DATA)


@pytest.mark.parametrize("init", ["qera", "qera-full"])
def test_a_saved_start_loads_to_equal_outputs(init, tmp_path):
    """Ŵ is q(W): the adapter alone is stored."""
    model = train_a_little(started(llama, "nf4", init, calibration=DATA))
    y = run(model)
    qft.save(model, tmp_path / "a")
    assert not (tmp_path / "a" / "base").exists()
    assert torch.equal(run(qft.load(tmp_path / "a", llama()).eval()), y)
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert "QERA" in json.loads((tmp_path / "a" / "qft.json").read_text())["init"]

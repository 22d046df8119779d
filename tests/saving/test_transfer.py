"""An adapter over another base: nearer than carried unchanged, exact where the rank allows, what is left reported."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import Rows, refuses, unchanged
from models import BUILDERS, VOCABULARY, batch, gpt2, llama, logits, plain, qwen2, relative, train_a_little
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from torch import nn
from twins import SPECS, dequantized_copy, fill, stock_peft

import qft
from qft.core import registry
from qft.core.record import record_of
from qft.core.registry import register_quantizer
from qft.lora.inits import LoftQ
from qft.lora.layer import QftLinear
from qft.lora.weights import float_twin
from qft.saving import transfer as transferring
from qft.saving.transfer_weight import WeightTransfer

pytestmark = pytest.mark.filterwarnings("ignore")

INT3 = "reference:format=int,bits=3,group_size=32"
PAIRS = [*pairwise(SPECS), (SPECS[-1], SPECS[0])]
FULL = 10**6


def wrapped(builder, spec, init=None, skip=None, **options):
    """A source whose adapter is not at its start."""
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **options})
    model = qft.quantize_and_wrap(builder(), spec, adapter=config, init=init, skip=skip, progress=False)
    return fill(model.eval())


def transfer(source, spec, builder=None, **options):
    if builder is not None:
        options["original"] = builder()
    return qft.transfer(source, spec, progress=False, **options)


def layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, QftLinear)}


def weight(layer, adapter="default"):
    """V: what the layer computes with, in float64, written down anew."""
    w = layer.quantizer.dequantize(layer.handle, dtype=torch.float32).double() + update(layer, adapter)
    if adapter in layer.lora_variant:
        w *= (layer.lora_magnitude_vector[adapter].weight.double() / w.norm(dim=1))[:, None]
    return w.detach()


def update(layer, adapter="default"):
    a, b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
    return (layer.scaling[adapter] * (b @ a)).detach()


def product(layer, factors):
    a, b = factors
    return layer.scaling["default"] * (b.double() @ a.double())


def carried_unchanged(source, spec, builder, skip=None):
    """The adapter as it is, on the new base: what PEFT alone would do."""
    config = copy.deepcopy(source.peft_config["default"])
    other = qft.wrap(qft.quantize(builder(), spec, skip=skip, progress=False), config)
    state = {k: v for k, v in source.state_dict().items() if ".default." in f"{k}."}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    return other.eval()


@torch.no_grad()
def error(model, source, ids=None):
    return relative(logits(model, ids), logits(source, ids))


# ---- nearer, and exact where it can be ------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=str)
@pytest.mark.parametrize("builder", ["llama", "qwen2", "gpt2"])
def test_outputs_are_nearer_than_with_the_adapter_unchanged(builder, old, new):
    """By default the update stays and the same number of directions is added; every figure of the report holds."""
    build = BUILDERS[builder]
    source, original = wrapped(build, old), build()
    with unchanged(source), unchanged(original):
        model = transfer(source, new, original=original)
    naive = carried_unchanged(source, new, build)
    assert error(model, source) < error(naive, source)
    report = model.transfer_report
    assert list(report.weights) == list(layers(source))
    for name, layer in layers(model).items():
        figures, v = report.weights[name], weight(layers(source)[name])
        assert figures.before == pytest.approx(relative(weight(layers(naive)[name]), v), rel=1e-4, abs=1e-7)
        assert figures.after == pytest.approx(relative(weight(layer), v), rel=1e-4, abs=1e-6)
        assert figures.after < 0.95 * figures.before or not figures.before
        assert figures.rank == layer.r["default"] == 16 and figures.fitted
        kept = layer.scaling["default"] * (layer.lora_B["default"].weight[:, :8] @ layer.lora_A["default"].weight[:8])
        assert relative(kept, update(layers(source)[name])) < 1e-6
    assert not model.training and all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=str)
@pytest.mark.parametrize("builder", ["llama", "qwen2", "gpt2"])
def test_a_full_rank_is_exact(builder, old, new):
    source = wrapped(BUILDERS[builder], old)
    model = transfer(source, new, BUILDERS[builder], rank=FULL)
    assert error(model, source) < 3e-6
    assert all(w.after < 2e-6 for w in model.transfer_report.weights.values())
    assert all(m.r["default"] == min(m.handle.shape) for m in layers(model).values())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rank", [None, 8, 13, FULL])
def test_the_same_quantizer_adds_nothing(spec, rank):
    source = wrapped(gpt2, spec)
    model = transfer(source, spec, gpt2, rank=rank)
    assert error(model, source) < 1e-6
    for name, layer in layers(model).items():
        figures = model.transfer_report.weights[name]
        assert (figures.before, figures.after, figures.fitted) == (0, 0, False)
        assert not layer.lora_B["default"].weight[:, 8:].any() and not layer.starts
        assert torch.equal(layer.lora_A["default"].weight[:8], layers(source)[name].lora_A["default"].weight)
    assert "equal" in str(model.transfer_report)


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_an_explicit_rank_holds_the_best_fit(rank):
    """R ≤ r: the best fit of Δ₁ + D together (Eckart and Young). R > r: the best fit of D in the R − r added."""
    source = wrapped(llama, "nf4")
    model = transfer(source, INT3, llama, rank=rank)
    for name, layer in layers(model).items():
        old = layers(source)[name]
        assert layer.r["default"] == rank
        base = layer.quantizer.dequantize(layer.handle, dtype=torch.float32).double()
        gap = weight(old) - base - (update(old) if rank > 8 else 0)
        best = float(torch.linalg.svdvals(gap)[rank - 8 if rank > 8 else rank :].norm())
        assert float((weight(old) - weight(layer)).norm()) == pytest.approx(best, rel=1e-5)
    assert ("does not hold" in str(model.transfer_report)) == (rank == 3)


# ---- every form of adapter ------------------------------------------------------------------------------------

FORMS = {
    "rslora": {"use_rslora": True},
    "negative alpha": {"lora_alpha": -12},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "down_proj": 40, "c_attn": 3, r"h\.1\.mlp\.c_fc": 50},
        "alpha_pattern": {"q_proj": 5, "up_proj": -3, "c_proj": 30},
    },
    "patterns, rslora": {"rank_pattern": {"v_proj": 1, "c_fc": 6}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "trained biases": {"bias": "all"},
    "some layers": {"layers_to_transform": [1]},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("builder", ["qwen2", "gpt2"])
@pytest.mark.parametrize("rank", [None, FULL])
def test_every_form_of_adapter(form, builder, rank, tmp_path):
    """Nearer by default, exact at full rank; and what is saved loads as it was."""
    build, options = BUILDERS[builder], dict(FORMS[form])
    if form == "lora_bias":
        options["target_modules"] = ["q_proj", "v_proj"] if builder == "qwen2" else ["c_attn", "c_fc"]
    if form == "some layers":
        options["target_modules"] = ["q_proj", "down_proj"] if builder == "qwen2" else ["c_attn"]
    source = wrapped(build, "nf4", **options)
    if form == "trained biases":
        with torch.no_grad():
            for n, p in source.named_parameters():
                if n.endswith("bias"):
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    with unchanged(source):
        model = transfer(source, INT3, build, rank=rank)
    assert layers(model).keys() == layers(source).keys()
    for name, layer in layers(model).items():
        v, figures = weight(layers(source)[name]), model.transfer_report.weights[name]
        found = relative(weight(layer), v)
        assert found == pytest.approx(figures.after, rel=1e-3, abs=1e-6)
        assert found < (0.97 * figures.before if rank is None else 2e-6)
        r = layers(source)[name].r["default"]
        assert layer.r["default"] == min(2 * r if rank is None else rank, *layer.handle.shape)
    partly = form in ("lora_bias", "some layers")  # layers without an adapter stay apart
    assert bool(model.transfer_report.unadapted) == partly
    if not partly:
        worse = error(carried_unchanged(source, INT3, build), source)
        assert error(model, source) < (worse if rank is None else 5e-6)
    qft.save(model, tmp_path / "a")
    again = qft.load(tmp_path / "a", build())
    assert error(again, model) < 1e-6
    assert record_of(again).init.startswith("transfer from BitsAndBytes4bit(")


def test_a_lora_bias_is_carried_with_its_scaling():
    source = wrapped(qwen2, "nf4", lora_bias=True, target_modules=["q_proj", "v_proj"], use_rslora=True)
    model = transfer(source, "int8", qwen2)
    for name, layer in layers(model).items():
        old = layers(source)[name]
        mine, theirs = (m.lora_B["default"].bias * m.scaling["default"] for m in (layer, old))
        assert relative(mine, theirs) < 1e-6 and theirs.any()


@pytest.mark.parametrize("size", ["scale_layer", "set_scale"])
def test_a_scaling_that_was_changed_by_hand_counts(size):
    source = wrapped(llama, "nf4")
    for layer in layers(source).values():
        layer.scale_layer(0.3) if size == "scale_layer" else layer.set_scale("default", 0.3)
    model = transfer(source, INT3, llama, rank=FULL)
    assert error(model, source) < 3e-6


def test_modules_to_save_embeddings_and_float_layers_are_carried_unchanged():
    """Where the weights are float in both bases the adapter is what it was, in its own rank."""
    skip = ["down_proj"]
    source = wrapped(
        llama,
        "nf4",
        skip=skip,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        rank_pattern={"embed_tokens": 5},
    )
    model = transfer(source, INT3, llama, skip=skip)
    state, old = model.state_dict(), source.state_dict()
    for n, m in layers(model).items():
        assert m.r["default"] == (8 if "down_proj" in n else 16)
    same = [k for k in old if ".default" in k and "q_proj" not in k]
    assert all(any(part in k for k in same) for part in ("embed_tokens", "down_proj", "lm_head"))
    for k in same:
        assert torch.equal(state[k], old[k]), k
    everything = transfer(source, INT3, llama, skip=skip, rank=FULL)
    assert {n: w.after < 2e-6 for n, w in everything.transfer_report.weights.items()} == dict.fromkeys(
        layers(model), True
    )
    assert all(w.before == 0 for n, w in model.transfer_report.weights.items() if "down_proj" in n)


def test_trained_tokens_are_carried():
    source = wrapped(llama, "nf4", trainable_token_indices=[3, 7])
    key = next(k for k in source.state_dict() if "trainable_tokens_delta" in k)
    assert torch.equal(transfer(source, INT3, llama).state_dict()[key], source.state_dict()[key])


def test_a_layer_that_one_base_leaves_in_float():
    """D is then the whole quantization error; it is fitted in both directions."""
    float_in_old, float_in_new = wrapped(gpt2, "nf4", skip=["c_fc"]), wrapped(gpt2, "nf4")
    for source, skip in ((float_in_old, None), (float_in_new, ["c_fc"])):
        assert error(transfer(source, "nf4", gpt2, skip=skip, rank=FULL), source) < 3e-6
        model = transfer(source, "nf4", gpt2, skip=skip)
        for name, figures in model.transfer_report.weights.items():
            assert figures.fitted == ("c_fc" in name) and (figures.after < figures.before) == ("c_fc" in name)


def test_patterns_of_quantizers():
    source = wrapped(llama, {"*.mlp.*": "nf4", "*": "int8"})
    model = transfer(source, {"*.mlp.*": INT3, "*.q_proj": None, "*": "nf4"}, llama, rank=FULL)
    assert error(model, source) < 3e-6
    assert "BitsAndBytes4bit" in model.transfer_report.source and "Reference" in model.transfer_report.target


def test_layers_without_an_adapter_are_reported():
    source = wrapped(llama, "nf4", target_modules=["q_proj"])
    model = transfer(source, INT3, llama, rank=FULL)
    assert len(model.transfer_report.unadapted) == 12 and "12 weights without an adapter" in str(model.transfer_report)
    name = "model.layers.0.mlp.up_proj"
    there, here = (
        m.quantizer.dequantize(m.quantizer.weights(m)[0])
        if hasattr(m, "quantizer")
        else m._qft_quantizer.dequantize(m._qft_quantizer.weights(m)[0])
        for m in (source.get_base_model().get_submodule(name), model.get_base_model().get_submodule(name))
    )
    assert model.transfer_report.unadapted[name] == pytest.approx(relative(here, there), rel=1e-5)


def test_ranks_larger_than_a_layer():
    """An adapter of plain PEFT may be wider than its layer; it comes down to the full rank, and loses nothing."""
    config = LoraConfig(r=70, target_modules=["up_proj", "k_proj"])
    model = qft.quantize(llama(), "nf4", progress=False)
    source = fill(get_peft_model(model, config).eval())
    moved = transfer(source, INT3, llama)
    assert {n.rpartition(".")[2]: m.r["default"] for n, m in layers(moved).items()} == {"up_proj": 64, "k_proj": 32}
    assert all(w.after < 2e-6 for w in moved.transfer_report.weights.values())


@pytest.mark.parametrize("forward", ["dequantize", "native"])
def test_the_forward_of_the_source_is_kept(forward):
    source = qft.wrap(qft.quantize(llama(), "nf4", progress=False), forward=forward)
    model = transfer(source, "int8", llama)
    assert record_of(model).forward == forward and all(
        m.native == (forward == "native") for m in layers(model).values()
    )


def test_half_precision_and_plain_models():
    for dtype in (torch.bfloat16, torch.float16):
        source = fill(qft.quantize_and_wrap(llama(dtype), "nf4", progress=False).eval())
        model = transfer(source, INT3, original=llama(dtype), rank=FULL)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        assert all(w.after < 2e-6 for w in model.transfer_report.weights.values())
    source = wrapped(plain, "nf4")
    assert error(transfer(source, "int8", plain, rank=FULL), source) < 3e-6


# ---- with calibration data ------------------------------------------------------------------------------------


def uneven(builder=llama):
    """A model whose layers read some features far more loudly than others, as real ones do."""
    model = builder()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n or "ln_" in n:
                p.mul_(torch.exp(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))))
    return model


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("use_dora", [False, True])
def test_calibration_lowers_the_output_error_on_its_data(rank, use_dora):
    data = [batch(seed=s, shape=(4, 32)) for s in range(4)]
    source = wrapped(uneven, "nf4", use_dora=use_dora)
    with unchanged(source):
        weighted = transfer(source, INT3, uneven, rank=rank, calibration=data)
    unweighted = transfer(source, INT3, uneven, rank=rank)
    ids = torch.cat(data)
    assert (
        error(weighted, source, ids)
        < error(unweighted, source, ids)
        < error(carried_unchanged(source, INT3, uneven), source, ids)
    )
    for w, u in zip(weighted.transfer_report.weights.values(), unweighted.transfer_report.weights.values()):
        assert w.output_after < w.output_before and u.output_after is None
        assert w.before == u.before and w.after >= u.after * (1 - 1e-4)
    assert "of the outputs" in str(weighted.transfer_report)


def test_the_figures_of_the_outputs_are_those_of_the_data():
    """√E‖(V − V₂)x‖² / √E‖Vx‖² with the x that the source's layer reads; a hundredth of damping is in them."""
    source, data = wrapped(uneven, "nf4"), [batch(seed=s, shape=(8, 64)) for s in range(2)]
    model = transfer(source, INT3, uneven, calibration=data)
    name = "model.layers.1.mlp.gate_proj"
    seen = []
    hook = layers(source)[name].register_forward_hook(lambda m, args, out: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in data:
            logits(source, ids)
    hook.remove()
    x = torch.cat(seen).double()
    v, v2 = weight(layers(source)[name]), weight(layers(model)[name])
    wanted = float((x @ (v - v2).T).norm() / (x @ v.T).norm())
    assert model.transfer_report.weights[name].output_after == pytest.approx(wanted, rel=0.05)


def test_a_layer_that_reads_nothing_is_fitted_unweighted():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 64)
            self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, input_ids):
            return self.used(self.embed(input_ids))

    def build():
        torch.manual_seed(0)
        return Idle().eval()

    model = transfer(wrapped(build, "nf4"), INT3, build, calibration=[batch()])
    used, idle = (model.transfer_report.weights[n] for n in ("used", "idle"))
    assert idle.output_after is None and used.output_after < used.output_before and idle.after < idle.before
    assert "no calibration tokens" in str(model.transfer_report)


def test_an_iterator_serves_a_quantizer_that_reads_data_and_the_fit(monkeypatch):
    seen = []

    class Calibrated(Rows):
        name = "calibrated"

        @property
        def capabilities(self):
            return replace(super().capabilities, needs_calibration=True)

        def pack(self, weight, *, statistics=None):
            seen.append(statistics.tokens)
            return super().pack(weight)

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register_quantizer("calibrated", Calibrated)
    source = wrapped(llama, "nf4")
    with refuses(qft.NeedsCalibration, "calibration=", model=source):
        transfer(source, "calibrated:bits=3", llama)
    model = transfer(source, "calibrated:bits=3", llama, calibration=iter([batch(), batch(seed=2)]))
    assert set(seen) == {48}
    assert all(w.output_after < w.output_before for w in model.transfer_report.weights.values())
    registry._owners.cache_clear()


# ---- where what was learnt begins -----------------------------------------------------------------------------


@pytest.mark.parametrize("init", [None, "loftq", "pissa"])
@pytest.mark.parametrize("rank", [None, 5, 8, 11, FULL])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=["lora", "rslora"])
def test_starts_hold_what_was_not_learnt(init, rank, options):
    """Δ₂ − Δ0₂ is Δ₁ − Δ0₁, so that a merge into the original weights adds what was learnt, and no more."""
    source = wrapped(llama, "nf4", init=init, **options)
    model = transfer(source, INT3, llama, rank=rank)
    for name, layer in layers(model).items():
        old = layers(source)[name]
        learnt = update(old) - (product(old, old.starts["default"]) if init else 0)
        mine = update(layer) - product(layer, layer.starts["default"])
        assert relative(mine, learnt) < 2e-5
        a, b = layer.starts["default"]
        assert a.shape[1:] == (layer.in_features,) and b.shape[:1] == (layer.out_features,) and a.dtype == torch.float32
        if rank in (None, 11, FULL):
            assert a.shape == layer.lora_A["default"].weight.shape and b.shape == layer.lora_B["default"].weight.shape


def test_a_second_transfer_keeps_what_was_learnt():
    source = wrapped(llama, "nf4")
    model = transfer(transfer(source, INT3, llama), "nf4", llama)
    for name, layer in layers(model).items():
        assert relative(update(layer) - product(layer, layer.starts["default"]), update(layers(source)[name])) < 1e-5


@pytest.mark.parametrize("rank", [None, 8, FULL])
def test_a_start_that_is_not_known_stays_unknown(rank):
    source = wrapped(llama, "nf4", init="loftq")
    layers(source)["model.layers.0.mlp.up_proj"].starts["default"] = None
    starts = {n: m.starts["default"] for n, m in layers(transfer(source, INT3, llama, rank=rank)).items()}
    assert [n for n, s in starts.items() if s is None] == ["model.layers.0.mlp.up_proj"]
    for layer in layers(source).values():  # as where an init is noted, and none of its starts was saved
        layer.starts.clear()
    assert {m.starts["default"] for m in layers(transfer(source, INT3, llama, rank=rank)).values()} == {None}


# ---- folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A float model's folder, in shards."""
    folder = tmp_path_factory.mktemp("float") / "llama"
    llama().save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory, floats):
    """An adapter's folder that names the float model's, and the model itself."""
    model = qft.quantize_and_wrap(floats, "nf4", adapter=LoraConfig(r=8, target_modules="all-linear"), progress=False)
    fill(model.eval())
    folder = tmp_path_factory.mktemp("adapter") / "a"
    qft.save(model, folder)
    return folder, model


def test_a_folder_that_names_its_base_is_enough(saved, floats, tmp_path):
    folder, model = saved
    wanted = transfer(model, INT3, llama)
    for moved in (transfer(folder, INT3), transfer(str(folder), INT3, original=floats), transfer(model, INT3)):
        assert error(moved, wanted) < 1e-6
        assert moved.peft_config["default"].base_model_name_or_path == str(floats)
        assert moved.transfer_report == wanted.transfer_report
    assert not any(p.requires_grad for p in transfer(folder, INT3).parameters()), "load freezes, too"
    qft.save(transfer(folder, INT3), tmp_path / "b")
    assert error(qft.load(tmp_path / "b"), wanted) < 1e-6
    assert json.dumps(wanted.transfer_report.to_dict())


@pytest.mark.parametrize("rank", [None, 8, FULL])
def test_save_and_load_at_every_kind_of_rank(saved, tmp_path, rank):
    model = transfer(saved[1], INT3, rank=rank)
    qft.save(model, tmp_path / "b")
    again = qft.load(tmp_path / "b", llama())
    assert error(again, model) < 1e-6
    for name, layer in layers(again).items():
        assert layer.r == layers(model)[name].r


def test_plain_peft_loads_the_result(saved, tmp_path):
    """rank_pattern and all: the folder is one of PEFT's."""
    source = wrapped(gpt2, "nf4", skip=["c_fc"], rank_pattern={"attn.c_proj": 3})
    model = transfer(source, "int8", gpt2, skip=["c_fc"])
    qft.save(model, tmp_path / "b")
    twin = dequantized_copy(qft.quantize(gpt2(), "int8", progress=False, skip=["c_fc"]), gpt2())
    with stock_peft():
        theirs = PeftModel.from_pretrained(twin, tmp_path / "b").eval()
    assert error(theirs, model) < 1e-5


def test_what_a_folder_is_loaded_over_is_left_alone(saved):
    folder, model = saved
    wanted = logits(transfer(model, INT3, llama))
    quantized, floating = qft.quantize(llama(), "nf4", progress=False), llama()
    for base, original in ((quantized, None), (floating, None), (floating, floating), (None, floating)):
        watched = base if base is not None else original
        config = watched.config.to_dict()
        with unchanged(watched):
            moved = transfer(folder, INT3, base=base, original=original)
        assert watched.config.to_dict() == config
        assert relative(logits(moved), wanted) < 1e-6
    assert record_of(quantized).init is None
    qft.wrap(quantized)  # as if it had never carried an adapter


def test_a_base_stored_in_the_folder(floats, tmp_path):
    source = wrapped(llama, "nf4", init="pissa")
    qft.save(source, tmp_path / "a")
    with refuses(qft.NeedsOriginal, "original="):
        transfer(tmp_path / "a", INT3)
    moved = transfer(tmp_path / "a", "nf4", original=floats, rank=FULL)
    assert error(moved, source) < 5e-6


def test_originals_share_nothing_with_the_result():
    """Training all that is trainable, biases and embeddings too, leaves the caller's model alone."""
    original = gpt2()
    source = wrapped(gpt2, "nf4", bias="all", skip=["c_fc"], modules_to_save=["ln_f"])
    model = transfer(source, "int8", original=original, skip=["c_fc"])
    mine = {p.data_ptr() for p in original.parameters()}
    assert not [n for n, t in model.state_dict().items() if isinstance(t, torch.Tensor) and t.data_ptr() in mine]
    with unchanged(original), unchanged(source):
        train_a_little(model)
        qft.merge(model)


def test_the_float_weights_are_not_copied():
    """A second float model is never in memory: linear weights are the caller's until they are quantized."""
    original = gpt2()
    with float_twin(original, [qft.get_quantizer("nf4")]) as twin:
        shared = [n for n, p in twin.named_parameters() if p.data_ptr() == original.get_parameter(n).data_ptr()]
        assert len([n for n in shared if ".c_" in n]) == 8 and not [n for n in shared if n.endswith("bias")]
        assert not [n for n, p in twin.named_parameters() if p is original.get_parameter(n)]
    assert not [n for n, p in twin.named_parameters() if p.data_ptr() == original.get_parameter(n).data_ptr()]


def test_tied_weights_stay_tied():
    model = transfer(wrapped(gpt2, "nf4"), "int8", gpt2).get_base_model()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_tool_that_rewrites_whole_models_gets_copies_of_its_own(monkeypatch):
    class InPlace(Rows):
        name = "in-place"

        def quantize(self, model, targets, **kwargs):
            for name in targets:
                model.get_submodule(name).weight.data.mul_(1.0001)
            return super().quantize(model, targets, **kwargs)

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register_quantizer("in-place", InPlace)
    original = llama()
    with unchanged(original):
        transfer(wrapped(llama, "nf4"), "in-place", original=original)
    registry._owners.cache_clear()


def test_another_adapter_name_and_a_second_adapter():
    source = wrapped(llama, "nf4")
    source.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    fill(source, "second", seed=5)
    source.set_adapter("second")
    model = transfer(source, INT3, llama, rank=FULL)
    assert list(model.peft_config) == ["second"] and model.active_adapters == ["second"]
    name = "model.layers.0.self_attn.q_proj"
    assert relative(weight(layers(model)[name], "second"), weight(layers(source)[name], "second")) < 2e-6


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says", "options"),
    [
        (qft.BadShape, "rank", {"rank": 0}),
        (qft.BadShape, "rank", {"rank": 2.0}),
        (qft.BadShape, "rank", {"rank": True}),
        (qft.UnknownQuantizer, "nf5", {"quantizer": "nf5"}),
        (qft.BadShape, "group_size", {"quantizer": "reference:format=int,bits=4,group_size=48"}),
        (qft.UnsupportedDevice, "cuda:77", {"device": "cuda:77"}),
        (qft.BadOption, "base=", {"base": "somewhere"}),
        (qft.BadOption, "skip", {"skip": ["nothing_of_this_name"]}),
        (qft.BadOption, "revision", {"revision": "main"}),
        (qft.BadOption, "tokenizer", {"calibration": ["a text"]}),
        (qft.NeedsCalibration, "no tokens", {"calibration": []}),
        (qft.BadOption, "token id", {"calibration": [torch.tensor([[VOCABULARY]])]}),
        (qft.BadOption, "int", {"original": 3}),
        (qft.BadFolder, "nowhere", {"original": "/nowhere/at/all"}),
    ],
    ids=str,
)
def test_bad_arguments_leave_everything_alone(error, says, options):
    source, original = wrapped(llama, "nf4"), llama()
    options = {"quantizer": INT3, "original": original, **options}
    with refuses(error, says, model=source), unchanged(original):
        transfer(source, options.pop("quantizer"), **options)


def test_other_float_weights_are_refused(tmp_path):
    source, other = wrapped(llama, "nf4"), llama(seed=1)
    with refuses(qft.AdapterMismatch, "other float weights", model=source), unchanged(other):
        transfer(source, INT3, original=other)
    other.save_pretrained(tmp_path / "other")
    with refuses(qft.AdapterMismatch, "other float weights", model=source):
        transfer(source, INT3, original=tmp_path / "other")
    for wrong in (gpt2(), llama(num_hidden_layers=1), llama(intermediate_size=96)):
        with refuses(qft.AdapterMismatch, model=source), unchanged(wrong):
            transfer(source, INT3, original=wrong)
    with torch.no_grad():
        left = llama()
        left.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    skipped = wrapped(llama, "nf4", skip=["down_proj"])  # float there, quantized here, and the other way round
    for model, skip in ((skipped, None), (source, ["down_proj"]), (skipped, ["down_proj"])):
        with refuses(qft.AdapterMismatch, "down_proj", model=model), unchanged(left):
            transfer(model, INT3, original=left, skip=skip)


def test_the_original_must_be_float_and_there(tmp_path):
    source = wrapped(llama, "nf4")
    quantized = qft.quantize(llama(), "reference", progress=False)
    for wrong in (quantized, source):
        with refuses(qft.BadOption, "original=", model=source):
            transfer(source, INT3, original=wrong)
    quantized.save_pretrained(tmp_path / "quantized")
    with refuses(qft.NeedsOriginal, "quantized", model=source):
        transfer(source, INT3, original=tmp_path / "quantized")
    with refuses(qft.NeedsOriginal, "original=", model=source):
        transfer(source, INT3)
    source.peft_config["default"].base_model_name_or_path = str(tmp_path / "quantized")
    with refuses(qft.NeedsOriginal, "is quantized", model=source):
        transfer(source, INT3)
    source.peft_config["default"].base_model_name_or_path = str(tmp_path / "absent")
    with refuses(qft.NeedsOriginal, "cannot be read", model=source):
        transfer(source, INT3)


def test_sources_that_cannot_be_carried():
    original = llama()
    for wrong in (llama(), qft.quantize(llama(), "nf4", progress=False)):
        with refuses(qft.BadOption, "qft.wrap", model=wrong):
            transfer(wrong, INT3, original=original)
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    prefix = qft.wrap(qft.quantize(llama(), "nf4", progress=False), config)
    with refuses(qft.UnsupportedOperation, "PREFIX_TUNING"):
        transfer(prefix, INT3, original=original)

    source = wrapped(llama, "nf4")
    source.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    source.base_model.set_adapter(["default", "second"])
    with refuses(qft.BadOption, "default, second", "set_adapter", model=source):
        transfer(source, INT3, original=original)
    source.set_adapter("default")
    with source.disable_adapter(), refuses(qft.BadOption, "disabled", model=source):
        transfer(source, INT3, original=original)
    qft.merge(source)
    with refuses(qft.BadOption, "qft.unmerge", model=source):
        transfer(source, INT3, original=original)
    qft.unmerge(source)
    source.peft_config["default"].use_qalora = True
    with refuses(qft.UnsupportedOperation, "use_qalora", model=source):
        transfer(source, INT3, original=original)
    source.peft_config["default"].use_qalora = False
    assert transfer(source, INT3, original=original)
    with torch.no_grad():
        layers(source)["model.layers.0.mlp.up_proj"].lora_B["default"].weight[3, 1] = float("nan")
    with refuses(qft.NonFiniteWeights, "up_proj", model=source, outputs=False):
        transfer(source, INT3, original=original)


def test_alpha_of_zero_and_layers_trained_whole():
    zero = wrapped(llama, "nf4", alpha_pattern={"q_proj": 0})
    with refuses(qft.BadOption, "lora_alpha is 0", model=zero):
        transfer(zero, INT3, llama)
    whole = wrapped(llama, "nf4", target_modules=["q_proj"], modules_to_save=["down_proj"], skip=["down_proj"])
    with refuses(qft.UnsupportedOperation, "modules_to_save", model=whole):
        transfer(whole, INT3, llama)
    assert transfer(whole, INT3, llama, skip=["down_proj"], rank=FULL)


def test_bad_folders(tmp_path, saved):
    for wrong, kind in ((tmp_path, qft.BadFolder), (tmp_path / "absent", qft.BadFolder), (7, qft.BadOption)):
        with refuses(kind):
            transfer(wrong, INT3, llama)
    base = qft.quantize(llama(), "nf4", progress=False)
    with refuses(qft.AdapterMismatch, "float weights", model=base):
        transfer(saved[0], INT3, base=base, original=llama(seed=1))
    other = qft.quantize(llama(seed=1), "nf4", progress=False)
    with refuses(qft.AdapterMismatch, model=other):
        transfer(saved[0], INT3, base=other)
    with refuses(qft.BadOption, "dtype"):
        transfer(saved[0], INT3, base=base, original=llama(), dtype="bfloat16")


def test_an_interrupted_fit_leaves_the_source_alone(monkeypatch):
    source, original = wrapped(llama, "nf4"), llama()
    real, calls = transferring.carry, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(transferring, "carry", stops)
    for data in (None, [batch()]):
        calls.clear()
        with unchanged(source), unchanged(original), pytest.raises(KeyboardInterrupt):
            transfer(source, INT3, original=original, calibration=data)


def test_a_source_without_a_fingerprint_is_carried_with_a_warning():
    source = wrapped(llama, "nf4")
    record_of(source).fingerprint.clear()
    with pytest.warns(qft.QftWarning, match="cannot be checked"):
        model = transfer(source, INT3, llama, rank=FULL)
    assert error(model, source) < 3e-6


def test_the_report_says_where_no_fit_helped():
    report = qft.TransferReport("a", "b")
    report.weights["x"] = WeightTransfer(0.5, 0.5, 4, False)
    report.weights["y"] = WeightTransfer(0.5, 0.1, 4, True)
    assert (
        report.unfitted == ["x"] and "1 carried unchanged, x first" in str(report) and "0.5000 → 0.3000" in str(report)
    )


def test_directions_that_do_not_help_are_left_zero(monkeypatch):
    """A fit that raises the error is not taken: the update stays, the added directions compute nothing, train still."""
    monkeypatch.setattr(LoftQ, "__call__", lambda self, w, q, rank, scaling, **_: (
        torch.ones(rank, w.shape[1]), torch.ones(len(w), rank), None))  # fmt: skip
    source = wrapped(llama, "nf4")
    for rank in (None, 8):
        model = transfer(source, INT3, llama, rank=rank)
        assert model.transfer_report.unfitted == list(layers(model))
        for name, layer in layers(model).items():
            assert relative(update(layer), update(layers(source)[name])) < 1e-6 and not layer.starts
            assert layer.lora_A["default"].weight.all() and not layer.lora_B["default"].weight[:, 8:].any()
        assert "no fit lowered the error" in str(model.transfer_report)

"""Merging into the quantized base and back, into floats, by PEFT's own verbs, and adapters that change hands."""

import copy
import re
import warnings

import peft
import pytest
import torch
from models import (
    ALL_BUILDERS,
    BUILDERS,
    OTHER_INPUTS,
    gpt2,
    llama,
    logits,
    name_of,
    plain,
    qwen2,
    qwen3_moe,
    relative,
    t5,
    train_a_little,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from twins import SPECS, fill, loss_and_gradients, pair, quantized, share, stock_peft

import qft
from qft.core.registry import quantizer_of
from qft.lora.layer import QftLinear

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = {
    "lora": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "dora": {"lora_alpha": 12, "use_dora": True},
    "lora_bias": {"lora_alpha": 12, "lora_bias": True},
}
BIASED = {  # layers with biases, for lora_bias; the others stay float, so that every quantized layer is adapted
    "qwen2": {"target_modules": ["q_proj", "k_proj", "v_proj"], "skip": ["o_proj", "mlp"]},
    "gpt2": {},
    "plain": {"target_modules": r"blocks\.\d\.[02]", "skip": ["out"]},
}
CASES = [(b, v) for b in BUILDERS for v in VARIANTS if v != "lora_bias" or b in BIASED]
MORE_CASES = [*CASES, *((b, v) for b in OTHER_INPUTS for v in ("lora", "dora"))]


def config(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def tuned(builder, spec, variant="lora", dtype=torch.float32, skip=None, forward="dequantize", **options):
    """A quantized model with random adapters in eval mode."""
    if variant == "lora_bias":
        special = dict(BIASED[builder.__name__])
        skip = special.pop("skip", skip)
        options = {**special, **options}
    model = qft.quantize(builder(dtype), spec, skip=skip, progress=False)
    model = qft.wrap(model, config(**VARIANTS[variant], **options), forward=forward).eval()
    return fill(model)


def bits(model):
    """Everything that a state dict holds, with the constants that bitsandbytes keeps beside it, to be compared."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for name, module, quantizer, handle in quantized(model):
        state[f"{name}: values"] = quantizer.dequantize(handle, dtype=torch.float32)
        state[f"{name}: type"] = type(module)
    return state


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        )
    return a == b


def changed(before, after):
    assert before.keys() == after.keys()
    return [k for k in before if not same_bits(before[k], after[k])]


def layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, QftLinear)}


@torch.no_grad()
def run(model, **kwargs):
    return logits(model, **kwargs)


# ---- into the quantized base, and back ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("builder", "variant"), CASES)
def test_unmerge_is_bit_exact(spec, builder, variant):
    model = tuned(BUILDERS[builder], spec, variant)
    before, y = bits(model), run(model)
    for _ in range(2):
        report = qft.merge(model)
        assert report.weights.keys() == layers(model).keys()
        assert changed(before, bits(model)), "merging changed nothing"
        assert relative(run(model), y) > 1e-7
        qft.unmerge(model)
        assert changed(before, bits(model)) == []
        assert torch.equal(run(model), y)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(
    ("builder", "skip"), [(llama, ["v_proj", "down_proj"]), (gpt2, ["c_attn"]), (t5, r".*\.(k|wi_0)")], ids=name_of
)
def test_unmerge_is_bit_exact_over_sixteen_bit_and_skipped_layers(spec, dtype, builder, skip):
    """PEFT subtracts what it added, which in 16 bit does not come back; float layers that carry adapters included."""
    model = tuned(builder, spec, "dora", dtype, skip=skip)
    floats = [n for n, m in layers(model).items() if quantizer_of(m.base_layer) is None]
    assert floats
    before, y = bits(model), run(model)
    report = qft.merge(model)
    touched = changed(before, bits(model))
    assert all(any(n in k for k in touched) for n in floats)
    assert all(report.weights[n].survived > 0.9 for n in floats), "a float layer keeps its update"
    qft.unmerge(model)
    assert changed(before, bits(model)) == []
    assert torch.equal(run(model), y)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias"])
def test_the_merged_weight_is_the_requantized_sum(spec, variant):
    """Bit for bit what quantizing Ŵ + Δ with the layer's own options gives, and the forward is that weight's."""
    model = tuned(gpt2, spec, variant)
    wanted, biases = {}, {}
    for name, layer in layers(model).items():
        w = layer.quantizer.dequantize(layer.handle, dtype=torch.float32)
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        wanted[name] = w + 3.0 * (b @ a)
        if variant == "dora":
            norm = wanted[name].norm(dim=1, keepdim=True)
            wanted[name] *= layer.lora_magnitude_vector["default"].weight.detach()[:, None] / norm
        biases[name] = layer.base_layer.bias.detach().clone()
        if variant == "lora_bias":
            biases[name] += 3.0 * layer.lora_B["default"].bias.detach()
    qft.merge(model)
    twin = gpt2()
    for name, layer in layers(model).items():
        fresh = nn.Linear(wanted[name].shape[1], wanted[name].shape[0])
        fresh.weight.data = wanted[name]
        again = layer.quantizer.quantize_layer(fresh)
        expected = layer.quantizer.dequantize(layer.quantizer.weights(again)[0], dtype=torch.float32)
        stored = layer.quantizer.dequantize(layer.handle, dtype=torch.float32)
        off = (stored != expected).float().mean()  # a weight on the edge between two codes may fall to either side
        assert off < 1e-4
        torch.testing.assert_close(layer.base_layer.bias, biases[name])
        twin.get_submodule(name).weight.data = stored.T.contiguous()
        twin.get_submodule(name).bias.data = biases[name]
    assert relative(run(model), run(twin)) < 1e-6


@pytest.mark.parametrize("spec", SPECS)
def test_the_reports_figures_by_hand(spec):
    model = tuned(qwen2, spec)
    before = {n: m.quantizer.dequantize(m.handle, dtype=torch.float64) for n, m in layers(model).items()}
    report = qft.merge(model)
    assert report.route == "quantized"
    shares, errors = [], []
    for name, layer in layers(model).items():
        delta = 3.0 * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())
        after = layer.quantizer.dequantize(layer.handle, dtype=torch.float64)
        stored = after - before[name]
        share_ = float((stored * delta).sum() / (delta * delta).sum())
        error = float((after - before[name] - delta).norm() / (before[name] + delta).norm())
        found = report.weights[name]
        assert found.survived == pytest.approx(share_, abs=1e-5)
        assert found.relative_error == pytest.approx(error, rel=1e-4)
        assert found.update_norm == pytest.approx(float(delta.norm() / before[name].norm()), rel=1e-5)
        shares.append(share_)
        errors.append(error)
    assert report.survived == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    assert report.relative_error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    values = report.to_dict()
    assert values["survived"] == report.survived
    assert values["weights"].keys() == before.keys()
    text = str(report)
    assert f"merged {len(before)} weights into the quantized base" in text
    assert f"{report.survived:.1%} of the update survived" in text
    least = min(report.weights, key=lambda n: report.weights[n].survived)
    assert least in text.splitlines()[2]


def one_layer(spec, rank=16, size=512, seed=0):
    """One 512 × 512 layer of normal weights with a random adapter, and a setter of ‖Δ‖ / ‖Ŵ‖."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    nn.init.normal_(model[0].weight, std=0.02)
    model = qft.wrap(qft.quantize(model, spec, progress=False), config(r=rank, lora_alpha=rank))
    (layer,) = layers(model).values()
    a, b = layer.lora_A["default"].weight.data.normal_(), layer.lora_B["default"].weight.data.normal_()
    start = b / (b @ a).norm() * layer.quantizer.dequantize(layer.handle, dtype=torch.float32).norm()
    return model, lambda share_: b.copy_(start * share_)


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_how_much_of_a_small_update_survives_nf4(spec):
    """Rounding to the nearest code swallows updates that are small beside the steps between codes."""
    model, set_size = one_layer(spec)
    survived = {}
    for size in (0.01, 0.03, 0.08, 0.10, 0.32):
        set_size(size)
        report = qft.merge(model)
        assert next(iter(report.weights.values())).update_norm == pytest.approx(size, rel=1e-4)
        survived[size] = report.survived
        qft.unmerge(model)
    assert survived[0.01] == pytest.approx(0.016, abs=0.003)
    assert survived[0.03] == pytest.approx(0.04, abs=0.006)
    assert survived[0.08] == pytest.approx(0.69, abs=0.02)
    assert survived[0.10] == pytest.approx(0.84, abs=0.02)
    assert survived[0.32] == pytest.approx(0.99, abs=0.01)


def test_finer_formats_keep_more():
    """Of an update of 3 %: LLM.int8() keeps all, 4 bits a few percent."""
    shares = {}
    for spec in (
        "int8",
        "reference:format=int,bits=8,group_size=64",
        "nf4",
        "reference:format=int,bits=3,group_size=32",
    ):
        model, set_size = one_layer(spec)
        set_size(0.03)
        shares[spec] = qft.merge(model).survived
    eight, three = list(shares.values())[:2], list(shares.values())[2:]
    assert all(s == pytest.approx(1, abs=0.01) for s in eight)
    assert all(s < 0.1 for s in three)


def test_the_float_route_loses_nothing():
    model, set_size = one_layer("nf4")
    set_size(0.01)
    report = qft.merge_to_float(model).merge_report
    assert report.route == "float"
    assert report.survived == pytest.approx(1, abs=1e-5)
    assert report.relative_error < 1e-7
    half = qft.merge_to_float(model, dtype="bfloat16").merge_report
    assert half.survived == pytest.approx(1, abs=0.01)
    assert half.relative_error < 2e-3
    assert "merged 1 weights into floats" in str(report)


# ---- to floats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("builder", "variant"), MORE_CASES)
def test_merge_to_float_gives_the_tuned_models_output(spec, builder, variant):
    """In float32 to 1e-5 (2e-6 found), on every backend, model and kind of adapter."""
    model = tuned(ALL_BUILDERS[builder], spec, variant)
    before, y = bits(model), run(model)
    plain_model = qft.merge_to_float(model, dtype=torch.float32)
    assert relative(run(plain_model), y) < 2e-6
    assert changed(before, bits(model)) == [], "the source is as it was"
    assert torch.equal(run(model), y)
    with model.disable_adapter():
        assert relative(run(model), y) > 1e-3


@pytest.mark.parametrize("spec", ["nf4", "int8", SPECS[-1]])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=name_of)
@pytest.mark.parametrize(("builder", "variant"), [(b, v) for b, v in CASES if v != "rslora"])
def test_merge_to_float_in_sixteen_bit(spec, builder, variant, dtype, bound):
    """The tuned model computes in 16 bit itself: its own rounding and the merged weight's are what is seen."""
    model = tuned(BUILDERS[builder], spec, variant, dtype)
    y = run(model)
    same = qft.merge_to_float(model)
    assert {p.dtype for p in same.parameters()} == {dtype}
    assert relative(run(same), y) < bound
    wide = qft.merge_to_float(model, dtype="float32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert relative(run(wide), y) < bound
    if builder != "plain":
        assert wide.config.dtype == torch.float32


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=name_of)
def test_a_float32_model_merged_to_sixteen_bit(spec, dtype, bound):
    model = tuned(gpt2, spec)
    narrow = qft.merge_to_float(model, dtype=dtype)
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    assert relative(run(narrow), run(model)) < bound


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", BUILDERS)
def test_a_quantized_model_without_adapters_becomes_float(spec, builder):
    model = qft.quantize(BUILDERS[builder](), spec, progress=False)
    plain_model = qft.merge_to_float(model)
    for name, _, quantizer, handle in quantized(model):
        layer = plain_model.get_submodule(name)
        assert type(layer).__name__ == ("Conv1D" if handle.transposed else "Linear")
        value = quantizer.dequantize(handle)
        assert torch.equal(layer.weight, value.T if handle.transposed else value)
    assert not list(quantized(plain_model))
    error = relative(run(plain_model), run(model))
    assert error < (3e-2 if spec == "int8" else 1e-6)


MARKS = (
    "hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "_qft",
    "peft_config", "_hf_peft_config_loaded",
)  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", ALL_BUILDERS)
def test_the_float_model_has_no_trace_of_qft_or_peft(spec, builder, tmp_path):
    float_model = ALL_BUILDERS[builder]()
    model = train_a_little(
        qft.quantize_and_wrap(copy.deepcopy(float_model), spec, adapter=config(lora_alpha=12), progress=False)
    )
    merged = qft.merge_to_float(model)
    assert type(merged) is type(float_model)
    assert not [m for m in MARKS if getattr(merged, m, None)]
    assert {type(m) for m in merged.modules()} == {type(m) for m in float_model.modules()}
    expected = float_model.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in merged.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    for module, twin in zip(merged.modules(), float_model.modules(), strict=True):
        extra = {k for k in set(vars(module)) ^ set(vars(twin)) if "qft" in k or "peft" in k or "hook" in k}
        assert not extra, (type(module), extra)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    assert all(p.requires_grad for p in merged.parameters())

    mine = {p.untyped_storage().data_ptr() for p in merged.parameters()}
    theirs = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not mine & theirs, "the copy shares memory with its source"

    y = run(merged)
    if builder == "plain":
        torch.save(merged.state_dict(), tmp_path / "m.pt")
        again = ALL_BUILDERS[builder](seed=5)
        again.load_state_dict(torch.load(tmp_path / "m.pt"))
    else:
        assert "quantization_config" not in merged.config.to_dict()
        merged.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert not re.search("quant|qft|peft|lora", text)
        again = type(float_model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again), y)

    with torch.no_grad():  # and it trains and changes like any float model, on its own
        source = run(model)
        for p in merged.parameters():
            p.add_(0.01)
    assert torch.equal(run(model), source)
    _, gradients = loss_and_gradients(merged)
    assert len(gradients) == len(list(merged.parameters()))


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize(
    ("builder", "options", "tied"),
    [
        (llama, {"modules_to_save": ["lm_head"]}, False),
        (qwen2, {"modules_to_save": ["lm_head"]}, False),
        (qwen2, {"modules_to_save": ["embed_tokens", "norm"]}, False),
        (qwen2, {"target_modules": ["q_proj", "embed_tokens"]}, False),
        (qwen2, {"target_modules": ["q_proj", "lm_head"]}, False),
        (llama, {"trainable_token_indices": [3, 5]}, False),
        (qwen2, {"trainable_token_indices": [3, 5]}, True),
        (qwen2, {"bias": "all"}, True),
        (gpt2, {"bias": "lora_only", "modules_to_save": ["ln_f"]}, True),
        (
            qwen3_moe,
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            False,
        ),
    ],
    ids=name_of,
)
def test_everything_that_was_trained_is_in_the_float_model(spec, builder, options, tied, tmp_path):
    """Whole modules, embeddings, single tokens, biases, experts; a head that parted from its embedding stays parted."""
    model = tuned(builder, spec, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    before, y = bits(model), run(model)
    merged = qft.merge_to_float(model)
    assert changed(before, bits(model)) == []
    assert relative(run(merged), y) < 2e-6
    assert {type(m) for m in merged.modules()} == {type(m) for m in builder().modules()}
    assert merged.config.tie_word_embeddings == tied
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(run(again), run(merged))
    with model.disable_adapter():
        off = qft.merge_to_float(model)
        assert relative(run(off), run(model)) < 2e-6


def test_a_quantized_layer_cannot_be_trained_whole():
    """`modules_to_save` over quantized weights is refused before anything is wrapped, or quantized."""
    model = qft.quantize(llama(), "nf4", progress=False)
    before, y = bits(model), run(model)
    for names in (["down_proj"], ["mlp"], ["layers.1"]):
        with pytest.raises(qft.UnsupportedOperation, match=r"down_proj|mlp|layers\.1"):
            qft.wrap(model, config(target_modules=["q_proj"], modules_to_save=names))
        float_model = llama()
        with pytest.raises(qft.UnsupportedOperation, match="skip="):
            qft.quantize_and_wrap(
                float_model, "nf4", adapter=config(target_modules=["q_proj"], modules_to_save=names), progress=False
            )
        assert not list(quantized(float_model))
    assert changed(before, bits(model)) == []
    assert torch.equal(run(model), y)
    wrapped = qft.quantize_and_wrap(
        llama(), "nf4", adapter=config(target_modules=["q_proj"], modules_to_save=["down_proj"]), skip=["down_proj"],
        progress=False,
    )  # fmt: skip
    assert [n for n, p in wrapped.named_parameters() if p.requires_grad and "down_proj.modules_to_save" in n]


@pytest.mark.parametrize("spec", SPECS)
def test_merge_to_float_takes_what_is_active(spec):
    """The active adapters, all of them; none under `disable_adapter`; a merged base as it was rounded."""
    model = tuned(llama, spec)
    model.add_adapter("other", config(r=2, target_modules=["q_proj", "up_proj"]))
    fill(model, "other", seed=5)
    model.eval()
    outputs = []
    for names in (["default"], ["other"], ["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        y = run(model)
        assert relative(run(qft.merge_to_float(model)), y) < 2e-6
        outputs.append(y)
    assert relative(outputs[0], outputs[1]) > 1e-3
    assert relative(outputs[2], outputs[0]) > 1e-3
    with model.disable_adapter():
        y = run(model)
        merged = qft.merge_to_float(model)
        assert relative(run(merged), y) < 2e-6
        assert merged.merge_report.weights == {}
    qft.merge(model)
    y = run(model)
    assert relative(run(qft.merge_to_float(model)), y) < 2e-6
    assert relative(y, outputs[3]) > 1e-5
    with model.disable_adapter():
        off = qft.merge_to_float(model)
        assert relative(run(off), run(model)) < 2e-6
        assert relative(run(off), outputs[3]) > 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_copies_of_a_wrapped_model_are_their_own(spec):
    """A deep copy computes the same, merges alone, and merges to the same floats."""
    model = tuned(llama, spec, "dora")
    y, before = run(model), bits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), y)
    qft.merge(twin)
    assert changed(before, bits(model)) == []
    third = copy.deepcopy(twin)  # of a merged model: it can be unmerged alone
    qft.unmerge(third)
    assert changed(before, bits(third)) == []
    assert torch.equal(run(third), y)
    assert relative(run(twin), y) > 1e-6
    fill(third, seed=9)
    assert torch.equal(run(model), y)
    floats, again = qft.merge_to_float(model), qft.merge_to_float(copy.deepcopy(model))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in floats.state_dict().items())


# ---- what cannot be merged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_lora_bias_without_a_bias_trains_and_only_its_merge_is_refused(spec, tmp_path):
    base = qft.quantize(llama(), spec, progress=False)
    model = train_a_little(qft.wrap(base, config(lora_bias=True)))
    assert all(float(m.lora_B["default"].bias.abs().sum()) > 0 for m in layers(model).values()), (
        "the biases did not train"
    )
    before, y = bits(model), run(model)
    for verb in (qft.merge, qft.merge_to_float, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()):
        with pytest.raises(qft.UnsupportedOperation, match="lora_bias"):
            verb(model)
        assert changed(before, bits(model)) == []
        assert torch.equal(run(model), y)
    qft.save(model, tmp_path / "a")
    again = qft.load(tmp_path / "a", qft.quantize(llama(), spec, progress=False))
    assert torch.equal(run(again), y)
    assert type(model.unload()) is type(llama())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_broken_adapters_are_not_merged(spec, value, where):
    """Found in the last layer: nothing was merged in the first, by any verb."""
    model = tuned(llama, spec, "dora")
    parameter = [p for n, p in model.named_parameters() if where in n][-1]
    with torch.no_grad():
        kept = parameter.flatten()[3].clone()
        parameter.view(-1)[3] = value
    before = bits(model)
    verbs = [
        qft.merge,
        qft.merge_to_float,
        lambda m: m.merge_adapter(),
        lambda m: m.merge_adapter(safe_merge=True),
        lambda m: m.merge_and_unload(),
        lambda m: m.merge_and_unload(safe_merge=True),
    ]
    for verb in verbs:
        with pytest.raises(qft.NonFiniteWeights):
            verb(model)
        assert changed(before, bits(model)) == []
        assert all(not m.merged for m in layers(model).values())
    with torch.no_grad():
        parameter.view(-1)[3] = kept
    qft.merge(model)


def test_merging_needs_adapters():
    with pytest.raises(qft.BadOption, match="wrap"):
        qft.merge(qft.quantize(llama(), "nf4", progress=False))
    with pytest.raises(qft.BadOption, match="float model already"):
        qft.merge_to_float(llama())


# ---- PEFT's own verbs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merge_adapter_is_merge(spec, variant, safe):
    model = tuned(llama, spec, variant)
    before = bits(model)
    qft.merge(model)
    expected = bits(model)
    qft.unmerge(model)
    model.merge_adapter(safe_merge=safe)
    assert changed(expected, bits(model)) == []
    model.unmerge_adapter()
    assert changed(before, bits(model)) == []


def several(spec, first=None, second=None, skip=None):
    model = qft.wrap(qft.quantize(llama(), spec, skip=skip, progress=False), first or config(lora_alpha=12))
    model.add_adapter("other", second or config(r=2, lora_alpha=6))
    fill(model)
    fill(model, "other", seed=5)
    return model.eval()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("skip", [None, ["v_proj"]], ids=["", "skip"])
def test_two_adapters_merged_in_turn_are_rounded_once(spec, skip):
    """Merging "other" after "default" gives what merging both at once gives: from the unmerged weight, in order."""
    model = several(spec, skip=skip)
    before = bits(model)
    model.merge_adapter(["default"])
    first = bits(model)
    model.merge_adapter(["other"])
    in_turn = bits(model)
    assert changed(first, in_turn)
    assert all(m.merged_adapters == ["default", "other"] for m in layers(model).values())
    model.unmerge_adapter()
    assert changed(before, bits(model)) == []
    model.merge_adapter(["default", "other"])
    assert changed(in_turn, bits(model)) == []
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "other"])
    report = qft.merge(model)
    assert changed(in_turn, bits(model)) == []
    floats = qft.merge_to_float(copy.deepcopy(model))
    assert relative(run(floats), run(model)) < 2e-6
    assert len(report.weights) == len(layers(model))
    model.unmerge_adapter()
    assert changed(before, bits(model)) == []


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]], ids=["lora first", "dora first"])
def test_the_order_of_merging_with_dora_is_the_order_of_the_forward(spec, order):
    """DoRA scales what came before it, so that the order shows; floats show it without rounding."""
    model = several(spec, second=config(r=2, use_dora=True))
    model.base_model.set_adapter(order)
    y = run(model)
    assert relative(run(qft.merge_to_float(model)), y) < 2e-6
    model.base_model.set_adapter(order[::-1])
    assert relative(run(model), y) > 1e-5
    before = bits(model)
    model.merge_adapter(order)
    at_once = bits(model)
    model.unmerge_adapter()
    assert changed(before, bits(model)) == []
    for name in order:
        model.merge_adapter([name])
    assert changed(at_once, bits(model)) == []
    model.unmerge_adapter()
    model.merge_adapter(order[::-1])
    assert changed(at_once, bits(model))


@pytest.mark.parametrize("spec", SPECS)
def test_two_adapters_merge_as_in_plain_peft_over_floats(spec):
    """Over float layers our merge is PEFT's, two DoRA adapters in turn included."""
    ours, theirs = pair(llama, spec, config(use_dora=True, lora_alpha=12))
    second = config(r=2, use_dora=True)
    ours.add_adapter("other", copy.deepcopy(second))
    second.target_modules = set(ours.peft_config["default"].target_modules)
    with stock_peft():
        theirs.add_adapter("other", second)
    fill(ours, "other", seed=5)
    share(ours, theirs, "other")
    for model in (ours, theirs):
        model.base_model.set_adapter(["other", "default"])
    theirs.merge_adapter(["other"])
    theirs.merge_adapter(["default"])
    assert relative(run(qft.merge_to_float(ours)), run(theirs)) < 2e-6


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merge_and_unload_merges_into_the_base_and_says_what_it_cost(spec, variant, safe):
    model = tuned(llama, spec, variant)
    report = qft.merge(model)
    y, merged = run(model), {n: m.quantizer.dequantize(m.handle) for n, m in layers(model).items()}
    qft.unmerge(model)
    with pytest.warns(qft.QftWarning, match="survived") as caught:
        warnings.simplefilter("always")
        base = model.merge_and_unload(safe_merge=safe)
    (told,) = [str(w.message) for w in caught if issubclass(w.category, qft.QftWarning)]
    assert f"{report.survived:.0%} of the update survived" in told
    assert type(base) is type(llama())
    assert not [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
    assert not hasattr(base, "peft_config")
    codes = {n: q.dequantize(h) for n, _, q, h in quantized(base)}
    assert codes.keys() == merged.keys()
    assert all(torch.equal(v, merged[n]) for n, v in codes.items())
    assert relative(run(base), y) < (3e-2 if spec == "int8" else 1e-6)
    again = qft.wrap(base, config())  # still a quantized model
    assert relative(run(again.eval()), y) < 1e-6
    assert relative(run(qft.merge_to_float(again)), y) < 2e-6


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", [llama, plain], ids=["llama", "plain"])
def test_an_adapter_over_a_merged_base_is_saved_with_that_base(spec, builder, tmp_path):
    """The base is no longer q(W): an adapter trained on top of it is useless without it."""
    base = tuned(builder, spec).merge_and_unload()
    model = fill(qft.wrap(base, config(r=2)), seed=8).eval()
    qft.save(model, tmp_path / "a")
    again = qft.load(tmp_path / "a", builder() if builder is plain else None)
    assert relative(run(again.eval()), run(model)) < 1e-7


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_unload_gives_the_base_back_to_the_bit(spec, merged):
    base = qft.quantize(llama(), spec, progress=False)
    before, y = bits(base), run(base)
    model = fill(qft.wrap(base, config(use_dora=True)).eval())
    if merged:
        qft.merge(model)
        qft.unmerge(model)
    unloaded = model.unload()
    assert unloaded is base
    assert changed(before, bits(base)) == []
    assert torch.equal(run(base), y)
    qft.wrap(base, config())


@pytest.mark.parametrize("spec", SPECS)
def test_unload_of_merged_adapters_keeps_them_in_the_base(spec, tmp_path):
    """As PEFT means it; and the base, no longer q(W), is stored with what is trained on top of it."""
    model = tuned(llama, spec)
    qft.merge(model)
    merged = {n: m.quantizer.dequantize(m.handle) for n, m in layers(model).items()}
    base = model.unload()
    assert all(torch.equal(q.dequantize(h), merged[n]) for n, _, q, h in quantized(base))
    again = fill(qft.wrap(base, config(r=2)), seed=8).eval()
    qft.save(again, tmp_path / "a")
    assert relative(run(qft.load(tmp_path / "a")), run(again)) < 1e-7


@pytest.mark.parametrize("spec", SPECS)
def test_a_merged_model_that_is_switched_is_unmerged_first(spec):
    """`set_adapter` and `disable_adapter` over merged weights, as PEFT means them."""
    model = several(spec)
    model.set_adapter("other")
    alone = run(model)
    model.set_adapter("default")
    before = bits(model)
    with model.disable_adapter():
        base = run(model)
    qft.merge(model)
    with model.disable_adapter():
        assert torch.equal(run(model), base)
    assert changed(before, bits(model)) == []
    qft.merge(model)
    with pytest.warns(UserWarning, match="Unmerging"):
        warnings.simplefilter("always")
        model.set_adapter("other")
    assert torch.equal(run(model), alone)
    model.set_adapter("default")
    assert changed(before, bits(model)) == []


@pytest.mark.parametrize("spec", SPECS)
def test_merging_twice_changes_nothing_more(spec):
    model = tuned(llama, spec)
    qft.merge(model)
    once = bits(model)
    report = qft.merge(model)
    assert report.weights == {}
    assert changed(once, bits(model)) == []
    model.merge_adapter()
    assert changed(once, bits(model)) == []
    qft.unmerge(model)
    y, before = run(model), bits(model)
    qft.unmerge(model)
    assert changed(before, bits(model)) == []
    assert torch.equal(run(model), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("builder", [llama, qwen2], ids=["llama", "tied"])
def test_adapters_on_embeddings_are_unmerged_to_the_bit(dtype, builder):
    model = tuned(builder, "nf4", dtype=dtype, target_modules=["q_proj", "embed_tokens"])
    before, y = bits(model), run(model)
    for merge, unmerge in ((qft.merge, qft.unmerge), (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter())):
        merge(model)
        assert any("embed_tokens" in k for k in changed(before, bits(model)))
        unmerge(model)
        assert changed(before, bits(model)) == []
        assert torch.equal(run(model), y)


@pytest.mark.parametrize("spec", SPECS)
def test_training_goes_on_after_unmerging(spec):
    model = qft.quantize_and_wrap(llama(), spec, adapter=config(lora_alpha=12), progress=False)
    twin = copy.deepcopy(model)
    train_a_little(model)
    qft.merge(model)
    qft.unmerge(model)
    train_a_little(model)
    train_a_little(twin)
    train_a_little(twin)
    assert torch.equal(run(model), run(twin))


# ---- adapters that change hands -----------------------------------------------------------------------------

BNB = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
HANDED_OVER = [(s, v) for s in BNB for v in VARIANTS if (s, v) != ("int8", "dora")]  # which PEFT itself cannot run
EXCHANGED = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def plain_bnb(folder, spec, dtype):
    """transformers' own bitsandbytes model, as plain PEFT users have it.

    Without bitsandbytes' CPU kernel that repacks the weights in the first forward in eval mode: behind it PEFT's DoRA
    and merges read garbage.
    """
    options = dict(BNB[spec])
    if spec == "nf4":
        options["bnb_4bit_compute_dtype"] = dtype
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options), dtype=dtype)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def peft_layers(model):
    return {type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(builder, dtype):
        key = builder.__name__, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp("float")
            builder(dtype).save_pretrained(made[key])
        return made[key]

    return folder


@pytest.mark.parametrize(("spec", "variant"), HANDED_OVER)
@pytest.mark.parametrize("dtype", EXCHANGED, ids=name_of)
@pytest.mark.parametrize("builder", [llama, qwen2, gpt2], ids=["llama", "qwen2", "gpt2"])
def test_our_adapter_in_plain_peft(spec, variant, dtype, builder, folders, tmp_path):
    """The saved folder, in stock PEFT over transformers' own bitsandbytes model: the same logits."""
    folder = folders(builder, dtype)
    forward = "native" if spec == "int8" else "dequantize"
    base = qft.quantize(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), spec, progress=False)
    ours = fill(qft.wrap(base, config(**VARIANTS[variant]), forward=forward)).eval()
    qft.save(ours, tmp_path / "a")
    with stock_peft():
        theirs = PeftModel.from_pretrained(plain_bnb(folder, spec, dtype), tmp_path / "a").eval()
    assert peft_layers(theirs) == {"peft.tuners.lora.bnb"}
    y = run(ours)
    assert relative(run(theirs), y) < EXCHANGED[dtype]
    with ours.disable_adapter():
        assert relative(run(ours), y) > 2e-3, "the adapter does something"


@pytest.mark.parametrize(("spec", "variant"), HANDED_OVER)
@pytest.mark.parametrize("dtype", EXCHANGED, ids=name_of)
def test_plain_pefts_adapter_in_ours(spec, variant, dtype, folders, tmp_path):
    """Trained and saved by stock PEFT over bitsandbytes; loaded here by every door, over either kind of base."""
    folder = folders(qwen2, dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with stock_peft():
        theirs = get_peft_model(plain_bnb(folder, spec, dtype), config(target_modules=targets, **VARIANTS[variant]))
    assert peft_layers(theirs) == {"peft.tuners.lora.bnb"}
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "a")
    y = run(theirs)

    def here():
        return qft.quantize(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), spec, progress=False)

    adopted = plain_bnb(folder, spec, dtype)
    models = [
        qft.load(tmp_path / "a", here()),
        PeftModel.from_pretrained(here(), tmp_path / "a"),
        qft.load(tmp_path / "a", adopted),
    ]
    again = qft.wrap(here(), LoraConfig(r=2, target_modules=["q_proj"]))
    again.load_adapter(tmp_path / "a", "theirs")
    again.set_adapter("theirs")
    for model in [*models, again]:
        assert layers(model)
        for layer in layers(model).values():
            layer.native = spec == "int8"
        assert relative(run(model.eval()), y) < EXCHANGED[dtype]


@pytest.mark.parametrize("spec", BNB)
def test_what_transformers_quantized_is_wrapped_trained_and_merged(spec, folders):
    """A model from `from_pretrained(quantization_config=...)` is as good as one that qft quantized."""
    folder = folders(qwen2, torch.float32)
    model = plain_bnb(folder, spec, torch.float32)
    model = train_a_little(qft.wrap(model, config(lora_alpha=12)))
    twin = qft.quantize(AutoModelForCausalLM.from_pretrained(folder), spec, progress=False)
    twin = qft.wrap(twin, config(lora_alpha=12)).eval()
    share(model, twin)
    y = run(model)
    assert relative(run(twin), y) < 1e-6
    before = bits(model)
    merged = qft.merge_to_float(model)
    assert relative(run(merged), y) < 2e-6
    assert "quantization_config" not in merged.config.to_dict()
    assert qft.merge(model).survived == pytest.approx(qft.merge(twin).survived, abs=1e-6)
    qft.unmerge(model)
    assert changed(before, bits(model)) == []


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", [gpt2, t5], ids=["gpt2", "t5"])
def test_our_adapter_in_plain_peft_over_the_float_copy(spec, builder, tmp_path):
    """A backend that PEFT does not know, handed over as floats: PEFT's own float layers take the adapter."""
    model = tuned(builder, spec, "rslora")
    qft.save(model, tmp_path / "a")
    y = run(model)
    floats = qft.merge_to_float(model.unload())
    with stock_peft():
        theirs = PeftModel.from_pretrained(floats, tmp_path / "a").eval()
    assert {type(m) for m in theirs.modules() if hasattr(m, "lora_A")} == {peft.tuners.lora.layer.Linear}
    assert relative(run(theirs), y) < 1e-6

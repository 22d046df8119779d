"""LoftQ: the best low-rank fit of the quantization error, for any alpha, any backend, and what it leaves on disk."""

import copy
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from models import BUILDERS, gpt2, llama, plain, qwen2, relative, t5, train_a_little
from peft import PeftModel, get_peft_model
from starts import (
    SCALINGS,
    base_weight,
    config,
    errors,
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
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from twins import SPECS, fill, quantized, stock_peft

import qft
from qft.backends.reference import Reference
from qft.core.registry import quantizer_of
from qft.lora.inits.lowrank import fit

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("builder", ["llama", "gpt2"])
def test_one_step_is_the_best_fit_whatever_the_scaling(spec, scaling, builder):
    """‖W − (Ŵ + sBA)‖ is what the SVD of W − Ŵ leaves out, for each layer's own rank and scaling; Ŵ is as it was."""
    float_model = BUILDERS[builder]()
    model = started(BUILDERS[builder], spec, **SCALINGS[scaling])
    untouched = dict(quantized_weights(qft.quantize(BUILDERS[builder](), spec, progress=False)))
    ranks = set()
    for name, error in errors(model, float_model).items():
        layer = layers(model)[name]
        w_hat = base_weight(layer)
        assert torch.equal(w_hat, untouched[name])
        ranks.add(layer.r["default"])
        gap = original(float_model, name) - w_hat
        best = tail(gap, layer.r["default"])
        assert error == pytest.approx(best, rel=1e-6)
        assert error < float(gap.norm()) * 0.995
    assert len(ranks) == (1 if "pattern" not in scaling else len(ranks)) and ranks
    if "pattern" in scaling:
        assert len(ranks) > 1, "the pattern matched nothing"


@pytest.mark.parametrize("spec", SPECS)
def test_the_error_only_falls_with_the_rank(spec):
    float_model, last = llama(), None
    for rank in (1, 2, 8, 24, 32):
        found = errors(started(llama, spec, r=rank, lora_alpha=7), float_model)
        assert last is None or all(found[n] < last[n] for n in found)
        last = found
    found = errors(started(llama, spec, r=64, target_modules=["q_proj", "gate_proj"]), float_model)
    assert all(e < 1e-5 * float(original(float_model, n).norm()) for n, e in found.items()), "full rank fits all of it"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("scaling", ["alpha > r", "negative", "patterns, rslora"])
def test_more_steps_are_never_worse(spec, scaling):
    """The best iterate is kept, and it is that of the stored Ŵ, not of one that was thrown away."""
    float_model = llama()
    one = errors(started(llama, spec, **SCALINGS[scaling]), float_model)
    five = errors(started(llama, spec, init=qft.LoftQ(steps=5), **SCALINGS[scaling]), float_model)
    assert all(five[n] <= one[n] * (1 + 1e-6) for n in one)
    assert sum(five[n] < 0.995 * one[n] for n in one) > (len(one) // 2 if spec != "int8" else 0)


@pytest.mark.parametrize("best_step", [1, 2, 4])
def test_the_best_step_is_kept(best_step):
    """Not the last one: with rounding that is good in one step alone, A, B and the base are that step's."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    asked = []

    def roundtrip(value):
        asked.append(value.clone())
        return value + noise * (0.01 if len(asked) + 1 == best_step else 1.0)

    first = weight + noise * (0.01 if best_step == 1 else 1.0)
    a, b, base = qft.LoftQ(steps=4)(weight, first, 3, 0.5, roundtrip=roundtrip)
    assert len(asked) == 3
    if best_step == 1:
        assert base is None
        stored = first
    else:
        assert torch.equal(base, asked[best_step - 2])
        stored = base + 0.01 * noise
    expected_a, expected_b = fit(weight - stored, 3, 0.5)
    torch.testing.assert_close(b @ a, expected_b @ expected_a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_the_iterated_start_is_loftqs_algorithm(spec):
    """Ŵ = dq(q(W − L)), L = SVD_r(W − Ŵ), the iterate of the smallest error; followed by hand."""
    model = started(llama, spec, init=qft.LoftQ(steps=4), lora_alpha=10)
    float_model = llama()
    for name, layer in layers(model).items():
        w = original(float_model, name).float()
        q, low, best = layer.quantizer, torch.zeros_like(w), None
        for _ in range(4):
            fresh = nn.Linear(w.shape[1], w.shape[0], bias=False)
            fresh.weight.data = w - low
            w_hat = q.dequantize(q.weights(q.quantize_layer(fresh))[0], dtype=torch.float32)
            u, s, vh = torch.linalg.svd(w - w_hat, full_matrices=False)
            low = u[:, :4] * s[:4] @ vh[:4]
            error = float((w - w_hat - low).norm())
            best = error if best is None else min(best, error)
        mine = float((w.double() - base_weight(layer) - start(layer)).norm())
        assert mine == pytest.approx(
            best, rel=1e-3
        )  # a code on an edge may fall to either side and change what follows


@pytest.mark.parametrize(("spec", "steps"), [*((s, 1) for s in SPECS), ("nf4", 5), (SPECS[-1], 5)])
@pytest.mark.parametrize("builder", BUILDERS)
def test_the_model_starts_nearer_to_the_float_one(spec, builder, steps):
    """The outputs of the wrapped model, by a margin; without the adapter it is the quantized model of one step."""
    float_model = BUILDERS[builder]()
    y = run(float_model)
    model = started(BUILDERS[builder], spec, init=qft.LoftQ(steps=steps), r=32)
    zero = qft.quantize_and_wrap(BUILDERS[builder](), spec, adapter=config(r=32), progress=False).eval()
    assert relative(run(model), y) < 0.85 * relative(run(zero), y)
    if steps == 1:
        with model.disable_adapter():
            assert torch.equal(run(model), run(zero))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", [gpt2, qwen2, t5, plain], ids=["gpt2", "qwen2", "t5", "plain"])
@pytest.mark.parametrize("steps", [1, 3])
def test_biases_and_transposed_weights_are_kept(spec, builder, steps):
    """The start is of W, not of its transpose; biases, norms, embeddings and heads are the float model's."""
    float_model = builder()
    model = started(builder, spec, init=qft.LoftQ(steps=steps), r=16, lora_alpha=3)
    for name, layer in layers(model).items():
        source = float_model.get_submodule(name)
        if quantizer_of(layer.base_layer) is None:  # T5 keeps `wo` in float32
            assert torch.equal(layer.base_layer.weight, source.weight)
            continue
        w = original(float_model, name)
        assert float((w - base_weight(layer) - start(layer)).norm()) < 0.9 * float((w - base_weight(layer)).norm())
        assert (layer.base_layer.bias is None) == (source.bias is None)
        if source.bias is not None:
            assert torch.equal(layer.base_layer.bias, source.bias)
    state = model.state_dict()
    for name, value in float_model.state_dict().items():
        if name.rpartition(".")[0] not in layers(model):
            assert torch.equal(state[f"base_model.model.{name}"], value), name
    assert relative(run(qft.merge_to_float(model)), run(model)) < 2e-6


@pytest.mark.parametrize("spec", SPECS)
def test_float_layers_start_at_zero(spec):
    """A layer that was skipped has no quantization error to start from."""
    model = started(llama, spec, skip=["v_proj", "mlp"])
    for name, layer in layers(model).items():
        assert (float(start(layer).abs().max()) > 0) == (quantizer_of(layer.base_layer) is not None), name


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("builder", [llama, gpt2], ids=["llama", "gpt2"])
def test_dora_starts_from_the_same_weight(spec, steps, builder):
    """DoRA's magnitude is that of Ŵ + sBA, so that it starts where LoRA does."""
    options = {"init": qft.LoftQ(steps=steps), "lora_alpha": 10}
    dora, lora = started(builder, spec, use_dora=True, **options), started(builder, spec, **options)
    for name, layer in layers(dora).items():
        expected = (base_weight(layer) + start(layer)).norm(dim=1)
        torch.testing.assert_close(
            layer.lora_magnitude_vector["default"].weight.detach().double(), expected, rtol=1e-6, atol=0
        )
        assert torch.equal(start(layer), start(layers(lora)[name]))
    assert relative(run(dora), run(lora)) < 1e-6


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_sixteen_bit_models(spec, dtype, steps):
    """The adapters are float32, and fit what the 16-bit weight lost to 1e-6; the constants' dtypes are as they were."""
    float_model = llama(dtype)
    model = started(llama, spec, init=qft.LoftQ(steps=steps), dtype=dtype, lora_alpha=10)
    zero = qft.quantize_and_wrap(llama(dtype), spec, adapter=config(), progress=False)
    for layer in layers(model).values():
        assert layer.lora_A["default"].weight.dtype == torch.float32
    for name, error in errors(model, float_model).items():
        gap = original(float_model, name) - base_weight(layers(model)[name])
        assert error == pytest.approx(tail(gap, 4), rel=1e-5)

    def kinds(model):  # but for bitsandbytes' options, which are text of any length
        return {k: (v.dtype, v.shape) for k, v in model.state_dict().items() if ".quant_state." not in k}

    assert kinds(model) == kinds(zero)
    assert relative(run(model), run(float_model)) < relative(run(zero.eval()), run(float_model))


# ---- saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("builder", "dtype"),
    [(gpt2, torch.float32), (llama, torch.bfloat16), (t5, torch.bfloat16)],
    ids=["gpt2", "llama, bfloat16", "t5, bfloat16"],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_saved_start_loads_to_equal_outputs(spec, dtype, builder, steps, tmp_path):
    """One step saves the adapter alone. More change the base, which is then stored, and loaded over any kind of base."""
    loader = AutoModelForSeq2SeqLM if builder is t5 else AutoModelForCausalLM
    builder(dtype).save_pretrained(tmp_path / "float")

    def float_model(_=None):
        return loader.from_pretrained(tmp_path / "float", dtype=dtype)

    model = train_a_little(started(float_model, spec, init=qft.LoftQ(steps=steps), use_rslora=True))
    y = run(model)
    qft.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "base").exists() == (steps > 1)
    bases = [float_model()]
    if steps > 1:
        bases += [qft.quantize(float_model(), spec, progress=False), tmp_path / "float", None]
    for base in bases:
        again = qft.load(tmp_path / "a", base)
        assert torch.equal(run(again.eval()), y), f"over {type(base).__name__}"
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert not saved["loftq_config"]
    if steps > 1:  # over q(W) the adapter would be wrong: that is why the base is stored
        with stock_peft():
            alone = PeftModel.from_pretrained(
                qft.merge_to_float(qft.quantize(float_model(), spec, progress=False)), tmp_path / "a"
            )
        assert relative(run(alone.eval()), y) > 1e-4


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("steps", [1, 5])
def test_plain_modules_save_and_load(spec, steps, tmp_path):
    model = train_a_little(started(plain, spec, init=qft.LoftQ(steps=steps)))
    y = run(model)
    qft.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "base").exists() == (steps > 1)
    for base in (plain(), qft.quantize(plain(), spec, progress=False)):
        assert torch.equal(run(qft.load(tmp_path / "a", base).eval()), y)


@pytest.mark.parametrize("spec", SPECS)
def test_a_base_that_is_asked_for_is_stored_after_one_step_too(spec, tmp_path):
    model = started(llama, spec)
    qft.save(model, tmp_path / "a", base=True)
    assert torch.equal(run(qft.load(tmp_path / "a").eval()), run(model))


@pytest.mark.parametrize("spec", SPECS)
def test_an_iterated_start_goes_on_training_after_loading(spec, tmp_path):
    model = started(llama, spec, init=qft.LoftQ(steps=3))
    qft.save(model, tmp_path / "a")
    again = qft.load(tmp_path / "a", is_trainable=True)
    train_a_little(model)
    train_a_little(again)
    assert torch.equal(run(model), run(again))
    qft.save(again, tmp_path / "b")
    assert torch.equal(run(qft.load(tmp_path / "b").eval()), run(again))


@pytest.mark.parametrize("steps", [1, 5])
def test_the_start_in_plain_peft_over_bitsandbytes(steps, tmp_path):
    """PEFT never initialises again: over the same base, ours or the stored one, the logits are the same."""
    llama().save_pretrained(tmp_path / "float")
    model = started(
        lambda _: AutoModelForCausalLM.from_pretrained(tmp_path / "float"), "nf4", init=qft.LoftQ(steps=steps)
    )
    qft.save(model, tmp_path / "a", base=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "base")
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # this kernel repacks the weights and rounds their constants
    with stock_peft():
        theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert {type(m).__module__ for m in theirs.modules() if hasattr(m, "lora_A")} == {"peft.tuners.lora.bnb"}
    assert relative(run(theirs), run(model)) < 1e-6


# ---- how it is asked for ------------------------------------------------------------------------------------


def pefts_words(**loftq_config):
    """What `LoraConfig(init_lora_weights="loftq", loftq_config=...)` holds; PEFT builds it only where SciPy is."""
    asked = config(lora_alpha=9)
    asked.init_lora_weights, asked.loftq_config = "loftq", loftq_config
    return asked


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize(
    ("words", "init"),
    [
        ({"loftq_bits": 4}, "loftq"),
        ({"loftq_bits": 4, "loftq_iter": 1}, qft.LoftQ()),
        ({"loftq_iter": 1}, qft.LoftQ),
        ({"loftq_bits": 4, "loftq_iter": 5}, qft.LoftQ(steps=5)),
    ],
)
def test_pefts_own_words_are_translated(spec, words, init, tmp_path):
    theirs = pefts_words(**words)
    model = qft.quantize_and_wrap(llama(), spec, adapter=theirs, progress=False).eval()
    expected = qft.quantize_and_wrap(llama(), spec, adapter=config(lora_alpha=9), init=init, progress=False).eval()
    assert same_start(model, expected)
    qft.save(model, tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert not saved["loftq_config"]
    assert theirs.init_lora_weights == "loftq", "the caller's config is left alone"
    over = qft.wrap(qft.quantize(llama(), spec, progress=False), theirs, original=llama()).eval()
    assert same_start(over, expected)


def test_init_wins_over_the_config():
    """`init=` overrides PEFT's words; "zero" among them."""
    asked = pefts_words(loftq_bits=4, loftq_iter=5)
    assert same_start(
        qft.quantize_and_wrap(llama(), "nf4", adapter=asked, init="loftq", progress=False),
        qft.quantize_and_wrap(llama(), "nf4", adapter=config(lora_alpha=9), init="loftq", progress=False),
    )
    zero = qft.quantize_and_wrap(llama(), "nf4", adapter=asked, init="zero", progress=False)
    assert all(float(start(m).abs().max()) == 0 for m in layers(zero).values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"loftq_bits": 8}, "loftq_bits=8"),
        ({"loftq_bits": 4, "loftq_itre": 2}, "loftq_itre"),
        ({"loftq_iter": 0}, "steps=0"),
        ({"loftq_iter": "2"}, "steps='2'"),
    ],
)
def test_words_that_make_no_sense(words, says):
    float_model, model = llama(), qft.quantize(llama(), "nf4", progress=False)
    y = run(model)
    with pytest.raises(qft.BadOption, match=says):
        qft.quantize_and_wrap(float_model, "nf4", adapter=pefts_words(**words), progress=False)
    assert not list(quantized(float_model))
    with pytest.raises(qft.BadOption, match=says):
        qft.wrap(model, pefts_words(**words), original=llama())
    assert torch.equal(run(model), y)


@pytest.mark.parametrize("words", ["corda", "lora_ga", "mica", "pissa_niter_", "pissa_niter_x"])
def test_starts_that_would_rewrite_the_base_are_refused(words):
    asked = config()
    asked.init_lora_weights = words
    model = qft.quantize(llama(), "nf4", progress=False)
    y = run(model)
    float_model = llama()
    with pytest.raises(qft.BadOption, match=words):
        qft.wrap(model, asked)
    with pytest.raises(qft.BadOption, match=words):
        qft.quantize_and_wrap(float_model, "nf4", adapter=asked, progress=False)
    with pytest.raises(qft.BadOption, match=words):
        get_peft_model(model, copy.deepcopy(asked))
    assert not list(quantized(float_model))
    assert torch.equal(run(model), y)
    with pytest.raises(qft.BadOption, match="loftq"):
        get_peft_model(model, pefts_words(loftq_bits=4))
    assert torch.equal(run(model), y)


@pytest.mark.parametrize("init", ["lofq", 3, nn.Linear(2, 2), "pisa", True])
def test_an_init_that_is_none(init):
    model = qft.quantize(llama(), "nf4", progress=False)
    with pytest.raises(qft.BadOption):
        qft.wrap(model, init=init, original=llama())
    with pytest.raises(qft.BadOption):
        qft.quantize_and_wrap(llama(), "nf4", init=init, progress=False)


@pytest.mark.parametrize("alpha", [{"lora_alpha": 0}, {"alpha_pattern": {"q_proj": 0}}], ids=str)
def test_an_alpha_of_zero_cannot_start_anywhere(alpha):
    float_model = llama()
    with pytest.raises(qft.BadOption, match="lora_alpha"):
        qft.quantize_and_wrap(float_model, "nf4", adapter=config(**alpha), init="loftq", progress=False)
    assert not list(quantized(float_model))


# ---- over a model that was quantized before -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "builder"), [*((s, "gpt2") for s in SPECS), *(("nf4", b) for b in BUILDERS if b != "gpt2")]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_original_gives_what_one_go_gives(spec, builder, steps, tmp_path):
    """The float model, or its folder, brought along later: the same bits."""
    init = qft.LoftQ(steps=steps)
    expected = started(BUILDERS[builder], spec, init=init, lora_alpha=9)
    sources = [BUILDERS[builder]()]
    if builder != "plain":
        BUILDERS[builder]().save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        sources += [tmp_path, str(tmp_path)]
    for source in sources:
        model = qft.quantize(BUILDERS[builder](), spec, progress=False)
        model = qft.wrap(model, config(lora_alpha=9), init=init, original=source).eval()
        assert same_start(model, expected)
        assert torch.equal(run(model), run(expected))


@pytest.mark.parametrize("spec", SPECS)
def test_from_a_folder_in_one_go(spec, tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="60KB")
    for steps in (1, 3):
        init = qft.LoftQ(steps=steps)
        streamed = qft.quantize_and_wrap(tmp_path, spec, adapter=config(lora_alpha=9), init=init, progress=False).eval()
        assert same_start(streamed, started(llama, spec, init=init, lora_alpha=9))


def test_the_float_weights_are_needed():
    model = qft.quantize(llama(), "nf4", progress=False)
    y = run(model)
    for call in (
        lambda: qft.wrap(model, init="loftq"),
        lambda: qft.wrap(model, pefts_words(loftq_bits=4)),
        lambda: qft.quantize_and_wrap(model, "nf4", init=qft.LoftQ(steps=2), progress=False),
    ):
        with pytest.raises(qft.NeedsOriginal, match="original="):
            call()
        assert torch.equal(run(model), y)
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("steps", [1, 3])
def test_another_models_float_weights_are_refused(steps, tmp_path):
    model = qft.quantize(llama(), "nf4", progress=False)
    y = run(model)
    other, wider = llama(seed=1), llama(hidden_size=96)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    cases = [
        (other, qft.AdapterMismatch),
        (wider, qft.AdapterMismatch),
        (tmp_path / "other", qft.AdapterMismatch),
        (gpt2(), qft.BadOption),
        (qft.quantize(llama(), "nf4", progress=False), qft.BadOption),
        (tmp_path / "nowhere", qft.BadFolder),
        (tmp_path / "empty", qft.BadFolder),
        (7, qft.BadOption),
    ]
    for source, error in cases:
        with pytest.raises(error):
            qft.wrap(model, config(), init=qft.LoftQ(steps=steps), original=source)
        assert torch.equal(run(model), y)
        assert not hasattr(model, "peft_config")
    qft.wrap(model, config(), init=qft.LoftQ(steps=steps), original=llama())


def test_a_start_over_what_transformers_quantized(tmp_path):
    """No fingerprint there: the original is taken at the caller's word."""
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    model = qft.wrap(model, config(lora_alpha=9), init="loftq", original=tmp_path).eval()
    expected = started(llama, "nf4", lora_alpha=9)
    for name, layer in layers(model).items():
        assert torch.equal(start(layer), start(layers(expected)[name]))
    assert relative(run(model), run(expected)) < 1e-6


# ---- capabilities -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneWay(Reference):
    """A backend that cannot store floats back."""

    name: ClassVar[str] = "one-way"

    @property
    def capabilities(self):
        return replace(super().capabilities, requantize=False)


def test_steps_that_change_the_base_need_a_backend_that_can():
    """One step works there; more are refused before the first weight changes."""
    float_model = llama()
    with pytest.raises(qft.UnsupportedOperation, match="iterated_loftq"):
        qft.quantize_and_wrap(float_model, OneWay(), adapter=config(), init=qft.LoftQ(steps=2), progress=False)
    assert not list(quantized(float_model))
    model = qft.quantize_and_wrap(float_model, OneWay(), adapter=config(), init="loftq", progress=False).eval()
    expected = started(llama, "reference")
    for name, layer in layers(model).items():
        assert torch.equal(start(layer), start(layers(expected)[name]))
    with pytest.raises(qft.UnsupportedOperation, match="merge_to_quantized"):
        qft.merge(model)
    assert relative(run(qft.merge_to_float(model)), run(model)) < 2e-6
    before = qft.quantize(llama(), OneWay(), progress=False)
    with pytest.raises(qft.UnsupportedOperation, match="iterated_loftq"):
        qft.wrap(before, config(), init=qft.LoftQ(steps=2), original=llama())


def test_an_init_of_ones_own():
    """A user's own start: a pure function of W, Ŵ, r and s; here the fit of W itself, as PiSSA's residual would be."""

    @dataclass(frozen=True)
    class Half(qft.AdapterInit):
        name: ClassVar[str] = "half"

        def __call__(self, weight, quantized, rank, scaling, *, statistics=None, roundtrip=None):
            assert weight.dtype == quantized.dtype == torch.float32
            a, b = fit((weight - quantized) / 2, rank, scaling)
            return a, b, None

    model, loftq = started(llama, "nf4", init=Half(), lora_alpha=9), started(llama, "nf4", lora_alpha=9)
    for name, layer in layers(model).items():
        torch.testing.assert_close(start(layer), start(layers(loftq)[name]) / 2, rtol=1e-5, atol=1e-7)
    fill(model)


@pytest.mark.parametrize("shape", [(3, 17), (40, 8), (8, 40), (1, 5)], ids=str)
@pytest.mark.parametrize("scaling", [1.0, 0.25, -3.0])
def test_the_fit_on_odd_shapes(shape, scaling):
    """Against float64, to the rounding of float32; rows and columns of A and B are balanced."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for rank in range(1, min(shape) + 1):
        a, b = fit(matrix, rank, scaling)
        assert a.shape == (rank, shape[1])
        assert b.shape == (shape[0], rank)
        error = float((matrix.double() - scaling * (b.double() @ a.double())).norm())
        assert error == pytest.approx(tail(matrix.double(), rank), abs=3e-6 * float(matrix.norm()))
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-6)

"""PiSSA, OLoRA, inits of one's own, what is rolled back and reported, and the SVD that all of them are made of."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import Rows, refuses
from models import batch, gpt2, llama, plain, qwen2, relative, t5, train_a_little
from peft import LoraConfig, get_peft_model
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
from twins import SPECS, dequantized_copy, quantized, stock_peft

import qft
from qft.lora.inits.lowrank import fit, svd

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = batch(3, (4, 30))
PRINCIPAL = ["pissa", "olora"]


def roundtrip(quantizer, weight):
    """dq(q(weight))."""
    fresh = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    fresh.weight.data = weight
    return quantizer.dequantize(quantizer.weights(quantizer.quantize_layer(fresh))[0], dtype=torch.float32)


def principal(init, weight, rank, scaling):
    """sBA as the papers have it, in float64: the r leading singular triplets of W; the first r columns of its QR."""
    weight = weight.double()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * s[:rank] @ vh[:rank]
    q, r = torch.linalg.qr(weight)
    return scaling * (q[:, :rank] @ r[:rank])


# ---- PiSSA and OLoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("init", PRINCIPAL)
@pytest.mark.parametrize("builder", [llama, gpt2, qwen2], ids=["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("scaling", ["alpha = r", "alpha < r", "patterns, rslora"])
def test_the_adapter_takes_its_part_and_the_rest_is_quantized(spec, init, builder, scaling):
    """Where kept, Ŵ = dq(q(W − sBA)) and the total error is below the plain one; elsewhere all is as without."""
    model, float_model = started(builder, spec, init, **SCALINGS[scaling]), builder()
    plain_model = qft.quantize(builder(), spec, progress=False)
    untouched = dict(quantized_weights(plain_model))
    assert model.init_report.weights.keys() == layers(model).keys()
    for name, error in errors(model, float_model).items():
        layer, w, report = layers(model)[name], original(float_model, name), model.init_report.weights[name]
        before = float((w - untouched[name]).norm())
        assert report.before == pytest.approx(before / float(w.norm()), rel=1e-4)
        assert report.kept == (report.after < report.before)
        if not report.kept:
            assert torch.equal(base_weight(layer), untouched[name])
            assert float(start(layer).abs().max()) == 0
            continue
        assert error < before
        assert error == pytest.approx(report.after * float(w.norm()), rel=1e-4)
        wanted = principal(init, w, layer.r["default"], layer.scaling["default"])
        assert relative(start(layer), wanted) < 2e-5
        again = roundtrip(layer.quantizer, w.float() - start(layer).float())
        far = (again - base_weight(layer)).abs() > 1e-5 * again.abs().max()
        assert float(far.float().mean()) < 1e-2  # a code, or a block's constant, on an edge falls to either side
    if init == "pissa" and spec != "int8":
        kept = sum(w.kept for w in model.init_report.weights.values())
        assert kept > len(model.init_report.weights) // 2
    assert model.get_base_model()._qft.base_changed == any(w.kept for w in model.init_report.weights.values())


def test_olora_is_pefts():
    """A and B as PEFT makes them of the float weight, up to rounding."""
    model = started(llama, "nf4", "olora", lora_alpha=3)
    with stock_peft():
        theirs = get_peft_model(llama(), config(lora_alpha=3, init_lora_weights="olora"))
    state = theirs.state_dict()
    kept = [n for n, w in model.init_report.weights.items() if w.kept]
    assert kept
    for name in kept:
        for part in ("lora_A", "lora_B"):
            mine = getattr(layers(model)[name], part)["default"].weight
            assert relative(mine, state[f"base_model.model.{name}.{part}.default.weight"]) < 1e-4


@pytest.mark.parametrize(
    ("words", "init"), [("pissa", "pissa"), ("pissa_niter_4", qft.PiSSA()), ("olora", "olora"), ("olora", qft.OLoRA)]
)
def test_pefts_words_for_them(words, init):
    asked = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=words)
    model = qft.quantize_and_wrap(llama(), "nf4", adapter=asked, progress=False).eval()
    assert same_start(model, started(llama, "nf4", init, lora_alpha=8))
    assert asked.init_lora_weights == words
    over = qft.wrap(qft.quantize(llama(), "nf4", progress=False), asked, original=llama())
    assert same_start(over.eval(), model)
    float_gone = qft.quantize(llama(), "nf4", progress=False)
    with refuses(qft.NeedsOriginal, "original=", model=float_gone):
        qft.wrap(float_gone, asked)


@pytest.mark.parametrize("init", PRINCIPAL)
@pytest.mark.parametrize("builder", [t5, plain], ids=["t5", "plain"])
def test_the_model_computes_nearly_what_it_did(init, builder):
    y, zero = run(builder()), started(builder, "nf4", "zero")
    model = started(builder, "nf4", init, r=16)
    assert relative(run(model), y) < 1.05 * relative(run(zero), y)
    assert relative(run(qft.merge_to_float(model)), run(model)) < 2e-6


@pytest.mark.parametrize("init", PRINCIPAL)
def test_dora_starts_from_the_same_weight(init):
    dora, lora = (started(llama, "nf4", init, lora_alpha=10, use_dora=d) for d in (True, False))
    for name, layer in layers(dora).items():
        assert torch.equal(start(layer), start(layers(lora)[name]))
        expected = (base_weight(layer) + start(layer)).norm(dim=1)
        torch.testing.assert_close(
            layer.lora_magnitude_vector["default"].weight.detach().double(), expected, rtol=1e-6, atol=0
        )
    assert relative(run(dora), run(lora)) < 1e-6


@pytest.mark.parametrize("init", PRINCIPAL)
def test_a_backend_that_cannot_store_is_refused(init):
    @dataclass(frozen=True)
    class ReadOnly(Rows):
        name: ClassVar[str] = "read-only"

        @property
        def capabilities(self):
            return qft.Capabilities(bits=8, devices=frozenset({"cpu"}))

    model = llama()
    with refuses(qft.UnsupportedOperation, "iterated_loftq", model=model):
        qft.quantize_and_wrap(model, ReadOnly(), init=init, progress=False)
    model = qft.quantize(model, ReadOnly(), progress=False)
    with refuses(qft.UnsupportedOperation, "iterated_loftq", model=model):
        qft.wrap(model, init=init, original=llama())


@pytest.mark.parametrize("init", [*PRINCIPAL, "loftq:steps=3"])
def test_what_peft_refuses_after_the_base_was_changed(init, monkeypatch):
    """The base is put back, to the bit."""
    model = qft.quantize(llama(), "nf4", progress=False)

    def refused(*args, **kwargs):
        raise ValueError("PEFT does not like it")

    monkeypatch.setattr("qft.pipeline.wrap.get_peft_model", refused)
    with refuses(qft.BadOption, "PEFT does not like it", model=model):
        qft.wrap(model, init=init, original=llama())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("init", [*PRINCIPAL, "auto", "loftq"])
def test_a_saved_start_loads_to_equal_outputs(spec, init, tmp_path):
    """The base is stored where Ŵ changed."""
    model = train_a_little(started(llama, spec, init, lora_alpha=8))
    y, changed = run(model), init in PRINCIPAL and any(w.kept for w in model.init_report.weights.values())
    qft.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "base").exists() == changed
    bases = [llama(), qft.quantize(llama(), spec, progress=False), *([None] if changed else [])]
    for base in bases:
        assert torch.equal(run(qft.load(tmp_path / "a", base).eval()), y)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["init_lora_weights"] is True


# ---- option strings and names -------------------------------------------------------------------------------


def test_option_strings():
    assert same_start(started(llama, "nf4", "loftq:steps=3"), started(llama, "nf4", qft.LoftQ(steps=3)))
    assert started(llama, "nf4", "loftq:steps=2, bits=4").init_report.init == "LoftQ(steps=2, bits=4)"
    float_model = llama()
    for text, says in [
        ("loftq:step=5", ["no option 'step'", "steps, bits"]),
        ("loftq:steps", ["key=value"]),
        ("loftq:steps=0", ["steps=0"]),
        ("loftq:steps=1.5", ["steps=1.5"]),
        ("loftq:steps=2,steps=3", ["stands twice"]),
        ("loftq:bits=8", ["loftq_bits=8"]),
        ("pissa:r=3", ["no option 'r'", "none"]),
        ("qera-ful", ["did you mean", "qera-full"]),
        ("LoftQ", ["did you mean loftq"]),
        ("", ["known: loftq"]),
        ("zero:x=1", ["zero"]),
    ]:
        with refuses(qft.BadOption, *says, model=float_model):
            qft.quantize_and_wrap(float_model, "nf4", init=text, progress=False)


@pytest.fixture
def names():
    """The registry of inits as it was, afterwards."""
    from qft.lora.inits.names import _inits

    before = dict(_inits)
    yield
    _inits.clear()
    _inits.update(before)


def half(weight, quantized, rank, scaling, *, statistics):
    assert statistics is None
    return fit((weight - quantized) / 2, rank, scaling)


@dataclass(frozen=True)
class Part(qft.AdapterInit):
    """A share of LoftQ's start."""

    name: ClassVar[str] = "part"
    share: float = 0.5

    def __call__(self, weight, quantized, rank, scaling, *, statistics=None, roundtrip=None):
        return *fit((weight - quantized) * self.share, rank, scaling), None


def test_inits_of_ones_own(names):
    """A function, a class, an object, and both by name with options."""
    qft.register_init("half", half)
    assert qft.register_init("part")(Part) is Part
    expected = started(gpt2, "nf4", half, lora_alpha=9)
    fitted = layers(started(gpt2, "nf4", "loftq", lora_alpha=9))
    for name, layer in layers(expected).items():
        torch.testing.assert_close(start(layer), start(fitted[name]) / 2, rtol=1e-5, atol=1e-7)
    for init in ("half", "part", Part, Part(), "part:share=0.5"):
        assert same_start(started(gpt2, "nf4", init, lora_alpha=9), expected)
    assert started(gpt2, "nf4", "part:share=0.25").init_report.init == "Part(share=0.25)"
    with refuses(qft.BadOption, "half is a function and takes no options"):
        started(llama, "nf4", "half:share=1")
    for taken in ("half", "loftq", "zero", "default"):
        with refuses(qft.BadOption, repr(taken), "replace=True"):
            qft.register_init(taken, half)
    qft.register_init("part", half, replace=True)
    assert same_start(started(gpt2, "nf4", "part", lora_alpha=9), expected)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a,b", "a=b", "*", 3, None])
def test_names_that_cannot_be_written(name, names):
    with refuses(qft.BadOption, repr(name)):
        qft.register_init(name, half)


@pytest.mark.parametrize("thing", [3, "loftq", int, type("NoDataclass", (), {})], ids=str)
def test_what_cannot_be_registered(thing, names):
    with refuses(qft.BadOption, "is no init"):
        qft.register_init("mine", thing)


def test_functions_that_ask_for_statistics():
    seen = {}

    def reads(weight, quantized, rank, scaling, *, statistics):
        seen[weight.shape] = statistics
        return fit(weight - quantized, rank, scaling)

    for kind in ("diagonal", "full"):
        reads.needs = kind
        model = started(llama, "nf4", reads, calibration=DATA)
        assert {s.tokens for s in seen.values()} == {DATA.numel()}
        assert all((s.second_moment is None) == (kind == "diagonal") for s in seen.values())
        assert same_start(model, started(llama, "nf4", "loftq"))
        float_model = llama()
        with refuses(qft.NeedsCalibration, "calibration=", model=float_model):
            qft.quantize_and_wrap(float_model, "nf4", init=reads, progress=False)
    reads.needs = "everything"
    with refuses(qft.BadOption, "'everything'", "'diagonal'", model=float_model):
        qft.quantize_and_wrap(float_model, "nf4", init=reads, calibration=DATA, progress=False)


@dataclass(frozen=True)
class Abstract(qft.AdapterInit):
    name: ClassVar[str] = "abstract"


@dataclass(frozen=True)
class Required(Part):
    name: ClassVar[str] = "required"
    also: float = None

    def __init__(self, also):
        object.__setattr__(self, "also", also)


@pytest.mark.parametrize("init", [Abstract, Required])
def test_classes_that_cannot_be_made(init, names):
    float_model = llama()
    qft.register_init("mine", init)
    for asked in (init, "mine"):
        with refuses(qft.BadOption, init.__name__, model=float_model):
            qft.quantize_and_wrap(float_model, "nf4", init=asked, progress=False)


BAD_RESULTS = {
    "None": (lambda a, b: None, qft.BadOption, "tensors (A, B)"),
    "three": (lambda a, b: (a, b, a), qft.BadOption, "qft.AdapterInit"),
    "numbers": (lambda a, b: (1, 2), qft.BadOption, "tensors (A, B)"),
    "swapped": (lambda a, b: (b, a), qft.BadShape, "they are (4, 64)"),
    "another rank": (lambda a, b: (a[:2], b[:, :2]), qft.BadShape, "A (2, 64)"),
    "NaN": (lambda a, b: (a * float("nan"), b), qft.NonFiniteWeights, "q_proj"),
    "infinity": (lambda a, b: (a, b / 0), qft.NonFiniteWeights, "q_proj"),
}


@pytest.mark.parametrize("result", BAD_RESULTS)
def test_what_an_init_may_not_give(result):
    """Over a model that was quantized before, everything is as it was."""
    spoil, error, says = BAD_RESULTS[result]

    def bad(weight, quantized, rank, scaling, *, statistics):
        return spoil(*fit(weight - quantized, rank, scaling))

    model = qft.quantize(llama(), "nf4", progress=False)
    with refuses(error, says, model=model):
        qft.wrap(model, config(), init=bad, original=llama())


# ---- rolling back -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worse(qft.AdapterInit):
    """Makes every layer but o_proj's worse, base and all; `shape` tells o_proj, the only square one but q_proj."""

    name: ClassVar[str] = "worse"
    spoil: bool = True
    changes: bool = True

    @property
    def changes_base(self):
        return self.changes

    def __call__(self, weight, quantized, rank, scaling, *, statistics=None, roundtrip=None):
        a, b = fit(weight - quantized, rank, scaling)
        if weight.shape[0] == weight.shape[1]:
            return a, b, None
        roundtrip(weight * 3)
        return a + 1, b + 1, weight * 2 if self.spoil else None


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("init", [Worse(), Worse(spoil=False), Worse(spoil=False, changes=False)], ids=repr)
@pytest.mark.parametrize("before", [False, True], ids=["in one go", "quantized before"])
def test_an_init_that_is_worse_is_rolled_back(spec, init, before):
    """The base comes back to the bit, also where the init only tried; the adapter has PEFT's own start."""
    expected = qft.quantize(llama(), spec, progress=False)
    untouched = dict(quantized_weights(expected))
    if before:
        model = qft.wrap(expected, config(), init=init, original=llama()).eval()
    else:
        model = started(llama, spec, init)
    report = model.init_report
    assert {n for n, w in report.weights.items() if w.kept} == {
        n for n in layers(model) if n.endswith(("q_proj", "o_proj"))
    }
    for name, layer in layers(model).items():
        assert torch.equal(base_weight(layer), untouched[name])
        kept = report.weights[name].kept
        assert (float(start(layer).abs().max()) > 0) == kept
        assert float(layer.lora_A["default"].weight.abs().max()) > 0
        if not kept:
            assert report.weights[name].after >= report.weights[name].before
    assert report.rolled_back == [n for n, w in report.weights.items() if not w.kept]
    assert "10 rolled back" in str(report)
    assert report.rolled_back[0] in str(report)
    assert not model.get_base_model()._qft.base_changed


def test_a_base_that_was_never_to_change():
    """The capability check and what a refusal puts back go by `changes_base`: a lie is refused."""
    model = qft.quantize(llama(), "nf4", progress=False)
    with refuses(qft.BadOption, "changes_base", model=model):
        qft.wrap(model, config(), init=Worse(changes=False), original=llama())


@pytest.mark.parametrize("spec", ["nf4", "reference", Rows(bits=4)], ids=str)
@pytest.mark.parametrize("init", ["loftq", "loftq:steps=3", "qera", "qera-full", "pissa", "auto"])
def test_a_layer_that_is_represented_exactly_is_rolled_back(spec, init):
    """There is no error to fit: the base is as it is, and the adapter starts as PEFT's."""

    def builder(dtype=torch.float32):
        exact = dequantized_copy(qft.quantize(llama(), spec, progress=False), llama())
        exact.model.layers[1].mlp.up_proj.weight.data = llama().model.layers[1].mlp.up_proj.weight.data
        exact.model.layers[0].mlp.up_proj.weight.data.zero_()
        return exact

    data = None if init in ("loftq", "loftq:steps=3", "pissa") else DATA
    model = started(builder, spec, init, calibration=data)
    untouched = dict(quantized_weights(qft.quantize(builder(), spec, progress=False)))
    exact = {n for n in untouched if torch.equal(untouched[n], original(builder(), n))}
    assert len(exact) >= 7
    assert exact <= set(model.init_report.rolled_back)
    assert "model.layers.0.mlp.up_proj" in exact
    assert model.init_report.weights["model.layers.1.mlp.up_proj"].kept
    for name in exact:
        layer, report = layers(model)[name], model.init_report.weights[name]
        assert report.before == 0
        assert not report.kept
        assert torch.equal(base_weight(layer), untouched[name])
        assert float(layer.lora_B["default"].weight.abs().max()) == 0
        assert float(layer.lora_A["default"].weight.abs().max()) > 0


def test_dora_of_a_layer_that_was_rolled_back():
    model = started(llama, "nf4", Worse(), use_dora=True)
    for layer in layers(model).values():
        expected = (base_weight(layer) + start(layer)).norm(dim=1)
        torch.testing.assert_close(
            layer.lora_magnitude_vector["default"].weight.detach().double(), expected, rtol=1e-6, atol=0
        )


def test_an_init_that_did_nothing_says_so():
    """Also where no progress is shown: OLoRA's part four times over leaves a rest that is larger than W."""
    with pytest.warns(qft.QftWarning, match=r"OLoRA\(\).*14 rolled back") as caught:
        model = started(llama, "nf4", "olora", lora_alpha=16)
    assert sum(issubclass(w.category, qft.QftWarning) for w in caught) == 1
    assert len(model.init_report.rolled_back) == 14
    assert torch.equal(run(model), run(started(llama, "nf4", "zero")))


def test_the_report(capsys):
    """On the model, as JSON, and as a line where progress is shown."""
    model = qft.quantize_and_wrap(llama(), "nf4", adapter=config(), init="qera", calibration=DATA)
    report = model.init_report
    said = capsys.readouterr().err
    assert str(report) in said
    assert str(report).startswith("QERA(): error 0.0")
    assert "on average over 14 layers" in str(report)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["init"] == "QERA()"
    assert again["weights"].keys() == layers(model).keys()
    assert again["weights"]["model.layers.0.self_attn.q_proj"].keys() == {"before", "after", "kept", "note"}
    assert isinstance(report, qft.InitReport)
    assert not hasattr(started(llama, "nf4", "zero"), "init_report")


# ---- errors and ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nf4", "reference:format=int,bits=3,group_size=32"])
@pytest.mark.parametrize("init", ["pissa", "olora", "loftq:steps=3"])
def test_the_error_falls_with_the_rank(spec, init):
    """What is left after quantizing the rest is not ordered layer by layer to the last digit: the sum is."""
    float_model, last = llama(), None
    for rank in (1, 4, 16, 32):
        found = errors(started(llama, spec, init, r=rank, lora_alpha=rank), float_model)
        total = sum(e * e for e in found.values())
        assert last is None or total < last
        last = total


# ---- the SVD ------------------------------------------------------------------------------------------------


def captured(matrix, rank, u, s, vh):
    """The share of the best fit's energy that U S Vᵀ holds, in float64."""
    matrix = matrix.double()
    left = (matrix - u.double() * s.double() @ vh.double()).square().sum()
    best = torch.linalg.svdvals(matrix)[:rank].square().sum()
    return float((matrix.square().sum() - left) / best)


def quantization_error(shape, spec, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weight - roundtrip(qft.get_quantizer(spec), weight)


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (700, 900)], ids=str)
@pytest.mark.parametrize("spec", ["reference", "reference:format=int,bits=3,group_size=4"])
def test_the_randomised_svd_holds_99_percent_of_the_best_fit(shape, spec):
    """On the flat spectrum of a quantization error, the hardest there is; orthonormal, sorted, and the same each time."""
    error = quantization_error(shape, spec)
    for rank in (1, 8, 16, 64):
        torch.manual_seed(rank)
        state = torch.get_rng_state()
        u, s, vh = svd(error, rank)
        assert torch.equal(state, torch.get_rng_state()), "nobody else's random numbers are drawn"
        assert (u.shape, s.shape, vh.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
        assert 0.99 <= captured(error, rank, u, s, vh) <= 1 + 1e-6
        torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=2e-5)
        torch.testing.assert_close(vh @ vh.T, torch.eye(rank), rtol=0, atol=2e-5)
        assert torch.equal(s, s.sort(descending=True).values)
        assert all(torch.equal(x, y) for x, y in zip((u, s, vh), svd(error, rank)))


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_randomised_svd_of_steeper_spectra(rank):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(700, 600, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(900, 600, generator=generator)).Q
    for values in (torch.arange(1, 601).float() ** -0.5, torch.exp(-torch.arange(600) / 20), torch.arange(600) < 3):
        matrix = left * values.float() @ right.T
        assert captured(matrix, rank, *svd(matrix, rank)) > 0.999
    assert svd(torch.zeros(700, 900), rank)[1].abs().max() == 0


@pytest.mark.parametrize("init", ["loftq", "qera", "qera-full", "auto", "pissa", "olora"])
def test_an_init_is_the_same_each_time(init):
    """Whatever the global seed; layers that are wide enough for the randomised SVD, too."""

    def builder(dtype=torch.float32):
        return plain_wide(dtype)

    data = None if init in ("loftq", "pissa", "olora") else DATA
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = started(builder, "nf4", init, calibration=data, r=2)
        found.append({n: start(m) for n, m in layers(model).items()})
    assert all(torch.equal(v, found[1][n]) for n, v in found[0].items())


def plain_wide(dtype):
    model = plain()
    torch.manual_seed(0)
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 120), nn.Linear(120, 64))])
    return model.to(dtype).eval()


def test_ranks_from_one_to_full():
    """A rank as large as the matrix is exact, and one that is larger is refused."""
    model = started(llama, "nf4", "pissa", r=32, target_modules=["k_proj"])
    assert all(e < 1e-5 * float(original(llama(), n).norm()) for n, e in errors(model, llama()).items())
    assert tail(torch.eye(3), 3) == 0
    float_model = llama()
    with refuses(qft.BadShape, "rank 33", "k_proj", model=float_model):
        qft.quantize_and_wrap(
            float_model, "nf4", adapter=config(r=33, target_modules=["k_proj"]), init="pissa", progress=False
        )


@pytest.mark.parametrize("init", ["pissa", "olora", "qera", "qera-full", "auto"])
def test_an_alpha_of_zero_cannot_start_anywhere(init):
    float_model = llama()
    with refuses(qft.BadOption, "lora_alpha is 0", model=float_model):
        options = {"init": init, "calibration": DATA, "progress": False}
        qft.quantize_and_wrap(float_model, "nf4", adapter=config(lora_alpha=0), **options)
    assert not list(quantized(float_model))

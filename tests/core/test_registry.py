"""Names, option strings, configs and patterns become quantizers; nothing is imported before it is asked for."""

import copy
import importlib.metadata
import inspect
import json
import sys
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import Rows, run_python
from models import llama, logits, plain, relative
from transformers import BitsAndBytesConfig, HiggsConfig

import qft
from qft.core import registry
from qft.core.registry import parse_spec

PUBLIC = {
    # verbs
    "audit available_quantizers capabilities evaluate export get_quantizer load merge merge_to_float optimize_training plan",
    "prepare_model_for_kbit_training quantize quantize_and_wrap register_init register_quantizer save transfer unmerge",
    "auto doctor train unoptimize wrap",
    # what they take and give
    "AQLM AWQ AdapterInit Audit AutoRound",
    "BitNet BitsAndBytes4bit BitsAndBytes8bit Calibration Capabilities CompressedTensors EETQ Evaluation FP8 GGUF",
    "GPTQ HQQ INC InitReport LoftQ MXFP4 MergeReport OLoRA PackedLinear PackingCollator PiSSA Plan QERA QERAFull Quanto",
    "Doctor QuantizedWeight Quantizer QuantizerInfo Reference SINQ Statistics TensorQuantizer TorchAO TrainConfig",
    "AutoResult TrainResult TransferReport",
    # errors
    "AdapterMismatch AlreadyQuantized BadFolder BadOption BadShape MissingDependency NeedsCalibration NeedsOriginal",
    "NoTargets NonFiniteWeights PartlyQuantized QftError QftWarning UnknownQuantizer UnsupportedDevice",
    "UnsupportedOperation",
    # modules
    "errors testing",
}


@pytest.fixture
def own_registry(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry._owners.cache_clear()
    yield
    registry._owners.cache_clear()


# ---- the public surface -----------------------------------------------------------------------------------


def test_public_names_are_these_and_no_others():
    """A name is added or dropped here on purpose, or not at all."""
    expected = {name for line in PUBLIC for name in line.split()}
    assert set(qft.__all__) == expected
    assert all(hasattr(qft, name) for name in expected)
    stray = {n for n, v in vars(qft).items() if not n.startswith("_") and not inspect.ismodule(v)} - expected
    assert not stray


def test_public_functions_say_what_they_do_and_their_types():
    for name in qft.__all__:
        thing = getattr(qft, name)
        assert inspect.getdoc(thing), f"qft.{name} has no docstring"
        if inspect.isfunction(thing):
            untyped = [p.name for p in inspect.signature(thing).parameters.values() if p.annotation is p.empty]
            assert not untyped, f"qft.{name} leaves {untyped} without a type"


# ---- names and option strings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("nf4", qft.BitsAndBytes4bit()),
        ("bnb-nf4", qft.BitsAndBytes4bit()),
        ("bitsandbytes", qft.BitsAndBytes4bit()),
        ("fp4", qft.BitsAndBytes4bit(quant_type="fp4")),
        ("bnb-fp4", qft.BitsAndBytes4bit(quant_type="fp4")),
        ("int8", qft.BitsAndBytes8bit()),
        ("llm.int8", qft.BitsAndBytes8bit()),
        ("reference", qft.Reference()),
        ("reference:", qft.Reference()),
        (" reference : format = int , bits = 3 ", qft.Reference(format="int", bits=3)),
        ("reference:format=int,group_size=none", qft.Reference(format="int", group_size=None)),
        ("reference:double_quant=True", qft.Reference(double_quant=True)),
        ("reference:double_quant=false", qft.Reference(double_quant=False)),
        ("nf4:double_quant=true,block_size=128", qft.BitsAndBytes4bit(double_quant=True, block_size=128)),
        ("nf4:compute_dtype=bfloat16", qft.BitsAndBytes4bit(compute_dtype=torch.bfloat16)),
        ("nf4:compute_dtype=torch.float16", qft.BitsAndBytes4bit(compute_dtype=torch.float16)),
        ("nf4:quant_type=fp4", qft.BitsAndBytes4bit(quant_type="fp4")),
        ("int8:threshold=4", qft.BitsAndBytes8bit(threshold=4.0)),
        ("int8:threshold=0.5", qft.BitsAndBytes8bit(threshold=0.5)),
    ],
)
def test_names_and_option_strings(spec, expected):
    found = qft.get_quantizer(spec)
    assert found == expected
    for option, value in vars(expected).items():
        assert type(getattr(found, option)) is type(value)


def test_nf4_is_blocks_of_64_without_double_quantization():
    nf4 = qft.get_quantizer("nf4")
    assert (nf4.quant_type, nf4.block_size, nf4.double_quant) == ("nf4", 64, False)
    assert qft.get_quantizer("reference").group_size == 64


def test_objects_and_classes_are_taken_as_they_are():
    quantizer = qft.Reference(format="int", bits=5)
    assert qft.get_quantizer(quantizer) is quantizer
    assert qft.get_quantizer(qft.Reference) == qft.Reference()


@pytest.mark.parametrize(
    ("name", "near"),
    [("nf5", "nf4"), ("NF4", "nf4"), ("int-8", "int8"), ("refrence", "reference"), ("Reference:bits=3", "reference")],
)
def test_unknown_names_suggest_near_ones(name, near):
    with pytest.raises(qft.UnknownQuantizer, match=f"did you mean .*{near}"):
        qft.get_quantizer(name)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(qft.UnknownQuantizer) as caught:
        qft.get_quantizer("zzzzz")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in qft.available_quantizers())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("reference:bits", "cannot read 'bits'"),
        ("reference:bits=", "cannot read 'bits='"),
        ("reference:=3", "cannot read '=3'"),
        ("reference:bits=4,", "cannot read ''"),
        ("reference:,", "cannot read ''"),
        ("reference:bits=4;group_size=32", "bits='4;group_size=32'; it wants int"),
        ("reference:bits=3=4", "bits='3=4'; it wants int"),
        ("reference:two words=3", "cannot read 'two words=3'"),
        ("reference:bits=3,bits=3", "'bits' stands twice"),
        ("reference:format=int,bits=true", "bits=True; it wants int"),
        ("reference:format=int,bits=3.0", "bits=3.0; it wants int"),
        ("reference:format=int,bits=three", "bits='three'; it wants int"),
        ("reference:format=int,bits=none", "bits=None; it wants int"),
        ("reference:format=int,bits=9", "2 to 8"),
        ("reference:format=int,bits=1", "2 to 8"),
        ("reference:bits=3", "nf4 has 4 bits"),
        ("reference:symmetric=1", "symmetric=1; it wants bool"),
        ("reference:symmetric=true", "option of format='int'"),
        ("reference:format=int4", "format='int4'; it wants one of nf4, fp4, int"),
        ("reference:group_size=0", "group_size=0"),
        ("reference:group_size=-64", "group_size=-64"),
        ("reference:group_size=32.5", "group_size=32.5; it wants int or None"),
        ("reference:block_size=32", "format, bits, group_size, symmetric, double_quant"),
        ("reference:name=nf4", "no option 'name'"),
        ("nf4:group_size=64", "quant_type, double_quant, block_size, compute_dtype, quant_storage"),
        ("nf4:block_size=48", "block_size=48"),
        ("nf4:compute_dtype=bf16", "'bf16' is not a torch dtype"),
        ("nf4:compute_dtype=int8", "16- or 32-bit float"),
        ("nf4:quant_storage=int32", "quant_storage"),
        ("int8:threshold=-1", "threshold=-1.0"),
        ("int8:threshold=nan", "threshold=nan"),
        ("int8:threshold=true", "threshold=True; it wants float"),
        ("int8:threshold=high", "threshold='high'; it wants float"),
    ],
)
def test_junk_options_are_refused_with_what_is_wrong(spec, says):
    with pytest.raises(qft.BadOption) as caught:
        qft.get_quantizer(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize("spec", [None, 3, 4.5, object(), ["nf4"], ("nf4",), b"nf4", torch.int8, int])
def test_what_is_no_quantizer_is_refused_with_examples(spec):
    with pytest.raises(qft.BadOption, match="'nf4'"):
        qft.get_quantizer(spec)


@pytest.mark.parametrize("options", [{"bits": "3"}, {"bits": 3.0}, {"bits": True}, {"group_size": "32"}, {"format": 3}])
def test_constructors_check_types_as_option_strings_do(options):
    with pytest.raises(qft.BadOption, match="it wants"):
        qft.Reference(**{"format": "int", **options})


# ---- dicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer",
    [
        qft.Reference(),
        qft.Reference(format="int", bits=3, group_size=None, symmetric=True),
        qft.BitsAndBytes4bit("fp4", True, 128, torch.bfloat16, torch.float16),
        qft.BitsAndBytes8bit(threshold=0.0),
    ],
    ids=repr,
)
def test_a_quantizer_survives_json_and_repr(quantizer):
    text = json.dumps(quantizer.to_dict())
    assert qft.get_quantizer(json.loads(text)) == quantizer
    assert eval(repr(quantizer), {**vars(qft), type(quantizer).__name__: type(quantizer), "torch": torch}) == quantizer
    assert {quantizer: 1}[copy.copy(quantizer)] == 1


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"name": "nope"}, qft.UnknownQuantizer),
        ({"name": 3}, qft.BadOption),
        ({"name": "reference", "bits": "3"}, qft.BadOption),
        ({"name": "reference", "nope": 3}, qft.BadOption),
    ],
)
def test_junk_dicts_are_refused(spec, error):
    with pytest.raises(error):
        qft.get_quantizer(spec)


# ---- transformers' configs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
            qft.BitsAndBytes4bit(compute_dtype=torch.bfloat16),
        ),
        (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="fp4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype="float16",
                bnb_4bit_quant_storage="bfloat16",
            ),
            qft.BitsAndBytes4bit("fp4", True, 64, torch.float16, torch.bfloat16),
        ),
        (BitsAndBytesConfig(load_in_4bit=True), qft.BitsAndBytes4bit("fp4", compute_dtype=torch.float32)),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.5), qft.BitsAndBytes8bit(threshold=3.5)),
        (BitsAndBytesConfig(load_in_8bit=True), qft.BitsAndBytes8bit(threshold=6.0)),
    ],
)
def test_bitsandbytes_config_is_translated(config, expected):
    assert qft.get_quantizer(config) == expected


def test_configs_that_quantize_nothing_or_have_no_backend_are_refused():
    with pytest.raises(qft.BadOption, match="neither load_in_4bit nor load_in_8bit"):
        qft.get_quantizer(BitsAndBytesConfig())
    with pytest.raises(qft.BadOption, match="nothing would be quantized"):
        qft.get_quantizer(BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True))
    for config in (HiggsConfig(),):
        with pytest.raises(qft.UnknownQuantizer, match=f"{type(config).__name__}.*known: nf4"):
            qft.get_quantizer(config)


@pytest.mark.parametrize("wrapped_in_a_pattern", [False, True])
def test_skip_modules_of_a_config_add_to_the_default_skips(wrapped_in_a_pattern):
    """llm_int8_skip_modules replaces transformers' own skips, and the output head gets quantized; not here."""
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj"])
    model = llama()
    head = model.lm_head
    qft.quantize(model, {"*": config} if wrapped_in_a_pattern else config, skip=["o_proj"], progress=False)
    assert model.lm_head is head and type(head) is torch.nn.Linear
    audited = qft.audit(model)
    assert {n.rpartition(".")[2] for n in audited.weights} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert audited.left["model.layers.0.mlp.down_proj"] == "skipped by the caller"
    assert audited.left["model.layers.1.self_attn.o_proj"] == "skipped by the caller"
    assert audited.left["lm_head"] == "the output head"


def test_a_config_that_names_the_head_as_people_write_it():
    """`llm_int8_skip_modules=["lm_head"]` names what is skipped anyway: nothing is wrong with that."""
    model = llama()
    qft.quantize(model, BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]), progress=False)
    assert qft.audit(model).left == {"lm_head": "the output head"}


def test_skips_take_a_pattern_or_names_and_refuse_what_is_not_there():
    def left(skip):
        model = qft.quantize(plain(), "reference", skip=skip, progress=False)
        return {n for n, why in qft.audit(model).left.items() if why == "skipped by the caller"}

    assert left(["blocks.0"]) == {"blocks.0.0", "blocks.0.2"}
    assert left(["0.0", "out"]) == {"blocks.0.0", "out"}
    assert left(r".*\.2") == {"blocks.0.2", "blocks.1.2"}
    for skip, says in ((["nope"], "'nope'"), ("nope", "'nope'"), ("(", "regular expression"), ([3], "list of module")):
        with pytest.raises(qft.BadOption, match=says):
            left(skip)


# ---- mappings of patterns ---------------------------------------------------------------------------------


def test_patterns_choose_by_module_and_the_first_match_wins():
    model = llama()
    pattern = {"*.1.mlp.*": None, "*.mlp.*": "reference:format=int,bits=3", "*": "nf4"}
    qft.quantize(model, pattern, progress=False)
    audited = qft.audit(model)
    kinds = {n: w.quantizer.partition("(")[0] for n, w in audited.weights.items()}
    assert {n for n, k in kinds.items() if k == "Reference"} == {
        f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    assert {n for n, k in kinds.items() if k == "BitsAndBytes4bit"} == {
        f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"
    }
    assert audited.left["model.layers.1.mlp.up_proj"] == "no pattern asks for it"
    assert model.model.layers[0].mlp.up_proj.quantizer.bits == 3


def test_patterns_take_every_kind_of_spec():
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    spec = parse_spec({"a": qft.Reference(), "b": int8, "c": {"name": "nf4"}, "d": None})
    assert list(spec.quantizers.values()) == [qft.Reference(), qft.BitsAndBytes8bit(), qft.BitsAndBytes4bit(), None]


@pytest.mark.parametrize("spec", [{}, {3: "nf4"}, {"*": 3}, {"*": "nope"}])
def test_junk_patterns_are_refused(spec):
    with pytest.raises((qft.BadOption, qft.UnknownQuantizer)):
        parse_spec(spec)


# ---- registering ------------------------------------------------------------------------------------------


def test_a_class_registers_and_is_a_backend_like_any_other(own_registry):
    assert qft.register_quantizer("rows", Rows, aliases=("by-row",)) is Rows
    assert qft.get_quantizer("by-row:bits=4,clip=1") == Rows(bits=4, clip=1.0)
    info = qft.available_quantizers()["rows"]
    assert (info.state, info.summary) == ("ready", "Symmetric integers, one scale a row.")
    model = llama()
    wrapped = qft.quantize_and_wrap(model, "rows:bits=6", progress=False)
    assert model.model.layers[0].mlp.up_proj.base_layer.quantizer == Rows(bits=6)
    assert logits(wrapped).isfinite().all()


def test_registers_as_a_decorator_and_as_a_string(own_registry):
    @qft.register_quantizer("decorated", summary="One line.")
    @dataclass(frozen=True)
    class Decorated(Rows):
        name: ClassVar[str] = "decorated"

    assert isinstance(qft.get_quantizer("decorated"), Decorated)
    assert qft.available_quantizers()["decorated"].summary == "One line."
    qft.register_quantizer("by-string", "qft.backends.reference:Reference", summary="Reference again")
    assert qft.get_quantizer("by-string:bits=4") == qft.Reference()


def test_a_taken_name_needs_replace(own_registry):
    for name in ("nf4", "bnb-nf4"):  # a name, an alias
        with pytest.raises(qft.BadOption, match=f"{name!r} is taken.*replace=True"):
            qft.register_quantizer(name, Rows)
    with pytest.raises(qft.BadOption, match="'int8' is taken"):
        qft.register_quantizer("rows", Rows, aliases=("int8",))
    assert qft.get_quantizer("nf4") == qft.BitsAndBytes4bit()
    qft.register_quantizer("nf4", Rows, replace=True)
    assert qft.get_quantizer("nf4") == Rows()


@pytest.mark.parametrize("name", ["", "two words", "a:b", "a,b", "a=b", "*", 3, None])
def test_names_that_no_spec_could_write_are_refused(own_registry, name):
    with pytest.raises(qft.BadOption, match="cannot be called"):
        qft.register_quantizer(name, Rows)
    with pytest.raises(qft.BadOption, match="cannot be called"):
        qft.register_quantizer("rows", Rows, aliases=(name,))
    assert "rows" not in qft.available_quantizers()


class _NotADataclass(qft.TensorQuantizer):
    name: ClassVar[str] = "not a dataclass"
    capabilities = pack = unpack = None


@dataclass
class _NotFrozen(qft.TensorQuantizer):
    name: ClassVar[str] = "not frozen"
    capabilities = pack = unpack = None


@dataclass(frozen=True)
class _Unfinished(qft.TensorQuantizer):
    name: ClassVar[str] = "unfinished"


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (object, "no Quantizer class"),
        (qft.Reference(), "no Quantizer class"),
        (_NotADataclass, r"@dataclass\(frozen=True\)"),
        (_NotFrozen, r"@dataclass\(frozen=True\)"),
        (_Unfinished, "does not define capabilities, pack, unpack"),
    ],
)
def test_what_is_no_finished_quantizer_class_is_refused_with_what_is_missing(own_registry, cls, says):
    with pytest.raises(qft.BadOption, match=says):
        qft.register_quantizer("mine", cls)
    assert "mine" not in qft.available_quantizers()


def test_a_broken_registration_hurts_only_its_own_name(own_registry):
    qft.register_quantizer("broken", "no_such_package_of_mine:Quantizer")
    qft.register_quantizer("wrong", "qft.core.registry:Entry")
    with pytest.raises(qft.MissingDependency, match="no_such_package_of_mine"):
        qft.get_quantizer("broken")
    with pytest.raises(qft.BadOption, match="no Quantizer class"):
        qft.get_quantizer("wrong")
    states = {name: info.state for name, info in qft.available_quantizers().items()}
    assert (states["broken"], states["wrong"], states["reference"]) == ("unusable", "unusable", "ready")
    model = qft.quantize(llama(), "reference", progress=False)
    assert len(qft.audit(model).weights) == 14


def test_the_view_of_quantizers_is_read_only():
    with pytest.raises(TypeError):
        qft.available_quantizers()["mine"] = None


# ---- lazy imports -----------------------------------------------------------------------------------------


def test_import_and_listing_load_no_backend():
    """PEFT itself imports bitsandbytes: it is taken out again first, and neither qft nor its listing brings it back."""
    out = run_python(
        """
        import sys, torch, peft, transformers
        for name in [n for n in sys.modules if n.partition(".")[0] == "bitsandbytes"]:
            del sys.modules[name]
        import qft
        backends = sorted(n for n in sys.modules if n.startswith("qft.backends."))
        assert backends == [], backends
        assert "qft.testing" not in sys.modules and "qft.cli._demo" not in sys.modules
        infos = qft.available_quantizers()
        assert infos["nf4"].state == "ready"
        assert qft.get_quantizer("nf4").block_size == 64 and qft.capabilities("int8").bits == 8
        qft.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "reference", progress=False)
        assert "bitsandbytes" not in sys.modules
        print(*infos)
        """
    )
    assert set(out.split()) >= {"nf4", "fp4", "int8", "reference"}


# ---- a missing package ------------------------------------------------------------------------------------


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    """As where bitsandbytes is not installed: no metadata, and an import of it fails."""
    version = importlib.metadata.version

    def without(name):
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.parametrize("spec", ["nf4", "fp4", "nf4:double_quant=true", "nf4:block_size=128,compute_dtype=bfloat16"])
def test_without_bitsandbytes_the_reference_takes_over_with_the_same_codes(spec, request):
    pytest.importorskip("bitsandbytes")
    theirs = qft.quantize(llama(), spec, progress=False)
    request.getfixturevalue("no_bitsandbytes")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # what a user's interpreter does
        ours = qft.quantize(llama(), spec, progress=False)
    ours_warnings = [w for w in caught if issubclass(w.category, qft.QftWarning)]
    assert len(ours_warnings) == 1
    assert all(s in str(ours_warnings[0].message) for s in ("pip install 'bitsandbytes", "Reference(", "same codes"))
    assert all(isinstance(q, qft.Reference) for q in ours._qft.quantizers.values())
    for name in ours._qft.quantizers:
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        assert torch.equal(mine.qweight, other.weight.view(-1).view(torch.uint8))
    with torch.no_grad():
        found = logits(qft.wrap(ours))
        request.getfixturevalue("monkeypatch").undo()  # bitsandbytes is back
        assert relative(found, logits(qft.wrap(theirs))) < 1e-6


def test_without_bitsandbytes_what_has_no_stand_in_says_the_pip_line(no_bitsandbytes):
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for spec in ("int8", qft.BitsAndBytes8bit(), {"*.mlp.*": "int8", "*": "reference"}):
        with pytest.raises(qft.MissingDependency, match=r"pip install 'bitsandbytes>=0\.\d+'") as caught:
            qft.quantize(model, spec, progress=False)
        assert isinstance(caught.value, ImportError)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert qft.capabilities("int8").bits == 8  # the flags are known without the package


def test_without_bitsandbytes_the_listing_says_so(no_bitsandbytes):
    infos = qft.available_quantizers()
    assert (infos["reference"].state, infos["reference"].hint) == ("ready", "")
    assert infos["int8"].state == "missing" and "pip install 'bitsandbytes" in infos["int8"].hint
    for name in ("nf4", "fp4"):
        assert infos[name].state == "ready"
        assert "reference" in infos[name].hint and "pip install 'bitsandbytes" in infos[name].hint


def test_with_bitsandbytes_every_state_is_ready():
    pytest.importorskip("bitsandbytes")
    assert {(i.state, i.hint) for i in qft.available_quantizers().values()} == {("ready", "")}


def test_an_old_version_counts_as_missing(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.40.0" if n == "bitsandbytes" else version(n))
    with pytest.raises(qft.MissingDependency, match="bitsandbytes>="):
        qft.get_quantizer("int8")


def test_without_bitsandbytes_the_rest_works(no_bitsandbytes, recwarn):
    model = qft.quantize_and_wrap(llama(), "reference", progress=False)
    plain_model = qft.merge_to_float(model)
    assert relative(logits(plain_model), logits(model)) < 1e-6
    assert not [w for w in recwarn if issubclass(w.category, qft.QftWarning)]

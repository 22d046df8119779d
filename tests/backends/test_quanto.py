"""quanto: the package's codes and floats to the bit, its layers and folders, and everything that a backend owes."""

import json

import pytest
import torch
from helpers import refuses, run_python
from models import batch, gpt2, llama, logits, qwen2, relative, train_a_little
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, QuantoConfig
from twins import both_errors, dequantized_copy, pair

import qft
from qft.testing import check_quantizer

FORMATS = ["int2", "int4", "int8", "float8", "float8_e5m2"]
MOST = {"float8": 0.05, "float8_e5m2": 0.1, "int2": 1.2}
"""Errors on normal weights that are above the kit's bound for integers."""


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def linear(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows).to(dtype).requires_grad_(False)
    layer.weight.data = (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)
    return layer


def package():
    return pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")


def qtype(format):
    quanto = package()
    return {"float8": quanto.qfloat8, "float8_e5m2": quanto.qfloat8_e5m2}.get(format) or getattr(quanto, f"q{format}")


def quanto_model(builder=qwen2, format="int4", dtype=torch.float32, **options):
    """A model that the package quantized and froze."""
    model = builder(dtype)
    package().quantize(model, weights=qtype(format), **{"exclude": "lm_head", **options})
    package().freeze(model)
    return model.eval()


def same_bits(a, b):
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


# ---- the kit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*FORMATS, "int4,group_size=32", "int2,group_size=16", "int4,group_size=8"])
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(f"quanto:format={spec}"), max_error=MOST.get(spec.partition(",")[0]))
    assert len(report.passed) == 17 and not report.ruled_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_constant_rows_and_small_weights_stay_finite(format, dtype):
    """A row of zeros is NaN in quanto's float8; small float16 rows lose their scale."""
    own = qft.Quanto(format=format)
    weight = linear(8, 64).weight.data.to(dtype)
    weight[0], weight[1] = 0, 0.25
    got = own.unpack(own.pack(weight), shape=(8, 64), dtype=torch.float32)
    assert torch.equal(got[0], torch.zeros(64))
    assert torch.allclose(got[1], torch.full((64,), 0.25), rtol=0.01)
    tiny = (linear(8, 64).weight.data * 2e-4).to(dtype)
    error = relative(own.unpack(own.pack(tiny), shape=(8, 64), dtype=torch.float32), tiny)
    assert error < {"int2": 0.8, "int4": 0.12, "int8": 0.06, "float8": 0.06, "float8_e5m2": 0.1}[format]


# ---- as the package does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(64, 128), (33, 64), (48, 256), (48, 160), (40, 300), (7, 64)])
def test_codes_constants_and_floats_are_the_packages(shape, format, dtype):
    """Group rules, rows that fill no whole byte, and TinyGemm's layout (int4, bfloat16, groups of 128) included."""
    package()
    from optimum.quanto.nn import QLinear

    layer = linear(*shape, dtype)
    layer.weight.data[0] = 0.25
    theirs = QLinear.from_module(layer, weights=qtype(format))
    theirs.freeze()
    ours, read = qft.Quanto(format=format).quantize_layer(layer), qft.Quanto.converted(theirs)
    assert read.quantizer == ours.quantizer
    assert same_bits(ours.qweight, read.qweight) and same_bits(ours.scale, read.scale)
    assert same_bits(read.weight, theirs.weight.dequantize())
    if type(theirs.weight).__name__.startswith("TinyGemm"):  # which loses bits of the shift
        assert relative(ours.weight, read.weight) < 0.01
    else:
        assert all(same_bits(tensor, read.packed[name]) for name, tensor in ours.packed.items())
        assert same_bits(ours.weight, theirs.weight.dequantize())


def test_a_group_size_of_ones_own():
    quanto = package()
    weight = linear(24, 64).weight.data
    scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, 0, 16)
    theirs = quanto.quantize_weight(weight, quanto.qint4, 0, scale, shift, 16)
    packed = qft.Quanto(format="int4", group_size=16).pack(weight)
    assert torch.equal(packed["qweight"], theirs._data._data)
    assert torch.equal(
        qft.Quanto(format="int4", group_size=16).unpack(packed, shape=(24, 64), dtype=torch.float32),
        theirs.dequantize(),
    )


# ---- what the package, or transformers with it, quantized -------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_packages_model_is_adopted_without_copies(format):
    model = quanto_model(format=format)
    expected = logits(model)
    codes = {n: m.weight._data for n, m in model.named_modules() if type(m).__name__ == "QLinear"}
    tuned = qft.wrap(model, lora())
    assert relative(logits(tuned), expected) < 1e-5
    for name, old in codes.items():
        new = model.get_submodule(name).base_layer
        assert isinstance(new, qft.PackedLinear) and new.quantizer == qft.Quanto(format=format)
        assert new.qweight.data_ptr() == getattr(old, "_data", old).data_ptr()


def test_a_merge_is_no_silent_no_op():
    """PEFT's merge_and_unload over quanto gives back the base model: the adapter is gone, and nothing says so."""
    tuned = train_a_little(qft.wrap(quanto_model(format="int8"), lora()))
    with torch.no_grad(), tuned.disable_adapter():
        base = logits(tuned)
    expected = logits(tuned)
    assert relative(expected, base) > 1e-3
    assert relative(logits(qft.merge_to_float(tuned, dtype=torch.float32)), expected) < 1e-5
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    report = qft.merge(tuned)
    assert report.survived > 0.5
    assert relative(logits(tuned), expected) < 0.3 * relative(base, expected)
    qft.unmerge(tuned)
    assert all(same_bits(v, before[k]) for k, v in tuned.state_dict().items())
    with pytest.warns(qft.QftWarning):
        merged = tuned.merge_and_unload()
    assert relative(logits(merged), expected) < 0.3 * relative(base, expected)


@pytest.mark.parametrize("format", ["int2", "int4", "int8", "float8"])
def test_a_model_that_transformers_quantized(format, tmp_path):
    package()
    qwen2().save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(format))
    expected = logits(theirs)
    with pytest.warns(qft.QftWarning, match="already"):
        tuned = qft.quantize_and_wrap(theirs, QuantoConfig(format), progress=False)
    assert relative(logits(tuned), expected) < 1e-6
    train_a_little(tuned)
    qft.save(tuned, tmp_path / "all", base=True)
    assert torch.equal(logits(qft.load(tmp_path / "all")), logits(tuned))


@pytest.mark.parametrize("format", ["int4", "int8", "float8"])
def test_a_folder_that_the_package_saved(format, tmp_path):
    quanto = package()
    model = qwen2()
    quanto.QuantizedModelForCausalLM.quantize(model, weights=qtype(format), exclude="lm_head").save_pretrained(tmp_path)
    with pytest.warns(qft.QftWarning, match="already"):
        loaded = qft.quantize(tmp_path, f"quanto:format={format}", progress=False)
    assert relative(logits(loaded), logits(model)) < 1e-6
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for change, says in (
        ({f"{name}.weight._scale": None}, f"{name}.weight._scale"),
        ({f"{name}.weight._scale": torch.ones(3, 1)}, f"{name}: "),
        ({"model.norm.weight": None}, "model.norm.weight"),
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with refuses(qft.BadFolder, says):
            qft.quantize(tmp_path, f"quanto:format={format}", progress=False)
    names = json.loads((tmp_path / "quanto_qmap.json").read_text())
    (tmp_path / "quanto_qmap.json").write_text(json.dumps({"elsewhere": next(iter(names.values()))}))
    with refuses(qft.BadFolder, "elsewhere"):
        qft.quantize(tmp_path, "quanto", progress=False)


def test_unfrozen_layers_and_quantized_activations_are_refused():
    quanto = package()
    model = qwen2()
    quanto.quantize(model, weights=quanto.qint8)
    with refuses(qft.UnsupportedOperation, "optimum.quanto.freeze(model)", model=model):
        qft.wrap(model, lora())
    quanto.freeze(model)
    qft.wrap(model, lora())

    model = llama()
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    quanto.freeze(model)
    with refuses(qft.UnsupportedOperation, "activations", "qint8", model=model, outputs=False):
        qft.wrap(model, lora())


# ---- options ----------------------------------------------------------------------------------------------


def test_transformers_config():
    assert qft.get_quantizer(QuantoConfig()) == qft.Quanto()
    assert qft.get_quantizer(QuantoConfig("float8")) == qft.Quanto(format="float8")
    model = qft.quantize(llama(), QuantoConfig("int4", modules_to_not_convert=["o_proj"]), progress=False)
    assert qft.audit(model).left["model.layers.1.self_attn.o_proj"] == "skipped by the caller"
    model = llama()
    with refuses(qft.BadOption, "activations='int8'", model=model):
        qft.quantize(model, QuantoConfig("int8", activations="int8"), progress=False)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("quanto:format=int3", "int2, int4, int8, float8, float8_e5m2"),
        ("quanto:format=int8,group_size=64", "scale a row"),
        ("quanto:format=int4,group_size=-1", "group_size=-1"),
        ("quanto:weights=int4", "format"),
    ],
)
def test_options_that_it_does_not_take(spec, says):
    with refuses(qft.BadOption, says):
        qft.get_quantizer(spec)


def test_a_group_size_that_does_not_divide():
    model = llama()
    with refuses(qft.BadShape, "model.layers.0.self_attn.q_proj", "48", model=model):
        qft.quantize(model, "quanto:format=int4,group_size=48", progress=False)


def test_it_needs_no_package():
    code = """
        import sys
        sys.modules["optimum"] = None
        import torch, qft
        for format in ("int2", "int4", "int8", "float8"):
            layer = qft.Quanto(format=format).quantize_layer(torch.nn.Linear(64, 64))
            print(tuple(layer(torch.ones(1, 64)).shape))
    """
    assert run_python(code).split("\n")[:4] == ["(1, 64)"] * 4


# ---- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("builder", [qwen2, gpt2])
@pytest.mark.parametrize("format", ["int2", "int4", "int8", "float8"])
def test_outputs_and_gradients_equal_those_over_a_float_copy(format, builder, dora):
    assert max(both_errors(*pair(builder, f"quanto:format={format}", lora(use_dora=dora)))) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_saved_folders_load_through_qft_and_transformers(format, dtype, tmp_path):
    model = qft.quantize(qwen2(dtype), f"quanto:format={format}", progress=False)
    state = model.state_dict()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "qft"
    with pytest.warns(qft.QftWarning, match="already"):
        ours = qft.quantize(tmp_path, f"quanto:format={format}", progress=False)
    for loaded in (ours, AutoModelForCausalLM.from_pretrained(tmp_path)):
        again = loaded.state_dict()
        assert again.keys() == state.keys()
        assert all(same_bits(v, state[k]) and v.dtype == state[k].dtype for k, v in again.items())


def test_from_a_folder_as_in_memory(tmp_path):
    qwen2().save_pretrained(tmp_path)
    streamed = qft.quantize(tmp_path, "quanto:format=int4", progress=False)
    assert torch.equal(logits(streamed), logits(qft.quantize(qwen2(), "quanto:format=int4", progress=False)))


@pytest.mark.parametrize("init", ["loftq", "qera", "pissa", qft.LoftQ(steps=3)])
def test_starts_lower_the_error(init):
    with torch.no_grad():
        target = logits(qwen2())
    data = [batch(seed=s) for s in range(4)] if init == "qera" else None
    spec = "quanto:format=int2,group_size=32"
    model = qft.quantize_and_wrap(qwen2(), spec, adapter=lora(r=8), init=init, calibration=data, progress=False)
    plain = dequantized_copy(qft.quantize(qwen2(), spec, progress=False), qwen2())
    assert relative(logits(model), target) < 0.95 * relative(logits(plain), target)

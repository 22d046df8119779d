"""torchao: its tensors inside linear layers, as it and transformers make them, and everything that a backend owes."""

import copy
import dataclasses
import importlib.metadata
import json

import pytest
import torch
from helpers import refuses, run_python
from models import batch, gpt2, llama, logits, plain, qwen2, relative, train_a_little
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig
from twins import both_errors, dequantized_copy, fill, pair, share, stock

import qft
from qft.backends.torchao_layer import TorchAOLinear, floats, leaves
from qft.core.registry import quantizer_of
from qft.testing import check_quantizer

ao = pytest.importorskip("torchao.quantization", reason="pip install torchao")

SPECS = {
    "torchao": None,
    "torchao:group_size=32": None,
    "torchao:group_size=0": 0.1,
    "torchao:format=float8": 0.06,
    "torchao:format=float8,group_size=32": 0.06,
    "torchao:format=float8_e5m2": 0.1,
    "torchao:format=int,bits=1,symmetric=false": None,
    "torchao:format=int,bits=2,symmetric=false,group_size=16": None,
    "torchao:format=int,bits=3,symmetric=false": None,
    "torchao:format=int,bits=4,group_size=32": None,
    "torchao:format=int,bits=4,group_size=-1": 0.4,
    "torchao:format=int,bits=8": None,
    "torchao:format=nf4,scaler_block_size=8": None,
}
"""Specs, and errors on normal weights where the kit's bound is for other groups."""
OLD = importlib.metadata.version("torchao").startswith("0.17")
if OLD:  # its float8 has a scale a row, and nothing else
    SPECS = {s: e for s, e in SPECS.items() if "float8,group" not in s}
STORED = [s for s in SPECS if "nf4" not in s and "bits=1" not in s]


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def linear(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows).to(dtype).requires_grad_(False)
    layer.weight.data = (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)
    return layer


def configs():
    """torchao's configs, and the options that qft reads off what they make."""
    group, tensor, ints = ao.PerGroup(32), ao.PerTensor(), ao.IntxWeightOnlyConfig
    both = qft.TorchAO
    return {
        "int8": (ao.Int8WeightOnlyConfig(version=2), both("int8", group_size=-1)),
        "float8": (ao.Float8WeightOnlyConfig(), both("float8", group_size=-1)),
        "e5m2": (
            ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, **({} if OLD else {"granularity": tensor})),
            both("float8_e5m2", group_size=-1 if OLD else 0),
        ),
        "int3": (ints(torch.int3, group), both("int", bits=3, group_size=32)),
        "int5": (
            ints(torch.int5, mapping_type=ao.MappingType.ASYMMETRIC),
            both("int", bits=5, group_size=-1, symmetric=False),
        ),
        "int8 dynamic": (
            ao.Int8DynamicActivationInt8WeightConfig(version=2),
            both("int8", group_size=-1, activations=True),
        ),
        "int4 dynamic": (
            ao.Int8DynamicActivationIntxWeightConfig(torch.int4, group),
            both("int", bits=4, group_size=32, activations=True),
        ),
    }


def ao_model(name="int8", builder=qwen2, dtype=torch.float32):
    """A model that torchao's own call quantized, but for its head."""
    model = builder(dtype)
    chosen = lambda module, fqn: isinstance(module, nn.Linear) and "head" not in fqn  # noqa: E731
    ao.quantize_(model, configs()[name][0], chosen)
    return model.eval()


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


# ---- the kit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(spec), max_error=SPECS[spec])
    assert report.ruled_out == (["model_saves_and_loads"] if "nf4" in spec else [])
    assert len(report.passed) + len(report.ruled_out) == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_rows_of_zeros_and_small_weights_stay_finite(spec, dtype):
    layer = linear(64, 128, dtype)
    layer.weight.data[:8] = 0
    layer.weight.data[8:16] *= 1e-4
    own = qft.get_quantizer(spec)
    value = own.dequantize(own.weights(own.quantize_layer(layer))[0], dtype=torch.float32)
    assert value.isfinite().all() and value[:8].abs().max() < (1e-4 if "nf4" in spec else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [s for s in SPECS if "nf4" not in s and "bits=1" not in s])
def test_small_weights_lose_no_more_than_large_ones(spec, dtype):
    """torchao 0.17 keeps scales of integers above the epsilon of the weight's dtype: 0.0078 in bfloat16."""
    own, layer = qft.get_quantizer(spec), linear(64, 128)
    errors = []
    for factor, kind in ((20, torch.float32), (0.1, dtype)):
        layer.weight.data = (linear(64, 128).weight.data * factor).to(kind)
        value = own.dequantize(own.weights(own.quantize_layer(layer))[0], dtype=torch.float32)
        errors.append(relative(value, layer.weight.float()))
    assert errors[1] < 1.1 * errors[0] + 2e-3


# ---- what torchao quantized -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", configs())
def test_floats_are_torchaos_to_the_bit_and_options_are_read(name, dtype):
    config, options = configs()[name]
    layer = nn.Sequential(linear(48, 96, dtype))
    ao.quantize_(layer, config)
    theirs, qdata = layer[0].weight.dequantize(), layer[0].weight.qdata
    own = quantizer_of(layer[0])
    assert own == options == type(own).from_dict(own.to_dict())
    handle = own.weights(layer[0])[0]
    assert handle.dtype == dtype and handle.bias is layer[0].bias
    assert same_bits(own.dequantize(handle), theirs)
    assert same_bits(own.dequantize(handle, dtype=torch.float32).to(dtype), theirs)
    assert layer[0].weight.qdata.data_ptr() == qdata.data_ptr(), "the codes were copied"
    if not own.activations and not (OLD and own.format == "int"):  # whose scales are too large in 16 bit
        ours = own.quantize_layer(linear(48, 96, dtype))
        assert all(same_bits(t, leaves(ours.weight)[n]) for n, t in leaves(layer[0].weight).items())


@pytest.mark.parametrize("name", configs())
def test_a_model_of_torchaos_trains_as_its_float_copy(name):
    """Where activations are quantized, torchao detaches the output: nothing below the layer would get a gradient."""
    model = ao_model(name)
    with torch.no_grad():
        expected = logits(model)
        twin = dequantized_copy(model, qwen2())
        assert torch.equal(logits(model), expected), "adopting changed the forward"
    tuned = qft.wrap(model, lora())
    theirs = stock(twin, lora(), tuned.peft_config["default"])
    share(fill(tuned), theirs)
    assert max(both_errors(tuned, theirs)) < 2e-5
    first = logits(tuned)
    assert relative(logits(train_a_little(tuned)), first) > 1e-3
    assert relative(logits(qft.merge_to_float(tuned, dtype=torch.float32)), logits(tuned)) < 1e-5


@pytest.mark.parametrize("name", configs())
def test_layers_without_adapters_pass_gradients_on(name):
    model = ao_model(name)
    twin = dequantized_copy(model, qwen2())
    for net in (model, twin):
        logits(net).square().sum().backward()
    mine, theirs = model.model.embed_tokens.weight.grad, twin.model.embed_tokens.weight.grad
    assert relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("name", ["int8", "float8", "int3"])
def test_a_merge_into_the_codes_and_back(name):
    tuned = train_a_little(qft.wrap(ao_model(name), lora(use_dora=True)), steps=8, lr=5e-2)
    expected = logits(tuned)
    with torch.no_grad(), tuned.disable_adapter():
        base = logits(tuned)
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    qft.merge(tuned)
    assert relative(logits(tuned), expected) < (0.9 if name == "int3" else 0.3) * relative(base, expected)
    qft.unmerge(tuned)
    assert all(same_bits(v, before[k]) for k, v in tuned.state_dict().items())
    assert torch.equal(logits(tuned), expected)


def test_dora_merges_with_its_magnitude_and_nan_is_refused():
    """PEFT's merge over torchao leaves DoRA's magnitude out, and its safe_merge lets NaN pass."""
    tuned = train_a_little(qft.wrap(ao_model(), lora(use_dora=True)))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    assert relative(logits(qft.merge_to_float(tuned, dtype=torch.float32)), logits(tuned)) < 1e-5
    with torch.no_grad():
        next(p for n, p in tuned.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    for verb in (qft.merge, qft.merge_to_float):
        with refuses(qft.NonFiniteWeights, "default", model=tuned, outputs=False):
            verb(tuned)


def test_input_scales_of_awq_and_smoothquant_belong_to_the_weight():
    layer = nn.Sequential(linear(48, 96))
    ao.quantize_(layer, ao.Int8WeightOnlyConfig(version=2))
    layer[0].weight.act_pre_scale = torch.linspace(0.5, 2, 96)
    x = torch.randn(4, 96)
    y = layer(x)
    own = quantizer_of(layer[0])
    handle = own.weights(layer[0])[0]
    assert relative(x @ own.dequantize(handle).T + layer[0].bias, y) < 1e-5
    assert relative(layer(x.requires_grad_(True)), y) < 1e-5
    wanted = linear(48, 96, seed=3).weight.data
    own.requantize(handle, wanted)
    assert relative(own.dequantize(handle), wanted) < 0.02
    assert same_bits(layer[0].weight.act_pre_scale, torch.linspace(0.5, 2, 96))


def test_what_has_no_options_here_trains_and_is_not_merged_into_codes():
    """Codes that only a kernel reads are had through the kernel."""
    kernel = type("KernelTensor", (ao.Int8Tensor,), {"dequantize": torch.Tensor.dequantize, "__module__": "torchao.x"})
    layer = linear(64, 1200, torch.bfloat16)
    before = layer.weight.data.clone()
    whole = ao.Int8Tensor.from_hp(before, granularity=ao.PerRow())
    made = kernel.__tensor_unflatten__(leaves(whole), whole.__tensor_flatten__()[1], whole.shape, whole.stride())
    layer.weight = nn.Parameter(made, requires_grad=False)
    own = quantizer_of(layer)
    assert own.format == "other" and own.bits == 8
    handle = own.weights(layer)[0]
    assert relative(own.dequantize(handle), whole.dequantize()) < 0.005
    x = torch.randn(3, 1200, dtype=torch.bfloat16)
    assert relative(layer(x.clone().requires_grad_(True)), layer(x)) < 0.02
    with refuses(qft.UnsupportedOperation, "requantize"):
        own.requantize(handle, before)
    model = llama()
    with refuses(qft.UnsupportedOperation, "quantize_", model=model):
        qft.quantize(model, "torchao:format=other", progress=False)


def test_what_gives_no_floats_is_refused():
    kernel = type("KernelTensor", (ao.Int8Tensor,), {"dequantize": torch.Tensor.dequantize, "__module__": "torchao.x"})
    model = ao_model("int8 dynamic", llama)
    old = model.model.layers[1].mlp.up_proj.weight
    made = kernel.__tensor_unflatten__(leaves(old), old.__tensor_flatten__()[1], old.shape, old.stride())
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(made, requires_grad=False)
    for verb in (qft.wrap, qft.merge_to_float):
        with pytest.raises(qft.UnsupportedOperation, match="KernelTensor"):
            verb(model)
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("version", [1, 2] if OLD else [2])
def test_both_generations_of_dynamic_activations(version):
    """torchao 0.17's first version wraps the weight in a tensor that quantizes its input."""
    model = qwen2()
    config = ao.Int8DynamicActivationInt8WeightConfig(version=version)
    ao.quantize_(model, config, lambda m, fqn: isinstance(m, nn.Linear) and "head" not in fqn)
    with torch.no_grad():
        expected = logits(model)
    tuned = qft.wrap(model, lora())
    assert relative(logits(tuned), expected) < 0.05
    first = logits(tuned)
    assert relative(logits(train_a_little(tuned)), first) > 1e-3
    assert relative(logits(qft.merge_to_float(tuned, dtype=torch.float32)), logits(tuned)) < 1e-5


@pytest.mark.parametrize("name", ["int8", "float8", "int4 dynamic"])
def test_a_model_that_transformers_quantized(name, tmp_path):
    qwen2().save_pretrained(tmp_path)
    config, options = configs()[name]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    tuned = qft.wrap(theirs, lora())
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.quantizer == options
    assert relative(logits(tuned), expected) < (0.05 if options.activations else 1e-5)
    train_a_little(tuned)
    again = qft.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), lora())
    assert again.base_model.model.model.layers[0].self_attn.q_proj.quantizer == options
    if options.activations:
        with refuses(qft.UnsupportedOperation, "serializable"):
            qft.save(tuned, tmp_path / "all", base=True)
        return
    qft.save(tuned, tmp_path / "all", base=True)
    assert torch.equal(logits(qft.load(tmp_path / "all")), logits(tuned))


# ---- layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", configs())
def test_casts_copies_and_state_dicts_keep_an_adopted_weight(name):
    model = nn.Sequential(linear(48, 96))
    ao.quantize_(model, configs()[name][0])
    native = {k: v.clone() for k, v in model.state_dict().items()}
    own = quantizer_of(model[0])
    value = own.dequantize(own.weights(model[0])[0])
    twin = copy.deepcopy(model)
    twin.half().bfloat16()
    assert twin[0].weight.dtype == own.weights(twin[0])[0].dtype == torch.bfloat16 == twin[0].bias.dtype
    assert same_bits(own.dequantize(own.weights(twin[0])[0], dtype=torch.float32), value)
    assert list(twin[0]._parameters) == ["weight", "bias"] and not any(p.requires_grad for p in twin.parameters())
    state = model.state_dict()
    assert all(type(t) is torch.Tensor for t in state.values()) and "0._weight_qdata" in state
    assert own.weights(model[0])[0].dtype == torch.float32
    for given in (state, native):
        other = nn.Sequential(linear(48, 96, seed=9))
        ao.quantize_(other, configs()[name][0])
        quantizer_of(other[0])
        assert not same_bits(floats(other[0].weight, torch.float32), value)
        other.load_state_dict(given)
        assert same_bits(floats(other[0].weight, torch.float32), value) and same_bits(other[0].bias, model[0].bias)
    with pytest.raises(RuntimeError, match="_weight_scale"):
        other.load_state_dict({k: v for k, v in state.items() if "scale" not in k})
    with pytest.raises(RuntimeError, match="_weight_qdata"):
        other.load_state_dict({**state, "0._weight_qdata": state["0._weight_qdata"][:3]})


def test_nf4_is_copied_and_not_quantized_again():
    own = qft.TorchAO("nf4", scaler_block_size=8)
    layer = own.quantize_layer(linear(64, 128))
    twin = copy.deepcopy(layer)
    assert all(same_bits(t, leaves(twin.weight)[n]) for n, t in leaves(layer.weight).items())
    assert twin.weight is not layer.weight and twin.weight.quantized_data is not layer.weight.quantized_data
    assert qft.TorchAO.recognise(twin) == dataclasses.replace(own, group_size=64)


def test_other_backends_and_float_layers_are_left_alone():
    assert quantizer_of(nn.Linear(4, 4)) is None and type(nn.Linear(4, 4)) is nn.Linear
    model = qft.quantize(llama(), "nf4", progress=False)
    assert all(q.name == "bitsandbytes_4bit" for m in model.modules() if (q := quantizer_of(m)) is not None)
    head = model.lm_head
    assert type(head) is nn.Linear and quantizer_of(head) is None and "_qft_quantizer" not in vars(head)


def test_autocast_and_other_dtypes_compute_as_linear_layers_do():
    layer = qft.TorchAO("float8").quantize_layer(linear(48, 96, torch.bfloat16))
    x = torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    y = x @ floats(layer.weight, torch.float32).T + layer.bias.float()
    assert layer(x).dtype == torch.float32 and relative(layer(x), y) < 1e-5


# ---- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", STORED)
def test_saved_folders_load_through_qft_and_plain_transformers(spec, dtype, tmp_path):
    model = qft.quantize(qwen2(dtype), spec, progress=False)
    state = model.state_dict()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = theirs.model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear and type(layer.weight).__module__.startswith("torchao")
    if dtype == torch.float32:
        assert relative(logits(theirs), logits(model)) < 1e-5
    with pytest.warns(qft.QftWarning, match="already"):
        ours = qft.quantize(tmp_path, spec, progress=False)
    again = ours.state_dict()
    assert again.keys() == state.keys()
    assert all(same_bits(v, state[k]) for k, v in again.items())


def test_a_damaged_folder_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    qft.quantize(qwen2(), "torchao", progress=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj._weight_scale"
    for change, notes, says in (
        ({name: None}, metadata, name),
        ({name: torch.ones(3, 1)}, metadata, name),
        ({}, {"format": "pt"}, "notes"),
    ):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, file, notes)
        with refuses(qft.BadFolder, says):
            qft.quantize(tmp_path, "torchao", progress=False)


def test_from_a_folder_as_in_memory(tmp_path):
    qwen2().save_pretrained(tmp_path)
    for spec in ("torchao", "torchao:format=int,bits=4"):
        streamed = qft.quantize(tmp_path, spec, progress=False)
        memory = qft.quantize(qwen2(), spec, progress=False)
        assert torch.equal(logits(streamed), logits(memory)) and type(streamed.lm_head) is nn.Linear


@pytest.mark.parametrize("builder", [qwen2, plain])
def test_an_adapter_and_its_base_are_saved(builder, tmp_path):
    spec = "torchao:format=int,bits=4,group_size=32"
    model = qft.quantize_and_wrap(builder(), spec, init=qft.LoftQ(steps=3), adapter=lora(), progress=False)
    qft.save(model, tmp_path, base=True)
    again = qft.load(tmp_path, builder() if builder is plain else None)
    with torch.no_grad():
        assert torch.equal(logits(again), logits(model))


def test_conv1d_would_be_read_transposed_and_is_not_saved(tmp_path):
    model = qft.quantize(gpt2(), "torchao", progress=False)
    with refuses(qft.UnsupportedOperation, "Conv1D", "transformer.h.0.attn.c_attn", model=model):
        model.save_pretrained(tmp_path / "all")
    assert not list(tmp_path.rglob("*.safetensors"))
    tuned = train_a_little(qft.wrap(model, lora()))
    with refuses(qft.UnsupportedOperation, "Conv1D"):
        qft.save(tuned, tmp_path / "tuned", base=True)
    assert not (tmp_path / "tuned").exists()
    qft.save(tuned, tmp_path / "tuned")
    assert torch.equal(logits(qft.load(tmp_path / "tuned", gpt2())), logits(tuned))


# ---- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", configs())
def test_transformers_config(name):
    config, options = configs()[name]
    if options.activations:
        model = llama()
        with refuses(qft.UnsupportedOperation, "qft.wrap", model=model):
            qft.quantize(model, TorchAoConfig(config), progress=False)
        return
    assert qft.get_quantizer(TorchAoConfig(config)) == options
    again = options.transformers_config(["lm_head"], torch.float32)
    assert qft.get_quantizer(again) == options and again.modules_to_not_convert == ["lm_head"]
    model = qft.quantize(llama(), TorchAoConfig(config, modules_to_not_convert=["o_proj"]), progress=False)
    assert qft.audit(model).left["model.layers.1.self_attn.o_proj"] == "skipped by the caller"


def test_configs_that_would_be_half_honoured_are_refused():
    for config, error, says in (
        (
            TorchAoConfig(ao.Int8WeightOnlyConfig(version=2), include_input_output_embeddings=True),
            qft.BadOption,
            "embed",
        ),
        (
            TorchAoConfig(ao.IntxWeightOnlyConfig(torch.int4, scale_dtype=torch.float16)),
            qft.UnsupportedOperation,
            "quantize_",
        ),
    ):
        model = llama()
        with refuses(error, says, model=model):
            qft.quantize(model, config, progress=False)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("torchao:format=int9", "int8"),
        ("torchao:format=int,bits=9", "bits=9"),
        ("torchao:format=int,bits=0", "bits=0"),
        ("torchao:format=int,group_size=0", "group_size=0"),
        ("torchao:format=int4,group_size=48", "32, 64, 128 or 256"),
        ("torchao:format=nf4,group_size=-1", "nf4"),
        ("torchao:group_size=-2", "group_size=-2"),
        ("torchao:dtype=int8", "format"),
        ("torchao:scaler_block_size=0", "scaler_block_size=0"),
    ],
)
def test_options_that_it_does_not_take(spec, says):
    with refuses(qft.BadOption, says):
        qft.get_quantizer(spec)


@pytest.mark.parametrize("spec", ["group_size=48", "format=int,group_size=48", "format=nf4"])
def test_groups_that_do_not_divide(spec):
    model = llama()
    with refuses(qft.BadShape, "model.layers.0.self_attn.q_proj", model=model):
        qft.quantize(model, f"torchao:{spec}", progress=False)


def test_one_bit_without_zero_points_would_round_everything_to_zero():
    model = llama()
    with refuses(qft.BadOption, "symmetric=false", model=model):
        qft.quantize(model, "torchao:format=int,bits=1", progress=False)


def test_int4_says_what_each_layout_lacks_here():
    if torch.cuda.is_available():
        pytest.skip("for machines without CUDA")
    model = llama()
    with refuses(qft.UnsupportedDevice, "tile_packed_to_4d", "mslk", "format=int,bits=4", model=model):
        qft.quantize(model, "torchao:format=int4", progress=False)


@pytest.mark.parametrize("version", ["0.12.0", "0.25.0", None])
def test_a_package_that_is_absent_too_old_or_too_new(version, monkeypatch):
    real = importlib.metadata.version

    def fake(name):
        if name == "torchao" and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == "torchao" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", fake)
    model = llama()
    with refuses(qft.MissingDependency, "pip install 'torchao>=0.17", version or "not installed", model=model):
        qft.quantize(model, "torchao", progress=False)


def test_importing_it_leaves_no_trace():
    code = """
        import contextlib, importlib.util, io, logging, os, sys
        spec = importlib.util.spec_from_file_location("quiet", sys.argv[1])
        quiet = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(quiet)
        import torch
        env, handlers = dict(os.environ), list(logging.root.handlers)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            package = quiet.quiet_import("torchao.quantization")
        assert package.quantize_ and quiet.quiet_import("torchao.quantization") is package
        print([out.getvalue(), err.getvalue(), dict(os.environ) == env, logging.root.handlers == handlers,
               logging.root.manager.disable])
    """
    import qft.core.console

    assert run_python(code, qft.core.console.__file__).strip().endswith("['', '', True, True, 0]")


def test_float8_rows_of_zeros_that_torchao_made_nan_are_zeros_again():
    layer = linear(64, 128)
    layer.weight.data[3] = 0
    model = nn.Sequential(layer)
    ao.quantize_(model, ao.Float8WeightOnlyConfig())
    assert model(torch.ones(1, 128)).isnan().any()
    with pytest.warns(qft.QftWarning, match="NaN"):
        own = quantizer_of(model[0])
    value = own.dequantize(own.weights(model[0])[0])
    assert value[3].eq(0).all() and value.isfinite().all() and model(torch.ones(1, 128)).isfinite().all()


def test_bits_and_bytes_are_true():
    model = qft.quantize(llama(torch.bfloat16), "torchao", progress=False)
    audit = qft.audit(model)
    rows = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, TorchAOLinear)]
    constants = len(leaves(next(m for m in model.modules() if isinstance(m, TorchAOLinear)).weight))
    assert constants == 3 and audit.quantized_bytes == sum(r * c + (3 if OLD else 5) * r for r, c in rows)
    before = audit.nbytes
    embedding = model.model.embed_tokens.weight
    ao.quantize_(
        model.model, ao.Int8WeightOnlyConfig(version=2), lambda m, _: isinstance(m, nn.Embedding)
    )  # no linear layer, and weighed all the same
    n, width = embedding.shape
    assert qft.audit(model).nbytes == before - n * width + (3 if OLD else 5) * n


# ---- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("builder", [qwen2, gpt2])
@pytest.mark.parametrize("spec", ["torchao", "torchao:format=float8", "torchao:format=int,bits=3,group_size=32"])
def test_outputs_and_gradients_equal_those_over_a_float_copy(spec, builder, dora):
    assert max(both_errors(*pair(builder, spec, lora(use_dora=dora)))) < 2e-5


@pytest.mark.parametrize("init", ["loftq", "qera", "pissa", qft.LoftQ(steps=3)])
def test_starts_lower_the_error(init):
    with torch.no_grad():
        target = logits(qwen2())
    data = [batch(seed=s) for s in range(4)] if init == "qera" else None
    spec = "torchao:format=int,bits=3,group_size=32"
    model = qft.quantize_and_wrap(qwen2(), spec, adapter=lora(r=8), init=init, calibration=data, progress=False)
    bare = dequantized_copy(qft.quantize(qwen2(), spec, progress=False), qwen2())
    assert relative(logits(model), target) < 0.95 * relative(logits(bare), target)

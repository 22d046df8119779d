"""AWQ: its layout against autoawq's and gptqmodel's, the algorithm against rounding to nearest, models both ways."""

import contextlib
import copy
import io
import json
import os

import pytest
import torch
from helpers import refuses
from models import BUILDERS, batch, gpt2, llama, logits, qwen2, relative, train_a_little
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from twins import both_errors, dequantized_copy, fill, quantized, share, stock

import qft
from qft.backends.awq import AWQ
from qft.core.registry import from_config
from qft.testing import check_quantizer

BACKEND_SPECS = ["awq:group_size=32", "awq:group_size=-1,zero_point=false"]

DATA = batch(seed=40, shape=(24, 32))
"""768 tokens: enough for the second moments of layers of 128 inputs."""


def calibrated(model, spec, **kwargs):
    return qft.quantize(model, spec, calibration=DATA, progress=False, **kwargs)


def moments(columns, tokens=600, seed=0):
    """Correlated inputs and what qft knows of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    square = x.square().mean(0)
    return x, qft.Statistics(tokens, square, x.abs().mean(0), second_moment=x.T @ x / tokens)


def unpacked(q, packed, shape, dtype=torch.float32):
    return q.unpack(packed, shape=shape, dtype=dtype)


@pytest.mark.parametrize("spec", [*BACKEND_SPECS, "awq", "awq:group_size=16,zero_point=false", "awq:apply_clip=false"])
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(spec))
    assert len(report.passed) == 17 and not report.ruled_out


# ---- the algorithm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [32, 256, -1])
def test_outputs_are_closer_than_those_of_rounding_to_nearest(group_size, zero_point):
    q = AWQ(group_size=group_size, zero_point=zero_point)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    x, statistics = moments(256)

    def error(packed):
        return float(((unpacked(q, packed, (64, 256)) - weight) @ x.T).norm() / (weight @ x.T).norm())

    assert error(q.pack(weight, statistics=statistics)) < 0.7 * error(q.pack(weight))


def test_ranges_are_those_of_the_least_weighted_error():
    """With uncorrelated inputs nothing is fed back, and every group can be searched by hand, in float64."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 64, generator=generator)
    weight[:, 3] *= 6  # an outlier that no token reads
    activity = torch.rand(64, generator=generator) + 0.5
    activity[3] = 1e-4
    statistics = qft.Statistics(1000, activity, activity, second_moment=torch.diag(activity))
    q = AWQ(group_size=32)
    packed = q.pack(weight, statistics=statistics)
    found = (activity.double() * (unpacked(q, packed, (16, 64)).double() - weight).square()).view(16, 2, 32).sum(-1)
    least = torch.full_like(found, torch.inf)
    groups, heat = weight.double().view(16, 2, 32), activity.double().view(1, 2, 32)
    for step in range(10):
        low, high = groups.amin(-1) * (1 - step / 20), groups.amax(-1) * (1 - step / 20)
        scale = ((high - low) / 15).half().double()[..., None]
        zero = (-low[..., None] / scale).round().clamp(0, 15)
        value = ((groups / scale).round() + zero).clamp(0, 15).sub(zero) * scale
        least = torch.minimum(least, (heat * (value - groups).square()).sum(-1))
    assert torch.allclose(found, least, rtol=1e-2)  # products are rounded to float16
    plain = AWQ(group_size=32, apply_clip=False)
    kept = unpacked(plain, plain.pack(weight, statistics=statistics), (16, 64))
    assert torch.equal(kept, unpacked(plain, plain.pack(weight), (16, 64)))
    assert float(found.sum()) < 0.9 * float((activity * (kept - weight).square()).sum())


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-8, 0.5, -0.5, 20000.0])
def test_constant_weights(value, zero_point):
    q = AWQ(group_size=32, zero_point=zero_point)
    found = unpacked(q, q.pack(torch.full((8, 64), value)), (8, 64))
    assert float((found - value).abs().max()) <= max(abs(value) * 0.001, 2e-8)


def test_weights_beyond_float16_are_refused():
    with refuses(qft.BadOption, "float16"):
        AWQ(group_size=32).pack(torch.full((8, 64), 1e6))


def test_statistics_of_another_kind_are_refused():
    with refuses(qft.BadOption, "second moments"):
        AWQ(group_size=32).pack(torch.randn(8, 64), statistics=qft.Statistics(9, torch.ones(64), torch.ones(64)))


# ---- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", BACKEND_SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_closer_than_rounded_to_nearest(name, spec):
    model = BUILDERS[name]()
    expected, floats = logits(model, DATA), copy.deepcopy(model)
    calibrated(model, spec)
    error = relative(logits(model, DATA), expected)
    with torch.no_grad():
        for layer, _, q, handle in list(quantized(model)):
            weight = floats.get_submodule(layer).weight
            q.requantize(handle, weight.T if handle.transposed else weight)
    assert error < 0.9 * relative(logits(model, DATA), expected)


@pytest.mark.parametrize("spec", BACKEND_SPECS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_are_those_over_a_float_copy(spec, use_dora):
    adapter = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=use_dora)
    model = qwen2()
    twin = copy.deepcopy(model)
    calibrated(model, spec)
    dequantized_copy(model, twin)
    ours = qft.wrap(model, copy.deepcopy(adapter))
    theirs = stock(twin, adapter, ours.peft_config["default"])
    share(fill(ours), theirs)
    assert max(both_errors(ours, theirs)) < 1e-4


@pytest.mark.parametrize("spec", BACKEND_SPECS)
def test_merges(spec):
    model = train_a_little(qft.wrap(calibrated(qwen2(), spec)))
    tuned = logits(model).detach()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = qft.merge_to_float(copy.deepcopy(model), dtype=torch.float32)
    assert relative(logits(plain), tuned) < 1e-5
    qft.merge(model)
    qft.unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("init", ["loftq", "qera"])
def test_inits_lower_the_error(init):
    floats = llama()
    expected = logits(floats, DATA)
    model = qft.quantize_and_wrap(floats, "awq:group_size=32", calibration=DATA, init=init, progress=False)
    with model.disable_adapter():
        without = relative(logits(model, DATA), expected)
    assert relative(logits(model, DATA), expected) < 0.9 * without


def test_a_merge_over_the_original_weights(tmp_path):
    """No channel scales are folded into the model: its float folder is still the one that it came from."""
    llama().save_pretrained(tmp_path)
    model = train_a_little(qft.wrap(calibrated(llama(), "awq:group_size=32")))
    over, twin = copy.deepcopy(model), copy.deepcopy(model)
    tuned = qft.merge_to_float(twin, dtype=torch.float32)
    qft.merge(over, original=tmp_path)
    for name, module in llama().named_modules():
        if isinstance(module, nn.LayerNorm) or "norm" in name.rpartition(".")[2]:
            assert torch.equal(model.get_submodule(f"base_model.model.{name}").weight, module.weight)
    assert relative(logits(over), logits(tuned)) < 0.3


def test_calibration_is_wanted_and_short_data_is_said_so():
    model = llama()
    with refuses(qft.NeedsCalibration, "calibration=", model=model):
        qft.quantize(model, "awq:group_size=32", progress=False)
    with pytest.warns(qft.QftWarning, match="tokens came through"):
        qft.quantize(model, "awq:group_size=32", calibration=batch(shape=(1, 8)), progress=False)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("awq:group_size=48", "group_size=48"),
        ("awq:damp_percent=0", "damp_percent"),
        ("awq:bits=3", "no option 'bits'"),
        ("awq:zero_point=1", "zero_point=1"),
    ],
)
def test_bad_options(spec, says):
    with refuses(qft.BadOption, says):
        qft.get_quantizer(spec)


def test_shapes_that_do_not_fit_are_named():
    model = llama(intermediate_size=96)
    with refuses(qft.BadShape, "q_proj", "groups of 128", model=model):
        calibrated(model, "awq:group_size=128")
    with refuses(qft.BadShape, "odd", "multiples of 8"):
        AWQ().resolve([("odd", (36, 64))])
    assert AWQ().resolve([("a", (64, 128)), ("b", (64, 96))]).group_size == 32
    assert AWQ().resolve([("a", (64, 128)), ("b", (64, 192))]).group_size == 64


# ---- configs ----------------------------------------------------------------------------------------------


def test_configs_of_the_field():
    from transformers import AwqConfig

    assert qft.get_quantizer(AwqConfig()) == AWQ(group_size=128)
    assert qft.get_quantizer(AwqConfig(group_size=64, zero_point=False)) == AWQ(64, zero_point=False)
    assert qft.core.registry.parse_spec(AwqConfig(modules_to_not_convert=["o_proj"])).skip == ("o_proj",)
    autoawq = {"quant_method": "awq", "zero_point": True, "group_size": 64, "bits": 4, "version": "gemm"}
    assert from_config({**autoawq, "modules_to_not_convert": None}) == AWQ(64)
    own = {"quant_method": "awq", "zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert from_config(own) == AWQ(64)
    gptqmodel = {
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "lm_head": False,
        "method": "awq",
        "quant_method": "awq",
    }
    gptqmodel |= {"format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32", "meta": {"pack_impl": "auto"}}
    assert from_config({**gptqmodel, "zero_point": False, "version": "gemm"}) == AWQ(64, zero_point=False)


BASE = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 3}, "bits=3"),
        ({"bits": None}, "bits=None"),
        ({"version": "gemv"}, "gemv"),
        ({"version": "gemv_fast"}, "gemv_fast"),
        ({"format": "llm-awq"}, "llm-awq"),
        ({"group_size": 48}, "group_size=48"),
        ({"pack_dtype": "int16"}, "int16"),
        ({"desc_act": True}, "desc_act"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"dynamic": {".*up_proj": {"bits": 8}}}, "dynamic"),
    ],
)
def test_configs_that_mean_something_else(changes, says):
    with refuses(qft.BadOption, says):
        from_config({**BASE, **changes})


# ---- autoawq, gptqmodel, transformers ---------------------------------------------------------------------


@contextlib.contextmanager
def quietly():
    before = dict(os.environ)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def vendors():
    """autoawq's and gptqmodel's layers; both are imported here and nowhere in qft."""
    for package in ("awq", "gptqmodel"):
        pytest.importorskip(package, reason="pip install --no-deps gptqmodel autoawq")
    with quietly():
        import awq.modules.linear.gemm as autoawq
        from awq.utils.packing_utils import dequantize_gemm
        from gptqmodel.nn_modules.qlinear import torch_awq
    return type(
        "Vendors",
        (),
        {"autoawq": autoawq.WQLinear_GEMM, "gptqmodel": torch_awq.AwqTorchLinear, "dequantize": dequantize_gemm},
    )


def vendors_layer(vendors, which, linear, size):
    """A float linear, rounded to nearest between its groups' extremes, as the vendor's tools call their layers."""
    rows, columns = linear.weight.shape
    width = columns if size == -1 else size
    groups = linear.weight.detach().float().view(rows, -1, width)
    scale = ((groups.amax(-1) - groups.amin(-1)).clamp(min=1e-5) / 15).half().float()
    zero = (-groups.amin(-1) / scale).round().clamp(0, 15)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)  # they pack, and do not clamp
    linear = copy.deepcopy(linear)
    linear.weight.data = (codes - zero[..., None]).mul(scale[..., None]).view(rows, columns)
    if which == "autoawq":
        with quietly():
            return vendors.autoawq.from_linear(linear, 4, width, False, scale.T.contiguous(), zero.T.contiguous())
    layer = vendors.gptqmodel(
        bits=4,
        group_size=size,
        sym=False,
        desc_act=False,
        in_features=columns,
        out_features=rows,
        bias=linear.bias is not None,
        register_buffers=True,
    )
    layer.pack(linear, scale, zero)
    layer.post_init()
    return layer


def vendors_model(vendors, which, model, size):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, vendors_layer(vendors, which, module, size))
    return model


@torch.no_grad()
def dequantized(vendors, model, floats):
    for name, module in model.named_modules():
        if hasattr(module, "qzeros"):
            size = module.in_features // module.scales.shape[0]
            value = vendors.dequantize(module.qweight, module.qzeros, module.scales, 4, size)
            floats.get_submodule(name).weight.copy_(value.T)
            if module.bias is not None:
                floats.get_submodule(name).bias.copy_(module.bias)
    return floats


@pytest.mark.parametrize("which", ["autoawq", "gptqmodel"])
@pytest.mark.parametrize(("shape", "size"), [((96, 64), 32), ((64, 128), 64), ((32, 48), 16), ((160, 64), -1)])
def test_same_weight_as_theirs(vendors, which, shape, size):
    linear = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    theirs = vendors_layer(vendors, which, linear, size)
    width = shape[1] if size == -1 else size
    expected = vendors.dequantize(theirs.qweight, theirs.qzeros, theirs.scales, 4, width).T
    assert relative(expected.float(), linear.weight) < 0.15
    ((_, ours, q, handle),) = quantized(qft.wrap(nn.Sequential(theirs)))
    assert torch.equal(q.dequantize(handle, dtype=torch.float16), expected)
    assert ours.qweight.data_ptr() == theirs.qweight.data_ptr(), "the codes were copied"
    assert q == AWQ(theirs.group_size if which == "autoawq" and width in (16, 32, 64) else size)
    assert torch.equal(ours.bias, theirs.bias)
    again = q.pack(q.dequantize(handle, dtype=torch.float32))
    assert {k: (t.shape, t.dtype) for k, t in again.items()} == {k: (t.shape, t.dtype) for k, t in ours.packed.items()}
    fresh = q.pack(linear.weight)
    assert relative(unpacked(q, fresh, shape), expected.float()) < 5e-3


@pytest.mark.parametrize("which", ["autoawq", "gptqmodel"])
@pytest.mark.parametrize("builder", [llama, qwen2])
def test_models_of_theirs_train_and_merge(vendors, which, builder, tmp_path):
    """In memory and from a folder."""
    model = vendors_model(vendors, which, builder(), 32)
    floats = dequantized(vendors, model, builder())
    expected = logits(floats)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {**BASE, "group_size": 32, "modules_to_not_convert": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tied = model.config.tie_word_embeddings
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(qft.QftWarning, match="already"):
        loaded = qft.quantize(tmp_path, "awq:group_size=32", device="cpu", dtype=torch.float32, progress=False)
    for ours in (model, loaded):
        wrapped = qft.wrap(ours)
        assert relative(logits(wrapped), expected) < 1e-5
        train_a_little(wrapped)
        tuned = logits(wrapped).detach()
        assert relative(tuned, expected) > 1e-3
        assert relative(logits(qft.merge_to_float(copy.deepcopy(wrapped), dtype=torch.float32)), tuned) < 1e-5
        before = {k: v.clone() for k, v in wrapped.state_dict().items()}
        qft.merge(wrapped)
        qft.unmerge(wrapped)
        assert all(torch.equal(v, before[k]) for k, v in wrapped.state_dict().items())


@pytest.mark.parametrize("spec", [*BACKEND_SPECS, "awq:group_size=16"])
@pytest.mark.parametrize("builder", [llama, qwen2])
def test_plain_transformers_reads_what_we_save(vendors, builder, spec, tmp_path):
    from transformers import AwqConfig

    model = calibrated(builder(), spec, skip=["o_proj"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["bits"], stored["version"]) == ("awq", 4, "gemm")
    with quietly():
        theirs = type(model).from_pretrained(
            tmp_path, dtype=torch.float32, quantization_config=AwqConfig(backend="torch_awq")
        )
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in theirs.named_modules()}
    assert kinds["q_proj"] == "AwqTorchLinear" and kinds["o_proj"] == kinds["lm_head"] == "Linear"
    assert relative(logits(theirs), expected) < 5e-3  # they compute in float16
    floats = builder()
    for ours in (dequantized_copy(model, copy.deepcopy(floats)), dequantized(vendors, theirs, copy.deepcopy(floats))):
        assert relative(logits(ours), expected) < (1e-5 if builder is llama else 1e-3)  # their biases are float16
    again = qft.quantize(tmp_path, qft.get_quantizer(spec), device="cpu", dtype=torch.float32, progress=False)
    assert torch.equal(logits(again), expected)


def test_a_reloaded_model_trains(tmp_path):
    """transformers picks a kernel for inference, whose outputs are detached or whose .train() raises; ours has none."""
    calibrated(llama(), "awq:group_size=32").save_pretrained(tmp_path)
    model = qft.quantize_and_wrap(tmp_path, "awq:group_size=32", device="cpu", progress=False)
    before = logits(model).detach()
    train_a_little(model.train())
    assert relative(logits(model), before) > 1e-3


def test_gpt2_keeps_our_own_format(tmp_path):
    """transformers' AWQ replaces nn.Linear alone, and would draw a Conv1D's weights at random."""
    model = calibrated(gpt2(), "awq:group_size=32")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "qft"
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_kernels_of_their_own_layout_are_refused(vendors):
    with quietly():
        from awq.modules.linear.gemv import WQLinear_GEMV
        from gptqmodel.nn_modules.qlinear.exllamav2_awq import AwqExllamaV2Linear
        from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
        from gptqmodel.nn_modules.qlinear.marlin_awq import AwqMarlinLinear
        from gptqmodel.nn_modules.qlinear.paroquant import ParoLinear

    for kind in (WQLinear_GEMV, AwqExllamaV2Linear, AwqGEMVLinear, AwqMarlinLinear, ParoLinear):
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        model = nn.Sequential(nn.Linear(4, 4), layer)
        with refuses(qft.UnsupportedOperation, kind.__name__, "auto_trainable"):
            qft.wrap(model)
        assert model[1] is layer


@pytest.mark.parametrize(
    ("attribute", "value"), [("linear_mode", "inference"), ("_cpu_transformed", True), ("adapter", object())]
)
def test_layers_that_compute_something_else_are_refused(vendors, attribute, value):
    layer = vendors_layer(vendors, "gptqmodel", nn.Linear(64, 64), 32)
    layer.__dict__[attribute] = value
    with refuses(qft.UnsupportedOperation, "AwqTorchLinear"):
        qft.wrap(nn.Sequential(layer))


# ---- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    calibrated(qwen2(), "awq:group_size=32").save_pretrained(tmp_path)
    return tmp_path


LAYER = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop(f"{LAYER}.qzeros"), f"{LAYER}.qzeros"),
        (lambda t: t.pop(f"{LAYER}.scales"), f"{LAYER}.scales"),
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"), "q_proj.bias"),
        (lambda t: t.update({f"{LAYER}.g_idx": torch.zeros(64)}), f"{LAYER}.g_idx"),
        (lambda t: t.update({f"{LAYER}.bias": torch.ones(64)}), f"{LAYER}.bias"),
        (lambda t: t.update({f"{LAYER}.qweight": torch.zeros(4, 64, dtype=torch.int32)}), f"{LAYER}.qweight"),
        (lambda t: t.update({f"{LAYER.replace('1', '7')}.qweight": t[f"{LAYER}.qweight"].clone()}), "layers.7"),
    ],
)
def test_damaged_checkpoints(saved, edit, says):
    tensors = load_file(saved / "model.safetensors")
    edit(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with refuses(qft.BadFolder, says):
        qft.quantize(saved, "awq:group_size=32", device="cpu", progress=False)


def test_from_a_folder_as_in_memory(tmp_path):
    llama().save_pretrained(tmp_path)
    loaded = calibrated(tmp_path, "awq:group_size=32", device="cpu", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(calibrated(llama(), "awq:group_size=32")))


# ---- a real model -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(2400)  # minutes on one core, more on one that is shared
def test_perplexity_of_a_real_model():
    """SmolLM2 folded off its 4-bit grid, 8 windows of 512 tokens; groups of 64, 4.31 bits a weight.

    Measured: float 14.70, rounded to nearest 25.3, AWQ 16.0.
    """
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import smollm

    try:
        model, tokenizer = smollm.load(None, torch.device("cpu"))
    except qft.MissingDependency as error:
        pytest.skip(str(error))
    held, calibration, _ = smollm.windows(torch.tensor(tokenizer(smollm.text())["input_ids"]))
    smollm.fold(model)
    start = smollm.perplexity(model, held)
    twin, q = copy.deepcopy(model), AWQ(group_size=64)
    qft.quantize(twin, q, calibration=calibration, progress=False)
    found = smollm.perplexity(twin, held)
    with torch.no_grad():
        for name, _, _, handle in list(quantized(twin)):
            q.requantize(handle, model.get_submodule(name).weight)
    nearest = smollm.perplexity(twin, held)
    assert found < 1.12 * start, (found, start)
    assert found < 0.7 * nearest, (found, nearest)

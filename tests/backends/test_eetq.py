"""EETQ: its bytes against a plain reading of EETQ's source, models both ways, layouts that are refused.

The kernels cannot be installed. Their stand-in here quantizes, reorders and multiplies as EETQ's source says
(`symmetric_quantize`, `preprocess_weights_for_mixed_gemm`), one step after the other, and with loops.
"""

import json

import numpy as np
import pytest
import torch
from helpers import refuses
from models import batch, gpt2, llama, logits, relative, train_a_little
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from twins import both_errors, pair, quantized

import qft
from qft.backends.eetq import EETQ
from qft.testing import check_quantizer


def model_of_64s(dtype=torch.float32, **changes):
    """Every linear layer is a multiple of 64 on both sides."""
    return llama(dtype, num_key_value_heads=4, **changes)


class StandIn:
    """`kernels-community/quantization-eetq` in numpy, for one kind of device."""

    def __init__(self, volta=False):
        self.volta = volta

    def quant_weights(self, weight, kind, return_unprocessed):
        assert kind == torch.int8 and not return_unprocessed and weight.dtype in (torch.float32, torch.float16)
        w = weight.float().numpy()
        scale = np.abs(w).max(0) * np.float32(1 / 128)
        steps = w / np.where(scale == 0, 1, scale).astype(np.float32)
        rounded = np.where(np.abs(steps - np.trunc(steps)) >= 0.5, np.trunc(steps) + np.sign(steps), np.trunc(steps))
        codes = np.clip(rounded, -128, 127).astype(np.int8)
        return torch.from_numpy(self.preprocess(codes)), torch.from_numpy(scale).to(weight.dtype)

    def preprocess(self, codes):
        rows, columns = codes.shape
        assert rows % 64 == 0 and columns % 64 == 0
        if not self.volta:  # rows within 16, for the tensor cores
            order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
            codes = np.stack([codes[i // 16 * 16 + order[i % 16]] for i in range(rows)])
        codes = np.ascontiguousarray(codes.T)
        if not self.volta:  # two columns at a time, in tiles of 64 rows
            words, out = codes.view(np.uint32), np.zeros(rows * columns // 4, np.uint32)
            per_row = rows // 4
            for column in range(columns):
                for word in range(per_row):
                    base = word // 16 * 16
                    where = column // 2 * per_row * 2 + 2 * base + 16 * (column % 2) + word % 16
                    out[where] = words[column, word]
            codes = out.view(np.int8)
        codes = (codes.reshape(-1, 4).astype(np.int16) + 128).astype(np.uint8).view(np.int8)
        return codes[:, [0, 2, 1, 3]].reshape(rows, columns)

    def plain(self, stored):
        """Codes (in, out) from stored bytes, by sending positions through `preprocess`."""
        rows, columns = stored.shape
        back = np.empty(rows * columns, np.int64)
        index = np.arange(rows * columns).reshape(rows, columns)
        whole = np.zeros(rows * columns, np.int64)
        for digit in range(3):
            part = ((index >> 7 * digit) & 127).astype(np.int8)
            found = (self.preprocess(part).view(np.uint8).astype(np.int64) - 128) & 255
            whole |= found.reshape(-1) << 7 * digit
        back[whole] = np.arange(rows * columns)
        codes = (stored.numpy().view(np.uint8).astype(np.int16) - 128).astype(np.int8)
        return torch.from_numpy(codes.reshape(-1)[back].reshape(rows, columns))

    def w8_a16_gemm(self, x, weight, scale):
        return x @ (self.plain(weight.detach()) * scale.detach().float()).to(x.dtype)


@pytest.fixture
def kernels(monkeypatch):
    """transformers' EETQ over the stand-in, as if there were a GPU."""
    from transformers.integrations import eetq, hub_kernels
    from transformers.quantizers import quantizer_eetq

    found = StandIn()
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: found)
    monkeypatch.setattr(quantizer_eetq, "is_kernels_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield found
    eetq.__dict__.pop("eetq_kernels_hub", None)


def layer(weight, bias=None, standin=None):
    """transformers' EetqLinear of a float weight."""
    from transformers.integrations.eetq import EetqLinear

    codes, scale = (standin or StandIn()).quant_weights(weight.T.contiguous(), torch.int8, False)
    out = EetqLinear(weight.shape[1], weight.shape[0], bias=bias is not None)
    out.weight, out.weight_scales = (nn.Parameter(t, requires_grad=False) for t in (codes, scale))
    if bias is not None:
        out.bias = nn.Parameter(bias.half())
    return out


def test_kit():
    report = check_quantizer(EETQ())
    assert len(report.passed) == 17 and not report.ruled_out


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64), (128, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_are_those_of_eetqs_source(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    weight[3] = 0
    weight[:, 5] = weight.abs().amax(1) * 2.5 / 128  # halves
    packed = EETQ().pack(weight)
    codes, scale = StandIn().quant_weights(weight.T.contiguous(), torch.int8, False)
    assert torch.equal(packed["qweight"], codes) and torch.equal(packed["scale"], scale.half())
    value = EETQ().unpack(packed, shape=shape, dtype=torch.float32)
    identity = torch.eye(shape[1])
    assert torch.equal(StandIn().w8_a16_gemm(identity, codes, scale.half()).T, value)
    assert relative(value, weight.float()) < 0.01


@pytest.mark.parametrize("size", [1e-9, 3e-6, 1e-4])
def test_rows_of_tiny_weights_stay_close(size):
    """Where float16 has few bits for a scale, or none, no row is cut off or lost more than float16 must."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * size
    value = EETQ().unpack(EETQ().pack(weight), shape=(64, 64), dtype=torch.float32)
    assert float((value - weight).abs().max()) <= max(2.0**-25, float(weight.abs().max()) / 128) * 1.01


def test_weights_beyond_float16_are_refused():
    with refuses(qft.BadOption, "float16"):
        EETQ().pack(torch.full((64, 64), 1e7))


def test_other_shapes_are_refused_by_name():
    model = llama()  # its keys have 32 outputs
    with refuses(qft.BadShape, "k_proj", "multiples of 64", model=model):
        qft.quantize(model, "eetq", progress=False)


# ---- others' models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_layers_of_transformers_are_adopted_without_copies(with_bias):
    weight = torch.randn(128, 64)
    theirs = layer(weight, torch.randn(128) if with_bias else None)
    model = qft.wrap(nn.Sequential(theirs))
    ((_, ours, q, handle),) = quantized(model)
    assert ours.qweight.data_ptr() == theirs.weight.data_ptr()
    expected = StandIn().w8_a16_gemm(torch.eye(64), theirs.weight, theirs.weight_scales).T
    assert torch.equal(q.dequantize(handle, dtype=torch.float32), expected)
    assert (ours.bias is None) == (not with_bias)
    if with_bias:
        assert torch.equal(ours.bias, theirs.bias)


def test_layers_of_eetqs_own_package():
    """By name, so that nothing of it is imported: a class of the same module and name."""
    codes, scale = StandIn().quant_weights(torch.randn(64, 128), torch.int8, False)
    kind = type("W8A16Linear", (nn.Module,), {"__module__": "eetq.modules.qlinear"})
    theirs = kind()
    theirs.register_buffer("qweight", codes)
    theirs.register_buffer("weight_scales", scale.half())
    theirs.bias = None
    ((_, ours, *_),) = quantized(qft.wrap(nn.Sequential(theirs)))
    assert (ours.out_features, ours.in_features) == (128, 64)


def test_another_devices_layout_is_refused():
    model = nn.Sequential(layer(torch.randn(128, 256), standin=StandIn(volta=True)))
    with refuses(qft.UnsupportedOperation, "another layout", "Volta"):
        qft.wrap(model)


def test_a_layer_that_is_not_quantized_yet_is_refused():
    from transformers.integrations.eetq import EetqLinear

    with torch.device("meta"):
        model = nn.Sequential(EetqLinear(64, 64))
    with refuses(qft.UnsupportedOperation, "no int8 codes"):
        qft.wrap(model)


def test_a_folder_of_another_device_is_refused(kernels, tmp_path):
    from transformers import AutoModelForCausalLM, EetqConfig

    kernels.volta = True
    floats, plain = tmp_path / "floats", tmp_path / "eetq"
    model_of_64s().save_pretrained(floats)
    AutoModelForCausalLM.from_pretrained(
        floats, quantization_config=EetqConfig(), dtype=torch.float32, device_map={"": "cpu"}
    ).save_pretrained(plain)
    with refuses(qft.BadFolder, "down_proj", "another layout"):
        qft.quantize(plain, "eetq", device="cpu", progress=False)


@pytest.mark.parametrize("direction", ["theirs", "ours"])
def test_folders_both_ways(direction, kernels, tmp_path):
    """transformers writes and we read, train and merge; we write, and transformers computes the same."""
    from transformers import AutoModelForCausalLM, EetqConfig

    floats, plain = tmp_path / "floats", tmp_path / "eetq"
    model_of_64s().save_pretrained(floats)
    if direction == "theirs":
        theirs = AutoModelForCausalLM.from_pretrained(
            floats, quantization_config=EetqConfig(), dtype=torch.float32, device_map={"": "cpu"}
        )
        expected = logits(theirs)
        theirs.save_pretrained(plain)
        with pytest.warns(qft.QftWarning, match="already"):
            ours = qft.quantize(plain, "eetq", device="cpu", dtype=torch.float32, progress=False)
        assert relative(logits(ours), expected) < 1e-5
    else:
        ours = qft.quantize(model_of_64s(), "eetq", skip=["o_proj"], progress=False)
        expected = logits(ours)
        ours.save_pretrained(plain)
        config = json.loads((plain / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "eetq" and "lm_head" in config["modules_to_not_convert"]
        theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, device_map={"": "cpu"})
        kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in theirs.named_modules()}
        assert kinds["q_proj"] == "EetqLinear" and kinds["o_proj"] == kinds["lm_head"] == "Linear"
        assert relative(logits(theirs), expected) < 1e-5
    wrapped = qft.wrap(ours)
    train_a_little(wrapped)
    tuned = logits(wrapped)
    assert relative(tuned, expected) > 1e-3
    assert relative(logits(qft.merge_to_float(wrapped, dtype=torch.float32)), tuned) < 1e-5


def test_conv1d_models_keep_our_own_format(tmp_path):
    """transformers' EETQ would take a Conv1D's codes for its float weight."""
    model = qft.quantize(gpt2(), "eetq", progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "qft"
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)


@pytest.fixture
def saved(tmp_path):
    qft.quantize(model_of_64s(), "eetq", progress=False).save_pretrained(tmp_path)
    return tmp_path


NAME = "model.layers.1.mlp.up_proj"


def without(key):
    return lambda tensors: tensors.pop(key)


def with_tensor(key, value):
    return lambda tensors: tensors.__setitem__(key, value(tensors.get(key)))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without(f"{NAME}.weight_scales"), f"lacks {NAME}.weight_scales"),
        (with_tensor(f"{NAME}.weight", lambda t: t.T.contiguous()), f"{NAME}.weight"),
        (with_tensor(f"{NAME}.zeros", lambda _: torch.zeros(3)), f"{NAME}.zeros"),
        (with_tensor(f"{NAME}.weight", lambda t: torch.full_like(t, 17)), NAME),
        (with_tensor("model.layers.7.mlp.up_proj.weight", lambda _: torch.zeros(64, 64, dtype=torch.int8)), "layers.7"),
    ],
)
def test_damaged_checkpoints(saved, edit, says):
    tensors = load_file(saved / "model.safetensors")
    edit(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with refuses(qft.BadFolder, says):
        qft.quantize(saved, "eetq", device="cpu", progress=False)


def test_configs():
    from transformers import EetqConfig

    assert qft.get_quantizer(EetqConfig()) == qft.get_quantizer("eetq") == EETQ()
    spec = qft.core.registry.parse_spec(EetqConfig(modules_to_not_convert=["o_proj"]))
    assert spec.skip == ("o_proj",)
    with refuses(qft.BadOption, "int4"):
        EETQ.from_config({"quant_method": "eetq", "weights": "int4"})
    with refuses(qft.BadOption, "group_size"):
        EETQ.from_config({"quant_method": "eetq", "group_size": 128})
    with refuses(qft.BadOption, "no option"):
        qft.get_quantizer("eetq:bits=4")


# ---- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_equal_those_over_a_float_copy(dora):
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_dora=dora)
    assert max(both_errors(*pair(model_of_64s, "eetq", config))) < 1e-5


def test_merge_and_unmerge():
    model = qft.wrap(qft.quantize(model_of_64s(), "eetq", progress=False))
    train_a_little(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = logits(model)
    qft.merge(model)
    assert relative(logits(model), tuned) < 0.02
    qft.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("init", ["loftq", "qera"])
def test_starts_lower_the_error(init):
    """At rank 32, of 64."""
    data = {"calibration": batch(seed=40, shape=(24, 32))} if init == "qera" else {}
    target = logits(model_of_64s())
    config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    model = qft.quantize_and_wrap(model_of_64s(), "eetq", adapter=config, init=init, progress=False, **data)
    with model.disable_adapter():
        without = relative(logits(model), target)
    assert relative(logits(model), target) < 0.9 * without


def test_from_a_folder_as_in_memory(tmp_path):
    model_of_64s().save_pretrained(tmp_path)
    loaded = qft.quantize(tmp_path, "eetq", device="cpu", dtype=torch.float32, progress=False)
    assert torch.equal(logits(loaded), logits(qft.quantize(model_of_64s(), "eetq", progress=False)))

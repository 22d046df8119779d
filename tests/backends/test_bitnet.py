"""BitNet: transformers' own packing and layers, both meanings of its scale, ours in plain transformers."""

import math

import pytest
import torch
from foreign import LORA, edit, edit_config, merges_and_back, plainly, stands, with_tensor, without, written
from helpers import refuses
from models import llama, logits, relative
from torch import nn
from transformers import BitNetQuantConfig
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights
from twins import both_errors, pair, quantized

import qft
from qft.backends.bitnet import BitNet
from qft.testing import check_quantizer

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def _eager():
    """transformers compiles its BitNet functions, which takes a compiler and minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def ternary(weight):
    mean = weight.float().abs().mean()
    return (weight / mean).round().clamp(-1, 1), mean


def made(inverse=True):
    def tensors(weight):
        codes, mean = ternary(weight)
        return {"weight": pack_weights(codes.clone()), "weight_scale": (1 / mean if inverse else mean).view(1)}

    return tensors


@pytest.mark.parametrize("spec", ["bitnet", "bitnet:inverse=false"])
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(spec), max_error=0.6)
    assert len(report.passed) == 17 and not report.ruled_out
    assert qft.capabilities(spec).bits == pytest.approx(math.log2(3))


@pytest.mark.parametrize("inverse", [True, False])
def test_bytes_are_transformers_own(inverse):
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 0.05
    packed, wanted = BitNet(inverse).pack(weight), made(inverse)(weight)
    assert torch.equal(packed["qweight"], wanted["weight"])
    assert torch.equal(packed["scale"], wanted["weight_scale"])
    codes, mean = ternary(weight)
    value = BitNet(inverse).unpack(packed, shape=(64, 48), dtype=torch.float32)
    assert relative(value, codes * mean) < 1e-6
    assert BitNet().nbytes((64, 48)) * 8 == 2 * 64 * 48 + 16


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_checkpoints(kind, tmp_path):
    inverse = kind == "bitlinear"
    config = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"}
    folder = written(tmp_path / "made", llama(), config, made(inverse))

    def expected(_, tensors):
        scale = tensors["weight_scale"]
        parts = [(tensors["weight"] >> 2 * i & 3).float() - 1 for i in range(4)]
        return torch.cat(parts) * (1 / scale if inverse else scale)

    model = stands(folder, f"bitnet:inverse={str(inverse).lower()}", expected, tmp_path)
    ours, plain = logits(model), logits(plainly(tmp_path / "again", dtype=torch.float32))
    assert 1e-4 < relative(plain, ours) < 0.05, "activations of 8 bits: that must be seen, and little else"
    with torch.no_grad():  # the same layer without them, to rounding
        theirs = plainly(tmp_path / "again", dtype=torch.float32).get_submodule(NAME)
        converted = qft.wrap(nn.Sequential(theirs)).get_submodule("base_model.model.0.base_layer")
    assert relative(converted.weight, model.get_submodule(NAME).weight) < 1e-6


def test_layers_in_memory():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    layer, tensors = BitLinear(48, 64, bias=False, dtype=torch.float32), made()(weight)
    layer.weight, layer.weight_scale = tensors["weight"], tensors["weight_scale"]
    ((_, ours, q, handle),) = quantized(qft.wrap(nn.Sequential(layer)))
    assert ours.qweight.data_ptr() == layer.weight.data_ptr()
    codes, mean = ternary(weight)
    assert relative(q.dequantize(handle), codes * mean) < 1e-6
    for other, says in (
        (BitLinear(48, 64, bias=False, dtype=torch.float32, use_rms_norm=True), "use_rms_norm"),
        (AutoBitLinear(48, 64, bias=False, online_quant=True), "online"),
        (AutoBitLinear(48, 64, bias=False), "not -1, 0 or 1"),
    ):
        with refuses(qft.UnsupportedOperation, says):
            qft.wrap(nn.Sequential(other))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(f"{NAME}.weight_scale"), f"lacks {NAME}.weight_scale"),
        (with_tensor(f"{NAME}.weight", lambda t: t.T.contiguous()), f"{NAME}.weight"),
        (with_tensor(f"{NAME}.weight", lambda t: t | 3), "beyond -1, 0 and 1"),
        (with_tensor(f"{NAME}.weight_scale", lambda t: t * 0), "weight_scale"),
        (with_tensor(f"{NAME}.rms_norm", lambda _: torch.ones(64)), f"{NAME}.rms_norm"),
    ],
)
def test_damaged_checkpoints(tmp_path, change, says):
    folder = written(tmp_path / "made", llama(), {"quant_method": "bitnet"}, made())
    edit(folder, change)
    with refuses(qft.BadFolder, says):
        qft.quantize(folder, "bitnet", device="cpu", progress=False)


@pytest.mark.parametrize(
    "option", [{"use_rms_norm": True}, {"quantization_mode": "online"}, {"linear_class": "x"}, {"bits": 2}]
)
def test_options_that_are_not_honoured(option, tmp_path):
    folder = written(tmp_path / "made", llama(), {"quant_method": "bitnet"}, made())
    edit_config(folder, **option)
    with refuses(qft.BadOption, next(iter(option))):
        qft.quantize(folder, "bitnet", device="cpu", progress=False)


def test_configs_and_shapes():
    assert qft.get_quantizer(BitNetQuantConfig()) == BitNet()
    assert qft.get_quantizer(BitNetQuantConfig(linear_class="autobitlinear")) == BitNet(inverse=False)
    model = llama(intermediate_size=66)
    with refuses(qft.BadShape, "gate_proj", "66", model=model):
        qft.quantize(model, "bitnet", progress=False)


def test_gradients_and_merges():
    assert max(both_errors(*pair(llama, "bitnet", LORA))) < 1e-5
    merges_and_back("bitnet", 0.6)

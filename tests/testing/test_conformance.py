"""The conformance kit over every backend, on the CPU and, with `-m gpu`, on CUDA."""

import dataclasses

import pytest
import torch
from torch import nn

import qft
from qft.testing import ConformanceError, check_quantizer

SPECS = [
    "nf4",
    "nf4:double_quant=true",
    "nf4:block_size=256,quant_storage=bfloat16",
    "fp4",
    "fp4:double_quant=true,block_size=32",
    "int8",
    "int8:threshold=0.0",
    "auto-round",
    "bitnet",
    "aqlm:rounds=1,beam=2",
    "awq",
    "awq:group_size=-1,zero_point=false",
    "eetq",
    "fp8",
    "fp8:scaling=row",
    "compressed-tensors",
    "compressed-tensors:bits=3,group_size=32,symmetric=false",
    "inc",
    "mxfp4",
    "gguf",
    "gguf:type=Q5_1",
    "gptq",
    "gptq:bits=3,group_size=32,desc_act=true",
    "hqq",
    "hqq:bits=2,axis=0",
    "hqq:bits=3,group_size=16",
    "hqq:scaling=sinq",
    "quanto",
    "quanto:format=int4",
    "sinq",
    "sinq:bits=3",
    "torchao",
    "torchao:format=int,bits=4",
    "reference",
    "reference:double_quant=true",
    "reference:format=fp4",
    "reference:format=nf4,group_size=100",
    "reference:format=int,group_size=32",
    "reference:format=int,bits=2,group_size=16",
    "reference:format=int,bits=3,group_size=32",
    "reference:format=int,bits=5,group_size=16,symmetric=true",
    "reference:format=int,bits=6,group_size=8",
    "reference:format=int,bits=7,group_size=32,double_quant=true",
    "reference:format=int,bits=8,group_size=32,symmetric=true",
    "reference:format=int,bits=3,group_size=32,scaling=sinq",
]

MAX_ERROR = {"fp8": 0.03}
"""‖W − Ŵ‖ / ‖W‖ of formats whose codes are floats: three bits of mantissa are not eight of an integer."""


def _missing(name):
    info = qft.available_quantizers()[name.partition(":")[0]]
    return f"{name}: {info.hint}" if info.state != "ready" else None


@pytest.mark.parametrize("spec", SPECS)
def test_kit_on_cpu(spec):
    if _missing(spec):
        pytest.skip(_missing(spec))
    report = check_quantizer(qft.get_quantizer(spec), max_error=MAX_ERROR.get(spec.partition(":")[0]))
    assert len(report.passed) + len(report.ruled_out) == 17
    exact = qft.capabilities(spec).exact_forward
    assert report.ruled_out == ([] if exact else ["forward_matches"])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_kit_on_cuda(spec):
    report = check_quantizer(qft.get_quantizer(spec), device="cuda", max_error=MAX_ERROR.get(spec.partition(":")[0]))
    assert len(report.passed) + len(report.ruled_out) == 17


def test_every_registered_quantizer_is_in_the_list():
    assert {s.partition(":")[0] for s in SPECS} == set(qft.available_quantizers())


# ---- the kit finds what it is there to find ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Int8(qft.TensorQuantizer):
    """A right one, to break in one place each."""

    name = "kit-int8"

    @property
    def capabilities(self):
        return qft.Capabilities(bits=8, devices=frozenset({"cpu"}), requantize=True)

    def pack(self, weight, *, statistics=None):
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return {"qweight": (weight.float() / scale).round().to(torch.int8), "scale": scale}

    def unpack(self, packed, *, shape, dtype, out=None):
        value = packed["qweight"].float() * packed["scale"]
        return value.to(dtype) if out is None else out.copy_(value)


def test_kit_passes_a_right_quantizer():
    check_quantizer(Int8())


def _broken(**methods):
    return dataclasses.dataclass(frozen=True)(type("Broken", (Int8,), methods))()


def test_kit_finds_a_wrong_unpack():
    def unpack(self, packed, *, shape, dtype, out=None):
        return (packed["qweight"].float() * packed["scale"] * 1.02).to(dtype)

    with pytest.raises(ConformanceError, match="dequantize_is_close"):
        check_quantizer(_broken(unpack=unpack), max_error=0.01)


def test_kit_finds_an_ignored_out():
    def unpack(self, packed, *, shape, dtype, out=None):
        return (packed["qweight"].float() * packed["scale"]).to(dtype)

    with pytest.raises(ConformanceError, match="out= was not filled"):
        check_quantizer(_broken(unpack=unpack))


def test_kit_finds_a_flag_that_promises_too_little():
    capabilities = property(lambda self: qft.Capabilities(bits=8, devices=frozenset({"cpu"}), requantize=False))
    with pytest.raises(ConformanceError, match="requantize works, and its capability says that it does not"):
        check_quantizer(_broken(capabilities=capabilities))


def test_kit_finds_a_flag_that_promises_too_much():
    def requantize(self, weight, value):
        raise qft.errors.UnsupportedOperation("no")

    with pytest.raises(ConformanceError, match="requantize_is_honest"):
        check_quantizer(_broken(requantize=requantize))


def test_kit_finds_a_restore_that_is_not_exact():
    def snapshot(self, weight):
        return {n: t.half().to(t.dtype) for n, t in weight.module.packed.items()}

    with pytest.raises(ConformanceError, match="restore_is_bit_exact"):
        check_quantizer(_broken(snapshot=snapshot))


def _broken_shift(**methods):
    reference = qft.get_quantizer("reference:format=int,group_size=8,bits=8")
    return dataclasses.dataclass(frozen=True)(type("Broken", (type(reference),), methods))(**vars(reference))


def _shift(dtype=None, factor=1.0):
    """A zero point that takes the shift in, kept in `dtype` instead of float32, and off by a factor."""

    def shift(self, weight, delta):
        module = weight.module
        zero = module.zero_point.float() - factor * delta / module.scale.float()
        module.zero_point.data = zero.to(dtype or module.zero_point.dtype)

    return shift


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ({"shift": _shift()}, "a shift of whole groups is"),
        ({"shift": _shift(torch.bfloat16)}, "a shift of whole groups is"),
        ({"shift": _shift(torch.float32, 1.001)}, "a shift of whole groups is"),
        ({"shift": qft.TensorQuantizer.shift}, "cannot shift"),
        ({"group_size_of": lambda self, weight: 5}, "groups of 5 in a row"),
        ({"load_state": qft.Quantizer.load_state}, "load_state does not bring a shifted weight back"),
    ],
)
def test_kit_finds_a_shift_that_is_not_exact(methods, says):
    check_quantizer(_broken_shift(shift=_shift(torch.float32)))
    with pytest.raises(ConformanceError, match=f"shift_is_honest.*{says}"):
        check_quantizer(_broken_shift(**methods))


def test_kit_finds_a_shift_that_is_not_promised():
    with pytest.raises(ConformanceError, match="shift works, and group_size_of"):
        check_quantizer(_broken(shift=lambda self, weight, delta: None))
    with pytest.raises(ConformanceError, match="float_zero_points is not claimed"):
        check_quantizer(_broken(group_size_of=lambda self, weight: 8))


def test_kit_finds_wrong_bytes():
    with pytest.raises(ConformanceError, match="nbytes"):
        check_quantizer(_broken(nbytes=lambda self, shape: 1))


def test_kit_finds_an_inexact_forward():
    class Layer(qft.PackedLinear):
        def forward(self, x):
            return super().forward(x.to(torch.float8_e4m3fn).to(x.dtype) * 1.01)

    def quantize_layer(self, module, *, statistics=None):
        new = Int8.quantize_layer(self, module)
        new.__class__ = Layer
        return new

    with pytest.raises(ConformanceError, match="exact_forward is claimed"):
        check_quantizer(_broken(quantize_layer=quantize_layer))


def test_kit_runs_on_a_layer_without_bias_and_with_odd_rows():
    layer = nn.Linear(96, 33, bias=False)
    for spec in ("nf4", "int8", "reference"):
        q = qft.get_quantizer(spec)
        if _missing(spec):
            continue
        w_hat = q.dequantize(q.weights(q.quantize_layer(layer))[0], dtype=torch.float32)
        assert float((w_hat - layer.weight).detach().norm() / layer.weight.detach().norm()) < 0.11

"""Kernels against the torch code on a CPU, bit for bit: on CUDA, and in triton's interpreter, which a process of its own has.

`pytest -m gpu tests/test_kernels.py` runs everything on a device. Without one, `test_in_the_interpreter` starts this file
again with TRITON_INTERPRET=1, which triton reads when it is imported, and the tests that are marked gpu here run on
CPU tensors there.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import run_python
from on_device import DEVICE, FLOATS, INTERPRETED, on_device, recorded
from torch import nn

import qft
from qft.backends import torchao_layer
from qft.backends.algorithms.feedback import with_feedback
from qft.backends.aqlm import AQLM
from qft.backends.awq import AWQ
from qft.backends.bnb import BitsAndBytes4bit, BitsAndBytes8bit
from qft.backends.compressed_tensors import CompressedTensors
from qft.backends.eetq import EETQ
from qft.backends.fp8 import FP8
from qft.backends.gptq import GPTQ
from qft.backends.hqq import HQQ
from qft.backends.quanto import Quanto
from qft.backends.reference import Reference
from qft.backends.torchao import TorchAO
from qft.ops import kernels
from qft.ops.kernels import dequantize, rounding
from qft.ops.kernels import launch as launching


@pytest.fixture
def launched(monkeypatch):
    """The programs that ran, in order."""
    return recorded(monkeypatch, dequantize)


def twin(quantizer, packed, **kwargs):
    """What the torch code makes of it on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "enabled", False)
        return quantizer.unpack({n: t.cpu() for n, t in packed.items()}, **kwargs)


def buffers(shape, dtype):
    """Buffers for a result: none, and three layouts, each of NaN."""
    rows, columns = shape
    nan = torch.full((2 * rows + 3, 2 * columns + 3), torch.nan, dtype=dtype, device=DEVICE)
    contiguous = nan.new_full(shape, torch.nan)
    return (
        None,
        contiguous,
        contiguous.T.clone(memory_format=torch.contiguous_format).T,
        nan[1 : rows + 1, 2::2][:, :columns],
    )


def agree(quantizer, packed, shape, launched, program, dtypes=FLOATS):
    """The kernel ran, and its numbers are the twin's, in every dtype and layout of the result."""
    packed = {n: t.to(DEVICE) for n, t in packed.items()}
    for dtype in dtypes:
        wanted = twin(quantizer, packed, shape=shape, dtype=dtype)
        everything = dtype == torch.bfloat16 and wanted.numel() < 1e6
        for out in buffers(shape, dtype) if everything else (None,):
            launched.clear()
            found = quantizer.unpack(packed, shape=shape, dtype=dtype, out=out)
            assert launched == ([] if program is None else [program])
            assert found.shape == torch.Size(shape) and found.dtype == dtype
            assert out is None or found is out
            assert torch.equal(found.cpu(), wanted), (quantizer, shape, dtype, out is not None and out.stride())


def words(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=g).to(torch.int32)


def weight(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).mul(torch.rand(shape[0], 1, generator=g)).to(dtype)


# ---- words of int32: any bits at all, so that zero points wrap and carry over ------------------------------


@on_device
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "act_order"])
@pytest.mark.parametrize(
    ("bits", "size", "shape"),
    [
        (4, 32, (70, 96)),
        (4, 16, (1, 48)),
        (4, 128, (65, 256)),
        (4, -1, (24, 100)),
        (2, 16, (33, 80)),
        (2, -1, (5, 150)),
        (8, 32, (67, 64)),
        (8, -1, (3, 13)),
        (3, 32, (96, 160)),
        (3, 16, (32, 64)),
        (3, -1, (64, 288)),
    ],
)
def test_gptq(bits, size, shape, ordered, version, launched):
    quantizer = GPTQ(bits=bits, group_size=size, desc_act=ordered, checkpoint_format=version)
    packed = {
        name: words(*sizes, seed=i) if kind == torch.int32 else weight(sizes).half()
        for i, (name, (sizes, kind)) in enumerate(quantizer.template(shape, torch.float16).items())
    }
    groups = packed["scales"].shape[0]
    packed["g_idx"] = torch.arange(shape[1], dtype=torch.int32) // (shape[1] // groups)
    if ordered:
        packed["g_idx"] = packed["g_idx"][torch.randperm(shape[1], generator=torch.Generator().manual_seed(5))]
    agree(quantizer, packed, shape, launched, "gptq", FLOATS if bits == 4 else FLOATS[2:])


@on_device
def test_gptq_with_bfloat16_scales(launched):
    quantizer, shape = GPTQ(bits=8, group_size=32), (40, 64)
    packed = quantizer.pack(weight(shape))
    agree(quantizer, {**packed, "scales": packed["scales"].bfloat16()}, shape, launched, "gptq")


@on_device
@pytest.mark.parametrize(("size", "shape"), [(32, (136, 96)), (16, (8, 48)), (128, (24, 256)), (-1, (40, 100))])
def test_awq(size, shape, launched):
    quantizer = AWQ(group_size=size)
    packed = {
        name: words(*sizes, seed=i) if kind == torch.int32 else weight(sizes).half()
        for i, (name, (sizes, kind)) in enumerate(quantizer.template(shape, torch.float16).items())
    }
    agree(quantizer, packed, shape, launched, "awq")


# ---- parts of the matrix of groups -------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("bits", "size", "axis", "shape"),
    [
        (4, 64, 1, (33, 192)),
        (4, 40, 1, (7, 80)),
        (4, 8, 0, (4, 32)),
        (3, 64, 1, (7, 192)),
        (3, 24, 0, (24, 40)),
        (2, 32, 1, (1, 160)),
        (2, 64, 0, (16, 96)),
        (1, 16, 1, (9, 48)),
        (8, 64, 1, (10, 128)),
    ],
)
def test_hqq(bits, size, axis, shape, dtype, launched):
    quantizer = HQQ(bits=bits, group_size=size, axis=axis)
    packed = quantizer.pack(weight(shape, dtype))
    agree(quantizer, packed, shape, launched, "parts", (dtype,))
    if axis == 1:  # as after a shift
        packed["zero_point"] = packed["zero_point"].float() - 0.3712
        agree(quantizer, packed, shape, launched, "parts", (torch.bfloat16,))


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("format", "size", "shape"),
    [("int4", None, (33, 256)), ("int4", 8, (3, 24)), ("int2", None, (5, 40)), ("int2", 32, (1, 96))],
)
def test_quanto_parts(format, size, shape, dtype, launched):
    quantizer = Quanto(format=format, group_size=size)
    agree(quantizer, quantizer.pack(weight(shape, dtype)), shape, launched, "parts")


# ---- the flattened weight ----------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", ["int8", "float8", "float8_e5m2"])
@pytest.mark.parametrize("shape", [(33, 200), (1, 8)])
def test_quanto_rows(format, shape, dtype, launched):
    quantizer = Quanto(format=format)
    agree(quantizer, quantizer.pack(weight(shape, dtype)), shape, launched, "stream")


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("options", "program"),
    [
        ({}, "stream"),
        ({"group_size": 40}, "stream"),
        ({"format": "float8"}, "stream"),
        ({"format": "float8_e5m2"}, "stream"),
        ({"format": "int", "bits": 4, "group_size": 40}, "stream"),
        ({"format": "int", "bits": 4, "group_size": 40, "symmetric": False}, None),
    ],
    ids=repr,
)
def test_torchao(options, program, dtype, launched):
    pytest.importorskip("torchao")
    linear = nn.Linear(200, 32, bias=False, dtype=dtype)
    linear.weight.data = weight((32, 200), dtype)
    layer = TorchAO(**options).quantize_layer(linear)
    wanted = {d: torchao_layer._by_torchao(layer.weight, d) for d in FLOATS}
    layer.to(DEVICE)
    for to, value in wanted.items():
        for out in buffers((32, 200), to):
            launched.clear()
            found = torchao_layer.floats(layer.weight, to, out)
            assert launched == ([program] if program else []) and (out is None or found is out)
            assert torch.equal(found.cpu(), value)


@on_device
@pytest.mark.parametrize("format", ["float", "ue8m0"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 40), (128, 200), (1, 8)])
def test_fp8_blocks(format, rows, columns, launched):
    quantizer = FP8(block_rows=rows, block_columns=columns, scale_format=format)
    agree(quantizer, quantizer.pack(weight((33, 200))), (33, 200), launched, "stream")


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 32},
        {"group_size": 16, "symmetric": False},
        {"bits": 3, "group_size": 32, "symmetric": False},
        {"bits": 8, "strategy": "channel"},
        {"strategy": "tensor"},
        {"bits": 8, "format": "int-quantized", "strategy": "tensor"},
        {"bits": 8, "format": "float-quantized", "type": "float", "strategy": "channel"},
    ],
    ids=repr,
)
def test_compressed_tensors(options, dtype, launched):
    quantizer = CompressedTensors(**options)
    agree(quantizer, quantizer.pack(weight((33, 96), dtype)), (33, 96), launched, "stream")


@on_device
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_fp8_rows_and_whole(scaling, launched):
    quantizer = FP8(scaling=scaling)
    agree(quantizer, quantizer.pack(weight((33, 200))), (33, 200), launched, "stream")


@on_device
@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_float8(format):
    codes = torch.arange(256).to(torch.uint8).view(format).view(4, 64)
    scale = torch.ones(4, 1)
    found = kernels.rows(codes.to(DEVICE), scale.to(DEVICE), dtype=torch.float32)
    assert torch.equal(found.cpu().nan_to_num(7.5, 8.5, 9.5), codes.float().nan_to_num(7.5, 8.5, 9.5))


@on_device
@pytest.mark.parametrize("shape", [(64, 64), (192, 320)])
def test_eetq(shape, launched):
    codes = words(shape[1], shape[0] // 4).view(torch.int8)
    packed = {"qweight": codes, "scale": weight((shape[0], 1)).half().view(-1)}
    agree(EETQ(), packed, shape, launched, "eetq")


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("count", "bits", "wide", "shape"),
    [(2, 8, 8, (33, 200)), (1, 12, 8, (5, 48)), (1, 16, 16, (3, 2064)), (3, 5, 4, (70, 12)), (1, 1, 32, (1, 32))],
    ids=str,
)
def test_additive(count, bits, wide, shape, dtype, launched):
    quantizer = AQLM(num_codebooks=count, nbits_per_codebook=bits, in_group_size=wide)
    packed, generator = {}, torch.Generator().manual_seed(0)
    for name, (sizes, kind) in quantizer.template(shape, dtype).items():
        if kind.is_floating_point:
            packed[name] = torch.randn(sizes, generator=generator).to(kind)
        else:
            packed[name] = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), sizes, generator=generator).to(kind)
    agree(quantizer, packed, shape, launched, "additive")


@on_device
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("size", "shape", "options"),
    [
        (16, (5, 48), {}),
        (8, (3, 24), {"symmetric": True}),
        (24, (97, 72), {"double_quant": True}),
        (16, (2, 16), {"symmetric": True, "double_quant": True}),
    ],
    ids=str,
)
def test_reference_integers(bits, size, shape, options, launched):
    quantizer = Reference(format="int", bits=bits, group_size=size, **options)
    for dtype in FLOATS:
        agree(quantizer, quantizer.pack(weight(shape, dtype)), shape, launched, "stream", (dtype,))
    if not options:
        packed = quantizer.pack(weight(shape, torch.bfloat16))
        packed["zero_point"] = packed["zero_point"].float() - 0.3712
        agree(quantizer, packed, shape, launched, "stream", (torch.bfloat16,))


@on_device
@pytest.mark.parametrize("double", [False, True], ids=["float", "double"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("size", "shape"), [(64, (33, 77)), (8, (65, 33)), (40, (8, 80)), (4096, (3, 5)), (64, (1, 1))]
)
def test_reference_codebooks(format, size, shape, double, launched):
    quantizer = Reference(format=format, group_size=size, double_quant=double)
    agree(quantizer, quantizer.pack(weight(shape)), shape, launched, "stream")


@on_device
@pytest.mark.parametrize(
    "quantizer",
    [
        BitsAndBytes4bit(),
        BitsAndBytes4bit(double_quant=True),
        BitsAndBytes4bit(quant_type="fp4", block_size=32, double_quant=True),
        BitsAndBytes4bit(double_quant=True, quant_storage=torch.bfloat16),
        BitsAndBytes8bit(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(24, 320), (40, 72)])
def test_bitsandbytes(quantizer, shape, launched, monkeypatch):
    """Against bitsandbytes' own code on the same device."""
    linear = nn.Linear(shape[1], shape[0], device=DEVICE)
    linear.weight.data = weight(shape).to(DEVICE)
    layer = quantizer.quantize_layer(linear)
    (held,) = quantizer.weights(layer)
    for dtype in FLOATS:
        monkeypatch.setattr(launching, "enabled", False)
        launched.clear()
        wanted = quantizer.dequantize(held, dtype=dtype)
        assert launched == []
        monkeypatch.setattr(launching, "enabled", True)
        for out in buffers(shape, dtype) if dtype == torch.bfloat16 else (None,):
            launched.clear()
            found = quantizer.dequantize(held, dtype=dtype, out=out)
            assert launched == ["stream"] and found.dtype == dtype
            # in float32, a step of it: CUDA divides by multiplying with the inverse, and bitsandbytes has FP4 in decimals
            bound = {torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype] if DEVICE == "cuda" else 0
            exact = quantizer in (BitsAndBytes4bit(),)
            torch.testing.assert_close(found, wanted, rtol=0 if exact else bound, atol=0)


# ---- what has no kernel ------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize(
    ("quantizer", "shape"),
    [
        (Reference(group_size=5), (7, 9)),
        (Reference(format="int", group_size=12), (3, 24)),
        (HQQ(group_size=12), (4, 24)),
        (HQQ(group_size=4, axis=0), (4, 7)),
        (Quanto(format="int8"), (5, 13)),
        (Quanto(format="int4"), (5, 13)),
    ],
    ids=repr,
)
def test_torch_does_what_kernels_do_not(quantizer, shape, launched):
    agree(quantizer, quantizer.pack(weight(shape)), shape, launched, None)


@on_device
def test_other_dtypes_and_layouts_go_to_torch(launched):
    quantizer, shape = HQQ(group_size=64), (8, 128)
    packed = {n: t.to(DEVICE) for n, t in quantizer.pack(weight(shape)).items()}
    wanted = twin(quantizer, packed, shape=shape, dtype=torch.float64)
    assert torch.equal(quantizer.unpack(packed, shape=shape, dtype=torch.float64).cpu(), wanted)
    apart = {n: torch.stack([t, t], -1)[..., 0] for n, t in packed.items()}
    wanted = twin(quantizer, packed, shape=shape, dtype=torch.bfloat16)
    assert torch.equal(quantizer.unpack(apart, shape=shape, dtype=torch.bfloat16).cpu(), wanted)
    assert launched == []


@on_device
def test_codes_that_start_at_an_odd_byte(launched):
    quantizer, shape = Reference(), (8, 128)
    packed = {n: t.to(DEVICE) for n, t in quantizer.pack(weight(shape)).items()}
    packed["qweight"] = torch.cat([packed["qweight"].new_zeros(1), packed["qweight"]])[1:]
    agree(quantizer, packed, shape, launched, "stream")


@on_device
def test_the_switch(monkeypatch):
    tensor = torch.zeros(8, device=DEVICE)
    assert kernels.usable(tensor) and kernels.usable(nn.Parameter(tensor))
    assert not kernels.usable(tensor.to("meta"))
    monkeypatch.setattr(launching, "enabled", False)
    assert not kernels.usable(tensor)


def test_a_device_that_triton_cannot_compile_for(monkeypatch):
    monkeypatch.setattr(launching, "_broken", set())
    monkeypatch.setattr(launching, "_interpreted", lambda: False)
    monkeypatch.setattr(kernels, "programs", SimpleNamespace(), raising=False)
    with pytest.warns(qft.QftWarning, match="weights are dequantized by torch code") as warned:
        assert not launching.launch("stream", (1,), torch.zeros(8), config={})
    assert len(warned) == 1 and launching._broken == {-1}


@pytest.mark.gpu
def test_one_warning_and_right_numbers_where_triton_fails(monkeypatch):
    monkeypatch.setattr(launching, "_broken", set())
    monkeypatch.setattr(kernels, "programs", SimpleNamespace(), raising=False)
    quantizer, shape = Reference(double_quant=True), (40, 72)
    packed = {n: t.cuda() for n, t in quantizer.pack(weight(shape)).items()}
    with pytest.warns(qft.QftWarning, match="torch code") as warned:
        for _ in range(3):
            found = quantizer.unpack(packed, shape=shape, dtype=torch.float16)
            assert torch.equal(found.cpu(), twin(quantizer, packed, shape=shape, dtype=torch.float16))
    assert len(warned) == 1 and not kernels.usable(packed["qweight"])


if not INTERPRETED:

    def test_the_switch_is_in_the_environment(monkeypatch):
        for value, found in (("0", "False"), ("1", "True")):
            monkeypatch.setenv("QFT_KERNELS", value)
            code = "from qft.ops.kernels import launch; print(launch.enabled)"
            assert run_python(code).split() == [found]

    def test_importing_qft_leaves_triton_alone():
        assert run_python("import qft, sys; print('qft.ops.kernels.programs' in sys.modules)").split() == ["False"]

    def test_on_a_cpu_torch_runs():
        assert not kernels.usable(torch.zeros(8))

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton (Linux)")
    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", __file__]
        env = {**os.environ, "TRITON_INTERPRET": "1", "QFT_KERNELS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert " skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


@on_device
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, -1], ids=str)
@pytest.mark.parametrize("order", ["given", "groups", "columns"])
def test_rounding_with_feedback(order, size, monkeypatch):
    """The same codes as torch code rounds to, over widths that fill no tile and groups beyond one block of columns."""
    rows, width = 37, 144 if size == -1 else 256
    size = width if size == -1 else size
    generator = torch.Generator().manual_seed(size)
    value = torch.randn(rows, width, generator=generator).to(DEVICE)
    x = torch.randn(2 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    moment = (x.T @ x / len(x)).to(DEVICE)

    def grid(columns, activity):
        scale = (columns.amax(0) - columns.amin(0)).clamp(min=1e-3) / 15
        return scale, (-columns.amin(0) / scale).round().clamp(0, 15)

    def run():
        return with_feedback(value, moment, grid, bits=4, group_size=size, order=order, damp=0.05)

    calls = []
    monkeypatch.setattr(rounding, "launch", lambda *a, **k: calls.append(a[0]) or launching.launch(*a, **k))
    codes, scale, zero, owner = run()
    assert len(calls) == -(-width // min(size, 128))
    monkeypatch.setattr(launching, "enabled", False)
    twins, twin_scale, twin_zero, twin_owner = run()
    # a rounding tie that falls the other way is carried on by the columns behind it
    assert (codes != twins).float().mean() < 0.02
    assert torch.equal(owner, twin_owner)

    def broken(codes, scale, zero):
        wrong = value - ((codes - zero[owner.long()]) * scale[owner.long()]).T
        return float(((wrong @ moment) * wrong).sum())

    assert broken(codes, scale, zero) == pytest.approx(broken(twins, twin_scale, twin_zero), rel=1e-2)


# ---- what only a device has room and time for --------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("quantizer", "program"),
    [
        (GPTQ(bits=4, group_size=128), "gptq"),
        (GPTQ(bits=4, group_size=128, desc_act=True), "gptq"),
        (GPTQ(bits=3, group_size=128, symmetric=False), "gptq"),
        (GPTQ(bits=2, group_size=64, checkpoint_format="gptq_v2"), "gptq"),
        (GPTQ(bits=8, group_size=128), "gptq"),
        (AWQ(group_size=128), "awq"),
        (HQQ(bits=4, group_size=64), "parts"),
        (HQQ(bits=3, group_size=64), "parts"),
        (HQQ(bits=2, group_size=64, axis=0), "parts"),
        (Quanto(format="int4"), "parts"),
        (Quanto(format="int8"), "stream"),
        (Quanto(format="float8"), "stream"),
        (FP8(), "stream"),
        (EETQ(), "eetq"),
        (Reference(), "stream"),
        (Reference(format="fp4", double_quant=True), "stream"),
        (Reference(format="int", bits=3, group_size=64), "stream"),
        (Reference(format="int", bits=4, group_size=64, double_quant=True), "stream"),
    ],
    ids=repr,
)
def test_a_large_weight(quantizer, program, launched):
    shape = (4096, 14336)
    packed = quantizer.pack(weight(shape, torch.bfloat16).cuda())
    if getattr(quantizer, "desc_act", False):
        packed["g_idx"] = packed["g_idx"][torch.randperm(shape[1], device="cuda")]
    agree(quantizer, packed, shape, launched, program, (torch.bfloat16,))


@pytest.mark.gpu
def test_offsets_beyond_int32(launched):
    """2**31 weights and more: the last rows, against the twin of these rows alone."""
    columns, rows, tail = 32768, 65536 + 8, 16
    codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * columns // 64, device="cuda")
    quantizer = Reference()
    found = quantizer.unpack({"qweight": codes, "absmax": absmax}, shape=(rows, columns), dtype=torch.float16)
    last = {"qweight": codes[-tail * columns // 2 :], "absmax": absmax[-tail * columns // 64 :]}
    assert torch.equal(found[-tail:].cpu(), twin(quantizer, last, shape=(tail, columns), dtype=torch.float16))
    del found, codes, absmax

    quantizer = GPTQ(bits=4, group_size=128)
    packed = {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), dtype=torch.int32, device="cuda"),
        "qzeros": torch.randint(-(2**31), 2**31 - 1, (columns // 128, rows // 8), dtype=torch.int32, device="cuda"),
        "scales": torch.rand(columns // 128, rows, device="cuda").half(),
        "g_idx": torch.arange(columns, dtype=torch.int32, device="cuda") // 128,
    }
    last = {
        "qweight": packed["qweight"][:, -tail:],
        "qzeros": packed["qzeros"][:, -tail // 8 :],
        "scales": packed["scales"][:, -tail:],
        "g_idx": packed["g_idx"],
    }
    for ordered in (False, True):
        quantizer = replace(quantizer, desc_act=ordered)
        found = quantizer.unpack(packed, shape=(rows, columns), dtype=torch.float16)
        assert torch.equal(found[-tail:].cpu(), twin(quantizer, last, shape=(tail, columns), dtype=torch.float16))
        del found
    assert launched == ["stream", "gptq", "gptq"]


@pytest.mark.gpu
def test_nothing_waits_for_the_device(launched):
    quantizer, shape = Reference(double_quant=True), (64, 128)
    packed = {n: t.cuda() for n, t in quantizer.pack(weight(shape)).items()}
    quantizer.unpack(packed, shape=shape, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantizer.unpack(packed, shape=shape, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launched == ["stream", "stream"]


def loss_in_float64(logits, targets, scale, cap):
    """Losses (tokens,) and the gradient of their sum."""
    x = logits.detach().double().cpu().requires_grad_()
    z = x * scale if cap is None else cap * torch.tanh(x * scale / cap)
    losses = torch.nn.functional.cross_entropy(z, targets.cpu(), reduction="none")
    losses.sum().backward()
    return losses.detach(), x.grad


@on_device
@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 30.0)])
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 5003], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_next_token(dtype, vocabulary, scale, cap):
    """Over vocabularies that fill no block, one, and two; rows of large and of equal logits, and of one that is -inf."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(9, vocabulary, generator=generator)).to(dtype)
    logits[1], logits[2] = 40 * logits[1], 2.0
    if vocabulary > 1 and cap is None:
        logits[3, 0] = -torch.inf
    targets = torch.randint(0, vocabulary, (9,), generator=generator).clamp_(min=min(1, vocabulary - 1))
    targets[0] = vocabulary - 1
    losses, grad = loss_in_float64(logits, targets, scale, cap)
    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    for gradient in (False, True):
        mine, found = logits.clone(), torch.empty(9, device=DEVICE)
        assert kernels.next_token(mine, targets, found, scale, cap, gradient)
        assert torch.allclose(found.cpu().double(), losses, rtol=2e-6, atol=2e-5)
        if not gradient:
            assert torch.equal(mine, logits)
        else:
            rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            assert (mine.cpu().double() - grad).norm() <= rounding * grad.norm()


@on_device
@pytest.mark.parametrize("target", [-1, -100, 40, 2**40])
def test_a_target_outside_the_vocabulary_is_no_number(target):
    logits, found = torch.randn(3, 40, device=DEVICE), torch.empty(3, device=DEVICE)
    assert kernels.next_token(logits, torch.tensor([5, target, 39], device=DEVICE), found, 1.0, None, True)
    assert found.isnan().tolist() == [False, True, False]
    assert logits.isnan().tolist() == [[nan] * 40 for nan in (False, True, False)]


@on_device
def test_logits_that_next_token_has_no_kernel_for():
    logits, found, targets = torch.randn(3, 40, device=DEVICE), torch.empty(3, device=DEVICE), torch.zeros(3, dtype=int)
    targets = targets.to(DEVICE)
    assert not kernels.next_token(logits.double(), targets, found, 1.0, None, True)
    assert not kernels.next_token(logits, targets.int(), found, 1.0, None, True)
    assert not kernels.next_token(logits.T.contiguous().T, targets, found, 1.0, None, True)
    assert not kernels.next_token(logits[:0], targets[:0], found[:0], 1.0, None, True)

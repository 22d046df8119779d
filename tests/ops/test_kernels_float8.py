"""Float8 matrices by kernels against the torch code beside them, bit for bit; see test_kernels.py for where they run."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from on_device import DEVICE, FLOATS, INTERPRETED, on_device, recorded

from qft.backends.bnb import BitsAndBytes4bit
from qft.backends.reference import Reference
from qft.ops import kernels
from qft.ops.kernels import float8
from qft.ops.kernels import launch as launching


@pytest.fixture
def launched(monkeypatch):
    """The programs that ran, in order."""
    return recorded(monkeypatch, float8)


def twin(function, *args):
    """What the torch code makes of it on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "enabled", False)
        return function(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))


def same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        ours, theirs = ours.cpu(), theirs.cpu()
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        if ours.dtype == float8.FLOAT8:
            assert torch.equal(ours.float().isnan(), theirs.float().isnan())
            codes = [torch.where(t.float().isnan(), 127, t.view(torch.uint8)) for t in (ours, theirs)]
            assert torch.equal(*codes)
        else:
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(7.5), theirs.nan_to_num(7.5))


def matrix(rows, columns, dtype=torch.bfloat16):
    """Rows of all kinds: zeros, NaN, infinity, tiny, huge, of many magnitudes."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    for row, (factor, put) in enumerate(
        [(0, 0.0), (1, torch.nan), (1, torch.inf), (1e-36, 0.0), (1e-30, 0.0), (3e4, 1)]
    ):
        if row + 1 < rows:
            x[row + 1] *= factor
            x[row + 1, columns // 2] = put
    if rows > 9:
        x[8] *= torch.logspace(-10, 0, columns)
        x[9] *= 1e37 if dtype != torch.float16 else 1
    return x.to(dtype)


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(37, 200), (1, 16), (3, 1), (9, 1040)], ids=str)
def test_rows_and_transposed(shape, dtype, launched):
    x = matrix(*shape, dtype)
    same(kernels.float8_rows(x.to(DEVICE)), twin(kernels.float8_rows, x))
    same(kernels.float8_transposed(x.to(DEVICE)), twin(kernels.float8_transposed, x))
    factor = torch.rand(shape[1], generator=torch.Generator().manual_seed(0)) * 1e-3
    same(kernels.float8_rows(x.to(DEVICE), factor.to(DEVICE)), twin(kernels.float8_rows, x, factor))
    apart = torch.stack([x, x], -1)[..., 0].to(DEVICE)
    same(kernels.float8_rows(apart), twin(kernels.float8_rows, x))
    assert launched == ["float8_rows", "float8_rows", "float8_transposed", "float8_rows", "float8_rows"]


@on_device
def test_rows_beyond_one_block(launched, monkeypatch):
    x = matrix(11, 200)
    wanted = twin(kernels.float8_rows, x)
    monkeypatch.setattr(float8, "_BLOCK", 128)
    same(kernels.float8_rows(x.to(DEVICE)), wanted)
    same(kernels.float8_transposed(x.to(DEVICE)), twin(kernels.float8_transposed, x))
    assert launched == ["float8_rows", "float8_rows", "float8_transposed"]


@on_device
def test_every_number_between_codes():
    """Ties and their neighbours, from the smallest subnormal on: scaled by exactly one."""
    codes = torch.arange(127).to(torch.uint8).view(float8.FLOAT8).float()
    middle = (codes[1:] + codes[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.tensor(to)) for to in (1e9, -1e9))
    x = torch.cat([codes, middle, up, down, -codes, -middle, -up, -down])[None]
    found, scale = kernels.float8_rows(x.to(DEVICE))
    assert scale.item() == 1.0
    same([found], [x.to(float8.FLOAT8)])


def book_of(quantizer, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.02)
    weight[0] = 0
    layer = quantizer.quantize_layer(with_weight(weight.bfloat16().to(DEVICE)))
    (handle,) = quantizer.weights(layer)
    return quantizer.codebook(handle), quantizer.dequantize(handle, dtype=torch.bfloat16)


def with_weight(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data = weight
    return linear


CODEBOOKS = [
    Reference(),
    Reference(double_quant=True),
    Reference(format="fp4", group_size=40),
    BitsAndBytes4bit(),
    BitsAndBytes4bit(quant_type="fp4", double_quant=True),
    BitsAndBytes4bit(double_quant=True, quant_storage=torch.bfloat16),
]


@on_device
@pytest.mark.parametrize("quantizer", CODEBOOKS, ids=repr)
@pytest.mark.parametrize("shape", [(48, 80), (144, 208), (16, 16), (3, 8)], ids=str)
def test_codebooks(quantizer, shape, launched):
    book, weight = book_of(quantizer, shape)
    found, turned = kernels.float8_codebook(book), kernels.float8_codebook(book, transposed=True)
    assert launched == ["float8_codebook_rows", "float8_codebook_rows", "float8_codebook_transposed"]
    same(found, twin(kernels.float8_rows, weight))
    same(turned, twin(kernels.float8_transposed, weight))


@on_device
def test_what_has_no_kernel(launched, monkeypatch):
    for quantizer, shape in ((Reference(group_size=5), (4, 40)), (Reference(), (4, 12))):
        book, _ = book_of(quantizer, shape)
        assert kernels.float8_codebook(book) is None
    book, _ = book_of(Reference(), (16, 32))
    odd = torch.cat([book.qweight.new_zeros(1), book.qweight])[1:]
    assert kernels.float8_codebook(book._replace(qweight=odd)) is None
    assert Reference(format="int").codebook(None) is None
    monkeypatch.setattr(float8, "_BLOCK", 16)
    assert kernels.float8_codebook(book) is None
    assert launched == []


@on_device
def test_empty():
    for shape in ((0, 32), (3, 0)):
        codes, scale = kernels.float8_rows(torch.zeros(shape, device=DEVICE))
        assert codes.shape == shape and scale.shape == shape[:1]
        codes, scale = kernels.float8_transposed(torch.zeros(shape, device=DEVICE))
        assert codes.shape == shape[::-1] and scale.shape == shape[:1]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (300, 28672), (48, 40000)], ids=str)
def test_large(shape, launched):
    x = torch.randn(shape, device="cuda").bfloat16()
    factor = torch.rand(shape[1], device="cuda")
    same(kernels.float8_rows(x, factor), twin(kernels.float8_rows, x, factor))
    same(kernels.float8_transposed(x), twin(kernels.float8_transposed, x))
    assert launched == ["float8_rows", "float8_rows", "float8_transposed"]
    book, weight = book_of(BitsAndBytes4bit(double_quant=True), shape)
    if shape[1] <= float8._BLOCK:
        same(kernels.float8_codebook(book), twin(kernels.float8_rows, weight))
        same(kernels.float8_codebook(book, transposed=True), twin(kernels.float8_transposed, weight))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    x = torch.randn(65536 + 8, 32768, device="cuda", dtype=torch.bfloat16)
    codes, scale = kernels.float8_rows(x)
    same((codes[-8:], scale[-8:]), twin(kernels.float8_rows, x[-8:]))
    del codes
    codes, scale = kernels.float8_transposed(x)
    same((codes[:, -8:].contiguous(), scale[-8:]), twin(kernels.float8_transposed, x[-8:]))


if not INTERPRETED:

    def test_nan_reaches_the_whole_row_and_zeros_stay():
        codes, scale = kernels.float8_rows(matrix(12, 64))
        value = codes.float() * scale[:, None]
        assert value[2].isnan().all() and value[3].isnan().all()
        assert value[1].abs().max() == 0 and value[[0, *range(4, 12)]].isfinite().all()

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton (Linux)")
    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", __file__]
        env = {**os.environ, "TRITON_INTERPRET": "1", "QFT_KERNELS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert " skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]

"""The formats against the papers' figures, against bitsandbytes, and against themselves on arbitrary shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qft
from qft.backends.reference import Reference, fp4_values, nf4_values
from qft.ops.bits import dynamic_map, pack_bits, unpack_bits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _round_trip(q, weight, dtype=torch.float32):
    return q.unpack(q.pack(weight), shape=tuple(weight.shape), dtype=dtype)


def _normal(rows=4096, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---- figures from papers ----------------------------------------------------------------------------------


def test_nf4_values_are_the_papers():
    """QLoRA, arXiv 2305.14314, appendix E, to the digits printed there."""
    paper = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
             0.7229568362236023, 1.0]  # fmt: skip
    assert torch.allclose(nf4_values(), torch.tensor(paper), atol=2e-7, rtol=0)


def test_fp4_has_its_eight_magnitudes():
    assert sorted({round(abs(float(v)) * 12, 4) for v in fp4_values()}) == [0, 0.0625, 2, 3, 4, 6, 8, 12]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"format": "int", "group_size": 64}, 0.0080),
        ({"format": "nf4"}, 0.00845),
        ({"format": "int", "group_size": 64, "symmetric": True}, 0.0116),
        ({"format": "fp4"}, 0.0149),
    ],
)
def test_mean_squared_error_on_a_normal(options, error):
    """Blocks of 64 on N(0, 1): asymmetric int4 < NF4 < symmetric int4 < FP4, to the printed digit."""
    weight = _normal()
    found = float((_round_trip(Reference(**options), weight) - weight).square().mean())
    assert found == pytest.approx(error, rel=0.02)


def test_double_quantization_saves_the_papers_bits():
    """QLoRA, section 3: 0.5 bits of constants become 0.127."""
    n = (4096, 4096)
    plain, double = Reference().nbytes(n), Reference(double_quant=True).nbytes(n)
    count = math.prod(n)
    assert 8 * plain / count == pytest.approx(4.5, abs=1e-6)
    assert 8 * double / count == pytest.approx(4.127, abs=1e-3)


def test_double_quantization_costs_little_error():
    weight = _normal()
    plain = (_round_trip(Reference(), weight) - weight).norm()
    double = (_round_trip(Reference(double_quant=True), weight) - weight).norm()
    assert plain < double < 1.01 * plain


@pytest.mark.parametrize("bits", range(2, 8))
def test_one_more_bit_quarters_the_squared_error(bits):
    weight = _normal()

    def error(b):
        q = Reference(format="int", bits=b, group_size=64)
        return float((_round_trip(q, weight) - weight).square().mean())

    assert error(bits) / error(bits + 1) == pytest.approx((2 ** (bits + 1) - 1) ** 2 / (2**bits - 1) ** 2, rel=0.03)


# ---- against bitsandbytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 128), (96, 64), (17, 70), (5, 13), (33, 256), (40, 96)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_codes_as_bitsandbytes(format, double_quant, shape, dtype):
    """Where bitsandbytes is missing, reference takes over with the same codes (ties in rounding apart)."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    mine = Reference(format=format, double_quant=double_quant).pack(weight)
    theirs, state = functional.quantize_4bit(weight, quant_type=format, compress_statistics=double_quant)
    assert mine["qweight"].shape == theirs.view(-1).shape
    assert (mine["qweight"] != theirs.view(-1)).float().mean() <= 2e-3
    assert torch.allclose(mine["absmax"].float(), state.absmax.float(), rtol=1e-6, atol=1.01 if double_quant else 0)


def test_same_dynamic_map_as_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("spec", ["nf4", "fp4", "nf4:double_quant=true", "nf4:block_size=256"])
@pytest.mark.parametrize("shape", [(64, 128), (96, 64), (17, 70), (5, 13), (40, 96), (10, 160)])
def test_dequantize_equals_the_oracle_on_every_width(spec, shape):
    """bitsandbytes' CPU kernel is wrong where blocks cross rows; ours must not be."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    q = qft.get_quantizer(spec)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    oracle = Reference(format=q.quant_type, group_size=q.block_size, double_quant=q.double_quant)
    w_hat = q.dequantize(q.weights(q.quantize_layer(layer))[0], dtype=torch.float32)
    expected = _round_trip(oracle, layer.weight.detach())
    assert float((w_hat - expected).norm() / expected.norm()) < (2e-3 if q.double_quant else 1e-5)


# ---- any shape --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(1, 200), seed=st.integers(0, 99))
def test_bits_pack_and_unpack(bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (n if bits == 8 else -(-n // 8) * bits)
    assert torch.equal(unpack_bits(packed, bits, n).long(), codes)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    size=st.sampled_from([1, 2, 3, 7, 8, 16, 32, 64]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    double_quant=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_integers_round_to_the_nearest_step(rows, groups, size, bits, symmetric, double_quant, dtype, scale, seed):
    """|W − Ŵ| is at most half a step, constants' own rounding apart."""
    q = Reference(format="int", bits=bits, group_size=size, symmetric=symmetric, double_quant=double_quant)
    weight = (torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed)) * scale).to(DTYPES[dtype])
    w_hat = _round_trip(q, weight)
    grouped = weight.float().view(rows, groups, size)
    top = 2 ** (bits - 1) - 1 if symmetric else (2**bits - 1) / 2
    span = grouped.abs().amax(-1) if symmetric else (grouped.amax(-1) - grouped.amin(-1)) / 2
    step = (span / top)[..., None]
    error = (w_hat.view_as(grouped) - grouped).abs()
    if double_quant:  # 8-bit constants: the error is bounded through the group's and the model's own size
        assert torch.isfinite(w_hat).all()
        return
    stored = torch.finfo(torch.float32 if dtype == "float32" else torch.bfloat16).eps  # of the scales
    slack = torch.finfo(DTYPES[dtype]).eps * grouped.abs().amax(-1, keepdim=True) * 4 + stored * step * 2**bits
    assert (error <= step / 2 + slack + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 90),
    size=st.sampled_from([1, 3, 32, 64, 100]),
    format=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 99),
)
def test_codebooks_take_any_shape(rows, columns, size, format, double_quant, dtype, seed):
    """Every value is the codebook's nearest, times its block's largest magnitude; the last block may be short."""
    q = Reference(format=format, group_size=size, double_quant=double_quant)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])
    w_hat = _round_trip(q, weight).view(-1)
    assert w_hat.shape == (rows * columns,)
    assert torch.isfinite(w_hat).all()
    if double_quant:
        return
    flat = weight.float().view(-1)
    values = nf4_values() if format == "nf4" else fp4_values()
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        nearest = (block[:, None] - values * block.abs().max()).abs().amin(1)
        error = (w_hat[start : start + size] - block).abs()
        assert torch.allclose(error, nearest, atol=1e-6 * float(block.abs().max()))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 48),
    columns=st.integers(1, 160),
    spec=st.sampled_from(["nf4", "fp4:double_quant=true", "nf4:block_size=128", "int8"]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 99),
)
def test_bitsandbytes_takes_any_shape(rows, columns, spec, dtype, seed):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    q = qft.get_quantizer(spec)
    layer = nn.Linear(columns, rows, bias=False).to(DTYPES[dtype])
    layer.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(layer.weight)
    handle = q.weights(q.quantize_layer(layer))[0]
    w_hat, w = q.dequantize(handle, dtype=torch.float32), layer.weight.detach().float()
    if spec == "int8":
        bound = (w.abs().amax(1, keepdim=True) / 127 * 0.51 + 1e-3 * w.abs()).expand_as(w)
    else:  # half the widest gap of the codebook, times the largest magnitude, 8-bit constants included
        gap = 0.17 if q.quant_type == "nf4" else 0.18
        bound = torch.full_like(w, float(w.abs().max()) * (gap + 0.02))
    assert ((w_hat - w).abs() <= bound).all()


def test_a_constant_or_zero_group_is_exact():
    weight = torch.cat([torch.zeros(2, 32), torch.full((2, 32), 0.75), torch.full((2, 32), -3.0)])
    for bits in (2, 4, 8):
        assert torch.equal(_round_trip(Reference(format="int", bits=bits, group_size=32), weight), weight)
    assert torch.equal(_round_trip(Reference(group_size=32), weight), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_nearly_constant_group_stays_finite_and_close(bits, dtype):
    """Its zero point, counted in steps, would overflow float16."""
    weight = (torch.full((2, 32), 500.0) + torch.linspace(0, 1e-3, 32)).to(DTYPES[dtype])
    w_hat = _round_trip(Reference(format="int", bits=bits, group_size=32), weight)
    assert torch.isfinite(w_hat).all()
    bound = {"float32": 2**-20, "float16": 2**-10, "bfloat16": 2**-8}[dtype]
    assert float((w_hat - weight.float()).abs().max()) <= 500 * bound


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("bits", [4, 8])
def test_small_float16_weights_keep_their_precision(size, bits):
    """Their scales are beneath what float16 can hold."""
    weight = (_normal(64, 64) * size).half()
    w_hat = _round_trip(Reference(format="int", bits=bits, group_size=32), weight)
    error = float((w_hat - weight.float()).norm() / weight.float().norm())
    assert error < (0.1 if bits == 4 else 0.01)

"""The Triton programs behind `qft.ops.kernels.float8`; imported when the first of them runs.

A row's scale is its largest magnitude over 448, e4m3's largest number. Magnitudes are compared as bits, where NaN is
above infinity: one NaN makes its row's scale NaN, and with it all that is computed from the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qft.ops.kernels.programs import INTERPRETED, _constants

FLOOR = tl.constexpr(27 << 23)  # the bits of 2**-100


@triton.jit
def _bits(x):
    """The magnitude of float32 as int32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(top):
    """The scale of a row whose largest magnitude has these bits."""
    return tl.maximum(top, FLOOR).to(tl.float32, bitcast=True) * (1.0 / 448.0)


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _bfloat16(x):
    """float32 rounded to what bfloat16 can hold."""
    if INTERPRETED:  # the interpreter cuts bits off
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _e4m3(x):
    """float32, up to 448 in magnitude, as the bits of float8_e4m3fn, to nearest even."""
    if INTERPRETED:  # which cuts bits off here, too
        bits = _bits(x)
        code = (bits + 0x7FFFF + ((bits >> 20) & 1) >> 20) - (120 << 3)
        # below 2**-6 codes are multiples of 2**-9, which is what float32 has room for beside 2**14
        small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
        code = tl.where(bits < 121 << 23, small, tl.minimum(code, 0x7E))
        code = tl.where(bits > 0x7F800000, 0x7F, code)
        return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _values(x, factor, at, columns, FACTOR: tl.constexpr):
    value = tl.load(x + at, mask=at < columns, other=0).to(tl.float32)
    if FACTOR:
        value = value * tl.load(factor + at, mask=at < columns, other=0.0)
    return value


@triton.jit
def float8_rows(
    out,
    scale,
    x,
    factor,
    columns,
    FACTOR: tl.constexpr,  # columns are multiplied by one each first
    STORE: tl.constexpr,  # else only the scales are wanted
    COUNT: tl.constexpr,  # of blocks in a row
    BLOCK: tl.constexpr,
):
    """A row a program."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    x += start
    at = tl.arange(0, BLOCK)
    if COUNT == 1:
        value = _values(x, factor, at, columns, FACTOR)
        found = _scale(tl.max(_bits(value), axis=0))
        if STORE:
            tl.store(out + start + at, _e4m3(value * _inverse(found)), mask=at < columns)
    else:
        most = tl.zeros([BLOCK], dtype=tl.int32)
        for i in range(COUNT):
            most = tl.maximum(most, _bits(_values(x, factor, i * BLOCK + at, columns, FACTOR)))
        found = _scale(tl.max(most, axis=0))
        if STORE:
            for i in range(COUNT):
                value = _values(x, factor, i * BLOCK + at, columns, FACTOR)
                each = i * BLOCK + at
                tl.store(out + start + each, _e4m3(value * _inverse(found)), mask=each < columns)
    tl.store(scale + row, found)


@triton.jit
def float8_transposed(
    out,  # (columns, rows)
    x,  # (rows, columns)
    scale,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile a program, turned on its way."""
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    value = tl.load(x + (r.to(tl.int64)[:, None] * columns + c[None, :]), mask=inside, other=0).to(tl.float32)
    inverse = _inverse(tl.load(scale + r, mask=r < rows, other=1.0))
    code = tl.trans(_e4m3(value * inverse[:, None]))
    inside = (c < columns)[:, None] & (r < rows)[None, :]
    tl.store(out + (c.to(tl.int64)[:, None] * rows + r[None, :]), code, mask=inside)


@triton.jit
def float8_codebook_rows(
    out,
    scale,
    codes,
    table,
    absmax,
    absmax_scale,
    absmax_mean,
    constants_map,
    units,  # of eight weights, in a row
    SIZE: tl.constexpr,  # weights a block of the flattened weight, a multiple of 8
    DOUBLE: tl.constexpr,
    DOUBLE_BLOCK: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `float8_rows` of the dequantized weight in bfloat16, without that."""
    row = tl.program_id(0)
    local = tl.arange(0, BLOCK)
    inside = local < units
    unit = row * units + local
    j = tl.arange(0, 8)
    words = codes.to(tl.pointer_type(tl.uint8), bitcast=True).to(tl.pointer_type(tl.int32), bitcast=True)
    word = tl.load(words + unit, mask=inside, other=0)
    code = (word[:, None] >> ((j ^ 1) * 4)[None, :]) & 15  # the first code of a byte lies in its high bits
    factor = _constants(absmax, unit // (SIZE // 8), inside, constants_map, absmax_scale, absmax_mean, DOUBLE,
                        DOUBLE_BLOCK)  # fmt: skip
    value = _bfloat16(tl.load(table + code) * factor[:, None])
    value = tl.where(inside[:, None], value, 0.0)
    found = _scale(tl.max(tl.max(_bits(value), axis=1), axis=0))
    tl.store(scale + row, found)
    if STORE:
        place = out + row.to(tl.int64) * units * 8
        tl.store(place + (local[:, None] * 8 + j[None, :]), _e4m3(value * _inverse(found)), mask=inside[:, None])


@triton.jit
def float8_codebook_transposed(
    out,  # (8 * units, rows)
    scale,
    codes,
    table,
    absmax,
    absmax_scale,
    absmax_mean,
    constants_map,
    rows,
    units,
    SIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    DOUBLE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """As `float8_transposed` of the dequantized weight in bfloat16, without that."""
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    u = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = (r < rows)[:, None] & (u < units)[None, :]
    unit = r[:, None] * units + u[None, :]
    words = codes.to(tl.pointer_type(tl.uint8), bitcast=True).to(tl.pointer_type(tl.int32), bitcast=True)
    word = tl.load(words + unit, mask=inside, other=0)
    j = tl.arange(0, 8)
    code = (word[:, :, None] >> ((j ^ 1) * 4)[None, None, :]) & 15
    factor = _constants(absmax, unit // (SIZE // 8), inside, constants_map, absmax_scale, absmax_mean, DOUBLE,
                        DOUBLE_BLOCK)  # fmt: skip
    value = _bfloat16(tl.load(table + code) * factor[:, :, None])
    inverse = _inverse(tl.load(scale + r, mask=r < rows, other=1.0))
    code = tl.trans(tl.reshape(_e4m3(value * inverse[:, None, None]), [ROWS, UNITS * 8]))
    c = tl.program_id(0) * (UNITS * 8) + tl.arange(0, UNITS * 8)
    inside = (c < units * 8)[:, None] & (r < rows)[None, :]
    tl.store(out + (c.to(tl.int64)[:, None] * rows + r[None, :]), code, mask=inside)

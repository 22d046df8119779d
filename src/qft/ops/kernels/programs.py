"""The Triton programs behind `qft.ops.kernels`; imported when the first of them runs, since this imports triton.

All of them compute in float32 and are compiled without contraction to fused multiply-adds, so that every product and
every sum rounds where the torch code's does. Offsets within a tile are int32, a tile's own start is int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _rounded(x, like):
    """float32 to the dtype that `like` points to, to nearest even."""
    if INTERPRETED and like.dtype.element_ty == tl.bfloat16:  # the interpreter cuts bits off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)


@triton.jit
def _constants(values, index, mask, values_map, scale, mean, DOUBLE: tl.constexpr, DOUBLE_BLOCK: tl.constexpr):
    """Constants of any dtype as float32; those in 8 bits through their map, and their own scale and mean."""
    if DOUBLE:
        code = tl.load(values + index, mask=mask, other=0).to(tl.int32)
        value = tl.load(values_map + code) * tl.load(scale + index // DOUBLE_BLOCK, mask=mask, other=0.0)
        return value + tl.load(mean)
    else:
        return tl.load(values + index, mask=mask, other=0).to(tl.float32)


@triton.jit
def _float8(code, E5M2: tl.constexpr):
    """Bits of float8 in int32 as float32; by way of float16, so that every device can."""
    if E5M2:
        return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def stream(
    out,
    codes,
    table,
    scale,
    scale_scale,
    scale_mean,
    zero,
    zero_scale,
    zero_mean,
    constants_map,
    n,
    nbytes,
    units,
    BITS: tl.constexpr,
    KIND: tl.constexpr,  # codebook, affine, symmetric, int8, float8, float8_e5m2
    SIZE: tl.constexpr,  # weights a group, a multiple of 8
    WORDS: tl.constexpr,  # the eight codes of a unit are one aligned word
    WHOLE: tl.constexpr,  # n is a multiple of 8
    DOUBLE: tl.constexpr,
    DOUBLE_BLOCK: tl.constexpr,
    ROUND: tl.constexpr,  # the product to the scale's dtype, before it goes to the result's
    DIVISOR: tl.constexpr,  # of the scale
    BLOCK: tl.constexpr,
):
    """Codes in the order of the flattened weight, eight to a unit, over groups of the flattened weight."""
    first = tl.program_id(0) * BLOCK
    unit = first + tl.arange(0, BLOCK)
    inside = unit < units
    local = tl.arange(0, BLOCK)
    j = tl.arange(0, 8)
    out += first.to(tl.int64) * 8
    codes = codes.to(tl.pointer_type(tl.uint8), bitcast=True)
    each = local[:, None] * 8 + j[None, :]
    if WHOLE:
        mask = inside[:, None]
    else:
        mask = unit[:, None] < (n - j[None, :] + 7) // 8
    if BITS == 8:
        code = tl.load(codes + first.to(tl.int64) * 8 + each, mask=mask, other=0).to(tl.int32)
    else:
        if WORDS:
            if BITS == 4:
                word = tl.load(codes.to(tl.pointer_type(tl.int32), bitcast=True) + unit, mask=inside, other=0)
            else:
                word = tl.load(codes.to(tl.pointer_type(tl.int16), bitcast=True) + unit, mask=inside, other=0)
                word = word.to(tl.int32)
        else:
            codes += first.to(tl.int64) * BITS
            last = (nbytes - first.to(tl.int64) * BITS).to(tl.int32)
            if BITS > 4:
                word = tl.zeros([BLOCK], dtype=tl.int64)
            else:
                word = tl.zeros([BLOCK], dtype=tl.int32)
            for b in tl.static_range(BITS):
                byte = tl.load(codes + local * BITS + b, mask=inside & (local * BITS + b < last), other=0)
                word |= byte.to(word.dtype) << (8 * b)
        if KIND == "codebook":
            shift = (j ^ 1) * 4  # the first code of a byte lies in its high bits
        else:
            shift = j * BITS
        code = ((word[:, None] >> shift[None, :].to(word.dtype)) & ((1 << BITS) - 1)).to(tl.int32)

    if KIND == "codebook":
        value = tl.load(table + code)
    elif KIND == "int8":
        value = ((code << 24) >> 24).to(tl.float32)
    elif KIND == "float8":
        value = _float8(code, False)
    elif KIND == "float8_e5m2":
        value = _float8(code, True)
    else:
        value = code.to(tl.float32)
    group = unit // (SIZE // 8)
    if KIND == "affine":
        point = _constants(zero, group, inside, constants_map, zero_scale, zero_mean, DOUBLE, DOUBLE_BLOCK)
        value = value - point[:, None]
    elif KIND == "symmetric":
        value = value - 2.0 ** (BITS - 1)
    factor = _constants(scale, group, inside, constants_map, scale_scale, scale_mean, DOUBLE, DOUBLE_BLOCK)
    if DIVISOR != 1:
        factor = tl.div_rn(factor, tl.full([BLOCK], DIVISOR, tl.float32))
    value = value * factor[:, None]
    if ROUND:
        value = _rounded(value, scale).to(tl.float32)
    tl.store(out + each, _rounded(value, out), mask=mask)


@triton.jit(do_not_specialize=["units"])
def parts(
    out,
    codes,
    scale,
    zero,
    units,  # of eight neighbouring words
    whole,  # units of eight neighbouring weights
    rows,  # of words: rows of groups in a part; with ACROSS, the number of groups
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    ACROSS: tl.constexpr,  # groups are columns of the matrix of groups
    SHIFT: tl.constexpr,  # scale * code - zero, each step in the scale's dtype; else (code - zero) * scale in float32
    BLOCK: tl.constexpr,
):
    """Words that hold one code of each part of the matrix of groups: every part is one stretch of the result."""
    first = tl.program_id(0) * BLOCK
    unit = first + tl.arange(0, BLOCK)
    start = first.to(tl.int64) * 8
    each = tl.arange(0, BLOCK)[:, None] * 8 + tl.arange(0, 8)[None, :]
    words = tl.load(codes + start + each, mask=(unit < units)[:, None], other=0).to(tl.int32)
    if ACROSS:
        column = (unit % (rows // 8) * 8)[:, None] + tl.arange(0, 8)[None, :]
        mine = (unit < units)[:, None]
        factor = tl.load(scale + column, mask=mine, other=0).to(tl.float32)
        point = tl.load(zero + column, mask=mine, other=0).to(tl.float32)
    for p in tl.static_range(PARTS):
        inside = (unit < units) & (unit < whole - p * units)
        if BITS < 8:
            if HIGH_FIRST:
                value = ((words >> (BITS * (PARTS - 1 - p))) & ((1 << BITS) - 1)).to(tl.float32)
            else:
                value = ((words >> (BITS * p)) & ((1 << BITS) - 1)).to(tl.float32)
        else:
            value = words.to(tl.float32)
        if not ACROSS:
            group = p * rows + unit // (SIZE // 8)
            factor = tl.load(scale + group, mask=inside, other=0).to(tl.float32)[:, None]
            point = tl.load(zero + group, mask=inside, other=0).to(tl.float32)[:, None]
        if SHIFT:
            value = _rounded(value * factor, scale).to(tl.float32)
            value = _rounded(value - point, scale).to(tl.float32)
        else:
            value = (value - point) * factor
        place = out + (p * units.to(tl.int64) * 8 + start)
        tl.store(place + each, _rounded(value, out), mask=inside[:, None])


@triton.jit
def eetq(out, codes, scale, units, per_pair, BLOCK: tl.constexpr):
    """Sixteen bytes a unit, two neighbouring bytes being one of either half of sixteen inputs."""
    first = tl.program_id(0) * BLOCK
    unit = first + tl.arange(0, BLOCK)
    inside = unit < units
    i = tl.arange(0, 8)
    words = codes.to(tl.pointer_type(tl.int16), bitcast=True) + first.to(tl.int64) * 8
    words = tl.load(words + tl.arange(0, BLOCK)[:, None] * 8 + i[None, :], mask=inside[:, None], other=0)
    words = words.to(tl.int32)
    # a pair of rows holds, for each 64 inputs, four units of its first row, then four of its second
    pair = unit // per_pair
    within = unit % per_pair
    row = pair * 2 + (within // 4) % 2
    place = row.to(tl.int64) * (per_pair * 8) + within // 8 * 64 + within % 4 * 16
    factor = tl.load(scale + row, mask=inside, other=0).to(tl.float32)[:, None]
    for half in tl.static_range(2):
        value = (((words >> (8 * half)) & 255) - 128).to(tl.float32) * factor
        tl.store(out + (place + 8 * half)[:, None] + i[None, :], _rounded(value, out), mask=inside[:, None])


@triton.jit
def additive(
    out, codes, books, scale, units, per_row, COUNT: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A group of columns a unit: the vectors that its codes name, summed, times the scale of its row."""
    first = tl.program_id(0) * BLOCK
    unit = first + tl.arange(0, BLOCK)
    inside = unit < units
    i = tl.arange(0, WIDE)
    codes += first.to(tl.int64) * COUNT
    total = tl.zeros([BLOCK, WIDE], dtype=tl.float32)
    for m in tl.static_range(COUNT):
        code = tl.load(codes + tl.arange(0, BLOCK) * COUNT + m, mask=inside, other=0).to(tl.int32)
        code = (code & ((1 << BITS) - 1)) + (m << BITS)
        vector = tl.load(books + code[:, None] * WIDE + i[None, :], mask=inside[:, None], other=0)
        total = total + vector.to(tl.float32)
    factor = tl.load(scale + unit // per_row, mask=inside, other=0).to(tl.float32)
    each = tl.arange(0, BLOCK)[:, None] * WIDE + i[None, :]
    value = _rounded(total * factor[:, None], out)
    tl.store(out + first.to(tl.int64) * WIDE + each, value, mask=inside[:, None])


@triton.jit
def _gptq_zero(words, row, n, mask, ADD: tl.constexpr, BITS: tl.constexpr, OLDER: tl.constexpr):
    """Zero points at columns `n` of a row of words that starts at `row`."""
    at = row + n * BITS // 32
    shift = n * BITS % 32
    word = tl.load(words + at, mask=mask, other=0)
    if BITS == 3:
        # bits of the next word where a code crosses into it; a shift by 32 is undefined, hence two of them
        more = tl.load(words + at + 1, mask=mask & (shift > 29), other=0)
        low = (word.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)).to(tl.int32, bitcast=True)
        code = low | ((more << 1) << (31 - shift))
        if OLDER:
            code = code + 1
        return code & 7
    else:
        if OLDER:  # one more in each field, carried over as in the addition of whole words
            word = word + ADD
        return (word >> shift) & ((1 << BITS) - 1)


@triton.jit
def gptq(
    out,
    codes,
    zeros,
    scale,
    owner,
    rows,
    columns,
    words,  # rows of codes
    zero_words,  # in a row of zeros
    size,
    row_stride,
    column_stride,
    BITS: tl.constexpr,
    OLDER: tl.constexpr,
    ADD: tl.constexpr,
    ORDERED: tl.constexpr,  # the group of each column is in `owner`
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,  # without ORDERED, within one group
):
    """int32 words along in_features: rows of the result are neighbours in memory, which the tile turns round."""
    start = tl.program_id(0) * BLOCK_COLUMNS
    first = tl.program_id(1) * BLOCK_ROWS
    local = tl.arange(0, BLOCK_ROWS)
    n = first + local
    k = start + tl.arange(0, BLOCK_COLUMNS)
    inside = n < rows
    if BITS == 3:  # 96 bits of 32 codes as four words of 24 bits
        at = start // 32 * 3
        w = tl.arange(0, BLOCK_COLUMNS // 32) * 3
        place = codes + (at.to(tl.int64) * rows + first) + (w[None, :] * rows + local[:, None])
        place = place.to(tl.pointer_type(tl.uint32), bitcast=True)
        mask = inside[:, None] & (at + w < words)[None, :]
        a = tl.load(place, mask=mask, other=0)
        b = tl.load(place + rows, mask=mask, other=0)
        c = tl.load(place + 2 * rows, mask=mask, other=0)
        second = (a >> 24) | (b << 8)
        third = (b >> 16) | (c << 16)
        word = tl.join(tl.join(a, third), tl.join(second, c >> 8))
        word = word.reshape(BLOCK_ROWS, BLOCK_COLUMNS // 8)
        shift = tl.arange(0, 8).to(tl.uint32) * 3
        code = ((word[:, :, None] >> shift[None, None, :]) & 7).to(tl.int32)
    else:
        at = start * BITS // 32
        w = tl.arange(0, BLOCK_COLUMNS * BITS // 32)
        place = codes + (at.to(tl.int64) * rows + first) + (w[None, :] * rows + local[:, None])
        word = tl.load(place, mask=inside[:, None] & (at + w < words)[None, :], other=0)
        shift = tl.arange(0, 32 // BITS) * BITS
        code = (word[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    code = code.reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    mask = inside[:, None] & (k < columns)[None, :]
    if ORDERED:
        group = tl.load(owner + k, mask=k < columns, other=0)[None, :]
        point = _gptq_zero(zeros, group * zero_words, n[:, None], mask, ADD, BITS, OLDER)
        factor = tl.load(scale + group * rows + n[:, None], mask=mask, other=0).to(tl.float32)
    else:
        group = start // size
        point = _gptq_zero(zeros, group * zero_words, n, inside, ADD, BITS, OLDER)[:, None]
        factor = tl.load(scale + group * rows + n, mask=inside, other=0).to(tl.float32)[:, None]
    value = _rounded((code - point).to(tl.float32) * factor, scale).to(tl.float32)
    out += first.to(tl.int64) * row_stride + start.to(tl.int64) * column_stride
    place = local[:, None] * row_stride + tl.arange(0, BLOCK_COLUMNS)[None, :] * column_stride
    tl.store(out + place, _rounded(value, out), mask=mask)


@triton.jit
def awq(
    out,
    codes,
    zeros,
    scale,
    rows,
    columns,
    size,
    row_stride,
    column_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,  # within one group
):
    """int32 words of eight output channels in the order 0 2 4 6 1 3 5 7, (in, out / 8)."""
    start = tl.program_id(0) * BLOCK_COLUMNS
    first = tl.program_id(1) * BLOCK_ROWS
    per_row = rows // 8
    local = tl.arange(0, BLOCK_COLUMNS)
    j = tl.arange(0, BLOCK_ROWS // 8)
    k = start + local
    n = first + tl.arange(0, BLOCK_ROWS)
    inside = n < rows
    place = codes + (start.to(tl.int64) * per_row + first // 8) + (local[None, :] * per_row + j[:, None])
    mask = (first // 8 + j < per_row)[:, None] & (k < columns)[None, :]
    word = tl.load(place, mask=mask, other=0)
    c = tl.arange(0, 8)
    shift = (c // 2 + c % 2 * 4) * 4
    code = (word[:, None, :] >> shift[None, :, None]) & 15
    code = code.reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    group = start // size
    point = tl.load(zeros + group * per_row + n // 8, mask=inside, other=0)
    point = (point >> ((n % 8 // 2 + n % 2 * 4) * 4)) & 15
    factor = tl.load(scale + group * rows + n, mask=inside, other=0).to(tl.float32)
    value = _rounded((code - point[:, None]).to(tl.float32) * factor[:, None], scale).to(tl.float32)
    out += first.to(tl.int64) * row_stride + start.to(tl.int64) * column_stride
    place = tl.arange(0, BLOCK_ROWS)[:, None] * row_stride + local[None, :] * column_stride
    tl.store(out + place, _rounded(value, out), mask=inside[:, None] & (k < columns)[None, :])


@triton.jit
def round_with_feedback(
    columns, error, share, inverse, scale, low, high, n, width, share_stride,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of all columns and some rows of the weight: round a column, hand its error on, take the next."""
    i = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = row < width
    where = i[:, None] * width + row[None, :]
    mask = (i[:, None] < n) & inside[None, :]
    tile = tl.load(columns + where, mask=mask, other=0.0)
    inverse = tl.load(inverse + row, mask=inside, other=1.0)
    scale = tl.load(scale + row, mask=inside, other=1.0)
    low = tl.load(low + row, mask=inside, other=0.0)
    high = tl.load(high + row, mask=inside, other=0.0)
    for k in range(COLUMNS):
        column = tl.sum(tl.where(i[:, None] == k, tile, 0.0), axis=0)
        code = tl.minimum(tl.maximum(column * inverse, low), high)
        below = tl.floor(code)
        rest = code - below
        odd = below - 2.0 * tl.floor(below * 0.5)
        code = below + tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), 1.0, 0.0)
        wrong = column - code * scale
        tl.store(error + k * width + row, wrong, mask=inside & (k < n))
        later = tl.load(share + k * share_stride + i, mask=(i > k) & (i < n) & (k < n), other=0.0)
        tile -= later[:, None] * wrong[None, :]
    tl.store(columns + where, tile, mask=mask)


@triton.jit
def _logit(x, scale, cap, CAP: tl.constexpr):
    """Compute scale · x, or cap · tanh(scale · x / cap), and its derivative by x."""
    if CAP:
        share = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * (x * scale / cap)))
        return share * cap, (1.0 - share * share) * scale
    else:
        return x * scale, tl.zeros_like(x) + scale


@triton.jit
def next_token(
    loss, logits, targets, columns, scale, cap, GRADIENT: tl.constexpr, CAP: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """logsumexp(z) - z[target] of one row, its gradient in the place of the logits; NaN for a target that no column has."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * columns
    target = tl.load(targets + row)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    chosen = tl.full((), 0.0, tl.float32)
    for i in range(COUNT):
        column = i * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        z, _ = _logit(tl.load(at + column, mask=inside, other=0.0).to(tl.float32), scale, cap, CAP)
        chosen += tl.sum(tl.where(inside & (column == target), z, 0.0), axis=0)
        z = tl.where(inside, z, float("-inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(z, axis=0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(z - highest), axis=0)
    found = (target >= 0) & (target < columns)
    sum_exp = tl.where(found, highest + tl.log(total), float("nan"))
    tl.store(loss + row, sum_exp - chosen)
    if GRADIENT:
        for i in range(COUNT):
            column = i * BLOCK + tl.arange(0, BLOCK)
            inside = column < columns
            z, slope = _logit(tl.load(at + column, mask=inside, other=0.0).to(tl.float32), scale, cap, CAP)
            p = tl.exp(z - sum_exp) - tl.where(column == target, 1.0, 0.0)
            tl.store(at + column, _rounded(p * slope, logits), mask=inside)

"""One function a layout: looks at the tensors, makes room for the result, starts a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from qft.ops.bits import CONSTANTS_BLOCK, codes_per_word, dynamic_map
from qft.ops.kernels.launch import CONFIGS, fits, launch

UNIT = 8
"""Weights that share a group and are written together."""


def codebook(
    qweight: Tensor,
    absmax: Tensor,
    values: Tensor,
    *,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
    double: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> Tensor | None:
    """4-bit codes into a codebook, over blocks of the flattened weight, as bitsandbytes keeps them: `values * absmax`.

    Args:
        qweight: ceil(n / 2) bytes, whatever its dtype; the first code of a byte in its high bits.
        absmax: float (blocks,), or with `double` uint8 codes.
        values: float32 (16,).
        block_size: weights a block, a multiple of 8; the last may be short.
        double: for `map[absmax] * scale + mean`: the map, float32 (256,); scale, float32 (ceil(blocks / size),); mean,
            float32 of one element; size.
    """
    n = prod(shape)
    if block_size % UNIT or not fits([qweight, absmax, values, *(double or ())[:3]], shape, dtype, out):
        return None
    return _stream(
        qweight, absmax, None, shape, dtype, out, kind="codebook", bits=4, size=block_size, nbytes=-(-n // 2),
        table=values, double=double,
    )  # fmt: skip


def integers(
    packed: Mapping[str, Tensor],
    *,
    bits: int,
    symmetric: bool,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
    round_product: bool = False,
) -> Tensor | None:
    """Integers of 2 to 8 bits as `pack_bits` packs the flattened weight: `(code - zero_point) * scale`, in float32.

    `packed` holds "qweight", "scale" and, without `symmetric`, "zero_point"; constants in 8 bits with theirs, as
    `pack_constants` leaves them. With `round_product` the product goes to the dtype of "scale" before it goes to the
    result's.
    """
    qweight, scale = packed["qweight"], packed["scale"]
    n, groups = prod(shape), scale.numel()
    if not groups or n % groups or n // groups % UNIT:
        return None
    zero = None if symmetric else packed["zero_point"]
    double, zero_double = (
        double_constants(packed, "scale"),
        None if symmetric else double_constants(packed, "zero_point"),
    )
    tensors = [qweight, scale, zero, *(double or ())[:3], *(zero_double or ())[:3]]
    if not fits(tensors, shape, dtype, out) or (zero is not None and (double is None) != (zero_double is None)):
        return None
    kind = "symmetric" if symmetric else "affine"
    return _stream(
        qweight, scale, zero, shape, dtype, out, kind=kind, bits=bits, size=n // groups, nbytes=qweight.numel(),
        double=double, zero_double=zero_double, round_product=round_product,
    )  # fmt: skip


def rows(
    qweight: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
    round_product: bool = False,
    divisor: int = 1,
) -> Tensor | None:
    """int8, float8_e4m3fn or float8_e5m2 (out_features, in_features) times a scale a row: `code * (scale / divisor)`.

    Args:
        scale: float (out_features,) or (out_features, groups), for as many groups in a row.
        round_product: to the dtype of `scale`, before it goes to the result's; else computed in float32.
    """
    kinds = {torch.int8: "int8", torch.float8_e4m3fn: "float8", torch.float8_e5m2: "float8_e5m2"}
    kind, shape = kinds.get(qweight.dtype), tuple(qweight.shape)
    groups = 1 if scale.dim() < 2 else scale.shape[1]
    if kind is None or shape[-1] % groups or shape[-1] // groups % UNIT or scale.numel() != shape[0] * groups:
        return None
    if not fits([qweight, scale], shape, dtype, out):
        return None
    codes = qweight if kind == "int8" else qweight.view(torch.uint8)  # triton knows float8 on newer devices only
    return _stream(
        codes, scale, None, shape, dtype, out, kind=kind, bits=8, size=shape[-1] // groups, nbytes=qweight.numel(),
        round_product=round_product, divisor=divisor,
    )  # fmt: skip


def parts(
    packed: Mapping[str, Tensor],
    *,
    bits: int,
    group_size: int,
    axis: int = 1,
    layout: Literal["hqq", "quanto"],
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor | None:
    """The matrix of groups as `pack_rows` packs it along its first dimension.

    With "hqq", high bits first, `(code - zero_point) * scale` in float32; with "quanto", low bits first, `scale * code -
    shift`, both steps in the scale's dtype.
    """
    hqq = layout == "hqq"
    qweight, scale, zero = packed["qweight"], packed["scale"], packed["zero_point" if hqq else "shift"]
    n = prod(shape)
    # what neighbours in memory have in common: a group, or with axis 0 eight groups side by side
    size = group_size if axis == 1 else n // group_size
    if size % UNIT or not fits([qweight, scale, zero], shape, dtype, out):
        return None
    value = _room(shape, dtype, out, qweight)
    units, config = qweight.numel() // UNIT, CONFIGS["parts"]
    done = launch(
        "parts", (-(-units // config["BLOCK"]),), value, qweight, scale, zero, units, n // UNIT,
        qweight.shape[0] if axis == 1 else size,
        BITS=bits, PARTS=codes_per_word(bits, qweight.dtype), HIGH_FIRST=hqq, SIZE=group_size if axis == 1 else UNIT,
        ACROSS=axis == 0, SHIFT=not hqq, config=config,
    )  # fmt: skip
    return _given(value, out) if done else None


def eetq(
    qweight: Tensor, scale: Tensor, *, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor | None:
    """EETQ's interleaved int8 times a scale a row, in float32; both sides are multiples of 64."""
    if not fits([qweight, scale], shape, dtype, out):
        return None
    value = _room(shape, dtype, out, qweight)
    units, config = prod(shape) // 16, CONFIGS["eetq"]
    grid = (-(-units // config["BLOCK"]),)
    done = launch("eetq", grid, value, qweight, scale, units, shape[1] // 8, config=config)
    return _given(value, out) if done else None


def gptq(
    packed: Mapping[str, Tensor],
    *,
    bits: int,
    older: bool,
    ordered: bool,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor | None:
    """GPTQ's words along in_features: `scales * (code - zero)`, rounded to the dtype of the scales.

    Args:
        older: zero points are stored less one, as the first version of the format has them.
        ordered: the group of a column is the one that "g_idx" says; else they follow each other.
        out: of any strides.
    """
    codes, zeros, scale, owner = (packed[n] for n in ("qweight", "qzeros", "scales", "g_idx"))
    rows, columns = shape
    groups = scale.shape[0]
    if columns % groups:
        return None
    size, config = columns // groups, CONFIGS["gptq"]
    block = _within(config["BLOCK_COLUMNS"], size, groups)
    ordered = ordered or block < 32 // bits or (bits == 3 and block < 32)  # a word, or three, may hold two groups
    if not fits([codes, zeros, scale, owner if ordered else None], shape, dtype, out):
        return None
    if ordered:
        config = CONFIGS["gptq_ordered"]
        block = config["BLOCK_COLUMNS"]
    value = out if out is not None else torch.empty(shape, dtype=dtype, device=codes.device)
    # one in each field of a word, as int32
    add = 0 if bits == 3 else {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    done = launch(
        "gptq", (-(-columns // block), -(-rows // config["BLOCK_ROWS"])), value, codes, zeros, scale, owner,
        rows, columns, codes.shape[0], zeros.shape[1], size, value.stride(0), value.stride(1),
        BITS=bits, OLDER=older, ADD=add, ORDERED=ordered, config={**config, "BLOCK_COLUMNS": block},
    )  # fmt: skip
    return value if done else None


def awq(
    packed: Mapping[str, Tensor], *, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor | None:
    """AWQ's words along out_features: `scales * (code - zero)`, rounded to the dtype of the scales; any strides of `out`."""
    codes, zeros, scale = (packed[n] for n in ("qweight", "qzeros", "scales"))
    rows, columns = shape
    groups = scale.shape[0]
    if not fits([codes, zeros, scale], shape, dtype, out) or columns % groups:
        return None
    size, config = columns // groups, CONFIGS["awq"]
    block = _within(config["BLOCK_COLUMNS"], size, groups)
    if block < UNIT:
        return None
    value = out if out is not None else torch.empty(shape, dtype=dtype, device=codes.device)
    done = launch(
        "awq", (-(-columns // block), -(-rows // config["BLOCK_ROWS"])), value, codes, zeros, scale,
        rows, columns, size, value.stride(0), value.stride(1), config={**config, "BLOCK_COLUMNS": block},
    )  # fmt: skip
    return value if done else None


def additive(
    packed: Mapping[str, Tensor], *, bits: int, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor | None:
    """AQLM's sums of codebook vectors, times a scale a row, in float32; groups are 4, 8, 16 or 32 columns of one row."""
    codes, books, scale = (packed[n] for n in ("qweight", "codebooks", "scales"))
    count, _, high, wide = books.shape
    if high != 1 or wide not in (4, 8, 16, 32) or not fits([codes, books, scale], shape, dtype, out):
        return None
    value = _room(shape, dtype, out, codes)
    units, config = prod(shape) // wide, CONFIGS["additive"]
    block = config["BLOCK"] * UNIT // wide
    done = launch(
        "additive", (-(-units // block),), value, codes, books, scale, units, codes.shape[1],
        COUNT=count, BITS=bits, WIDE=wide, config={**config, "BLOCK": block},
    )  # fmt: skip
    return _given(value, out) if done else None


def _stream(
    qweight, scale, zero, shape, dtype, out, *, kind, bits, size, nbytes, table=None, double=None, zero_double=None,
    round_product=False, divisor=1,
) -> Tensor | None:  # fmt: skip
    n = prod(shape)
    units, config = -(-n // UNIT), CONFIGS["stream"]
    # a word is read whole, to its last byte
    words = bits in (2, 4) and nbytes == units * bits and qweight.data_ptr() % bits == 0
    value = _room(shape, dtype, out, qweight)
    map_, scale_scale, scale_mean, block = double or (scale, scale, scale, CONSTANTS_BLOCK)
    _, zero_scale, zero_mean, _ = zero_double or (scale, scale, scale, block)
    done = launch(
        "stream", (-(-units // config["BLOCK"]),), value, qweight, scale if table is None else table,
        scale, scale_scale, scale_mean, scale if zero is None else zero, zero_scale, zero_mean, map_, n, nbytes, units,
        BITS=bits, KIND=kind, SIZE=size, WORDS=words, WHOLE=n % UNIT == 0, DOUBLE=double is not None,
        DOUBLE_BLOCK=block, ROUND=round_product, DIVISOR=divisor, config=config,
    )  # fmt: skip
    return _given(value, out) if done else None


def _within(block: int, size: int, groups: int) -> int:
    """The largest power of two up to `block` whose multiples do not cross groups."""
    return block if groups == 1 else min(block, size & -size)


def _room(shape: Sequence[int], dtype: torch.dtype, out: Tensor | None, like: Tensor) -> Tensor:
    """`out`, or where it is not contiguous another tensor."""
    if out is not None and out.is_contiguous():
        return out
    return torch.empty(shape, dtype=dtype if out is None else out.dtype, device=like.device)


def _given(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None or value is out else out.copy_(value)


def double_constants(packed: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """What `pack_constants` made of the constants `name`, as `codebook` takes it; None where they are floats."""
    codes = packed[name]
    if codes.is_floating_point():
        return None
    return _map(codes.device), packed[f"{name}_scale"], packed[f"{name}_mean"], CONSTANTS_BLOCK


@lru_cache
def _map(device: torch.device) -> Tensor:
    return dynamic_map().to(device)

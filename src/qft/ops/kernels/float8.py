"""Matrices as float8_e4m3fn with a scale a row, for products of float8: Triton kernels, and torch code beside them.

A row r becomes codes q and a float32 scale s = max(max|r|, 2**-100) / 448, r ≈ q s. NaN and infinity make the whole row
NaN; nothing saturates.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from qft.ops.bits import CONSTANTS_BLOCK
from qft.ops.kernels.dequantize import UNIT
from qft.ops.kernels.launch import CONFIGS, fits, launch

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
FLOOR = 2.0**-100
"""Rows are scaled as if their largest magnitude were no smaller: an inverse of their scale must be finite."""

_BLOCK = 32768
"""Of a row: what the registers of one program hold."""


class Codebook(NamedTuple):
    """A weight of 4-bit codes into a codebook, over blocks of the flattened weight; see `kernels.codebook`.

    Attributes:
        qweight: ceil(n / 2) bytes, whatever its dtype; the first code of a byte in its high bits.
        absmax: float (blocks,), or with `double` uint8 codes.
        values: float32 (16,).
        block_size: weights a block.
        shape: (out_features, in_features).
        double: None, or the map, scale, mean and block size of `absmax`.
    """

    qweight: Tensor
    absmax: Tensor
    values: Tensor
    block_size: int
    shape: tuple[int, ...]
    double: tuple[Tensor, Tensor, Tensor, int] | None = None


def float8_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) and scales (rows,) of a float matrix.

    Args:
        x: (rows, columns).
        factor: float32 (columns,), which columns are multiplied by first, in float32.
    """
    x = x.contiguous()
    code, scale = torch.empty(x.shape, dtype=FLOAT8, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)
    if _launch_rows(code, scale, x, factor):
        return code, scale
    value = x.float() if factor is None else x.float() * factor
    scale = _scales(value)
    return (value * scale.reciprocal()[:, None]).to(FLOAT8), scale


def float8_transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (columns, rows) and scales (rows,) of a float matrix (rows, columns): those of `float8_rows`, turned."""
    x = x.contiguous()
    (rows, columns), scale = x.shape, x.new_empty(x.shape[0], dtype=torch.float32)
    if _launch_rows(None, scale, x, None):
        code = torch.empty(columns, rows, dtype=FLOAT8, device=x.device)
        config = CONFIGS["float8_transposed"]
        grid = (-(-columns // config["COLUMNS"]), -(-rows // config["ROWS"]))
        if launch("float8_transposed", grid, code.view(torch.uint8), x, scale, rows, columns, config=config):
            return code, scale
    value = x.float()
    scale = _scales(value)
    return (value * scale.reciprocal()[:, None]).to(FLOAT8).T.contiguous(), scale


def float8_codebook(book: Codebook, *, transposed: bool = False) -> tuple[Tensor, Tensor] | None:
    """`float8_rows` or `float8_transposed` of the weight, dequantized to bfloat16, to the bit; None without a kernel."""
    qweight, absmax, values, size, shape, double = book
    rows, columns = shape
    tensors = [qweight, absmax, values, *(double or ())[:3]]
    if size % UNIT or columns % UNIT or columns > _BLOCK or not fits(tensors, shape, torch.bfloat16, None):
        return None
    if qweight.data_ptr() % 4 or qweight.numel() * qweight.element_size() * 2 != prod(shape):
        return None
    units, device = columns // UNIT, qweight.device
    scale = torch.empty(rows, dtype=torch.float32, device=device)
    code = torch.empty((columns, rows) if transposed else (rows, columns), dtype=FLOAT8, device=device)
    codes = code.view(torch.uint8)
    map_, factor, mean, block = double or (scale, scale, scale, CONSTANTS_BLOCK)
    constants = (qweight, values, absmax, factor, mean, map_)
    options = {"SIZE": size, "DOUBLE": double is not None, "DOUBLE_BLOCK": block}
    width = _padded(units)
    config = {"BLOCK": width, "num_warps": _warps(width * UNIT)}
    done = launch(
        "float8_codebook_rows", (rows,), codes, scale, *constants, units, STORE=not transposed, config=config, **options
    )
    if done and transposed:
        config = CONFIGS["float8_codebook_transposed"]
        grid = (-(-units // config["UNITS"]), -(-rows // config["ROWS"]))
        done = launch(
            "float8_codebook_transposed", grid, codes, scale, *constants, rows, units, config=config, **options
        )
    return (code, scale) if done else None


def _launch_rows(code: Tensor | None, scale: Tensor, x: Tensor, factor: Tensor | None) -> bool:
    rows, columns = x.shape
    if not fits([x, scale, factor], x.shape, x.dtype, None):
        return False
    block = _padded(columns) if columns <= _BLOCK else _BLOCK // 4
    out = scale if code is None else code.view(torch.uint8)  # triton knows float8 on newer devices only
    return launch(
        "float8_rows", (rows,), out, scale, x, scale if factor is None else factor, columns,
        FACTOR=factor is not None, STORE=code is not None, COUNT=-(-columns // block),
        config={"BLOCK": block, "num_warps": _warps(block)},
    )  # fmt: skip


def _scales(value: Tensor) -> Tensor:
    if not value.shape[1]:
        return value.new_full((value.shape[0],), FLOOR / LARGEST)
    return value.abs().amax(1).clamp(min=FLOOR) * (1.0 / LARGEST)


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _warps(elements: int) -> int:
    """32 to 64 elements a thread."""
    return min(16, max(4, elements // 1024))

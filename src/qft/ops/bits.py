"""Codes of 2 to 8 bits in bytes, and 8-bit constants: what several formats share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

CONSTANTS_BLOCK = 256
"""Block size of double quantization (QLoRA, arXiv 2305.14314, section 3)."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned integer codes of any shape into bytes, first code in the lowest bits.

    Args:
        codes: integers in [0, 2**bits), any shape, n elements.
        bits: 1 to 8.

    Returns:
        uint8 of shape (ceil(n / 8) * bits,); for 8 bits, (n,).
    """
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    if 8 % bits == 0:
        per_byte = flat.view(-1, 8 // bits)
        out = per_byte[:, 0].clone()
        for i in range(1, 8 // bits):
            out |= per_byte[:, i] << (bits * i)
        return out
    word = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device)
    for i in range(8):
        word |= flat[:, i].to(torch.int64) << (bits * i)
    return torch.stack([(word >> (8 * j) & 0xFF).to(torch.uint8) for j in range(bits)], dim=1).reshape(-1)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: the first `n` codes, uint8 of shape (n,)."""
    if bits == 8:
        return packed[:n]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        out = torch.empty(packed.numel(), 8 // bits, dtype=torch.uint8, device=packed.device)
        for i in range(8 // bits):
            torch.bitwise_and(packed >> (bits * i), mask, out=out[:, i])
        return out.view(-1)[:n]
    rows = packed.view(-1, bits)
    word = torch.zeros(rows.shape[0], dtype=torch.int64, device=packed.device)
    for j in range(bits):
        word |= rows[:, j].to(torch.int64) << (8 * j)
    out = torch.stack([(word >> (bits * i) & mask).to(torch.uint8) for i in range(8)], dim=1)
    return out.reshape(-1)[:n]


def in_groups(weight: Tensor, size: int, axis: int = 1) -> Tensor:
    """A weight of n elements as a matrix of groups: rows `(n / size, size)`, or with axis 0 columns `(size, n / size)`."""
    return weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1)


def in_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """A weight (..., out, in) as blocks (..., rows of blocks, block[0], blocks a row, block[1]), zeros at the edges."""
    rows, columns = weight.shape[-2:]
    whole = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    return whole.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))


def out_of_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `in_blocks`: a contiguous weight of `shape`."""
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()


def scales_for_rows(scale: Tensor, shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Scales of blocks, any number of dimensions below two for a whole weight, as (..., out, blocks a row)."""
    if scale.dim() < 2:
        scale = scale.reshape(1, 1)
    return scale.repeat_interleave(block[0], dim=-2)[..., : shape[-2], :].contiguous()


def times_blocks(value: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """`value` (..., out, in), multiplied in place with the scales of its blocks (..., rows of blocks, blocks a row)."""
    if scale.dim() < 2:
        return value.mul_(scale)
    wide = scales_for_rows(scale, value.shape, block)
    whole = value.shape[-1] // block[1] * block[1]
    value[..., :whole].unflatten(-1, (-1, block[1])).mul_(wide[..., : whole // block[1], None])
    if whole < value.shape[-1]:
        value[..., whole:].mul_(wide[..., -1:])
    return value


def codes_per_word(bits: int, word: torch.dtype = torch.uint8) -> int:
    """How many codes `pack_rows` puts into one word."""
    return torch.iinfo(word).bits // bits


def pack_rows(codes: Tensor, bits: int, *, high_first: bool, word: torch.dtype = torch.uint8) -> Tensor:
    """Pack unsigned codes along the first dimension: row i of every part of the matrix goes into row i of the result.

    Args:
        codes: integers in [0, 2**bits), (rows, ...), of any dtype.
        bits: 1, 2, 4 or 8 in bytes, 3 in int32.
        high_first: whether the first part lies in the highest bits of a word, as in HQQ, or the lowest, as in quanto.
        word: uint8 or int32.

    Returns:
        `word` of shape (ceil(rows / codes_per_word), ...); the last part is filled up with zeros.
    """
    per_word = codes_per_word(bits, word)
    rows = -(-codes.shape[0] // per_word)
    packed = torch.zeros((rows, *codes.shape[1:]), dtype=word, device=codes.device)
    for i, part in enumerate(codes.split(rows)):
        packed[: part.shape[0]] |= part.to(word) << _shift(i, bits, per_word, high_first)
    return packed


def unpack_rows(packed: Tensor, bits: int, rows: int, *, high_first: bool) -> Iterator[tuple[slice, Tensor]]:
    """The inverse of `pack_rows`, part by part, so that nobody has to hold all codes: the rows of a part, its codes."""
    per_word = codes_per_word(bits, packed.dtype)
    step = packed.shape[0]
    for i in range(per_word):
        start, stop = i * step, min((i + 1) * step, rows)
        if start < stop:
            part = packed[: stop - start]
            if bits < 8:
                part = (part >> _shift(i, bits, per_word, high_first)) & ((1 << bits) - 1)
            yield slice(start, stop), part


def _shift(part: int, bits: int, per_word: int, high_first: bool) -> int:
    return bits * (per_word - 1 - part if high_first else part)


@lru_cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic tree type, ascending, float32 (arXiv 1511.04561; 2110.02861).

    Seven decades; decade i holds 2**i means of neighbouring points of an even grid on [0.1, 1], each with both
    signs; zero and one complete the set.
    """
    values = [0.0, 1.0]
    for i in range(7):
        grid = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (grid[:-1] + grid[1:]) / 2 * 10.0 ** (i - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def pack_constants(values: Tensor, name: str) -> dict[str, Tensor]:
    """Double quantization: float constants of any shape as 8-bit codes with one float32 scale per 256 of them.

    Returns `{name: uint8 of values.shape, name_scale: float32 (ceil(n / 256),), name_mean: float32 ()}`.
    """
    flat = values.reshape(-1).float()
    mean = flat.mean()
    blocks = torch.nn.functional.pad(flat - mean, (0, -flat.numel() % CONSTANTS_BLOCK)).view(-1, CONSTANTS_BLOCK)
    scale = blocks.abs().amax(1)
    code = dynamic_map().to(flat.device)
    scaled = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2, out_int32=True).to(torch.uint8)
    return {name: codes.view(-1)[: flat.numel()].view(values.shape), f"{name}_scale": scale, f"{name}_mean": mean}


def unpack_constants(packed, name: str) -> Tensor:
    """The inverse of `pack_constants`: float32 of the constants' shape; float constants pass through."""
    codes = packed[name]
    if codes.is_floating_point():
        return codes.float()
    flat = dynamic_map().to(codes.device)[codes.reshape(-1).int()]
    scale = packed[f"{name}_scale"].repeat_interleave(CONSTANTS_BLOCK)[: flat.numel()]
    return (flat * scale + packed[f"{name}_mean"]).view(codes.shape)

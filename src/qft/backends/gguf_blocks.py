"""GGUF's blocks in torch: llama.cpp's layouts, as the package gguf has them in numpy, whose floats come out to the bit.

Every function takes blocks as rows of bytes (n, bytes a block) and gives or takes float32 (n, weights a block).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIZES = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
         "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}  # fmt: skip
"""Weights and bytes of a block."""

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Those that `quantized` makes; llama.cpp searches for the others' scales."""


def dequantized(blocks: Tensor, kind: str) -> Tensor:
    """Floats of blocks."""
    return _READERS[kind](blocks)


def quantized(values: Tensor, kind: str) -> Tensor:
    """Blocks of floats, rounded to nearest: the bytes that gguf's `quantize` makes."""
    if kind == "Q8_0":
        d = values.abs().amax(1, keepdim=True) / 127
        steps = (values * _inverse(d)).double()
        codes = torch.sign(steps) * torch.floor(steps.abs() + 0.5)
        return torch.cat([_bytes(d), codes.to(torch.int8).view(torch.uint8)], dim=1)
    bits = int(kind[1])
    top = 2**bits - 1
    if kind.endswith("_0"):
        where = values.abs().argmax(1, keepdim=True)
        d, low = values.gather(1, where) / -(2 ** (bits - 1)), None
        steps = values * _inverse(d) + (2 ** (bits - 1) + 0.5)
    else:
        low = values.amin(1, keepdim=True)
        d = (values.amax(1, keepdim=True) - low) / top
        steps = (values - low) * _inverse(d) + 0.5
    codes = steps.trunc().clamp(0, 255).to(torch.uint8).clamp(max=top)
    halves = codes.view(-1, 2, 16)
    parts = [_bytes(d)] + ([] if low is None else [_bytes(low)])
    if bits == 5:
        weights = 2 ** torch.arange(8, device=values.device)
        parts.append(((codes >> 4).view(-1, 4, 8) * weights).sum(-1).to(torch.uint8))
    parts.append((halves[:, 0] & 0xF) | ((halves[:, 1] & 0xF) << 4))
    return torch.cat(parts, dim=1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def _bytes(d: Tensor) -> Tensor:
    return d.half().view(torch.uint8)


def _half(blocks: Tensor, start: int) -> Tensor:
    """A float16 of each block as float32 (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(part: Tensor, bits: int, width: int) -> Tensor:
    """Codes of `bits` bits, for each `width` bytes first all of their lowest ones: uint8 (n, codes)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=part.device)
    codes = part.reshape(len(part), -1, 1, width) >> shifts.view(1, 1, -1, 1)
    return (codes & (2**bits - 1)).reshape(len(part), -1)


def _bits32(part: Tensor) -> Tensor:
    """32 bits of four bytes, from the lowest on: uint8 (n, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=part.device)
    return (part[:, :, None] >> shifts & 1).reshape(len(part), 32)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_fields(b[:, 2:], 4, 16).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _fields(b[:, 4:], 4, 16).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_fields(b[:, 6:], 4, 16) | _bits32(b[:, 2:6]) << 4).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_fields(b[:, 8:], 4, 16) | _bits32(b[:, 4:8]) << 4).float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _in_parts(codes: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    """`scale * code - low` of parts (n, parts), float32 (n, 256)."""
    value = scale[:, :, None] * codes.view(len(codes), scale.shape[1], -1)
    if low is not None:
        value = value - low[:, :, None]
    return value.reshape(len(codes), -1)


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    scale, low = _half(b, 80) * (scales & 0xF).float(), _half(b, 82) * (scales >> 4).float()
    return _in_parts(_fields(b[:, 16:80], 2, 32).float(), scale, low)


def _q3_k(b: Tensor) -> Tensor:
    high, codes, scales = b[:, :32], b[:, 32:96], b[:, 96:108]
    size = _fields(scales[:, :8], 4, 8) | _fields(scales[:, 8:], 2, 4) << 4
    scale = _half(b, 108) * (size.float() - 32)
    # a bit that is not set takes four off
    value = _fields(codes, 2, 32).float() - 4 * (1 - _fields(high, 1, 32).float())
    return _in_parts(value, scale)


def _scales_and_lows(b: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: six bits each for eight parts, in twelve bytes, float32 (n, 8)."""
    first, second, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([first & 0x3F, both & 0xF | first >> 2 & 0x30], dim=1)
    low = torch.cat([second & 0x3F, both >> 4 | second >> 2 & 0x30], dim=1)
    return _half(b, 0) * scale.float(), _half(b, 2) * low.float()


def _q4_k(b: Tensor) -> Tensor:
    return _in_parts(_fields(b[:, 16:], 4, 32).float(), *_scales_and_lows(b))


def _q5_k(b: Tensor) -> Tensor:
    codes = _fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4
    return _in_parts(codes.float(), *_scales_and_lows(b))


def _q6_k(b: Tensor) -> Tensor:
    codes = _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4
    scale = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()
    return _in_parts(codes.float() - 32, scale)


_READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip

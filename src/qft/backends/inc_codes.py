"""INC's rounding and packing, in torch alone: whole fields to int32 words, its grids, AWQ's two searches, FP8's scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of NF4 (QLoRA, arXiv 2305.14314), ascending."""

NF4_FIELDS = (7, 1, 2, 3, 4, 5, 6, 0, 8, 9, 10, 11, 12, 13, 14, 15)
"""The four bits by which INC stores each of them: zero is zero, the negative ones follow, -1 is last."""

FP8_TOP = 448.0
"""Of float8_e4m3fn."""

WEIGHT_HEADROOM, INPUT_HEADROOM = 0.5, 0.25
"""Shares of that range which INC's `maxabs_pow2` lets a weight and the largest input that was seen take up at most."""


def pack_fields(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n), whole numbers, as int32 (rows, ceil(n / per)), `per` = 32 // bits of them to a word.

    The first is in the lowest bits; bits that `per` fields leave over, two for 3 bits, stay zero.
    """
    per = 32 // bits
    parts = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per)).view(len(codes), -1, per)
    words = torch.zeros(parts.shape[:2], dtype=torch.int32, device=codes.device)
    for i in range(per):
        words |= (parts[..., i].to(torch.int32) & 2**bits - 1) << bits * i
    return words


def unpack_fields(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_fields`: uint8 (rows, n)."""
    per = 32 // bits
    codes = torch.empty(*words.shape, per, dtype=torch.uint8, device=words.device)
    for i in range(per):
        codes[..., i] = words >> bits * i & 2**bits - 1
    return codes.view(len(words), -1)[:, :n]


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups between two extremes, float32, of their shape; `share` of the range is kept.

    A symmetric zero point is the middle code.
    """
    if symmetric:
        largest = torch.maximum(low.abs(), high.abs()) * share
        largest = torch.where(largest == 0, 1.0, largest)
        return largest / (2 ** (bits - 1) - 1), torch.full_like(largest, 2 ** (bits - 1))
    low, high = low.clamp(max=0) * share, high.clamp(min=0) * share
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round_()


def to_integers(
    weight: Tensor, bits: int, size: int, symmetric: bool, share: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: codes (out, in), scale and zero point (out, groups), all float32, as INC's `quant_tensor` does."""
    groups = weight.view(len(weight), -1, size)
    scale, zero = grid(groups.amin(2), groups.amax(2), bits, symmetric, share)
    codes = groups.div(scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 2**bits - 1)
    return codes.view(weight.shape), scale, zero


def to_nf4(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Fields (out, in) and scale float32 (out, groups): the nearest values, halves going down."""
    groups = weight.view(len(weight), -1, size)
    scale = groups.abs().amax(2)
    # the middles are made in double precision and compared as floats, as INC's Python does
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(NF4)], device=weight.device)
    steps = groups / torch.where(scale == 0, 1.0, scale)[..., None]
    index = torch.bucketize(steps, middles)
    return torch.tensor(NF4_FIELDS, device=weight.device)[index].view(weight.shape), scale


def from_nf4(fields: Tensor) -> Tensor:
    """Float32 values of NF4 fields."""
    table = torch.empty(16)
    table[torch.tensor(NF4_FIELDS)] = torch.tensor(NF4)
    return table.to(fields.device)[fields.long()]


def awq_scales(weight: Tensor, statistics: Any, bits: int, size: int, symmetric: bool) -> tuple[Tensor, float]:
    """AWQ's search, as INC goes through it: a scale for each input, float32 (in,), and a share of the range.

    Of twenty mixtures of E[|x|] and of the inverse of how large a column's weights are in their groups, then of ten
    shares of the range down to 0.91, the one that breaks least of what the layer gives out: with D the weight's error,
    tr(D E[x xᵀ] Dᵀ). Inputs that no token activated have the average activation, lest their weights be lost.

    Args:
        weight: float32 (out, in).
    """
    moment, activity = statistics.second_moment.to(weight), statistics.mean_abs.to(weight)
    activity = torch.where(activity == 0, activity.mean(), activity)
    activity = torch.where(activity == 0, 1.0, activity)
    groups = weight.abs().view(len(weight), -1, size)
    largest = groups.amax(2, keepdim=True)
    share = (groups / torch.where(largest == 0, 1.0, largest)).view(weight.shape).mean(0)

    def broken(scale: Tensor, keep: float) -> Tensor:
        codes, step, zero = to_integers(weight * scale, bits, size, symmetric, keep)
        value = codes.view(len(weight), -1, size).sub_(zero[..., None]).mul_(step[..., None]).view(weight.shape)
        error = value.div_(scale).sub_(weight)
        return (error @ moment).mul_(error).sum()

    def mixture(i: int) -> Tensor:
        scale = (activity.pow(i / 20) / share.clamp(min=1e-8).pow(1 - i / 20)).clamp(min=1e-4)
        return scale / (scale.amax() * scale.amin()).sqrt()

    scale = mixture(int(torch.stack([broken(mixture(i), 1.0) for i in range(20)]).argmin()))
    shares = [1 - i / 100 for i in range(10)]
    return scale, shares[int(torch.stack([broken(scale, s) for s in shares]).argmin())]


def power_of_two(largest: Tensor, headroom: float) -> Tensor:
    """INC's scale of a float8 tensor by its largest absolute value: float32 (), a power of two; bfloat16 inside."""
    share = largest.to(torch.bfloat16) / (FP8_TOP * headroom)
    return torch.where(share > 0, share.log2().ceil().exp2(), 1.0).float()


def to_float8(value: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn of `value / scale`, cut off at the ends of its range."""
    return (value.float() / scale).clamp_(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn)


def packed_integers(codes: Tensor, zero: Tensor, bits: int) -> dict[str, Tensor]:
    """INC's words of codes (out, in) and zero points (out, groups)."""
    return {
        "qweight": pack_fields(codes, bits).T.contiguous(),
        "qzeros": pack_fields((zero - 1).to(torch.int32).T, bits).contiguous(),
    }


def owners(owner: Tensor | None, columns: int, size: int, device: torch.device) -> Tensor:
    """Each column's group; the last one may be short."""
    return torch.arange(columns, device=device) // size if owner is None else owner.to(device)


def scaled(value: Tensor, scale: Tensor, size: int, owner: Tensor | None) -> Tensor:
    """(out, in) times the scales (out, groups) of its columns."""
    if owner is None and value.shape[1] % size == 0:
        return value.view(len(value), -1, size).mul_(scale[..., None]).view(value.shape)
    return value.mul_(scale.index_select(1, owners(owner, value.shape[1], size, value.device)))


def hqq_weight(packed: Mapping[str, Tensor], bits: int, size: int | None, shape: Sequence[int]) -> Tensor:
    """The weight of INC's HQQ codes, groups along the first dimension, computed in the dtype of its constants."""
    words, scale, zero = packed["qweight"], packed["scale"], packed["zero"]
    per = {8: 1, 4: 2, 3: 10, 2: 4}[bits]
    codes = torch.cat([words >> bits * (per - 1 - i) & 2**bits - 1 for i in range(per)])
    codes = codes[: shape[0] if size in (None, -1) else size]
    # each step rounds as float16 does; on the CPU float32, which holds its results before they are rounded, is faster
    wide = torch.float32 if words.device.type == "cpu" else scale.dtype
    value = (codes.to(wide) - zero.to(wide)).to(scale.dtype)
    return value.to(wide).mul_(scale.to(wide)).to(scale.dtype).reshape(tuple(shape))

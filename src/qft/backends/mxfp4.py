"""MXFP4: E2M1 codes, two a byte, with a power of two for 32 of them, as the OCP's microscaling formats have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qft.backends import compressed_config
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadFolder, BadShape

BLOCK = 32
"""Weights along in_features that share a scale."""

BIAS = 127
"""Of the exponents that the scales are; 255 stands for NaN."""

_MOST = 124
"""Of exponents: six times a larger power of two is no float32."""


@lru_cache
def e2m1_values(device: torch.device | None = None) -> Tensor:
    """The 16 values of E2M1 by code (sign, two bits of exponent, one of mantissa), float32 (OCP MX v1.0, table 5)."""
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return torch.tensor(half + [-v for v in half], device=device)


@lru_cache
def _bounds(device: torch.device) -> Tensor:
    """Where a magnitude goes to the next code: half way, and half way itself to the even code."""
    half = e2m1_values()[:8]
    middle = (half[1:] + half[:-1]) / 2
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros(()))
    return middle.to(device)


def quantized(weight: Tensor, rule: Literal["nearest", "floor"] = "nearest") -> tuple[Tensor, Tensor]:
    """Codes uint8 (..., in / 2) and scales uint8 (..., in / 32) of floats (..., in).

    Codes are rounded to nearest, ties to even; the first of a byte lies in its low bits. A scale is the exponent of a
    power of two plus 127. With "floor" it is that of the block's largest value less two, so that values beyond 6 are cut
    off (OCP MX v1.0, section 6.3); "nearest" takes that or the next one up, whichever leaves the smaller squared error.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest)  # largest = m · 2**exponent with m in [1/2, 1)
    exponent = torch.where(largest == 0, 0, exponent - 3).clamp_(-BIAS, _MOST)
    codes, error = _codes(blocks, exponent)
    if rule == "nearest":
        above = (exponent + 1).clamp(max=_MOST)
        others, other = _codes(blocks, above)
        better = 4 * other < error
        codes, exponent = torch.where(better, others, codes), torch.where(better, above, exponent)
    codes = codes.flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent + BIAS).to(torch.uint8).squeeze(-1)


def _codes(blocks: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of blocks (..., 32) under scales 2**exponent (..., 1), and the squared error in units of the scale's square."""
    steps = torch.ldexp(blocks, -exponent)
    codes = torch.bucketize(steps.abs(), _bounds(blocks.device), out_int32=True)
    value = e2m1_values(blocks.device)[codes].copysign_(steps)
    error = (value - steps).square_().sum(-1, keepdim=True)
    return codes.to(torch.uint8) | torch.signbit(steps).to(torch.uint8) << 3, error


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Floats (..., in), float32, exact: the inverse of `quantized`."""
    both = torch.stack([codes & 0xF, codes >> 4], dim=-1)
    value = e2m1_values(codes.device)[both.int()].flatten(-2)
    factor = scale.view(torch.float8_e8m0fnu).float()
    value.unflatten(-1, (-1, BLOCK)).mul_(factor[..., None])
    return value


@dataclass(frozen=True)
class MXFP4(TensorQuantizer):
    """Round-to-nearest E2M1 with a power of two for 32 weights of a row: 4.25 bits a weight.

    Args:
        rule: how a scale is chosen: "nearest" takes the better of two exponents, "floor" is the OCP's rule.

    `dequantize` is exact in every float type, up to its range. Packed tensors: `qweight` uint8 (out, in / 2), stored as
    `weight_packed`; `scale` uint8 (out, in / 32), exponents plus 127, stored as `weight_scale`: compressed-tensors' names
    for them. GPT-OSS stores its experts in the same bytes.
    """

    name: ClassVar[str] = "mxfp4"
    config_conv1d: ClassVar[bool] = False
    stored_names: ClassVar[Mapping[str, str]] = {"qweight": "weight_packed", "scale": "weight_scale"}

    rule: Literal["nearest", "floor"] = "nearest"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=4, devices=frozenset({"cpu", "cuda", "xpu"}), requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> MXFP4:
        for name, shape in shapes:
            if shape[-1] % BLOCK:
                raise BadShape(f"{name} has in_features {shape[-1]}, and MXFP4's blocks have {BLOCK}: skip this weight")
        return self

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        self.resolve([("a weight", tuple(weight.shape))])
        codes, scale = quantized(weight, self.rule)
        return {"qweight": codes, "scale": scale}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        value = dequantized(packed["qweight"], packed["scale"])
        return value.to(dtype) if out is None else out.copy_(value)

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        *front, width = shape
        self.resolve([("a weight", tuple(shape))])
        return {"qweight": ((*front, width // 2), torch.uint8), "scale": ((*front, width // BLOCK), torch.uint8)}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) // 2 + prod(shape) // BLOCK

    def loaded(self, name: str, layer: PackedLinear) -> None:
        if bool((layer.packed["scale"] == 255).any()):
            raise BadFolder(f"{name} has scales that stand for NaN: the checkpoint is damaged")

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": BLOCK,
                   "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}  # fmt: skip
        return compressed_config.written("mxfp4-pack-quantized", weights, skipped)

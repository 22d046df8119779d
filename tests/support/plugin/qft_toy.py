"""A quantizer as a third party would ship it: nothing but qft's public names."""

from dataclasses import dataclass
from typing import ClassVar

import torch

import qft


@dataclass(frozen=True)
class Toy(qft.TensorQuantizer):
    """Symmetric 4-bit integers, two to a byte, one scale a row."""

    name: ClassVar[str] = "toy"
    clip: float = 1.0

    @property
    def capabilities(self):
        return qft.Capabilities(bits=4, devices=frozenset({"cpu", "cuda"}), requantize=True)

    def resolve(self, shapes):
        for name, shape in shapes:
            if shape[-1] % 2:
                raise qft.BadShape(f"{name} has in_features {shape[-1]}, and a byte holds two codes: skip this weight")
        return self

    def pack(self, weight, *, statistics=None):
        scale = (weight.float().abs().amax(1, keepdim=True) * self.clip / 7).clamp(min=1e-30)
        codes = ((weight.float() / scale).round().clamp(-7, 7) + 8).to(torch.uint8)
        return {"qweight": codes[:, ::2] << 4 | codes[:, 1::2], "scale": scale}

    def unpack(self, packed, *, shape, dtype, out=None):
        codes = torch.stack([packed["qweight"] >> 4, packed["qweight"] & 0xF], dim=-1).view(shape)
        value = (codes.float() - 8) * packed["scale"]
        return value.to(dtype) if out is None else out.copy_(value)

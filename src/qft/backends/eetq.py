"""EETQ: int8 with one scale an output channel, in the layout of its CUDA kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadFolder, BadOption, BadShape, UnsupportedOperation
from qft.ops import kernels

TILE = 64
"""The kernel's layout holds tiles of 64 inputs and 64 outputs."""

LARGEST = 65504.0 * 128
"""Of a weight's absolute values: 1/128 of a channel's largest is its scale, in float16."""

_NORMAL = 2.0**-14
"""Scales from here on are float16 to eleven bits; smaller ones are rounded up, so that no channel is cut off."""

_ELSEWHERE = frozenset({"quant_method", "weights", "modules_to_not_convert"})


@dataclass(frozen=True)
class EETQ(TensorQuantizer):
    """Round-to-nearest int8, a scale a row, as EETQ's `quant_weights` does; no calibration, no package needed.

    The scale of a row is 1/128 of its largest absolute value, and codes are in [-128, 127], so that the largest value
    itself, where it is positive, becomes 127. Codes, scales and layout are those that EETQ's source (NetEase-FuXi/EETQ,
    `symmetric_quantize` and `preprocess_weights`) makes, byte for byte; rows whose scale is below float16's normal
    numbers, which EETQ may round down to zero, get the next scale up here. The layers run without EETQ's kernels, of
    which there is no package to install: weights are dequantized, which is exact in float32.

    Packed tensors: `qweight` int8 (in, out), stored as `weight`; `scale` float16 (out,), stored as `weight_scales`. The
    shape of `qweight` is nominal, its bytes are the kernel's for devices of compute capability 7.5 to 8.9 (newer ones
    were not seen): codes plus 128, two rows at a time in tiles of 64 inputs, and inputs within 16 in the order 0 8 1 9
    2 10 3 11 4 12 5 13 ..., as tensor cores take them. All of that is undone exactly. in_features and out_features must
    be multiples of 64, for EETQ, too. Folders and models that EETQ made on an older device (Volta) have another layout,
    and are refused: no row would reach its largest code.
    """

    name: ClassVar[str] = "eetq"
    foreign_types: ClassVar[tuple[str, ...]] = (
        "transformers.integrations.eetq.EetqLinear",
        "eetq.modules.qlinear.EetqLinear",
        "eetq.modules.qlinear.W8A16Linear",
    )
    config_methods: ClassVar[tuple[str, ...]] = ("eetq",)
    config_conv1d: ClassVar[bool] = False
    stored_names: ClassVar[Mapping[str, str]] = {"qweight": "weight", "scale": "weight_scales"}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=8, devices=frozenset({"cpu", "cuda", "mps", "xpu"}), requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> EETQ:
        for name, shape in shapes:
            if shape[0] % TILE or shape[1] % TILE:
                raise BadShape(
                    f"{name} is {shape[0]} × {shape[1]}, and EETQ's layout holds multiples of {TILE} only, on both sides: "
                    "skip this weight, or take int8 or quanto"
                )
        return self

    # ---- codes -------------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        self.resolve([("a weight", tuple(weight.shape))])
        weight = weight.float()
        scale = weight.abs().amax(1) / 128
        if not bool(scale.amax() <= LARGEST / 128):
            raise BadOption(f"eetq: a weight holds values beyond {LARGEST:g}, and EETQ's scales are float16: skip it")
        up = (scale * 2.0**24).ceil() * 2.0**-24
        scale = torch.where(scale < _NORMAL, up, scale)
        steps = weight / torch.where(scale == 0, 1.0, scale)[:, None]
        codes = steps.trunc()
        # halves go away from zero, as C's round has them
        codes += torch.where((steps - codes).abs() >= 0.5, steps.sign(), 0.0)
        return {"qweight": _interleaved(codes.clamp_(-128, 127).to(torch.int8)), "scale": scale.half()}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        value = kernels.eetq(packed["qweight"], packed["scale"], shape=shape, dtype=dtype, out=out)
        if value is not None:
            return value
        value = _plain(packed["qweight"], shape).float().mul_(packed["scale"].float()[:, None])
        return value.to(dtype) if out is None else out.copy_(value)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(s) * kind.itemsize for s, kind in self.template(shape, torch.float16).values())

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"qweight": ((shape[1], shape[0]), torch.int8), "scale": ((shape[0],), torch.float16)}

    # ---- what EETQ, or transformers with it, quantized ---------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        kind = type(module).__name__
        codes: Any = module.qweight if hasattr(module, "qweight") else module.weight
        scale: Any = getattr(module, "weight_scales", None)
        if scale is None or codes.is_meta or codes.dtype != torch.int8:
            raise UnsupportedOperation(f"this {kind} holds no int8 codes with scales yet: load or quantize it first")
        own, shape = cls(), (codes.shape[1], codes.shape[0])
        try:
            own.resolve([(kind, shape)])
            layer = PackedLinear(own, {"qweight": codes, "scale": scale}, shape, scale.dtype, module.bias)
            own.loaded(kind, layer)
        except (BadShape, BadFolder) as error:
            raise UnsupportedOperation(str(error)) from error
        return layer

    def loaded(self, name: str, layer: PackedLinear) -> None:
        codes = _plain(layer.packed["qweight"].detach(), (layer.out_features, layer.in_features))
        scale = layer.packed["scale"].detach().float()
        low, high = codes.amin(1), codes.amax(1)
        # a row's largest value is what its scale was made of; rows of tiny scales may stay below
        full = (low <= -127) | (high == 127) | (scale < _NORMAL)
        if not bool(full.all()):
            raise BadFolder(
                f"{name}: {int((~full).sum())} of {len(full)} rows do not reach EETQ's largest code, so that these bytes "
                "are in another layout than its kernel's for compute capability 7.5 to 8.9 (Volta has another one), or "
                "damaged: quantize the float model again"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EETQ:
        if config.get("weights", "int8") != "int8":
            raise BadOption(f"EetqConfig: weights={config['weights']!r}: EETQ's weights are int8")
        for key, value in config.items():
            if key not in _ELSEWHERE and value not in (None, False):
                raise BadOption(f"this EETQ config has the option {key}={value!r}, which qft does not know")
        return cls()

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        from transformers import EetqConfig

        return EetqConfig(modules_to_not_convert=list(skipped))


def _interleaved(codes: Tensor) -> Tensor:
    """Codes int8 (out, in) in the kernel's order, int8 (in, out); the inverse of `_plain`."""
    out_features, in_features = codes.shape
    # out = 2 · pair + row; in = 64 · tile + 16 · group + 8 · half + 2 · step + side
    parts = (codes ^ -128).view(out_features // 2, 2, in_features // TILE, 4, 2, 4, 2)
    return parts.permute(0, 2, 1, 3, 5, 6, 4).reshape(in_features, out_features)


def _plain(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Codes int8 (out, in) from the kernel's order: pair, tile, row, group, step, side, half."""
    out_features, in_features = shape
    parts = (stored ^ -128).view(out_features // 2, in_features // TILE, 2, 4, 4, 2, 2)
    return parts.permute(0, 2, 1, 3, 6, 4, 5).reshape(out_features, in_features)

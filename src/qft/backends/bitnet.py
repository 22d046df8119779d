"""BitNet b1.58: ternary weights with one scale, four to a byte, as transformers keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadFolder, BadOption, BadShape, UnsupportedOperation
from qft.ops.bits import pack_rows, unpack_rows

PER_BYTE = 4

_LAYERS = "transformers.integrations.bitnet"


@dataclass(frozen=True)
class BitNet(TensorQuantizer):
    """Weights -s, 0 and s, rounded to nearest after a division by s, their mean absolute value (arXiv 2402.17764, eq. 1-3).

    Args:
        inverse: whether the stored scale is 1 / s, as the packed models of transformers' `BitLinear` have it, or s, as
            those of its `AutoBitLinear` (Microsoft's b1.58 2B4T) do.

    Models that were not trained for it do not survive this: on the weights of a trained model the error is about half of
    them. BitNet's own forward rounds activations to 8 bits; the layers here compute with the activations as they are.

    Packed tensors: `qweight` uint8 (out / 4, in), stored as `weight`: row i of each quarter of the rows in the i-th byte,
    the first quarter in the lowest bits, as ternaries plus 1; `scale` (1,), stored as `weight_scale`, in the weight's
    dtype. out_features must be a multiple of 4.
    """

    name: ClassVar[str] = "bitnet"
    config_methods: ClassVar[tuple[str, ...]] = ("bitnet",)
    config_conv1d: ClassVar[bool] = False
    foreign_types: ClassVar[tuple[str, ...]] = (f"{_LAYERS}.BitLinear", f"{_LAYERS}.AutoBitLinear")
    stored_names: ClassVar[Mapping[str, str]] = {"qweight": "weight", "scale": "weight_scale"}

    inverse: bool = True

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=log2(3), devices=frozenset({"cpu", "cuda", "mps", "xpu"}), requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> BitNet:
        for name, shape in shapes:
            if shape[0] % PER_BYTE:
                raise BadShape(
                    f"{name} has out_features {shape[0]}, and BitNet's bytes hold one row of each quarter: skip this weight"
                )
        return self

    # ---- codes -------------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        self.resolve([("a weight", tuple(weight.shape))])
        value = weight.float()
        mean = value.abs().mean().clamp(min=1e-5)
        scale = (1 / mean if self.inverse else mean).to(weight.dtype).view(1)
        codes = (value / self._size(scale)).round_().clamp_(-1, 1) + 1
        return {"qweight": pack_rows(codes, 2, high_first=False), "scale": scale}

    def _size(self, scale: Tensor) -> Tensor:
        """The size of a weight that is not zero, float32 (1,)."""
        return 1 / scale.float() if self.inverse else scale.float()

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        value = out if out is not None else torch.empty(shape, dtype=dtype, device=packed["qweight"].device)
        sizes = self._size(packed["scale"]) * torch.tensor([-1.0, 0.0, 1.0], device=value.device)
        for rows, part in unpack_rows(packed["qweight"], 2, shape[0], high_first=False):
            value[rows] = sizes.to(value.dtype)[part.int()]
        return value

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        self.resolve([("a weight", tuple(shape))])
        return {"qweight": ((shape[0] // PER_BYTE, shape[1]), torch.uint8), "scale": ((1,), dtype)}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return shape[0] * shape[1] // PER_BYTE + 2

    # ---- what transformers, or others for it, quantized --------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        linear: Any = module
        kind = type(module).__name__
        if getattr(linear, "rms_norm", None) is not None:
            raise UnsupportedOperation(
                f"this {kind} normalizes its inputs first (use_rms_norm), which qft's layers do not"
            )
        scale = getattr(linear, "weight_scale", None)
        if scale is None:
            raise UnsupportedOperation(
                f"this {kind} trains its float weight (online): qft trains adapters over packed ones"
            )
        if linear.weight.dtype == torch.uint8:
            own, codes = cls(), linear.weight
            shape = (codes.shape[0] * PER_BYTE, codes.shape[1])
        else:  # an AutoBitLinear has unpacked its ternaries
            own, value, shape = cls(inverse=False), linear.weight.detach(), tuple(linear.weight.shape)
            if shape[0] % PER_BYTE or not bool(((value == 0) | (value.abs() == 1)).all()):
                raise UnsupportedOperation(
                    f"this {kind} holds weights that are not -1, 0 or 1: its checkpoint was not packed"
                )
            codes = pack_rows(value.float() + 1, 2, high_first=False)
        layer = PackedLinear(own, {"qweight": codes, "scale": scale.view(1)}, shape, scale.dtype, linear.bias)
        try:
            own.loaded(kind, layer)
        except BadFolder as error:
            raise UnsupportedOperation(str(error)) from error
        return layer

    def loaded(self, name: str, layer: PackedLinear) -> None:
        codes, scale = layer.packed["qweight"].detach(), layer.packed["scale"].detach().float()
        if bool((codes & (codes >> 1) & 0x55).any()):
            raise BadFolder(f"{name} holds codes beyond -1, 0 and 1: the checkpoint is damaged, or of another format")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise BadFolder(f"{name}.weight_scale is {scale.tolist()}: the checkpoint is damaged")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitNet:
        for key, value in config.items():
            if key not in (
                "quant_method",
                "modules_to_not_convert",
                "linear_class",
                "quantization_mode",
                "rms_norm_eps",
            ):
                if value not in (None, False, []):
                    raise BadOption(f"this BitNet config has {key}={value!r}, which qft does not do")
        if config.get("quantization_mode", "offline") != "offline":
            raise BadOption(
                "this BitNet config has quantization_mode='online': its checkpoint holds float weights, which train and are "
                "rounded in each forward; load it without its quantization_config for a float model"
            )
        kind = config.get("linear_class", "bitlinear")
        if kind not in ("bitlinear", "autobitlinear"):
            raise BadOption(f"this BitNet config has linear_class={kind!r}; qft reads bitlinear and autobitlinear")
        return replace(cls(), inverse=kind == "bitlinear")

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        from transformers import BitNetQuantConfig

        kind = "bitlinear" if self.inverse else "autobitlinear"
        return BitNetQuantConfig(modules_to_not_convert=list(skipped), linear_class=kind)

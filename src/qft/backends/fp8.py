"""FP8: float8_e4m3fn with a float scale a block, a row or a weight, as DeepSeek's, FBGEMM's and transformers' checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadOption, UnsupportedOperation
from qft.ops import kernels
from qft.ops.bits import in_blocks, out_of_blocks, scales_for_rows, times_blocks

BLOCKS = (128, 64, 32)
"""Tried in this order where the size of blocks is left open."""

CODES = torch.float8_e4m3fn
LARGEST = torch.finfo(CODES).max

_SMALLEST = 1e-30
"""Of a block's largest value: the codes of smaller ones would need a scale that float32 does not have."""

_FINE = "transformers.integrations.finegrained_fp8.FP8Linear"
_ROWS = "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear"


@dataclass(frozen=True)
class FP8(TensorQuantizer):
    """Round-to-nearest float8 (e4m3fn): codes are `weight · 448 / largest`, the scale is `largest / 448`.

    Args:
        scaling: "block" (fine-grained FP8, as DeepSeek-V3's), "row" (FBGEMM's) or "tensor" (one scale a weight).
        block_rows, block_columns: of a block; those at the lower and right edges may be cut short. Give both or none: None
            is the largest of 128, 64 and 32 that divides both sides of every target, else 128.
        scale_format: of blocks: "float", float32, or "ue8m0", powers of two in one byte, rounded up.

    Codes and scales equal those of transformers' `Fp8Quantize`, bit for bit, and so does `dequantize`, in float32.
    transformers' and FBGEMM's own kernels round the activations to float8, too, and give other outputs (by some percent);
    the layers here compute with the activations as they are.

    Packed tensors: `qweight` float8_e4m3fn (out, in), stored as `weight`; `weight_scale_inv` (ceil(out / block_rows),
    ceil(in / block_columns)), () for "tensor", or `weight_scale` (out, 1) for "row", of float32 or float8_e8m0fnu. Both
    are multiplied with.
    """

    name: ClassVar[str] = "fp8"
    config_methods: ClassVar[tuple[str, ...]] = ("fp8", "fbgemm_fp8")
    config_conv1d: ClassVar[bool] = False
    foreign_types: ClassVar[tuple[str, ...]] = (_FINE, _ROWS)
    stored_names: ClassVar[Mapping[str, str]] = {"qweight": "weight"}
    stored_notes: ClassVar[frozenset[str]] = frozenset({"activation_scale", "input_scale"})

    scaling: Literal["block", "row", "tensor"] = "block"
    block_rows: int | None = None
    block_columns: int | None = None
    scale_format: Literal["float", "ue8m0"] = "float"

    def __post_init__(self):
        super().__post_init__()
        blocks = (self.block_rows, self.block_columns)
        if self.scaling != "block" and (blocks != (None, None) or self.scale_format != "float"):
            raise BadOption(f"fp8: scaling={self.scaling!r} has no blocks, and float32 scales")
        if (self.block_rows is None) != (self.block_columns is None):
            raise BadOption("fp8: give both block_rows and block_columns, or none of them")
        if any(size is not None and size < 1 for size in blocks):
            raise BadOption(f"fp8: blocks of {self.block_rows} × {self.block_columns}; sizes are positive")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=8, devices=frozenset({"cpu", "cuda", "xpu"}), requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> FP8:
        if self.scaling != "block" or self.block_rows is not None:
            return self
        sides = [side for _, shape in shapes for side in shape]
        size = next((s for s in BLOCKS if all(side % s == 0 for side in sides)), BLOCKS[0])
        return replace(self, block_rows=size, block_columns=size)

    # ---- codes -------------------------------------------------------------------------------------------

    def _block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if self.scaling == "tensor":
            return shape[-2], shape[-1]
        if self.scaling == "row":
            return 1, shape[-1]
        own = self.resolve([("", tuple(shape[-2:]))])
        return own.block_rows, own.block_columns  # type: ignore[return-value]

    @property
    def _scale(self) -> str:
        return "weight_scale" if self.scaling == "row" else "weight_scale_inv"

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        codes, scale = quantized(weight, self._block(tuple(weight.shape)), powers=self.scale_format == "ue8m0")
        if self.scaling == "tensor":
            scale = scale.view(())
        return {"qweight": codes, self._scale: scale}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        codes, scale = packed["qweight"], packed[self._scale]
        block = self._block(shape)
        if kernels.usable(codes) and shape[1] % block[1] == 0:
            # a scale for each row of a block: a 128th of the weight, and the kernel reads it in order
            wide = scales_for_rows(scale.float(), shape, block)
            value = kernels.rows(codes, wide, dtype=dtype, out=out)
            if value is not None:
                return value
        value = dequantized(codes, scale, block)
        return value.to(dtype) if out is None else out.copy_(value)

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = self._block(shape)
        sizes: tuple[int, ...] = () if self.scaling == "tensor" else (-(-shape[0] // rows), -(-shape[1] // columns))
        kind = torch.float8_e8m0fnu if self.scale_format == "ue8m0" else torch.float32
        return {"qweight": (tuple(shape), CODES), self._scale: (sizes, kind)}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(sizes) * kind.itemsize for sizes, kind in self.template(shape, torch.bfloat16).values())

    # ---- what transformers, or others for it, quantized --------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> nn.Module:
        linear: Any = module
        kind, shape = type(module).__name__, tuple(linear.weight.shape)
        if f"{type(module).__module__}.{type(module).__qualname__}" not in cls.foreign_types:
            raise UnsupportedOperation(f"{kind} is no plain linear layer, and qft reads none such in float8")
        if linear.weight.dtype != CODES:
            if linear.weight.element_size() == 1:
                raise UnsupportedOperation(f"this {kind} holds {linear.weight.dtype}, and qft reads {CODES}")
            return _floats(linear)  # transformers leaves weights that its blocks do not divide
        if hasattr(linear, "block_size"):
            scale, block = linear.weight_scale_inv, linear.block_size
            power = "ue8m0" if scale.dtype == torch.float8_e8m0fnu else "float"
            own = cls(scaling="tensor") if block is None else cls("block", *block, scale_format=power)
        else:
            scale, own = linear.weight_scale, cls(scaling="row")
        wanted = own.template(shape, torch.bfloat16)[own._scale][0]
        if tuple(scale.shape) != wanted:
            raise UnsupportedOperation(f"a {kind} of {shape} has scales {tuple(scale.shape)}, and {own!r} has {wanted}")
        packed = {"qweight": linear.weight, own._scale: scale}
        return PackedLinear(own, packed, shape, torch.bfloat16, linear.bias)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FP8:
        if config.get("dequantize"):
            raise BadOption("dequantize=True asks for a float model: leave it out, or load one with transformers")
        if config.get("quant_method") == "fbgemm_fp8":
            _only(config, "activation_scale_ub", "modules_to_not_convert")
            return cls(scaling="row")
        _only(
            config, "activation_scheme", "weight_block_size", "scale_fmt", "fmt", "modules_to_not_convert",
            "ignored_layers", "dequantize", **{"expert_dtype": "fp8"},
        )  # fmt: skip
        if config.get("fmt") not in (None, "e4m3", "e4m3fn"):
            raise BadOption(f"this FP8 config has fmt={config['fmt']!r}, and qft reads e4m3")
        block = config.get("weight_block_size", (128, 128))
        if block is None:
            return cls(scaling="tensor")
        if len(block) != 2:
            raise BadOption(f"this FP8 config has weight_block_size={block!r}: it is two numbers")
        kind = config.get("scale_fmt") or "float"
        if kind not in ("float", "ue8m0"):
            raise BadOption(f"this FP8 config has scale_fmt={kind!r}, and qft reads float and ue8m0")
        return cls("block", *block, scale_format=kind)

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        from transformers import FbgemmFp8Config, FineGrainedFP8Config

        if self.scaling == "row":
            return FbgemmFp8Config(modules_to_not_convert=list(skipped))
        blocks = None if self.scaling == "tensor" else (self.block_rows, self.block_columns)
        return FineGrainedFP8Config(
            weight_block_size=blocks,  # type: ignore[arg-type]
            scale_fmt=self.scale_format,
            modules_to_not_convert=list(skipped),
        )

    def transformers_reads(self, shape: tuple[int, ...]) -> bool:
        # where blocks are cut short, transformers guesses their size by the number of scales
        rows, columns = self._block(shape)
        return shape[0] % rows == 0 and shape[1] % columns == 0


def quantized(weight: Tensor, block: tuple[int, int], *, powers: bool = False) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn (..., out, in) and scales (..., ceil(out / rows), ceil(in / columns)) of floats (..., out, in).

    Scales are float32, or with `powers` float8_e8m0fnu.
    """
    blocks = in_blocks(weight.float(), block)
    largest = blocks.abs().amax((-3, -1))
    factor = LARGEST / torch.where(largest > 0, largest, LARGEST).clamp(min=_SMALLEST)
    scale = 1.0 / factor
    if powers:
        scale = torch.exp2(torch.ceil(torch.log2(scale))).to(torch.float8_e8m0fnu)
        factor = 1.0 / scale.float()
    codes = (blocks * factor[..., :, None, :, None]).clamp_(-LARGEST, LARGEST).to(CODES)
    return out_of_blocks(codes, weight.shape), scale


def dequantized(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Floats (..., out, in), float32: the inverse of `quantized`."""
    return times_blocks(codes.float(), scale.float(), block)


def _floats(module: nn.Module) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=False)  # type: ignore[arg-type]
    linear.weight, linear.bias = module.weight, module.bias  # type: ignore[assignment]
    return linear


def _only(config: Mapping[str, Any], *known: str, **fixed: Any) -> None:
    for key, value in config.items():
        if key in ("quant_method", *known) or value in (None, False, "", fixed.get(key)) or value in ([], {}):
            continue
        raise BadOption(f"this FP8 config has the option {key}={value!r}, which qft does not know")

"""compressed-tensors: the integers and float8 of llm-compressor's and vLLM's checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.backends import compressed_config
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities, Quantizer
from qft.errors import BadFolder, BadOption, BadShape
from qft.ops import kernels
from qft.ops.bits import in_blocks, out_of_blocks, pack_bits, scales_for_rows, times_blocks, unpack_bits

OPEN = (128, 64, 32)
"""Tried in this order where a group size is left open."""

_FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class CompressedTensors(TensorQuantizer):
    """Round-to-nearest integers or float8, in the layouts of compressed-tensors' checkpoints.

    Args:
        format: "pack-quantized", integers of `bits` packed along rows into int32 words; "int-quantized" and
            "float-quantized", a byte for a code; "naive-quantized", as these, by `type`.
        type: "int" or "float" (float8_e4m3fn).
        bits: 2 to 8; 8 where a code has a byte.
        strategy: what shares a scale: a "group" of a row, a row ("channel"), a "block", or the weight ("tensor").
        group_size: it divides in_features; None is the largest of 128, 64 and 32 that divides every target's.
        block_rows, block_columns: of strategy "block".
        symmetric: no zero points.

    `dequantize` is `(code - zero) * scale`, rounded to the dtype of the scales, as compressed-tensors has it. Where a
    config says that activations are quantized, too (W8A8), vendors' kernels round them; the layers here do not.

    Packed tensors: `qweight`, stored as `weight_packed` int32 (out, ceil(in · bits / 32)), the first code in the lowest
    bits, or as `weight` int8 or float8 (out, in); `scale`, stored as `weight_scale`, (out, groups), (out, 1), (1,), or one a
    block, in the weight's dtype; `zero_point`, stored as `weight_zero_point`, int8 like the scales, or packed as the codes
    are, down the columns; with packed codes `weight_shape` int64 (2,).
    """

    name: ClassVar[str] = "compressed-tensors"
    config_methods: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    config_conv1d: ClassVar[bool] = False
    stored_notes: ClassVar[frozenset[str]] = frozenset({"input_scale", "input_zero_point"})

    format: Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"] = "pack-quantized"
    type: Literal["int", "float"] = "int"
    bits: int = 4
    strategy: Literal["group", "channel", "block", "tensor"] = "group"
    group_size: int | None = None
    block_rows: int | None = None
    block_columns: int | None = None
    symmetric: bool = True

    def __post_init__(self):
        super().__post_init__()

        def wrong(what: str) -> BadOption:
            return BadOption(f"compressed-tensors: {what}")

        if self._is_packed:
            if self.type != "int" or not 2 <= self.bits <= 8 or self.strategy == "block":
                raise wrong("pack-quantized has integers of 2 to 8 bits, in groups, rows or one weight")
            if not self.symmetric and self.strategy == "tensor":
                raise wrong("pack-quantized has zero points for groups and rows only")
        elif self.bits != 8:
            raise wrong(f"{self.format} keeps a code in a byte: give bits=8, not {self.bits}")
        if self.format in ("int-quantized", "float-quantized") and self.type != self.format.partition("-")[0]:
            raise wrong(f"{self.format} does not hold type={self.type!r}")
        if self.type == "float" and not self.symmetric:
            raise wrong("float8 has no zero points")
        if (self.strategy == "block") != (self.block_rows is not None) or (self.block_rows is None) != (
            self.block_columns is None
        ):
            raise wrong("strategy='block' wants block_rows and block_columns, and no other does")
        if self.group_size is not None and (self.strategy != "group" or self.group_size < 1):
            raise wrong(f"group_size={self.group_size} with strategy={self.strategy!r}")
        if any(size is not None and size < 1 for size in (self.block_rows, self.block_columns)):
            raise wrong(f"blocks of {self.block_rows} × {self.block_columns}")

    @property
    def _is_packed(self) -> bool:
        return self.format == "pack-quantized"

    @property
    def stored_names(self) -> Mapping[str, str]:  # type: ignore[override]
        codes = "weight_packed" if self._is_packed else "weight"
        names = {"qweight": codes, "scale": "weight_scale"}
        return names if self.symmetric else {**names, "zero_point": "weight_zero_point"}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=self.bits, devices=frozenset({"cpu", "cuda", "xpu"}), requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> CompressedTensors:
        if self.strategy != "group":
            return self
        shapes = list(shapes)
        size = self.group_size
        if size is None:
            size = next((s for s in OPEN if all(shape[-1] % s == 0 for _, shape in shapes)), OPEN[-1])
        for name, shape in shapes:
            if shape[-1] % size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, which groups of {size} do not divide: give a group_size that "
                    "divides every width, strategy='channel', or skip this weight"
                )
        return replace(self, group_size=size)

    def _block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, columns = shape
        if self.strategy == "group":
            size = self.resolve([("a weight", tuple(shape))]).group_size
            return 1, size  # type: ignore[return-value]
        if self.strategy == "block":
            return self.block_rows, self.block_columns  # type: ignore[return-value]
        return (1, columns) if self.strategy == "channel" else (rows, columns)

    # ---- codes -------------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        shape = tuple(weight.shape)
        blocks = in_blocks(weight.float(), self._block(shape))
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        zero = None
        if self.type == "float":
            scale = blocks.abs().amax((-3, -1)) / torch.finfo(_FLOAT8).max
        elif self.symmetric:
            scale = blocks.abs().amax((-3, -1)) / ((high - low) / 2)
        else:
            least, most = blocks.amin((-3, -1)).clamp(max=0), blocks.amax((-3, -1)).clamp(min=0)
            scale = (most - least) / (high - low)
            zero = (low - least / torch.where(scale == 0, 1.0, scale)).round_().clamp_(low, high)
        scale = torch.where(scale == 0, 1.0, scale).to(weight.dtype)
        if weight.dtype == torch.float16:
            scale = scale.clamp(min=2.0**-24)  # its smallest; codes are for the scale as it is stored
        steps = blocks / scale.float()[..., :, None, :, None]
        if self.type == "float":
            top = torch.finfo(_FLOAT8).max
            codes = out_of_blocks(steps.clamp_(-top, top).to(_FLOAT8), shape)
        else:
            if zero is not None:
                steps = steps + zero[..., :, None, :, None]
            codes = out_of_blocks(steps.round_().clamp_(low, high).to(torch.int8), shape)
        packed = {"qweight": codes, "scale": scale.view(1) if self.strategy == "tensor" else scale}
        if zero is not None:
            packed["zero_point"] = zero.to(torch.int8).view(packed["scale"].shape)
        if self._is_packed:
            packed["qweight"] = _words(codes, self.bits)
            if zero is not None:
                packed["zero_point"] = _words(packed["zero_point"].T, self.bits).T.contiguous()
            packed["weight_shape"] = torch.tensor(shape, device=weight.device)
        return packed

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        codes, scale, block = packed["qweight"], packed["scale"], self._block(shape)
        zero = None if self.symmetric else self._zero(packed, shape)
        if kernels.usable(codes):
            value = self._by_kernel(codes, scale, zero, shape, block, dtype, out)
            if value is not None:
                return value
        if self._is_packed:
            value = _plain(codes, self.bits, shape[1]).float()
            if zero is None:
                value.sub_(2 ** (self.bits - 1))
        else:
            value = codes.float()
        if zero is not None:
            value.unflatten(-1, (zero.shape[1], -1)).sub_(zero[..., None])
        # code less zero point is exact in any dtype of scales, and so is its product in float32: it rounds once
        value = times_blocks(value, scale.float(), block).to(scale.dtype)
        return value.to(dtype) if out is None else out.copy_(value)

    def _zero(self, packed: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """What to subtract from the codes as they are stored, float32 (out, groups)."""
        zero = packed["zero_point"]
        if self._is_packed:
            return _plain(zero.T.contiguous(), self.bits, shape[0]).T.float()
        return scales_for_rows(zero.float(), shape, self._block(shape))

    def _by_kernel(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        shape: tuple[int, ...],
        block: tuple[int, int],
        dtype: torch.dtype,
        out: Tensor | None,
    ) -> Tensor | None:
        if shape[1] % block[1]:
            return None
        wide = scale if block[0] == 1 else scales_for_rows(scale, shape, block)
        if not self._is_packed:
            return None if zero is not None else kernels.rows(codes, wide, dtype=dtype, out=out, round_product=True)
        if shape[1] * self.bits % 32:  # rows end within a word
            return None
        tensors = {"qweight": codes.view(-1).view(torch.uint8), "scale": wide}
        if zero is not None:
            tensors["zero_point"] = zero.contiguous()
        return kernels.integers(
            tensors, bits=self.bits, symmetric=zero is None, shape=shape, dtype=dtype, out=out, round_product=True
        )

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        block = self._block(shape)
        sizes = (1,) if self.strategy == "tensor" else (-(-rows // block[0]), -(-columns // block[1]))
        codes = (shape, torch.int8 if self.type == "int" else _FLOAT8)
        if self._is_packed:
            codes = ((rows, -(-columns * self.bits // 32)), torch.int32)
        found = {"qweight": codes, "scale": (sizes, dtype)}
        if not self.symmetric:
            found["zero_point"] = (sizes, torch.int8)
            if self._is_packed:
                found["zero_point"] = ((-(-rows * self.bits // 32), sizes[1]), torch.int32)
        if self._is_packed:
            found["weight_shape"] = ((2,), torch.int64)
        return found

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(sizes) * kind.itemsize for sizes, kind in self.template(shape, torch.bfloat16).values())

    # ---- checkpoints -------------------------------------------------------------------------------------

    def loaded(self, name: str, layer: PackedLinear) -> None:
        if self._is_packed and layer.packed["weight_shape"].tolist() != [layer.out_features, layer.in_features]:
            raise BadFolder(
                f"{name}.weight_shape says {layer.packed['weight_shape'].tolist()}, and the model has "
                f"{[layer.out_features, layer.in_features]}: the checkpoint is of another model, or damaged"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantizer:
        found = compressed_config.read(config)
        if found["format"] == "mxfp4-pack-quantized":
            from qft.backends.mxfp4 import MXFP4

            if found["group_size"] != 32 or found["bits"] != 4 or found["type"] != "float" or not found["symmetric"]:
                raise BadOption(f"mxfp4-pack-quantized with {found!r}: it has float codes of 4 bits in groups of 32")
            return MXFP4()
        rows, columns = found.pop("block_structure") or (None, None)
        return cls(**found, block_rows=rows, block_columns=columns)

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        weights: dict[str, Any] = {
            "num_bits": self.bits, "type": self.type, "symmetric": self.symmetric, "strategy": self.strategy,
            "group_size": self.group_size,
        }  # fmt: skip
        if self.strategy == "block":
            weights["block_structure"] = [self.block_rows, self.block_columns]
        return compressed_config.written(self.format, weights, skipped)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, n) as int32 (rows, ceil(n · bits / 32)): each row's stream of bits from the lowest on."""
    rows, n = codes.shape
    unsigned = codes.to(torch.int16) + 2 ** (bits - 1)
    whole = nn.functional.pad(unsigned, (0, -n % 32)).to(torch.uint8)
    return pack_bits(whole, bits).view(torch.int32).view(rows, -1)[:, : -(-n * bits // 32)].contiguous()


def _plain(words: Tensor, bits: int, n: int) -> Tensor:
    """Unsigned codes uint8 (rows, n): the inverse of `_words`, whose offset stays."""
    whole = nn.functional.pad(words, (0, -words.shape[1] % bits)).contiguous()
    count = whole.shape[1] * 32 // bits
    return unpack_bits(whole.view(torch.uint8).view(-1), bits, len(words) * count).view(len(words), count)[:, :n]

"""NF4, FP4 and affine integers in pure PyTorch: runs on every device, and is the oracle for the other backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qft.backends.algorithms.sinkhorn import column_scales
from qft.core.packed import TensorQuantizer
from qft.core.quantizer import Capabilities, QuantizedWeight
from qft.errors import BadOption, BadShape, UnsupportedOperation
from qft.ops import kernels
from qft.ops.bits import pack_bits, pack_constants, unpack_bits, unpack_constants

GROUP_SIZES = (128, 64, 32)
"""Tried in this order where an affine group size is left open."""

MOST_STEPS = 4096
"""Steps between zero and a group's largest value at most: a zero point beyond that is not exact in 16 bits."""


@lru_cache
def nf4_values() -> Tensor:
    """The 16 values of NF4, ascending, float32 (QLoRA, arXiv 2305.14314, appendix E).

    Quantiles of a standard normal at even steps of probability between 1/2 and 929/960, 8 on the positive side and 7
    on the negative, with zero between them, divided by the largest.
    """
    offset = 929 / 960
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (values / values.max()).float()


@lru_cache
def fp4_values() -> Tensor:
    """The 16 values of bitsandbytes' FP4 by bit pattern (sign, 2 exponent bits, 1 mantissa bit), float32.

    Exponent field e > 0 stands for (1 + m/2) · 2**(4 - e), the subnormal one for 2**-4; divided by the largest, 12.
    """
    half = [0.0, 2.0**-4] + [(1 + m / 2) * 2.0 ** (4 - e) for e in (1, 2, 3) for m in (0, 1)]
    return torch.tensor(half + [-v for v in half]) / 12


@lru_cache
def _codebook(format: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values by code, the bounds between the sorted values, and the code of each sorted value."""
    values = (nf4_values() if format == "nf4" else fp4_values()).to(device)
    ordered, order = values.sort(stable=True)
    return values, (ordered[1:] + ordered[:-1]) / 2, order.to(torch.uint8)


@dataclass(frozen=True)
class Reference(TensorQuantizer):
    """Quantize in pure PyTorch.

    Args:
        format: "nf4" or "fp4" (codebooks over blocks of the flattened weight, bitsandbytes' codes and packing), or
            "int" (affine integers over groups along in_features).
        bits: 2 to 8; the codebooks have 4.
        group_size: weights that share their constants. For the codebooks any positive number, default 64, and the
            last block may be short. For integers it must divide in_features; None is the largest of 128, 64 and 32
            that divides every target's.
        symmetric: integers without a zero point.
        double_quant: store the constants in 8 bits, with one float32 per 256 of them.
        scaling: of integers: "sinq" divides columns by scales of their own first (SINQ, arXiv 2509.22944, section 3), which
            helps where some of them are much larger than others; it costs 16 / out_features bits a weight, and a while.

    Integers decode as `(code - zero_point) * scale` with a float zero point, or `(code - 2**(bits-1)) * scale`.

    Packed tensors: `qweight` uint8; `absmax` float32 (blocks,) for the codebooks; `scale` and `zero_point`
    (out_features, in_features / group_size) in the weight's dtype for integers, scales of float16 weights in bfloat16.
    A zero point that was shifted is float32. With `scaling="sinq"` also `column_scale` (in_features,) in the weight's dtype.
    """

    name: ClassVar[str] = "reference"

    format: Literal["nf4", "fp4", "int"] = "nf4"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    double_quant: bool = False
    scaling: Literal["none", "sinq"] = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.format not in ("nf4", "fp4", "int"):
            raise BadOption(f"reference: format={self.format!r}; it is one of nf4, fp4, int")
        if self.format != "int" and self.bits != 4:
            raise BadOption(f"reference: {self.format} has 4 bits, not {self.bits}; format='int' takes 2 to 8")
        if not 2 <= self.bits <= 8:
            raise BadOption(f"reference: bits={self.bits}; it is 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise BadOption(f"reference: group_size={self.group_size}; it is a positive number of weights")
        if self.format != "int" and self.symmetric:
            raise BadOption(f"reference: symmetric is an option of format='int', not of {self.format}")
        if self.format != "int" and self.scaling != "none":
            raise BadOption(f"reference: scaling is an option of format='int', not of {self.format}")
        if self.format != "int" and self.group_size is None:
            object.__setattr__(self, "group_size", 64)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            bits=self.bits,
            devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
            requantize=True,
            float_zero_points=self.format == "int"
            and not self.symmetric
            and not self.double_quant
            and self.scaling == "none",
        )

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Reference:
        if self.format != "int":
            return self
        shapes = list(shapes)
        if self.group_size is None:
            for size in GROUP_SIZES:
                if all(shape[-1] % size == 0 for _, shape in shapes):
                    return replace(self, group_size=size)
        for name, shape in shapes:
            size = self.group_size or GROUP_SIZES[-1]
            if shape[-1] % size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, which groups of {size} do not divide: "
                    "give a group_size that divides every width, or skip this weight"
                )
        return self

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        return self._pack_int(weight) if self.format == "int" else self._pack_codebook(weight)

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if self.scaling == "sinq":  # the columns' scales last, and in float32
            value = replace(self, scaling="none").unpack(packed, shape=shape, dtype=torch.float32)
            value = value.mul_(packed["column_scale"].float())
            return value.to(dtype) if out is None else out.copy_(value)
        value = self._by_kernel(packed, shape, dtype, out)
        if value is not None:
            return value
        unpack = self._unpack_int if self.format == "int" else self._unpack_codebook
        value = unpack(packed, shape)
        return value.to(dtype) if out is None else out.copy_(value)

    def _by_kernel(
        self, packed: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None
    ) -> Tensor | None:
        if not kernels.usable(packed["qweight"]):
            return None
        if self.format == "int":
            return kernels.integers(packed, bits=self.bits, symmetric=self.symmetric, shape=shape, dtype=dtype, out=out)
        values, _, _ = _codebook(self.format, packed["qweight"].device)
        double = kernels.double_constants(packed, "absmax")
        return kernels.codebook(
            packed["qweight"], packed["absmax"], values, block_size=self.group_size, double=double, shape=shape,
            dtype=dtype, out=out,
        )  # fmt: skip

    def codebook(self, weight: QuantizedWeight) -> kernels.Codebook | None:
        if self.format == "int":
            return None
        packed, own = {n: t.detach() for n, t in weight.module.packed.items()}, weight.module.quantizer
        values, _, _ = _codebook(own.format, packed["qweight"].device)
        double = kernels.double_constants(packed, "absmax")
        return kernels.Codebook(packed["qweight"], packed["absmax"], values, own.group_size, weight.shape, double)

    def group_size_of(self, weight: QuantizedWeight) -> int | None:
        own = weight.module.quantizer
        return weight.shape[-1] // weight.module.scale.shape[-1] if own.capabilities.float_zero_points else None

    def shift(self, weight: QuantizedWeight, delta: Tensor) -> None:
        module = weight.module
        if not module.quantizer.capabilities.float_zero_points:
            raise UnsupportedOperation(
                f"{module.quantizer!r} has no float zero points (capability float_zero_points); format='int' without "
                "symmetric and double_quant has"
            )
        if delta.shape != module.zero_point.shape:
            raise BadShape(
                f"delta is {tuple(delta.shape)}, and this weight has one group for each of {tuple(module.scale.shape)}"
            )
        # (code - zero_point) * scale + delta; float32 from now on, since 16 bits would round the sum
        delta = delta.to(module.scale.device, torch.float32)
        self.restore(weight, {"zero_point": module.zero_point.float() - delta / module.scale.float()})

    def nbytes(self, shape: tuple[int, ...]) -> int:
        n = prod(shape)
        if self.format != "int":
            blocks = -(-n // self.group_size)
            return -(-n // 2) + (_constants_nbytes(blocks) if self.double_quant else 4 * blocks)
        groups = n // (self.group_size or GROUP_SIZES[-1])
        kinds = 1 if self.symmetric else 2
        codes = n if self.bits == 8 else -(-n // 8) * self.bits
        codes += 2 * shape[-1] if self.scaling == "sinq" else 0
        return codes + kinds * (_constants_nbytes(groups) if self.double_quant else 2 * groups)

    # ---- codebooks: blocks of the flattened weight -------------------------------------------------------

    def _pack_codebook(self, weight: Tensor) -> dict[str, Tensor]:
        _, bounds, order = _codebook(self.format, weight.device)
        flat = weight.reshape(-1).float()
        n = flat.numel()
        blocks = torch.nn.functional.pad(flat, (0, -n % self.group_size)).view(-1, self.group_size)
        absmax = blocks.abs().amax(1)
        scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
        codes = order[torch.bucketize(scaled, bounds, out_int32=True)].view(-1)[:n]
        if n % 2:
            codes = torch.cat([codes, order[torch.bucketize(bounds.new_zeros(1), bounds)]])
        packed = {"qweight": codes[::2] << 4 | codes[1::2]}  # bitsandbytes puts the first code in the high bits
        return packed | (pack_constants(absmax, "absmax") if self.double_quant else {"absmax": absmax})

    def _unpack_codebook(self, packed: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        qweight = packed["qweight"]
        values, _, _ = _codebook(self.format, qweight.device)
        n = prod(shape)
        codes = torch.stack([qweight >> 4, qweight & 0xF], dim=1).view(-1)[:n]
        flat = values[codes.int()]
        absmax = unpack_constants(packed, "absmax")
        full = n // self.group_size * self.group_size
        flat[:full].view(-1, self.group_size).mul_(absmax[: full // self.group_size, None])
        if full < n:
            flat[full:].mul_(absmax[-1])
        return flat.view(shape)

    # ---- affine integers: groups along in_features -------------------------------------------------------

    def _pack_int(self, weight: Tensor) -> dict[str, Tensor]:
        size = self.group_size or next((s for s in GROUP_SIZES if weight.shape[-1] % s == 0), GROUP_SIZES[-1])
        if weight.shape[-1] % size:
            raise BadShape(f"in_features {weight.shape[-1]} of {tuple(weight.shape)} is no multiple of {size}")
        if self.scaling == "sinq":
            columns = column_scales(weight, size).to(weight.dtype)
            packed = replace(self, scaling="none")._pack_int((weight.float() / columns.float()).to(weight.dtype))
            return {**packed, "column_scale": columns}
        groups = weight.float().reshape(*weight.shape[:-1], -1, size)
        top = 2**self.bits - 1
        if self.symmetric:
            scale, zero = groups.abs().amax(-1) / (2 ** (self.bits - 1) - 1), None
            scale = _filled(scale) if self.double_quant else scale
        else:
            low, high = groups.amin(-1), groups.amax(-1)
            scale = (high - low) / top
            constant = scale == 0
            # a constant group: one step of its own size, so that code 0 or 1 gives the value
            own = torch.where(low == 0, 1.0, low.abs())
            scale = _filled(scale) if self.double_quant else torch.where(constant, own, scale)
            # a nearly constant one: steps no finer than the stored zero point can count
            steps = 2**20 if weight.dtype == torch.float32 and not self.double_quant else MOST_STEPS
            scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) / steps)
            zero = -low / scale
            if self.double_quant:  # the stored zero point is rounded: leave room for that on both sides
                zero = zero + torch.where(constant, float(2 ** (self.bits - 1)), 0.0)
        scale = torch.where(scale == 0, 1.0, scale)
        # float16 has no room for the scales of small weights; codes are for the scale as it is stored
        packed = self._constants(scale, "scale", torch.bfloat16 if weight.dtype == torch.float16 else weight.dtype)
        if zero is not None:
            packed |= self._constants(zero, "zero_point", weight.dtype)
        # codes for the constants as they are stored, not as they were computed
        stored, offset = self._offsets(packed)
        safe = torch.where(stored == 0, 1.0, stored)[..., None]
        codes = (groups / safe + offset).round_().clamp_(0, top)
        return {"qweight": pack_bits(codes, self.bits), **packed}

    def _constants(self, value: Tensor, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.double_quant:
            return pack_constants(value, name)
        return {name: value.to(dtype)}

    def _offsets(self, packed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        scale = unpack_constants(packed, "scale")
        if self.symmetric:
            return scale, float(2 ** (self.bits - 1))
        return scale, unpack_constants(packed, "zero_point")[..., None]

    def _unpack_int(self, packed: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        scale, offset = self._offsets(packed)
        n = prod(shape)
        codes = unpack_bits(packed["qweight"], self.bits, n).view(*scale.shape, -1)
        return ((codes.float() - offset) * scale[..., None]).view(shape)


def _filled(scale: Tensor) -> Tensor:
    """Scales of constant groups set to the mean of the others: constants in 8 bits share a range with them."""
    mean = scale.sum() / (scale > 0).sum().clamp(min=1)
    return torch.where(scale == 0, torch.where(mean == 0, 1.0, mean), scale)


def _constants_nbytes(n: int) -> int:
    return n + 4 * -(-n // 256) + 4

"""INC (Intel Neural Compressor): weight-only integers, NF4 and HQQ, and float8 with calibrated inputs, in its own tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.backends.algorithms.feedback import doubt, with_feedback
from qft.backends.inc_codes import (
    INPUT_HEADROOM,
    WEIGHT_HEADROOM,
    awq_scales,
    from_nf4,
    grid,
    hqq_weight,
    owners,
    pack_fields,
    packed_integers,
    power_of_two,
    scaled,
    to_float8,
    to_integers,
    to_nf4,
    unpack_fields,
)
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities, QuantizedWeight
from qft.errors import BadOption, BadShape, UnsupportedOperation
from qft.ops import kernels

_WEIGHT_ONLY = "neural_compressor.torch.algorithms.weight_only"
_FP8 = "neural_compressor.torch.algorithms.fp8_quant"

OPEN = (128, 64, 32)
"""Group sizes that are tried in this order where it is left open."""

LARGEST = 65504.0
"""Of float16, in which INC keeps scales."""

INTEGERS = ("rtn", "gptq", "awq")


@dataclass(frozen=True)
class INC(TensorQuantizer):
    """The methods of `neural-compressor-pt`, weight by weight, over its layers' own tensors.

    "rtn" rounds to nearest, "nf4" to NF4's values; codes and constants of float32 weights are INC's to the bit (of 16-bit
    weights INC computes them in 16 bit). "gptq" is rounding with error feedback over INC's grids, in INC's order and
    damping. "awq" searches a scale for each input and a share of the range as INC does, and keeps the scales with the
    layer, as INC's `MulLinear` does, so that nothing else of the model changes. "hqq" is INC's own solver, the one method
    that needs the package. "fp8" is what INC's prepare, calibrate, finalize and convert make of a layer with
    `use_qdq=True, scale_method="maxabs_pow2"`: a float8_e4m3fn weight with one power of two for a scale, and another for
    the inputs, from the largest that calibration saw. Its layers round their inputs to float8, as INC's do; over
    adapters, as everywhere in qft, the layer is x @ dequantize().T. Its weights take no merges.

    Models that INC quantized are taken over with all of these, whatever kernels they had. INC on Gaudi ("hpu") keeps the
    layouts of that device's kernels, which are refused. "hpu" is a device of this backend; none is at hand for tests.

    Args:
        method: "rtn", "nf4", "gptq", "awq", "hqq" or "fp8".
        bits: 2 to 8; 4 for nf4, 8 for fp8, and 2, 3, 4 or 8 for hqq. None is 4, or 8 for fp8.
        group_size: weights of a row that share constants; -1 is the whole row, None the largest of 128, 64 and 32 that
            divides every width. With hqq groups run down the columns, and may end in the next one. None for fp8.
        symmetric: of rtn, gptq and awq: the zero point is the middle code.
        act_order: of gptq: the most active columns first, which have groups of their own then (`g_idx`).
        damp_percent: of gptq: added to the second moment's diagonal, as a share of its mean.

    Packed tensors. Integers: `qweight` int32 (ceil(in / per), out), per = 32 // bits codes to a word, the first in the
    lowest bits; `qzeros` int32 (groups, ceil(out / per)), zero points less one; `scales` float16 (groups, out); `g_idx`
    int32 (in) with act_order; `input_scale` float32 (in) for awq. The weight is `scales * (code - zero)`, rounded to the
    dtype of the scales, times `input_scale`. nf4: `qweight` int32 (out, ceil(in / 8)), `scales` float32 (out, groups).
    hqq: `qweight` uint8, int32 for 3 bits, codes packed along the groups; `scale` and `zero` float16 (1, groups); the
    weight is computed in float16. fp8: `qweight` float8_e4m3fn (out, in), `weight_scale` and `input_scale` float32 ();
    an `input_scale` of zero leaves inputs as they are.
    """

    name: ClassVar[str] = "inc"
    foreign_types: ClassVar[tuple[str, ...]] = (
        f"{_WEIGHT_ONLY}.modules.WeightOnlyLinear",
        f"{_WEIGHT_ONLY}.modules.MulLinear",
        f"{_WEIGHT_ONLY}.hqq.core.HQQLinear",
        f"{_FP8}.patched_module_base.PatchedModuleBase",
    )

    method: Literal["rtn", "nf4", "gptq", "awq", "hqq", "fp8"] = "rtn"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    act_order: bool = False
    damp_percent: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if self.bits is None:
            object.__setattr__(self, "bits", 8 if self.method == "fp8" else 4)
        known = {"nf4": (4,), "fp8": (8,), "hqq": (2, 3, 4, 8)}.get(self.method, tuple(range(2, 9)))
        if self.bits not in known:
            raise BadOption(f"inc: bits={self.bits}; {self.method} has {', '.join(map(str, known))}")
        if self.group_size is not None and (self.group_size < -1 or self.group_size == 0):
            raise BadOption(f"inc: group_size={self.group_size}; a number of weights, or -1 for whole rows")
        if self.method == "fp8" and self.group_size is not None:
            raise BadOption("inc: fp8 has one scale a weight: leave group_size out")
        if self.act_order and self.method not in ("gptq", "rtn"):
            raise BadOption(f"inc: act_order is an option of gptq, and the method is {self.method}")
        if not 0 < self.damp_percent < 1:
            raise BadOption(f"inc: damp_percent={self.damp_percent}; it is above 0 and below 1")

    @property
    def capabilities(self) -> Capabilities:
        fp8 = self.method == "fp8"
        return Capabilities(
            bits=self.bits or 4,
            devices=frozenset({"cpu", "cuda", "hpu"}),
            needs_calibration=self.method in ("gptq", "awq", "fp8"),
            requantize=not fp8,
            exact_forward=not fp8,
        )

    @property
    def statistics_kind(self) -> Literal["diagonal", "full"]:  # type: ignore[override]
        return "diagonal" if self.method == "fp8" else "full"

    @property
    def statistics_through(self) -> Literal["old", "new"]:  # type: ignore[override]
        return "old" if self.method == "fp8" else "new"  # INC's finalize comes before anything is converted

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> INC:
        if self.method == "hqq":
            from qft.backends.inc_layers import check_package

            check_package()
        if self.method == "fp8":
            return self
        if self.act_order and self.method == "rtn":
            raise BadOption("inc: act_order is an option of gptq: write method=gptq")
        shapes, size = list(shapes), self.group_size
        if size is None:
            size = next((s for s in OPEN if all(shape[-1] % s == 0 for _, shape in shapes)), OPEN[-1])
        if self.method == "hqq" and (size == -1 or size % {2: 4, 4: 2}.get(self.bits or 4, 1)):
            raise BadOption(
                f"inc: group_size={size}; groups of {self.bits}-bit hqq fill whole bytes, and none is a row"
            )
        for name, shape in shapes:
            if size != -1 and (prod(shape) if self.method == "hqq" else shape[-1]) % size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, which groups of {size} do not divide: give a group_size that "
                    "divides every width, or skip this weight"
                )
            if self.method in ("gptq", "awq") and size != -1 and size % 128 and 128 % size and size != shape[-1]:
                raise BadOption(f"inc: group_size={size}; with {self.method} it divides 128, or 128 divides it")
        return dataclasses.replace(self, group_size=size)

    # ---- codes -------------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        self.resolve([("a weight", tuple(weight.shape))])
        weight = weight.float()
        if self.method == "fp8":
            scale = power_of_two(weight.abs().amax(), WEIGHT_HEADROOM)
            seen = torch.tensor(0.0 if statistics is None else statistics.input_max, device=weight.device)
            inputs = torch.where(seen > 0, power_of_two(seen, INPUT_HEADROOM), 0.0)
            return {"qweight": to_float8(weight, scale), "weight_scale": scale, "input_scale": inputs}
        size = self._size(weight.shape)
        if self.method == "hqq":
            from qft.backends.inc_layers import solved

            return solved(weight, self.bits or 4, size, INC.foreign_types[2])
        if self.method == "nf4":
            fields, scale = to_nf4(weight, size)
            return {"qweight": pack_fields(fields, 4), "scales": scale}
        if statistics is not None and self.method != "rtn" and statistics.second_moment is None:
            raise BadOption('inc: the statistics hold no second moments: gather the kind "full"')
        bits, more = self.bits or 4, {}
        if self.method == "gptq" and statistics is not None:
            codes, scale, zero, owner = with_feedback(
                weight,
                statistics.second_moment,
                lambda group, _: grid(group.amin(0), group.amax(0), bits, self.symmetric),
                bits=bits,
                group_size=size,
                order="columns" if self.act_order else "given",
                damp=self.damp_percent,
            )
            codes, scale, zero = codes.T, scale.T, zero.T
        else:
            share, inputs = 1.0, torch.ones(weight.shape[1], device=weight.device)
            if self.method == "awq":
                if statistics is not None:
                    inputs, share = awq_scales(weight, statistics, bits, size, self.symmetric)
                    weight = weight * inputs
                more = {"input_scale": 1 / inputs}
            codes, scale, zero = to_integers(weight, bits, size, self.symmetric, share)
            owner = torch.arange(weight.shape[1], device=weight.device, dtype=torch.int32) // size
        if not bool(scale.amax() <= LARGEST):
            raise BadOption(f"inc: a weight's scale is beyond {LARGEST:g}, and INC's scales are float16: skip it")
        if self.act_order:
            more = {"g_idx": owner}
        return {**packed_integers(codes, zero, bits), "scales": scale.T.half().contiguous(), **more}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if self.method in INTEGERS:
            value = self._integers(packed, shape, dtype, None if "input_scale" in packed else out)
            if "input_scale" in packed:
                value = value.float() * packed["input_scale"]
        elif self.method == "fp8":
            value = packed["qweight"].float() * packed["weight_scale"]
        elif self.method == "nf4":
            value = from_nf4(unpack_fields(packed["qweight"], 4, shape[1]))
            value = scaled(value, packed["scales"].float(), self._size(shape), packed.get("g_idx"))
        else:
            value = hqq_weight(packed, self.bits or 4, self.group_size, shape)
        if out is None:
            return value.to(dtype)
        return out if value is out else out.copy_(value)

    def _integers(self, packed: Mapping[str, Tensor], shape: Sequence[int], dtype: Any, out: Tensor | None) -> Tensor:
        bits, (rows, columns), scales = self.bits or 4, shape, packed["scales"]
        owner, size = packed.get("g_idx"), self._size(shape)
        if bits in (2, 4, 8) and scales.dtype == torch.float16 and columns % size == 0 and size % 64 == 0:
            done = kernels.gptq(
                {**packed, "g_idx": packed["qzeros"] if owner is None else owner},
                bits=bits, older=True, ordered=owner is not None, shape=shape, dtype=dtype, out=out,
            )  # fmt: skip
            if done is not None:
                return done
        # float16 arithmetic is emulated on the CPU; codes less zero points are exact, and the product rounds once
        wide = torch.float32 if scales.device.type == "cpu" else scales.dtype
        codes = unpack_fields(packed["qweight"].T.contiguous(), bits, columns).to(wide)
        zero = (unpack_fields(packed["qzeros"], bits, rows) + 1 & 2**bits - 1).T.to(wide)
        scale = scales.T.to(wide)
        if owner is None and columns % size == 0:
            value = codes.view(rows, -1, size).sub_(zero[..., None]).mul_(scale[..., None]).view(rows, columns)
        else:
            owner = owners(owner, columns, size, codes.device)
            value = codes.sub_(zero.index_select(1, owner)).mul_(scale.index_select(1, owner))
        return value.to(scales.dtype)

    def inputs(self, x: Tensor, layer: PackedLinear) -> Tensor:
        if self.method != "fp8":
            return x
        scale = layer.packed["input_scale"]
        # bfloat16 comes out of INC's layer; what rounding did is no part of the gradient
        rounded = to_float8(x.detach(), torch.where(scale > 0, scale, 1.0)).to(x.dtype) * scale.to(x.dtype)
        return x + torch.where(scale > 0, rounded - x.detach(), 0.0)

    def requantize(self, weight: QuantizedWeight, value: Tensor) -> None:
        own = weight.module.quantizer
        if own.method == "fp8":
            raise UnsupportedOperation(
                "inc's fp8 takes no merges, and so none to undo (capability requantize): merge to float with "
                "qft.merge_to_float, and convert that with INC again"
            )
        packed = weight.module.packed
        inputs = packed.get("input_scale")
        if inputs is None:
            super().requantize(weight, value)
            return
        new = own._pack(value.to(inputs.device).float() / inputs, None)
        self.restore(weight, {n: t for n, t in new.items() if n != "input_scale"})

    # ---- sizes -------------------------------------------------------------------------------------------

    def _size(self, shape: Sequence[int]) -> int:
        size = self.group_size or next((s for s in OPEN if shape[-1] % s == 0), OPEN[-1])
        return shape[-1] if size == -1 else size

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(s) * kind.itemsize for s, kind in self.template(shape, torch.float16).values())

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        (rows, columns), bits, size = shape, self.bits or 4, self._size(shape)
        if self.method == "fp8":
            one = ((), torch.float32)
            return {"qweight": (shape, torch.float8_e4m3fn), "weight_scale": one, "input_scale": one}
        if self.method == "hqq":
            groups, per = rows * columns // size, {8: 1, 4: 2, 3: 10, 2: 4}[bits]
            half = ((1, groups), torch.float16)
            codes = ((-(-size // per), groups), torch.int32 if bits == 3 else torch.uint8)
            return {"qweight": codes, "scale": half, "zero": half}
        groups, per = -(-columns // size), 32 // bits
        if self.method == "nf4":
            return {"qweight": ((rows, -(-columns // per)), torch.int32), "scales": ((rows, groups), torch.float32)}
        found = {
            "qweight": ((-(-columns // per), rows), torch.int32),
            "qzeros": ((groups, -(-rows // per)), torch.int32),
            "scales": ((groups, rows), torch.float16),
        }
        if self.act_order:
            found["g_idx"] = ((columns,), torch.int32)
        if self.method == "awq":
            found["input_scale"] = ((columns,), torch.float32)
        return found

    def doubt(self, shape: tuple[int, ...], statistics: Any) -> str | None:
        if self.method != "fp8":
            return doubt(shape, statistics)
        return None if statistics is not None else "no token came through, and their inputs are not rounded to float8"

    # ---- what INC quantized ------------------------------------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        from qft.backends.inc_layers import taken_over

        return taken_over(module, INC)

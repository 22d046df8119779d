"""GPTQ: integers chosen column by column, each taking over what the rounding of those before it broke."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.backends.algorithms.feedback import doubt, nearest, with_feedback
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadFolder, BadOption, BadShape, QftWarning, UnsupportedOperation
from qft.ops import kernels
from qft.ops.bits import pack_bits, unpack_bits

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""What the format's readers take; -1 is one group a row."""

OPEN = (128, 64, 32)
"""Tried in this order where a group size is left open."""

LARGEST = 2.0**15
"""Of a weight's absolute values: scales and products are float16, and end at 65504."""

_LAYERS = "gptqmodel.nn_modules.qlinear"
_PLAIN = tuple(
    f"{_LAYERS}.{name}"
    for name in ("torch.TorchLinear", "torch_fused.TorchFusedLinear", "torch_aten_kernel.TorchAtenLinear")
)
"""gptqmodel's layers that keep the checkpoint's layout, with zero points of its second version, for as long as their
`linear_mode` is not "inference"; the Triton layer is a TorchLinear."""


@dataclass(frozen=True)
class GPTQ(TensorQuantizer):
    """GPTQ (arXiv 2210.17323), in the layout of its checkpoints: AutoGPTQ's, gptqmodel's, transformers'.

    The algorithm is our own, over qft's statistics, so that one pass over the calibration data serves inits too, any
    device will do, and no package has to be installed; `with_feedback` has it. Statistics are those of a block whose
    predecessors are quantized already. Without statistics, as in a merge, weights are rounded to nearest.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns that share their constants: 16 to 1024, a power of two that divides in_features; -1 is the
            whole row; None is the largest of 128, 64 and 32 that divides every target's.
        desc_act: round the most active columns first and group them in that order; `g_idx` has each column's group.
        act_group_aware: without desc_act, round the most active groups, and columns of a group, first; the layout
            does not show it.
        symmetric: zero points in the middle of the range.
        damp_percent: added to the second moment's diagonal, as a share of its mean.
        checkpoint_format: "gptq" stores zero points less one, "gptq_v2" as they are. Both are read by gptqmodel; in
            the first, asymmetric zero points are at least 1, so that no reader takes a stored -1 for something else.

    Packed tensors: `qweight` int32 (in · bits / 32, out), codes along in_features, the first in the lowest bits (three
    words hold 32 codes of 3 bits); `qzeros` int32 (groups, out · bits / 32), in the same way; `scales` float16 (groups,
    out); `g_idx` int32 (in). Widths that fill no last word are padded with zeros; 3 bits want multiples of 32.
    The weight is `scales * (code - zero)`, rounded to the dtype of the scales, as gptqmodel computes it.
    """

    name: ClassVar[str] = "gptq"
    statistics_kind: ClassVar[Literal["diagonal", "full"]] = "full"
    statistics_through: ClassVar[Literal["old", "new"]] = "new"
    config_methods: ClassVar[tuple[str, ...]] = ("gptq",)
    foreign_types: ClassVar[tuple[str, ...]] = (f"{_LAYERS}.GPTQQuantLinear", f"{_LAYERS}.bitblas.BitblasLinear")

    bits: int = 4
    group_size: int | None = None
    desc_act: bool = False
    act_group_aware: bool = True
    symmetric: bool = True
    damp_percent: float = 0.05
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (2, 3, 4, 8):
            raise BadOption(f"gptq: bits={self.bits}; it is 2, 3, 4 or 8")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise BadOption(f"gptq: group_size={self.group_size}; it is one of {', '.join(map(str, GROUP_SIZES))}")
        if not 0 < self.damp_percent < 1:
            raise BadOption(f"gptq: damp_percent={self.damp_percent}; it is above 0 and below 1")
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise BadOption(f"gptq: checkpoint_format={self.checkpoint_format!r}; it is gptq or gptq_v2")

    @property
    def capabilities(self) -> Capabilities:
        devices = frozenset({"cpu", "cuda", "xpu"})
        return Capabilities(bits=self.bits, devices=devices, needs_calibration=True, requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> GPTQ:
        shapes = list(shapes)
        for name, shape in shapes:
            if self.bits == 3 and (shape[0] % 32 or shape[1] % 32):
                raise BadShape(
                    f"{name} is {shape[0]} × {shape[1]}, and GPTQ's 3-bit layout holds multiples of 32 only: take 4 bits, "
                    "or skip this weight"
                )
        size = self.group_size
        if size is None:
            size = next((s for s in OPEN if all(shape[-1] % s == 0 for _, shape in shapes)), OPEN[-1])
        for name, shape in shapes:
            if size != -1 and shape[-1] % size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, which groups of {size} do not divide: give a group_size that "
                    "divides every width, or skip this weight"
                )
        return replace(self, group_size=size)

    # ---- codes -------------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        self._resolved(weight.shape)
        size = self._group_size(weight.shape)
        if not bool(weight.abs().amax() <= LARGEST):
            raise BadOption(f"gptq: a weight holds values beyond {LARGEST:g}, and GPTQ's scales are float16: skip it")
        if statistics is None:
            columns = weight.T.float().reshape(-1, size, weight.shape[0])
            scale, zero = self._constants(columns)
            codes = nearest(columns, scale, zero, self.bits).view(weight.shape[1], -1)
            owner = natural(weight.shape[1], size, weight.device)
        else:
            if statistics.second_moment is None:
                raise BadOption('gptq: the statistics hold no second moments: gather the kind "full"')
            codes, scale, zero, owner = with_feedback(
                weight,
                statistics.second_moment,
                lambda group, _: tuple(t[0] for t in self._constants(group[None])),
                bits=self.bits,
                group_size=size,
                order="columns" if self.desc_act else "groups" if self.act_group_aware else "given",
                damp=self.damp_percent,
            )
        stored = zero - 1 if self.checkpoint_format == "gptq" else zero
        return {
            "qweight": _words(codes.T, self.bits).T.contiguous(),
            "qzeros": _words(stored, self.bits),
            "scales": scale.half(),
            "g_idx": owner,
        }

    def _constants(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, as float16 keeps it, and zero point of groups (any, group_size, out), float32 (any, out)."""
        top = 2**self.bits - 1
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        if self.symmetric:
            scale = 2 * torch.maximum(-low, high) / top
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            scale = (high - low) / top
            zero = (-low / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, top)
            if self.checkpoint_format == "gptq":
                scale = torch.where(zero < 1, high / (top - 1), scale)
                zero = zero.clamp(min=1)
        scale = torch.where(scale == 0, 1.0, scale).half().clamp(min=2.0**-24)  # float16's smallest
        return scale.float(), zero

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        older = self.checkpoint_format == "gptq"
        value = kernels.gptq(
            packed, bits=self.bits, older=older, ordered=self.desc_act, shape=shape, dtype=dtype, out=out
        )
        if value is not None:
            return value
        rows, columns = shape
        scales, zero = packed["scales"], self._zeros(packed["qzeros"], rows)
        # float16 arithmetic is emulated on the CPU; codes less zero points are exact, and the product rounds once
        wide = torch.float32 if scales.device.type == "cpu" else scales.dtype
        scale, zero = scales.T.to(wide), zero.T.to(wide)
        words = packed["qweight"].T.contiguous()
        codes = unpack_bits(words.view(torch.uint8).view(-1), self.bits, words.numel() * 32 // self.bits)
        value = codes.view(rows, -1)[:, :columns].to(wide)
        if self.desc_act:
            owner = packed["g_idx"].to(words.device)
            value.sub_(zero.index_select(1, owner)).mul_(scale.index_select(1, owner))
        else:
            value = (
                value.view(rows, scale.shape[1], -1).sub_(zero[..., None]).mul_(scale[..., None]).view(rows, columns)
            )
        value = value.to(scales.dtype)
        return value.to(dtype) if out is None else out.copy_(value)

    def _zeros(self, words: Tensor, rows: int) -> Tensor:
        """Zero points by group, uint8 (groups, out); those of version one wrap as in gptqmodel."""
        older = self.checkpoint_format == "gptq"
        if older and self.bits != 3:  # one more in each field, carried over as in the addition of whole words
            words = words + (0x01010101 if self.bits == 8 else 0x11111111 if self.bits == 4 else 0x55555555)
        words = words.contiguous()
        count = words.shape[1] * 32 // self.bits
        codes = unpack_bits(words.view(torch.uint8).view(-1), self.bits, len(words) * count).view(-1, count)[:, :rows]
        return codes + 1 & 7 if older and self.bits == 3 else codes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(
            kind.itemsize * (sizes[0] * sizes[1] if len(sizes) == 2 else sizes[0])
            for sizes, kind in self.template(shape, torch.float16).values()
        )

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        groups = -(-columns // self._group_size(shape))
        return {
            "qweight": ((-(-columns * self.bits // 32), rows), torch.int32),
            "qzeros": ((groups, -(-rows * self.bits // 32)), torch.int32),
            "scales": ((groups, rows), torch.float16),
            "g_idx": ((columns,), torch.int32),
        }

    def _group_size(self, shape: Sequence[int]) -> int:
        size = self.group_size or next((s for s in OPEN if shape[-1] % s == 0), OPEN[-1])
        return shape[-1] if size == -1 else size

    def _resolved(self, shape: Sequence[int]) -> None:
        self.resolve([("a weight", tuple(shape))])

    def doubt(self, shape: tuple[int, ...], statistics: Any) -> str | None:
        return doubt(shape, statistics)

    # ---- other tools' models -----------------------------------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> nn.Module:
        kinds = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
        kind = type(module).__name__
        again = 'load the model with qft, or with GPTQConfig(bits=..., backend="auto_trainable")'
        if not kinds.intersection(_PLAIN) or kind == "TorchQuantEmbeddings":
            raise UnsupportedOperation(f"{kind} keeps its codes in a layout that only its own kernel reads: {again}")
        mode = getattr(module, "linear_mode", None)
        if str(getattr(mode, "value", mode)) == "inference" or getattr(module, "_cpu_transformed", False):
            raise UnsupportedOperation(f"{kind} has repacked its codes in its first forward: {again}, and use that")
        for what in ("adapter", "had_K", "planar"):
            if getattr(module, what, None) not in (None, False):
                raise UnsupportedOperation(f"{kind} computes with {what}={getattr(module, what)!r}, which qft does not")
        if module.qweight.dtype != torch.int32:
            raise UnsupportedOperation(f"{kind} packs codes in {module.qweight.dtype} words, and qft reads int32 ones")
        shape = (module.out_features, module.in_features)
        asked = getattr(module, "requested_group_size", module.group_size)
        quantizer = cls(bits=module.bits, group_size=asked, checkpoint_format="gptq_v2")
        zero = quantizer._zeros(module.qzeros, module.out_features)
        # optimum gives its layers `sym` in the place of `desc_act`, and the other way round: the zero points know
        symmetric, everywhere = bool((zero == 2 ** (module.bits - 1)).all()), bool((zero == zero[0, 0]).all())
        if everywhere and not symmetric and zero.numel() >= 32:
            raise UnsupportedOperation(
                f"every zero point of this {kind} is {int(zero[0, 0])}, and the middle is {2 ** (module.bits - 1)}: its "
                "checkpoint's format was mistaken for another when it was loaded; load the folder with qft"
            )
        desc_act = bool(module.desc_act if symmetric == bool(module.sym) else module.sym)
        quantizer = replace(quantizer, symmetric=symmetric, desc_act=desc_act)
        device = module.qweight.device
        packed = {n: getattr(module, n).detach().to(device) for n in ("qweight", "qzeros", "scales", "g_idx")}
        # tensors that were made under inference_mode cannot be changed in place
        packed = {n: t.clone() if t.is_inference() else t for n, t in packed.items()}
        layer = PackedLinear(quantizer, packed, shape, packed["scales"].dtype, module.bias)
        quantizer.loaded(type(module).__name__, layer)
        return layer

    def loaded(self, name: str, layer: PackedLinear) -> None:
        owner, (groups, _) = layer.packed["g_idx"], layer.packed["scales"].shape
        if int(owner.min()) < 0 or int(owner.max()) >= groups:
            raise BadFolder(f"{name}.g_idx names groups that there are not ({groups} are): the model is damaged")
        quantizer = self._as_stored(name, layer)
        size = self._group_size((layer.out_features, layer.in_features))
        if not self.desc_act and not torch.equal(owner, natural(layer.in_features, size, owner.device)):
            quantizer = replace(quantizer, desc_act=True)
        layer.quantizer = quantizer

    def _as_stored(self, name: str, layer: PackedLinear) -> GPTQ:
        """Symmetric zero points lie in the middle: by that, a config that names the wrong format is found out.

        optimum saves version one under a config that says two, and transformers version two under one that says one.
        """
        if not self.symmetric:
            return self
        both = (self, replace(self, checkpoint_format="gptq_v2" if self.checkpoint_format == "gptq" else "gptq"))
        for quantizer in both:
            zero = quantizer._zeros(layer.packed["qzeros"].detach(), layer.out_features)
            if bool((zero == 2 ** (self.bits - 1)).all()):
                if quantizer is not self:
                    warnings.warn(
                        f"this checkpoint's config says {self.checkpoint_format}, and its zero points are those of "
                        f"{quantizer.checkpoint_format}: they are read as such",
                        QftWarning,
                        stacklevel=2,
                    )
                return quantizer
        if bool((zero == zero[0, 0]).all()):
            raise BadFolder(
                f"{name}: the config says symmetric, and every zero point is off the middle by the same amount, as rounds "
                "of loading and saving in other tools leave them: take the checkpoint that was saved first"
            )
        return replace(self, symmetric=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPTQ:
        from qft.backends.gptq_config import read

        return cls(**read(config))

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        return self.transformers_config_for([], skipped, dtype)

    def transformers_config_for(
        self, quantized: list[str], skipped: list[str], dtype: torch.dtype | None
    ) -> Any | None:
        from qft.backends.gptq_config import written

        return written(self, quantized, skipped)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) as int32 (rows, ceil(n · bits / 32)), each row's stream of bits from the lowest on."""
    rows, n = codes.shape
    per_words = 32 if bits == 3 else 32 // bits
    whole = nn.functional.pad(codes, (0, -n % per_words)).to(torch.uint8)
    return pack_bits(whole, bits).view(torch.int32).view(rows, -1)


def natural(columns: int, size: int, device: torch.device) -> Tensor:
    """`g_idx` of groups that follow each other, int32 (in,)."""
    return torch.arange(columns, device=device, dtype=torch.int32) // size

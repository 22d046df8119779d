"""AQLM: groups of weights as sums of codebook vectors, in the layout of the `aqlm` package, fitted here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qft.backends.algorithms import additive, feedback
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadFolder, BadOption, BadShape, UnsupportedOperation
from qft.ops import kernels

LARGEST = 2.0**20
"""Of a weight's absolute values: scales and codebooks, which share their size, may be float16, which ends at 65504."""

_NAMES = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")
_ELSEWHERE = frozenset({"quant_method", "linear_weights_not_to_quantize", "modules_to_not_convert"})


@dataclass(frozen=True)
class AQLM(TensorQuantizer):
    """Additive quantization (AQLM, arXiv 2401.06118), in the layout of the `aqlm` package, which ships no quantizer.

    A group of `out_group_size` rows by `in_group_size` columns is the sum of one vector from each codebook, times a
    scale that a row of groups shares. Codes, codebooks and scales are fitted to what the layer reads
    (`qft.backends.algorithms.additive`),
    by data that went through the blocks before, quantized already; no package is needed, and what the paper does after
    that, tuning whole blocks, is left to adapters. Without statistics, as in a merge, errors of all weights count alike.

    A bits-per-weight figure counts everything: a codebook is 2**nbits_per_codebook vectors in 16 bits a number, which
    is little for 2 × 8 bits and much for 1 × 16 (8 Mbit, a quarter bit a weight from 4096 × 8192 on).

    Args:
        num_codebooks: vectors that are summed.
        nbits_per_codebook: bits of a code, 1 to 16. The package stores them in whole bytes: 12 bits take 16.
        in_group_size: columns a group; it must divide in_features.
        out_group_size: rows a group; it must divide out_features. The package's kernels want 1.
        rounds: of codes and codebooks; more take proportionally longer.
        beam: codings of a row that are searched side by side; time grows with its square, with one codebook as it does.
        damp_percent: added to the second moment's diagonal, as a share of its mean.

    Packed tensors: `qweight` (stored as `codes`) int8, or int16 from 9 bits on, (out / out_group_size,
    in / in_group_size, num_codebooks), codes of the upper half stored negative; `codebooks` (num_codebooks, 2**bits,
    out_group_size, in_group_size) and `scales` (out / out_group_size, 1, 1, 1), in the weight's dtype, float16 for
    float32 weights. The weight is computed in float32, and rounded once; the package rounds the sum, too.
    """

    name: ClassVar[str] = "aqlm"
    statistics_kind: ClassVar = "full"
    statistics_through: ClassVar = "new"
    config_methods: ClassVar[tuple[str, ...]] = ("aqlm",)
    config_conv1d: ClassVar[bool] = False
    foreign_types: ClassVar[tuple[str, ...]] = ("aqlm.inference.QuantizedLinear",)
    stored_names: ClassVar[Mapping[str, str]] = {"qweight": "codes"}

    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8
    out_group_size: int = 1
    rounds: int = 3
    beam: int = 4
    damp_percent: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        for option, low, high in (
            ("num_codebooks", 1, 16),
            ("nbits_per_codebook", 1, 16),
            ("in_group_size", 1, 64),
            ("out_group_size", 1, 64),
            ("rounds", 1, 100),
            ("beam", 1, 64),
        ):
            if not low <= getattr(self, option) <= high:
                raise BadOption(f"aqlm: {option}={getattr(self, option)}; it is {low} to {high}")
        if not 0 < self.damp_percent < 1:
            raise BadOption(f"aqlm: damp_percent={self.damp_percent}; it is above 0 and below 1")

    @property
    def capabilities(self) -> Capabilities:
        bits = self.num_codebooks * self.nbits_per_codebook / (self.in_group_size * self.out_group_size)
        return Capabilities(
            bits=bits, devices=frozenset({"cpu", "cuda", "xpu"}), needs_calibration=True, requantize=True
        )

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> AQLM:
        for name, shape in shapes:
            for side, size, option in (
                ("in_features", shape[-1], "in_group_size"),
                ("out_features", shape[-2], "out_group_size"),
            ):
                if size % getattr(self, option):
                    raise BadShape(
                        f"{name} has {side} {size}, which groups of {getattr(self, option)} do not divide: give an {option} "
                        "that divides every weight's, or skip this one"
                    )
        return self

    # ---- codes -------------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        self.resolve([("a weight", tuple(weight.shape))])
        if not bool(weight.abs().amax() <= LARGEST):
            raise BadOption(f"aqlm: a weight holds values beyond {LARGEST:g}, and AQLM's constants are 16-bit: skip it")
        if statistics is not None and statistics.second_moment is None:
            raise BadOption('aqlm: the statistics hold no second moments: gather the kind "full"')
        found = additive.fit(
            weight,
            None if statistics is None else statistics.second_moment,
            num_codebooks=self.num_codebooks,
            codebook_size=2**self.nbits_per_codebook,
            in_group_size=self.in_group_size,
            out_group_size=self.out_group_size,
            rounds=self.rounds,
            beam=self.beam,
            damp=self.damp_percent,
        )
        kind = _constants(weight.dtype)
        # codebooks come with numbers of order one: half of the scales' magnitude goes there, for float16's sake
        half = (found.scales.amax().clamp(min=2.0**-60).log2() / 2).floor().exp2()
        return {
            "qweight": _signed(found.codes, self.nbits_per_codebook),
            "codebooks": (found.codebooks * half).to(kind),
            "scales": (found.scales / half).to(kind).view(-1, 1, 1, 1),
        }

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        value = kernels.additive(packed, bits=self.nbits_per_codebook, shape=shape, dtype=dtype, out=out)
        if value is not None:
            return value
        codes = packed["qweight"].to(torch.int32) & (2**self.nbits_per_codebook - 1)
        value = additive.decode(codes, packed["codebooks"])
        value.view(codes.shape[0], -1).mul_(packed["scales"].float().view(-1, 1))
        return value.to(dtype) if out is None else out.copy_(value)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(s) * kind.itemsize for s, kind in self.template(shape, torch.bfloat16).values())

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape[0] // self.out_group_size, shape[1] // self.in_group_size
        kind, size = _constants(dtype), 2**self.nbits_per_codebook
        return {
            "qweight": ((rows, columns, self.num_codebooks), _words(self.nbits_per_codebook)),
            "codebooks": ((self.num_codebooks, size, self.out_group_size, self.in_group_size), kind),
            "scales": ((rows, 1, 1, 1), kind),
        }

    def doubt(self, shape: tuple[int, ...], statistics: Any) -> str | None:
        template = self.template(shape, torch.bfloat16)
        codes, books = (8 * prod(s) * kind.itemsize / prod(shape) for s, kind in list(template.values())[:2])
        if books > codes:
            return (
                f"its codebooks take {books:.1f} bits a weight of {shape[0]} × {shape[1]}, and its codes {codes:.1f}: "
                "fewer or smaller codebooks (2 × 8 bits) spend them better"
            )
        return feedback.doubt(shape, statistics)

    def loaded(self, name: str, layer: PackedLinear) -> None:
        for key in ("codebooks", "scales"):
            if not bool(layer.packed[key].isfinite().all()):
                raise BadFolder(f"{name}.{key} holds NaN or infinity: the model is damaged")
        if self.nbits_per_codebook not in (8, 16):
            codes, half = layer.packed["qweight"], 2 ** (self.nbits_per_codebook - 1)
            if int(codes.min()) < -half or int(codes.max()) >= half:
                raise BadFolder(
                    f"{name}.codes holds codes of more than {self.nbits_per_codebook} bits: the model is damaged"
                )

    # ---- the package's kernels ---------------------------------------------------------------------------

    def native(self, layer: PackedLinear, x: Tensor) -> Tensor:
        from qft.backends.aqlm_kernels import multiply

        return multiply(self, layer, x)

    # ---- other tools' models -----------------------------------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        codes, books, scales = (getattr(module, n).detach() for n in ("codes", "codebooks", "scales"))
        if codes.is_meta:
            raise UnsupportedOperation("this QuantizedLinear holds no codes yet: load the model first")
        count, size, high, wide = books.shape
        shape = (module.out_features, module.in_features)
        rows, groups = shape[0] // high, shape[1] // wide
        ran = size == 256 and getattr(module, "gemv_op", None) is not None
        if ran and rows == groups:
            raise UnsupportedOperation(
                f"this QuantizedLinear of {shape[0]} × {shape[1]} has run, and the first run on a CPU turns its codes round, "
                "which with as many groups of rows as of columns leaves no trace: load the model again, and use that"
            )
        if ran and codes.shape == (groups, rows, count):  # aqlm's numba kernel wants them so
            codes = codes.transpose(0, 1).contiguous()
        quantizer = cls(count, size.bit_length() - 1, wide, high)
        packed = {"qweight": codes, "codebooks": books, "scales": scales}
        wanted = {n: s for n, (s, _) in quantizer.template(shape, books.dtype).items()}
        if {n: tuple(t.shape) for n, t in packed.items()} != wanted:
            raise UnsupportedOperation(f"this QuantizedLinear has tensors of other shapes than {wanted}")
        packed = {n: t.clone() if t.is_inference() else t for n, t in packed.items()}
        layer = PackedLinear(quantizer, packed, shape, books.dtype, module.bias)
        try:
            quantizer.loaded("QuantizedLinear", layer)
        except BadFolder as error:
            raise UnsupportedOperation(str(error)) from error
        return layer

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AQLM:
        for key, value in config.items():
            if key not in _NAMES and key not in _ELSEWHERE and value not in (None, False):
                raise BadOption(f"this AQLM config has the option {key}={value!r}, which qft does not know")
        # transformers' own defaults are 1 × 16
        defaults = {"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8, "out_group_size": 1}
        return cls(**{n: config.get(n, default) for n, default in defaults.items()})

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        from transformers import AqlmConfig

        # as weights for transformers 4, and as modules for 5, which takes them for patterns
        names: Sequence[str] = [form for n in skipped for form in (n, f"{n.strip('^$')}.weight")]
        return AqlmConfig(**{n: getattr(self, n) for n in _NAMES}, linear_weights_not_to_quantize=list(names))


def _constants(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16


def _words(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16


def _signed(codes: Tensor, bits: int) -> Tensor:
    return torch.where(codes < 2 ** (bits - 1), codes, codes - 2**bits).to(_words(bits))

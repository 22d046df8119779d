"""SINQ: integers in groups along rows, and a scale of every column that evens the weight out first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qft.backends.algorithms.sinkhorn import column_scales
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities, as_float_dtype
from qft.core.shard_index import read_weight_map
from qft.errors import BadFolder, BadOption, BadShape, UnsupportedOperation
from qft.ops import kernels
from qft.ops.bits import codes_per_word, in_groups, pack_rows, unpack_rows

BITS = (2, 3, 4, 5, 6, 8)
TILE = 32
"""Scales that share a step and a least value where they are kept in 8 bits: those that are groups / 32 apart."""

SMALLEST_GROUP = 16
SIDECAR = "model.safetensors.index.json.meta.json"

_METHODS = ("sinq", "asinq")
_ELSEWHERE = frozenset({
    # what was quantized, notes, and the package's own marks; transformers ignores `_extra_kwargs`, too
    "quant_method", "nbits", "group_size", "method", "tiling_mode", "modules_to_not_convert", "_extra_kwargs",
    "sinq", "backend", "quantization_method", "sinq_version",
})  # fmt: skip
_TENSORS = {
    "scale": "scale.x",
    "scale_step": "scale.s",
    "scale_low": "scale.m",
    "zero_point": "zero.x",
    "zero_point_step": "zero.s",
    "zero_point_low": "zero.m",
    "column_scale": "scale2",
}
"""Packed tensor → its place in a layer's `meta`."""


@dataclass(frozen=True)
class SINQ(TensorQuantizer):
    """Sinkhorn-normalized integers (SINQ, arXiv 2509.22944), without calibration, in the layout of the `sinq` package.

    Args:
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: neighbours in a row that share a scale and a zero point. Where it does not divide in_features it is
            halved, down to 16, as in the package.
        double_quant: scales and zero points in 8 bits, the package's "sinq" and "asinq"; the number of groups in a weight
            is then a multiple of 32. False keeps them in float16.

    A weight decodes as `(code - zero_point) * scale * column_scale`, in float32; 8-bit constants as `code * step + low` in
    float16, as in the package. Weights are rounded to the constants as they are stored, and zero points are codes. The
    package is not needed.

    Packed tensors: `qweight` (its W_q) uint8, for 3, 5 and 6 bits int32, codes packed along the groups; `scale` and
    `zero_point` float16 (groups, 1), or uint8 (32, groups / 32) and (groups, 1) with `scale_step`, `scale_low` float16
    (1, groups / 32) and `zero_point_step`, `zero_point_low` float16 (1, 1); `column_scale` float16 (1, in_features).
    """

    name: ClassVar[str] = "sinq"
    config_methods: ClassVar[tuple[str, ...]] = ("sinq",)
    foreign_types: ClassVar[tuple[str, ...]] = ("sinq.sinqlinear.SINQLinear", "sinq.sinqlinear_hf.SINQLinear")
    folder_marks: ClassVar[tuple[str, ...]] = (SIDECAR,)
    stored_names: ClassVar[Mapping[str, str]] = {"qweight": "W_q", **{k: f"meta.{v}" for k, v in _TENSORS.items()}}

    bits: int = 4
    group_size: int = 64
    double_quant: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in BITS:
            raise BadOption(f"sinq: bits={self.bits}; it is one of {', '.join(map(str, BITS))}")
        if self.group_size < 8 or self.group_size % 8:
            raise BadOption(f"sinq: group_size={self.group_size}; it is a multiple of 8")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=self.bits, devices=frozenset({"cpu", "cuda", "mps", "xpu"}), requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> SINQ:
        for name, shape in shapes:
            self._groups(shape, name)
        return self

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        size, _ = self._groups(tuple(weight.shape))
        value, top = weight.float(), 2**self.bits - 1
        largest = value.abs().amax()
        # float16 holds neither side's constants of small weights; a power of two between them changes no code
        factor = torch.where(largest > 0, largest, 1.0).log2().floor().clamp(-14, 14).exp2()
        columns = (column_scales(value, size) * factor).clamp(2.0**-24, 6e4).half()[None]
        rows = in_groups(value / columns.float(), size)
        low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / top).clamp(max=6e4)
        packed = {"column_scale": columns}
        if self.double_quant:
            tiled = scale.view(TILE, -1)
            # any scale suits a group of zeros: one that does not widen the range of its tile
            tiled = torch.where(tiled == 0, tiled.amax(0, keepdim=True), tiled)
            tiled = torch.where(tiled == 0, 1.0, tiled)
            least = tiled.amin(0, keepdim=True).clamp(min=2.0**-24)
            step = ((tiled.amax(0, keepdim=True) - least) / 255).half()
            codes = (tiled - least.half().float()) / torch.where(step == 0, 1.0, step.float())
            # upwards, so that no weight is cut off
            packed |= {"scale": codes.ceil().clamp(0, 255).byte(), "scale_step": step, "scale_low": least.half()}
        else:
            packed["scale"] = torch.where(scale == 0, 1.0, scale).clamp(min=2.0**-24).half()
        stored = self._constant(packed, "scale")
        zero = (-low / stored).round().clamp(0, top)
        if self.double_quant:
            one = zero.new_ones(1, 1).half()
            packed |= {"zero_point": zero.byte(), "zero_point_step": one, "zero_point_low": one * 0}
        else:
            packed["zero_point"] = zero.half()
        codes = (rows / stored + zero).round_().clamp_(0, top)
        return {"qweight": pack_rows(codes, self.bits, high_first=True, word=self._word), **packed}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        size, groups = self._groups(shape)
        scale, zero = self._constant(packed, "scale"), self._constant(packed, "zero_point")
        value = None
        if self.bits not in (5, 6):
            parts = {"qweight": packed["qweight"], "scale": scale, "zero_point": zero}
            value = kernels.parts(
                parts, bits=self.bits, group_size=size, layout="hqq", shape=shape, dtype=torch.float32
            )
        if value is None:
            value = torch.empty(shape, dtype=torch.float32, device=scale.device)
            matrix = in_groups(value, size)
            for rows, codes in unpack_rows(packed["qweight"], self.bits, groups, high_first=True):
                torch.mul(codes - zero[rows], scale[rows], out=matrix[rows])
        value *= packed["column_scale"].float()
        return value.to(dtype) if out is None else out.copy_(value)

    def _constant(self, packed: Mapping[str, Tensor], name: str) -> Tensor:
        """Scales or zero points, float32 (groups, 1)."""
        found = packed[name]
        if not found.is_floating_point():
            found = (found * packed[f"{name}_step"] + packed[f"{name}_low"]).view(-1, 1)
        return found.float()

    # ---- shapes ------------------------------------------------------------------------------------------

    @property
    def _word(self) -> torch.dtype:
        return torch.int32 if self.bits in (3, 5, 6) else torch.uint8

    def _groups(self, shape: tuple[int, ...], name: str = "a weight") -> tuple[int, int]:
        """Size and number of the groups of a weight."""
        size = self.group_size
        while shape[-1] % size and size >= 2 * SMALLEST_GROUP:
            size //= 2
        if shape[-1] % size:
            raise BadShape(
                f"{name} has in_features {shape[-1]}, which neither groups of {self.group_size} nor halves of that divide: "
                "give a group_size that does, or skip this weight"
            )
        groups = prod(shape) // size
        if self.double_quant and groups % TILE:
            raise BadShape(
                f"{name} is {' × '.join(map(str, shape))}, in {groups} groups of {size}: scales of 8 bits need a multiple of "
                f"{TILE}; take another group_size, double_quant=False, or skip this weight"
            )
        return size, groups

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size, groups = self._groups(shape)
        half, byte, wide = torch.float16, torch.uint8, groups // TILE
        words = -(-groups // codes_per_word(self.bits, self._word))
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"qweight": ((words, size), self._word)}
        if self.double_quant:
            found |= {
                "scale": ((TILE, wide), byte),
                "scale_step": ((1, wide), half),
                "scale_low": ((1, wide), half),
                "zero_point": ((groups, 1), byte),
                "zero_point_step": ((1, 1), half),
                "zero_point_low": ((1, 1), half),
            }
        else:
            found |= {"scale": ((groups, 1), half), "zero_point": ((groups, 1), half)}
        return {**found, "column_scale": ((1, shape[-1]), half)}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(sizes) * kind.itemsize for sizes, kind in self.template(shape, torch.float16).values())

    # ---- what the sinq package quantized -----------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SINQ:
        for key, value in config.items():
            if key not in _ELSEWHERE and value not in (None, False, ""):
                raise BadOption(f"this SinqConfig has {key}={value!r}, which qft does not know")
        if str(config.get("tiling_mode", "1D")) != "1D":
            raise BadOption(f"this SinqConfig has tiling_mode={config['tiling_mode']!r}: qft reads the tiling 1D alone")
        if config.get("method", "sinq") not in _METHODS:
            raise BadOption(f"this SinqConfig has method={config['method']!r}; qft reads {' and '.join(_METHODS)}")
        return cls(bits=config.get("nbits", 4), group_size=config.get("group_size", 64))

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        meta: Any = module.meta
        if meta is None or not getattr(module, "ready", True):
            raise UnsupportedOperation("a SINQLinear holds no weights yet: load or quantize it before qft sees it")
        device = torch.device(module.device)  # type: ignore[arg-type]  # its kernels leave codes on the host
        flat = {"W_q": module.W_q, **_flat(meta)}
        own, packed = _from_meta(flat, "a SINQLinear")
        packed = {k: t.detach().to(device) for k, t in packed.items()}
        bias = None if module.bias is None else module.bias.detach()
        return PackedLinear(own, packed, tuple(meta["shape"]), module.compute_dtype, bias)  # type: ignore[arg-type]

    @classmethod
    def read_folder(cls, folder: Path, model: nn.Module) -> tuple[dict[str, PackedLinear], dict[str, Tensor]]:
        try:
            notes = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
            index = read_weight_map(folder / SIDECAR.removesuffix(".meta.json"))
            stored: dict[str, Tensor] = {}
            for name in sorted(set(index.values())):
                stored |= load_file(folder / name)
            lost = index.keys() - stored.keys()
            if lost:
                raise BadFolder(f"{folder} lacks {min(lost)}, which its index names: download or save it again")
            metas = {name: found["meta"] for name, found in notes.items() if "meta" in found}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise BadFolder(f"{folder} is not what sinq's save_quantized_safetensors writes: {why}") from error
        experts = next((key for key in (*stored, *metas) if "_W_q." in key), None)
        if experts is not None:
            raise UnsupportedOperation(f"{folder} holds {experts}: experts of the sinq package are not read here")
        layers = {}
        for name, meta in metas.items():
            own = {key.removeprefix(f"{name}."): stored.pop(key) for key in list(stored) if key.startswith(f"{name}.")}
            flat = {key.removeprefix("meta."): value for key, value in {**meta, **own}.items()}
            try:
                quantizer, packed = _from_meta(flat, name)
                dtype = as_float_dtype(str(flat.get("compute_dtype")).removeprefix("torch."))
                layers[name] = PackedLinear(quantizer, packed, tuple(flat["shape"]), dtype, flat.get("bias"))
            except UnsupportedOperation:
                raise
            except Exception as error:
                raise BadFolder(f"{name} in {folder} is damaged: {type(error).__name__}: {error}") from error
        idle = {name for name, _ in model.named_buffers()} - model.state_dict().keys()  # the package keeps these, too
        return layers, {key: value for key, value in stored.items() if key not in idle}


def _flat(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A live layer's `meta` as its checkpoints write it: constants of 8 bits are (codes, step, least, shape)."""
    found: dict[str, Any] = {}
    for key, value in meta.items():
        if isinstance(value, (tuple, list)) and len(value) == 4:
            value = dict(zip("xsm", value, strict=False))
        if isinstance(value, Mapping):
            found |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            found[key] = value
    return found


def _from_meta(flat: Mapping[str, Any], name: str) -> tuple[SINQ, dict[str, Tensor]]:
    """Options and packed tensors of a layer, from its codes and its `meta` with dotted names.

    Raises:
        UnsupportedOperation: codes of another kind, or tensors of other shapes.
    """
    method = str(flat.get("method", "")).lower()
    for kind in ("nf4", "nf3", "noz"):
        if kind in method:
            raise UnsupportedOperation(
                f"{name} was quantized by sinq's method {method!r}: its {kind} codes are not read here; methods sinq and "
                "asinq are"
            )
    if flat.get("view_as_float") or not flat.get("packing") or flat.get("axis", 1) != 1:
        raise UnsupportedOperation(f"{name} holds codes that are not packed as sinq's default is: quantize it again")
    out_features, in_features = flat["shape"]
    double = isinstance(flat.get("scale.x"), Tensor)
    scale = flat.get("scale.x" if double else "scale")
    columns = flat.get("scale2")
    if not isinstance(scale, Tensor) or not isinstance(columns, Tensor) or columns.dim() != 2:
        raise UnsupportedOperation(
            f"{name} has constants in tiles (tiling_mode 2D), or none: the tiling 1D is read here"
        )
    if flat["nbits"] not in BITS:
        raise UnsupportedOperation(f"{name} has {flat['nbits']} bits; read are {', '.join(map(str, BITS))}")
    own = SINQ(bits=int(flat["nbits"]), group_size=out_features * in_features // scale.numel(), double_quant=double)
    places = _TENSORS if double else {"scale": "scale", "zero_point": "zero", "column_scale": "scale2"}
    packed = {"qweight": flat["W_q"], **{ours: flat.get(theirs) for ours, theirs in places.items()}}
    wanted = own.template((out_features, in_features), torch.float16)
    found = {k: (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None for k, t in packed.items()}
    wrong = [k for k, want in wanted.items() if found[k] != want]
    if wrong:
        raise UnsupportedOperation(
            f"{name}: {own!r} keeps {wanted[wrong[0]]} as {wrong[0]}, and {found[wrong[0]]} was found: another layout"
        )
    return own, packed

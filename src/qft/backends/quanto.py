"""quanto (optimum-quanto): int2 and int4 with a float shift a group, int8 and float8 with a scale a row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadFolder, BadOption, BadShape, QftError, UnsupportedOperation
from qft.ops import kernels
from qft.ops.bits import codes_per_word, in_groups, pack_rows, unpack_rows

_BITS = {"int2": 2, "int4": 4}
_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_QTYPES = {"qint2": "int2", "qint4": "int4", "qint8": "int8", "qfloat8": "float8", "qfloat8_e4m3fn": "float8",
           "qfloat8_e5m2": "float8_e5m2"}  # fmt: skip


@dataclass(frozen=True)
class Quanto(TensorQuantizer):
    """Round-to-nearest between extremes, as optimum-quanto's default optimizers do; no calibration, no package needed.

    Args:
        format: "int2", "int4", "int8", "float8" (e4m3fn) or "float8_e5m2".
        group_size: of int2 and int4: weights of a row that share a scale and a shift; it must divide in_features.
            None is quanto's own rule: the first of 128, 96, 64 and 32 that divides in_features where that is above
            128, else the whole row.

    int2 and int4 decode as `scale * code - shift`, the others as `scale * code`, computed in the scale's dtype as quanto
    does: `dequantize` and the codes equal those of quanto's `quantize` and `freeze`, bit for bit.

    Packed tensors, quanto's own: `qweight`, for int2 and int4 uint8 of the matrix of groups (groups, group_size)
    packed along its first dimension, else int8 or float8 (out_features, in_features); `scale`, and `shift` for int2
    and int4, in the weight's dtype, (groups, 1) or (out_features, 1).
    """

    name: ClassVar[str] = "quanto"
    foreign_types: ClassVar[tuple[str, ...]] = ("optimum.quanto.nn.qlinear.QLinear",)
    config_methods: ClassVar[tuple[str, ...]] = ("quanto",)
    folder_marks: ClassVar[tuple[str, ...]] = ("quanto_qmap.json",)

    format: Literal["int2", "int4", "int8", "float8", "float8_e5m2"] = "int8"
    group_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.group_size is not None and self.format not in _BITS:
            raise BadOption(f"quanto: {self.format} has a scale a row, and no group_size; int2 and int4 take one")
        if self.group_size is not None and self.group_size < 1:
            raise BadOption(f"quanto: group_size={self.group_size}; it is a positive number of weights")

    @property
    def capabilities(self) -> Capabilities:
        floats = self.format.startswith("float8")
        devices = {"cpu", "cuda", "xpu"} if floats else {"cpu", "cuda", "mps", "xpu"}
        return Capabilities(bits=_BITS.get(self.format, 8), devices=frozenset(devices), requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Quanto:
        for name, shape in shapes:
            if self.group_size is not None and shape[-1] % self.group_size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, which groups of {self.group_size} do not divide: give a "
                    "group_size that divides every width, or leave it open"
                )
        return self

    # ---- the format --------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        if self.format not in _BITS:
            return self._pack_rows(weight)
        bits = _BITS[self.format]
        top = 2**bits - 1
        groups = in_groups(weight, self._size(tuple(weight.shape)))
        shift = -groups.amin(1, keepdim=True)
        scale = (groups.amax(1, keepdim=True) + shift) / top
        # quanto divides zero by zero in a constant group, which gives code 0 on a CPU
        codes = ((groups + shift) / torch.where(scale == 0, 1, scale)).round_().clamp_(0, top)
        return {"qweight": pack_rows(codes, bits, high_first=False), "scale": scale, "shift": shift}

    def _pack_rows(self, weight: Tensor) -> dict[str, Tensor]:
        dtype = _DTYPES[self.format]
        info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        largest = weight.abs().amax(1, keepdim=True)
        scale = largest / info.max
        if weight.dtype == torch.float16:  # such a small scale rounds to zero, or clips the row: quanto lets it
            up = (largest.float() / info.max * 2.0**24).ceil() * 2.0**-24
            scale = torch.where(scale < 2.0**-21, up.to(scale), scale)
        codes = weight / torch.where(scale == 0, 1, scale)
        if not dtype.is_floating_point:
            codes = codes.round_()
        return {"qweight": codes.clamp_(info.min, info.max).to(dtype), "scale": scale}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        codes, scale = packed["qweight"], packed["scale"]
        if self.format in _BITS:
            size = self._size(shape)
            value = kernels.parts(
                packed, bits=_BITS[self.format], group_size=size, layout="quanto", shape=shape, dtype=dtype, out=out
            )
        else:
            value = kernels.rows(codes, scale, dtype=dtype, out=out, round_product=True)
        if value is not None:
            return value
        if self.format in _BITS:
            value = torch.empty(shape, dtype=scale.dtype, device=codes.device)
            groups, shift = in_groups(value, size), packed["shift"]
            for rows, part in unpack_rows(codes, _BITS[self.format], groups.shape[0], high_first=False):
                torch.mul(scale[rows], part, out=groups[rows]).sub_(shift[rows])
        else:
            value = codes.to(scale.dtype).mul_(scale)
        return value.to(dtype) if out is None else out.copy_(value)

    def _size(self, shape: tuple[int, ...]) -> int:
        """Weights a group; a whole row where there are no groups."""
        width = shape[-1]
        if self.group_size is not None:
            if width % self.group_size:
                raise BadShape(f"a weight of {tuple(shape)} cannot be divided into groups of {self.group_size}")
            return self.group_size
        return next((size for size in (128, 96, 64, 32) if width > 128 and width % size == 0), width)

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if self.format not in _BITS:
            return {"qweight": (tuple(shape), _DTYPES[self.format]), "scale": ((shape[0], 1), dtype)}
        size = self._size(shape)
        groups = prod(shape) // size
        words = -(-groups // codes_per_word(_BITS[self.format]))
        constants = ((groups, 1), dtype)
        return {"qweight": ((words, size), torch.uint8), "scale": constants, "shift": constants}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(s) * dtype.itemsize for s, dtype in self.template(shape, torch.bfloat16).values())

    # ---- what quanto, or transformers with it, quantized -------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        module_: Any = module
        if module_.activation_qtype is not None:
            raise UnsupportedOperation(
                f"a QLinear quantizes its activations, too ({module_.activation_qtype.name}), which qft does not: "
                "quantize the float model with activations=None"
            )
        if module_.weight_qtype is None or not module_.frozen:
            raise UnsupportedOperation(
                "a QLinear of this quanto model still has its float weight: call optimum.quanto.freeze(model) first"
            )
        weight = module_.weight.data
        for back in ("weight_qbits_tensor", "weight_qbytes_tensor"):  # from a kernel's layout to the one that is saved
            if type(weight).__name__ not in ("WeightQBitsTensor", "WeightQBytesTensor") and hasattr(weight, back):
                weight = getattr(weight, back)()
        shape = tuple(weight.shape)
        codes = weight._data
        tensors = {"qweight": getattr(codes, "_data", codes), "scale": weight._scale}
        if hasattr(weight, "_shift"):
            tensors["shift"] = weight._shift
        own = _quantizer(weight.qtype.name, getattr(weight, "_group_size", None), shape)
        return PackedLinear(own, own._fitted(tensors, shape), shape, weight._scale.dtype, module_.bias)

    def _fitted(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Stored tensors in our shapes; views."""
        packed = {}
        for name, (wanted, dtype) in self.template(shape, tensors["scale"].dtype).items():
            tensor = tensors[name]
            if tensor.numel() != prod(wanted) or tensor.dtype != dtype:
                raise UnsupportedOperation(
                    f"a quanto weight of {shape} keeps its {name} as {tensor.dtype} {tuple(tensor.shape)}, and {self!r} "
                    f"as {dtype} {wanted}: only weights with float scales and shifts along rows are read"
                )
            packed[name] = tensor.reshape(wanted)
        return packed

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quanto:
        if config.get("activations") is not None:
            raise BadOption(f"QuantoConfig: activations={config['activations']!r}: qft quantizes weights alone")
        return cls(format=config.get("weights", "int8"))

    @classmethod
    def read_folder(cls, folder: Path, model: nn.Module) -> tuple[dict[str, PackedLinear], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        try:
            names = json.loads((folder / "quanto_qmap.json").read_text())
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    tensors |= {key: file.get_tensor(key) for key in file.keys()}
            layers = {name: _layer(name, types, tensors, model.get_submodule(name)) for name, types in names.items()}
        except QftError:
            raise
        except Exception as error:
            raise BadFolder(f"{folder} is not what quanto's save_pretrained writes: {error!r}") from error
        return layers, tensors


def _layer(name: str, types: Mapping[str, str], tensors: dict[str, Tensor], linear: Any) -> PackedLinear:
    """A layer of quanto's map over the tensors of its checkpoint, which leave `tensors`."""
    if types["activations"] != "none":
        raise UnsupportedOperation(
            f"{name} quantizes its activations, too ({types['activations']}), which qft does not"
        )
    for unused in ("input_scale", "output_scale"):
        tensors.pop(f"{name}.{unused}", None)
    packed = types["weights"] in ("qint2", "qint4")
    stored = {"qweight": "_data._data" if packed else "_data", "scale": "_scale"} | (
        {"shift": "_shift"} if packed else {}
    )
    parts = {ours: tensors.pop(f"{name}.weight.{theirs}") for ours, theirs in stored.items()}
    shape = tuple(linear.weight.shape)
    own = _quantizer(types["weights"], prod(shape) // parts["scale"].numel() if packed else None, shape)
    try:
        fitted = own._fitted(parts, shape)
    except (BadShape, UnsupportedOperation) as error:
        raise BadFolder(f"{name}: {error}") from error
    return PackedLinear(own, fitted, shape, parts["scale"].dtype, tensors.pop(f"{name}.bias", None))


def _quantizer(qtype: str, group_size: int | None, shape: tuple[int, ...]) -> Quanto:
    """The options of a layer by its qtype and group size."""
    if qtype not in _QTYPES:
        raise UnsupportedOperation(f"quanto's {qtype} is not supported; {', '.join(_QTYPES)} are")
    own = Quanto(format=_QTYPES[qtype])  # type: ignore[arg-type]
    size = group_size or shape[-1]
    if own.format in _BITS and own._size(shape) != size:
        own = Quanto(format=own.format, group_size=size)
    return own

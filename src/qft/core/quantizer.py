"""The interface of a quantization backend.

Everything above a backend needs three things of it: is this weight mine, give it to me as floats, and, where
it can, store these floats in it. What a backend supports is derived from that, never declared twice.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import types
import typing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.core.devices import twin_for
from qft.errors import BadOption, MissingDependency, QftWarning, UnsupportedDevice, UnsupportedOperation, about

if TYPE_CHECKING:
    from qft.ops.kernels import Codebook

Kind = Literal["linear", "conv1d", "experts"]
OnWeight = Callable[[str, Tensor, Tensor, Any], None]


@dataclass(frozen=True)
class QuantizedWeight:
    """The handle of one quantized weight; a module may hold several (fused experts).

    Attributes:
        module: the layer that holds the codes.
        name: the float parameter's name on that layer, such as "weight" or "gate_up_proj".
        shape: `(out_features, in_features)`, or `(experts, out_features, in_features)`.
        kind: what a merge to float must turn it back into.
        transposed: the float parameter was stored as `(..., in_features, out_features)`.
        dtype: of the float weight that it came from.
        bias: `(out_features,)` or None.
    """

    module: nn.Module
    name: str
    shape: tuple[int, ...]
    kind: Kind
    transposed: bool
    dtype: torch.dtype
    bias: Tensor | None = None


DERIVED = (
    "merge_to_float",
    "merge_to_quantized",
    "unmerge",
    "loftq",
    "iterated_loftq",
    "dora",
    "fused",
    "exact_merge",
)


@dataclass(frozen=True)
class Capabilities:
    """What one configuration of a backend can do on this machine.

    Attributes:
        bits: nominal bits a weight, constants left out.
        devices: device types on which it quantizes and runs.
        quantizes: False where it only loads prequantized checkpoints.
        needs_calibration: quantizing wants activation statistics.
        dequantize: the weight can be had as floats.
        requantize: floats can be stored back with the layer's own options.
        exact_forward: the vendor's forward is `x @ dequantize().T + bias` up to rounding.
        float_zero_points: zero points are floats, which allows the exact quantized merge.
        serializable: the quantized model can be saved.
    """

    bits: float
    devices: frozenset[str]
    quantizes: bool = True
    needs_calibration: bool = False
    dequantize: bool = True
    requantize: bool = False
    exact_forward: bool = True
    float_zero_points: bool = False
    serializable: bool = True

    @property
    def merge_to_float(self) -> bool:
        """Adapters can be merged into a float copy."""
        return self.dequantize

    @property
    def merge_to_quantized(self) -> bool:
        """Adapters can be merged into the quantized weights."""
        return self.dequantize and self.requantize

    @property
    def unmerge(self) -> bool:
        """A merge into the quantized weights can be undone, to the bit."""
        return self.merge_to_quantized

    @property
    def loftq(self) -> bool:
        """Adapters can start from the quantization error."""
        return self.dequantize

    @property
    def iterated_loftq(self) -> bool:
        """LoftQ can alternate between the adapter and the quantized weight."""
        return self.dequantize and self.requantize

    @property
    def dora(self) -> bool:
        """DoRA works: it needs the norms of the float weight's rows."""
        return self.dequantize

    @property
    def fused(self) -> bool:
        """The one autograd linear trains over it."""
        return self.dequantize

    @property
    def exact_merge(self) -> bool:
        """A group-pooled adapter can be merged into the zero points without loss."""
        return self.merge_to_quantized and self.float_zero_points

    def as_dict(self) -> dict[str, Any]:
        """Declared and derived flags, ready for JSON."""
        out = dataclasses.asdict(self)
        out["devices"] = sorted(self.devices)
        out.update({name: getattr(self, name) for name in DERIVED})
        return out


class Quantizer(ABC):
    """One quantization format with its options.

    A subclass is a frozen dataclass: its fields are its options, `repr()` is the constructor call, and
    `to_dict()`/`from_dict()` round-trip through JSON. Subclass `TensorQuantizer` where two functions on tensors
    suffice; subclass this where the format has layers of its own.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """pip requirements, named in `MissingDependency`."""
    layer_types: ClassVar[tuple[str, ...]] = ()
    """Qualified names of the layer classes, so that nothing is imported to look."""
    statistics_kind: ClassVar[Literal["diagonal", "full"]] = "diagonal"
    """What `quantize_layer` wants to know of the activations where `capabilities.needs_calibration` says so: "diagonal"
    (E[x²], E[|x|]) or "full" (E[x xᵀ] too); see `qft.Statistics`."""

    statistics_through: ClassVar[Literal["old", "new"]] = "old"
    """Whether they are those of the float model, or ("new") of the model whose earlier blocks are quantized already."""
    foreign_types: ClassVar[tuple[str, ...]] = ()
    """Qualified names of other tools' layer classes that `converted` turns into this backend's own."""
    config_methods: ClassVar[tuple[str, ...]] = ()
    """The `quant_method`s of checkpoints and of transformers' config objects that `from_config` reads."""
    config_conv1d: ClassVar[bool] = True
    """Whether transformers' own loader of the format knows `Conv1D` layers; else `transformers_config` is not asked for a
    model that has some quantized."""
    folder_marks: ClassVar[tuple[str, ...]] = ()
    """Files by which a folder of the backend's own tool is known; `read_folder` reads it."""
    file_option: ClassVar[str | None] = None
    """The option of `from_pretrained` that names a file of the format in a folder; `read_folder` is given the file."""

    # ---- what every backend says -------------------------------------------------------------------------

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this configuration can do on this machine."""

    @abstractmethod
    def weights(self, module: nn.Module) -> Sequence[QuantizedWeight]:
        """The quantized weights that `module` itself holds; empty if it is not one of this backend's layers."""

    @abstractmethod
    def quantize_layer(self, module: nn.Module, *, statistics: Any = None) -> nn.Module:
        """The quantized counterpart of a float layer (`nn.Linear` or transformers' `Conv1D`).

        The float layer is left as it is. The bias is kept, the weight is quantized on the device it is on.
        """

    @abstractmethod
    def dequantize(
        self, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The weight as floats, shape `weight.shape`, in `dtype` (default: `weight.dtype`) or into `out`."""

    def requantize(self, weight: QuantizedWeight, value: Tensor) -> None:
        """Store floats of shape `weight.shape` in the quantized weight, with the options of the layer itself."""
        raise UnsupportedOperation(f"{self.name} cannot store float values back (capability requantize)")

    def tensors(self, weight: QuantizedWeight) -> list[Tensor]:
        """What `dequantize` reads, as plain tensors whose `.data` may be pointed elsewhere; empty where that cannot be."""
        return []

    def snapshot(self, weight: QuantizedWeight) -> Any:
        """What `restore` needs for a bit-exact undo of `requantize`, in host memory."""
        raise UnsupportedOperation(f"{self.name} cannot take snapshots (capability requantize)")

    def restore(self, weight: QuantizedWeight, saved: Any) -> None:
        """Put a snapshot back, to the bit."""
        raise UnsupportedOperation(f"{self.name} cannot restore snapshots (capability requantize)")

    def group_size_of(self, weight: QuantizedWeight) -> int | None:
        """Consecutive weights of a row that share their constants; None where `shift` is not supported."""
        return None

    def shift(self, weight: QuantizedWeight, delta: Tensor) -> None:
        """Add to each group of the weight a number of its own, exact to float32 rounding.

        A float zero point takes it in: no code changes, and nothing is rounded to the grid again (QA-LoRA, arXiv
        2309.14717, section 3.3). `snapshot` and `restore` bring the old constants back, in their old dtypes.

        Args:
            weight: of a quantizer whose `capabilities` say `float_zero_points`.
            delta: float32 (out_features, in_features / group_size_of(weight)), in the weight's own units.

        Raises:
            UnsupportedOperation: no float zero points.
            BadShape: `delta` is not one number a group.
        """
        raise UnsupportedOperation(f"{self.name} cannot shift whole groups of a weight (capability float_zero_points)")

    def codebook(self, weight: QuantizedWeight) -> Codebook | None:
        """The codes and constants themselves, without a copy, where `kernels.codebook` describes the format; else None."""
        return None

    def load_state(self, weight: QuantizedWeight, state: Mapping[str, Tensor]) -> None:
        """Take over the codes and constants that a layer's `state_dict` held, given by their names on the layer."""
        weight.module.load_state_dict(state, strict=False)

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes and constants for a float weight of this shape."""

    # ---- what a backend may say --------------------------------------------------------------------------

    @classmethod
    def recognise(cls, module: nn.Module) -> Quantizer | None:
        """The options of a layer that somebody else quantized, or None if it is not one of this backend's."""
        return None

    @classmethod
    def converted(cls, module: nn.Module) -> nn.Module:
        """This backend's own layer over the codes of another tool's, one of `foreign_types`; nothing is copied.

        Raises:
            UnsupportedOperation: codes in a layout that only the other tool's kernel reads.
        """
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantizer:
        """The options that a checkpoint's `quantization_config`, or transformers' config object as a dict, names.

        Raises:
            BadOption: options that this backend does not have; never ignored.
        """
        raise NotImplementedError

    @classmethod
    def read_folder(cls, folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A folder of the backend's own tool: `PackedLinear`s by layer name, and the other tensors by theirs.

        Args:
            folder: holds one of `folder_marks`; or the file that `file_option` names.
            model: the float model that it is of, on the meta device.

        Raises:
            BadFolder: files that are damaged, or of something else.
            UnsupportedOperation: layers that this backend does not read.
        """
        raise NotImplementedError

    @classmethod  # noqa: B027
    def check_folder(cls, folder: Path) -> None:
        """Look at the headers of a local checkpoint of one of `config_methods` that transformers is about to load.

        Raises:
            BadFolder: tensors that are missing or cannot be right, by name.
        """

    def adopt(self, module: nn.Module) -> None:  # noqa: B027
        """Make a layer that somebody else quantized safe to use: called once, before anything else."""

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Quantizer:
        """This quantizer with open options settled for the weights to come, as `(name, shape)`.

        Raises:
            BadShape: a weight that does not fit, by name.
        """
        return self

    def leaves(self, shape: tuple[int, ...]) -> str | None:
        """Why a linear layer with a weight of `shape`, (out_features, in_features), stays float; None if it does not.

        For shapes that the format's own package computes wrongly; a shape that the format cannot hold is refused by
        `resolve`.
        """
        return None

    def on_device(self, device: torch.device) -> Quantizer:
        """The quantizer to use on `device`: itself, or one of the same format that runs there; on MPS its packed twin.

        Raises:
            UnsupportedDevice: it has no kernels for the device.
        """
        if device.type not in self.capabilities.devices:
            twin = twin_for(self, device) if device.type == "mps" else None
            if twin is not None:
                warnings.warn(
                    f"{self!r} has no kernels for MPS: using {twin!r}, in pure PyTorch", QftWarning, stacklevel=4
                )
                return twin
            raise UnsupportedDevice(
                f"{self!r} has no kernels for {device.type!r}: move the model to one of "
                f"{', '.join(sorted(self.capabilities.devices))}, or use 'reference', which runs everywhere"
            )
        return self

    def for_experts(self) -> Quantizer | None:
        """The `TensorQuantizer` that packs fused experts for this backend, each expert by itself.

        None where there is none, as for methods that calibrate linear layers: experts stay in 16 bit.
        """
        return None

    def as_packed(self, module: nn.Module) -> nn.Module | None:
        """Return the weight of one of this backend's own layers as a `PackedLinear` of `for_experts()`.

        Nothing is copied where the layout is the same. Models with fused experts are stored so, because the backend's own
        files have no place for packed experts. None where there is no such form.
        """
        return None

    def transformers_reads(self, shape: tuple[int, ...]) -> bool:
        """Whether transformers' own loader of the format reads a weight of this shape right."""
        return True

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        """Return transformers' own config object for a model in this format, where there is one, else None.

        Args:
            skipped: names of the linear layers that are not quantized.
            dtype: of the float model.
        """
        return None

    def transformers_config_for(
        self, quantized: list[str], skipped: list[str], dtype: torch.dtype | None
    ) -> Any | None:
        """`transformers_config`, for a format whose config lists what is quantized, too."""
        return self.transformers_config(skipped, dtype)

    def stored_metadata(self, state: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, str]:
        """What the headers of safetensors files in the format say beside the tensors.

        Args:
            state: the tensors to write, by their names in the files.
            layers: the quantized layers, by the names that they have without adapters.
        """
        return {}

    def doubt(self, shape: tuple[int, ...], statistics: Any) -> str | None:
        """Why these statistics, or None for none at all, are too thin for a weight of `shape`; None if they will do."""
        return None

    def quantize(
        self,
        model: nn.Module,
        targets: Sequence[str],
        *,
        calibration: Any = None,
        on_weight: OnWeight | None = None,
        progress: Callable[[Sequence[str]], Iterable[str]] | None = None,
    ) -> nn.Module:
        """Quantize the named layers of `model` in place, one by one.

        `on_weight(name, W, W_hat, statistics)` is called once per weight while both are in hand, both of shape
        `(out_features, in_features)`, when the quantized layer is in its place.
        """
        if calibration is not None and not isinstance(calibration, Mapping):
            raise BadOption(
                f"{self.name}.quantize takes activation statistics by layer name, not a {type(calibration).__name__}; a "
                "quantizer that reads data overrides it"
            )
        for name in progress(targets) if progress else targets:
            layer = model.get_submodule(name)
            statistics = (calibration or {}).get(name)
            with about(name):
                new = self.quantize_layer(layer, statistics=statistics)
            replace_module(model, name, new)
            if on_weight is not None:
                for weight in self.weights(new):
                    on_weight(name, float_weight(layer), self.dequantize(weight, dtype=torch.float32), statistics)
        return model

    # ---- what every backend inherits ---------------------------------------------------------------------

    def __post_init__(self) -> None:
        """Check the options against their type hints; names of dtypes become dtypes, and ints floats where wanted.

        A subclass that checks more calls this first.

        Raises:
            BadOption: a value that the option does not take.
        """
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, f.name, _checked(self.name, f.name, getattr(self, f.name), hints[f.name]))

    def to_dict(self) -> dict[str, Any]:
        """Name and options as JSON values."""
        options = {f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"name": self.name, **options}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Quantizer:
        """The inverse of `to_dict`.

        Raises:
            BadOption: an option that this quantizer does not have.
        """
        options = {k: v for k, v in options.items() if k != "name"}
        hints = typing.get_type_hints(cls)
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key, value in options.items():
            if key not in known:
                raise BadOption(f"{cls.name} has no option {key!r}; its options are {', '.join(known) or 'none'}")
            options[key] = _checked(cls.name, key, value, hints[key])
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
        if missing := [n for n in required if n not in options]:
            raise BadOption(f"{cls.name} needs {', '.join(missing)}: write {cls.name}:{missing[0]}=...")
        return cls(**options)

    @classmethod
    def check_installed(cls) -> None:
        """Raise `MissingDependency`, with the pip line, where a required package is missing, too old or too new."""
        found = cls.problem()
        if found is not None:
            raise MissingDependency(found[1])

    @classmethod
    def problem(cls) -> tuple[Literal["missing", "unusable"], str] | None:
        """What keeps this backend from working on this machine, or None. Nothing is imported to look."""
        absent, wrong = [], []
        for requirement in cls.requires:
            version, fits = _installed(requirement)
            if version is None:
                absent.append(requirement)
            elif not fits:
                wrong.append(f"{requirement} (installed is {version})")
        if not absent and not wrong:
            return None
        needs = ", ".join([*(f"{a} (not installed)" for a in absent), *wrong])
        line = " ".join(repr(r) for r in [*absent, *(w.partition(" (")[0] for w in wrong)])
        return "missing" if absent else "unusable", f"{cls.name} needs {needs}: pip install {line}"

    @classmethod
    def owns(cls, module: nn.Module) -> bool:
        """Whether the class of `module` is one of `layer_types`, found by name so that nothing is imported."""
        return any(f"{c.__module__}.{c.__qualname__}" in cls.layer_types for c in type(module).__mro__)


def _installed(requirement: str) -> tuple[str | None, bool]:
    """The installed version of a requirement's package, or None, and whether it fits."""
    from packaging.requirements import Requirement

    req = Requirement(requirement)
    try:
        version = importlib.metadata.version(req.name)
    except importlib.metadata.PackageNotFoundError:
        return None, False
    return version, req.specifier.contains(version, prereleases=True)


_NOT_IN_CODES = (
    "activations",
    "compute_dtype",
    "threshold",
    "damp_percent",
    "act_group_aware",
    "rounds",
    "beam",
    "apply_clip",
    "checkpoint_format",
)


def code_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What of `Quantizer.to_dict()` can be told by the codes; the rest is about a vendor's forward, or how they came."""
    return {k: v for k, v in options.items() if k not in _NOT_IN_CODES}


def _to_json(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _checked(name: str, key: str, value: Any, hint: Any) -> Any:
    """`value` as the option's type hint wants it; only simple hints are checked, others pass."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if torch.dtype in kinds and isinstance(value, str):
        return as_dtype(value)
    if float in kinds and type(value) is int:
        return float(value)
    for kind in kinds:
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if kind is Any or type(value) is kind:
            return value
        if isinstance(kind, type) and kind not in (int, float) and isinstance(value, kind):
            return value
        if typing.get_origin(kind) not in (None, Literal):
            return value
    raise BadOption(f"{name}: {key}={value!r}; it wants {' or '.join(map(_described, kinds))}")


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return {types.NoneType: "None", torch.dtype: "a torch dtype"}.get(kind, getattr(kind, "__name__", str(kind)))


def as_dtype(value: str | torch.dtype) -> torch.dtype:
    """A torch dtype from itself or its name, such as "bfloat16"."""
    if isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise BadOption(f"{value!r} is not a torch dtype; for example bfloat16, float16, float32")
    return dtype


def as_float_dtype(value: str | torch.dtype) -> torch.dtype:
    """`as_dtype`, where only a float type makes sense."""
    dtype = as_dtype(value)
    if not dtype.is_floating_point:
        raise BadOption(f"dtype={value!r} is no float type: give float32, bfloat16 or float16")
    return dtype


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, a linear layer with a weight of `(in_features, out_features)`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def float_weight(layer: nn.Module) -> Tensor:
    """The weight of a float linear or `Conv1D`, as a view of shape `(out_features, in_features)`."""
    weight = layer.weight.detach()
    return weight.T if is_conv1d(layer) else weight


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`, with its training mode.

    A layer that replaces a subclass of `nn.Linear` gets the mark `of_subclass`: transformers' own loaders of quantized
    formats replace `nn.Linear` itself alone, and would read codes into the subclass.
    """
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    new.train(old.training)
    if isinstance(old, nn.Linear) and type(old).__module__.startswith("transformers."):
        new.of_subclass = True
    setattr(parent, child, new)

"""Checkpoints that other tools quantized, read into packed layers without those tools: names, shapes, and checks first.

A backend that is a `TensorQuantizer` and reads the checkpoint's `quantization_config` (`Quantizer.from_config`) gets
its tensors streamed into `PackedLinear`s by transformers. Everything else is left to transformers' own quantizers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qft.core import transformers_quantizer
from qft.core.packed import TensorQuantizer
from qft.core.quantizer import is_conv1d
from qft.core.registry import file_reader, folder_reader, from_config
from qft.core.shard_index import read_weight_map
from qft.errors import BadFolder, BadOption, QftError

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
           "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}  # fmt: skip


def tensors_of(path: str, options: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint's safetensors files, from their headers alone.

    Raises:
        BadFolder: no safetensors, or files that are missing or damaged.
    """
    from transformers.utils import cached_file

    where = {k: options[k] for k in HUB_OPTIONS if options.get(k) is not None}

    def find(name: str, needed: bool) -> str | None:
        try:
            found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
        except OSError as error:
            raise BadFolder(f"cannot read {name} of {path}: {error}") from error
        if found is None and needed:
            raise BadFolder(f"{path} lacks {name}: the folder is incomplete, download or save it again")
        return found

    index = find("model.safetensors.index.json", needed=False)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(read_weight_map(index).values()))
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in names:
        file_name = find(name, needed=True)
        try:
            with safe_open(file_name, framework="pt") as file:
                for key in file.keys():
                    view = file.get_slice(key)
                    dtype = getattr(torch, _DTYPES.get(view.get_dtype(), view.get_dtype()))
                    found[key] = (tuple(view.get_shape()), dtype)
        except Exception as error:
            raise BadFolder(f"{file_name} is damaged, download or save it again: {error}") from error
    return found


def packed_config(path: str, config: Any, cls: type, options: Mapping[str, Any]) -> tuple[Any, dict[str, str]] | None:
    """How to load a checkpoint into packed layers: a config for transformers, and a renaming of stored tensors.

    None where no `TensorQuantizer` here reads the checkpoint's method.

    Raises:
        BadOption: a method that a backend here reads, with options that it does not have.
        BadFolder: missing, extra or misshapen tensors, by name.
    """
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, Mapping):
        stored = stored.to_dict()
    method = stored.get("quant_method")
    quantizer = from_config({**stored, "quant_method": str(getattr(method, "value", method))})
    if not isinstance(quantizer, TensorQuantizer):
        folder = Path(path, options.get("subfolder") or "")
        if quantizer is not None and folder.is_dir():
            quantizer.check_folder(folder)
        return None
    quantizer.check_installed()
    tensors = tensors_of(path, options)
    with torch.device("meta"):
        skeleton = cls(_without_quantization(config))
    dtype = options.get("dtype")
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(config, "dtype", None) or torch.float16
    found = _Layers(path, skeleton, tensors, quantizer, dtype)
    for name in found.idle_biases:
        if _read(path, options, name).any():
            raise BadFolder(f"{path} holds {name}, and the {cls.__name__} of its config has no such bias")
    packed = transformers_quantizer.QftConfig([quantizer], found.templates, found.layers)
    return packed.to_dict(), found.renames()  # as config.json would hold it


def _read(path: str, options: Mapping[str, Any], key: str) -> torch.Tensor:
    """One tensor of a checkpoint."""
    from transformers.utils import cached_file

    where = {k: options[k] for k in HUB_OPTIONS if options.get(k) is not None}
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **where)
    name = "model.safetensors"
    if index is not None:
        name = read_weight_map(index)[key]
    with safe_open(cached_file(path, name, **where), framework="pt") as file:
        return file.get_tensor(key)


def tool_folder(path: str, config: Any, cls: type, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `from_pretrained` wants for a folder or file that a backend's own tool wrote: config, state dict and dtype.

    None for any other folder.

    Raises:
        BadFolder: files that are damaged, or layers that are not the model's.
        UnsupportedOperation: layers that the backend does not read.
    """
    folder = Path(path, options.get("subfolder") or "")
    backend = file_reader(options) or folder_reader(folder)
    if backend is None:
        return None
    if backend.file_option is not None and options.get(backend.file_option) is not None:
        folder = folder / options[backend.file_option]
        if not folder.is_file():
            raise BadFolder(f"there is no file {folder}")
    with torch.device("meta"):
        skeleton = cls(_without_quantization(config))
    layers, state = backend.read_folder(folder, skeleton)
    linears = {n: tuple(m.weight.shape) for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    wrong = [n for n, layer in layers.items() if linears.get(n) != (layer.out_features, layer.in_features)]
    if wrong or not layers:
        raise BadFolder(
            f"{folder} holds {len(wrong)} quantized layers that its {cls.__name__} does not have, {min(wrong)} first"
            if wrong
            else f"{folder} says that {backend.name} quantized it, and holds no quantized layer"
        )
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value.detach() for key, value in layer.state_dict().items()}
    config = copy.deepcopy(config)
    config.quantization_config = transformers_quantizer.describe_packed(layers.items()).to_dict()
    dtype = options.get("dtype")
    if not isinstance(dtype, torch.dtype):
        dtype = next(iter(layers.values())).dtype
    return {"config": config, "state_dict": state, "dtype": dtype}


def _without_quantization(config: Any) -> Any:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _wide_float(dtype: torch.dtype) -> bool:
    """Whether a tensor of `dtype` holds floats, not codes."""
    return dtype.is_floating_point and dtype.itemsize > 1


class _Layers:
    """The quantized layers of a checkpoint, matched with the linear layers of its model."""

    def __init__(self, path: str, model: nn.Module, tensors: Any, quantizer: TensorQuantizer, dtype: torch.dtype):
        self.path, self.quantizer = path, quantizer
        self.layers: dict[str, list[Any]] = {}
        self.templates: dict[str, Any] = {}
        self.prefixes: dict[str, str] = {}
        self.idle_biases: list[str] = []
        """Biases of layers without one: some tools store zeros for every layer."""
        self.held: dict[str, set[str]] = {}
        for key in tensors:
            self.held.setdefault(key.rpartition(".")[0], set()).add(key.rpartition(".")[2])
        codes = self._stored("qweight")
        owners = {key.removesuffix(f".{codes}") for key, (_, d) in tensors.items()
                  if key.endswith(f".{codes}") and not (codes == "weight" and _wide_float(d))}  # fmt: skip
        base = getattr(model, "base_model_prefix", "") or ""
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) and not is_conv1d(module):
                continue
            there = next((n for n in (name, f"{base}.{name}", name.removeprefix(f"{base}.")) if n in owners), None)
            if there is not None:
                owners.remove(there)
                self._add(name, there, module, tensors, dtype)
        if owners:
            raise BadFolder(
                f"{path} holds {len(owners)} quantized layers that its {type(model).__name__} does not have, "
                f"{min(owners)} first"
            )
        if not self.layers:
            raise BadFolder(f"{path} says that it is quantized ({quantizer.name}), and holds no {codes} of any layer")

    def _stored(self, name: str) -> str:
        return self.quantizer.stored_names.get(name, name)

    def _add(self, name: str, there: str, module: nn.Module, tensors: Any, dtype: torch.dtype) -> None:
        conv1d = is_conv1d(module)
        out_features, in_features = reversed(module.weight.shape) if conv1d else module.weight.shape
        try:
            self.quantizer.resolve([(name, (out_features, in_features))])
            template = self.quantizer.template((out_features, in_features), dtype)
        except QftError as error:
            raise BadFolder(f"{self.path}: {error}") from error
        held = {}
        for key, (shape, kind) in template.items():
            stored = f"{there}.{self._stored(key)}"
            if stored not in tensors:
                raise BadFolder(f"{self.path} lacks {stored}: the checkpoint is incomplete, or of another format")
            found_shape, found_kind = tensors[stored]
            if found_shape != tuple(shape) or (
                found_kind != kind and not (_wide_float(kind) and _wide_float(found_kind))
            ):
                raise BadFolder(
                    f"{stored} in {self.path} is {found_kind} {found_shape}, and {self.quantizer!r} keeps {kind} "
                    f"{tuple(shape)} for a weight of {out_features} × {in_features}"
                )
            held[key] = [list(found_shape), str(found_kind).removeprefix("torch.")]
        others = self.held[there] - {self._stored(key) for key in template} - {"bias"}
        others -= self.quantizer.stored_notes
        if others:
            raise BadFolder(
                f"{self.path} holds {there}.{min(others)}, which {self.quantizer!r} knows nothing of: the layer computes "
                "something else"
            )
        if module.bias is None and "bias" in self.held[there]:
            self.idle_biases.append(f"{there}.bias")
        number = str(dtype).removeprefix("torch.")
        key = f"0:{out_features}x{in_features}:{number}"
        if self.templates.setdefault(key, held) != held:
            raise BadOption(f"{there} keeps other dtypes than other layers of its shape: this is not supported")
        self.layers[name] = [0, out_features, in_features, "conv1d" if conv1d else "linear", number]
        self.prefixes[name] = there

    def renames(self) -> dict[str, str]:
        """`key_mapping` for `from_pretrained`: stored names of packed tensors to ours."""
        return {
            rf"^({'|'.join(map(re.escape, self.prefixes.values()))})\.{re.escape(theirs)}$": rf"\1.{ours}"
            for ours, theirs in self.quantizer.stored_names.items()
        }

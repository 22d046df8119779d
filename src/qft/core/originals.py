"""Float weights by layer name, from a model or a folder of safetensors, one at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qft.core import record as marks
from qft.core.experts import fused_weight
from qft.core.quantizer import float_weight, is_conv1d
from qft.core.shard_index import read_weight_map
from qft.errors import AdapterMismatch, BadFolder, BadOption, NonFiniteWeights, UnsupportedDevice


class Originals:
    """The original weights of a quantized model: call with a layer's name for its float (out, in) weight."""

    def __init__(self, read: Callable[[str], Tensor], record: marks.Record, where: str):
        self.read, self.record, self.where = read, record, where

    @classmethod
    def of(cls, original: Any, record: marks.Record) -> Originals:
        """From a float model, or safetensors files, checked against the quantized model's fingerprint.

        Args:
            original: a float model, a folder, its index of shards (`*.json`), or one safetensors file.
            record: of the quantized model.

        Raises:
            BadFolder: no such folder, or no safetensors in it.
            AdapterMismatch: the weights are those of another model.
        """
        if isinstance(original, nn.Module):
            if marks.record_of(original) is not None:
                raise BadOption("original= is quantized itself: give the float model")
            originals = cls(lambda name: _from_model(original, name), record, type(original).__name__)
        elif isinstance(original, str | os.PathLike):
            originals = cls(_Folder(Path(original)), record, str(original))
        else:
            raise BadOption(f"original= is a float model or its folder, not a {type(original).__name__}")
        for name, (shape, values) in record.fingerprint.items():
            weight = originals(name)
            found = {name: (tuple(weight.shape), marks.sample(weight).tolist())}
            if marks.same_origin({name: (shape, values)}, found):
                raise AdapterMismatch(f"{originals.where} holds another {name} than the model was quantized from")
        return originals

    def __call__(self, name: str) -> Tensor:
        weight = self.read(name).detach()
        if weight.ndim == 3 and name in self.record.fingerprint:  # a file does not say which way experts are stored
            shape, values = self.record.fingerprint[name]
            for turned in (weight, weight.transpose(1, 2)):
                if not marks.same_origin({name: (shape, values)}, {name: marks.of_weight(turned)}):
                    return turned
        return weight

    def like(self, name: str, quantized: Tensor) -> Tensor:
        """The weight in the dtype, in the shape and on the device of its dequantized twin.

        Raises:
            AdapterMismatch: another shape. NonFiniteWeights: NaN or infinity.
        """
        weight = self(name)
        if weight.shape != quantized.shape:
            raise AdapterMismatch(
                f"{self.where} has a {name} of {tuple(weight.shape)}, and the model one of {tuple(quantized.shape)}: it is "
                "another model"
            )
        weight = weight.to(quantized)
        if not weight.isfinite().all():
            raise NonFiniteWeights(f"{name} of {self.where} holds NaN or infinity")
        return weight


def _from_model(model: nn.Module, name: str) -> Tensor:
    try:
        weight = fused_weight(model, name)
        weight = float_weight(model.get_submodule(name)) if weight is None else weight
    except AttributeError as error:
        raise BadOption(f"the original has no layer {name}: it is another kind of model") from error
    if weight.is_meta:
        raise UnsupportedDevice(f"the original's {name} is on the meta device, where weights have no values")
    return weight


class _Folder:
    """Tensors of a folder, of the shards in an index, or of one file, by name, read when asked for."""

    def __init__(self, path: Path):
        folder, index, pattern = path, path / "model.safetensors.index.json", "*.safetensors"
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            folder, index = path.parent, path
            pattern = glob.escape(path.name)
        elif not path.is_dir():
            raise BadFolder(f"{path} is no folder, no index of shards and no safetensors file")
        try:
            if index.is_file() and index.suffix == ".json":
                self.files = {key: folder / file for key, file in read_weight_map(index).items()}
            else:
                self.files = {}
                for path in sorted(folder.glob(pattern)):
                    with safe_open(path, framework="pt") as file:
                        self.files.update(dict.fromkeys(file.keys(), path))
        except Exception as error:
            raise BadFolder(f"cannot read the weights in {folder}: {error}") from error
        if not self.files:
            raise BadFolder(f"{folder} holds no safetensors files")
        self.folder = folder
        self.conv1d = _is_gpt2(folder)

    def __call__(self, name: str) -> Tensor:
        fused = self._fused(name)
        key = fused or self._key(f"{name}.weight")
        try:
            with safe_open(self.files[key], framework="pt") as file:
                weight = file.get_tensor(key)
        except Exception as error:
            raise BadFolder(f"cannot read {key} from {self.files[key]}: {error}") from error
        return weight.T if self.conv1d and fused is None else weight

    def _fused(self, name: str) -> str | None:
        """The key of a fused expert weight, which is a parameter's own name; None for layers."""
        hits = (
            [name]
            if name in self.files
            else [k for k in self.files if name.endswith("." + k) or k.endswith("." + name)]
        )
        return hits[0] if len(hits) == 1 else None

    def _key(self, wanted: str) -> str:
        """Checkpoints may lack, or have, the base model's prefix."""
        if wanted in self.files:
            return wanted
        hits = [k for k in self.files if k.endswith("." + wanted) or wanted.endswith("." + k)]
        if len(hits) != 1:
            raise BadFolder(
                f"{self.folder} has no {wanted}: it is another model's folder, or stores it in another form"
            )
        return hits[0]


def _is_gpt2(folder: Path) -> bool:
    """Whether the folder's linear weights are stored as (in, out), as models of `Conv1D` do."""
    try:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        return any(is_conv1d(m) for m in model.modules())
    except Exception:
        return False

"""What can be said of an output folder before anything is loaded: whether it can be written, and how large it will be."""

from __future__ import annotations

import glob
import os
import shutil
from typing import Any

import torch
from torch import nn

from qft.core.files import as_path, check_path
from qft.core.quantizer import as_float_dtype, float_weight
from qft.core.registry import get_quantizer
from qft.core.selection import select, settle, target_weights
from qft.errors import BadFolder
from qft.memory.outline import weight_bytes
from qft.pipeline.from_pretrained import model_class, read_config
from qft.saving.save import read_note


def check_output(folder: Any, overwrite: bool, sources: list[str], nbytes: int = 0) -> None:
    """Raise `BadFolder` where an output folder is somebody's, cannot be written, or has no room for `nbytes`."""
    final = as_path(folder)
    for source in sources:
        if os.path.realpath(source) == os.path.realpath(final):
            raise BadFolder(f"{final} is what is read: write to another folder")
    try:
        if final.exists() and not final.is_dir():
            raise BadFolder(f"{final} is a file, and a folder is to be written there")
        if final.is_dir() and any(final.iterdir()) and not overwrite:
            raise BadFolder(f"{final} exists and is not empty: give another folder, or --overwrite")
        if (final / "adapter_config.json").is_file():
            raise BadFolder(f"{final} holds an adapter, which from_pretrained would put over the new weights")
        above = next(p for p in [final.absolute(), *final.absolute().parents] if p.exists())
        if not above.is_dir():
            raise BadFolder(f"cannot write to {final}: {above} is a file")
        # the new folder is made beside the old one, and takes its place
        for place in {above, final.absolute().parent if final.is_dir() else above}:
            if not os.access(place, os.W_OK | os.X_OK):
                raise BadFolder(f"cannot write to {final}: no permission in {place}")
        free = shutil.disk_usage(above).free
    except OSError as error:
        if isinstance(error, BadFolder):
            raise
        raise BadFolder(f"cannot write to {final}: {error.strerror or error}") from error
    if nbytes > free:
        raise BadFolder(
            f"cannot write to {final}: {nbytes / 2**30:.2f} GiB are needed, and {free / 2**30:.2f} GiB are free"
        )


def _empty(path: str) -> nn.Module:
    """The float model of a folder's config, on "meta"."""
    import transformers

    from qft.pipeline.foreign import _without_quantization

    cls, config = model_class(path, {}), _without_quantization(read_config(path, {}))
    try:
        with torch.device("meta"):
            return cls.from_config(config) if cls is transformers.AutoModelForCausalLM else cls(config)
    except ValueError as error:
        raise BadFolder(f"no model can be made of the config of {path}: {str(error).splitlines()[0]}") from error


def _itemsize(path: str, dtype: Any) -> int:
    if dtype is None or dtype == "auto":
        dtype = getattr(read_config(path, {}), "dtype", None) or torch.float32
    return as_float_dtype(dtype).itemsize


def quantized_size(path: str, spec: Any, skip: Any, dtype: Any) -> int:
    """Bytes of a quantized model's files; raises what is wrong with the options over its shapes."""
    model, itemsize = _empty(path), _itemsize(path, dtype)
    selection = select(model, spec.quantizers, skip)
    selection = settle(selection, target_weights(model, selection))
    quantizers = {**selection.targets, **selection.stacks}
    codes = sum(weight_bytes(quantizers[n], tuple(w.shape)) for n, w in target_weights(model, selection).items())
    left = sum(p.numel() for p in model.parameters())
    left -= sum(w.numel() for w in target_weights(model, selection).values())
    return codes + left * itemsize


def merged_size(source: str, base: str, into: str, dtype: torch.dtype | None) -> int:
    model, itemsize = _empty(check_path(base)), _itemsize(base, dtype)
    total = sum(p.numel() for p in model.parameters()) * itemsize
    note = read_note(source) if into == "quantized" else None
    if into == "float" or note is None:
        files = glob.glob(os.path.join(glob.escape(base), "*.safetensors")) if into == "quantized" else []
        return sum(map(os.path.getsize, files)) or total
    quantizers = [get_quantizer(q) for q in note["quantizers"]]
    modules = dict(model.named_modules())
    for name, i in note["layers"].items():
        if name in modules:
            weight = float_weight(modules[name])
            total += weight_bytes(quantizers[i], tuple(weight.shape)) - weight.numel() * itemsize
    return total

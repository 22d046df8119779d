"""Open what a folder holds: an adapter over its base, a quantized model, a float one where that is asked for, a tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qft.core.adopt import adopt
from qft.core.configs import read_json_object
from qft.core.console import one_line, without_deprecations
from qft.core.devices import check_device, place
from qft.core.files import check_model_path, is_adapter
from qft.core.registry import from_config
from qft.errors import BadFolder, BadOption
from qft.pipeline.from_pretrained import load_quantized, read_config, stored_quantization
from qft.saving.load import _strict_load, check_adapter_files, load
from qft.saving.save import read_note

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip


def open_model(
    folder: str | os.PathLike[str], base: Any = None, *, device: Any = None, dtype: Any = "auto", floats: bool = False
) -> nn.Module:
    """An adapter over its base, as `qft.load` gives it, or a quantized model.

    Args:
        folder: of an adapter, as `qft.save` and PEFT write it, or of a quantized model, or an id of the hub.
        base: of an adapter, where its config names another or none.
        device: default the accelerator where there is one.
        dtype: to load floats in; "auto" is the checkpoint's own.
        floats: take a float model, too, and an adapter of plain PEFT over one.

    Raises:
        BadFolder: nothing there, nothing that can be read, or weights that are missing. BadOption: a float model; a base
        for what is no adapter. What `qft.load` raises.
    """
    folder, device = check_model_path(folder), check_device(device)
    if is_adapter(folder):
        base = None if base is None else check_model_path(base)
        if floats and read_note(folder) is None:
            name = base_of(folder, base)
            if not name:
                raise BadFolder(f"{folder} does not name its base model: load it yourself, and give the model")
            base = _loaded(name, device, dtype)
            if adopt(base) is None:
                with _strict_load(), without_deprecations():
                    return PeftModel.from_pretrained(base, folder)
            return load(folder, base)
        return load(folder, base, dtype=dtype, **({} if device is None else {"device": device}))
    if base is not None:
        raise BadOption(f"--base goes with an adapter, and {folder} holds none (no adapter_config.json)")
    if not floats and stored_quantization(folder, {}) is None:
        raise BadOption(f"{folder} is a float model: there is nothing quantized in it, and no adapter")
    model = _loaded(folder, device, dtype)
    if not floats and adopt(model) is None:
        raise BadFolder(f"{folder} says that it is quantized, and no quantized layer was found in it")
    return model


def _loaded(folder: str, device: torch.device | None, dtype: Any) -> nn.Module:
    """A model of which no weight is missing, on its own backend's device where none is given."""
    if device is None:
        stored = getattr(read_config(folder, {}), "quantization_config", None)
        stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
        device = place([from_config(stored)] if stored else [], stored=True)
    return load_quantized(folder, None, device, False, lambda m: [n for n, _ in m.named_modules()], dtype=dtype)


def base_of(source: str, base: str | None) -> str | None:
    """The folder or id of the model that an adapter is over, or None where nothing names it; of a model, itself."""
    if base is not None or not is_adapter(source):
        return base or source
    check_adapter_files(Path(source))
    if (Path(source) / "base" / "config.json").is_file():
        return str(Path(source) / "base")
    return read_json_object(Path(source) / "adapter_config.json").get("base_model_name_or_path")


def find_tokenizer(*places: str | os.PathLike[str] | None, strict: bool = False) -> Any | None:
    """The tokenizer of the first of these folders and hub ids that holds one, or None.

    Raises:
        BadFolder: with `strict`, a folder holds one that cannot be loaded; else it is passed over.
    """
    from transformers import AutoTokenizer

    for where in places:
        folder = Path(where or "").expanduser()
        local = folder.is_dir()
        if where is None or (local and not any((folder / name).is_file() for name in TOKENIZER_FILES)):
            continue
        try:
            return AutoTokenizer.from_pretrained(str(folder) if local else os.fspath(where))
        except Exception as error:  # of many kinds, none of them documented
            if strict and local:
                line = one_line(error)
                raise BadFolder(f"cannot load a tokenizer from {folder}: {line}") from error
    return None

"""Where an evaluation takes its models and its tokenizer from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qft import hf, marks
from qft.devices import check_device, default_device
from qft.errors import AdapterMismatch, BadFolder, BadOption, NeedsOriginal, QftError
from qft.loading import load_quantized
from qft.originals import Originals
from qft.restoring import _strict_load, load
from qft.saving import read_note
from qft.sourcing import readable

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)


def check_folder(place: Any, option: str) -> None:
    """Refuse what is neither a folder that may be read nor can be a hub id, before anything is loaded.

    Raises:
        BadFolder, BadOption
    """
    if not isinstance(place, str | os.PathLike):
        raise BadOption(f"{option} is a model or its folder, not a {type(place).__name__}")
    path = Path(place).expanduser()
    try:
        if path.is_dir():
            names = os.listdir(path)
            if not {"config.json", "adapter_config.json"} & set(names):
                raise BadFolder(f"{path} holds neither a model (config.json) nor an adapter (adapter_config.json)")
            return
        if path.exists():
            raise BadFolder(f"{path} is a file: give the folder of a model or an adapter")
    except PermissionError as error:
        raise BadFolder(f"cannot read {path}: {error.strerror}") from error
    text = os.fspath(place)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text:
        raise BadFolder(f"there is no folder {text!r}")


def open_model(place: str | os.PathLike[str], device: Any = None, dtype: Any = "auto") -> nn.Module:
    """The model of a folder or hub id: an adapter over its base, a quantized checkpoint, or a float one.

    Raises:
        BadFolder: missing, corrupt or foreign files, or weights that are not there.
        QftError: as `qft.load`.
    """
    path = Path(place).expanduser()
    device = check_device(device) or default_device()
    place = str(path) if path.exists() else os.fspath(place)
    if not (path / "adapter_config.json").is_file():
        return load_quantized(place, None, device, False, lambda m: [n for n, _ in m.named_modules()], dtype=dtype)
    if read_note(path) is not None:
        return load(path, device=device, dtype=dtype)
    name = _base_name(path)
    if not name:
        raise BadFolder(f"{path} does not name its base model: load it yourself, and give the model")
    base = load_quantized(name, None, device, False, lambda m: [n for n, _ in m.named_modules()], dtype=dtype)
    if hf.adopt(base) is not None:
        return load(path, base)
    with _strict_load():
        return PeftModel.from_pretrained(base, str(path))


def _base_name(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        return config.get("base_model_name_or_path") or None
    except (OSError, ValueError, AttributeError) as error:
        raise BadFolder(f"{folder / 'adapter_config.json'} is no adapter config that can be read: {error}") from error


def origins(model: nn.Module, place: Any) -> list[str]:
    """Where a model says that it comes from: its folder, and those that its adapter's and its own config name."""
    names = [os.fspath(place)] if place is not None else []
    names += [c.base_model_name_or_path for c in getattr(model, "peft_config", {}).values()]
    names.append(getattr(getattr(marks.base_model(model), "config", None), "_name_or_path", None))
    return list(dict.fromkeys(str(n) for n in names if n))


def find_baseline(model: nn.Module, place: Any, given: Any, device: Any, dtype: Any) -> tuple[nn.Module | None, str]:
    """The float baseline and its name, or None and why there is none.

    Raises:
        BadOption: a baseline that is the model itself. BadFolder: a given folder that cannot be read.
    """
    if given is False:
        return None, "none was asked for"
    if isinstance(given, nn.Module):
        if marks.base_model(given) is marks.base_model(model):
            raise BadOption(
                "baseline= is the model itself, or the base that its adapters were put into: load the float model anew"
            )
        return given, type(marks.base_model(given)).__name__
    if given is not None:
        return open_model(given, device, dtype), os.fspath(given)
    record = hf.adopt(model)
    if record is None and not hasattr(model, "peft_config"):
        return None, "the model is a float model itself; pass baseline= to compare it with another"
    try:
        name = readable([n for n in origins(model, None) if n != place], {})
        baseline = open_model(name, device, dtype)
        if record is not None:
            Originals.of(baseline, record)
        return baseline, name
    except NeedsOriginal as error:
        return None, str(error).split(": pass original=")[0].replace(
            "the new base is made of the float weights, and ", ""
        )
    except AdapterMismatch as error:
        return None, f"{error}, so it is no baseline"
    except torch.OutOfMemoryError:
        return None, "the float model does not fit beside this one"
    except QftError as error:
        return None, f"the float model that it comes from cannot be loaded: {error}"


def find_tokenizer(given: Any, places: Iterable[str]) -> Any:
    """The tokenizer, that of a folder or hub id, or the first that these places hold; None where none does.

    Raises:
        BadFolder: a given place has none.
    """
    if given is not None and not isinstance(given, str | os.PathLike):
        return given
    from transformers import AutoTokenizer

    for place in [os.fspath(given)] if given is not None else places:
        local = Path(place).expanduser()
        if local.is_dir() and not any((local / name).is_file() for name in TOKENIZER_FILES):
            continue
        try:
            return AutoTokenizer.from_pretrained(str(local) if local.is_dir() else place)
        except Exception as error:  # of many kinds, none of them documented
            if given is not None or local.is_dir():
                line = " ".join(str(error).split())[:200]
                raise BadFolder(f"cannot load a tokenizer from {place}: {line}") from error
    if given is not None:
        raise BadFolder(f"{os.fspath(given)} holds no tokenizer")
    return None

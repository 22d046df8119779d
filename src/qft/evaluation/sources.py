"""Where an evaluation takes its baseline and its tokenizer from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qft.core import record as marks
from qft.core.adopt import adopt
from qft.core.originals import Originals
from qft.errors import AdapterMismatch, BadFolder, BadOption, NeedsOriginal, QftError
from qft.saving.open import find_tokenizer, open_model
from qft.saving.transfer_source import readable


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
        return open_model(given, device=device, dtype=dtype, floats=True), os.fspath(given)
    record = adopt(model)
    if record is None and not hasattr(model, "peft_config"):
        return None, "the model is a float model itself; pass baseline= to compare it with another"
    try:
        name = readable([n for n in origins(model, None) if n != place], {})
        baseline = open_model(name, device=device, dtype=dtype, floats=True)
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


def tokenizer_of(given: Any, places: Iterable[str]) -> Any:
    """The tokenizer, that of a folder or hub id, or the first that these places hold; None where none does.

    Raises:
        BadFolder: a given place has none.
    """
    if given is None:
        return find_tokenizer(*places, strict=True)
    if not isinstance(given, str | os.PathLike):
        return given
    found = find_tokenizer(given, strict=True)
    if found is None:
        raise BadFolder(f"{os.fspath(given)} holds no tokenizer that can be loaded")
    return found

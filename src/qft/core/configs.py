"""Checks of what configs on disk say, before anything is built from them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qft.errors import BadFolder

MOST = {
    "hidden_size": 2**20,
    "vocab_size": 2**27,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "intermediate_size": 2**24,
    "head_dim": 2**20,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_layer": 10_000,
    "n_embd": 2**20,
    "n_head": 2**16,
    "num_layers": 10_000,
    "d_model": 2**20,
}
"""Upper bounds of a config's sizes: well above every published model, and low enough to build an empty one."""
DROPOUTS = r"(dropout|_pdrop|dropout_prob|dropout_rate|layerdrop|drop_rate|drop_path_rate)$"
"""Names of a config's fields that are probabilities."""
ABOVE_ZERO = {"hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "n_layer", "n_embd", "n_head"}
"""Sizes that zero makes meaningless. Others use zero for an absent part."""


def read_json_object(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BadFolder: the file cannot be read, is not JSON, is nested too deep, or holds another value than an object.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFolder(f"cannot read {file}: {error.strerror or error}") from error
    except RecursionError as error:
        raise BadFolder(f"{file} is damaged: its JSON is nested too deep") from error
    except ValueError as error:
        raise BadFolder(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise BadFolder(f"{file} is damaged: it holds a {type(found).__name__}, and should hold a JSON object")
    return found


def check_model_config(values: Mapping[str, Any], where: str | os.PathLike[str]) -> None:
    """Check type and range of the sizes of a model config, and of the configs in it.

    Raises:
        BadFolder: the field, its value and what it should be.
    """
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
        raise BadFolder(f"{where}: architectures is {_shown(names)}; it is a list of class names")
    for key, most in MOST.items():
        value = values.get(key)
        value = list(value.values()) if isinstance(value, Mapping) else value  # LXMERT's layers, by encoder
        for number in value if isinstance(value, list | tuple) else (value,):
            least = 1 if key in ABOVE_ZERO else 0
            if number is not None and not (type(number) is int and least <= number <= most):
                raise BadFolder(f"{where}: {key} is {_shown(number)}; it is an integer from {least} to {most}")
    for key, value in values.items():
        if re.search(DROPOUTS, str(key)) and type(value) in (int, float) and not 0 <= value <= 1:
            raise BadFolder(f"{where}: {key} is {_shown(value)}; it is a probability, from 0 to 1")
        if isinstance(value, Mapping) and str(key).endswith("_config") and key != "quantization_config":
            check_model_config(value, f"{where}: {key}")


def check_model_folder(folder: str | os.PathLike[str]) -> None:
    """Check the config.json of a local folder; do nothing where there is none."""
    file = Path(folder, "config.json")
    if os.path.isfile(file):  # Path.is_file raises for a name that is too long
        check_model_config(read_json_object(file), file)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

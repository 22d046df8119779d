"""What a path names: a file, the folder of a model or of an adapter, an id of the hub. A wrong one gets near names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from qft.errors import BadFolder, BadOption

CONFIGS = {"config.json", "adapter_config.json"}


def check_path(path: Any, what: str = "folder", *, hub: bool = True) -> str:
    """`path` as text, where it exists or, with `hub`, may be an id of the hub.

    Raises:
        BadFolder: nothing is there; near names are in the message. BadOption: it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise BadOption(f"give a path, not a {type(path).__name__}")
    text = os.path.expanduser(os.fspath(path))
    here = Path(text)
    try:
        if text and here.exists():
            return text
    except OSError as error:
        raise BadFolder(f"cannot look at {text}: {error.strerror or error}") from error
    local = not text or here.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if hub and not local and here.suffix != ".json":
        return text
    hint = ": give the folder of a model or an adapter, or an id of the hub (owner/name)" if hub else ""
    raise BadFolder(f"there is no {what} {text!r}{did_you_mean(here) or hint}")


def check_model_path(path: Any) -> str:
    """`path` as text, where it is a folder with a model or an adapter, or may be an id of the hub.

    Raises:
        BadFolder, BadOption: it is neither.
    """
    text = check_path(path)
    here = Path(text)
    try:
        names = os.listdir(here) if here.exists() else CONFIGS
    except NotADirectoryError as error:
        raise BadFolder(f"{text} is a file: give the folder of a model or an adapter") from error
    except OSError as error:
        raise BadFolder(f"cannot read {text}: {error.strerror or error}") from error
    if not CONFIGS & set(names):
        below = sorted({str(file.parent) for file in here.glob("*/*config.json") if file.name in CONFIGS})[:3]
        hint = f": did you mean {' or '.join(below)}?" if below else ""
        raise BadFolder(f"{text} holds neither a model (config.json) nor an adapter (adapter_config.json){hint}")
    return text


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def did_you_mean(path: str | os.PathLike[str]) -> str:
    """What is there under a name like the first that is missing in a path, as the end of a message, or nothing."""
    missing = path = Path(path)
    try:
        while not missing.parent.exists():
            missing = missing.parent
        names = [entry.name for entry in missing.parent.iterdir() if not entry.name.startswith(".")]
        found = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.6)
        there = [p for name in found if (p := missing.parent / name / path.relative_to(missing)).exists()]
    except OSError:
        return ""
    return f": did you mean {' or '.join(map(str, there))}?" if there else ""

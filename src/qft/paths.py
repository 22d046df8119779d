"""What a path names: a file, the folder of a model or of an adapter, an id of the hub. A wrong one gets near names."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

from qft.errors import BadFolder, BadOption

LONGEST_NAME = 255
"""Bytes of one name in a path, on all common file systems."""
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


def as_path(path: Any, what: str = "") -> Path:
    """Return a path that the file system can look at; nothing need be there.

    Args:
        path: text or a path.
        what: the start of a message, such as "project_name: ".

    Raises:
        BadOption: it is not a path. BadFolder: a name is too long for the file system, or holds a zero byte.
    """
    try:
        found = Path(path)
    except TypeError:
        raise BadOption(f"{what}give the path of a folder, not a {type(path).__name__}") from None
    try:
        os.lstat(found)
    except ValueError as error:
        raise BadFolder(f"{what}{str(found)!r} is not a path: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadFolder(f"{what}cannot use {found}: {error.strerror}") from error
    return found


def partial_name(prefix: str, name: str, suffix: str = "") -> str:
    """Return a temporary name for a file called `name`, of at most `LONGEST_NAME` bytes; a long name becomes its digest."""
    room = LONGEST_NAME - len(os.fsencode(prefix + suffix))
    if len(os.fsencode(name)) > room:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32] + os.path.splitext(name)[1][-16:]
    return f"{prefix}{name}{suffix}"


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

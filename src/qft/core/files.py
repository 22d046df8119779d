"""What a path names: a file, the folder of a model or of an adapter, an id of the hub. A wrong one gets near names."""

from __future__ import annotations

import difflib
import errno
import glob
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qft.errors import BadFolder, BadOption, QftError

if TYPE_CHECKING:
    pass

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


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], *, drop: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well; else the old one stays.

    Files of the old folder that the new one does not write are kept, save those that match a pattern of `drop`.
    """
    final = as_path(folder)
    if os.path.exists(final) and not os.path.isdir(final):  # False, too, where looking is not allowed
        raise BadFolder(f"{final} is a file, and a folder is to be written there")
    end = f".partial-{platform.node()}-"
    host = partial_name(".", final.name, end + "0" * 10).removesuffix("0" * 10)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f"{glob.escape(host)}*"):  # by a process that was killed
            if not _alive(left.name.removeprefix(host)):
                shutil.rmtree(left, ignore_errors=True)
        partial = final.parent / f"{host}{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise BadFolder(f"cannot write to {final}: {error.strerror or error}") from error
    try:
        yield partial
        final.mkdir(exist_ok=True)
        _move_in(partial, final, drop)
    except OSError as error:
        if isinstance(error, QftError):
            raise
        raise BadFolder(f"cannot write to {final}: {error.strerror or error}") from error
    except SafetensorError as error:  # what the system refuses its writer, such as a full disk
        raise BadFolder(f"cannot write to {final}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_in(partial: Path, final: Path, drop: Sequence[str]) -> None:
    """Give every new file its place; where one cannot have it, all old ones are put back."""
    new = sorted(partial.rglob("*"))
    old = {path for pattern in drop for path in final.glob(pattern)}
    old |= {final / path.relative_to(partial) for path in new}
    attic = partial / ".replaced"
    attic.mkdir()
    moves = [(path, attic / str(i)) for i, path in enumerate(sorted(old)) if path.is_file()]
    moves += [(path, final / path.relative_to(partial)) for path in new if not path.is_dir()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _alive(pid: str) -> bool:
    import psutil  # comes with accelerate and PEFT

    return pid.isdecimal() and psutil.pid_exists(int(pid))


def write(path: str | os.PathLike[str], save: Callable[[Path], Any]) -> None:
    """Have `save` write a file under a temporary name of the same ending, then rename it."""
    if not isinstance(path, str | os.PathLike):
        raise BadOption(f"path= is a file's path, not a {type(path).__name__}")
    final = as_path(path)
    partial = final.with_name(partial_name(f".partial-{os.getpid()}-", final.name))
    try:
        save(partial)
        os.replace(partial, final)
    except OSError as error:
        raise BadFolder(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)

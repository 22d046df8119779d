"""Held-out data: the rows of a file, of a folder, or of what is in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.core.files import did_you_mean
from qft.data.files import FORMS, SUFFIXES, Rows, read_rows
from qft.errors import BadFolder, BadOption

KINDS: dict[type, str] = {dict: f"an object with {FORMS}", str: "a text", list: "a list of token ids"}


@dataclass(frozen=True)
class Row:
    """One row, and where it is: "held.jsonl line 3"."""

    value: Any
    where: str


def rows(data: Any) -> list[Row]:
    """The rows of a file, of a folder, or of what is in memory.

    Args:
        data: a path, as `qft.data.files.read_rows` takes it (a .txt file is one text); a folder with a file or a split of
            `datasets` that is called "valid", "test" or the like; a text; or an iterable of rows: texts, token ids,
            mappings of the forms above.

    Raises:
        BadFolder: no such file, or it cannot be read.
        BadOption: a line that is broken, with its number; a file without rows.
    """
    if isinstance(data, os.PathLike) or (
        isinstance(data, str) and data.endswith((*SUFFIXES, ".txt")) and "\n" not in data
    ):
        return _of_file(data)
    if isinstance(data, str):
        if "\n" not in data and len(data) < 4096 and os.path.exists(data):
            return _of_file(data)
        if _names_a_file(data):
            raise BadFolder(f"there is no file or folder {data!r}{did_you_mean(data)}")
        data = [data]
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise BadOption(f"data is a file or rows ({FORMS}), not a {type(data).__name__}")
    found = [Row(value, f"row {i}") for i, value in enumerate(data, 1)]
    if not found:
        raise BadOption("data has no rows: there is nothing to evaluate on")
    return found


def _names_a_file(text: str) -> bool:
    """Whether a text reads as a path: slashes or a zero byte, and no space."""
    return bool(text) and not re.search(r"\s", text) and bool({os.sep, "/", "\0"} & set(text))


def _of_file(path: Any) -> list[Row]:
    found = _held_out(Path(path)) if os.path.isdir(path) else read_rows(path, KINDS)
    if found.skipped:
        raise BadOption(found.skipped[0])
    if not len(found):
        raise BadOption(f"{found.source} is empty: it has no rows to evaluate on")
    return [Row(value, found.where(i)) for i, value in enumerate(found.rows)]


def _held_out(folder: Path) -> Rows:
    """The split of a folder that is called like one, or its only one."""
    from qft.data.splits import EVALUATION, splits_of

    splits = splits_of(folder)
    names = [name for name in EVALUATION if name in splits] or (list(splits) if len(splits) == 1 else [])
    if not names:
        has = ", ".join(splits) or "no data files"
        raise BadFolder(f"{folder} is a folder with {has}, and none is called {', '.join(EVALUATION)}: give a file")
    return splits[names[0]](True)  # what is broken is said by who asked

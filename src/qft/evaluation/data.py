"""Held-out data: the rows of a file, or of what is in memory."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.errors import BadFolder, BadOption, MissingDependency

FORMS = "messages (role and content), prompt and completion, or text"
ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Row:
    """One row, and where it is: "held.jsonl, line 3"."""

    value: Any
    where: str


def rows(data: Any) -> list[Row]:
    """The rows of a file, or of what is in memory.

    Args:
        data: a path (jsonl, json with a list, csv, parquet, txt, which is one text), a text, or an iterable of rows:
            texts, token ids, mappings of the forms above.

    Raises:
        BadFolder: no such file, or it cannot be read.
        BadOption: a line that is broken, with its number; a file without rows.
    """
    if isinstance(data, os.PathLike) or (isinstance(data, str) and data.endswith(ENDINGS) and "\n" not in data):
        return _of_file(Path(data).expanduser())
    if isinstance(data, str):
        if "\n" not in data and len(data) < 4096 and os.path.exists(data):
            return _of_file(Path(data))
        data = [data]
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise BadOption(f"data is a file or rows ({FORMS}), not a {type(data).__name__}")
    found = [Row(value, f"row {i}") for i, value in enumerate(data, 1)]
    if not found:
        raise BadOption("data has no rows: there is nothing to evaluate on")
    return found


def _of_file(path: Path) -> list[Row]:
    try:
        if path.is_dir():
            raise BadFolder(f"{path} is a folder: give a file ({', '.join(ENDINGS)})")
        if not path.exists():
            raise BadFolder(f"there is no file {path}")
        if path.stat().st_size == 0:
            raise BadOption(f"{path} is empty: there is nothing to evaluate on")
        ending = path.suffix.lower()
        if ending == ".parquet":
            found = _parquet(path)
        elif ending in ENDINGS:
            found = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt}[ending](path)
        else:
            raise BadOption(
                f"{path}: files that end in {', '.join(ENDINGS)} are read, and {ending or 'no ending'} is not known"
            )
    except BadFolder:
        raise
    except OSError as error:
        raise BadFolder(f"cannot read {path}: {error.strerror or error}") from error
    if not found:
        raise BadOption(f"{path} has no rows: there is nothing to evaluate on")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadOption(f"{path}, line {number}: not UTF-8 text ({error.reason})") from error
            yield number, text


def _jsonl(path: Path) -> list[Row]:
    found = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadOption(f"{where}: not JSON: {error}") from error
        if not isinstance(value, Mapping | str):
            raise BadOption(f"{where}: a {type(value).__name__}, and a row is an object with {FORMS}")
        found.append(Row(value, where))
    return found


def _json(path: Path) -> list[Row]:
    try:
        values = json.loads("".join(line for _, line in _lines(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadOption):
            raise
        raise BadOption(f"{path}: not JSON: {error}; a file with an object a line ends in .jsonl") from error
    if not isinstance(values, list):
        raise BadOption(f"{path} holds a {type(values).__name__}: give a list of objects with {FORMS}")
    return [Row(value, f"{path}, row {i}") for i, value in enumerate(values, 1)]


def _csv(path: Path) -> list[Row]:
    at = 0

    def counted() -> Iterator[str]:  # the reader's own count stops before a line that it cannot read
        nonlocal at
        for at, line in _lines(path):  # noqa: B007
            yield line

    reader = csv.DictReader(counted(), strict=True)
    found = []
    try:
        for value in reader:
            where = f"{path}, line {at}"
            if None in value or None in value.values():
                kind = "more" if None in value else "fewer"
                raise BadOption(
                    f"{where}: {kind} values than the {len(reader.fieldnames or ())} columns of the first line"
                )
            found.append(Row(value, where))
    except csv.Error as error:
        raise BadOption(f"{path}, line {at}: {error}") from error
    return found


def _txt(path: Path) -> list[Row]:
    text = "".join(line for _, line in _lines(path))
    return [Row(text, str(path))] if text.strip() else []


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependency(
            f"{path}: reading parquet needs pyarrow, not installed here: pip install pyarrow"
        ) from error
    try:
        values = parquet.read_table(path).to_pylist()
    except OSError:
        raise
    except Exception as error:
        raise BadOption(f"{path} is no parquet file that can be read: {' '.join(str(error).split())[:200]}") from error
    return [Row(value, f"{path}, row {i}") for i, value in enumerate(values, 1)]

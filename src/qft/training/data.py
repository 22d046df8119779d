"""Rows of training data from files, each with the place that it came from."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qft.errors import BadFolder, BadOption, MissingDependency

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
EVALUATION = ("valid", "validation", "val", "dev", "eval", "test")


@dataclass
class Rows:
    """The rows of one file or split.

    Attributes:
        rows: mappings of column to value, by index.
        source: the file or split.
        lines: the line of each row in its file, from 1, where the file has lines.
        skipped: what was skipped: the place and why, of each bad row.
        digest: of the file's bytes, or of the data set's fingerprint: the same for the same data.
    """

    rows: Sequence[dict[str, Any]]
    source: str
    lines: list[int] | None = None
    skipped: list[str] = field(default_factory=list)
    digest: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Such as "train.jsonl line 7"."""
        return f"{self.source} " + (f"row {index + 1}" if self.lines is None else f"line {self.lines[index]}")

    @property
    def columns(self) -> list[str]:
        names = getattr(self.rows, "column_names", None)
        return list(names) if names is not None else list(dict.fromkeys(k for row in self.rows for k in row))


def read_data(
    path: str, train_split: str = "train", valid_split: str | None = None, *, skip_bad_rows: bool = False
) -> tuple[Rows, Rows | None]:
    """The training rows, and the evaluation's where there are such.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file, a folder with such files by split, or a folder that
            `datasets` saved.
        valid_split: a split's name, or a file's path; None takes what is called like one.
        skip_bad_rows: skip and count rows that cannot be read, instead of refusing.

    Raises:
        BadFolder: no such file, not readable, empty, or a row that is broken, with its line.
        BadOption: no such split.
    """
    where = Path(path).expanduser()
    if not os.path.exists(where):
        raise BadFolder(f"data_path: there is no {path!r} here; it is a file ({', '.join(SUFFIXES)}) or a folder")
    splits = _splits(where)
    if train_split not in splits:
        if len(splits) > 1 or where.is_dir():
            raise BadOption(f"train_split={train_split!r}: {path} has {', '.join(splits) or 'no data files'}")
        train_split = next(iter(splits))
    if valid_split is None:
        found = [n for n in EVALUATION if n in splits and n != train_split]
        valid_split = found[0] if found else None
    elif valid_split not in splits:
        if not os.path.isfile(valid_split):
            raise BadOption(f"valid_split={valid_split!r}: it is neither a file nor one of {', '.join(splits)}")
        splits[valid_split] = lambda skip: read_file(Path(valid_split), skip)
    train = splits[train_split](skip_bad_rows)
    valid = splits[valid_split](skip_bad_rows) if valid_split is not None else None
    for rows in (train, valid):
        if rows is not None and not len(rows):
            bad = f": all of its {len(rows.skipped)} rows are broken" if rows.skipped else ""
            raise BadFolder(f"{rows.source} has no rows{bad or ': the file is empty'}")
    return train, valid


Reader = Callable[[bool], Rows]


def _splits(path: Path) -> dict[str, Reader]:
    if path.is_file():
        return {path.stem: lambda skip: read_file(path, skip)}
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise BadFolder(f"cannot read {path}: {error.strerror}") from error
    if "dataset_dict.json" in names or "dataset_info.json" in names:
        return _saved(path)
    files = [path / n for n in names if Path(n).suffix in SUFFIXES]
    found: dict[str, Reader] = {}
    for file in files:
        if file.stem in found:
            raise BadOption(f"{path} has two files for the split {file.stem!r}: leave one, or give data_path a file")
        found[file.stem] = functools.partial(read_file, file)
    return found


def _saved(path: Path) -> dict[str, Reader]:
    datasets = _datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise BadFolder(f"{path} is not a folder that datasets can load: {_line(error)}") from error
    whole = data if isinstance(data, dict) else {"train": data}

    def reader(name: str) -> Reader:
        rows = whole[name]
        return lambda skip: Rows(rows, f"{path.name}[{name}]", digest=_digest_of(rows))

    return {name: reader(name) for name in whole}


def _digest_of(rows: Any) -> str:
    """Of what is in it: a fingerprint of `datasets` differs for the same rows saved twice."""
    found = hashlib.sha256()
    for start in range(0, len(rows), 1000):
        found.update(repr(rows[start : start + 1000]).encode())
    return found.hexdigest()


def read_file(path: Path, skip_bad_rows: bool = False) -> Rows:
    """The rows of one file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise BadOption(f"{path.name}: files of {suffix or 'no suffix'} are not read; these are: {', '.join(SUFFIXES)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadFolder(f"cannot read {path}: {error.strerror}") from error
    digest = hashlib.sha256(raw).hexdigest()
    if suffix == ".parquet":
        return Rows(_parquet(path), path.name, digest=digest)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadFolder(f"{path.name} line {line} is not UTF-8 ({error.reason}): save the file as UTF-8") from error
    if not text.strip():
        return Rows([], path.name, [], digest=digest)
    found = {".csv": _csv, ".tsv": _csv, ".json": _json}.get(suffix, _jsonl)(text, path)
    rows, lines, skipped = [], [], []
    for line, row, problem in found:
        if problem is None:
            rows.append(row)
            lines.append(line)
        elif skip_bad_rows:
            skipped.append(f"{path.name} line {line}: {problem}")
        else:
            raise BadFolder(
                f"{path.name} line {line}: {problem}; mend it, or skip_bad_rows=True skips and counts such rows"
            )
    return Rows(rows, path.name, lines, skipped, digest)


Found = Iterator[tuple[int, dict[str, Any], str | None]]


def _jsonl(text: str, path: Path) -> Found:
    # not splitlines(): JSON strings may hold U+2028 and its like
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, {}, f"broken JSON ({getattr(error, 'msg', None) or 'nested too deep'})"
            continue
        yield number, row, None if isinstance(row, dict) else f"a row is a JSON object, not {type(row).__name__}"


def _json(text: str, path: Path) -> Found:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\n{" in text.strip() and text.lstrip().startswith("{"):
            yield from _jsonl(text, path)  # JSON lines under the name .json
            return
        line = getattr(error, "lineno", 1)
        raise BadFolder(f"{path.name} line {line}: broken JSON ({getattr(error, 'msg', error)})") from error
    if isinstance(whole, dict):
        lists = [v for v in whole.values() if isinstance(v, list)]
        whole = lists[0] if len(lists) == 1 else [whole]  # {"data": [...]}
    if not isinstance(whole, list):
        raise BadFolder(f"{path.name}: it is a JSON list of objects, not {type(whole).__name__}")
    decoder, at, line = json.JSONDecoder(), text.find("[") + 1, 1
    last = 0
    for row in whole:
        while text[at] in " \t\r\n,":
            at += 1
        line += text.count("\n", last, at)
        last = at
        at = decoder.raw_decode(text, at)[1]
        yield line, row, None if isinstance(row, dict) else f"a row is a JSON object, not {type(row).__name__}"


def _csv(text: str, path: Path) -> Found:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield start, {}, f"broken CSV ({error})"
            start = reader.line_num + 1
            continue
        if fields is None:
            return
        line, start = start, reader.line_num + 1
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise BadFolder(f"{path.name} line {line}: the header names a column twice")
        elif len(fields) != len(header):
            yield line, {}, f"{len(fields)} fields, and the header has {len(header)}"
        else:
            yield line, dict(zip(header, fields)), None


def _parquet(path: Path) -> Any:
    datasets = _datasets()
    try:
        import pyarrow.parquet

        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except Exception as error:
        raise BadFolder(f"{path.name} is not a parquet file, or is damaged: {_line(error)}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency("this needs the package datasets: pip install 'qft[train]'") from error
    return datasets


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def held_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows | None]:
    """A share of the rows, at least one, drawn by the seed, apart from the others, which keep their order."""
    if not share:
        return rows, None
    import random

    count = max(1, round(len(rows) * share))
    if count >= len(rows):
        raise BadOption(f"eval_share={share}: {rows.source} has {len(rows)} rows, and none would be left to train on")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))

    def part(kept: list[int]) -> Rows:
        lines = None if rows.lines is None else [rows.lines[i] for i in kept]
        if hasattr(rows.rows, "select"):
            return Rows(rows.rows.select(kept), rows.source, lines, digest=rows.digest)
        return Rows([rows.rows[i] for i in kept], rows.source, lines, digest=rows.digest)

    train = part([i for i in range(len(rows)) if i not in chosen])
    train.skipped = rows.skipped
    return train, part(sorted(chosen))

"""The rows of training and of evaluation: of a file, of a folder with files by split, or that `datasets` saved."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qft.core.console import first_sentence
from qft.core.files import check_path
from qft.data.files import SUFFIXES, Rows, read_rows
from qft.errors import BadFolder, BadOption, MissingDependency

EVALUATION = ("valid", "validation", "val", "dev", "eval", "test")


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
    where = Path(check_path(path, "file or folder", hub=False))
    splits = splits_of(where)
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


def splits_of(path: Path) -> dict[str, Reader]:
    """What reads each split of a file, of a folder with files by split, or of one that `datasets` saved, by its name."""
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
        raise BadFolder(f"{path} is not a folder that datasets can load: {first_sentence(error)}") from error
    whole = data if isinstance(data, dict) else {"train": data}

    def reader(name: str) -> Reader:
        rows = whole[name]
        return lambda skip: Rows(rows, f"{path}[{name}]", digest=_digest_of(rows))

    return {name: reader(name) for name in whole}


def _digest_of(rows: Any) -> str:
    """Of what is in it: a fingerprint of `datasets` differs for the same rows saved twice."""
    found = hashlib.sha256()
    for start in range(0, len(rows), 1000):
        found.update(repr(rows[start : start + 1000]).encode())
    return found.hexdigest()


def read_file(path: Path, skip_bad_rows: bool = False) -> Rows:
    """The rows of one file, by its suffix; a table keeps the features of `datasets`, such as images."""
    rows = read_rows(path, {dict: "a JSON object"}, error=BadFolder, table=lambda table: _datasets().Dataset(table))
    if rows.skipped and not skip_bad_rows:
        raise BadFolder(f"{rows.skipped[0]}; mend it, or skip_bad_rows=True skips and counts such rows")
    return rows


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency("this needs the package datasets: pip install 'qft[train]'") from error
    return datasets


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

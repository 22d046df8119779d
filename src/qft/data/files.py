"""Rows of a data file, each with the place that it came from: for training, evaluation and calibration."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qft.core.console import one_line
from qft.core.files import check_path
from qft.data.messages import ChatTemplate, check_text, conversation, tools_of, with_system
from qft.errors import BadFolder, BadOption, MissingDependency, NeedsCalibration, QftError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FORMS = "messages (role and content), prompt and completion, or text"


@dataclass
class Rows:
    """The rows of one file or split.

    Attributes:
        rows: by index; mappings of column to value, where nothing else was asked for.
        source: the file or split.
        lines: the line of each row in its file, from 1, where the file has lines.
        skipped: what was skipped: the place and why, of each row that is broken.
        digest: of the file's bytes, or of what the data set holds: the same for the same data.
    """

    rows: Sequence[Any]
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


def read_rows(
    path: Any,
    kinds: Mapping[type, str],
    *,
    error: type[QftError] = BadOption,
    table: Callable[[Any], Sequence[Any]] = lambda table: table.to_pylist(),
) -> Rows:
    """The rows of a file, by its suffix; those that are broken are left out, and named in `skipped`.

    Args:
        path: one of `SUFFIXES`; or .txt, which is one row, where a row may be a text.
        kinds: types that a row may have, each with what to call it.
        error: raised where the whole file is broken.
        table: makes rows of a table of pyarrow.

    Raises:
        BadFolder: there is no such file, or it cannot be read. BadOption: files of that suffix are not read.
        MissingDependency: a parquet file, and no pyarrow.
    """
    file = Path(check_path(path, "file", hub=False))
    known = (*SUFFIXES, ".txt") if str in kinds else SUFFIXES
    suffix = file.suffix.lower()
    if file.is_dir():
        raise BadFolder(f"cannot read {file}: it is a folder; give a file ({', '.join(known)})")
    if suffix not in known:
        raise BadOption(
            f"{file}: files that end in {', '.join(known)} are read, and {suffix or 'no ending'} is not known"
        )
    try:
        raw = file.read_bytes()
    except OSError as failure:
        raise BadFolder(f"cannot read {file}: {failure.strerror or failure}") from failure
    out = Rows([], str(file), digest=hashlib.sha256(raw).hexdigest())
    if suffix == ".parquet":
        out.rows = _parquet(raw, file, error, table)
        return out
    rows, lines = [], []
    wanted = " or ".join(kinds.values())
    try:
        for number, (line, row, problem) in enumerate(PARSERS.get(suffix, _jsonl)(raw.decode("utf-8-sig")), 1):
            if problem is None and not isinstance(row, tuple(kinds)):
                problem = f"a row is {wanted}, not {type(row).__name__}"
            if problem is None:
                rows.append(row)
                lines.append(line)
            else:
                out.skipped.append(f"{file} {f'line {line}' if line else f'row {number}'}: {problem}")
    except UnicodeDecodeError as failure:
        line = raw[: failure.start].count(b"\n") + 1
        raise error(f"{file} line {line}: not UTF-8 text ({failure.reason}); save the file as UTF-8") from failure
    except _Broken as failure:
        raise error(f"{file} {failure}") from failure
    out.rows, out.lines = rows, lines if all(lines) else None
    return out


class _Broken(Exception):
    """Why no row of a file can be read, after its name."""


Found = Iterator[tuple[int, Any, str | None]]
"""Of each row its line, 0 where that is not known; the row; or what is wrong with it."""


def _jsonl(text: str) -> Found:
    # not splitlines(): JSON strings may hold U+2028 and its like
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line), None
        except (ValueError, RecursionError) as error:
            yield number, None, _broken_json(error)


def _broken_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON ({error.msg} at column {error.colno})"
    return f"broken JSON ({'nested too deep' if isinstance(error, RecursionError) else error})"


def _json(text: str) -> Found:
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\n{" in text.strip() and text.lstrip().startswith("{"):
            yield from _jsonl(text)  # JSON lines under the name .json
            return
        raise _Broken(f"line {getattr(error, 'lineno', 1)}: {_broken_json(error)}") from error
    if isinstance(whole, dict):
        lists = [] if "messages" in whole else [v for v in whole.values() if isinstance(v, list)]
        yield from ((0, row, None) for row in (lists[0] if len(lists) == 1 else [whole]))  # {"data": [...]}, or a row
        return
    if not isinstance(whole, list):
        raise _Broken(f"line 1: it is a JSON list of objects, not {type(whole).__name__}")
    decoder, at, line, last = json.JSONDecoder(), text.find("[") + 1, 1, 0
    for row in whole:
        while text[at] in " \t\r\n,":
            at += 1
        line += text.count("\n", last, at)
        last = at
        at = decoder.raw_decode(text, at)[1]
        yield line, row, None


def _csv(text: str, delimiter: str = ",") -> Found:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield start, None, f"broken CSV ({error})"
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
                raise _Broken(f"line {line}: the header names a column twice")
        elif len(fields) != len(header):
            kind = "more" if len(fields) > len(header) else "fewer"
            yield line, None, f"{kind} values than columns: {len(fields)} fields, and the header has {len(header)}"
        else:
            yield line, dict(zip(header, fields)), None


def _txt(text: str) -> Found:
    if text.strip():
        yield 1, text, None


PARSERS: dict[str, Callable[[str], Found]] = {
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda text: _csv(text, "\t"),
    ".txt": _txt,
}


def _parquet(raw: bytes, file: Path, error: type[QftError], table: Callable[[Any], Sequence[Any]]) -> Sequence[Any]:
    try:
        from pyarrow import parquet
    except ImportError as failure:
        raise MissingDependency(f"{file}: parquet needs pyarrow, not installed here: pip install pyarrow") from failure
    try:
        return table(parquet.read_table(io.BytesIO(raw)))
    except QftError:
        raise
    except Exception as failure:
        line = one_line(failure)
        raise error(f"{file} is no parquet file, or is damaged: {line}") from failure


# ---- texts for calibration ---------------------------------------------------------------------------------


def read_texts(path: Any, tokenizer: Any = None) -> list[str]:
    """The texts of a file: one a row, or of a .txt file one a paragraph.

    A row is a text, or has `text`, `prompt` and `completion`, or `messages`, which the tokenizer's chat template joins
    where it has one.

    Raises:
        BadFolder: no such file, or it cannot be read. BadOption: a row that is none of these, by its place.
        NeedsCalibration: it holds no text.
    """
    found = read_rows(path, {dict: f"an object with {FORMS}", str: "a text"})
    if found.skipped:
        raise BadOption(found.skipped[0])
    template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    texts = []
    for i, row in enumerate(found.rows):
        try:
            text = _text(row, template)
            check_text(text, "a text of it")
        except BadOption as error:
            raise BadOption(f"{found.where(i)}: {error}") from error
        if text is None:
            raise BadOption(f"{found.where(i)}: has {', '.join(row) or 'nothing'}, and a row has {FORMS}")
        texts += text.replace("\r\n", "\n").split("\n\n") if found.source.lower().endswith(".txt") else [text]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise NeedsCalibration(f"{found.source} holds no text")
    return texts


def _text(row: Any, template: ChatTemplate | None) -> str | None:
    if isinstance(row, str):
        return row
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"] + row["completion"]
    messages = conversation(row.get("messages"))
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.keys() & {"content", "tool_calls"} for m in messages
    ):
        return None
    messages = with_system(messages, row)
    if template is None or not messages:
        return "\n".join(str(m.get("content", "")) for m in messages)
    try:
        tools = tools_of(row)
    except ValueError:
        raise BadOption("'tools' is text that is not JSON") from None
    return template.text(messages, tools)

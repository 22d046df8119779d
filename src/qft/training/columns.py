"""What the columns of training data mean: the task, the texts of a row, and the names of its labels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qft.data.files import Rows
from qft.data.messages import SYSTEMS
from qft.errors import BadOption
from qft.training.config import TrainConfig

TARGETS = ("target", "summary", "output", "answer", "response")
SOURCES = ("instruction", "question", "context", "input")
"""Columns that are parts of what an encoder reads, in this order."""
COMPANIONS = {"instruction": "input", "question": "context"}
"""A column of prompts → the column that goes with it in known formats (Alpaca, question answering)."""


class Unusable(Exception):
    """Why a row cannot be used."""


def recognise(columns: Sequence[str], model: Any, config: TrainConfig) -> tuple[str, str]:
    """The task and the format of the data ("chat", "prompt", "text"), by the columns and the model's config.

    Raises:
        BadOption: there is no column that the task needs.
    """
    has = set(columns)
    task = config.task
    if task == "auto":
        architectures = getattr(model, "architectures", None) or ()
        if any("SequenceClassification" in a for a in architectures):
            task = "classification"
        elif getattr(model, "is_encoder_decoder", False):
            task = "seq2seq"
        elif config.images_column in has:
            task = "vision-language"
        elif {config.text_column, config.label_column} <= has and config.messages_column not in has:
            task = "classification"
        else:
            task = "causal-lm"
    if task == "classification":
        return task, _need(has, task, "text", {config.text_column, config.label_column})
    if task == "vision-language":
        return task, _need(has, task, "chat", {config.messages_column, config.images_column})
    if config.messages_column in has and task == "causal-lm":
        return task, "chat"
    if pair_of(has, config, task) is not None:
        return task, "prompt"
    if config.text_column in has and task == "causal-lm":
        return task, "text"
    wanted = f"{config.prompt_column!r} and {config.completion_column!r}"
    if task == "causal-lm":
        wanted = f"{config.messages_column!r}, {wanted}, or {config.text_column!r}"
    raise BadOption(
        f"the data has the columns {_list(columns)}, and {task} reads {wanted}: name yours with the *_column options"
    )


def _need(has: set[str], task: str, form: str, wanted: set[str]) -> str:
    missing = sorted(wanted - has)
    if missing:
        raise BadOption(
            f"the data has the columns {_list(sorted(has))}, and {task} reads {' and '.join(map(repr, sorted(wanted)))}: there "
            f"is no {' and no '.join(map(repr, missing))}; name yours with the *_column options"
        )
    return form


def _list(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns)) or "none"


@dataclass(frozen=True)
class Pair:
    """The columns of prompt and completion.

    Attributes:
        sources: whose texts are joined by line breaks; all but one may be empty in a row.
        target: what is to be written.
        unread: known columns that cannot be used; a row that has text there is refused.
    """

    sources: tuple[str, ...]
    target: str
    unread: tuple[str, ...] = ()

    def text(self, row: dict[str, Any], empty: bool = False) -> str:
        """Return what stands before the completion.

        Raises:
            Unusable: it is not text, it is empty where that is not allowed, or a text would be lost.
        """
        self.check_unread(row)
        if len(self.sources) == 1:
            return text_of(row, self.sources[0], empty)
        found = [text_of(row, column, empty=True) for column in self.sources if row.get(column) is not None]
        found = [text for text in found if text.strip()]
        if not found and not empty:
            raise Unusable(f"{' and '.join(map(repr, self.sources))} are empty")
        return "\n".join(found)

    def single_source(self) -> str:
        """Return the column of a prompt that is a list of messages."""
        return next(column for column in self.sources if column not in SYSTEMS)

    def check_unread(self, row: dict[str, Any]) -> None:
        """Raise `Unusable` where a row has text that would be lost."""
        for column in self.unread:
            if row.get(column):
                raise Unusable(f"{column!r} would be lost: write it into {self.single_source()!r}, or as 'messages'")


def pair_of(has: set[str], config: TrainConfig, task: str) -> Pair | None:
    """Return the columns of prompt and completion; encoder-decoders also read the columns of known formats."""
    target = config.completion_column if config.completion_column in has else None
    if task == "seq2seq" and target is None:
        target = next((n for n in TARGETS if n in has), None)
    if target is None:
        return None
    parts: list[str] = []
    if config.prompt_column in has:
        parts = [config.prompt_column]
        companion = COMPANIONS.get(config.prompt_column)
        parts += [companion] if companion in has and companion != target else []
    elif task == "seq2seq":
        parts = _sources(has - {target}, config)
    if not parts:
        return None
    systems = [n for n in SYSTEMS if n in has and n not in parts]
    unread = tuple(n for n in ("history",) if n in has and n not in (*parts, target))
    return Pair((*systems, *parts), target, unread)


def _sources(has: set[str], config: TrainConfig) -> list[str]:
    """The columns that an encoder reads."""
    parts = [n for n in SOURCES if n in has]
    # Alpaca's `text` has prompt and answer
    if config.text_column in has and config.text_column not in parts and not {"instruction", "input"} <= has:
        parts.append(config.text_column)
    if "source" in has and not set(parts) - {"instruction"}:  # else it often says where a row comes from
        parts.append("source")
    return parts


def check_meaning(row: dict[str, Any]) -> None:
    """Refuse a row that other columns mark as one which must not be learnt as it stands.

    Raises:
        Unusable: a bad answer, a pair of answers to choose from, or a weight.
    """
    if row.get("label") is False or str(row.get("label")).strip().lower() == "false":
        raise Unusable("'label' is false, which marks a bad answer: it would be learnt as a good one")
    if row.get("rejected"):
        raise Unusable("'rejected' holds a bad answer, and only answers to be learnt are read: remove the column")
    weight = row.get("weight")
    if isinstance(weight, bool | int | float) and weight != 1:
        raise Unusable(f"'weight' is {weight!r}, and rows are learnt with weight 1 only: remove the row or the column")


def label_name(label: Any) -> str | None:
    """Return the name of a class: the same for 1, 1.0 and "1"; None for a value that is not a label."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int):
        return None
    name = str(label).strip()
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return name or None


def labels_of(rows: Rows, column: str) -> list[str]:
    """Return the names of the classes, in order: integers by size, others by the alphabet.

    Raises:
        BadOption: the labels are of types that cannot be told to be the same or different classes.
    """
    names: dict[str, int] = {}
    kinds: dict[str, int] = {}
    for index, row in enumerate(rows.rows):
        name = label_name(row.get(column))
        if name is not None:
            names.setdefault(name, index)
            kinds.setdefault(_kind(row[column], name), index)
    if len(kinds) > 1 and kinds.keys() != {"a number", "a number as text"}:
        (one, first), (other, second) = sorted(kinds.items(), key=lambda item: item[1])[:2]
        if {one, other} != {"a name", "a number as text"} or len(kinds) > 2:
            raise BadOption(
                f"{column!r} holds labels of different types: {rows.rows[first][column]!r} ({one}, {rows.where(first)}) "
                f"and {rows.rows[second][column]!r} ({other}, {rows.where(second)}); write all labels in one way"
            )
    if not all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names)
    found = sorted(names, key=int)
    for one, other in itertools.pairwise(found):
        if int(one) == int(other):
            raise BadOption(
                f"{column!r} holds {one!r} ({rows.where(names[one])}) and {other!r} ({rows.where(names[other])}): write "
                "a number in one way"
            )
    return found


def _kind(label: Any, name: str) -> str:
    if isinstance(label, bool):
        return "a boolean"
    if isinstance(label, int | float):
        return "a number"
    return "a number as text" if name.lstrip("-").isdecimal() else "a name"


def text_of(row: dict[str, Any], column: str, empty: bool = False) -> str:
    """Return the text in a column of a row.

    Raises:
        Unusable: it is missing, not text, or empty.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise Unusable(f"{column!r} is {'missing' if value is None else f'{type(value).__name__}, not text'}")
    if not empty and not value.strip():
        raise Unusable(f"{column!r} is empty")
    return value

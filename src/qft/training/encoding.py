"""Rows → token ids and labels, by task; what cannot be used is refused by its line, or skipped and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qft.errors import BadOption, BadShape
from qft.loss import IGNORE
from qft.rows import Rows, conversation, tools_of
from qft.training.checks import Chat
from qft.training.config import TrainConfig

TARGETS = ("target", "summary", "output", "answer", "response")
SOURCES = ("source", "input", "question", "instruction")


@dataclass
class Counts:
    """What became of a file's rows.

    Attributes:
        rows: that are trained on, or evaluated. skipped: that could not be read or used. too_long: that had more tokens
            than fit and were skipped. truncated: that were cut. without_answer: whose answer was cut away altogether, so
            that there is nothing to learn; they are left out, too.
        tokens: of all rows. learnt: of these, those that have a label.
    """

    rows: int = 0
    skipped: int = 0
    too_long: int = 0
    truncated: int = 0
    without_answer: int = 0
    tokens: int = 0
    learnt: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        told = {
            "skipped": f"{self.skipped} skipped as broken",
            "too_long": f"{self.too_long} skipped as too long",
            "truncated": f"{self.truncated} cut to length",
            "without_answer": f"{self.without_answer} left out, their answers cut away",
        }
        more = [text for name, text in told.items() if getattr(self, name)]
        return ", ".join([f"{self.rows} rows, {self.tokens} tokens, {self.learnt} of them learnt", *more])


@dataclass
class Encoded:
    """Rows as a trainer takes them: `rows` have input_ids and labels (or, for images, what the collator reads)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    skipped: list[str] = field(default_factory=list)


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


def pair_of(has: set[str], config: TrainConfig, task: str) -> tuple[str, str] | None:
    """The columns of prompt and completion; encoder-decoders also read what is usual for them."""
    if {config.prompt_column, config.completion_column} <= has:
        return config.prompt_column, config.completion_column
    if task == "seq2seq":
        source = next((n for n in (config.prompt_column, config.text_column, *SOURCES) if n in has), None)
        target = next((n for n in (config.completion_column, *TARGETS) if n in has), None)
        if source and target:
            return source, target
    return None


class Unusable(Exception):
    """Why a row cannot be used."""


def encode(
    rows: Rows, one: Callable[[dict[str, Any]], dict[str, Any]], config: TrainConfig, limit: int | None
) -> Encoded:
    """Every row by `one`, cut to `limit` tokens.

    Raises:
        BadOption: a row that cannot be used, with its place. BadShape: a row that is too long, where that is refused.
    """
    out = Encoded(skipped=list(rows.skipped))
    for index, row in enumerate(rows.rows):
        try:
            made = one(row)
        except (Unusable, BadOption) as error:
            if not config.skip_bad_rows:
                raise BadOption(
                    f"{rows.where(index)}: {error}; mend it, or skip_bad_rows=True skips and counts such rows"
                ) from error
            out.skipped.append(f"{rows.where(index)}: {error}")
            continue
        length = len(made.get("input_ids", ()))
        labels = made.get("labels")
        longest = max(length, len(labels)) if isinstance(labels, list) else length
        if limit is not None and longest > limit:
            if config.too_long == "refuse":
                raise BadShape(f"{rows.where(index)} has {longest} tokens, and max_length is {limit}")
            if config.too_long == "skip":
                out.counts.too_long += 1
                continue
            made = {k: v[:limit] if isinstance(v, list) else v for k, v in made.items()}
            if isinstance(labels, list) and all(label == IGNORE for label in made["labels"]):
                out.counts.without_answer += 1
                continue
            out.counts.truncated += 1
        out.rows.append(made)
        out.counts.tokens += len(made.get("input_ids", ()))
        labels = made.get("labels")
        out.counts.learnt += sum(label != IGNORE for label in labels) if isinstance(labels, list) else 1
    out.counts.rows, out.counts.skipped = len(out.rows), len(out.skipped)
    if not out.rows:
        raise BadOption(
            f"{rows.source}: no row is left to learn from: {out.counts}; raise max_length, or mend the data"
        )
    return out


def chat(encoder: Chat, config: TrainConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Conversations, with the loss on the answers."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        ids, labels = encoder(messages_of(row, config), _tools(row))
        return _learning(ids, labels)

    return one


def prompt(
    tokenizer: Any, columns: tuple[str, str], encoder: Callable[[], Chat]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Prompt and completion, as text or as messages, with the loss on the completion and the token that ends it."""
    source, target = columns

    def one(row: dict[str, Any]) -> dict[str, Any]:
        if isinstance(row.get(target), list):
            before, after = checked_messages(row.get(source), source, False), checked_messages(row[target], target)
            return _learning(*encoder().completion(before, after, _tools(row)))
        text, answer = text_of(row, source, empty=True), text_of(row, target)
        before = list(tokenizer(text)["input_ids"])
        whole = list(tokenizer(text + answer)["input_ids"])
        # tokenizers that end every text with a token would have one in the middle
        start = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
        if tokenizer.eos_token_id is not None and (not whole or whole[-1] != tokenizer.eos_token_id):
            whole.append(tokenizer.eos_token_id)
        return _learning(whole, [IGNORE] * start + whole[start:])

    return one


def text(tokenizer: Any, column: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Plain text: every token is learnt, and where it ends."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        ids = list(tokenizer(text_of(row, column))["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return _learning(ids, list(ids))

    return one


def seq2seq(tokenizer: Any, columns: tuple[str, str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What an encoder reads, and what a decoder is to write."""
    source, target = columns

    def one(row: dict[str, Any]) -> dict[str, Any]:
        ids = list(tokenizer(text_of(row, source))["input_ids"])
        labels = list(tokenizer(text_target=text_of(row, target))["input_ids"])
        if tokenizer.eos_token_id is not None and labels[-1:] != [tokenizer.eos_token_id]:
            labels.append(tokenizer.eos_token_id)
        return {"input_ids": ids, "labels": labels}

    return one


def classification(tokenizer: Any, config: TrainConfig, names: list[Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A text and the index of its label."""
    index = {str(name): i for i, name in enumerate(names)}

    def one(row: dict[str, Any]) -> dict[str, Any]:
        label = row.get(config.label_column)
        if str(label) not in index:
            raise Unusable(f"the label {label!r} is none of {', '.join(index)}")
        return {
            "input_ids": list(tokenizer(text_of(row, config.text_column))["input_ids"]),
            "labels": index[str(label)],
        }

    return one


def labels_of(rows: Rows, column: str) -> list[Any]:
    """The labels that occur, in order: integers by size, names by the alphabet."""
    found = {row[column] for row in rows.rows if isinstance(row.get(column), str | int) and row[column] != ""}
    if all(isinstance(x, int) or x.lstrip("-").isdecimal() for x in found):
        return sorted(found, key=int)
    return sorted(found, key=str)


def text_of(row: dict[str, Any], column: str, empty: bool = False) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unusable(f"{column!r} is {'missing' if value is None else f'{type(value).__name__}, not text'}")
    if not empty and not value.strip():
        raise Unusable(f"{column!r} is empty")
    return value


def messages_of(row: dict[str, Any], config: TrainConfig) -> list[dict[str, Any]]:
    return checked_messages(row.get(config.messages_column), config.messages_column)


def checked_messages(value: Any, column: str, answered: bool = True) -> list[dict[str, Any]]:
    """A conversation: mappings with role and content."""
    value = conversation(value)
    if isinstance(value, str):
        raise Unusable(f"{column!r} is text that is no JSON list of messages")
    if not isinstance(value, list) or not value:
        raise Unusable(f"{column!r} is {'missing' if value is None else 'not a list of messages, or empty'}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable(f"{column!r}[{i}] is no message with 'role' and 'content'")
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise Unusable(f"{column!r}[{i}] has no 'content'")
        blank = not content.strip() if isinstance(content, str) else not content
        if message["role"] == "assistant" and blank and not message.get("tool_calls"):
            raise Unusable(f"{column!r}[{i}]: the answer is empty")
    if answered and not any(m["role"] == "assistant" for m in value):
        raise Unusable(f"{column!r} has no message of the assistant: there is nothing to learn")
    return value


def _tools(row: dict[str, Any]) -> Any:
    try:
        return tools_of(row)
    except ValueError:
        raise Unusable("'tools' is text that is no JSON") from None


def _learning(ids: list[int], labels: list[int]) -> dict[str, Any]:
    """No position predicts the first token: with no label there, counts and losses agree with packed rows."""
    labels = [IGNORE, *labels[1:]] if labels else labels
    if all(label == IGNORE for label in labels):
        raise Unusable("there is no token to learn in it")
    return {"input_ids": ids, "labels": labels}

"""Rows → token ids and labels, by task; what cannot be used is refused by its line, or skipped and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qft.data.files import Rows
from qft.data.messages import check_text, conversation, tools_of, with_system
from qft.data.tokens import Tokens
from qft.errors import BadOption, BadShape
from qft.ops.loss import IGNORE
from qft.training.checks import Chat
from qft.training.columns import Pair, Unusable, check_meaning, label_name, text_of
from qft.training.config import TrainConfig


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


Encoder = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes of a row what a trainer takes; raises `Unusable` or `BadOption` where it cannot."""


@dataclass(frozen=True)
class Limit:
    """How many tokens a row may have.

    Attributes:
        source: of what the model reads. target: of what an encoder-decoder writes.
        cut: cuts the token ids that are read; None keeps the first ones.
    """

    source: int
    target: int
    cut: Callable[[list[int], int], list[int]] | None = None

    def over(self, made: dict[str, Any]) -> tuple[int, int] | None:
        """The tokens of a row, and the limit that they are over; None for a row that fits."""
        labels = made.get("labels")
        if len(made.get("input_ids", ())) > self.source:
            return len(made["input_ids"]), self.source
        if isinstance(labels, list) and len(labels) > self.target:
            return len(labels), self.target
        return None

    def apply(self, made: dict[str, Any]) -> dict[str, Any]:
        ids, labels = made["input_ids"], made["labels"]
        ids = ids[: self.source] if self.cut is None else self.cut(ids, self.source)
        return {**made, "input_ids": ids, "labels": labels[: self.target] if isinstance(labels, list) else labels}


def encode(rows: Rows, one: Encoder, config: TrainConfig, limit: int | Limit | None) -> Encoded:
    """Encode every row with `one`, and cut it to `limit` tokens.

    Raises:
        BadOption: a row that cannot be used, with its place. BadShape: a row that is too long, where that is refused.
    """
    if isinstance(limit, int):
        limit = Limit(limit, limit)
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
        over = None if limit is None else limit.over(made)
        if limit is not None and over is not None:
            if config.too_long == "refuse":
                most = f"max_length is {over[1]}"
                if over[1] < config.max_length:
                    most = f"the model takes {over[1]}"
                raise BadShape(f"{rows.where(index)} has {over[0]} tokens, and {most}")
            if config.too_long == "skip":
                out.counts.too_long += 1
                continue
            made = limit.apply(made)
            labels = made.get("labels")
            if isinstance(labels, list) and all(label == IGNORE for label in labels):
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


def chat(encoder: Chat, config: TrainConfig) -> Encoder:
    """Conversations, with the loss on the answers."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        check_meaning(row)
        ids, labels = encoder(messages_of(row, config), _tools(row))
        return _learning(ids, labels)

    return one


def prompt(tokenizer: Any, columns: Pair, encoder: Callable[[], Chat], loss_on: str = "answers") -> Encoder:
    """Prompt and completion, as text or as messages, with the loss on the completion and the token that ends it."""
    tokens, target = Tokens(tokenizer), columns.target

    def one(row: dict[str, Any]) -> dict[str, Any]:
        check_meaning(row)
        if isinstance(row.get(target), list):
            source = columns.single_source()
            said = with_system(checked_messages(row.get(source), source, False), row)
            return _learning(*encoder().completion(said, checked_messages(row[target], target), _tools(row)))
        text, answer = columns.text(row, empty=True), text_of(row, target)
        before = tokens(text)
        ids = tokens(text + answer)
        # tokenizers that end every text with a token would have one in the middle
        start = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))
        if tokenizer.eos_token_id is not None and not tokens.ends(ids):
            ids.append(tokenizer.eos_token_id)
        return _learning(ids, list(ids) if loss_on == "all" else [IGNORE] * start + ids[start:])

    return one


def text(tokenizer: Any, column: str) -> Encoder:
    """Plain text: every token is learnt, and where it ends."""
    tokens = Tokens(tokenizer)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokens(text_of(row, column))
        if tokenizer.eos_token_id is not None and not tokens.ends(ids):
            ids.append(tokenizer.eos_token_id)
        return _learning(ids, list(ids))

    return one


def seq2seq(tokenizer: Any, columns: Pair) -> Encoder:
    """What an encoder reads, and what a decoder is to write."""
    tokens = Tokens(tokenizer)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokens(columns.text(row), where="what the encoder reads")
        labels = tokens.target(text_of(row, columns.target), where=repr(columns.target))
        if tokenizer.eos_token_id is not None and not tokens.ends(labels):
            labels.append(tokenizer.eos_token_id)
        return {"input_ids": ids, "labels": labels}

    return one


def classification(tokenizer: Any, config: TrainConfig, names: Sequence[str]) -> Encoder:
    """A text and the index of its label."""
    tokens, index = Tokens(tokenizer), {name: i for i, name in enumerate(names)}

    def one(row: dict[str, Any]) -> dict[str, Any]:
        label = row.get(config.label_column)
        name = label_name(label)
        if name not in index:
            raise Unusable(f"the label {label!r} is none of {', '.join(map(repr, index))}")
        ids = tokens(text_of(row, config.text_column), where=repr(config.text_column))
        return {"input_ids": ids, "labels": index[name]}

    return one


def messages_of(row: dict[str, Any], config: TrainConfig, *, flatten: bool = True) -> list[dict[str, Any]]:
    """Return the conversation of a row in the normal form, with its system prompt.

    Raises:
        Unusable: it is not a conversation.
    """
    found = checked_messages(row.get(config.messages_column), config.messages_column, flatten=flatten)
    return with_system(found, row)


def checked_messages(value: Any, column: str, answered: bool = True, *, flatten: bool = True) -> list[dict[str, Any]]:
    """A conversation in the normal form: mappings with role and content."""
    value = conversation(value, column, flatten=flatten)
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
        check_text(message, f"{column!r}[{i}]")
    if answered and not any(m["role"] == "assistant" for m in value):
        raise Unusable(f"{column!r} has no message of the assistant: there is nothing to learn")
    return value


def _tools(row: dict[str, Any]) -> Any:
    try:
        return tools_of(row)
    except ValueError:
        raise Unusable("'tools' is text that is not JSON") from None


def _learning(ids: list[int], labels: list[int]) -> dict[str, Any]:
    """No position predicts the first token: with no label there, counts and losses agree with packed rows."""
    labels = [IGNORE, *labels[1:]] if labels else labels
    if all(label == IGNORE for label in labels):
        raise Unusable("there is no token to learn in it")
    return {"input_ids": ids, "labels": labels}

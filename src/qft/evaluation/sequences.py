"""Rows as token sequences that say which of their tokens are to be predicted."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qft.data.files import FORMS
from qft.data.messages import (
    ChatTemplate,
    check_text,
    conversation,
    learnt_turns,
    pieces,
    system_of,
    tools_of,
    with_system,
)
from qft.data.tokens import Tokens, encoded
from qft.errors import BadOption
from qft.evaluation.data import Row


@dataclass(frozen=True)
class Sequence:
    """Tokens that a model reads at once.

    Attributes:
        ids: token ids.
        counted: which of them are to be predicted; never the first, which nothing precedes.
        decoder: an encoder-decoder's target, all of which is to be predicted; `counted` is not used then.
    """

    ids: list[int]
    counted: list[bool]
    decoder: list[int] | None = None

    @property
    def tokens(self) -> int:
        """How many are to be predicted."""
        return len(self.decoder) if self.decoder is not None else sum(self.counted)


def sequences(
    found: Iterable[Row], tokenizer: Any, *, length: int, stride: int | None = None, two_sided: bool = False
) -> Iterator[Sequence]:
    """The windows of each row, each read alone.

    A row that is longer than `length` is cut into windows of `length` tokens that begin `stride` tokens apart; a token
    is predicted in the first window that it is in, unless it is the first there. By default windows overlap in one
    token, so that every token of a row is predicted once, but the very first.

    Args:
        two_sided: for an encoder-decoder: the prompt goes in, the completion is what is predicted; both are cut to
            `length`, the prompt at its start, where the tokenizer's first special tokens stay.

    Raises:
        BadOption: a row of another form, or one without a token to predict; texts without a tokenizer.
    """
    step = length - 1 if stride is None else stride
    reader = None if tokenizer is None else _Reader(tokenizer)
    for row in found:
        if two_sided:
            source, target = _pair(row, reader)
            if len(source) > length:
                front = reader.tokens.front if reader is not None else []
                front = front if source[: len(front)] == front and len(front) < length else []
                source = [*front, *source[len(front) - length :]]
            yield Sequence(source, [False] * len(source), target[:length])
            continue
        ids, counted = _tokens(row, reader)
        counted = [False, *counted[1:]]
        if not any(counted):
            raise BadOption(f"{row.where}: no token to predict: it is empty, or a single token")
        done = 0
        for start in range(0, len(ids), step):
            end = min(start + length, len(ids))
            kept = [c and start + i >= done and i > 0 for i, c in enumerate(counted[start:end])]
            if any(kept):
                yield Sequence(ids[start:end], kept)
            done = end
            if end == len(ids):
                break


class _Reader:
    """A tokenizer and its chat template, which is only looked at where there are conversations."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.tokens = tokenizer, Tokens(tokenizer)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)


def _tokens(row: Row, reader: _Reader | None) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them count."""
    value = row.value
    if isinstance(value, Mapping) and "input_ids" in value:
        ids = _ids(value["input_ids"], row)
        labels = value.get("labels")
        labels = ids if labels is None else _ids(labels, row)
        if len(labels) != len(ids):
            raise BadOption(f"{row.where}: {len(ids)} input_ids and {len(labels)} labels")
        return ids, [label != -100 for label in labels]
    if not isinstance(value, Mapping | str):
        ids = _ids(value, row)
        return ids, [True] * len(ids)
    if reader is None:
        raise BadOption(f"{row.where} is text, and no tokenizer was found: pass tokenizer=")
    if isinstance(value, str):
        return _encode(value, [(0, len(value))], reader, row)
    if "messages" in value or isinstance(value.get("prompt"), list):
        text, spans = _chat(value, reader, row)
        return _encode(text, spans, reader, row, special=False)
    if "completion" in value:
        prompt, completion = _texts(row, "prompt", "completion")
        prompt = _with_system_text(prompt, row)
        return _encode(prompt + completion, [(len(prompt), len(prompt) + len(completion))], reader, row)
    if "text" in value:
        (text,) = _texts(row, "text")
        return _encode(text, [(0, len(text))], reader, row)
    raise BadOption(f"{row.where}: has {', '.join(map(str, value)) or 'nothing'}, and a row has {FORMS}")


def _texts(row: Row, *names: str) -> list[str]:
    for name in names:
        if not isinstance(row.value.get(name), str):
            raise BadOption(f"{row.where}: {name} is {_kind(row.value.get(name))}, and should be text")
    return [row.value[name] for name in names]


def _with_system_text(prompt: str, row: Row) -> str:
    """A prompt as training reads it: behind the text of a `system` column."""
    try:
        said = system_of(row.value)
    except BadOption as error:
        raise BadOption(f"{row.where}: {error}") from error
    return "\n".join(text for text in (said, prompt) if text.strip()) if said else prompt


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _ids(value: Any, row: Row) -> list[int]:
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        raise BadOption(
            f"{row.where}: a {type(value).__name__}, and a row is text, a list of token ids, or has {FORMS}"
        )
    return list(value)


def _encode(
    text: str, spans: list[tuple[int, int]], reader: _Reader, row: Row, special: bool = True
) -> tuple[list[int], list[bool]]:
    """Tokens of a text, those that count being the ones that end within a span of characters."""
    tokenizer, where = reader.tokenizer, row.where
    full = len(spans) == 1 and spans[0] == (0, len(text))
    options = {"add_special_tokens": special, "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        found = encoded(tokenizer, text, where, return_offsets_mapping=True, **options)
        ends = [end if end > start else None for start, end in found["offset_mapping"]]  # None: a special token
        counted = [full if end is None else any(a < end <= b for a, b in spans) for end in ends]
        return _once(list(found["input_ids"]), counted, reader, special)
    ids = list(encoded(tokenizer, text, where, **options)["input_ids"])
    if full:
        return _once(ids, [True] * len(ids), reader, special)
    if len(spans) != 1 or spans[0][1] != len(text):
        raise BadOption(
            f"{row.where}: several answers need a fast tokenizer, which knows where its tokens lie in the text"
        )
    before = len(encoded(tokenizer, text[: spans[0][0]], where, **options)["input_ids"])
    return _once(ids, [i >= before for i in range(len(ids))], reader, special)


def _once(ids: list[int], counted: list[bool], reader: _Reader, special: bool) -> tuple[list[int], list[bool]]:
    """Without the special tokens that the tokenizer added to a text that has them already."""
    start, stop = reader.tokens.kept(ids) if special else (0, len(ids))
    return ids[start:stop], counted[start:stop]


def _chat(value: Mapping[str, Any], reader: _Reader, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The conversation through the model's template, and where in it the assistant's answers lie."""
    messages, first = _messages(value, row)
    if not getattr(reader.tokenizer, "chat_template", None):
        raise BadOption(
            f"{row.where}: messages need a chat template, and the tokenizer has none: give prompt and completion"
        )
    try:
        tools = tools_of(value)
    except ValueError:
        raise BadOption(f"{row.where}: 'tools' is text that is not JSON") from None
    answers = [i for i in learnt_turns(messages) if i >= first]
    if not answers:
        raise BadOption(f"{row.where}: no message of the assistant that counts, so there is nothing to predict")
    try:
        text, spans = reader.template.text(messages, tools), []
    except BadOption as error:
        raise BadOption(f"{row.where}: {error}") from error
    for i in answers:
        try:
            before = reader.template.before(messages, i, tools)
            after = reader.template.text(messages[: i + 1], tools)
        except BadOption as error:
            if i == answers[-1]:
                raise BadOption(f"{row.where}: {error}") from error
            continue
        if text.startswith(after) and after.startswith(before):
            # what a template writes after the end of a turn, mostly a newline, is no part of the answer
            spans.append((len(before), max(len(before), len(after.rstrip()))))
            _check_answer(messages[i], text[len(before) : len(after)], reader.template.name, row)
    if not spans:  # a template that writes the same message otherwise once others follow it
        raise BadOption(
            f"{row.where}: the chat template does not show where an answer begins: give prompt and completion"
        )
    return text, spans


def _messages(value: Mapping[str, Any], row: Row) -> tuple[list[dict[str, Any]], int]:
    """The conversation of a row, and the index of its first message that may count."""
    if "messages" in value:
        messages, first = value["messages"], 0
    else:
        messages, first = [*value["prompt"], *(value.get("completion") or [])], len(value["prompt"])
    try:
        messages = conversation(messages)
    except BadOption as error:
        raise BadOption(f"{row.where}: {error}") from error
    good = isinstance(messages, list) and all(
        isinstance(m, Mapping) and "role" in m and m.keys() & {"content", "tool_calls"} for m in messages
    )
    if not good or not messages:
        raise BadOption(f"{row.where}: messages is a list of objects with role and content, and not empty")
    check_text(messages, row.where)
    try:
        found = with_system(messages, value)
    except BadOption as error:
        raise BadOption(f"{row.where}: {error}") from error
    return found, first + len(found) - len(messages)


def _check_answer(message: Mapping[str, Any], shown: str, template: str, row: Row) -> None:
    """Refuse an answer that the template does not write out."""
    bare = "".join(shown.split())
    for piece in pieces(message):
        if "".join(piece.split()) not in bare:
            raise BadOption(f"{row.where}: {template} drops or changes {piece[:60]!r} of an answer")


def _pair(row: Row, reader: _Reader | None) -> tuple[list[int], list[int]]:
    value = row.value
    if isinstance(value, Mapping) and "input_ids" in value and value.get("labels") is not None:
        source, target = _ids(value["input_ids"], row), [i for i in _ids(value["labels"], row) if i != -100]
    elif isinstance(value, Mapping) and "completion" in value:
        if reader is None:
            raise BadOption(f"{row.where} is text, and no tokenizer was found: pass tokenizer=")
        prompt, completion = _texts(row, "prompt", "completion")
        prompt = _with_system_text(prompt, row)
        source = reader.tokens(prompt, where=f"{row.where}'s prompt", verbose=False)
        target = reader.tokens.target(completion, where=f"{row.where}'s completion")
    else:
        raise BadOption(
            f"{row.where}: an encoder-decoder is evaluated on prompt and completion, or input_ids and labels"
        )
    if not source or not target:
        raise BadOption(f"{row.where}: an empty prompt or completion: there is nothing to predict")
    return source, target

"""Texts as token ids: special tokens once, cuts that keep them, and errors that name the text."""

from __future__ import annotations

from typing import Any

from qft.core.console import one_line
from qft.data.messages import check_text
from qft.errors import BadOption


class Tokens:
    """A tokenizer that adds no special token which a text has already.

    A text that went through a chat template begins with the token that the tokenizer puts in front of every text.

    Attributes:
        front, back: the ids that the tokenizer puts in front of a text and behind it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.front, self.back = _added(tokenizer)

    def __call__(self, text: str, *, where: str = "the text", **options: Any) -> list[int]:
        """Tokenize a text.

        Args:
            where: what an error calls the text.
            **options: of the tokenizer's call.

        Raises:
            BadOption: the tokenizer refuses the text.
        """
        ids = encoded(self.tokenizer, text, where, **options)["input_ids"]
        start, stop = self.kept(ids)
        return list(ids)[start:stop]

    def target(self, text: str, *, where: str = "the text") -> list[int]:
        """Tokenize the text that a decoder has to write.

        Raises:
            BadOption: the tokenizer refuses the text.
        """
        ids = list(encoded(self.tokenizer, None, where, text_target=text)["input_ids"])
        start, stop = self.kept(ids)
        return ids[start:stop]

    def kept(self, ids: Any) -> tuple[int, int]:
        """Return the slice of token ids without special tokens that stand there twice."""
        start, stop = 0, len(ids)
        front, back = len(self.front), len(self.back)
        if front and list(ids[: 2 * front]) == self.front * 2:
            start = front
        if back and list(ids[-2 * back :]) == self.back * 2 and stop - start >= 2 * back:
            stop -= back
        return start, stop

    def ends(self, ids: list[int]) -> bool:
        """Whether the last token, apart from blanks behind it, ends a text."""
        end = self.tokenizer.eos_token_id
        for i in reversed(ids):
            if i == end:
                return True
            if not hasattr(self.tokenizer, "decode") or self.tokenizer.decode([i]).strip():
                return False
        return False

    def cut(self, ids: list[int], limit: int) -> list[int]:
        """Cut token ids as the tokenizer's own truncation does, which keeps the special tokens at both ends."""
        if len(ids) <= limit:
            return ids
        front = self.front if ids[: len(self.front)] == self.front else []
        back = self.back if self.back and ids[-len(self.back) :] == self.back else []
        room = limit - len(front) - len(back)
        if room < 0:
            return ids[:limit]
        body = ids[len(front) : len(ids) - len(back)]
        left = getattr(self.tokenizer, "truncation_side", "right") == "left"
        return [*front, *(body[len(body) - room :] if left else body[:room]), *back]


def encoded(tokenizer: Any, text: str | None, where: str, **options: Any) -> Any:
    """Call a tokenizer on a text.

    Raises:
        BadOption: the tokenizer refuses the text.
    """
    try:
        return tokenizer(text, **options)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of a tokenizer in Rust is not an Exception
        check_text([text, options], where)
        raise BadOption(f"the tokenizer refuses {where}: {one_line(error)}") from error


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds in front of a text and behind it."""
    try:
        full = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    except Exception:  # a tokenizer without this letter, or without this option
        return [], []
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []

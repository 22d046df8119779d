"""What qft tells a person: progress bars, lines such as a summary, and what an error of another library says, in a line.

Lines go to the logger "qft" at level INFO, to which qft adds no handler. Where logging would drop them, since nobody has
set it up, they go to stderr. `QFT_QUIET=1` in the environment stops bars and lines for a process, `progress=False` for a
call. Warnings are Python's own, `qft.errors.QftWarning`, and neither stops them.
"""

from __future__ import annotations

import logging
import os
import sys

_log = logging.getLogger("qft")


def quiet() -> bool:
    """Whether the environment asks for silence."""
    return os.environ.get("QFT_QUIET", "0") not in ("", "0")


def say(text: str) -> None:
    """A line, or a few, for who is watching."""
    if quiet():
        return
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        _log.info("%s", text)
        return
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)  # leaves a bar that is on the screen whole


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its class where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an error says, without its full stop: others are advice for another library's callers."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__

"""What verbs share once qft is imported: an answer as text or as JSON, and output folders. Not a verb."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[Callable[[Any, str], None]]:
    """Gives `answer(value, text)`, which puts one of them on stdout: nothing else that is printed meanwhile gets there.

    Args:
        as_json: `value`, as one JSON document; else `text`.
    """
    kept: list[str] = []

    def answer(value: Any, text: str) -> None:
        kept.append(json.dumps(value, indent=1, allow_nan=False, default=str) if as_json else text)

    with _stdout_to_stderr() if as_json else contextlib.nullcontext():
        yield answer
    for text in kept:
        print(text)
    sys.stdout.flush()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What this process prints, and what libraries in C print, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON lacks, as text."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def size(nbytes: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def said(written: Any) -> str:
    """What was written, or would be, as text."""
    verb = "would write" if written.dry_run else "wrote"
    about = "about " if written.dry_run else ""
    return f"{verb} {about}{size(written.nbytes)} to {written.folder}: {written.what}"

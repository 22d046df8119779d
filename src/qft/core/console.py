"""What qft tells a person: progress bars, lines such as a summary, and what an error of another library says, in a line.

Lines go to the logger "qft" at level INFO, to which qft adds no handler. Where logging would drop them, since nobody has
set it up, they go to stderr. `QFT_QUIET=1` in the environment stops bars and lines for a process, `progress=False` for a
call. Warnings are Python's own, `qft.errors.QftWarning`, and neither stops them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

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


NOISY = ("gptqmodel", "neural_compressor")
"""Packages that PEFT imports to look at a layer, and whose import prints, logs or sets environment variables."""

DEPRECATED_IN_PEFT = r"`is_gradient_checkpointing` is deprecated"
"""A FutureWarning of transformers about an attribute that PEFT reads; whoever calls PEFT can do nothing about it."""


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Run a block whose stdout, log records up to WARNING, and changes of the environment are dropped.

    Errors that are logged, exceptions and stderr remain.
    """
    before, disabled = dict(os.environ), logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        for key in [k for k in os.environ if k not in before]:
            del os.environ[key]
        os.environ.update(before)


@contextlib.contextmanager
def quiet_imports(names: tuple[str, ...] = NOISY) -> Iterator[None]:
    """Run a block of PEFT that may import these packages for the first time; see `hushed`."""
    first = any(name not in sys.modules and importlib.util.find_spec(name) is not None for name in names)
    with hushed() if first else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def without_deprecations() -> Iterator[None]:
    """Run a block of PEFT without the warning of `DEPRECATED_IN_PEFT`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED_IN_PEFT, FutureWarning)
        yield


def quiet_import(name: str) -> ModuleType:
    """Import a module for its own sake; see `hushed`."""
    if name in sys.modules:
        return sys.modules[name]
    with hushed(), contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module(name)


GIB = 1024**3


def size(n: float) -> str:
    """Bytes for people."""
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / 1024**2:.1f} MiB"

"""Other packages' imports, without what they print and what they set."""

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

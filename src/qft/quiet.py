"""Other packages' imports, without what they print and what they set."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

NOISY = ("gptqmodel",)
"""Packages that PEFT imports to look at a layer, and whose import prints to stdout and sets environment variables."""


@contextlib.contextmanager
def quiet_imports(names: tuple[str, ...] = NOISY) -> Iterator[None]:
    """Run a block that may import these packages for the first time: stdout and the environment are left alone."""
    if all(name in sys.modules or importlib.util.find_spec(name) is None for name in names):
        yield
        return
    before = dict(os.environ)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for key in [k for k in os.environ if k not in before]:
            del os.environ[key]
        os.environ.update(before)


def quiet_import(name: str) -> ModuleType:
    """Import a module for its own sake: stdout, stderr, logging and the environment are left alone."""
    if name in sys.modules:
        return sys.modules[name]
    before, disabled = dict(os.environ), logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    finally:
        logging.disable(disabled)
        for key in [k for k in os.environ if k not in before]:
            del os.environ[key]
        os.environ.update(before)

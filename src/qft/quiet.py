"""Other packages' imports, without what they print and what they set."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator

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

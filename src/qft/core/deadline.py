"""A time limit for Python code that a file brings along, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeIsUp(BaseException):
    """The block ran longer than allowed. Not an `Exception`, so that what runs in the block does not catch it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in this block of the current thread when it has run for so many seconds.

    The exception comes between two bytecode instructions: one long call into C ends first.
    """
    thread, lock = threading.get_ident(), threading.Lock()
    done = fired = False

    def fire() -> None:
        nonlocal fired
        with lock:
            if not done:
                fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeIsUp))

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
    if fired:  # the block ended in the moment before the exception came: let it come here
        while True:
            time.sleep(0.001)

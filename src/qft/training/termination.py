"""SIGTERM during a run: write a checkpoint, say so, and exit; the same call goes on from there."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from qft.training.folder import RunFolder

log = logging.getLogger("qft.training")
EXIT_CODE = 128 + signal.SIGTERM
"""What a shell reports for a process that SIGTERM ended."""


class Interrupted(Exception):
    """SIGTERM came during an evaluation between steps, which is dropped: the checkpoint comes first."""


class Termination(TrainerCallback):
    """Saves and stops after the optimizer step during which SIGTERM came. Outside of the steps, SIGTERM exits at once.

    Attributes:
        requested: SIGTERM came.
        in_steps: a step may be running, so that an exit waits for its end.
    """

    def __init__(self, run: RunFolder):
        self.run = run
        self.requested = self.in_steps = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_training_stop = control.should_save = control.should_log = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave an evaluation between steps; `interrupted` goes on."""
        if self.requested:
            raise Interrupted

    def interrupted(self, control: Any) -> None:
        """Save and stop where an evaluation was left."""
        control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:  # it came while a checkpoint was written
            control.should_training_stop = True

    def handle(self, number: int, frame: Any) -> None:
        """Handle the signal."""
        self.requested = True
        if self.in_steps:
            log.warning("SIGTERM: a checkpoint is written after this step")
        else:
            self.exit()

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Delay an exit until the steps in this block have stopped and their checkpoint is written."""
        self.in_steps = True
        try:
            yield
        finally:
            self.in_steps = False
        if self.requested:
            self.exit()

    def exit(self) -> None:
        """Say what is left, and raise `SystemExit`."""
        last = self.run.last
        left = "there is no checkpoint yet" if last is None else f"the last checkpoint is {last}"
        log.warning("SIGTERM ended this run; %s; the same call goes on from there", left)
        raise SystemExit(EXIT_CODE)


@contextmanager
def terminable(run: RunFolder) -> Iterator[Termination]:
    """Handle SIGTERM in this block by a `Termination`, and restore the handler that there was."""
    found = Termination(run)
    with _handler(found.handle):
        yield found


@contextmanager
def exit_on_sigterm(message: str) -> Iterator[None]:
    """Log `message` and raise `SystemExit` when SIGTERM comes in this block."""

    def handle(number: int, frame: Any) -> None:
        log.warning("SIGTERM: %s", message)
        raise SystemExit(EXIT_CODE)

    with _handler(handle):
        yield


@contextmanager
def _handler(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Set the handler of SIGTERM for a block.

    Only the main thread can set handlers; in others, and where SIGTERM is ignored, nothing is changed.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

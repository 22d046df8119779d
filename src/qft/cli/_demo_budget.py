"""How much the demo measures and trains, so that it ends in time on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

MOST_STEPS = 100
MOST_WINDOWS = 8
MARGIN = 0.85
"""Share of the time that is planned: the rest is for imports and for what takes longer than it did when it was timed."""
EVALUATING = 0.4
"""Share of the planned time for perplexities, at most."""
SLOWER = 1.5
"""A window of the quantized model may take so many times that of the float model."""
GENERATING = 4
"""Generating the answer takes about as long as so many windows."""


def clock() -> float:
    """Seconds since some moment."""
    return time.perf_counter()


@dataclass
class Budget:
    """Sizes evaluation and training by what a window, a step and loading take here.

    Attributes:
        seconds: for everything, from `start` on; None sizes nothing.
        stages: how often perplexity is measured.
        windows, steps: what was chosen: at first what there would be without a limit.
        load_seconds: of tokenizer, text and model.
        window_seconds, step_seconds: what one takes; None before one was timed.
        slowest_window: mean seconds of a window in the slowest evaluation so far.
    """

    seconds: float | None
    stages: int
    steps: int = MOST_STEPS
    windows: int = MOST_WINDOWS
    start: float = field(default_factory=lambda: clock())
    load_seconds: float = 0.0
    window_seconds: float | None = None
    step_seconds: float | None = None
    slowest_window: float = 0.0

    @property
    def left(self) -> float:
        """Planned seconds that are left."""
        assert self.seconds is not None
        return self.start + MARGIN * self.seconds - clock()

    def time_window(self, seconds: float) -> None:
        """Choose the number of held-out windows by what the second one took, or the first if that alone is too long."""
        if self.seconds is None:
            return
        self.window_seconds = seconds
        most = EVALUATING * MARGIN * self.seconds / (self.stages * SLOWER * seconds)
        self.windows = max(1, min(MOST_WINDOWS, int(most)))

    def room(self, models: int) -> float:
        """Seconds for training one of `models` models that are still to be trained.

        What comes after is reserved: perplexities, storing, merging, loading back, and the answer.
        """
        evaluations = self.slowest_window * self.windows * (models + 1)
        after = evaluations + GENERATING * self.slowest_window + 3 * self.load_seconds
        return (self.left - after) / models

    def time_step(self, done: int, first: float, others: float | None, room: float) -> None:
        """Choose the number of steps again after `done` steps; it only falls, and the learning rate falls with it.

        Args:
            done: steps that were made.
            first: seconds of the first step, which is slower than the others and decides only where no second one fits.
            others: mean seconds of the other steps, or None after the first.
            room: seconds that are left for training.
        """
        self.step_seconds = first if others is None else others
        if self.seconds is not None and (others is not None or room < first):
            self.steps = min(self.steps, done + max(0, int(room / self.step_seconds)))

    def describe(self, minutes: float) -> str:
        """Tell what was chosen and why."""
        windows = f"{self.windows} held-out window{'s' * (self.windows > 1)} at {self.window_seconds or 0:.2g} s"
        steps = f"{self.steps} training step{'s' * (self.steps > 1)} at {self.step_seconds or 0:.2g} s"
        return f"sized to end within {minutes:g} minutes here: {windows}, {steps}; --steps or --minutes asks for more"

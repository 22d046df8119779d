"""Position ids that a model makes itself are not searched for packed sequences.

transformers asks each forward whether its position ids start anew somewhere, and the host waits for the device to answer:
for all of the step before. Ids that the model counted itself do not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Here(threading.local):
    counted = False


_here = _Here()


@contextmanager
def counted() -> Iterator[None]:
    """Within, in this thread, all position ids count on from the start of a row."""
    _teach()
    before, _here.counted = _here.counted, True
    try:
        yield
    finally:
        _here.counted = before


def _teach() -> None:
    """Let transformers ask us first; outside of `counted`, and under a compiler, it finds out as before."""
    from transformers import masking_utils

    look = getattr(masking_utils, "find_packed_sequence_indices", None)
    if look is None or hasattr(look, "qft"):
        return

    @functools.wraps(look)
    def find(position_ids: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or not _here.counted:
            return look(position_ids)
        return None

    find.qft = True  # type: ignore[attr-defined]
    masking_utils.find_packed_sequence_indices = find

"""What recomputed blocks start from, in pinned host memory between the forward and the backward pass.

A block's input leaves on a side stream while the block computes, and comes back while the block behind it is
differentiated. Autograd's hooks see what a block saves, compiled or not, and take its input out of that: masks, position
embeddings and weights, which others hold anyway, stay where they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qft.optimize import copies


class Checkpoints:
    """The inputs of one model's recomputed blocks. Buffers in host memory are used again from step to step."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, copies.Lane] = {}
        self._free: list[Tensor] = []
        self._open = True
        self._last: weakref.ref[_Input] | None = None

    def __reduce__(self) -> Any:  # a copy of the model has copies of its own
        return Checkpoints, ()

    @contextmanager
    def around(self, x: Any) -> Iterator[None]:
        """Around the call of a recomputed block with the input `x`: what autograd saves of it is on the host.

        A leaf stays on the device, since autograd holds it for its gradient: embeddings that PEFT's hook makes require one.
        """
        if not isinstance(x, Tensor) or not copies.dense(x) or (x.is_leaf and x.requires_grad):
            yield
            return
        kept = _Input(self, x, self._leave())
        self._last = weakref.ref(kept)
        place = _place(x)

        def pack(t: Tensor) -> Any:  # lives as long as what it packed: it must not hold the input
            return kept if copies.dense(t) and _place(t) == place else t

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield

    def free(self) -> None:
        """Give up the buffers; those that a backward pass still needs go after it."""
        self._open = False
        self._free.clear()

    @property
    def idle_bytes(self) -> int:
        """Of the buffers that wait for the next step."""
        return sum(b.numel() for b in self._free)

    def lane(self, device: torch.device) -> copies.Lane:
        if device not in self._lanes:
            self._lanes[device] = copies.Lane(device)
        return self._lanes[device]

    def _leave(self) -> _Input | None:
        """The input before, which is needed on the device no longer."""
        last = None if self._last is None else self._last()
        if last is not None:
            last.leave()
        return last

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        found = [i for i, b in enumerate(self._free) if b.numel() >= nbytes]
        if found:
            return self._free.pop(min(found, key=lambda i: self._free[i].numel()))
        if self._free:  # it grows instead of having one more beside it: lengths may differ from step to step
            self._free.pop(max(range(len(self._free)), key=lambda i: self._free[i].numel()))
        return copies.host_buffer(nbytes, device)

    def give_back(self, buffer: Tensor) -> None:
        if self._open:
            self._free.append(buffer)


class _Input:
    """One block's input: on the device until the next block runs, then on the host, then on the device again.

    Autograd holds it in the place of the tensor; when that lets go of it, after a backward pass or without one, its
    buffer is free.
    """

    def __init__(self, owner: Checkpoints, x: Tensor, before: _Input | None):
        self._buffer: Tensor | None = None
        self._owner, self._lane = owner, owner.lane(x.device)
        self._device: Tensor | None = x.detach()
        self._version: int | None = x._version  # None: what is on the device is a copy that nobody else knows
        self._changed = False
        self._where = x.device
        self._before = (lambda: None) if before is None else weakref.ref(before)
        self._buffer = owner.take(x.numel() * x.element_size(), x.device)
        self._host = copies.laid(self._buffer, 0, x)
        self._mark = self._lane.copy(self._host, self._device)

    def leave(self) -> None:
        if self._device is not None:
            self._lane.wait(self._mark)  # before the memory is used for something else
            self._look()
            self._device = None

    def _look(self) -> None:
        if self._version is not None and self._device is not None:
            self._changed |= self._device._version != self._version

    def fetch(self) -> None:
        """Start the way back."""
        if self._device is None:
            self._device = torch.empty_strided(
                self._host.shape, self._host.stride(), dtype=self._host.dtype, device=self._where
            )
            self._version = None
            self._mark = self._lane.copy(self._device, self._host)

    def get(self) -> Tensor:
        """On the device, for the backward pass; the one before is on its way from now on."""
        self.fetch()
        self._lane.wait(self._mark)
        self._look()
        found, self._device = self._device, None
        assert found is not None
        if self._changed:
            raise RuntimeError(
                "a block's input was modified by an inplace operation after the block ran: its gradient cannot be computed"
            )
        before = self._before()
        if before is not None:
            before.fetch()
        return found

    def __del__(self) -> None:
        if self._buffer is not None:
            if self._device is not None:  # fetched and not used: the copy comes before whatever gets its memory
                self._lane.wait(self._mark)
            self._owner.give_back(self._buffer)


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.device, t.data_ptr(), t.shape, t.stride(), t.dtype


def _unpack(kept: Any) -> Tensor:
    return kept.get() if isinstance(kept, _Input) else kept

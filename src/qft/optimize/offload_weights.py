"""Packed weights in pinned host memory, streamed to the device block by block while the model computes.

What the modules hold is what is on the host: `state_dict`, `save` and `merge` read the true weights there. Only while a
layer is dequantized do its tensors stand for a copy of them on the device, in one of a few buffers that blocks take turns
in. Forward pass, recomputation, backward pass and evaluation all dequantize, and nothing else reads packed weights; so
that is where a block is waited for, and where the next one in the direction of travel is sent for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qft.errors import QftWarning
from qft.memory.report import BUFFERS
from qft.optimize import copies
from qft.optimize.packed_tensors import (
    Place,
    check,
    free_bytes,
    key_of,
    moved_once,
    nbytes_of,
    spread,
    stays,
    to_device,
)

GIB = 2**30


@dataclass(eq=False)
class _Block:
    """The places of one block, and where their tensors lie in its buffer.

    Attributes:
        buffer: (nbytes,) uint8 on the host, which the modules' tensors are views of.
        host: by place, their addresses there.
        device: by place, views of the block's buffer on the device.
        mark: of the copy that filled that buffer; `loaded` says whether it still holds this block.
    """

    module: nn.Module
    places: list[Place]
    buffer: Tensor | None = None
    host: dict[Place, list[int]] = field(default_factory=dict)
    device: dict[Place, list[Tensor]] = field(default_factory=dict)
    loaded: bool = False
    mark: Any = None


class Streamed:
    """Stands in for the method of a layer that gives its weight as floats; a class, so that models can be copied."""

    def __init__(self, stream: WeightStream, index: int, place: Place):
        self.stream, self.index, self.place = stream, index, place

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.stream.on_device(self.index, self.place):
            return getattr(type(self.place.owner), self.place.method)(self.place.owner, *args, **kwargs)


class Steady:
    """Stands in for `_apply` of a block: `model.to(device)`, which trainers call, leaves streamed tensors on the host."""

    def __init__(self, stream: WeightStream, index: int, module: nn.Module):
        self.stream, self.index, self.module = stream, index, module

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        there = {p for addresses in self.stream.blocks[self.index].host.values() for p in addresses}
        keep = lambda t: t if t.data_ptr() in there else fn(t)  # noqa: E731
        return type(self.module)._apply(self.module, keep, recurse)


class WeightStream:
    """The streamed blocks of one model."""

    def __init__(self, blocks: Sequence[tuple[nn.Module, list[Place]]], device: torch.device):
        self.device = device
        self.blocks = [_Block(module, found) for module, found in blocks]
        self._forget()

    def _forget(self) -> None:
        self._lane: copies.Lane | None = None
        self._ring: list[Tensor] = []
        self._at: int | None = None
        self._step = 1

    def __getstate__(self) -> dict[str, Any]:  # a copy of the model pins its own weights when it runs
        return {"device": self.device, "blocks": [_Block(b.module, b.places) for b in self.blocks]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def nbytes(self) -> int:
        """Of the streamed weights, on the host."""
        return sum(b.buffer.numel() for b in self.blocks if b.buffer is not None)

    @property
    def ring_nbytes(self) -> int:
        """Of the buffers on the device."""
        return sum(b.numel() for b in self._ring)

    @classmethod
    def over(
        cls, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, resident: int | None
    ) -> WeightStream:
        """Move a model to the device with the packed weights of all blocks but `resident` on the host.

        Raises:
            UnsupportedOperation: weights that cannot be streamed.
        """
        found = check(blocks)
        sizes = [nbytes_of(f) for _, f in found]
        if resident is None:
            resident = stays(model, sizes, device)
        chosen = spread(len(found), max(0, len(found) - resident))
        stream = cls([found[i] for i in chosen], device)
        try:
            stream.put_on()
            to_device(model, device, {id(t) for i in chosen for place in found[i][1] for t in place.tensors()})
        except BaseException:
            stream.take_off(back=True)
            raise
        return stream

    # ---- on and off ----------------------------------------------------------------------------------------

    def put_on(self) -> None:
        """Move the weights to the host, and stand in for the methods that give them as floats."""
        for block in self.blocks:
            self._adopt(block)
        for index, block in enumerate(self.blocks):
            block.module.__dict__["_apply"] = Steady(self, index, block.module)
            for place in block.places:
                place.owner.__dict__[place.method] = Streamed(self, index, place)

    def take_off(self, back: bool) -> None:
        """Give up the buffers; with `back`, the weights go to the device, where it has room for them."""
        self._settle()
        for block in self.blocks:
            block.module.__dict__.pop("_apply", None)
            for place in block.places:
                place.owner.__dict__.pop(place.method, None)
        needs, room = self.nbytes, free_bytes(self.device)
        self._ring = []
        if back and room is not None and needs > room:
            warnings.warn(
                f"{needs / GIB:.2f} GiB of weights stay in host memory, since {self.device} has {max(room, 0) / GIB:.2f} GiB "
                "left: the model can be saved and merged, and it runs after optimize_training(offload='weights')",
                QftWarning,
                stacklevel=4,
            )
            back = False
        for block in self.blocks:
            if back:
                moved: dict[Any, Tensor] = {}
                for t in (t for place in block.places for t in place.tensors()):
                    t.data = moved_once(moved, t, lambda t: t.detach().to(self.device, copy=True))
            block.buffer, block.loaded = None, False
            block.host, block.device = {}, {}

    # ---- while the model runs ------------------------------------------------------------------------------

    def begin(self) -> None:
        """A forward pass starts: whatever was on the device may have been changed on the host since."""
        for block in self.blocks:
            block.loaded = False
        self._at, self._step = None, 1
        for index in range(min(BUFFERS, len(self.blocks))):
            if self.blocks[index].buffer is not None:
                self._load(index)

    @contextmanager
    def on_device(self, index: int, place: Place) -> Iterator[None]:
        """While a place of a block is dequantized: its tensors stand for what is on the device."""
        block, tensors = self.blocks[index], place.tensors()
        if block.buffer is None or block.host[place] != [t.data_ptr() for t in tensors]:
            self._adopt(block)  # a merge put other tensors there, or this is a copy of the model
        self._load(index)
        if self._at != index:
            if self._at is not None:
                self._step = 1 if index > self._at else -1
            self._at = index
            for ahead in range(1, BUFFERS):
                if 0 <= index + ahead * self._step < len(self.blocks):
                    self._load(index + ahead * self._step)
            self._load(index)  # a wider block ahead made the buffers anew
        assert self._lane is not None
        self._lane.wait(block.mark)
        before = [t.data for t in tensors]
        try:
            for t, view in zip(tensors, block.device[place], strict=True):
                t.data = view
            yield
        finally:
            for t, data in zip(tensors, before, strict=True):
                t.data = data

    def _load(self, index: int) -> None:
        """Send for a block that is not there. Its buffer was another's, whose use the copy waits for."""
        block = self.blocks[index]
        if block.loaded:
            return
        if block.buffer is None:
            self._adopt(block)
        assert block.buffer is not None
        if self._lane is None:
            self._lane = copies.Lane(self.device)
        if not self._ring:
            largest = max(b.buffer.numel() for b in self.blocks if b.buffer is not None)
            self._ring = [
                torch.empty(largest, dtype=torch.uint8, device=self.device)
                for _ in range(min(BUFFERS, len(self.blocks)))
            ]
        ring = self._ring[index % len(self._ring)]
        if ring.numel() < block.buffer.numel():  # a merge made it wider
            self._settle()
            self._ring = []
            return self._load(index)
        for other in self.blocks[index % len(self._ring) :: len(self._ring)]:
            other.loaded = False
        if not block.device:
            self._see(block, ring)
        block.mark = self._lane.copy(ring[: block.buffer.numel()], block.buffer)
        block.loaded = True

    def _settle(self) -> None:
        if self._lane is not None:
            self._lane.settle()
        for block in self.blocks:
            block.loaded, block.device = False, {}

    def _adopt(self, block: _Block) -> None:
        """Lay the block's tensors, wherever they are, into a new buffer on the host, and let the modules hold those."""
        if self._lane is not None:
            self._lane.settle()
        block.loaded, block.device = False, {}
        starts: dict[Any, int] = {}
        nbytes = 0
        for t in (t for place in block.places for t in place.tensors()):
            if key_of(t) not in starts:
                starts[key_of(t)] = nbytes
                nbytes += copies.aligned(t.numel() * t.element_size())
        buffer = copies.host_buffer(nbytes, self.device)
        moved: dict[Any, Tensor] = {}
        for place in block.places:
            for t in place.tensors():
                t.data = moved_once(moved, t, lambda t: copies.laid(buffer, starts[key_of(t)], t).copy_(t.detach()))
        block.buffer = buffer
        block.host = {place: [t.data_ptr() for t in place.tensors()] for place in block.places}

    @staticmethod
    def _see(block: _Block, ring: Tensor) -> None:
        assert block.buffer is not None
        base = block.buffer.data_ptr()
        for place in block.places:
            block.device[place] = [copies.laid(ring, t.data_ptr() - base, t) for t in place.tensors()]

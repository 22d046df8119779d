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

from qft import lanes
from qft.errors import QftWarning, UnsupportedOperation
from qft.lora.layer import QftLinear
from qft.packed import PackedLinear, PackedModule
from qft.registry import quantizer_of

GIB = 2**30
BUFFERS = 2
"""Blocks on the device at a time, beside those that stay there: one computes, the next one arrives."""
FOR_A_STEP = 4 * GIB
"""What is left for activations where nobody says how many blocks stay on the device."""


@dataclass(eq=False)
class _Place:
    """A quantized module and whose method gives its floats."""

    module: nn.Module
    owner: nn.Module
    method: str

    def tensors(self) -> list[Tensor]:
        """What dequantizing reads, as the module holds it now."""
        quantizer: Any = quantizer_of(self.module)
        return quantizer.tensors(quantizer.weights(self.module)[0])


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
    places: list[_Place]
    buffer: Tensor | None = None
    host: dict[_Place, list[int]] = field(default_factory=dict)
    device: dict[_Place, list[Tensor]] = field(default_factory=dict)
    loaded: bool = False
    mark: Any = None


class Streamed:
    """Stands in for the method of a layer that gives its weight as floats; a class, so that models can be copied."""

    def __init__(self, stream: WeightStream, index: int, place: _Place):
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

    def __init__(self, blocks: Sequence[tuple[nn.Module, list[_Place]]], device: torch.device):
        self.device = device
        self.blocks = [_Block(module, found) for module, found in blocks]
        self._forget()

    def _forget(self) -> None:
        self._lane: lanes.Lane | None = None
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
                    t.data = _once(moved, t, lambda t: t.detach().to(self.device, copy=True))
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
    def on_device(self, index: int, place: _Place) -> Iterator[None]:
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
            self._lane = lanes.Lane(self.device)
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
            if _key(t) not in starts:
                starts[_key(t)] = nbytes
                nbytes += lanes.aligned(t.numel() * t.element_size())
        buffer = lanes.host_buffer(nbytes, self.device)
        moved: dict[Any, Tensor] = {}
        for place in block.places:
            for t in place.tensors():
                t.data = _once(moved, t, lambda t: lanes.laid(buffer, starts[_key(t)], t).copy_(t.detach()))
        block.buffer = buffer
        block.host = {place: [t.data_ptr() for t in place.tensors()] for place in block.places}

    @staticmethod
    def _see(block: _Block, ring: Tensor) -> None:
        assert block.buffer is not None
        base = block.buffer.data_ptr()
        for place in block.places:
            block.device[place] = [lanes.laid(ring, t.data_ptr() - base, t) for t in place.tensors()]


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _once(moved: dict[Any, Tensor], tensor: Tensor, move: Any) -> Tensor:
    """`move` (tensor), once for all names of a tensor; the old one lives until all of them have it."""
    key = _key(tensor)
    if key not in moved:
        moved[key] = move(tensor)
    return moved[key]


# ---- which weights --------------------------------------------------------------------------------------------


def places(block: nn.Module) -> list[_Place]:
    """The quantized modules of a block that dequantize where a stream can see it.

    Raises:
        UnsupportedOperation: adapters or a vendor's forward that read a packed weight in another way.
    """
    owners = {id(m.base_layer): m for m in block.modules() if isinstance(m, QftLinear)}
    for owner in owners.values():
        if owner.native or owner.lora_variant:
            what = "forward='native'" if owner.native else "DoRA"
            raise UnsupportedOperation(
                f"{what} reads quantized weights in a way of its own, which offload='weights' cannot follow: wrap the model "
                "without it"
            )
    found = []
    for module in block.modules():
        quantizer = quantizer_of(module)
        if quantizer is None or not quantizer.weights(module):
            continue
        owner = owners.get(id(module))
        if owner is None and not isinstance(module, PackedModule):
            continue  # a vendor's layer without an adapter runs its own forward: it stays
        method = "dequantized" if owner is not None or isinstance(module, PackedLinear) else "unpacked"
        place = _Place(module, module if owner is None else owner, method)
        tensors = place.tensors()
        if not tensors or not all(lanes.dense(t) for t in tensors):
            raise UnsupportedOperation(
                f"offload='weights' cannot stream weights of {type(quantizer).__name__}: its tensors are of a class of their "
                "own; choose another quantizer, or offload='activations'"
            )
        found.append(place)
    return found


def check(blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, list[_Place]]]:
    """The blocks that have places, with them.

    Raises:
        UnsupportedOperation: weights that cannot be streamed, or none.
    """
    found = [(b, f) for b, f in ((b, places(b)) for b in blocks) if f]
    if not found:
        raise UnsupportedOperation(
            "offload='weights' streams the quantized weights of repeated blocks, and this model has none that qft can find: "
            "quantize and wrap it first"
        )
    return found


def nbytes_of(block: Sequence[_Place]) -> int:
    """What a block's streamed tensors take."""
    seen = {_key(t): lanes.aligned(t.numel() * t.element_size()) for place in block for t in place.tensors()}
    return sum(seen.values())


def free_bytes(device: torch.device) -> int | None:
    """What this process may still allocate there; None where nobody counts (CPU)."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + held - used, cap - used)


def spread(total: int, streamed: int) -> list[int]:
    """Indices of the `streamed` of `total` blocks, evenly: what is resident between two gives the next one time to come."""
    return sorted({(2 * i + 1) * total // (2 * streamed) for i in range(streamed)}) if streamed else []


def stays(model: nn.Module, sizes: Sequence[int], device: torch.device) -> int:
    """How many of the blocks, whose packed weights take `sizes`, stay on the device beside a training step.

    What a step needs is not known here: `FOR_A_STEP`, and gradients and AdamW's states of what is trained.
    """
    room = free_bytes(device)
    if room is None or not sizes:
        return 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = bytes_elsewhere(model, device)
    there = sum(sizes) if _on(model, device) else 0
    left = room + there - (rest + 12 * trained + FOR_A_STEP + BUFFERS * max(sizes))
    return min(len(sizes), max(0, left // max(sizes)))


def _on(model: nn.Module, device: torch.device) -> bool:
    return next((p.device for p in model.parameters()), device) == device


def bytes_elsewhere(model: nn.Module, device: torch.device) -> int:
    """What is not on the device yet of all that is not packed."""
    packed = {id(t) for m in model.modules() if quantizer_of(m) is not None for t in (*m.parameters(), *m.buffers())}
    seen = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed and t.device != device}
    return sum(t.numel() * t.element_size() for t in seen.values())


def to_device(model: nn.Module, device: torch.device, streamed: set[int]) -> None:
    """Everything but the streamed tensors, by id; parameters stay the objects that an optimizer knows."""
    for module in model.modules():
        moved: dict[Any, Tensor] = {}
        quantizer: Any = quantizer_of(module)
        more = [t for w in quantizer.weights(module) for t in quantizer.tensors(w)] if quantizer is not None else []
        own = [t for store in (module._parameters, module._buffers) for t in store.values() if t is not None]
        for t in (*own, *more):
            if id(t) not in streamed and t.device != device:
                t.data = _once(moved, t, lambda t: t.detach().to(device))
                if t.grad is not None:
                    t.grad = None

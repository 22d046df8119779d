"""What a training step keeps and what it needs for a moment, measured: blocks run under fake tensors, without data.

Every tensor that an operation makes is counted while it lives, by its storage, as an allocator would; storages that
autograd saves come from its hooks. Compiled blocks are not compiled here: what they save is derived from the same run.
Products, attention and the like are opaque to the compiler; what lies between them is fused and computed again in the
backward pass. So it saves what opaque operations read or made, and in place of everything else what that came from.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from qft.ops import products

ROUND = 512
"""CUDA's caching allocator gives whole multiples of these bytes."""
_OPAQUE = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "_scaled_dot_product", "embedding", "convolution", "topk", "sort")
_GATHERS = ("index.", "index_select", "gather")


_OUTSIDE = 0


def rounded(nbytes: int) -> int:
    """Round bytes up to the allocator's block size."""
    return -(-nbytes // ROUND) * ROUND


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


@dataclass
class _Made:
    """A storage: its bytes, whether an opaque operation made or read it, and what it was made from."""

    nbytes: int
    opaque: bool = False
    read: bool = False
    sources: set[int] = field(default_factory=set)


class Ledger(TorchDispatchMode):
    """Counts storages that are made while it is on.

    Attributes:
        live, peak: bytes, now and at most since `restart`.
        opaque_peak: the same, looked at only while an opaque operation runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.opaque_peak = 0
        self.made: dict[int, _Made] = {}
        self._known: Any = WeakIdKeyDictionary()
        self._next = 0

    def restart(self) -> None:
        self.peak = self.opaque_peak = self.live

    def number(self, tensor: Tensor) -> int | None:
        """Of the storage, if it was seen here."""
        return self._known.get(_storage(tensor))

    def name(self, tensor: Tensor) -> int:
        """Know a storage that was there before: it counts as given."""
        self._next += 1
        self._known[_storage(tensor)] = self._next
        self.made[self._next] = _Made(rounded(_storage(tensor).nbytes()), opaque=True)
        return self._next

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and _storage(t) not in self._known:
                self._known[_storage(t)] = _OUTSIDE  # weights and the like: views of them are no news
        found = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        opaque = name.lstrip("_").startswith(_OPAQUE) or name.startswith((*_OPAQUE, *_GATHERS))
        read = {n for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and (n := self.number(t))}
        if opaque:
            for n in read:
                self.made[n].read = True
        for t in tree_leaves(found):
            if not isinstance(t, Tensor):
                continue
            n = self.number(t)
            if n is None:
                n = self._new(t, read)
            if n == _OUTSIDE:
                continue
            self.made[n].opaque |= opaque
        self.peak = max(self.peak, self.live)
        if opaque:
            self.opaque_peak = max(self.opaque_peak, self.live)
        return found

    def _new(self, tensor: Tensor, read: set[int]) -> int:
        storage = _storage(tensor)
        self._next += 1
        n, nbytes = self._next, rounded(storage.nbytes())
        self._known[storage] = n
        self.made[n] = _Made(nbytes, sources=set(read))
        self.live += nbytes
        weakref.finalize(storage, self._gone, nbytes)
        return n

    def _gone(self, nbytes: int) -> None:
        self.live -= nbytes

    def compiled(self, saved: set[int]) -> set[int]:
        """What a compiled block saves, given what an eager one does."""
        kept: set[int] = set()
        seen: set[int] = set()
        todo = list(saved)
        while todo:
            n = todo.pop()
            if n in seen or n not in self.made:
                continue
            seen.add(n)
            one = self.made[n]
            if one.opaque or one.read:
                kept.add(n)
            else:
                todo += one.sources
        return kept

    def bytes_of(self, numbers: set[int]) -> int:
        return sum(self.made[n].nbytes for n in numbers if n in self.made)


@dataclass(frozen=True)
class Profile:
    """One block's memory, in bytes.

    Attributes:
        boundary: its input, which is all that a recomputed block keeps.
        saved: what it keeps for the backward pass, its input included.
        kept: the most that its backward pass adds to `saved`.
        forward: the most that its forward pass needs beside its input.
        recomputed: the most that a recomputed block's backward pass adds to its input.
        gradients: of its adapters.
        dequantized: its largest float weight, part of the peaks.
    """

    boundary: int
    saved: int
    kept: int
    forward: int
    recomputed: int
    gradients: int
    dequantized: int


@contextlib.contextmanager
def fakes() -> Iterator[FakeTensorMode]:
    """Fake tensors on "cpu" that compute in their own dtypes, as a GPU does."""
    from transformers import masking_utils

    before, products._UNSUPPORTED = products._UNSUPPORTED, frozenset()
    # it looks at values, and where it cannot it makes a mask that a real step does without
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        products._UNSUPPORTED = before
        masking_utils.find_packed_sequence_indices = look


def saved_by(ledger: Ledger, run: Callable[[], Any]) -> tuple[Any, set[int]]:
    """What `run` returns, and the storages that autograd saved in it; parameters are none of them."""
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        n = ledger.number(tensor)
        if n:
            saved.add(n)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = run()
    return found, saved


def block_profile(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fast: bool) -> Profile:
    """Run one block forward and backward; fake tensors in, nothing computed.

    Args:
        args: the first is its input, hidden states.
        fast: whether `optimize_training` compiles it.
    """
    hidden, *others = args
    trained = [p for p in block.parameters() if p.requires_grad]
    sizes = [m.dequantized_bytes(hidden.dtype) for m in block.modules() if hasattr(m, "dequantized_bytes")]

    def forward(x: Tensor) -> Tensor:
        found = block(x, *others, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    def run(recompute: bool, retain: bool) -> tuple[Ledger, set[int], int, int, int]:
        """The ledger, what was saved, the input's number, and what forward and backward passes add at most."""
        x = hidden.detach().requires_grad_()
        for p in trained:
            p.grad = None
        ledger = Ledger()
        with ledger:
            given = ledger.name(x)
            call = (lambda: checkpoint(forward, x, use_reentrant=False)) if recompute else (lambda: forward(x))
            y, saved = saved_by(ledger, call)
            ahead, held = ledger.peak, ledger.live  # the output lives on here, and counts on both sides of a difference
            ledger.restart()
            torch.autograd.backward([y], [torch.empty_like(y)], retain_graph=retain)
            peak = ledger.opaque_peak if fast and not retain else ledger.peak
        for p in trained:
            p.grad = None
        return ledger, saved, given, ahead, peak - held

    ledger, saved, given, ahead, added = run(False, retain=False)
    if fast:
        saved = ledger.compiled(saved)
        # one compiled function computes the block again and gives up what it is done with; between two of them nothing is
        again = ledger.bytes_of(saved - {given}) + added
        added = run(False, retain=True)[-1]
    else:
        again = run(True, retain=False)[-1]
    return Profile(
        boundary=rounded(_storage(hidden).nbytes()),
        saved=ledger.bytes_of(saved),
        kept=added,
        forward=ahead,
        recomputed=again,
        gradients=sum(rounded(p.numel() * p.element_size()) for p in trained),
        dequantized=max(sizes, default=0),
    )

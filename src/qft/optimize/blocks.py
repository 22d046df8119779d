"""A model's repeated blocks, each computed as one compiled function, with the recomputation inside it.

transformers puts its checkpoint around a block, so that the whole block runs again in the backward pass. Inside the
compiled function the partitioner sees what the backward pass reads, and leaves the rest out: the last product of a
block, for one. All blocks of one kind share their compiled code: it takes the block as an argument.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint

from qft.core.blocks import _signature
from qft.core.console import one_line
from qft.errors import QftWarning
from qft.optimize.loss_without_logits import Patch, outside_compiler
from qft.optimize.offload_activations import Checkpoints
from qft.optimize.offload_weights import WeightStream
from qft.optimize.positions import counted

_NOT_FOR_BLOCKS = frozenset({"num_items_in_batch", "labels", "shift_labels"})
"""What a model hands through to its blocks and they do not read: numbers that would be compiled in."""


@dataclass
class BlockPlan:
    """What the blocks of one model do: shared by all patches of it.

    Attributes:
        compiles: whether blocks are compiled, with this `backend` of torch.compile.
        keeps: indices of blocks that keep their activations; None leaves that to the model's own flags.
        chooser: chooses `keeps` for each training batch from what its blocks' owner is called with; None: `keeps` stays.
        loss: what was put on the model itself, if anything.
        kinds: blocks that share compiled code, by what makes them alike.
        flags: by id of a block, whether the model's own flag wants it recomputed, while its owner's forward runs.
        checkpoints: where the inputs of recomputed blocks are between the passes; None: on the device.
        weights: what streams packed weights from the host; None: they are on the device.
    """

    compiles: bool = True
    backend: str | Callable[..., Any] = "inductor"
    keeps: frozenset[int] | None = None
    chooser: Callable[[tuple[Any, ...], dict[str, Any]], frozenset[int] | None] | None = None
    loss: Patch | None = None
    kinds: dict[Any, Kind] = field(default_factory=dict)
    flags: dict[int, bool] = field(default_factory=dict)
    checkpoints: Checkpoints | None = None
    weights: WeightStream | None = None


class BlocksForward(Patch):
    """Put on the owner of blocks: while it trains, transformers' own checkpoint and the cache are out of the way."""

    def __init__(self, owner: nn.Module, blocks: Sequence[nn.Module], plan: BlockPlan):
        super().__init__(owner)
        self.blocks, self.plan = list(blocks), plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.module
        if self.is_traced or (torch.compiler.is_compiling() and self.active and self.plan.weights is not None):
            return outside_compiler(self, args, kwargs)
        if self.active and self.plan.weights is not None and not torch.compiler.is_compiling():
            self.plan.weights.begin()
        if not (self.active and owner.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        if self.plan.chooser is not None:
            self.plan.keeps = self.plan.chooser(args, kwargs)
        if kwargs.get("use_cache") is None and kwargs.get("past_key_values") is None and self._takes_use_cache(args):
            kwargs["use_cache"] = False  # the default of most configs; nobody reads a cache in training
        own = getattr(owner, "gradient_checkpointing", False)
        flagged = [b for b in self.blocks if getattr(b, "gradient_checkpointing", False)]
        # blocks of old code have no flag: their owner wraps them, by its own
        outside = [owner] if own and not any(hasattr(b, "gradient_checkpointing") for b in self.blocks) else []
        for block in self.blocks:
            self.plan.flags[id(block)] = bool(outside) or getattr(block, "gradient_checkpointing", False)
        for module in [*flagged, *outside]:
            module.gradient_checkpointing = False
        given = len(args) > 1 or any(kwargs.get(n) is not None for n in ("position_ids", "attention_mask"))
        try:
            with nullcontext() if given else counted():
                return self.original(*args, **kwargs)
        finally:
            for module in [*flagged, *outside]:
                module.gradient_checkpointing = True
            self.plan.flags.clear()

    def _takes_use_cache(self, args: tuple[Any, ...]) -> bool:
        parameters = list(self.__signature__.parameters)
        return "use_cache" in parameters[len(args) :]


class BlockForward(Patch):
    """Put on one block: its own forward, compiled, recomputed or both while it trains."""

    def __init__(self, block: nn.Module, index: int, plan: BlockPlan):
        super().__init__(block)
        self.index, self.plan = index, plan
        self._signature: tuple[Any, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.module
        if self.is_traced:
            return outside_compiler(self, args, kwargs)
        trains = self.active and block.training and torch.is_grad_enabled()
        if not trains or torch.compiler.is_compiling() or _has_cache(args, kwargs):
            return self.original(*args, **kwargs)
        recompute = self._recomputes()
        if recompute is None:  # transformers' own checkpoint is around this call
            recompute = False
        dropped = _NOT_FOR_BLOCKS & kwargs.keys()
        if dropped:
            kwargs = {k: v for k, v in kwargs.items() if k not in dropped}
        if self._signature is None:
            self._signature = _signature(block)
        key = (type(block), self._signature, recompute)
        kind = self.plan.kinds.get(key)
        if kind is None:
            kind = self.plan.kinds[key] = Kind(type(block).__name__, recompute, self.plan)
        if recompute and self.plan.checkpoints is not None:
            with self.plan.checkpoints.around(args[0] if args else kwargs.get("hidden_states")):
                return kind(self.inner, block, args, kwargs)
        return kind(self.inner, block, args, kwargs)

    @property
    def inner(self) -> Callable[..., Any]:
        """The block's forward as a function of it, without transformers' checkpoint around."""
        if self.before is not None:
            return _ignoring_self(self.before)
        forward = type(self.module).forward
        while getattr(getattr(forward, "__code__", None), "co_name", "") == "forward_with_checkpointing":
            forward = forward.__wrapped__
        return forward

    def _recomputes(self) -> bool | None:
        flags, keeps = self.plan.flags, self.plan.keeps
        if id(self.module) not in flags:  # the blocks' owner was not called through us
            flag = getattr(self.module, "gradient_checkpointing", False)
            if flag and "__call__" in vars(_checkpointing_layer()):
                return None
            return flag if keeps is None else self.index not in keeps
        return flags[id(self.module)] if keeps is None else self.index not in keeps


@functools.cache
def _checkpointing_layer() -> type:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def _ignoring_self(bound: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args, **kwargs: bound(*args, **kwargs)


def _has_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    from transformers.cache_utils import Cache

    return any(isinstance(v, Cache) for v in (*args, *kwargs.values()))


# ---- the functions that are compiled --------------------------------------------------------------------------------


def _straight(forward, block, args, kwargs):
    return forward(block, *args, **kwargs)


def _recomputed(forward, block, args, kwargs):
    return checkpoint(functools.partial(forward, block, **kwargs), *args, use_reentrant=False)


_numbers = itertools.count()


class Kind:
    """Blocks that share compiled code."""

    def __init__(self, name: str, recompute: bool, plan: BlockPlan):
        self.name, self.compiles, self.backend = name, plan.compiles, plan.backend
        self.function = _recomputed if recompute else _straight
        self.whole = True
        self._compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __call__(self, forward: Callable[..., Any], block: nn.Module, args: Any, kwargs: Any) -> Any:
        # a mode that watches every operation keeps dynamo from compiling anything
        while self.compiles and not _len_torch_dispatch_stack():
            try:
                if self._compiled is None:
                    self._compiled = self._compile()
                return self._compiled(forward, block, args, kwargs)
            except Exception as error:
                if not self._step_down(error):
                    raise
        return self.function(forward, block, args, kwargs)

    def _compile(self) -> Callable[..., Any]:
        # dynamo keeps what it compiled with the code object, and gives up on one that has too many versions: each kind
        # of each model has its own, and they differ, as equal ones count as one
        name = f"{self.function.__name__}_{self.name}_{next(_numbers)}"
        code = self.function.__code__.replace(co_name=name, co_qualname=name)
        function = types.FunctionType(code, self.function.__globals__, name)
        return torch.compile(function, fullgraph=self.whole, backend=self.backend)

    def _step_down(self, error: Exception) -> bool:
        """Compile less after this error, if it is one of the compiler: those come before anything has run."""
        from torch._dynamo import exc

        line = one_line(error)
        if self.whole and isinstance(error, exc.Unsupported | exc.FailOnRecompileLimitHit):
            self.whole, self._compiled = False, None
            warnings.warn(f"{self.name} is compiled in pieces, which is slower: {line}", QftWarning, stacklevel=4)
            return True
        if isinstance(error, exc.TorchDynamoException):
            self.compiles, self._compiled = False, None
            warnings.warn(f"{self.name} is not compiled: {line}", QftWarning, stacklevel=4)
            return True
        return False


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot work for this device here, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return (
            None if has_triton() else "triton, which compiles for CUDA, is not installed or does not know this device"
        )
    if device.type == "cpu":
        if sys.platform == "win32" and shutil.which("cl") is None:
            return "there is no C++ compiler (cl)"
        compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
        return None if any(c and shutil.which(c) for c in compilers) else "there is no C++ compiler (g++, clang++)"
    return f"blocks are compiled on CUDA and the CPU only, not on {device.type}"

"""A model of a plan made ready to run under fake tensors: stand-ins for its quantized layers, and what is run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qft.core.blocks import _signature, find_blocks
from qft.core.experts import fused_parameters
from qft.core.quantizer import float_weight
from qft.errors import UnsupportedOperation
from qft.lora.experts import split
from qft.memory.outline import Outline, shape_of
from qft.memory.profile import Ledger, Profile, block_profile, fakes, rounded
from qft.ops.grouped import ExpertUpdate, Groups, expert_linear
from qft.ops.linear import Update, lora_linear
from qft.ops.loss import LogitScaling, Targets, _LinearCrossEntropy


class Linear(nn.Module):
    """A quantized or adapted linear without its weight: qft's own arithmetic, over a Ŵ that is made when asked for."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantized: bool):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.quantized, self.bias = quantized, bias
        self.weight = None if quantized else nn.Parameter(torch.empty_like(weight), requires_grad=False)
        self.dropouts: list[float] = []

    def adapt(self, rank: int, dropout: float, dtype: torch.dtype = torch.float32, trained: bool = True) -> None:
        """One more adapter, (rank, in_features) and (out_features, rank)."""
        i = len(self.dropouts)
        for name, shape in ((f"A{i}", (rank, self.in_features)), (f"B{i}", (self.out_features, rank))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), trained))
        self.dropouts.append(dropout)

    def dequantized_bytes(self, dtype: torch.dtype) -> int:
        return self.out_features * self.in_features * dtype.itemsize if self.quantized else 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized and not self.dropouts:
            return nn.functional.linear(x, self.weight, self.bias)
        updates = []
        for i, p in enumerate(self.dropouts):
            dropped = nn.functional.dropout(x, p) if p else None
            updates.append(Update(self._parameters[f"A{i}"], self._parameters[f"B{i}"], 1.0, dropped))
        return lora_linear(x, self._floats, self.bias, updates)

    def _floats(self, dtype: torch.dtype) -> Tensor:
        if self.weight is not None:
            return self.weight.to(dtype)
        return torch.empty(self.out_features, self.in_features, dtype=dtype)


class _Rows(Groups):
    """Groups whose sizes nobody knows: shapes alone."""

    def __init__(self, rows: int, count: int):
        self.experts, self.count = torch.empty(rows, dtype=torch.int64), count

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[2])

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_empty(self.count, x.shape[1], y.shape[1])


class Experts:
    """The forward of fused experts, as `qft.core.experts.ExpertsForward` computes it, all experts being hit."""

    def __init__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], quantized: bool):
        self.module, self.shapes, self.quantized = module, dict(shapes), quantized

    def dequantized_bytes(self, dtype: torch.dtype) -> int:
        return max(prod(s) for s in self.shapes.values()) * dtype.itemsize if self.quantized else 0

    def __call__(self, hidden_states: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        module: Any = self.module
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        tokens, top_k = x.shape[0], index.shape[-1]
        _, order = index.reshape(-1).sort(stable=True)
        groups, gated = _Rows(tokens * top_k, module.num_experts), getattr(module, "has_gate", True)
        y = self._project("gate_up_proj" if gated else "up_proj", x[order // top_k], groups)
        y = module._apply_gate(y) if gated else module.act_fn(y)
        y = self._project("down_proj", y, groups)
        y = y * scores.reshape(-1)[order].unsqueeze(-1)
        y = y[torch.empty_like(order)].view(tokens, top_k, -1).sum(dim=1)
        return y.to(hidden_states.dtype).view(hidden_states.shape)

    def _project(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        module: Any = self.module
        shape = self.shapes[name]
        a, b = module._parameters.get(f"{name}_A"), module._parameters.get(f"{name}_B")
        updates = [ExpertUpdate(*split(a, b, shape[0]), 1.0)] if a is not None else []
        y = expert_linear(x, lambda dtype: torch.empty(shape, dtype=dtype), groups, updates)
        if getattr(module, "has_bias", False):
            y = y + getattr(module, f"{name}_bias").to(y.dtype)[groups.experts]
        return y


def stand_in(found: Outline) -> None:
    """Put these into the model of an outline, which cannot be weighed any more afterwards."""
    model, ranks = found.model, found.ranks
    model.requires_grad_(False)
    for name in {**found.selection.targets, **ranks}:
        where, _, last = name.rpartition(".")
        owner = model.get_submodule(where)
        if last in owner._parameters:
            continue
        layer = model.get_submodule(name)
        new = Linear(float_weight(layer), layer.bias, name in found.selection.targets)
        if name in ranks:
            new.adapt(ranks[name], found.adapter.lora_dropout)
        setattr(owner, last, new)
    for where, module in list(model.named_modules()):
        fused = fused_parameters(module)
        if not fused:
            continue
        shapes = {k: shape_of(model, f"{where}.{k}") for k in fused}
        packed = all(f"{where}.{k}" in found.selection.stacks for k in fused)
        for key, shape in shapes.items():
            module._parameters.pop(key)
            rank = ranks.get(f"{where}.{key}", 0)
            if rank:
                module.register_parameter(
                    f"{key}_A", nn.Parameter(torch.empty(shape[0] * rank, shape[2], device="meta"))
                )
                module.register_parameter(
                    f"{key}_B", nn.Parameter(torch.empty(shape[1], rank * shape[0], device="meta"))
                )
        module.__dict__["forward"] = forward = Experts(module, shapes, packed)
        module.__dict__["dequantized_bytes"] = forward.dequantized_bytes


# ---- run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A model's activations at one size of batch.

    Attributes:
        blocks: the profile of each block.
        shared: what all blocks read: position embeddings, masks.
        head: from the last block's output through loss and back, `shared` included, at most.
        leaf: whether the first block reads the embeddings themselves, which were made to require a gradient: autograd holds
            a leaf whatever becomes of what blocks save.
    """

    blocks: tuple[Profile, ...]
    shared: int
    head: int
    leaf: bool


class _Through(torch.autograd.Function):
    """A block without a block: a new tensor of the same shape."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        if ctx.note is not None:
            ctx.note()
        return torch.empty_like(g), None


def measure(
    found: Outline,
    batch: int,
    sequence: int,
    *,
    fast: bool,
    autocast: bool,
    compiled: bool | None = None,
    masked: bool = False,
    kernel: bool = False,
) -> Measured:
    """Run what stands around the blocks, and one block of each kind.

    Args:
        fast: the loss comes without logits.
        compiled: blocks are compiled; default as `fast`.
        masked: attention reads a mask of (batch, 1, sequence, sequence), which padding and packing make.
        kernel: that loss is of `qft.ops.kernels.next_token`, not of torch code.
    """
    model: Any = found.model
    owners = find_blocks(model)
    if len(owners) != 1:
        raise UnsupportedOperation(
            f"{type(model).__name__} has {len(owners)} stacks of repeated blocks that qft can find; plans are for one"
        )
    blocks = owners[0][1]
    kinds: dict[Any, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
    keys: list[Any] = []
    ledger = Ledger()
    seen: dict[str, int] = {}
    leaves: list[bool] = []
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    def recorder(block: nn.Module, real: Callable[..., Any], last: bool) -> Callable[..., Any]:
        key = _kind(block)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            keys.append(key)
            leaves.append(x.is_leaf and x.requires_grad)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
            if key not in kinds:
                kinds[key] = (block, _detached((x, *args)), _detached(kwargs))
            seen.setdefault("shared", ledger.live - rounded(x.untyped_storage().nbytes()))
            if last:
                seen["before"] = ledger.live
                ledger.restart()
            y = _Through.apply(x, (lambda: seen.setdefault("head", ledger.peak)) if last else None)
            return (y,) if tuples[key] else y

        return forward

    originals = [b.__dict__.get("forward") for b in blocks]
    tuples, shared = _outputs(model, blocks, context, (batch, sequence), masked)
    with fakes(), context:
        _to_fake(model, {id(m) for b in blocks for m in b.modules()})
        for b in blocks:
            b.__dict__["forward"] = recorder(b, b.forward, b is blocks[-1])
        hook = model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())
        try:
            ids = torch.empty(batch, sequence, dtype=torch.int64)
            with ledger:
                mask = {"attention_mask": torch.empty(batch, 1, sequence, sequence, dtype=torch.bool)} if masked else {}
                loss = _loss(model, ids, fast, mask, kernel)
                loss.backward()
        finally:
            hook.remove()
            for b, original in zip(blocks, originals, strict=True):
                del b.__dict__["forward"]
                if original is not None:
                    b.__dict__["forward"] = original
        profiles = {}
        for key, (block, args, kwargs) in kinds.items():
            _to_fake(block, set())
            whole = (fast if compiled is None else compiled) and not _has_packed_experts(block)
            profiles[key] = block_profile(block, args, _with_shared(kwargs, shared), whole)
    head = seen["head"] - seen["before"] + seen["shared"]
    return Measured(tuple(profiles[k] for k in keys), seen["shared"], head, leaves[0])


def _detached(value: Any) -> Any:
    """Tensors as leaves, in containers too: a block is measured after the graph before it is gone."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if type(value) in (tuple, list):
        return type(value)(_detached(v) for v in value)
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    return value


def _has_packed_experts(block: nn.Module) -> bool:
    """Their code is not for the compiler; a block with a part that is not is recomputed as it is, by transformers' code."""
    forwards = (m.__dict__.get("forward") for m in block.modules())
    return any(isinstance(f, Experts) and f.quantized for f in forwards)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What two blocks have in common whose activations take the same memory."""
    return type(block), getattr(block, "attention_type", None), _signature(block)


Shared = dict[str, dict[Any, list[tuple[torch.Size, torch.dtype]]]]
"""Argument → key → shapes of the tensors that blocks leave there for later blocks."""


def _outputs(
    model: nn.Module, blocks: list[Any], context: Any, size: tuple[int, int], masked: bool
) -> tuple[dict[Any, bool], Shared]:
    """Run one block of each kind on fake tensors, as the model calls it; all blocks where they pass tensors to each other.

    Annotations do not tell: Gemma 3's blocks are annotated as returning a tuple, and return a tensor. Gemma 3n's and 4's
    later blocks read keys and values that earlier ones put into a mapping.

    Returns:
        Kind of block → whether it returns a tuple; what blocks leave for others.
    """
    found: dict[Any, bool] = {}
    shared: Shared = {}

    def watched(block: nn.Module, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            key = _kind(block)
            mappings = {k: v for k, v in kwargs.items() if isinstance(v, MutableMapping)}
            if key not in found or mappings:
                y = real(x, *args, **kwargs)
                found[key] = isinstance(y, tuple)
                for name, held in mappings.items():
                    shared[name] = {k: [(t.shape, t.dtype) for t in v] for k, v in held.items() if isinstance(v, tuple)}
                return y
            return (x,) if found[key] else x

        return forward

    originals = [b.__dict__.get("forward") for b in blocks]
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    with fakes(), context, torch.no_grad():
        _to_fake(model, set())
        for b in blocks:
            b.__dict__["forward"] = watched(b, b.forward)
        try:
            mask = {"attention_mask": torch.empty(size[0], 1, size[1], size[1], dtype=torch.bool)} if masked else {}
            base(input_ids=torch.empty(*size, dtype=torch.int64), use_cache=False, **mask)
        except Exception:  # the estimate itself says why a model cannot be run; until then the annotation has to do
            pass
        finally:
            for b, original in zip(blocks, originals, strict=True):
                del b.__dict__["forward"]
                if original is not None:
                    b.__dict__["forward"] = original
    for b in blocks:
        found.setdefault(_kind(b), _annotated_as_tuple(b))
    return found, shared


def _with_shared(kwargs: dict[str, Any], shared: Shared) -> dict[str, Any]:
    """Arguments with tensors of the shapes that earlier blocks leave for this one."""
    made = dict(kwargs)
    for name, held in shared.items():
        if name in made:
            made[name] = copy.copy(made[name])
            for key, shapes in held.items():
                made[name][key] = tuple(torch.empty(s, dtype=d).requires_grad_(d.is_floating_point) for s, d in shapes)
    return made


def _annotated_as_tuple(block: nn.Module) -> bool:
    hint = str(inspect.signature(type(block).forward).return_annotation)
    return "tuple" in hint.lower() and "Tensor |" not in hint and "| torch.Tensor" not in hint


def _loss(model: Any, ids: Tensor, fast: bool, mask: dict[str, Tensor], kernel: bool) -> Tensor:
    if not fast:
        return model(input_ids=ids, labels=ids, use_cache=False, **mask).loss
    base = getattr(model, model.base_model_prefix, None)
    base = model.model if base is None else base  # Llama 4 names the prefix of its larger model
    hidden = base(input_ids=ids, use_cache=False, **mask)[0]
    head = model.get_output_embeddings()
    flat = hidden.reshape(-1, hidden.shape[-1])
    weight = head.weight.detach()
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        flat, weight = flat.to(dtype), weight.to(dtype)
    del hidden
    with torch.autocast("cpu", enabled=False):
        targets = Targets(ids.reshape(-1))
        # a kernel allocates nothing
        return _LinearCrossEntropy.apply(flat, weight, None, targets, LogitScaling(), True, lambda *_: kernel)


def _to_fake(module: nn.Module, without: set[int]) -> None:
    """Fake tensors in the place of those on "meta", and of an earlier run's; a weight that is shared stays shared."""
    memo: dict[int, Tensor] = {}
    for m in module.modules():
        if id(m) in without:
            continue
        for place in (m._parameters, m._buffers, m.__dict__):
            for name, t in place.items():
                # fakes of an earlier run would be taken for tensors that an operation made
                if not isinstance(t, FakeTensor) and not (isinstance(t, Tensor) and t.is_meta):
                    continue
                if id(t) not in memo:
                    new = torch.empty(t.shape, dtype=t.dtype)
                    memo[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
                place[name] = memo[id(t)]  # type: ignore[assignment]

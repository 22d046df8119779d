"""Fused experts: weights of (experts, out_features, in_features) in one parameter, packed expert by expert.

An experts module of transformers 5 keeps its class. In the place of each 3-D parameter it gets a `PackedExperts` of the
same name, and its forward is an `ExpertsForward`, which dequantizes the experts that a batch hits and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.packed import PackedModule, TensorQuantizer
from qft.core.quantizer import QuantizedWeight
from qft.errors import UnsupportedOperation
from qft.ops.grouped import ExpertUpdate, Groups, expert_linear

SURE = 8
"""With this many rows an expert on average all are taken to be hit, and the device is not asked."""


# ---- which parameters --------------------------------------------------------------------------------------


def is_experts(module: nn.Module) -> bool:
    """Whether `module` follows transformers' interface of routed experts: (hidden, indices, weights) in, hidden out."""
    return hasattr(module, "num_experts") and hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The float 3-D parameters of an experts module, in the order of their definition; empty for other modules."""
    if not is_experts(module):
        return {}
    return {
        k: p for k, p in module._parameters.items() if p is not None and p.ndim == 3 and p.is_floating_point()
    }  # fmt: skip


def stacks(module: nn.Module) -> dict[str, PackedExperts]:
    """The packed weights that `module` itself holds, in the order of the float parameters."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, ExpertsForward):
        return {}
    found = ((name, module._modules.get(name)) for name in forward.order)
    return {name: m for name, m in found if isinstance(m, PackedExperts)}


def fused_weight(model: nn.Module, name: str) -> Tensor | None:
    """The float weight of that name as (experts, out_features, in_features), a view; None where there is none."""
    parent_name, _, last = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        return None
    parameter = fused_parameters(parent).get(last)
    if parameter is None:
        return None
    return as_stack(parameter.detach(), parent.is_transposed)


def as_stack(weight: Tensor, transposed: bool) -> Tensor:
    """(experts, out_features, in_features) from the parameter's own order of dimensions, and the other way round."""
    return weight.transpose(1, 2) if transposed else weight


# ---- packed ------------------------------------------------------------------------------------------------


class PackedExperts(PackedModule):
    """One fused weight: what `quantizer.pack` makes of each expert, stacked along a new first dimension.

    Args:
        quantizer: knows how to pack and unpack one expert's (out_features, in_features).
        packed: the stacked tensors by name.
        shape: `(experts, out_features, in_features)`.
        dtype: of the float weight.
        transposed: the float parameter was `(experts, in_features, out_features)`.
    """

    bias = None

    def __init__(
        self,
        quantizer: TensorQuantizer,
        packed: Mapping[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool,
    ):
        super().__init__(quantizer, packed, dtype)
        self.experts, self.out_features, self.in_features = shape
        self.transposed, self.kind = transposed, "experts"

    @property
    def shape(self) -> torch.Size:
        """That of the float parameter."""
        e, o, i = self.handle.shape
        return torch.Size((e, i, o) if self.transposed else (e, o, i))

    @property
    def ndim(self) -> int:
        return 3

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def handle(self) -> QuantizedWeight:
        shape = (self.experts, self.out_features, self.in_features)
        return QuantizedWeight(self, "weight", shape, "experts", self.transposed, self.dtype, None)

    @property
    def weight(self) -> Tensor:
        """The weight as floats in the float parameter's shape, dequantized on each access."""
        return as_stack(self.unpacked(self.dtype), self.transposed)

    def unpacked(self, dtype: torch.dtype, out: Tensor | None = None, experts: Tensor | None = None) -> Tensor:
        """Ŵ of all experts, or of those of these indices: (experts, out_features, in_features)."""
        packed = {n: t.detach() for n, t in self.packed.items()}
        if experts is not None:
            packed = {n: t.index_select(0, experts) for n, t in packed.items()}
        count, one = next(iter(packed.values())).shape[0], (self.out_features, self.in_features)
        rows = (count * one[0], one[1])
        dtype = dtype if out is None else out.dtype
        if count and (out is None or out.is_contiguous()) and _in_one_go(self.quantizer, one, self.device.type):
            flat = {n: t.flatten(0, 1) for n, t in packed.items()}
            place = None if out is None else out.view(rows)
            value = self.quantizer.unpack(flat, shape=rows, dtype=dtype, out=place)
            return value.view(count, *one) if out is None else out
        value = torch.empty((count, *one), dtype=dtype, device=self.device) if out is None else out
        for i in range(count):
            self.quantizer.unpack({n: t[i] for n, t in packed.items()}, shape=one, dtype=dtype, out=value[i])
        return value

    def repacked(self, value: Tensor) -> dict[str, Tensor]:
        """The packed tensors of other floats."""
        return pack_stack(self.quantizer, value.to(self.device))

    def extra_repr(self) -> str:
        return f"{self.experts}, {self.in_features}, {self.out_features}, quantizer={self.quantizer!r}"


def pack_stack(quantizer: TensorQuantizer, weight: Tensor) -> dict[str, Tensor]:
    """The stacked tensors of `weight` (experts, out_features, in_features)."""
    made: dict[str, Tensor] = {}
    for i in range(weight.shape[0]):
        for name, tensor in quantizer._pack(weight[i], None).items():
            if i == 0:
                made[name] = tensor.new_empty((weight.shape[0], *tensor.shape))
            made[name][i] = tensor
    return made


@lru_cache
def _in_one_go(quantizer: TensorQuantizer, shape: tuple[int, int], device: str) -> bool:
    """Whether experts laid end to end unpack as one tall weight, so that any number of them takes one call.

    It is tried out: a format whose layout or constants go across rows gives other numbers, or an error.
    """
    generator = torch.Generator().manual_seed(0)
    three = [torch.randn(shape, generator=generator).mul_(scale).to(device) for scale in (1.0, 3.0, 0.5)]
    packed = [quantizer._pack(weight, None) for weight in three]
    rows = (3 * shape[0], shape[1])
    try:
        tall = {n: torch.cat([p[n] for p in packed]) for n in packed[0]}
        wanted = quantizer.template(rows, torch.float32)
        if {n: t.shape for n, t in tall.items()} != {n: torch.Size(s) for n, (s, _) in wanted.items()}:
            return False
        value = quantizer.unpack(tall, shape=rows, dtype=torch.float32)
    except Exception:
        return False
    each = [quantizer.unpack(p, shape=shape, dtype=torch.float32) for p in packed]
    return torch.equal(value, torch.cat(each))


def put_stack(model: nn.Module, name: str, stack: PackedExperts) -> None:
    """Put a packed weight in the place of the float parameter of that name, and the forward on its module."""
    parent_name, _, last = name.rpartition(".")
    module = model.get_submodule(parent_name)
    if not isinstance(module.__dict__.get("forward"), ExpertsForward):
        module.forward = ExpertsForward(module, tuple(module._parameters))
        module._is_hf_initialized = True  # transformers would draw weights that are no parameters any more
    module._parameters.pop(last)
    stack.train(module.training)
    module._modules[last] = stack
    for key in stacks(module):  # in the order of definition, whichever came first: adapters are nested by it
        module._modules[key] = module._modules.pop(key)


def pack_parameter(
    model: nn.Module, name: str, quantizer: TensorQuantizer, value: Tensor | None = None
) -> PackedExperts:
    """Pack the fused float parameter of that name and put it in its place.

    Args:
        value: the parameter's value, where the model has none yet; in the parameter's own shape.
    """
    parent_name, _, last = name.rpartition(".")
    module = model.get_submodule(parent_name)
    weight = as_stack((module._parameters[last] if value is None else value).detach(), module.is_transposed)
    packed = pack_stack(quantizer, weight)
    stack = PackedExperts(quantizer, packed, tuple(weight.shape), weight.dtype, bool(module.is_transposed))
    stack._qft_quantizer, stack._is_hf_initialized = quantizer, True
    for parameter in stack.parameters():
        parameter._is_hf_initialized = True
    put_stack(model, name, stack)
    return stack


def float_experts(module: nn.Module, weights: Mapping[str, Tensor], memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a packed experts module with float parameters, in the order that they had.

    Args:
        weights: the floats by name, in the parameters' own shapes.
        memo: for the copy of everything else, as `copy.deepcopy` takes it.
    """
    kept = stacks(module)
    new = copy.deepcopy(module, {**(memo or {}), **{id(s): None for s in kept.values()}})
    order = new.__dict__.pop("forward").order
    parameters = {**new._parameters, **{n: nn.Parameter(weights[n], requires_grad=False) for n in kept}}
    for name in kept:
        del new._modules[name]
    new._parameters.clear()
    new._parameters.update({n: parameters[n] for n in order})
    return new


# ---- computed ----------------------------------------------------------------------------------------------


class ExpertsForward:
    """The forward of an experts module over packed weights, as transformers' grouped path computes it.

    A class, so that models with it can be copied and pickled.

    Attributes:
        order: the names of the float module's parameters.
        updates: adapters that are active in the call that runs, by parameter name.
        all_experts: dequantize all experts at each call.
        last_hit: how many experts the last call dequantized.
    """

    def __init__(self, module: nn.Module, order: tuple[str, ...]):
        self.module, self.order = module, order
        self.updates: dict[str, list[ExpertUpdate]] = {}
        self.all_experts = False
        self.last_hit = 0

    def __call__(self, hidden_states: Tensor, *routing: Tensor, **kwargs: Tensor) -> Tensor:
        index, scores = _routing(routing, kwargs)
        return self._compute(hidden_states, index, scores)

    @torch.compiler.disable
    def _compute(self, hidden_states: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        module = self.module
        if getattr(module, "_is_expert_parallel", False):
            raise UnsupportedOperation(
                "packed experts are not split over devices: load the model without expert parallelism"
            )
        x, count = hidden_states.reshape(-1, hidden_states.shape[-1]), module.num_experts
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tokens, top_k = x.shape[0], index.shape[-1]
        if not tokens:
            self.last_hit = 0
            return torch.zeros_like(hidden_states)
        experts, order = index.reshape(-1).sort(stable=True)
        hit = None
        if not self.all_experts and experts.numel() < SURE * count:
            hit, experts = experts.unique_consecutive(return_inverse=True)
            if hit.numel() == count:
                hit = None
        self.last_hit = count if hit is None else hit.numel()
        groups, gated = Groups(experts, self.last_hit), getattr(module, "has_gate", True)
        y = self._project("gate_up_proj" if gated else "up_proj", x[order // top_k], groups, hit)
        y = module._apply_gate(y) if gated else module.act_fn(y)
        y = self._project("down_proj", y, groups, hit)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        y = y * scores.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = y[back].view(tokens, top_k, -1).sum(dim=1)
        return y.to(hidden_states.dtype).view(hidden_states.shape)

    def _project(self, name: str, x: Tensor, groups: Groups, hit: Tensor | None) -> Tensor:
        stack = self.module._modules[name]
        y = expert_linear(x, _Floats(stack, hit), groups, self.updates.get(name, ()), hit)
        if getattr(self.module, "has_bias", False):
            bias = getattr(self.module, f"{name}_bias").to(y.dtype)
            y = y + (bias if hit is None else bias.index_select(0, hit))[groups.experts]
        return y


class _Floats:
    """Ŵ of the experts of one call, made anew for each pass; nothing of it is kept between them."""

    def __init__(self, stack: PackedExperts, hit: Tensor | None):
        self.stack, self.hit = stack, hit

    def __call__(self, dtype: torch.dtype) -> Tensor:
        return self.stack.unpacked(dtype, experts=self.hit)


def _routing(given: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Indices and scores, by the names that models give them."""
    parts = list(given)
    for names in (("top_k_index", "router_indices"), ("top_k_weights", "routing_weights")):
        parts += [kwargs.pop(n) for n in names if n in kwargs]
    if len(parts) != 2 or kwargs or parts[0] is None or parts[1].shape != parts[0].shape:
        raise UnsupportedOperation(
            "packed experts are called with hidden states, the indices of the chosen experts and their scores, (tokens, "
            "top_k) both: this model's code calls them in another way"
        )
    return parts[0], parts[1]


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedExperts]]:
    """The packed experts of a model by the names that they have, or had, without adapters."""
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            yield name.replace(".base_layer", ""), module

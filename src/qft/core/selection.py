"""Select the weights to quantize.

Linear layers and fused experts are quantized. Heads, tied weights, routers and what a model keeps in float32 are not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.direct_reads import direct_reads
from qft.core.experts import as_stack, fused_parameters
from qft.core.quantizer import Quantizer, float_weight, is_conv1d
from qft.core.structure import heads, output_embeddings, routers, selectors
from qft.core.unquantized import is_float_linear
from qft.errors import BadOption, NoTargets

KEPT = "the model keeps it in float32"
READ = "its weight is read directly by"
SKIPPED = "skipped by the caller"


@dataclass
class Selection:
    """The outcome: layers by name with their quantizer, and what stays as it is, with the reason."""

    targets: dict[str, Quantizer] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, Quantizer] = field(default_factory=dict)
    """Fused 3-D expert weights to quantize, by parameter name."""
    experts: dict[str, int] = field(default_factory=dict)
    """Fused 3-D expert weights that stay in 16 bit: name → bytes."""


def select(
    model: nn.Module, quantizers: Mapping[str, Quantizer | None], skip: str | Iterable[str] | None = None
) -> Selection:
    """Choose the layers of `model` to quantize.

    Args:
        quantizers: by module pattern (`fnmatch`); the first that matches wins, None leaves the layer. Fused experts go by
            the name of their parameter, such as `model.layers.0.mlp.experts.down_proj`; a module's are quantized all,
            or none of them.
        skip: names as `target_modules` takes them: a regular expression for the whole name, or a list of names or
            last parts of names. A module is skipped with all that is in it. They add to the default skips.

    Raises:
        NoTargets: no layer is left to quantize.
        BadOption: a skip that is no valid regular expression, or a skip or pattern that matches nothing.
    """
    skips = _Skips(skip)
    reasons = default_skips(model)
    chosen = Selection(experts=_fused_experts(model))
    inside: tuple[str, ...] = ()
    matched = {"*"}
    for name, module in model.named_modules():
        if found := _stacks(name, module, quantizers, skips, inside, matched):
            chosen.stacks |= found
            for key in found:
                del chosen.experts[key]
        skipped = skips(name) or name.startswith(inside)
        if skipped:
            inside += (f"{name}.",)
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            continue
        matched |= {pattern for pattern in quantizers if fnmatchcase(name, pattern)}
        quantizer = next((q for pattern, q in quantizers.items() if fnmatchcase(name, pattern)), None)
        if name in reasons:
            chosen.left[name] = reasons[name]
        elif skipped:
            chosen.left[name] = SKIPPED
        elif not is_float_linear(module):
            chosen.left[name] = f"a {type(module).__name__}, not a plain float linear"
        elif quantizer is None:
            chosen.left[name] = "no pattern asks for it"
        elif (why := quantizer.leaves(tuple(float_weight(module).shape))) is not None:
            chosen.left[name] = why
        else:
            chosen.targets[name] = quantizer
    unused = skips.unused()
    if unused:
        raise BadOption(f"skip names no module of this model: {', '.join(map(repr, unused))}")
    if not chosen.targets and not chosen.stacks:
        why = "; ".join(f"{n}: {r}" for n, r in list(chosen.left.items())[:5]) or "it has no linear layers"
        raise NoTargets(f"nothing to quantize in {type(model).__name__}: {why}")
    idle = [pattern for pattern in quantizers if pattern not in matched]
    if idle:
        raise BadOption(f"no linear layer or fused expert weight of this model matches {', '.join(map(repr, idle))}")
    return chosen


def _stacks(
    name: str,
    module: nn.Module,
    quantizers: Mapping[str, Quantizer | None],
    skips: _Skips,
    inside: tuple[str, ...],
    matched: set[str],
) -> dict[str, Quantizer]:
    """The quantizers of a module's fused experts by parameter name, or nothing where one of them is left."""
    found: dict[str, Quantizer | None] = {}
    skipped = False
    for key in fused_parameters(module):
        full = f"{name}.{key}"
        matched |= {pattern for pattern in quantizers if fnmatchcase(full, pattern)}
        quantizer = next((q for pattern, q in quantizers.items() if fnmatchcase(full, pattern)), None)
        skipped |= skips(full) or skips(name) or full.startswith(inside)
        found[full] = None if quantizer is None or quantizer.for_experts() is None else quantizer
    return {} if skipped or None in found.values() else found  # type: ignore[return-value]


class _Skips:
    def __init__(self, skip: str | Iterable[str] | None):
        self.pattern: re.Pattern[str] | None = None
        self.names: tuple[str, ...] = ()
        self.seen: set[str] = set()
        if isinstance(skip, str):
            try:
                self.pattern = re.compile(skip)
            except re.error as error:
                raise BadOption(f"skip={skip!r} is not a regular expression: {error}") from error
        elif skip is not None:
            self.names = tuple(skip)
            if not all(isinstance(n, str) for n in self.names):
                raise BadOption(f"skip={skip!r}: give a regular expression or a list of module names")

    def __call__(self, name: str) -> bool:
        if self.pattern is not None:
            hit = self.pattern.fullmatch(name) is not None
            if hit:
                self.seen.add(self.pattern.pattern)
            return hit
        hits = {n for n in self.names if name == n or name.endswith("." + n) or name.startswith(n + ".")}
        self.seen |= hits
        return bool(hits)

    def unused(self) -> list[str]:
        wanted = [self.pattern.pattern] if self.pattern is not None else list(self.names)
        return [n for n in wanted if n not in self.seen]


def default_skips(model: nn.Module) -> dict[str, str]:
    """Linear layers that stay as they are whatever the caller says, by name, with the reason."""
    reasons: dict[str, str] = {}
    modules = dict(model.named_modules())

    shared: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                shared[id(parameter)].append(f"{name}.{key}")
    tied = {n for names in shared.values() if len(names) > 1 for n in names}
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    tied |= set(keys) | set(keys.values())

    outputs, gates, chosen, read = heads(model), routers(model), selectors(model), direct_reads(model)
    keep = _kept_in_float32(model)
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            continue
        parent = modules[name.rpartition(".")[0]]
        if f"{name}.weight" in tied:
            reasons[name] = "its weight is shared with another module"
        elif name in outputs:
            reasons[name] = outputs[name]
        elif name in gates:
            reasons[name] = "a router"
        elif name in chosen:
            reasons[name] = "its result only selects tokens, so no gradient reaches it"
        elif name in read:
            reasons[name] = f"{READ} {read[name]}"
        elif isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            reasons[name] = f"{READ} PyTorch's fused kernels"
        elif any(re.search(rf"(^|\.){k}(\.|$)", name) for k in keep):
            reasons[name] = KEPT
    return reasons


def linear_targets(model: nn.Module, is_quantized) -> list[str]:
    """Every layer that "all-linear" means: the quantized ones and the float linears, without heads and routers."""
    reasons = {name: reason for name, reason in default_skips(model).items() if reason != KEPT}
    head = output_embeddings(model)
    names, adapted = [], ()
    for name, module in model.named_modules():
        if name.startswith(adapted):
            continue
        is_head = module is head
        if hasattr(module, "base_layer"):  # it has an adapter already: it is one layer, not the layers inside it
            adapted += (name + ".",)
            module = module.base_layer
        elif hasattr(module, "original_module"):  # PEFT trains all of it
            adapted += (name + ".",)
        if not is_head and name not in reasons and (is_quantized(module) or is_float_linear(module)):
            names.append(name)
    return names


def _kept_in_float32(model: nn.Module) -> list[str]:
    keep: set[Any] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            keep |= set(getattr(module, attribute, None) or ())
    return [re.escape(k) if isinstance(k, str) else k for k in keep]


def _fused_experts(model: nn.Module) -> dict[str, int]:
    found = {}
    for name, module in model.named_modules():
        if "expert" not in f"{name}.{type(module).__name__}".lower():
            continue
        for key, p in module._parameters.items():
            if p is not None and p.ndim == 3 and p.is_floating_point():
                found[f"{name}.{key}"] = p.numel() * p.element_size()
    return found


def settle(selection: Selection, weights: Mapping[str, Tensor], device: torch.device | None = None) -> Selection:
    """Settle each quantizer's open options over its own targets, and check that it runs on their device.

    Args:
        weights: of all targets, (out, in), and of the fused experts, (experts, out, in).
    """
    groups: dict[Quantizer, list[str]] = defaultdict(list)
    for name, q in selection.targets.items():
        groups[q].append(name)
    for name, q in selection.stacks.items():
        packer = q.for_experts()
        assert packer is not None
        q.check_installed()
        groups[packer].append(name)
    for q, names in groups.items():
        q.check_installed()
        settled = q.resolve([(n, tuple(weights[n].shape[-2:])) for n in names])
        devices = {torch.device(device)} if device is not None else {weights[n].device for n in names}
        for d in devices:
            if d.type != "meta":
                settled = settled.on_device(d)
        for n in names:
            (selection.targets if n in selection.targets else selection.stacks)[n] = settled
    return selection


def target_weights(model: nn.Module, selection: Selection) -> dict[str, Tensor]:
    """The float weights of all that is selected, by name: (out, in), and (experts, out, in); views."""
    found = {name: float_weight(model.get_submodule(name)) for name in selection.targets}
    for name in selection.stacks:
        parent_name, _, last = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        found[name] = as_stack(parent._parameters[last].detach(), bool(parent.is_transposed))
    return found

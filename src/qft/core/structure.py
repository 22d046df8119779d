"""What a linear layer is for, by the structure of the model: an output head, a router, or neither."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from torch import nn

from qft.core.quantizer import is_conv1d
from qft.core.selectors import returns_indices, selects

_GATES = frozenset({"gate", "router", "shared_expert_gate"})
"""Names of routers next to experts, where the number of experts cannot be read off the model."""


def heads(model: nn.Module) -> dict[str, str]:
    """Names of the linear layers that make a model's outputs → the reason to leave them alone.

    These are the output embeddings; what stands outside the base model that the class names; and of a model that does not
    generate, such as a classifier, what stands outside its base models, or where it has none, in its last module.
    """
    found = _own_heads(model)
    for name, module in model.named_modules():
        if name and hasattr(module, "config") and output_embeddings(module) is not None:  # a language model inside
            for inner, reason in _own_heads(module).items():
                found.setdefault(f"{name}.{inner}", reason)
    return found


def _own_heads(model: nn.Module) -> dict[str, str]:
    found = {}
    output = output_embeddings(model)
    prefix = _base_prefix(model)
    outside = set() if prefix or _generates(model) else _outside_of_bases(model)
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        if module is output:
            found[name] = "the output head"
        elif prefix and not name.startswith(f"{prefix}."):
            found[name] = "a head on top of the base model"
        elif name.split(".")[0] in outside:
            found[name] = "a head on top of the base model"
    return found


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits of a language model, or None."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def routers(model: nn.Module) -> set[str]:
    """Names of the linear layers whose outputs select or weigh experts.

    A router stands in a module that also holds experts, outside of them, and has an output for each expert; a gate with a
    single output weighs an expert that all tokens share. Of a router of several layers, all are found.
    """
    found = set()
    modules = dict(model.named_modules())
    for parent_name, experts_name, count in _expert_groups(model, modules):
        prefix = f"{parent_name}." if parent_name else ""
        for name, child in modules[parent_name].named_children():
            full = prefix + name
            if full == experts_name:
                continue
            if not _is_linear(child):
                found |= {f"{full}.{n}" for n in _router_layers(child, count) if "expert" not in name}
            elif _outputs(child) in count or _outputs(child) == 1 or name in _GATES:
                found.add(full)
    return found


def selectors(model: nn.Module) -> set[str]:
    """Names of the linear layers in modules that return indices alone, such as the indexers of sparse attention.

    No gradient passes through an index, so an adapter there would never learn.
    """
    found = set()
    for name, module in model.named_modules():
        if name and returns_indices(type(module)):
            found |= {f"{name}.{n}" for n, m in module.named_modules() if _is_linear(m)}
    return found


def _router_layers(module: nn.Module, count: set[int]) -> list[str]:
    """The linear layers of a module next to experts: all where it is a router, those that are routers in it, or none."""
    layers = [
        n for n, m in module.named_modules() if _is_linear(m) and not any("expert" in k for k in n.split(".")[:-1])
    ]
    if not layers:
        return []
    last = _outputs(module.get_submodule(layers[-1]))
    if last in count or (
        last - 1 in count and selects(type(module))
    ):  # one more output: of tokens that skip the experts
        return layers
    siblings = Counter(n.rpartition(".")[0] for n in layers)
    alone = [n for n in layers if siblings[n.rpartition(".")[0]] == 1]
    return [n for n in alone if _outputs(module.get_submodule(n)) in count]


def _outputs(layer: nn.Module) -> int:
    return int(layer.nf if is_conv1d(layer) else layer.out_features)  # type: ignore[arg-type]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _base_prefix(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "") or ""
    return prefix if isinstance(prefix, str) and prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _generates(model: nn.Module) -> bool:
    """Whether the outputs are tokens or media, whose heads `get_output_embeddings` names."""
    return bool(getattr(model, "can_generate", lambda: False)()) or output_embeddings(model) is not None


def _outside_of_bases(model: nn.Module) -> set[str]:
    """Names of the children of a model that come after its base models; of a base model itself, none."""
    if not re.search(r"For[A-Z]", type(model).__name__) or not hasattr(model, "config"):
        return set()
    children = list(model.named_children())
    bases = [
        i for i, (_, child) in enumerate(children) if hasattr(child, "config") and hasattr(child, "save_pretrained")
    ]
    large = [i for i, (_, child) in enumerate(children) if _blocks(child)]
    last = max(bases or large or [len(children)])
    return {name for name, _ in children[last + 1 :]}


def _blocks(module: nn.Module) -> bool:
    """Whether a module holds a stack of layers."""
    return any(isinstance(m, nn.ModuleList) and len(m) > 0 for m in module.modules())


def _expert_groups(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, set[int]]]:
    """Modules that hold experts: the name of the holder, of the experts, and how many there may be."""
    told = _numbers_in_config(model)
    for name, module in modules.items():
        last = name.rpartition(".")[2]
        kind = type(module).__name__.lower()
        if "expert" not in last.lower() and "expert" not in kind:
            continue
        counts = {p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3}
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
            counts.add(max(Counter(type(child) for child in module.children()).values()))
        if counts or "experts" in last.lower():
            yield name.rpartition(".")[0], name, counts or told


def _numbers_in_config(model: nn.Module) -> set[int]:
    """Numbers of experts that the config names."""
    config = getattr(model, "config", None)
    found = set()
    for part in [config, *getattr(config, "__dict__", {}).values()]:
        for key, value in getattr(part, "__dict__", {}).items():
            if re.search(r"(num|n)_\w*experts$|num_experts$", key) and type(value) is int and value > 1:
                found.add(value)
    return found


def recomputes_activations(model: nn.Module) -> bool:
    """Return whether gradient checkpointing is on in any part of `model`.

    It reads the modules' flags: transformers renamed the property for them, and the old name goes in its version 6.
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

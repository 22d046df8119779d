"""Names and weights of layers without the names of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from qft.core.packed import PackedLinear

if TYPE_CHECKING:
    pass


METHOD = "qft"


HELD = "qft_layer"
"""The name of a quantized layer inside what shows it to PEFT as a plain linear, `qft.lora.view.LinearView`."""


def bare_state_dict(base: nn.Module, stored: bool = False) -> dict[str, torch.Tensor]:
    """Collect a base model's tensors by the names that they have without adapters.

    Args:
        base: the model under PEFT's wrapper, with or without adapters.
        stored: name the packed tensors as the backend's own format does.
    """
    owners = _bare_prefixes(base)
    state = {}
    for key, value in base.state_dict().items():
        prefix = key.rpartition(".")[0]
        while prefix not in owners:  # a tensor's name may hold dots, such as bitsandbytes' "weight.absmax"
            prefix = prefix.rpartition(".")[0]
        bare = owners[prefix]
        if bare is not None:
            last = key.removeprefix(f"{prefix}.") if prefix else key
            state[f"{bare}.{last}" if bare else last] = value
    _undo_rescaling(base, state)
    if stored:
        for name, module in bare_layers(base):
            names = module.quantizer.stored_names if isinstance(module, PackedLinear) else {}
            for ours, theirs in names.items():
                state[f"{name}.{theirs}"] = state.pop(f"{name}.{ours}")
    return state


def _undo_rescaling(base: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give the tensors of RWKV as they are in training.

    Its model divides weights in place in evaluation, and a model that is loaded would divide them again. The factors are
    powers of two, so nothing is lost.
    """
    for name, module in bare_layers(base):
        every = getattr(getattr(module, "config", None), "rescale_every", 0)
        if not hasattr(module, "_rescale_layers") or not getattr(module, "layers_are_rescaled", False) or not every:
            continue
        for i in range(len(module.blocks)):  # type: ignore[arg-type]
            for layer in ("attention.output", "feed_forward.value"):
                key = ".".join(filter(None, (name, "blocks", str(i), layer, "weight")))
                if key in state and i // every:
                    state[key] = state[key] * 2 ** (i // every)


def _bare_prefixes(base: nn.Module) -> dict[str, str | None]:
    """Name of each module → the name that it has without adapters, or None where it belongs to an adapter."""
    found: dict[str, str | None] = {}

    def walk(module: nn.Module, name: str, bare: str | None) -> None:
        inner = _wrapped_child(module)
        found[name] = bare if inner is None else None
        for key, child in module._modules.items():
            if child is None:
                continue
            if inner is None:
                below = None if bare is None else f"{bare}.{key}" if bare else key
            else:
                below = bare if key == inner else None
            walk(child, f"{name}.{key}" if name else key, below)

    walk(base, "", "")
    return found


def _wrapped_child(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module of the base model; None for modules that wrap nothing."""
    if HELD in module._modules:
        return HELD
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "token_adapter" if "token_adapter" in module._modules else "original_module"
    if isinstance(module, BaseTunerLayer) and "base_layer" in module._modules:
        return "base_layer"
    return None


def bare_name(name: str) -> str:
    """A layer's name without what adapters put around it."""
    return name.replace(".base_layer", "").replace(f".{HELD}", "").removeprefix("base_layer.")


def bare_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers by the names that they have, or had, without adapters."""
    for name, module in model.named_modules():
        yield bare_name(name), module


def place(name: str) -> tuple[int | None, str]:
    """The number of the block that a layer is in, and which of the block's layers it is.

    `model.layers.3.mlp.experts.5.up_proj` is `(3, "mlp.experts.*.up_proj")`; outside of blocks there is no number.
    """
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdecimal()), None)
    if at is None:
        return None, name
    rest = [p if i == len(parts) - at - 2 or not p.isdecimal() else "*" for i, p in enumerate(parts[at + 1 :])]
    return int(parts[at]), ".".join(rest) or ".".join(parts[:at])

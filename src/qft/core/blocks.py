"""Find the repeated blocks of a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_blocks(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The repeated blocks: entries of the outermost `ModuleList`s whose members hold linears, with the list's owner.

    Returns:
        [(owner, blocks)], owners in the model's order. Lists whose entries are of more than two classes, or a single
        linear each, are no blocks.
    """
    found: list[tuple[nn.Module, list[nn.Module]]] = []
    inside: set[int] = set()
    for owner in model.modules():
        if id(owner) in inside:
            continue
        for child in owner.children():
            if not isinstance(child, nn.ModuleList) or id(child) in inside:
                continue
            blocks = [b for b in child if _is_block(b)]
            if blocks and len(blocks) == len(child) and len({type(b) for b in blocks}) <= 2:
                found.append((owner, blocks))
            if blocks:
                inside.update(id(m) for m in child.modules())
    return found


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return False
    leaves = [m for m in module.modules() if not list(m.children()) and (m._parameters or m._buffers)]
    return len(leaves) >= 2


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """What makes two blocks one kind: the names, classes and parameters of their modules."""

    def parameters(module: nn.Module) -> Any:
        for name, p in module._parameters.items():
            if p is not None:
                yield name, tuple(p.shape), p.dtype, p.requires_grad

    return tuple((n, type(m).__qualname__, *parameters(m)) for n, m in block.named_modules())

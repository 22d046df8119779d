"""bitsandbytes' optimizers wait for the device after each parameter; for an optimized model they wait once a step.

Their kernels follow each other on one stream, so that nothing needs the waiting in between; over the hundreds of small
weights of an adapter it left an H100 without work for a tenth of a step.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_MODULE = "bitsandbytes.optim.optimizer"
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooks: list[Any] = []
_stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_own: Any = None
"""bitsandbytes' function, while a step runs without it."""


def wait_once(model: nn.Module) -> None:
    """From now on, a step of bitsandbytes' optimizers over weights of `model` waits for the device once."""
    _models.add(model)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _before(optimizer)))
        _hooks.append(register_optimizer_step_post_hook(lambda optimizer, *_: _after(optimizer)))


def wait_as_before(model: nn.Module) -> None:
    _models.discard(model)
    if not _models:
        while _hooks:
            _hooks.pop().remove()
        _restore()


def _before(optimizer: torch.optim.Optimizer) -> None:
    global _own
    _restore()  # a step that raised did not get to it
    module: Any = sys.modules.get(_MODULE)
    if module is None or not isinstance(optimizer, module.Optimizer8bit):
        return
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if any(first is p for model in _models for p in model.parameters() if p.requires_grad):
        _own, module.sync_gpu = module.sync_gpu, _nothing


def has_states(weight: nn.Parameter) -> bool:
    """Whether an optimizer that has made a step since `wait_once` keeps something for this weight."""
    return any(optimizer.state.get(weight) for optimizer in _stepped)


def _after(optimizer: torch.optim.Optimizer) -> None:
    _stepped.add(optimizer)
    if _own is not None:
        wait = _own
        _restore()
        wait(next(p for group in optimizer.param_groups for p in group["params"]))


def _restore() -> None:
    global _own
    if _own is not None:
        sys.modules[_MODULE].sync_gpu = _own  # type: ignore[attr-defined]
        _own = None


def _nothing(tensor: torch.Tensor) -> None:
    pass

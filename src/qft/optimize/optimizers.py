"""bitsandbytes' optimizers wait for the device at each parameter; for an optimized model they do not.

Their kernels follow each other, and the next step, on one stream. Over the hundreds of small weights of an adapter the
waiting left an H100 without work for a tenth of a step, and one wait a step for a thirtieth, as the host could not run
ahead. Only a host that reads paged states has to wait: `state_dict` does.

Paged states are asked back to the device before each update, and behind a queue of work that question waits for the device
as well. It is left out while the device has more memory free than all of them take. States that had to go earlier are
brought back by the update's own page faults then: slower once, and the same numbers.
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
_read: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers whose state dicts wait; they go on doing so, which costs nothing."""
_hooks: list[Any] = []
_stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_own: Any = None
"""bitsandbytes' function, while a step runs without it."""
_unasked: torch.optim.Optimizer | None = None
"""The optimizer whose paged states are not asked for in the step that runs."""


def wait_when_read(model: nn.Module) -> None:
    """From now on, a step of bitsandbytes' optimizers over weights of `model` does not wait for the device."""
    _models.add(model)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _before(optimizer)))
        _hooks.append(register_optimizer_step_post_hook(lambda optimizer, *_: _after(optimizer)))


def wait_as_before(model: nn.Module) -> None:
    """Take a model off the list for which optimizers skip waiting; without models, nothing is changed any more."""
    _models.discard(model)
    if not _models:
        while _hooks:
            _hooks.pop().remove()
        _restore()


def _before(optimizer: torch.optim.Optimizer) -> None:
    global _own, _unasked
    _restore()  # a step that raised did not get to it
    module: Any = sys.modules.get(_MODULE)
    if module is None or not isinstance(optimizer, module.Optimizer8bit):
        return
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if any(first is p for model in _models for p in model.parameters() if p.requires_grad):
        _own, module.sync_gpu = module.sync_gpu, _nothing
        if optimizer not in _read:
            _read.add(optimizer)
            optimizer.register_state_dict_pre_hook(_wait)
        if optimizer.is_paged and _has_room(optimizer, first.device):
            optimizer.prefetch_state, _unasked = _nothing, optimizer


def _wait(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    sys.modules[_MODULE].sync_gpu(next(p for group in optimizer.param_groups for p in group["params"]))  # type: ignore[attr-defined]


def _has_room(optimizer: Any, device: torch.device) -> bool:
    """Whether the device has more memory free than paged states take."""
    if device.type != "cuda":
        return False
    return torch.cuda.mem_get_info(device)[0] > sum(t.nbytes for t in optimizer.page_mng.paged_tensors)


def has_states(weight: nn.Parameter) -> bool:
    """Whether an optimizer that has made a step since `wait_when_read` keeps something for this weight."""
    return any(optimizer.state.get(weight) for optimizer in _stepped)


def _after(optimizer: torch.optim.Optimizer) -> None:
    _stepped.add(optimizer)
    _restore()


def _restore() -> None:
    global _own, _unasked
    if _own is not None:
        sys.modules[_MODULE].sync_gpu = _own  # type: ignore[attr-defined]
        _own = None
    if _unasked is not None:
        _unasked.__dict__.pop("prefetch_state", None)
        _unasked = None


def _nothing(tensor: torch.Tensor) -> None:
    pass

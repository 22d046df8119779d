"""Make a deep copy of a model independent: `copy.deepcopy` copies closures as they are, with what they refer to.

Trainers put closures on a model as its `forward`, and other code keeps hooks and cached methods on it. On the copy these
would still run the old model and keep its weights in memory.
"""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qft.errors import QftWarning

_DEPTH = 8
_KEPT = {"_parameters", "_buffers", "_modules"}
_KNOWN = ("trl.", "accelerate.", "transformers.", "peft.", "torch.", "qft.")


def detach_from(original: nn.Module, copied: nn.Module) -> None:
    """Remove from `copied` every instance attribute and hook that refers to `original`, so that its class's own code runs.

    Args:
        original: the model that was copied; it stays as it is.
        copied: its deep copy, changed in place.

    Warns:
        QftWarning: code of the caller was removed, such as a patched `forward`.
    """
    old = _Reach(original)
    removed: list[str] = []
    for prefix, module in copied.named_modules():
        # accelerate's mixed precision: `forward` casts, and `_original_forward` is what it stands for
        if "_original_forward" in module.__dict__:
            module.__dict__.pop("_original_forward")
            module.__dict__.pop("forward", None)
        for key, value in list(module.__dict__.items()):
            if key in _KEPT:
                continue
            if key.endswith("_hooks") and isinstance(value, dict):
                for handle in [h for h, hook in value.items() if old.holds(hook)]:
                    _note(removed, f"{prefix}.{key}", value.pop(handle))
            elif old.holds(value):
                del module.__dict__[key]
                _note(removed, f"{prefix}.{key}", value)
    if removed:
        names = ", ".join(name.strip(".") for name in removed[:3])
        warnings.warn(
            f"the copy runs the code of its classes: {names} referred to the old model and is not in it",
            QftWarning,
            stacklevel=5,
        )


def _note(removed: list[str], name: str, value: Any) -> None:
    """Note what a caller put there; trainers and libraries put theirs on again where they need it."""
    function = value
    while isinstance(function, functools.partial | types.MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    spaces = getattr(function, "__globals__", {})  # `__module__` is another's after functools.wraps
    module = spaces.get("__name__") or type(function).__module__
    if callable(function) and not str(module).startswith(_KNOWN):
        removed.append(name)


class _Reach:
    """Whether a value refers to a module or tensor of a model."""

    def __init__(self, model: nn.Module):
        self.modules = {id(m) for m in model.modules()}
        self.tensors = {id(t) for t in [*model.parameters(), *model.buffers()]}

    def holds(self, value: Any) -> bool:
        return self._look(value, set(), 0)

    def _look(self, value: Any, seen: set[int], depth: int) -> bool:
        if id(value) in seen or depth > _DEPTH:
            return False
        seen.add(id(value))
        if isinstance(value, nn.Module):
            return any(id(m) in self.modules for m in value.modules())
        if isinstance(value, Tensor):
            return id(value) in self.tensors
        return any(self._look(part, seen, depth + 1) for part in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    """What a value holds that `copy.deepcopy` may not have copied."""
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values(), getattr(value, "__wrapped__", None)]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *vars(value).values()]
    if isinstance(value, dict):
        return [*value.keys(), *value.values()] if len(value) < 10_000 else []
    if isinstance(value, list | tuple | set | frozenset):
        return list(value) if len(value) < 10_000 else []
    if callable(value) and not isinstance(value, type):
        return list(getattr(value, "__dict__", {}).values())
    return []


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True

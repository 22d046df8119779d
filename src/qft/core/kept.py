"""Replace a parameter for a while and put it back, to the bit, also where several modules share it.

A merge must not write into a shared tensor: the other modules would change with it. The merged module gets a parameter of
its own, and the shared one comes back on unmerge.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn


class KeptParameter:
    """The parameter that modules had before others took its place; `keep` makes one for each parameter.

    The values are kept in host memory. Modules that shared the parameter share it again after `restore`.
    """

    def __init__(self, parameter: nn.Parameter):
        self._shared: Any = weakref.ref(parameter)
        self.take(parameter)
        self._requires_grad = parameter.requires_grad
        self._restored: nn.Parameter | None = None

    def take(self, parameter: nn.Parameter) -> None:
        """Copy the values, which may have changed since another module that shares the parameter was merged."""
        self._value = parameter.detach().to("cpu", copy=True)

    def restore(self, current: Tensor) -> nn.Parameter:
        """The parameter as it was, on the device of `current`; the same object for each module that had it."""
        shared = self._shared()
        if shared is not None:  # another module has it still, such as a tied embedding
            return shared
        if self._restored is None:
            value = self._value.to(current.device, copy=True)
            self._restored = nn.Parameter(value, requires_grad=self._requires_grad)
        return self._restored

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptParameter:
        shared = self._shared()
        twin = object.__new__(KeptParameter)
        twin.__dict__.update(self.__dict__)
        twin._value = self._value.clone()
        twin._shared = _gone if shared is None else weakref.ref(copy.deepcopy(shared, memo))
        twin._restored = copy.deepcopy(self._restored, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shared": self._shared()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shared = _gone if state["_shared"] is None else weakref.ref(state["_shared"])


def _gone() -> None:
    """In place of a weak reference to a parameter that nothing holds."""


_LIVE: weakref.WeakValueDictionary[int, KeptParameter] = weakref.WeakValueDictionary()


def keep(parameter: nn.Parameter) -> KeptParameter:
    """What restores this parameter; the same object for every module that shares it."""
    known = _LIVE.get(id(parameter))
    if known is None or known._shared() is not parameter:  # the id may be that of another one, which is gone
        _LIVE[id(parameter)] = known = KeptParameter(parameter)
    else:
        known.take(parameter)
    return known


def give_own(module: nn.Module, name: str, value: Tensor | None = None) -> KeptParameter:
    """Put a parameter of its own in the place of `module`'s parameter, with these values (default: the same).

    Returns:
        The old parameter, for `give_back`.
    """
    old = module._parameters[name]
    assert old is not None
    kept = keep(old)
    new = old.detach().clone() if value is None else value.to(old)
    module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
    return kept


def give_back(module: nn.Module, name: str, kept: KeptParameter) -> None:
    """Undo `give_own`."""
    current = module._parameters[name]
    assert current is not None
    with torch.no_grad():
        module._parameters[name] = kept.restore(current)

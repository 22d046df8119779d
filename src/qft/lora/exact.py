"""PEFT's own layers over float modules, such as embeddings: merged without touching shared tensors, unmerged to the bit."""

from __future__ import annotations

from typing import Any

from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qft.core.kept import KeptParameter, give_back, give_own
from qft.core.modes import normal_mode
from qft.lora.merge_weight import Merging, check_merged
from qft.lora.view_merging import ViewMerging


class ExactMerging:
    """Merging of a PEFT layer over float parameters; mixed into the class of the layer by `merge_exactly`.

    PEFT adds to the base tensor in place and subtracts on unmerge. That changes every module that shares the tensor, and
    does not come back to the bit.
    """

    _qft_own: list[tuple[nn.Module, str, KeptParameter]] | None = None

    @normal_mode()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge by PEFT's own code into parameters that belong to this layer alone."""
        fresh = self._qft_own is None
        if fresh:
            self._qft_own = [(m, key, give_own(m, key)) for m, key in _merged_parameters(self)]
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            if fresh and not self.merged:
                self._give_back_own()

    @normal_mode()
    def unmerge(self) -> None:
        """Put the parameters of before the merge back; those that were shared are shared again."""
        if self.merged:
            super().unmerge()
        self._give_back_own()

    def _give_back_own(self) -> None:
        for module, key, kept in self._qft_own or ():
            give_back(module, key, kept)
        self._qft_own = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged and not self.disable_adapters:
            check_merged(self)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__mro__[2],), self.__dict__


def merge_exactly(model: nn.Module) -> None:
    """Give every PEFT layer over float modules the merging of `ExactMerging`, in place of PEFT's own."""
    for module in model.modules():
        own = isinstance(module, Merging | ViewMerging | ExactMerging | LNTuningLayer)  # LN tuning swaps modules
        if isinstance(module, BaseTunerLayer) and not own and hasattr(module, "base_layer"):
            module.__class__ = _with_exact_merging(type(module))


def _merged_parameters(layer: Any) -> list[tuple[nn.Module, str]]:
    """Parameters that a layer merges into. Wrappers of single parameters may stand around one module: each has its own."""
    base = layer.get_base_layer()
    return [(base, layer.parameter_name)] if isinstance(layer, ParamWrapper) else _float_parameters(base)


def _float_parameters(base: nn.Module) -> list[tuple[nn.Module, str]]:
    found = []
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):  # of a module within, such as attention's output projection
            continue
        found += [(module, key) for key, p in module._parameters.items() if p is not None and p.is_floating_point()]
    return found


_CLASSES: dict[type, type] = {}


def _with_exact_merging(cls: type) -> type:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (ExactMerging, cls), {"__module__": __name__, "__doc__": cls.__doc__})
    return _CLASSES[cls]


def _empty(cls: type) -> Any:
    """An instance without state, for `copy` and `pickle`."""
    made = _with_exact_merging(cls)
    return made.__new__(made)

"""Merge PEFT's methods other than LoRA into quantized weights, and take them out again to the bit.

The float weight comes from PEFT's own merge into a float linear of the dequantized weight; it is stored by the same
`requantize` as a LoRA update.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from qft.core.kept import KeptParameter, give_back, give_own, keep
from qft.core.modes import normal_mode
from qft.errors import NonFiniteWeights, UnsupportedOperation
from qft.lora.guard import brief
from qft.lora.merge_weight import WeightMerge, check_merged, compare_merge
from qft.lora.view import LinearView


def available(layer: BaseTunerLayer, names: list[str] | None = None) -> list[str]:
    """The adapters among `names` (default: the active ones) that this layer has."""
    known = layer._get_available_adapters()
    wanted = layer.active_adapters if names is None else names
    return [name for name in wanted if name in known]


class ViewMerging:
    """Merging for a PEFT layer whose base is a `LinearView`; mixed into the class of the layer by `allow_merging`.

    Attributes:
        last_merge: what the last merge did.
    """

    last_merge: WeightMerge | None = None
    _qft_kept: tuple[Any, KeptParameter | None] | None = None

    def check_merge(self, names: list[str]) -> None:
        """Raise what `merge` would raise, without changing anything.

        Raises:
            UnsupportedOperation: the quantizer cannot store floats, or PEFT has no merge for this adapter.
            NonFiniteWeights: the merged weight would hold NaN or infinity.
        """
        view = self.get_base_layer()
        if not view.quantizer.capabilities.merge_to_quantized:
            raise UnsupportedOperation(
                f"{view.quantizer!r} cannot take a merge (capability merge_to_quantized); qft.merge_to_float works"
            )
        if names and not self.merged:
            self._check_merged_bias(merged_by_peft(self, names)[2])

    @normal_mode()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the quantized weight; adapters merged earlier are merged again with the new ones.

        Args:
            safe_merge: unused; the result is always checked for NaN and infinity.
            adapter_names: default the active adapters.

        Raises:
            UnsupportedOperation, NonFiniteWeights: see `check_merge`. The weight is as it was.
        """
        names = available(self, check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        earlier = list(self.merged_adapters)
        try:
            self._merge_names(earlier + names)
        except BaseException:
            self.unmerge()
            if earlier:
                self._merge_names(earlier)
            raise

    def _merge_names(self, names: list[str]) -> None:
        self.unmerge()
        self.check_merge(())
        view = self.get_base_layer()
        quantizer, handle = view.quantizer, view.handle
        before, wanted, bias = merged_by_peft(self, names)
        self._check_merged_bias(bias)
        old = handle.bias
        self._qft_kept = (quantizer.snapshot(handle), None if old is None else keep(old))
        quantizer.requantize(handle, wanted)
        if old is not None and bias is not None:
            give_own(handle.module, "bias", bias)
        self.merged_adapters = list(names)
        after = quantizer.dequantize(handle, dtype=torch.float32)
        if not after.isfinite().all():
            raise NonFiniteWeights(
                f"merging {', '.join(names)} goes beyond what {quantizer!r} can store: nothing was merged"
            )
        self.last_merge = compare_merge(before, wanted, after)

    @normal_mode()
    def unmerge(self) -> None:
        """Put the quantized weight back, to the bit."""
        if self._qft_kept is not None:
            saved, bias = self._qft_kept
            view = self.get_base_layer()
            view.quantizer.restore(view.handle, saved)
            if bias is not None:
                give_back(view.handle.module, "bias", bias)
            self._qft_kept = None
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base layer, with the adapters merged into it where `merge` asks for it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def _check_merged_bias(self, bias: Tensor | None) -> None:
        if bias is not None and self.get_base_layer().bias is None:
            raise UnsupportedOperation(
                "this adapter adds a bias and the layer has none to merge it into: a merged model would have parameters "
                "that its config does not know"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged and not self.disable_adapters:
            check_merged(self)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__mro__[2],), self.__dict__


def allow_merging(layer: BaseTunerLayer) -> None:
    """Give a PEFT layer over a `LinearView` the merging of `ViewMerging`, in place of PEFT's own."""
    if not isinstance(layer, ViewMerging):
        layer.__class__ = _with_merging(type(layer))


_CLASSES: dict[type, type] = {}


def _with_merging(cls: type) -> type:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (ViewMerging, cls), {"__module__": __name__, "__doc__": cls.__doc__})
    return _CLASSES[cls]


def _empty(cls: type) -> Any:
    """An instance without state, for `copy` and `pickle`."""
    made = _with_merging(cls)
    return made.__new__(made)


def merged_by_peft(layer: Any, names: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge adapters by PEFT's own code into a float linear of the dequantized weight.

    Args:
        layer: a PEFT layer over a `LinearView`, unmerged; it stays as it is.
        names: the adapters, merged in this order.

    Returns:
        Ŵ and the merged weight, both (out_features, in_features) in float32, and the merged bias.

    Raises:
        UnsupportedOperation: PEFT has no merge for this adapter.
        NonFiniteWeights: the adapter holds NaN or infinity.
    """
    view = layer.get_base_layer()
    bias = view.bias
    before = view.dequantized(torch.float32)
    plain = nn.Linear(view.in_features, view.out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(before.clone(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=False)
    twin = copy.deepcopy(layer, {id(view): plain})
    twin._qft_kept = None
    twin.merged_adapters = []
    try:
        super(ViewMerging, twin).merge(safe_merge=True, adapter_names=names)
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        if "NaNs" in str(error):
            raise NonFiniteWeights(f"the adapter holds NaN or infinity: {brief(error)}; nothing was merged") from error
        raise UnsupportedOperation(f"PEFT cannot merge this adapter: {brief(error)}") from error
    merged = super(ViewMerging, twin).get_base_layer()
    wanted = merged.weight.data.float()
    extra = merged.bias
    if not wanted.isfinite().all() or (extra is not None and not extra.isfinite().all()):
        raise NonFiniteWeights("the adapter holds NaN or infinity: nothing was merged")
    return before, wanted, None if extra is None else extra.detach()


def is_over_view(module: nn.Module) -> bool:
    """Whether `module` is a PEFT layer over a `LinearView`."""
    return isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), LinearView)

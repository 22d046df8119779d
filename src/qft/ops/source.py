"""Number the layers whose dequantized weight compiled operators ask for."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qft.ops.kernels import Codebook


_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


_numbers = itertools.count()


class Source:
    """Ŵ of one layer, by its number. It belongs to its layer: a copy of the layer makes one of its own."""

    def __init__(self, layer: Sourced):
        number = next(_numbers)
        _layers[number] = layer
        self.number = torch.tensor(number, device="cpu")
        self.out_features: int = layer.out_features

    def __call__(self, dtype: torch.dtype) -> Tensor:
        return self.layer.dequantized(dtype)

    @property
    def layer(self) -> Sourced:
        return _layer(self.number)

    def __reduce__(self) -> Any:
        # whoever holds a source makes a new one when it is copied or unpickled; one that was forgotten cannot mislead
        return _orphan, ()


class Sourced(nn.Module):
    """A layer with a `Source` of its own, `_source`, made once `out_features` is known; its copies make theirs.

    Attributes:
        float8: while the layer trains, its base's products are those of `qft.ops.float8`.
    """

    out_features: int
    _source: Source
    float8: bool = False

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Ŵ as it stands now, (out_features, in_features) in `dtype`."""
        raise NotImplementedError

    def codebook(self) -> Codebook | None:
        """Ŵ's codes and constants themselves, where its format has a codebook."""
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._source = Source(self)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica._source = Source(replica)
        return replica


def _orphan() -> None:
    return None


def _layer(number: Tensor) -> Sourced:
    layer = _layers.get(int(number))
    if layer is None:
        raise RuntimeError("a compiled linear belongs to a layer that is no more: compile the model's code again")
    return layer

"""What a quantized model weighs and what that costs: bits, what stayed in 16 bit and why, errors, activations."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from qft.pipeline.audit.figures import WeightAudit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass
class Audit:
    """A model's weights; `str()` is a table, `summary()` a few lines, and a notebook shows a card.

    Attributes:
        weights: quantized layer → `WeightAudit`; of a layer with several weights, `layer.weight` → its.
        left: linear layer left in 16 bit → reason.
        experts: fused expert weights left in 16 bit → bytes.
        nbytes: of the whole model, adapters included.
        float_bytes: of the quantized weights before.
        merges: the merges that the backends allow.
    """

    weights: dict[str, WeightAudit] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    float_bytes: int = 0
    trainable: int = 0
    parameters: int = 0
    merges: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, constants included."""
        count = sum(prod(w.shape) for w in self.weights.values())
        return 8 * self.quantized_bytes / count if count else 0.0

    @property
    def quantized_bytes(self) -> int:
        """Bytes of codes and constants."""
        return sum(w.nbytes for w in self.weights.values())

    @property
    def warnings(self) -> dict[str, str]:
        """Layer → what is wrong with its activations; see `WeightAudit.warning`."""
        return {name: w.warning for name, w in self.weights.items() if w.warning}

    def summary(self) -> str:
        """A few lines."""
        from qft.pipeline.audit.views import summary

        return summary(self)

    def __str__(self) -> str:
        from qft.pipeline.audit.views import table

        return "\n".join([self.summary(), *table(self)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinity and NaN, which JSON lacks, are the strings "inf" and "nan"."""
        from qft.pipeline.audit.views import as_dict

        return as_dict(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as text, written to `path` too where it is given.

        Raises:
            BadFolder: the file cannot be written.
        """
        from qft.pipeline.audit.views import to_json

        return to_json(self, path)

    def to_dataframe(self) -> DataFrame:
        """A row a weight: its layer's name as the index, `block` (number) and `kind` of the layer, all figures.

        Raises:
            MissingDependency: pandas is not installed.
        """
        from qft.pipeline.audit.views import to_dataframe

        return to_dataframe(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A matplotlib figure of errors, bits and activations by depth, a line for each kind of layer.

        Args:
            path: save it there too, in the format of the file's ending.

        Raises:
            MissingDependency: matplotlib is not installed.
            BadOption: a format that matplotlib does not write. BadFolder: the file cannot be written.
        """
        from qft.pipeline.audit.plot import plot

        return plot(self, path)

    def _repr_html_(self) -> str:
        from qft.pipeline.audit.views import card

        return card(self)

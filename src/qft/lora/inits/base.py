"""The interface of an init."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qft.data.statistics import Statistics, StatisticsKind
from qft.errors import BadOption


class AdapterInit(ABC):
    """A start for the adapters. A subclass is a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    needs: ClassVar[StatisticsKind | None] = None
    """Activation statistics that it reads: None, "diagonal" (E[x²]) or "full" (E[x xᵀ] too)."""

    @abstractmethod
    def __call__(
        self,
        weight: Tensor,
        quantized: Tensor,
        rank: int,
        scaling: float,
        *,
        statistics: Statistics | None = None,
        roundtrip: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The start for one weight.

        Args:
            weight: W, the float weight, float32, (out_features, in_features).
            quantized: Ŵ = dq(q(W)), float32, the same shape.
            rank: r of this layer.
            scaling: s, by which the adapter's product is multiplied: alpha / r, or alpha / √r.
            statistics: of the layer's inputs, where the init asks for them; None for a layer that read nothing.
            roundtrip: X ↦ dq(q(X)) with this layer's quantizer; given where the backend can requantize.

        Returns:
            A (r, in_features), B (out_features, r), and the float weight to quantize in the place of W, or None to
            leave Ŵ as it is.
        """

    def error(self, difference: Tensor, statistics: Statistics | None) -> float:
        """The size of W − Ŵ − sBA that this init makes small: here the Frobenius norm.

        A layer whose start does not lower it keeps PEFT's own start.
        """
        return float(difference.norm())

    @property
    def changes_base(self) -> bool:
        """Whether it may replace Ŵ; `qft.save` then stores the base too."""
        return False


@dataclass(frozen=True)
class FromFunction(AdapterInit):
    """An init from a function `(weight, quantized, rank, scaling, *, statistics) → (A, B)`.

    Statistics are gathered where the function has an attribute `needs`, "diagonal" or "full".
    """

    name: ClassVar[str] = "function"

    function: Callable[..., tuple[Tensor, Tensor]]

    @property
    def needs(self) -> StatisticsKind | None:  # type: ignore[override]
        return getattr(self.function, "needs", None)

    def __call__(
        self,
        weight: Tensor,
        quantized: Tensor,
        rank: int,
        scaling: float,
        *,
        statistics: Any = None,
        roundtrip: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        made = self.function(weight, quantized, rank, scaling, statistics=statistics)
        if not isinstance(made, tuple | list) or len(made) != 2 or not all(isinstance(t, Tensor) for t in made):
            raise BadOption(
                f"{self!r} is to return the tensors (A, B); an init that changes Ŵ subclasses qft.AdapterInit"
            )
        return *made, None

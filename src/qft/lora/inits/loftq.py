"""LoftQ: start from the best low-rank fit of the quantization error (arXiv 2310.08659, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qft.errors import BadOption
from qft.lora.inits.base import AdapterInit
from qft.lora.inits.lowrank import fit, low_rank


@dataclass(frozen=True)
class LoftQ(AdapterInit):
    """LoftQ for any quantizer, any rank and any alpha.

    Args:
        steps: 1 fits the error of q(W) and leaves Ŵ as it is. More alternate: Ŵ = dq(q(W − L)), L = SVD_r(W − Ŵ),
            and keep the best iterate in ‖W − Ŵ − L‖; that changes Ŵ, so that `qft.save` stores the base too.
        bits: for the record of a PEFT `loftq_config`; one that is not the quantizer's is a `BadOption`.
    """

    name: ClassVar[str] = "loftq"

    steps: int = 1
    bits: int | None = None

    def __post_init__(self):
        if not isinstance(self.steps, int) or self.steps < 1:
            raise BadOption(f"LoftQ: steps={self.steps!r}; it is 1 or more")

    @property
    def changes_base(self) -> bool:
        return self.steps > 1

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
        a, b = fit(weight - quantized, rank, scaling)
        if self.steps == 1:
            return a, b, None
        best, base = (a, b), None
        best_error = float((weight - quantized - low_rank(b, a, scaling)).norm())
        for _ in range(self.steps - 1):
            source = weight - low_rank(b, a, scaling)
            quantized = roundtrip(source)
            a, b = fit(weight - quantized, rank, scaling)
            error = float((weight - quantized - low_rank(b, a, scaling)).norm())
            if error < best_error:
                best, best_error, base = (a, b), error, source
        return *best, base

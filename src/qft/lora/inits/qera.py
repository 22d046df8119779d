"""QERA: the low-rank fit of the quantization error that changes the layer's output least (arXiv 2410.06040)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qft.data.statistics import Statistics, StatisticsKind
from qft.errors import BadOption
from qft.lora.inits.base import AdapterInit
from qft.lora.inits.lowrank import fit


@dataclass(frozen=True)
class QERA(AdapterInit):
    """Fit W − Ŵ weighted by the root mean square of each input feature; needs calibration data (theorem 4, diagonal).

    With d = √E[x²]: sBA = SVD_r((W − Ŵ) diag d) diag(d)⁻¹, the least E‖(W − Ŵ − sBA) x‖² where the features of x are
    uncorrelated. Ŵ is left as it is. A layer that read no calibration tokens starts as with LoftQ.
    """

    name: ClassVar[str] = "qera"
    needs: ClassVar[StatisticsKind | None] = "diagonal"

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
        if statistics is None:
            return *fit(weight - quantized, rank, scaling), None
        d = root_mean_square(statistics).to(weight.device)
        a, b = fit((weight - quantized) * d, rank, scaling)
        return a / d, b, None

    def error(self, difference: Tensor, statistics: Statistics | None) -> float:
        if statistics is None:
            return super().error(difference, None)
        return float((difference * root_mean_square(statistics).to(difference.device)).norm())


@dataclass(frozen=True)
class QERAFull(AdapterInit):
    """Fit W − Ŵ weighted by the second moment of the inputs; needs calibration data (theorem 3, full).

    With H = E[x xᵀ] + λI = C Cᵀ (Cholesky): sBA = SVD_r((W − Ŵ) C) C⁻¹, the least E‖(W − Ŵ − sBA) x‖² for any x. Ŵ is
    left as it is. A layer that read no calibration tokens starts as with LoftQ.

    Args:
        damping: λ as a share of the mean of H's diagonal, for directions that no token showed.
    """

    name: ClassVar[str] = "qera-full"
    needs: ClassVar[StatisticsKind | None] = "full"

    damping: float = 0.01

    def __post_init__(self):
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0 < self.damping < 1e6:
            raise BadOption(f"QERAFull: damping={self.damping!r}; it is a positive number, such as 0.01")

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
        if statistics is None:
            return *fit(weight - quantized, rank, scaling), None
        c = _cholesky(statistics, self.damping, weight.device)
        a, b = fit((weight - quantized) @ c, rank, scaling)
        return torch.linalg.solve_triangular(c, a, upper=False, left=False), b, None

    def error(self, difference: Tensor, statistics: Statistics | None) -> float:
        if statistics is None:
            return super().error(difference, None)
        h = damped(statistics, self.damping).to(difference.device)
        return float(((difference @ h) * difference).sum().clamp(min=0).sqrt())


@dataclass(frozen=True)
class Auto(AdapterInit):
    """The best start that the inputs allow among those that leave Ŵ = q(W).

    With calibration data `qera-full` where a layer read at least `tokens_per_feature` tokens for each of its inputs,
    else `qera`; without data `loftq`, in one step; without the float weights PEFT's own start.
    """

    name: ClassVar[str] = "auto"
    needs: ClassVar[StatisticsKind | None] = "full"

    tokens_per_feature: float = 4.0

    def chosen(self, statistics: Statistics | None) -> AdapterInit:
        """What a layer with these statistics starts with."""
        if statistics is None:
            return QERA()
        enough = statistics.tokens >= self.tokens_per_feature * statistics.mean_square.numel()
        return QERAFull() if enough and statistics.second_moment is not None else QERA()

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
        return self.chosen(statistics)(weight, quantized, rank, scaling, statistics=statistics)

    def error(self, difference: Tensor, statistics: Statistics | None) -> float:
        return self.chosen(statistics).error(difference, statistics)


def root_mean_square(statistics: Statistics) -> Tensor:
    """√E[x²] (in_features,), features that are silent in the data taken as a thousandth of the loudest."""
    d = statistics.mean_square.sqrt()
    return d.clamp(min=1e-3 * float(d.max()) or 1.0)


def damped(statistics: Statistics, damping: float) -> Tensor:
    """E[x xᵀ] + λI, λ = damping · the mean of its diagonal."""
    h = statistics.second_moment.clone()
    diagonal = h.diagonal()
    diagonal += damping * float(diagonal.mean()) or 1.0
    return h


def _cholesky(statistics: Statistics, damping: float, device: torch.device) -> Tensor:
    """C with C Cᵀ = E[x xᵀ] + λI; λ grows tenfold until float32 can factor it."""
    while True:
        c, failed = torch.linalg.cholesky_ex(damped(statistics, damping).to(device))
        if not failed:
            return c
        damping *= 10

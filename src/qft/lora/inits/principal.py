"""PiSSA and OLoRA over a quantized base: the adapter takes a part of W, and the rest is what gets quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qft.lora.inits.base import AdapterInit
from qft.lora.inits.lowrank import fit, low_rank


@dataclass(frozen=True)
class PiSSA(AdapterInit):
    """The adapter starts as W's principal part, and q(W − sBA) becomes the base (QPiSSA, arXiv 2404.02948, section 4).

    It changes Ŵ, so that `qft.save` stores the base too, and needs a backend that can requantize.
    """

    name: ClassVar[str] = "pissa"

    @property
    def changes_base(self) -> bool:
        return True

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
        a, b = fit(weight, rank, scaling)
        return a, b, weight - low_rank(b, a, scaling)


@dataclass(frozen=True)
class OLoRA(AdapterInit):
    """The adapter starts as the first rows and columns of W = QR, and q(W − sBA) becomes the base (arXiv 2406.01775).

    B is orthonormal, A the rows of R, as in PEFT. It changes Ŵ, as PiSSA does.
    """

    name: ClassVar[str] = "olora"

    @property
    def changes_base(self) -> bool:
        return True

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
        q, r = torch.linalg.qr(weight)
        a, b = r[:rank].contiguous(), q[:, :rank].contiguous()
        return a, b, weight - low_rank(b, a, scaling)

"""The figures of one audited weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class WeightAudit:
    """One quantized weight. What was not asked for, or cannot be said, is None.

    W is the original weight, Ŵ the stored one, Δ what the active adapters add, H = E[x xᵀ] over the tokens that the
    layer of the audited model reads.

    Attributes:
        quantizer: its `repr`.
        shape: `(out_features, in_features)`, or `(experts, out_features, in_features)`.
        nbytes: codes and constants as they lie in memory.
        error: ‖W − Ŵ‖ / ‖W‖, merged adapters being part of Ŵ.
        adapted_error: the same of W − (Ŵ + Δ), where LoRA adapters are active and not merged.
        output_error: √(tr(E H Eᵀ) / tr(W H Wᵀ)) with E = W − Ŵ: the relative error of x Ŵᵀ, biases left out.
        adapted_output_error: the same with E = W − (Ŵ + Δ); below `output_error` where the adapters win back what
            quantizing lost.
        tokens: how many the layer read.
        input_max, output_max: the largest absolute values that went in and came out of the layer, adapters included.
        left_out: tokens that arrived with NaN or infinity and are not in the figures.
    """

    quantizer: str
    shape: tuple[int, ...]
    nbytes: int
    error: float | None = None
    adapted_error: float | None = None
    output_error: float | None = None
    adapted_output_error: float | None = None
    tokens: int | None = None
    input_max: float | None = None
    output_max: float | None = None
    left_out: int | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / prod(self.shape)

    @property
    def warning(self) -> str | None:
        """Says where the activations go beyond half of float16's largest number, 65504."""
        found = []
        for name, value in (("input", self.input_max), ("output", self.output_max)):
            if value is not None and not value < FLOAT16_MAX / 2:  # NaN too
                beyond = "" if value > FLOAT16_MAX or value != value else ", within a factor of 2"
                found.append(f"{name} up to {value:.3g}{beyond}")
        if self.left_out:
            found.append(f"NaN or infinity in {self.left_out} tokens")
        return "float16 overflow: " + "; ".join(found) if found else None

"""What is known of the original float weights of a model."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from qft.core import record as marks
from qft.core.unquantized import Unquantized
from qft.errors import AdapterMismatch, QftWarning
from qft.lora.weights import linear_weights


class Origin:
    """What is known of the float weights that a quantized model came from."""

    def __init__(self, model: nn.Module):
        record = marks.record_of(model)
        self.known: dict[str, tuple[tuple[int, ...], list[float] | None]] = {}
        self.compared: set[str] = set()
        for name, (quantizer, handle) in linear_weights(model).items():
            entry = record.fingerprint.get(name)
            if entry is None and isinstance(quantizer, Unquantized):
                entry = marks.of_weight(quantizer.dequantize(handle))
            self.known[name] = entry or (handle.shape, None)
        if not record.fingerprint:
            warnings.warn(
                "whether the float weights are those that the source was quantized from cannot be checked: it has no "
                "fingerprint of them",
                QftWarning,
                stacklevel=5,
            )

    def compare(self, name: str, weight: Tensor) -> None:
        """Raise `AdapterMismatch` where this float weight is another than the model came from."""
        if name not in self.known or name in self.compared:  # unknown: trained whole, so that its base does not matter
            return
        shape, values = self.known[name]
        same = tuple(shape) == tuple(weight.shape)
        if same and values is not None and not weight.is_meta:
            same = not marks.same_origin({name: (shape, values)}, {name: marks.of_weight(weight)})
            self.compared.add(name)
        if not same:
            raise AdapterMismatch(
                f"the source was made from other float weights than these: {name} differs; give the float model that its "
                "base was quantized from"
            )

    def compare_all(self, model: nn.Module) -> None:
        """`compare` every weight of `model` that is float, and find those of all layers."""
        found = linear_weights(model)
        missing = [n for n in self.known if n not in found]
        if missing:
            raise AdapterMismatch(
                f"the float weights are those of another model: it has no linear layer {missing[0]}, which the source has"
            )
        for name, (quantizer, handle) in found.items():
            if isinstance(quantizer, Unquantized):
                self.compare(name, quantizer.dequantize(handle))

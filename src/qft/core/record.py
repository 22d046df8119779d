"""What qft notes on a model: which layers it quantized and how, what it left, and where the weights came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.quantizer import Quantizer
from qft.errors import BadOption, PartlyQuantized

SAMPLES = 64
TOLERANCE = 1e-2


@dataclass
class Record:
    """qft's note on a model, kept as `model._qft`.

    Attributes:
        quantizers: layer name, or that of a fused expert weight → quantizer.
        left: linear layers left in 16 bit → reason.
        experts: fused expert weights left in 16 bit → bytes.
        fingerprint: layer name → (shape, sample of the float weight), see `sample`.
        float_bytes: bytes of the target weights before.
        base_changed: the quantized base is not q(W), so that `save` must store it (iterated LoftQ, a merge).
        merged: adapters are merged into the base for good, so that it is no longer the quantized original.
        forward: "dequantize" or "native".
        init: what the adapters started from, for the record.
        partly: why the model is a mixture, after an interrupted run.
    """

    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    fingerprint: dict[str, tuple[tuple[int, ...], list[float]]] = field(default_factory=dict)
    float_bytes: int = 0
    base_changed: bool = False
    merged: bool = False
    forward: str = "dequantize"
    init: str | None = None
    partly: str | None = None


def base_model(model: nn.Module) -> nn.Module:
    """The model itself under PEFT's, data-parallel's and compile's wrappers."""
    if not isinstance(model, nn.Module):
        raise BadOption(f"give a torch module, not a {type(model).__name__}")
    while True:
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def record_of(model: nn.Module) -> Record | None:
    """Return the record that qft keeps on a model, or None.

    Raises:
        PartlyQuantized: an earlier run was interrupted halfway.
    """
    record = base_model(model).__dict__.get("_qft")
    if record is not None and record.partly:
        raise PartlyQuantized(
            f"this model is partly quantized: {record.partly}; load the float model anew and quantize that"
        )
    return record


@lru_cache
def _sample_index(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    n = prod(shape)
    index = (torch.arange(SAMPLES) * n + n // 2) // SAMPLES
    return tuple(i.to(device) for i in torch.unravel_index(index, shape))


def sample(weight: Tensor) -> Tensor:
    """A fixed sample of 64 entries of a weight, float32, evenly spread over its flattened (..., out, in) form."""
    return weight[_sample_index(tuple(weight.shape), weight.device)].float()


def of_weight(weight: Tensor) -> tuple[tuple[int, ...], list[float]]:
    """One weight's entry in `Record.fingerprint`."""
    return tuple(weight.shape), sample(weight).tolist()


def fingerprint(shapes: dict[str, tuple[int, ...]], samples: dict[str, Tensor]) -> dict[str, Any]:
    """Shapes and samples by layer name, as `Record.fingerprint` keeps them; one transfer from the device."""
    if not samples:
        return {}
    values = torch.stack([s.to(next(iter(samples.values())).device) for s in samples.values()]).tolist()
    return {name: (shapes[name], v) for name, v in zip(samples, values, strict=True)}


def same_origin(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names whose fingerprints differ between two models, the missing ones included; empty where they agree."""
    differ = sorted(set(a) ^ set(b))
    for name in sorted(set(a) & set(b)):
        (shape_a, values_a), (shape_b, values_b) = a[name], b[name]
        x, y = torch.tensor(values_a), torch.tensor(values_b)
        if tuple(shape_a) != tuple(shape_b) or (x - y).norm() > TOLERANCE * y.norm().clamp(min=1e-30):
            differ.append(name)
    return differ

"""What a quantized model weighs: bits per weight, what stayed in 16 bit and why, error per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from qft import hf, marks
from qft.errors import BadOption
from qft.registry import quantizer_of

GIB = 1024**3


@dataclass(frozen=True)
class WeightAudit:
    """One quantized weight.

    Attributes:
        quantizer: its `repr`.
        shape: `(out_features, in_features)`.
        nbytes: codes and constants as they lie in memory.
        error: ‖W − Ŵ‖ / ‖W‖ where the original was given, else None.
    """

    quantizer: str
    shape: tuple[int, ...]
    nbytes: int
    error: float | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / prod(self.shape)


@dataclass
class Audit:
    """A model's weights; `str()` is a table, `summary()` a few lines.

    Attributes:
        weights: quantized layer → `WeightAudit`.
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

    def summary(self) -> str:
        kinds: dict[str, int] = {}
        for w in self.weights.values():
            kinds[w.quantizer] = kinds.get(w.quantizer, 0) + 1
        lines = [f"qft: {n} layers in {kind}" for kind, n in kinds.items()]
        before = f", {_size(self.float_bytes)} before" if self.float_bytes else ""
        lines.append(
            f"  {self.bits_per_weight:.2f} bits a weight, {_size(self.quantized_bytes)}{before}; "
            f"{_size(self.nbytes)} the whole model"
        )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  left as it is: {some} ({reason})")
        if self.experts:
            total = sum(self.experts.values())
            lines.append(
                f"  ATTENTION: {len(self.experts)} fused expert weights stay in 16 bit, {_size(total)} "
                f"({next(iter(self.experts))}, ...): no backend of this version quantizes them"
            )
        if self.trainable:
            lines.append(f"  trainable: {self.trainable:,} of {self.parameters:,} parameters")
        lines.append(f"  merges: {', '.join(self.merges) or 'none'}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "quantized_bytes": self.quantized_bytes,
            "float_bytes": self.float_bytes,
            "nbytes": self.nbytes,
            "left": self.left,
            "experts": self.experts,
            "weights": {
                n: {**vars(w), "shape": list(w.shape), "bits_per_weight": w.bits_per_weight}
                for n, w in self.weights.items()
            },
        }

    def __str__(self) -> str:
        rows = []
        for name, w in self.weights.items():
            error = "" if w.error is None else f"  error {w.error:.4f}"
            shape = " × ".join(map(str, w.shape))
            rows.append(f"  {name:<48} {shape:>14}  {w.bits_per_weight:5.2f} bits{error}")
        return "\n".join([self.summary(), *rows])


@torch.no_grad()
def audit(model: nn.Module, *, original: Any = None) -> Audit:
    """Weigh a quantized model.

    Args:
        model: quantized, wrapped or not.
        original: the float model, or its folder: adds each weight's relative error.

    Raises:
        BadOption: a float model.
        AdapterMismatch: `original` is another model.
    """
    from qft.originals import Originals

    record = hf.adopt(model)
    if record is None:
        raise BadOption("this model is not quantized: there is nothing to audit")
    originals = Originals.of(original, record) if original is not None else None
    base = marks.base_model(model)
    result = Audit(left=dict(record.left), experts=dict(record.experts), float_bytes=record.float_bytes)
    merges: set[str] = {"to float", "into the quantized weights"}
    for full_name, module in base.named_modules():
        quantizer = quantizer_of(module)
        if quantizer is None or hasattr(module, "base_layer"):
            continue
        name = full_name.removesuffix(".base_layer")
        for handle in quantizer.weights(module):
            error = None
            if originals is not None:
                w = originals(name).float()
                w_hat = quantizer.dequantize(handle, dtype=torch.float32).to(w.device)
                error = float((w - w_hat).norm() / w.norm().clamp(min=1e-30))
            result.weights[name] = WeightAudit(repr(quantizer), handle.shape, layer_bytes(module), error)
        caps = quantizer.capabilities
        if not caps.merge_to_float:
            merges.discard("to float")
        if not caps.merge_to_quantized:
            merges.discard("into the quantized weights")
    result.merges = tuple(sorted(merges, reverse=True))
    result.nbytes = model_bytes(model)
    result.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result.parameters = sum(prod(w.shape) for w in result.weights.values()) + sum(
        p.numel() for m in model.modules() if quantizer_of(m) is None for p in m.parameters(recurse=False)
    )
    return result


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantization constants, shared ones once."""
    total, seen = 0, set()
    for module in model.modules():
        quantized = quantizer_of(module) is not None and not hasattr(module, "base_layer")
        if quantized:
            total += layer_bytes(module)
            tensors = [module.bias] if module.bias is not None else []
        else:
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for t in tensors:
            if t.data_ptr() not in seen or t.numel() == 0:
                seen.add(t.data_ptr())
                total += t.numel() * t.element_size()
    return total


def layer_bytes(module: nn.Module) -> int:
    """Codes and constants as a layer's state dict holds them, its bias and scalar notes left out."""
    state = module.state_dict()
    skip = {"bias", "weight_format", "weight.quant_map", "weight.nested_quant_map"}
    return sum(
        t.numel() * t.element_size()
        for k, t in state.items()
        if k not in skip and not k.startswith("weight.quant_state")
    )


def _size(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / 1024**2:.1f} MiB"

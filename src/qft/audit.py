"""What a quantized model weighs and what that costs: bits, what stayed in 16 bit and why, errors, activations."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qft import hf, marks
from qft.activations import collect
from qft.audit_errors import QuantizedLayer, check_forward, has_own_inputs, quantized_layers, weight_errors
from qft.calibration import batches
from qft.errors import BadOption
from qft.experts import PackedExperts
from qft.originals import Originals
from qft.registry import quantizer_of
from qft.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

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
        from qft.audit_views import summary

        return summary(self)

    def __str__(self) -> str:
        from qft.audit_views import table

        return "\n".join([self.summary(), *table(self)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinity and NaN, which JSON lacks, are the strings "inf" and "nan"."""
        from qft.audit_views import as_dict

        return as_dict(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as text, written to `path` too where it is given.

        Raises:
            BadFolder: the file cannot be written.
        """
        from qft.audit_views import to_json

        return to_json(self, path)

    def to_dataframe(self) -> DataFrame:
        """A row a weight: its layer's name as the index, `block` (number) and `kind` of the layer, all figures.

        Raises:
            MissingDependency: pandas is not installed.
        """
        from qft.audit_views import to_dataframe

        return to_dataframe(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A matplotlib figure of errors, bits and activations by depth, a line for each kind of layer.

        Args:
            path: save it there too, in the format of the file's ending.

        Raises:
            MissingDependency: matplotlib is not installed.
            BadOption: a format that matplotlib does not write. BadFolder: the file cannot be written.
        """
        from qft.audit_plot import plot

        return plot(self, path)

    def _repr_html_(self) -> str:
        from qft.audit_views import card

        return card(self)


@torch.no_grad()
def audit(model: nn.Module, *, original: Any = None, data: Any = None, tokenizer: Any = None) -> Audit:
    """Weigh a quantized model, and measure what quantizing it cost.

    The model is left as it is. `data` is run through it once, where it is, block by block.

    Args:
        model: quantized, wrapped or not.
        original: the float model on any device, or its folder: adds each weight's relative error.
        data: what `Calibration` takes: adds the largest activations, and with `original` each layer's output error.
        tokenizer: for texts.

    Raises:
        BadOption: a float model; data that cannot be used; `data` with adapters that are merged and disabled.
        NeedsCalibration: the data holds no tokens.
        AdapterMismatch: `original` is another model. BadFolder: it is a folder without these weights.
        NonFiniteWeights: an active adapter holds NaN or infinity.
        UnsupportedOperation: `data` with virtual tokens in front of it, as prompt tuning has them.
    """
    record = hf.adopt(model)
    if record is None:
        raise BadOption("this model is not quantized: there is nothing to audit")
    originals = Originals.of(original, record) if original is not None else None
    base = marks.base_model(model)
    layers = quantized_layers(base)
    result = Audit(left=dict(record.left), experts=dict(record.experts), float_bytes=record.float_bytes)
    if data is None:
        for name, layer in layers.items():
            result.weights.update(_measured(name, layer, originals))
    else:
        check_forward(model, base)
        read = batches(data, tokenizer, model=base)
        reading = [n for n, layer in layers.items() if not isinstance(layer.module, PackedExperts)]
        kinds = {
            n: "full" if originals is not None and has_own_inputs(layer) else "diagonal" for n, layer in layers.items()
        }
        found: dict[str, dict[str, WeightAudit]] = {}
        with contextlib.closing(collect(base, reading, read, kinds)) as groups:  # type: ignore[type-var, arg-type]
            for group in groups:
                for name in group.names:
                    read_here = group.statistics.pop(name, None)
                    found[name] = _measured(name, layers[name], originals, read_here, group.broken.get(name))
        for name in layers.keys() - reading:  # fused experts have no inputs of their own
            found[name] = _measured(name, layers[name], originals)
        for name in layers:  # in the model's order, not in that of the blocks
            result.weights.update(found[name])
    result.merges = _merges(layers)
    result.nbytes = model_bytes(model)
    result.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result.parameters = sum(prod(w.shape) for w in result.weights.values()) + sum(
        p.numel() for m in model.modules() if quantizer_of(m) is None for p in m.parameters(recurse=False)
    )
    return result


def _merges(layers: dict[str, QuantizedLayer]) -> tuple[str, ...]:
    capabilities = [layer.quantizer.capabilities for layer in layers.values()]
    allowed = {
        "to float": all(c.merge_to_float for c in capabilities),
        "into the quantized weights": all(c.merge_to_quantized for c in capabilities),
    }
    return tuple(name for name, every in allowed.items() if every)


def _measured(
    name: str,
    layer: QuantizedLayer,
    originals: Originals | None,
    statistics: Statistics | None = None,
    broken: int | None = None,
) -> dict[str, WeightAudit]:
    """The layer's weights by unique names; `broken` rows with NaN or infinity were all that a layer read."""
    handles = layer.quantizer.weights(layer.module)
    found = {}
    for handle in handles:
        several = len(handles) > 1
        full_name = f"{name}.{handle.name}" if several else name
        figures: dict[str, Any] = {"tokens": 0, "left_out": broken} if broken else {}
        if statistics is not None:
            for key in ("tokens", "input_max", "output_max", "left_out"):
                figures[key] = getattr(statistics, key)
        if originals is not None and layer.quantizer.capabilities.dequantize:
            h = statistics.second_moment if statistics is not None else None
            figures.update(weight_errors(name, full_name, layer, handle, originals, h))
        nbytes = layer_bytes(layer.module, handle.name if several else "")
        found[full_name] = WeightAudit(repr(layer.quantizer), handle.shape, nbytes, **figures)
    return found


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
        for t in (plain for tensor in tensors for plain in _plain(tensor)):
            if t.data_ptr() not in seen or t.numel() == 0:
                seen.add(t.data_ptr())
                total += t.numel() * t.element_size()
    return total


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the bytes of one: itself, or those inside a tensor subclass that wraps others."""
    if not torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [t for name in tensor.__tensor_flatten__()[0] for t in _plain(getattr(tensor, name))]  # type: ignore[attr-defined]


def layer_bytes(module: nn.Module, prefix: str = "") -> int:
    """Codes and constants as a layer's state dict holds them, its bias and scalar notes left out.

    Args:
        prefix: count only what belongs to the weight of this name, in a layer with several.
    """
    state = module.state_dict()
    skip = {"bias", "weight_format", "weight.quant_map", "weight.nested_quant_map"}
    return sum(
        t.numel() * t.element_size()
        for k, tensor in state.items()
        for t in _plain(tensor)
        if k not in skip and not k.startswith("weight.quant_state") and k.startswith(prefix)
    )

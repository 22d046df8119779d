"""Measure a quantized model."""

from __future__ import annotations

import contextlib
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qft.core import record as marks
from qft.core.adopt import adopt
from qft.core.experts import PackedExperts
from qft.core.originals import Originals
from qft.core.registry import quantizer_of
from qft.data.calibration import batches
from qft.data.collect import collect
from qft.data.statistics import Statistics
from qft.errors import BadOption
from qft.pipeline.audit.errors import QuantizedLayer, check_forward, has_own_inputs, quantized_layers, weight_errors

if TYPE_CHECKING:
    pass
from qft.pipeline.audit.figures import WeightAudit
from qft.pipeline.audit.result import Audit


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
    record = adopt(model)
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

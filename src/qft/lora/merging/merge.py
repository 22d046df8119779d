"""Merge adapters into the quantized base, take them out again, or merge into a float copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qft.core import record
from qft.core.adopt import adopt
from qft.core.modes import normal_mode
from qft.core.originals import Originals
from qft.core.quantizer import as_float_dtype
from qft.core.ties import check_shared_modules
from qft.core.unquantized import Unquantized
from qft.errors import BadOption, NonFiniteWeights, UnsupportedOperation, about
from qft.lora.exact import merge_exactly
from qft.lora.experts import adapted_weights
from qft.lora.merge_weight import Merging, refuse_left_out
from qft.lora.merging.drift import Probe
from qft.lora.merging.float_copy import FloatCopy
from qft.lora.merging.learnt import learnt_over
from qft.lora.merging.report import MergeReport
from qft.lora.model import QftLoraModel, all_or_nothing
from qft.lora.view_merging import ViewMerging, available

MergePlan = list[tuple[str, Any, list[str]]]
"""Layers by the name of the weight that they adapt, with the adapters to merge."""


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return adapted_weights(record.base_model(model))


def _all_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every adapted weight: LoRA's, and the quantized layers of PEFT's other methods."""
    yield from _layers(model)
    for name, module in record.base_model(model).named_modules():
        if isinstance(module, ViewMerging):
            yield name, module


def _active(layer: Any) -> list[str]:
    if isinstance(layer, ViewMerging):
        return available(layer)
    return [a for a in layer.active_adapters if a in layer.lora_A]


def _require_adapters(model: nn.Module) -> None:
    record.record_of(model)
    if not hasattr(model, "peft_config"):
        raise BadOption("this model has no adapters to merge: wrap it with qft.wrap first")
    other = _other_method(model)
    if other is not None:
        _require_weights(model, other)
        return
    if isinstance(model, PeftModel):  # else transformers' own add_adapter put our layers in, without a tuner
        if not isinstance(model.base_model, QftLoraModel):
            raise UnsupportedOperation("these adapters were put on before qft was imported: wrap the model anew")
        model.base_model._check_merge_allowed()


def require_float_merge(model: nn.Module) -> None:
    """Raise `BadOption` over a model that is float already, and what adapters that cannot be merged raise."""
    if record.record_of(model) is None and adopt(model) is None and not hasattr(model, "peft_config"):
        raise BadOption("this model is neither quantized nor wrapped: it is a float model already")
    other = _other_method(model)
    if other is not None:
        _require_weights(model, other)
    elif hasattr(model, "peft_config"):
        _require_adapters(model)
    for name, layer in _layers(model):
        with about(name):
            layer.check_complete(() if layer.disable_adapters else _taken(layer), "left out of a merge")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            refuse_left_out(module)


def _require_weights(model: nn.Module, method: str) -> None:
    if not any(isinstance(m, BaseTunerLayer) for m in record.base_model(model).modules()):
        raise UnsupportedOperation(
            f"{method} changes no weight, so there is nothing to merge: save the adapter, and use it with its base"
        )


def _other_method(model: nn.Module) -> str | None:
    """The method of the adapters, where it is another than LoRA."""
    configs = getattr(model, "peft_config", None) or {}
    return next((c.peft_type.value for c in configs.values() if c.peft_type != PeftType.LORA), None)


def originals_for_floats(model: nn.Module, original: Any) -> Originals | None:
    """`original=` of a merge into floats, once it is known that what was learnt can be added to it."""
    if original is None:
        return None
    other = _other_method(model)
    if other is not None:
        raise UnsupportedOperation(f"original= is for LoRA adapters, and these are {other}: leave it out")
    plan = {n: (m, [] if m.disable_adapters else _taken(m)) for n, m in _layers(model)}
    return learnt_over(record.base_model(model), original, plan)


def merge(model: nn.Module, *, original: Any = None, data: Any = None, tokenizer: Any = None) -> MergeReport:
    """Merge the active adapters into the quantized base, in place.

    Each weight is dequantized, updated and quantized again with its own options; `unmerge` brings the old one back,
    to the bit. Rounding loses most of a small update: the report says how much survived. With `original` the update
    is put on the original weight instead: q(W + Δ − Δ0), where Δ0 is what the adapter's init put there (LoftQ starts
    it at about W − Ŵ, which W does not lack).

    Args:
        original: the float model, its folder, or its index of shards.
        data: texts, token ids, batches, a dataset or a DataLoader: adds the drift of the model's predictions to the
            report, with `original` that of both ways.
        tokenizer: for data that is texts.

    Raises:
        UnsupportedOperation: a backend without `merge_to_quantized`, or an adapter that cannot be merged, or not into
            the original because nobody knows where it started.
        NonFiniteWeights: an adapter with NaN or infinity.
        AdapterMismatch, BadFolder: the original of another model, or files that cannot be read.
        BadOption, NeedsCalibration: the data, a model without logits, or adapters that are merged already. Whatever is
            raised, nothing was merged.
    """
    _require_adapters(model)
    base = record.base_model(model)
    method = _other_method(model)
    if method is not None and original is not None:
        raise UnsupportedOperation(f"original= is for LoRA adapters, and these are {method}: leave it out")
    plan: MergePlan = [(n, m, [a for a in _active(m) if a not in m.merged_adapters]) for n, m in _all_layers(model)]
    if original is not None or data is not None:
        _require_plain_state(plan)
    check_shared_modules(base)
    for name, layer, names in plan:
        with about(name):
            layer.check_merge(names)
    originals = None
    if original is not None:
        originals = learnt_over(base, original, {n: (m, names) for n, m, names in plan})
    probe = None if data is None else Probe(model, data, tokenizer)
    report = MergeReport("quantized", source="dequantized" if originals is None else "original")
    others = _OtherLayers(base)
    others.check()

    def merge_from(source: Originals | None) -> None:
        for name, layer, names in plan:
            if names:
                over = {} if source is None else {"original": _source(source, name, layer)}
                with about(name):
                    layer.merge(adapter_names=names, **over)
                report.weights[name] = layer.last_merge
        others.merge()

    def undo() -> None:
        for _, layer, names in plan:
            if names:
                layer.unmerge()
        others.unmerge()

    with all_or_nothing(model), others:
        if probe is None:
            merge_from(originals)
        else:
            routes = {"dequantized": lambda: merge_from(None)}
            if originals is not None:
                routes["original"] = lambda: merge_from(originals)
            report.routes = probe.after(routes, undo)
    return report


def _source(originals: Originals | None, name: str, layer: Any) -> Tensor | None:
    """The original weight to put an update on; None for a float layer, whose weight is it."""
    if originals is None or isinstance(layer.quantizer, Unquantized):
        return None
    return originals.like(name, layer.quantizer.dequantize(layer.handle, dtype=torch.float32))


def _require_plain_state(plan: MergePlan) -> None:
    if any(layer.merged for _, layer, _ in plan):
        raise BadOption(
            "adapters are merged already, and original= and data= start from the unmerged model: call qft.unmerge(model)"
        )
    if any(layer.disable_adapters for _, layer, _ in plan):
        raise BadOption("the adapters are disabled: merge with original= or data= outside of disable_adapter()")


class _OtherLayers:
    """PEFT's own layers in the model: merged with ours, and taken out to the bit, also on an error."""

    def __init__(self, base: nn.Module):
        merge_exactly(base)
        self.layers = [
            m for m in base.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, Merging | ViewMerging)
        ]

    def check(self) -> None:
        """Raise `NonFiniteWeights` for a broken adapter before the first weight changes."""
        for module in self.layers:
            for name, parameter in module.named_parameters():
                active = "lora_" in name and any(a in name.split(".") for a in module.active_adapters)
                if active and not parameter.isfinite().all():
                    raise NonFiniteWeights(f"an adapter's {name} holds NaN or infinity: nothing was merged")

    def merge(self) -> None:
        for module in self.layers:
            module.merge(safe_merge=True)

    def unmerge(self) -> None:
        for module in self.layers:
            if module.merged:
                module.unmerge()

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: Any, *args: Any) -> None:
        if error is not None:
            self.unmerge()


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base again, to the bit. Without merged adapters nothing happens."""
    _require_adapters(model)
    for module in record.base_model(model).modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()


@normal_mode()
def merge_to_float(
    model: nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    original: Any = None,
    data: Any = None,
    tokenizer: Any = None,
) -> nn.Module:
    """A plain float model with the active adapters merged in; `model` stays as it is.

    Every quantized layer becomes the float layer that it came from, adapted or not; heads, embeddings and norms are
    copied. The result knows nothing of qft or PEFT: it saves and loads with transformers alone. With `original` it is
    the original model with what was learnt: W + Δ − Δ0, and W where nothing was adapted.

    Args:
        model: a wrapped model, or a quantized one without adapters.
        dtype: of the result; None is that of the float model.
        original, data, tokenizer: as in `merge`.

    Returns:
        The model, on the same device, in eval mode as `model` is; its `merge_report` says what rounding cost. Where
        the device has no room for it, it is built in host memory, with a warning.

    Raises:
        UnsupportedOperation: a backend whose weights cannot be had as floats, or an adapter that cannot be merged, or
            not into the original because nobody knows where it started.
        NonFiniteWeights: an adapter with NaN or infinity.
        UnsupportedDevice: neither the device nor the host has room for the float model.
        AdapterMismatch, BadFolder, BadOption, NeedsCalibration: as in `merge`.
    """
    require_float_merge(model)
    wanted = None if dtype is None else as_float_dtype(dtype)
    originals = originals_for_floats(model, original)
    probe = None if data is None else Probe(model, data, tokenizer)
    if data is not None and any(m.merged and m.disable_adapters for _, m in _layers(model)):
        raise BadOption(
            "the adapters are merged and disabled, and running the model would unmerge them: qft.unmerge it"
        )
    made = FloatCopy(record.base_model(model), wanted, originals)
    plain = made.build()
    report = MergeReport("float", made.weights, "dequantized" if originals is None else "original")
    if probe is not None:
        report.routes[report.source] = probe.to(plain)
    plain.merge_report = report
    return plain


def _taken(layer: Any) -> list[str]:
    return list(layer.merged_adapters) or [a for a in layer.active_adapters if a in layer.lora_A]

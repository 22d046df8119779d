"""Merge adapters into the quantized base, take them out again, or merge into a float copy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from qft import hf, marks
from qft.errors import BadOption, NonFiniteWeights, UnsupportedOperation
from qft.hf import unmark
from qft.lora.layer import QftLinear, WeightMerge, compare_merge
from qft.lora.model import QftLoraModel, all_or_nothing
from qft.quantizer import QuantizedWeight, Quantizer, as_float_dtype
from qft.registry import quantizer_of


@dataclass
class MergeReport:
    """What a merge did, weight by weight; `str()` is a table.

    Attributes:
        route: "quantized" or "float".
        weights: layer name → `WeightMerge`.
    """

    route: str
    weights: dict[str, WeightMerge] = field(default_factory=dict)

    @property
    def survived(self) -> float:
        """The mean share of the update that the stored weights took over."""
        return _mean([w.survived for w in self.weights.values()])

    @property
    def relative_error(self) -> float:
        """The mean of ‖Ŵ′ − (Ŵ + Δ)‖ / ‖Ŵ + Δ‖."""
        return _mean([w.relative_error for w in self.weights.values()])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "route": self.route,
            "survived": self.survived,
            "relative_error": self.relative_error,
            "weights": {n: vars(w) for n, w in self.weights.items()},
        }

    def __str__(self) -> str:
        head = (
            f"merged {len(self.weights)} weights into {'floats' if self.route == 'float' else 'the quantized base'}: "
            f"{self.survived:.1%} of the update survived, relative error {self.relative_error:.2e}"
        )
        worst = sorted(self.weights.items(), key=lambda item: item[1].survived)[:5]
        rows = [f"  {w.survived:7.1%}  {w.relative_error:.2e}  {name}" for name, w in worst]
        return "\n".join([head, "  survived  error     (the five least)", *rows] if rows else [head])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0


def _layers(model: nn.Module) -> Iterator[tuple[str, QftLinear]]:
    for name, module in marks.base_model(model).named_modules():
        if isinstance(module, QftLinear):
            yield name, module


def _require_adapters(model: nn.Module) -> None:
    marks.record_of(model)
    if not hasattr(model, "peft_config"):
        raise BadOption("this model has no adapters to merge: wrap it with qft.wrap first")
    others = [c.peft_type.value for c in model.peft_config.values() if c.peft_type != PeftType.LORA]
    if others:
        raise UnsupportedOperation(f"qft merges LoRA adapters, and these are {others[0]}")
    if isinstance(model, PeftModel):  # else transformers' own add_adapter put our layers in, without a tuner
        if not isinstance(model.base_model, QftLoraModel):
            raise UnsupportedOperation("these adapters were put on before qft was imported: wrap the model anew")
        model.base_model._check_merge_allowed()


def _require_float_merge(model: nn.Module) -> None:
    record = marks.record_of(model)
    if record is None and hf.adopt(model) is None and not hasattr(model, "peft_config"):
        raise BadOption("this model is neither quantized nor wrapped: it is a float model already")
    if hasattr(model, "peft_config"):
        _require_adapters(model)


def merge(model: nn.Module) -> MergeReport:
    """Merge the active adapters into the quantized base, in place.

    Each weight is dequantized, updated and quantized again with its own options; `unmerge` brings the old one back,
    to the bit. Rounding loses most of a small update: the report says how much survived.

    Raises:
        UnsupportedOperation: a backend without `merge_to_quantized`, or an adapter that cannot be merged.
        NonFiniteWeights: an adapter with NaN or infinity. In both cases nothing was merged.
    """
    _require_adapters(model)
    layers = list(_layers(model))
    plan = [(n, m, [a for a in m.active_adapters if a in m.lora_A and a not in m.merged_adapters]) for n, m in layers]
    for _, layer, names in plan:
        layer.check_merge(names)
    report = MergeReport("quantized")
    with all_or_nothing(model):
        for name, layer, names in plan:
            if names:
                layer.merge(adapter_names=names)
                report.weights[name] = layer.last_merge
        for module in marks.base_model(model).modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, QftLinear):
                module.merge(safe_merge=True)
    return report


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base again, to the bit. Without merged adapters nothing happens."""
    _require_adapters(model)
    for module in marks.base_model(model).modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()


@torch.no_grad()
def merge_to_float(model: nn.Module, *, dtype: str | torch.dtype | None = None) -> nn.Module:
    """A plain float model with the active adapters merged in; `model` stays as it is.

    Every quantized layer becomes the float layer that it came from, adapted or not; heads, embeddings and norms are
    copied. The result knows nothing of qft or PEFT: it saves and loads with transformers alone.

    Args:
        model: a wrapped model, or a quantized one without adapters.
        dtype: of the result; None is that of the float model.

    Returns:
        The model, on the same device, in eval mode as `model` is; its `merge_report` says what rounding cost.

    Raises:
        UnsupportedOperation: a backend whose weights cannot be had as floats, or an adapter that cannot be merged.
        NonFiniteWeights: an adapter with NaN or infinity.
    """
    _require_float_merge(model)
    wanted = None if dtype is None else as_float_dtype(dtype)
    base = marks.base_model(model)
    report = MergeReport("float")
    memo: dict[int, Any] = {}
    inside: set[int] = set()
    for name, module in base.named_modules():
        if id(module) in inside:
            continue
        new = _float_counterpart(module, name, wanted, report)
        if new is not None:
            memo[id(module)] = new
            inside.update(id(m) for m in module.modules())
    plain = _copy_bare(base, memo)
    _settle_tie(plain)
    if wanted is not None:
        _cast(plain, wanted)
    plain.requires_grad_(True)
    plain.merge_report = report
    return plain


def _copy_bare(base: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy with the modules and tensors of `memo` in their places, and without anybody's marks."""
    memo[id(getattr(base, "hf_quantizer", None))] = None
    kept = base.__dict__.pop("_qft", None)
    try:
        plain = copy.deepcopy(base, memo)
    finally:
        if kept is not None:
            base.__dict__["_qft"] = kept
    _clean(plain)
    return plain


def _float_counterpart(
    module: nn.Module, name: str, dtype: torch.dtype | None, report: MergeReport
) -> nn.Module | None:
    if isinstance(module, QftLinear):
        if module.merged and module.disable_adapters:
            module = copy.deepcopy(module)
            module.unmerge()
        if module.merged:  # the base weight holds the adapters, as they survived
            handle = module.handle
            return _float_layer(
                module.quantizer, handle, module.quantizer.dequantize(handle, dtype=torch.float32), dtype
            )
        names = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.lora_A]
        handle = module.handle
        before = module.quantizer.dequantize(handle, dtype=torch.float32)
        if not names:
            return _float_layer(module.quantizer, handle, before, dtype)
        wanted = module.merged_weight(names, before)
        new = _float_layer(module.quantizer, handle, wanted, dtype, module.merged_bias(names))
        after = new.weight.T if handle.transposed else new.weight
        report.weights[name] = compare_merge(before, wanted, after.float())
        return new
    if isinstance(module, ModulesToSaveWrapper):
        active = None if module.disable_adapters or not module.active_adapters else module.active_adapters[0]
        return copy.deepcopy(module.modules_to_save[active] if active else module.original_module)
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        twin = copy.deepcopy(module)
        if hasattr(twin, "unload_and_optionally_merge_module"):
            return twin.unload_and_optionally_merge_module(
                not twin.disable_adapters, safe_merge=True, adapter_names=None
            )
        if not twin.merged and not twin.disable_adapters:
            twin.merge(safe_merge=True)
        return twin.get_base_layer()
    quantizer = quantizer_of(module)
    if quantizer is None:
        return None
    handle = quantizer.weights(module)[0]
    return _float_layer(quantizer, handle, quantizer.dequantize(handle, dtype=torch.float32), dtype)


def _float_layer(
    quantizer: Quantizer,
    handle: QuantizedWeight,
    value: Tensor,
    dtype: torch.dtype | None,
    bias: Tensor | None = None,
) -> nn.Module:
    if not quantizer.capabilities.merge_to_float:
        raise UnsupportedOperation(f"{quantizer!r} cannot give its weights as floats (capability merge_to_float)")
    bias = handle.bias if bias is None else bias
    if float(value.abs().max()) > torch.finfo(dtype or handle.dtype).max:
        raise NonFiniteWeights(
            f"a merged weight is too large for {dtype or handle.dtype}; dtype=torch.float32 holds it"
        )
    new = _empty_layer(handle, dtype, bias is not None)
    dtype = dtype or handle.dtype
    new.weight = nn.Parameter((value.T if handle.transposed else value).to(dtype).contiguous())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    new.train(handle.module.training)
    return new


def _empty_layer(handle: QuantizedWeight, dtype: torch.dtype | None, bias: bool) -> nn.Module:
    """The float layer that a quantized one came from, on "meta"."""
    out_features, in_features = handle.shape
    with torch.device("meta"):
        if handle.kind == "conv1d":
            from transformers.pytorch_utils import Conv1D

            new: nn.Module = Conv1D(out_features, in_features)
        else:
            new = nn.Linear(in_features, out_features, bias=bias)
    return new.to(dtype or handle.dtype)


def _cast(plain: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a file would hold, as `from_pretrained(dtype=dtype)` does.

    Buffers that no file holds, such as rotary frequencies, stay as they were computed: 16 bit would spoil them.
    """
    plan = plain._get_dtype_plan(dtype) if hasattr(plain, "_get_dtype_plan") else {}
    in_float32 = re.compile("|".join(glob.replace("*", ".*") for glob in plan) or "(?!)")
    for prefix, module in plain.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for name, tensor in [*module._parameters.items(), *buffers.items()]:
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if in_float32.search(f"{prefix}.{name}") else dtype)
    if hasattr(plain, "config"):
        plain.config.dtype = dtype


def _settle_tie(plain: nn.Module, same: Callable[[Tensor, Tensor], bool] = torch.equal) -> None:
    """Say in the config whether head and embedding still share their weight: training one of them parts them."""
    config = getattr(plain, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    try:
        head, embedding = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return
    if head is not embedding and same(head, embedding):
        plain.tie_weights()
    elif head is not embedding:
        config.tie_word_embeddings = False


def _clean(plain: nn.Module) -> None:
    """Remove what quantizing, wrapping and training left on the copy."""
    unmark(plain)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        plain.__dict__.pop(name, None)
    for module in plain.modules():
        module.__dict__.pop("_qft_quantizer", None)
        for key, hook in list(module._forward_hooks.items()):
            if "require_grads" in getattr(hook, "__qualname__", "") or type(hook).__module__.startswith("qft."):
                del module._forward_hooks[key]
        for name in ("_require_grads_hook", "_require_grads_hooks"):
            module.__dict__.pop(name, None)
    if any(getattr(module, "gradient_checkpointing", False) for module in plain.modules()):
        disable = getattr(plain, "activation_checkpointing_disable", None) or plain.gradient_checkpointing_disable
        disable()

"""The one LoRA layer: PEFT's `Linear`, computed and merged over `dequantize` and `requantize`.

It stands over quantized layers of every backend, and over the float linears of a quantized model, so that merging
and unmerging are the same everywhere. Parameters, names and saved files are PEFT's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from qft.core.packed import PackedLinear, dequantizer
from qft.core.quantizer import QuantizedWeight, Quantizer
from qft.core.registry import quantizer_of
from qft.core.unquantized import Unquantized
from qft.lora.merge_weight import Merging, WeightMerge, check_merged
from qft.ops.kernels import Codebook
from qft.ops.linear import Update, lora_linear
from qft.ops.source import Source, Sourced


class QftLinear(Sourced, Merging, Linear):
    """LoRA over one weight of any `Quantizer`; see `peft.tuners.lora.layer.Linear` for the parameters.

    A group-pooled adapter (`use_qalora`; QA-LoRA, arXiv 2309.14717) sees the mean of each group of G inputs, times
    in_features / G as in PEFT; its A is (r, in_features / G), and its update is one constant a row and group.
    """

    other_param_names = (*Linear.other_param_names, "qalora_group_size")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any):
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantizer: Quantizer = quantizer_of(base_layer) or Unquantized()
        self.native = bool(kwargs.pop("native", False))
        self._view_base = False
        self._saved: tuple[Any, Any] | None = None
        self.last_merge: WeightMerge | None = None
        self.from_original = False  # what is merged was merged over W, not over Ŵ
        # adapter → (A, B) that its init put there, float32 on the host; None where that is not known; absent for B = 0
        self.starts: dict[str, tuple[Tensor, Tensor] | None] = {}
        self.qalora_group_size: dict[str, int] = {}  # of the group-pooled adapters
        # Conv1D's weight is kept as (out, in) here, whatever the config says of the float layer
        if config.fan_in_fan_out:
            config = copy.copy(config)
            config.fan_in_fan_out = False
        kwargs["is_target_conv_1d_layer"] = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False
        self._source = Source(self)

    # ---- the weight --------------------------------------------------------------------------------------

    @property
    def handle(self) -> QuantizedWeight:
        """The handle of the base weight, as it stands now."""
        return self.quantizer.weights(self.base_layer)[0]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.quantizer.dequantize(self.handle, dtype=dtype)

    def codebook(self) -> Codebook | None:
        return self.quantizer.codebook(self.handle)

    @property
    def weight(self) -> Tensor:
        """The base weight as floats, shape and dtype of the float layer's."""
        handle = self.handle
        value = self.quantizer.dequantize(handle)
        return value.T if handle.transposed else value

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        shape = self.handle.shape
        return shape[1], shape[0]

    def get_base_layer(self) -> nn.Module:
        return _FloatView(self) if self._view_base else self.base_layer

    @contextmanager
    def _float_base(self) -> Iterator[None]:
        """PEFT's variants ask the base layer for its `.weight`: show them one whose weight is float."""
        self._view_base = True
        try:
            yield
        finally:
            self._view_base = False

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.fan_in_fan_out:
            config = copy.copy(config)
            config.fan_in_fan_out = False
        self.starts.pop(adapter_name, None)
        self.qalora_group_size.pop(adapter_name, None)
        in_features = self.in_features
        if config.use_qalora:
            self.qalora_group_size[adapter_name] = config.qalora_group_size
            self.in_features = in_features // config.qalora_group_size  # what PEFT makes and initialises A for
        try:
            with self._float_base():
                super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        finally:
            self.in_features = in_features
        magnitude = self.lora_magnitude_vector[adapter_name] if adapter_name in self.lora_magnitude_vector else None
        if type(magnitude) is DoraLinearLayer:
            magnitude.__class__ = DoraMagnitude

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.starts.pop(adapter_name, None)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        handle = self.handle
        return _device(self.base_layer), handle.dtype

    # ---- forward -----------------------------------------------------------------------------------------

    def _base(self, x: Tensor, updates: list[Update] | None = None) -> Tensor:
        if self.native:
            return self.base_layer.native(x) if isinstance(self.base_layer, PackedLinear) else self.base_layer(x)
        in_float8 = self.float8 and self.training
        return lora_linear(x, self._source, self.base_layer.bias, updates or (), in_float8=in_float8)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.rewritten_by is not None:
            self._check_rewritten(adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base(x)
        if self.merged:
            check_merged(self)
            return self._base(x)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names)
        # the vendor's forward cannot take the updates in: they are added behind it
        result, updates = self._base(x) if self.native else None, []
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            if name in self.lora_variant:
                result = self._base(x, updates) if result is None else result
                result = self._variant(name, x, result)
            elif result is None:
                updates.append(self._update(name, x))
            else:
                result = result + self._plain(name, x).to(result.dtype)
        return self._base(x, updates) if result is None else result

    def _check_rewritten(self, adapter_names: list[str] | None) -> None:
        if self.disable_adapters:
            self.check_complete(())
        elif adapter_names is not None:
            for name in set(adapter_names):
                self.check_complete((name,), "left out of a batch")
        else:
            self.check_complete(self.merged_adapters or self.active_adapters)

    def _update(self, name: str, x: Tensor) -> Update:
        dropout = self.lora_dropout[name]
        active = not isinstance(dropout, nn.Identity) and self.training
        dropped = dropout(x) if active else None
        if name in self.qalora_group_size:
            dropped = self._pooled(name, x if dropped is None else dropped)
        lora_b = self.lora_B[name]
        return Update(self.lora_A[name].weight, lora_b.weight, float(self.scaling[name]), dropped, lora_b.bias)

    def _pooled(self, name: str, x: Tensor) -> Tensor:
        """(..., in_features) → (..., in_features / G) as PEFT's QALoRALinearVariant, or `x` where nothing is pooled."""
        size = self.qalora_group_size.get(name)
        return x if size is None else x.unflatten(-1, (-1, size)).mean(-1) * (x.shape[-1] // size)

    def _expanded(self, name: str, delta: Tensor) -> Tensor:
        """B @ A in the shape of the weight: each column of a group-pooled one stands for the G inputs of its group."""
        size = self.qalora_group_size.get(name)
        return delta if size is None else delta.repeat_interleave(size, dim=1).mul_(delta.shape[1] / size)

    def _plain(self, name: str, x: Tensor) -> Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        x = self.lora_dropout[name](self._cast_input_dtype(x, a.weight.dtype))
        return b(a(self._pooled(name, x))) * self.scaling[name]

    def _variant(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        with self._float_base():
            x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            out = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
        return out.to(result.dtype)

    def _mixed_batch(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        result = self._base(x)
        if self.native:  # what a vendor's forward returns may be a view that must not be changed
            result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name == "__base__" or name not in self.lora_A:
                continue
            rows = [i for i, n in enumerate(adapter_names) if n == name]
            result[rows] += self._plain(name, x[rows]).to(result.dtype)
        return result

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def __repr__(self) -> str:
        return "qft." + super().__repr__()


class DoraMagnitude(DoraLinearLayer):
    """PEFT's magnitudes of DoRA, without its division of zero by zero in rows of zeros."""

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        norm = super().get_weight_norm(*args, **kwargs)
        return torch.where(norm > 0, norm, 1.0)


class DequantizedForward:
    """x Ŵᵀ + b, put on a layer without an adapter whose vendor's own forward computes something else.

    With it the whole wrapped model computes from `dequantize`, and a merge to float is exact for every choice of
    `target_modules`.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        quantizer = quantizer_of(self.module)
        return lora_linear(x, dequantizer(quantizer, quantizer.weights(self.module)[0]), self.module.bias)

    @staticmethod
    def put_on(model: nn.Module) -> None:
        """Put it on every layer of `model` that needs it, adapted ones apart."""
        adapted = {id(m.base_layer) for m in model.modules() if isinstance(m, QftLinear)}
        for module in model.modules():
            quantizer = quantizer_of(module)
            exact = quantizer is None or quantizer.capabilities.exact_forward
            # Falcon changes the outputs of its layers in place, which those of a vendor's autograd function refuse
            exact = exact and not (quantizer is not None and getattr(module, "of_subclass", False))
            if not exact and not hasattr(module, "base_layer") and id(module) not in adapted:
                module.forward = DequantizedForward(module)

    @staticmethod
    def take_off(model: nn.Module) -> None:
        """Give every layer its vendor's forward back."""
        for module in model.modules():
            if isinstance(module.__dict__.get("forward"), DequantizedForward):
                del module.forward


class _FloatView(nn.Module):
    """The base layer as PEFT's variants want to see it: `.weight` (out, in) as float, and `.bias`."""

    def __init__(self, layer: QftLinear):
        super().__init__()
        self.__dict__["_layer"] = layer
        handle = layer.handle
        self.in_features, self.out_features = handle.shape[1], handle.shape[0]

    @property
    def weight(self) -> nn.Parameter:
        layer = self.__dict__["_layer"]
        return nn.Parameter(layer.quantizer.dequantize(layer.handle), requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        return self.__dict__["_layer"].base_layer.bias


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device

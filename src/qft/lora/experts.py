"""LoRA over one fused weight of packed experts: PEFT's `ParamWrapper`, computed and merged over packed tensors.

Parameters, names and saved files are PEFT's own: A is (experts · rank, in_features) and B (out_features, rank · experts),
which holds the experts side by side in its last dimension. A module with two fused weights has two of these around it,
the one of the parameter that was defined first inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from qft.core.experts import PackedExperts, stacks
from qft.core.quantizer import QuantizedWeight, Quantizer
from qft.errors import NonFiniteWeights, UnsupportedOperation
from qft.lora.merge_weight import Merging, WeightMerge, check_merged
from qft.ops.grouped import ExpertUpdate


class QftExperts(Merging, ParamWrapper):
    """LoRA over one packed weight of an experts module; see `peft.tuners.lora.layer.ParamWrapper` for the parameters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        self._saved: tuple[Any, Tensor | None] | None = None
        self.last_merge: WeightMerge | None = None
        self.from_original = False
        self.starts: dict[str, tuple[Tensor, Tensor] | None] = {}
        kwargs["is_target_conv_1d_layer"] = False
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=config, **kwargs)

    # ---- the weight --------------------------------------------------------------------------------------

    def get_param(self) -> PackedExperts:
        """What stands in the parameter's place: it has a shape, a dtype and a device."""
        return self.get_base_layer()._modules[self.parameter_name]

    @property
    def quantizer(self) -> Quantizer:
        """That of the packed weight."""
        return self.get_param().quantizer

    @property
    def handle(self) -> QuantizedWeight:
        """The handle of the packed weight, as it stands now."""
        return self.get_param().handle

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.starts.pop(adapter_name, None)
        super().update_layer(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.starts.pop(adapter_name, None)

    # ---- forward -----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None):
            raise UnsupportedOperation(
                "fused experts take one set of adapters for a whole batch: adapter_names= (mixed batches) does not go "
                "together with target_parameters"
            )
        self.check_complete(() if self.disable_adapters else self.merged_adapters or self.active_adapters)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            check_merged(self)
        updates = [] if self.disable_adapters or self.merged else [
            ExpertUpdate(*self.factors(n), float(self.scaling[n])) for n in self.active_adapters if n in self.lora_A
        ]  # fmt: skip
        live = self.get_base_layer().forward.updates
        live[self.parameter_name] = updates
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            live.pop(self.parameter_name, None)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (experts, rank, in_features) and B (experts, out_features, rank) of an adapter; views."""
        return split(self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts)

    # ---- merging -----------------------------------------------------------------------------------------

    def delta(self, name: str, like: Tensor, *, learnt: bool = False) -> Tensor:
        """`scaling * B @ A` of each expert, (experts, out_features, in_features), as `Merging.delta`."""
        a, b = self.factors(name)
        value = torch.bmm(b.to(like), a.to(like))
        if learnt and name in self.starts:
            a0, b0 = split(*self.known_start(name), self.num_experts)
            value.baddbmm_(b0.to(like), a0.to(like), alpha=-1)
        return value.mul_(self.scaling[name])

    def merged_weight(self, adapter_names: list[str], weight: Tensor, *, learnt: bool = False) -> Tensor:
        value = weight.clone()
        for name in adapter_names:
            value.add_(self.delta(name, weight, learnt=learnt))
        if not value.isfinite().all():
            raise NonFiniteWeights(
                f"merging {', '.join(adapter_names)} gives NaN or infinity: the adapter is broken, nothing was merged"
            )
        return value

    def _group_shift(self, names: list[str], handle: QuantizedWeight) -> Tensor | None:
        return None

    def merged_bias(self, adapter_names: list[str]) -> Tensor | None:
        return None

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """`scaling * B @ A` in the float parameter's shape, in the adapter's dtype."""
        value = self.delta(adapter_name, self.lora_B[adapter_name].weight)
        return value.transpose(1, 2) if self.handle.transposed else value

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        for layer in chain(self):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def __repr__(self) -> str:
        return "qft." + super().__repr__().removeprefix("lora.")


def split(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's A and B of fused experts by expert: (experts, rank, in_features), (experts, out_features, rank)."""
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def joined(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `split`."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def chain(layer: nn.Module) -> Iterator[QftExperts]:
    """The adapters around one experts module, from the outside in."""
    while isinstance(layer, QftExperts):
        yield layer
        layer = layer.base_layer


def adaptable(module: nn.Module) -> bool:
    """Whether `module`, or what is inside its adapters, holds packed experts."""
    base = module.get_base_layer() if isinstance(module, ParamWrapper) else module
    return bool(stacks(base))


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The `QftLinear`s and `QftExperts` of a model by the names of the weights that they adapt."""
    for name, module in model.named_modules():
        if isinstance(module, QftExperts):
            yield f"{name.replace('.base_layer', '')}.{module.parameter_name}", module
        elif isinstance(module, Merging):
            yield name, module


def matches(name: str, targets: Any) -> bool:
    """Whether `target_parameters` takes in the parameter of that full name, as PEFT matches them."""
    return any(name == target or name.endswith(f".{target}") for target in targets)

"""Where an adapter starts: pure functions from (W, Ŵ) to (A, B), and the run that applies them to a model.

An init sees each weight once, while it is being quantized and W and Ŵ are both in hand.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn

from qft.errors import AdapterMismatch, BadOption, NeedsOriginal, UnsupportedOperation
from qft.lora.layer import QftLinear
from qft.lora.model import KEPT_INITS, targeted
from qft.marks import record_of
from qft.quantizer import Quantizer
from qft.registry import quantizer_of

__all__ = ["AdapterInit", "InitRun", "need_original", "resolve_init"]


class AdapterInit(ABC):
    """A start for the adapters. A subclass is a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(
        self,
        weight: Tensor,
        quantized: Tensor,
        rank: int,
        scaling: float,
        *,
        statistics: Any = None,
        roundtrip: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The start for one weight.

        Args:
            weight: W, the float weight, float32, (out_features, in_features).
            quantized: Ŵ = dq(q(W)), float32, the same shape.
            rank: r of this layer.
            scaling: s, by which the adapter's product is multiplied: alpha / r, or alpha / √r.
            statistics: activation statistics of the layer's input, where the init asks for them.
            roundtrip: X ↦ dq(q(X)) with this layer's quantizer; given where the backend can requantize.

        Returns:
            A (r, in_features), B (out_features, r), and the float weight to quantize in the place of W, or None to
            leave Ŵ as it is.
        """

    @property
    def changes_base(self) -> bool:
        """Whether it may replace Ŵ; `qft.save` then stores the base too."""
        return False


@dataclass
class InitRun:
    """One application of an init to one model: `on_weight` collects, `apply` fills the adapters."""

    init: AdapterInit
    config: LoraConfig
    model: nn.Module | None = None

    def __post_init__(self):
        self.values: dict[str, tuple[Tensor, Tensor]] = {}
        self.ranks: dict[str, int] = {}
        if self.model is not None:
            self.over(self.model)

    def over(self, model: nn.Module) -> None:
        """Take `model` as the one to start adapters on; its targets are what the config matches now."""
        self.model, self.ranks = model, targeted(model, self.config)

    def rank_and_scaling(self, name: str) -> tuple[int, float] | None:
        """r and s of the adapter on this layer, or None where there is none."""
        from peft.utils.other import get_pattern_key

        config, rank = self.config, self.ranks.get(name)
        if rank is None:
            return None
        alpha = (config.alpha_pattern or {}).get(
            get_pattern_key((config.alpha_pattern or {}).keys(), name), config.lora_alpha
        )
        return rank, alpha / rank**0.5 if config.use_rslora else alpha / rank

    @torch.no_grad()
    def on_weight(self, name: str, weight: Tensor, quantized: Tensor, statistics: Any) -> None:
        """Compute the start of one layer's adapter; called with the quantized layer in its place."""
        found = self.rank_and_scaling(name)
        if found is None:
            return
        rank, scaling = found
        quantizer, handle = _quantizer_and_handle(self.model, name)
        roundtrip = None
        if quantizer.capabilities.requantize:

            def roundtrip(value: Tensor) -> Tensor:
                quantizer.requantize(handle, value)
                return quantizer.dequantize(handle, dtype=torch.float32)

        elif self.init.changes_base:
            raise UnsupportedOperation(
                f"{self.init!r} changes the quantized weights, which {quantizer!r} cannot do (capability "
                "iterated_loftq); one step, qft.LoftQ(), leaves them alone"
            )
        saved = quantizer.snapshot(handle) if self.init.changes_base else None
        a, b, base = self.init(
            weight.float(), quantized.float(), rank, scaling, statistics=statistics, roundtrip=roundtrip
        )
        if saved is not None:
            if base is None:
                quantizer.restore(handle, saved)
            else:
                quantizer.requantize(handle, base)
        self.values[name] = (a.cpu(), b.cpu())

    def run_over(self, original: Callable[[str], Tensor]) -> None:
        """Collect over a model that was quantized before, its float weights given by name.

        Raises:
            AdapterMismatch: a weight of another shape. Where anything is raised, the quantized weights are as they were.
        """
        changed = []
        try:
            for name in self.ranks:
                if quantizer_of(self.model.get_submodule(name)) is None:
                    continue
                quantizer, handle = _quantizer_and_handle(self.model, name)
                quantized, weight = quantizer.dequantize(handle, dtype=torch.float32), original(name)
                if weight.shape != quantized.shape:
                    raise AdapterMismatch(
                        f"the original's {name} is {tuple(weight.shape)}, and the model's {tuple(quantized.shape)}: it is "
                        "the original of another model"
                    )
                if self.init.changes_base:
                    changed.append((quantizer, handle, quantizer.snapshot(handle)))
                self.on_weight(name, weight.to(quantized.device), quantized, None)
        except BaseException:
            for quantizer, handle, saved in changed:
                quantizer.restore(handle, saved)
            raise

    def apply(self, peft_model: nn.Module, adapter_name: str) -> None:
        """Fill the adapters of a freshly wrapped model with what was collected."""
        record = record_of(peft_model)
        for name, module in peft_model.get_base_model().named_modules():
            if not isinstance(module, QftLinear) or adapter_name not in module.lora_A:
                continue
            if name not in self.values:
                continue  # a float layer: there is no quantization error to start from
            a, b = self.values[name]
            for target, value in ((module.lora_A, a), (module.lora_B, b)):
                target[adapter_name].weight.data.copy_(value)
            module.starts[adapter_name] = (a, b)
            if adapter_name in module.lora_variant:  # DoRA: the magnitude is that of the weight it starts from
                delta = (b @ a) * module.scaling[adapter_name]
                start = module.quantizer.dequantize(module.handle, dtype=torch.float32)
                magnitude = module.lora_magnitude_vector[adapter_name].weight
                magnitude.data.copy_(torch.linalg.norm(start + delta.to(start.device), dim=1))
        record.init = repr(self.init)
        record.base_changed |= self.init.changes_base


def _quantizer_and_handle(model: nn.Module, name: str) -> tuple[Quantizer, Any]:
    module = model.get_submodule(name)
    quantizer = quantizer_of(module)
    return quantizer, quantizer.weights(module)[0]


def resolve_init(init: Any, config: LoraConfig) -> tuple[AdapterInit | None, LoraConfig]:
    """The init that was asked for, by `init=` or by PEFT's own words, and the config to wrap with.

    The returned config never asks PEFT to initialise from float weights, and is saved saying `True`.

    Raises:
        BadOption: an unknown init, or one of PEFT's that rewrites the float base weights.
    """
    from qft.inits.loftq import LoftQ

    config = copy.copy(config)
    asked = config.init_lora_weights
    if init is None and isinstance(asked, str) and asked not in KEPT_INITS:
        if asked != "loftq":
            raise BadOption(
                f"init_lora_weights={asked!r} is none that works over a quantized base, which has no float weights to "
                "start from or rewrite; init='loftq' starts from the quantization error instead"
            )
        options = dict(config.loftq_config or {})
        steps = options.pop("loftq_iter", 1)
        bits = options.pop("loftq_bits", None)
        if options:
            raise BadOption(f"loftq_config has no {sorted(options)}; it has loftq_bits and loftq_iter")
        init = LoftQ(steps=steps, bits=bits)
    if asked not in KEPT_INITS:
        config.init_lora_weights = True
    config.loftq_config = {}
    if init is None:
        return None, config
    if isinstance(init, type) and issubclass(init, AdapterInit):
        init = init()
    if isinstance(init, str):
        if init in ("zero", "default"):
            return None, config
        if init != "loftq":
            raise BadOption(f"no init is called {init!r}; known: loftq, zero (PEFT's own start)")
        init = LoftQ()
    if not isinstance(init, AdapterInit):
        raise BadOption(
            f"init={init!r:.100} is no init: give a name such as 'loftq', or an object such as qft.LoftQ(steps=5)"
        )
    config.init_lora_weights = True
    return init, config


def need_original(init: AdapterInit) -> NeedsOriginal:
    """The error for an init over a model whose float weights are gone."""
    return NeedsOriginal(
        f"{init!r} needs the float weights, and this model is quantized already: pass original= (the float model, or "
        "its folder), or let qft.quantize_and_wrap quantize and initialise in one go"
    )

"""PEFT's door: on models that qft marked, LoRA layers are ours; on every other model PEFT's own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qft.backends.unquantized import is_float_linear
from qft.errors import BadOption, BadShape, NoTargets, QftWarning, UnsupportedOperation
from qft.lora.layer import QftLinear, WeightMerge
from qft.marks import record_of
from qft.registry import quantizer_of
from qft.selection import linear_targets

KEPT_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""PEFT's initialisations that leave the base weight alone; the others are ours to translate, or refused."""

# what PEFT has no right code for over a weight that is not a float tensor
_REFUSED = {
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA, which rewrites the base weights",
    "use_qalora": "QALoRA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
}


class QftLoraModel(LoraModel):
    """`LoraModel` that builds `QftLinear` on models quantized by qft, and PEFT's layers on all others."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        record = record_of(model)
        if record is not None:
            config = self.peft_config[adapter_name]
            check_config(model, config, "init" if not config.inference_mode else "load")
            if config.target_modules == "all-linear":
                config.target_modules = set(linear_targets(model, _quantized))
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_new_module(self, lora_config, adapter_name, target, **kwargs):
        record = record_of(self.model)
        if record is None or kwargs.get("parameter_name") is not None:
            return super()._create_new_module(lora_config, adapter_name, target, **kwargs)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _quantized(base) and not is_float_linear(base):
            return super()._create_new_module(lora_config, adapter_name, target, **kwargs)
        for key in ("device_map", "loaded_in_8bit", "loaded_in_4bit", "parameter_name"):
            kwargs.pop(key, None)
        kwargs = {k: v for k, v in kwargs.items() if not k.endswith("quantization_config")}
        return QftLinear(target, adapter_name, lora_config, native=record.forward == "native", **kwargs)

    def _replace_module(self, parent, child_name, new_module, child):
        if isinstance(new_module, QftLinear):
            setattr(parent, child_name, new_module)
            new_module.train(child.training)
        elif isinstance(child, QftLinear):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self):
        record = record_of(self.model)
        if record is None:
            return super()._check_merge_allowed()
        method = self.model.__dict__.pop("quantization_method", None)
        try:  # PEFT refuses GPTQ here, which our layer can merge or refuses by its capabilities
            super()._check_merge_allowed()
        finally:
            if method is not None:
                self.model.quantization_method = method

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_all(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        record = record_of(self.model)
        if record is not None and merge:
            self._check_all(adapter_names)
        layers = [m for m in self.model.modules() if isinstance(m, QftLinear)]
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        merges = [m.last_merge for m in layers if m.merged and m.last_merge is not None]
        if record is not None and merge and merges:
            record.base_changed = True
            warn_of_loss(merges)
        return model

    def _check_all(self, adapter_names: list[str] | None) -> None:
        """Raise before the first weight changes."""
        for module in self.model.modules():
            if isinstance(module, QftLinear):
                names = adapter_names if adapter_names is not None else module.active_adapters
                module.check_merge([n for n in names if n in module.lora_A])


def warn_of_loss(merges: list[WeightMerge]) -> None:
    """Say what share of the update survived a merge into quantized weights."""
    share = sum(m.survived for m in merges) / len(merges)
    warnings.warn(
        f"merged into the quantized weights: {share:.0%} of the update survived the rounding on average over "
        f"{len(merges)} weights; qft.merge_to_float keeps all of it",
        QftWarning,
        stacklevel=4,
    )


def _quantized(module: nn.Module) -> bool:
    return quantizer_of(module) is not None


def check_config(model: nn.Module, config: LoraConfig, what: str = "init") -> None:
    """Refuse, before anything is wrapped, what would be wrong over quantized weights.

    Raises:
        UnsupportedOperation: a LoRA variant that reads or rewrites float base weights.
        BadOption: an initialisation that only `qft.wrap(..., init=)` can do.
        BadShape: a rank below one.
    """
    for field, label in _REFUSED.items():
        if getattr(config, field, None):
            raise UnsupportedOperation(f"{label} ({field}) is not supported over quantized weights; plain LoRA, rsLoRA and DoRA are")
    if what == "init" and config.init_lora_weights not in KEPT_INITS:
        raise BadOption(
            f"init_lora_weights={config.init_lora_weights!r} rewrites the float base weights, which PEFT cannot do over "
            "quantized ones; use qft.wrap(model, adapter, init=...), which can"
        )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if any(not isinstance(r, int) or r < 1 for r in ranks):
        raise BadShape(f"the rank is a positive integer, not {[r for r in ranks if not isinstance(r, int) or r < 1][0]}")


def targeted(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """The linear layers that `config` would adapt, with their rank: name → r.

    Raises:
        NoTargets: it matches none.
        BadShape: a rank larger than a layer.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    if config.target_modules == "all-linear":
        names = linear_targets(model, _quantized)
        excluded = copy.copy(config)
        excluded.target_modules = set(names)
        config = excluded
    found, other = {}, 0
    for name, module in model.named_modules():
        hit = check_target_module_exists(config, name)
        if not hit or type(hit).__name__ == "_ExcludedModule":
            continue
        if not _quantized(module) and not is_float_linear(module):
            other += 1
            continue
        key = get_pattern_key(config.rank_pattern.keys(), name) if config.rank_pattern else None
        rank = (config.rank_pattern or {}).get(key, config.r)
        shape = _shape(module)
        if rank > min(shape):
            raise BadShape(f"rank {rank} is larger than {name}, whose weight is {shape[0]} × {shape[1]}")
        found[name] = rank
    if not found and not other and not config.target_parameters:
        some = [n for n, m in model.named_modules() if _quantized(m)][:4]
        raise NoTargets(
            f"target_modules={config.target_modules!r} matches no layer; this model has, among others, {', '.join(some)}; "
            "'all-linear' takes all of them"
        )
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    from qft.backends.unquantized import Unquantized

    quantizer = quantizer_of(module) or Unquantized()
    return quantizer.weights(module)[0].shape


def install() -> None:
    """Put `QftLoraModel` in the place of PEFT's `LoraModel`: it is one on every model that qft did not mark."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QftLoraModel




install()

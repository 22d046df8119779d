"""PEFT's methods besides LoRA over quantized layers: what is done, what is refused, and why.

One rule for all: a method's own code for float linears runs over `LinearView`s, which every backend that can dequantize
gives. What that cannot make right is refused here, by method and never by backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import peft.mixed_model
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from qft.core.console import quiet_imports
from qft.core.quantizer import Quantizer
from qft.core.record import record_of
from qft.core.selection import linear_targets
from qft.core.structure import recomputes_activations
from qft.core.ties import check_parting, check_shared_modules, is_tied, settle_tie
from qft.errors import BadOption, UnsupportedOperation
from qft.lora.exact import merge_exactly
from qft.lora.generating import Generate
from qft.lora.guard import (
    as_it_was,
    check_called,
    check_every_name,
    check_not_nested,
    unknown_names_warned,
    warn_of_patterns,
)
from qft.lora.layer import DequantizedForward
from qft.lora.model import _quantized, all_or_nothing, check_saved_modules, note_configs, warn_of_loss
from qft.lora.noted import noted
from qft.lora.view import LinearView, shown_as_linears, take_off
from qft.lora.view_merging import allow_merging, available, is_over_view

BESIDE = frozenset(
    "CARTRIDGE CPT LN_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING TRAINABLE_TOKENS".split()
)
"""Methods that touch no weight of a linear layer."""

OVER_VIEWS = frozenset(
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GRALORA HIRA HRA IA3 LILY LOHA LOKR MISS OFT PEANUT POLY "
    "PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT".split()
)
"""Methods whose own code is right over `LinearView`s; `benchmarks/peft_methods.py` measured both lists."""

REFUSED = {
    "ADAPTION_PROMPT": "it moves the attention's layers to other names, under which the base cannot be saved and loaded",
    "GLORA": "PEFT puts it on layers of the very class nn.Linear alone",
    "OSF": "it keeps each weight's singular vectors in float, which takes more memory than the float weight",
    "SHADOW": "it hands pairs of states to the decoder's layers, which those of transformers do not take",
    "XLORA": "it puts PEFT's own LoRA layers on, which take codes for weights",
}
"""Methods that are refused over every backend, and why."""

UNCHECKPOINTED = frozenset({"CARTRIDGE", "POLY", "PREFIX_TUNING"})
"""Methods that do not work while activations are recomputed in the backward pass."""


def check_method(adapter: PeftConfig, quantizers: Iterable[Quantizer], checkpointing: bool = False) -> None:
    """Refuse, before anything changes, a method that is not known to be right over these quantizers.

    Raises:
        UnsupportedOperation: the method, or a quantizer that cannot give its weights as floats.
        BadOption: a method that does not go together with gradient checkpointing.
    """
    kind = adapter.peft_type.value
    if kind not in BESIDE | OVER_VIEWS:
        reason = REFUSED.get(kind, "it is not known to be right in PEFT")
        raise UnsupportedOperation(
            f"{kind} over quantized weights is refused: {reason}. LoRA works over every backend, and so do "
            "ADALORA, VERA, IA3, LOHA, OFT and others: see the page on methods in qft's documentation"
        )
    blind = next((q for q in quantizers if not q.capabilities.dequantize), None)
    if blind is not None and kind in OVER_VIEWS:
        raise UnsupportedOperation(
            f"{kind} computes with the weights as floats, and {blind!r} cannot give them (capability dequantize)"
        )
    if checkpointing and kind in UNCHECKPOINTED:
        raise BadOption(f"{kind} does not work with gradient checkpointing: pass use_gradient_checkpointing=False")


class OverQuantized(BaseTuner):
    """Any tuner of PEFT's, over `LinearView`s on models that qft marked; on others it is PEFT's own."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        record = record_of(model)
        if record is not None:  # some tuners do more here than to inject
            config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
            check_method(config, record.quantizers.values(), recomputes_activations(model))
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        note_configs(self)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        record = record_of(model)
        if record is None:
            return super()._pre_injection_hook(model, config, adapter_name)
        check_method(config, record.quantizers.values())
        if getattr(config, "modules_to_save", None):
            check_saved_modules(model, config)  # type: ignore[arg-type]
        if getattr(config, "target_modules", None) == "all-linear":
            config.target_modules = set(linear_targets(model, _quantized))
        with shown_as_linears(model, native=False):
            super()._pre_injection_hook(model, config, adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        record = record_of(model)
        if record is None:
            return super().inject_adapter(model, adapter_name, *args, **kwargs)
        check_not_nested(model, adapter_name)
        if not self.peft_config[adapter_name].inference_mode:
            with unknown_names_warned():
                check_every_name(model, self.peft_config[adapter_name])
            warn_of_patterns(model, self.peft_config[adapter_name])
            check_called(model, self.peft_config[adapter_name])
        native = record.forward == "native"
        with as_it_was(model), quiet_imports(), shown_as_linears(model, native):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        for layer in _view_layers(model):
            allow_merging(layer)
            layer.train(layer.get_base_layer().training)  # a new layer would train in a model in eval mode
        merge_exactly(model)
        self.peft_config[adapter_name] = noted(self.peft_config[adapter_name], model)
        DequantizedForward.take_off(model)
        if not native:
            DequantizedForward.put_on(model)
        Generate.put_on(model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, LinearView):  # unloading
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        with _without_marks(self.model):
            super()._check_merge_allowed()

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise what a merge would raise, before the first weight changes."""
        self._check_merge_allowed()
        check_shared_modules(self.model)
        for layer in _view_layers(self.model):
            layer.check_merge(available(layer, adapter_names))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self.check_merge(adapter_names)
        merge_exactly(self.model)
        with all_or_nothing(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:  # fmt: skip
        if merge:
            self.check_merge(adapter_names)
            check_parting(self.model)
            merge_exactly(self.model)
        layers, was_tied = _view_layers(self.model), is_tied(self.model)
        with as_it_was(self.model), all_or_nothing(self.model), _without_marks(self.model):
            model = super()._unload_and_optionally_merge(
                merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
            take_off(model)
        DequantizedForward.take_off(model)
        Generate.take_off(model)
        record = record_of(self.model)
        if record is not None and merge:
            settle_tie(model, was_tied=was_tied)
        merges = [m.last_merge for m in layers if m.merged and m.last_merge is not None]
        if record is not None and merges:
            record.base_changed = record.merged = True
            warn_of_loss(merges)
        return model


_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


@contextmanager
def _without_marks(model: nn.Module) -> Iterator[None]:
    """Hide the marks by which PEFT's methods refuse to merge into quantized weights: qft's layers can."""
    kept = {name: model.__dict__.pop(name) for name in _MARKS if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(kept)


def _view_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if is_over_view(m)]


class QftMixedModel(MixedModel):
    """PEFT's mixture of methods, whose layers take codes for weights: refused on models that qft marked."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        if record_of(model) is not None:
            raise UnsupportedOperation(
                "mixed=True over quantized weights is refused: PEFT's mixture puts its own layers on, which take codes for "
                "weights. Several adapters of one method work: model.add_adapter(name, config)"
            )
        super().__init__(model, *args, **kwargs)


def install() -> None:
    """Put a tuner of ours, `Qft...`, in the place of each of PEFT's, LoRA's apart."""
    for kind, cls in list(PEFT_TYPE_TO_TUNER_MAPPING.items()):
        if kind != PeftType.LORA and issubclass(cls, BaseTuner) and not issubclass(cls, OverQuantized):
            name = f"Qft{cls.__name__}"
            globals()[name] = type(
                name, (OverQuantized, cls), {"__module__": __name__, "__doc__": OverQuantized.__doc__}
            )
            PEFT_TYPE_TO_TUNER_MAPPING[kind] = globals()[name]
    peft.mixed_model.MixedModel = QftMixedModel


install()

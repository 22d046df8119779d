"""quantize → prepare_model_for_kbit_training → wrap; `quantize_and_wrap` is those three."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from qft.core import record as marks
from qft.core.adopt import adopt
from qft.core.console import say
from qft.core.modes import normal_mode, without_inference_tensors
from qft.core.originals import Originals
from qft.core.quantizer import Quantizer
from qft.core.registry import parse_spec
from qft.core.structure import recomputes_activations
from qft.data.calibration import batches
from qft.data.collect import collect
from qft.data.statistics import StatisticsKind
from qft.errors import BadOption, NeedsCalibration, QftWarning, UnsupportedOperation
from qft.lora.exact import merge_exactly
from qft.lora.experts import adapted_weights
from qft.lora.guard import as_it_was, check_every_name, check_names, refused_by_peft, rehearse
from qft.lora.inits import AdapterInit, InitRun, need_original, resolve_init, settle_auto
from qft.lora.inits.run import no_statistics
from qft.lora.layer import DequantizedForward
from qft.lora.model import (
    all_linear,
    check_config,
    check_groups,
    check_saved_modules,
    check_tokens,
    fill_targets,
    targeted,
)
from qft.lora.prompts import prepare_prompts
from qft.lora.tuners import check_method
from qft.pipeline.prepare import prepare_model_for_kbit_training
from qft.pipeline.quantize import quantize_as, warn_unused_calibration


def default_adapter() -> LoraConfig:
    """`LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")`."""
    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")


def wrap(
    model: nn.Module,
    adapter: PeftConfig | None = None,
    *,
    init: Any = None,
    original: Any = None,
    calibration: Any = None,
    tokenizer: Any = None,
    forward: str = "dequantize",
) -> PeftModel:
    """Put trainable adapters on a quantized model, whoever quantized it.

    Args:
        model: a quantized model; prepare it with `prepare_model_for_kbit_training` before or after.
        adapter: a PEFT config; default LoRA of rank 16 on all linear layers.
        init: where the adapters start: None (B = 0), "loftq", "qera", "qera-full", "pissa", "olora", "auto", an
            object such as `qft.LoftQ(steps=5)`, a name that `qft.register_init` knows, or a function. It wins over
            the config's `init_lora_weights` and `loftq_config`. The returned model's `init_report` says what it did.
        original: the float model, or its folder, for inits that need float weights that are gone.
        calibration, tokenizer: data for inits that need activation statistics, as `qft.Calibration` takes it. They are
            those of `original` where that is a model in memory, else of the quantized model.
        forward: "dequantize" computes x @ dequantize().T in training and in evaluation, so that what was trained is
            what is merged. "native" takes the vendor's forward, whose error bounds merges do not have.

    Returns:
        A `peft.PeftModel`, ready for any trainer.

    Raises:
        BadOption, BadShape, NoTargets: the config. UnsupportedOperation: a method that PEFT gets wrong over this
        backend. NeedsOriginal, NeedsCalibration: the init. The model is as it was.
    """
    if forward not in ("dequantize", "native"):
        raise BadOption(f"forward={forward!r}; it is dequantize or native")
    record = adopt(model)
    if record is None:
        raise BadOption("this model is not quantized: call qft.quantize first, or qft.quantize_and_wrap")
    if hasattr(model, "peft_config"):
        raise BadOption("this model has adapters already: model.add_adapter(name, config) adds another")
    adapter = _adapter(adapter)
    if not is_lora(adapter):
        if init is not None:
            raise BadOption(f"init={init!r} is for LoRA adapters, not for {adapter.peft_type.value}")
        return _wrap_other(model, adapter, record, forward)
    chosen, adapter = resolve_init(init, adapter)
    check_adapter(model, adapter)
    chosen = _settle_auto(chosen, calibration, floats=original is not None)
    if calibration is not None and (chosen is None or chosen.needs is None):
        warn_unused_calibration()
    run = None
    if chosen is not None:
        _check_init(chosen, adapter, record.quantizers.values(), calibration)
        if original is None:
            raise need_original(chosen)
        run = InitRun(chosen, adapter, model)
        originals, groups = Originals.of(original, record), None
        if chosen.needs is not None:
            source = original if isinstance(original, nn.Module) else model
            for name in run.quantized_targets() if source is original else ():
                originals(name)  # it has every layer
            read = batches(calibration, tokenizer, model=source)
            groups = collect(source, run.quantized_targets(), read, chosen.needs)
        run.run_over(originals, groups)
    try:
        return _wrap_lora(model, adapter, run, record, forward)
    except BaseException:
        if run is not None:
            run.undo()
        raise


def _adapter(adapter: PeftConfig | None) -> PeftConfig:
    if adapter is None:
        return default_adapter()
    if not isinstance(adapter, PeftConfig):
        raise BadOption(
            f"adapter= is a PEFT config, such as LoraConfig(r=16, target_modules='all-linear'), not {adapter!r}"
        )
    return adapter


def is_lora(adapter: PeftConfig) -> bool:
    """Return whether an adapter config is of LoRA itself."""
    return adapter.peft_type == PeftType.LORA  # AdaLoRA's config is a subclass of LoraConfig


def check_adapter(model: nn.Module, adapter: LoraConfig) -> None:
    """Everything that can be wrong with a LoRA config over this model; targets that were left open are filled in."""
    check_config(adapter)
    check_tokens(model, adapter)
    fill_targets(model, adapter)
    check_every_name(model, adapter)
    check_saved_modules(model, adapter)
    targeted(model, adapter)
    check_groups(model, adapter)


def _named_targets(model: nn.Module, adapter: PeftConfig) -> PeftConfig:
    """The config with the layers that qft means by "all-linear": PEFT's own choice over a float model is another."""
    if not is_lora(adapter) or adapter.target_modules != "all-linear":
        return adapter
    named = copy.copy(adapter)
    named.target_modules = set(all_linear(model, adapter))
    return named


def _settle_auto(chosen: AdapterInit | None, calibration: Any, floats: bool) -> AdapterInit | None:
    settled = settle_auto(chosen, data=calibration is not None, floats=floats)
    if settled is None and chosen is not None:
        warnings.warn(
            "init='auto' starts at B = 0: the float weights are gone; original= gives them", QftWarning, stacklevel=3
        )
    return settled


def _check_init(init: Any, adapter: LoraConfig, quantizers: Iterable[Quantizer], calibration: Any) -> None:
    if adapter.use_qalora:
        raise UnsupportedOperation(
            f"{init!r} fits adapters as wide as the weight, and group-pooled ones (use_qalora) are not: leave init out"
        )
    quantizers = list(quantizers)
    if init.needs and adapter.target_parameters:
        raise UnsupportedOperation(no_statistics(init))
    if init.needs not in (None, "diagonal", "full"):
        raise BadOption(f"{init!r}: needs={init.needs!r}; it is None, 'diagonal' or 'full'")
    if init.needs is not None and calibration is None:
        raise NeedsCalibration(
            f"{init!r} weighs the error by what the layers read: pass calibration= (texts with tokenizer=, batches, a "
            "dataset), or start with init='loftq', which needs no data"
        )
    bits = getattr(init, "bits", None)
    have = {q.capabilities.bits for q in quantizers}
    if bits is not None and have != {bits}:
        raise BadOption(
            f"loftq_bits={bits}, and the model has {', '.join(f'{b:g}' for b in sorted(have))} bits a weight"
        )
    for q in quantizers:
        if not q.capabilities.loftq:
            raise UnsupportedOperation(
                f"{init!r} compares with the quantized weight, which {q!r} cannot give as floats"
            )
        if init.changes_base and not q.capabilities.iterated_loftq:
            raise UnsupportedOperation(
                f"{init!r} changes the quantized weights, which {q!r} cannot do (capability iterated_loftq); one step, "
                "qft.LoftQ(), leaves them alone"
            )
    if 0 in (adapter.lora_alpha, *(adapter.alpha_pattern or {}).values()):
        raise BadOption(f"lora_alpha is 0: the adapter could never do anything, and {init!r} cannot fit it")


def _wrap_lora(
    model: nn.Module, adapter: LoraConfig, run: InitRun | None, record: marks.Record, forward: str
) -> PeftModel:
    before, record.forward = record.forward, forward
    try:
        with as_it_was(model), refused_by_peft(), normal_mode():
            without_inference_tensors(model)
            peft_model = get_peft_model(model, adapter)
            merge_exactly(peft_model)
            if run is not None:
                run.apply(peft_model, "default")
    except BaseException:
        record.forward = before
        raise
    return peft_model


def _wrap_other(model: nn.Module, adapter: PeftConfig, record: marks.Record, forward: str) -> PeftModel:
    check_method(adapter, record.quantizers.values(), recomputes_activations(model))
    check_names(model, adapter)
    check_every_name(model, adapter)
    before, record.forward = record.forward, forward
    try:
        with as_it_was(model), refused_by_peft(), normal_mode():
            without_inference_tensors(model)
            peft_model = get_peft_model(model, adapter)
            merge_exactly(peft_model)
            prepare_prompts(peft_model)
            if forward == "dequantize":
                DequantizedForward.put_on(model)
            return peft_model
    except BaseException:
        record.forward = before
        raise


def quantize_and_wrap(
    model_or_path: nn.Module | str | os.PathLike[str],
    quantizer: Any = "nf4",
    *,
    adapter: PeftConfig | None = None,
    init: Any = None,
    calibration: Any = None,
    tokenizer: Any = None,
    skip: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    forward: str = "dequantize",
    use_gradient_checkpointing: bool = True,
    progress: bool = True,
    **load_options: Any,
) -> PeftModel:
    """Quantize a model, prepare it, and put trainable adapters on it: `quantize`, `prepare...`, `wrap` in one.

    Inits that need the float weights see each of them while it is quantized, so that no float copy is kept.

    Args:
        dtype: for a path: of what is loaded; "auto" is the checkpoint's own. For a model in memory: "auto" leaves it.
        use_gradient_checkpointing: as in `prepare_model_for_kbit_training`.
        (the others): as in `quantize` and `wrap`.

    Returns:
        A `peft.PeftModel`, ready for any trainer.

    Raises:
        What `quantize` and `wrap` raise; a refusal leaves a model in memory as it was.
    """
    if forward not in ("dequantize", "native"):
        raise BadOption(f"forward={forward!r}; it is dequantize or native")
    adapter, spec = _adapter(adapter), parse_spec(quantizer)
    quantizers = [q for q in spec.quantizers.values() if q is not None]
    run: InitRun | None = None
    if is_lora(adapter):
        chosen, adapter = resolve_init(init, adapter)
        check_config(adapter)
        floats = not isinstance(model_or_path, nn.Module) or adopt(model_or_path) is None
        chosen = _settle_auto(chosen, calibration, floats=floats)
        if chosen is not None:
            _check_init(chosen, adapter, quantizers, calibration)
            run = InitRun(chosen, adapter)
    elif init is not None:
        raise BadOption(f"init={init!r} is for LoRA adapters, not for {adapter.peft_type.value}")
    else:
        check_method(adapter, quantizers, use_gradient_checkpointing)
    if isinstance(model_or_path, nn.Module):
        if dtype != "auto":
            raise BadOption("dtype= is for loading from a path, and a model was given: cast it yourself, before")
        already = adopt(model_or_path)
        if hasattr(model_or_path, "peft_config"):
            raise BadOption("this model has adapters already: model.add_adapter(name, config) adds another")
        if already is not None and run is not None:
            raise need_original(run.init)
    else:
        load_options["dtype"] = dtype

    def prepare(model: nn.Module, targets: Iterable[str]) -> None:
        if is_lora(adapter):
            check_adapter(model, adapter)
            check_saved_modules(model, adapter, targets)
        else:
            check_names(model, adapter)
            check_every_name(model, adapter)
            if getattr(adapter, "modules_to_save", None):
                check_saved_modules(model, adapter, targets)  # type: ignore[arg-type]
        if model is model_or_path:
            rehearse(model, _named_targets(model, adapter))
        if run is not None:
            run.over(model)

    def needs() -> dict[str, StatisticsKind]:
        return dict.fromkeys(run.ranks, run.init.needs)

    model = quantize_as(
        model_or_path,
        spec,
        calibration=calibration,
        tokenizer=tokenizer,
        skip=skip,
        device=device,
        progress=progress,
        on_weight=run.on_weight if run is not None else None,
        prepare=prepare,
        needs=needs if run is not None and run.init.needs is not None else None,
        load_options=load_options,
    )
    with as_it_was(model):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing)
        record = marks.record_of(model)
        if not is_lora(adapter):
            return _wrap_other(model, adapter, record, forward)
        check_adapter(model, adapter)
        peft_model = _wrap_lora(model, adapter, run, record, forward)
    if progress and run is not None:
        say(f"  {run.report}")
    if progress:
        trainable, _ = peft_model.get_nb_trainable_parameters()
        say(f"  trainable: {trainable:,} parameters in {len(targeted_layers(peft_model))} layers")
    return peft_model


def targeted_layers(model: nn.Module) -> list[str]:
    """Names of the adapted layers."""
    return [n for n, _ in adapted_weights(model)]

"""The model of a run: loaded, quantized, with adapters."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import nn

from qft.core.console import first_sentence, without_deprecations
from qft.errors import AlreadyQuantized, BadFolder, QftWarning, UnsupportedOperation
from qft.optimize.optimize import optimize_training
from qft.pipeline.prepare import prepare_model_for_kbit_training
from qft.pipeline.quantize import quantize
from qft.pipeline.wrap import quantize_and_wrap, wrap
from qft.training.setup import AUTO, Prepared, step_memory

PEFT_TASK = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS", "vision-language": None}


def adapter_of(prepared: Prepared) -> Any:
    """The `LoraConfig` of a run."""
    from peft import LoraConfig

    config, alpha, targets = prepared.config, prepared.config.lora_alpha, prepared.config.target_modules
    if isinstance(targets, str) and targets != "all-linear" and all(c.isalnum() or c in "_,. " for c in targets):
        # autotrain's; else it is a regular expression
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type=PEFT_TASK[prepared.task],
    )


def float_dtype(prepared: Prepared) -> torch.dtype:
    """Choose the dtype of the float weights by config and device."""
    config, device = prepared.config, prepared.device
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if not config.peft or device.type == "cpu":
        return torch.float32  # weights that are trained keep what a small step adds
    return torch.bfloat16 if has_bf16(device) else torch.float16


def has_bf16(device: torch.device) -> bool:
    """Return whether the device calculates in bfloat16 without emulation."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_dtype(prepared: Prepared) -> str:
    """Return the dtype of autocast: "bf16", "fp16" or "no"."""
    config, device = prepared.config, prepared.device
    if config.mixed_precision != "auto":
        return config.mixed_precision
    return "no" if device.type == "cpu" else "bf16" if has_bf16(device) else "fp16"


def attention(prepared: Prepared) -> str | None:
    """attn_implementation; None leaves the choice to transformers, which takes SDPA where the model has it."""
    config = prepared.config
    asked = "flash_attention_2" if config.use_flash_attention_2 else config.attention
    here = importlib.util.find_spec("flash_attn") is not None and prepared.device.type == "cuda"
    if asked == "flash_attention_2" and not here:
        warnings.warn(
            "flash attention is not installed, or this is no CUDA device: SDPA is used (pip install flash-attn)",
            QftWarning,
            stacklevel=2,
        )
        return None
    if asked == "auto":
        return "flash_attention_2" if here and float_dtype(prepared) != torch.float32 else None
    return asked


def optimizes(prepared: Prepared) -> bool:
    """Return whether the run goes through `qft.optimize_training`."""
    config = prepared.config
    return config.optimize == "yes" or (
        config.optimize == "auto" and prepared.device.type == "cuda" and prepared.task == "causal-lm"
    )


def load_model(prepared: Prepared) -> nn.Module:
    """The model that a trainer takes: quantize → prepare → LoRA → optimize_training, as the configuration asks for.

    Raises:
        What `qft.quantize_and_wrap` and `qft.optimize_training` raise.
    """
    config = prepared.config
    if not config.peft:
        model = _float_model(prepared).to(prepared.device)
    elif prepared.stored is not None:
        model = _over_stored(prepared)
    elif config.quantization is None:
        model = _lora_over_floats(prepared)
    else:
        model = _quantized(prepared)
    if optimizes(prepared):
        optimize_training(model, memory=step_memory(config))
    return model


def _over_stored(prepared: Prepared) -> nn.Module:
    """Adapters over a folder that is quantized already."""
    from qft.training.stored import load_stored

    config, labels = prepared.config, prepared.labels if prepared.task == "classification" else None
    model = load_stored(config, prepared.device, float_dtype(prepared), labels, **_attention_options(prepared))
    _set_padding(model, prepared)
    if config.quantization is not None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*quantized in that way already")
                model = quantize(model, config.quantization, progress=False)
        except AlreadyQuantized as error:
            raise AlreadyQuantized(
                f"model: {config.model} is quantized ({prepared.stored}), and quantization={config.quantization!r} was "
                f"asked for: quantization=None trains adapters over it as it is ({error})"
            ) from error
    prepare_model_for_kbit_training(model, config.gradient_checkpointing)
    return wrap(model, adapter_of(prepared))


def _attention_options(prepared: Prepared) -> dict[str, Any]:
    implementation = attention(prepared)
    return {} if implementation is None else {"attn_implementation": implementation}


def _set_padding(model: Any, prepared: Prepared) -> None:
    """A classifier of a decoder reads the last token that is not padding."""
    if prepared.task == "classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = prepared.tokenizer.pad_token_id


def _quantized(prepared: Prepared) -> nn.Module:
    config = prepared.config
    options: dict[str, Any] = {}
    source: Any = config.model
    if prepared.task == "classification":
        source = _float_model(prepared)  # its head is new, which a folder's stream does not know
    else:
        options = {"dtype": float_dtype(prepared), **_attention_options(prepared)}
    return quantize_and_wrap(
        source,
        config.quantization,
        adapter=adapter_of(prepared),
        init=config.init,
        calibration=_calibration(prepared),
        device=prepared.device,
        use_gradient_checkpointing=config.gradient_checkpointing,
        progress=config.progress,
        **options,
    )


def _calibration(prepared: Prepared) -> Any:
    """Training rows, where the quantizer or the init reads any."""
    from qft.core.registry import parse_spec
    from qft.lora.inits import resolve_init

    config = prepared.config
    quantizers = [q for q in parse_spec(config.quantization).quantizers.values() if q is not None]
    init, _ = resolve_init(config.init, adapter_of(prepared))
    reads = getattr(init, "needs", None) is not None or config.init == "auto"
    if not reads and not any(q.capabilities.needs_calibration for q in quantizers):
        return None
    if prepared.task == "vision-language":
        raise UnsupportedOperation(
            "quantizers and inits that read data are not for vision-language training yet: take nf4, or init='loftq'"
        )
    rows = prepared.train.rows[: config.calibration_samples]
    keys = ("input_ids", "labels") if prepared.task == "seq2seq" else ("input_ids",)
    return [{key: torch.tensor([row[key]]) for key in keys} for row in rows]


def _lora_over_floats(prepared: Prepared) -> nn.Module:
    from peft import get_peft_model

    model = _float_model(prepared).to(prepared.device)
    if prepared.config.gradient_checkpointing:
        model.enable_input_require_grads()
    with without_deprecations():
        return get_peft_model(model, adapter_of(prepared))


def _float_model(prepared: Prepared) -> Any:
    import transformers

    from qft.pipeline.from_pretrained import WITHOUT_ADAPTER

    config = prepared.config
    options: dict[str, Any] = {
        "dtype": float_dtype(prepared),
        "adapter_kwargs": dict(WITHOUT_ADAPTER),
        **_attention_options(prepared),
    }
    if prepared.task == "classification":
        names = {i: str(name) for i, name in enumerate(prepared.labels)}
        options |= {"num_labels": len(names), "id2label": names, "label2id": {n: i for i, n in names.items()}}
    try:
        model = getattr(transformers, AUTO[prepared.task]).from_pretrained(config.model, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadFolder(
            f"model: transformers cannot load {config.model!r} for {prepared.task}: {first_sentence(error)}"
        ) from error
    _set_padding(model, prepared)
    return model

"""Freeze a quantized model and switch on what training over it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qft.core.adopt import adopt
from qft.core.enable_inputs import EnableInputs
from qft.core.modes import normal_mode
from qft.core.registry import quantizer_of
from qft.errors import BadOption


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: str = "none",
) -> nn.Module:
    """Freeze a quantized model and switch on what training over it needs, for every backend alike.

    Args:
        model: a model that `quantize`, or another tool, quantized.
        use_gradient_checkpointing: recompute activations in the backward pass, where the model's class knows how.
        gradient_checkpointing_kwargs: as `gradient_checkpointing_enable` takes them; default non-reentrant.
        auto_clear_cache: empty the accelerator's cache after an upcast.
        upcast: "none" leaves every dtype as it is: norms compute in float32 anyway, and a float32 norm weight turns
            the whole residual stream into float32. "norms" keeps norm weights in float32 and casts their outputs
            back. "all" is PEFT's way: every 16-bit parameter that is not quantized becomes float32.

    Returns:
        The same model.

    Raises:
        BadOption: an unknown `upcast`.
    """
    if upcast not in ("none", "norms", "all"):
        raise BadOption(f"upcast={upcast!r}; it is none, norms or all")
    adopt(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with normal_mode():
        if upcast == "all":
            _upcast_all(model)
        elif upcast == "norms":
            _upcast_norms(model)
    if upcast != "none" and auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if hasattr(model, "enable_input_require_grads"):
        EnableInputs(model).put_on()
    if use_gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        # transformers renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(kwargs)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return model


def _upcast_all(model: nn.Module) -> None:
    for module in model.modules():
        if quantizer_of(module) is not None:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()


def _upcast_norms(model: nn.Module) -> None:
    for module in model.modules():
        if "norm" not in type(module).__name__.lower() or list(module.children()):
            continue
        dtypes = {p.dtype for p in module.parameters(recurse=False)} & {torch.float16, torch.bfloat16}
        if not dtypes:
            continue
        module.float()
        module.register_forward_hook(_Cast(dtypes.pop()))


class _Cast:
    """A forward hook that casts a norm's output back; a class, so that models with it can be pickled."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output

"""Freeze a quantized model and switch on what training over it needs."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from qft import hf
from qft.errors import (
    BadOption,
)
from qft.modes import normal_mode
from qft.registry import quantizer_of


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
    hf.adopt(model)
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


def recomputes_activations(model: nn.Module) -> bool:
    """Return whether gradient checkpointing is on in any part of `model`.

    It reads the modules' flags: transformers renamed the property for them, and the old name goes in its version 6.
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class EnableInputs:
    """In place of a model's `enable_input_require_grads`, which trainers and PEFT call, too.

    transformers registers a local function, which cannot be pickled, and which fails where the embeddings return a tuple,
    as those of many vision models do.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def put_on(self) -> None:
        self.model.__dict__["enable_input_require_grads"] = self

    def __call__(self) -> None:
        """Have the output of every input embedding require gradients, once."""
        model = self.model
        handles, seen = [], set()
        for module in model.modules():
            embeddings = _input_embeddings(module)
            if embeddings is None or id(embeddings) in seen:
                continue
            seen.add(id(embeddings))
            if not any(isinstance(hook, _RequireGrads) for hook in embeddings._forward_hooks.values()):
                handles.append(embeddings.register_forward_hook(_RequireGrads(_changed_in_place(model, embeddings))))
        if handles:
            model._require_grads_hooks, model._require_grads_hook = handles, handles[0]


def _input_embeddings(module: nn.Module) -> nn.Module | None:
    if not hasattr(module, "get_input_embeddings"):
        return None
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


_IN_PLACE = re.compile(r"\b\w*(embed|hidden_states)\w*\s*[*+/-]=")


def _changed_in_place(model: nn.Module, embeddings: nn.Module) -> bool:
    """Whether the module that calls these embeddings may change their output in place, as CTRL and GIT do."""
    for module in model.modules():
        if any(child is embeddings for child in module._modules.values()):
            try:
                return _IN_PLACE.search(inspect.getsource(type(module).forward)) is not None
            except (OSError, TypeError):
                return False
    return False


class _RequireGrads:
    """A forward hook on embeddings; a class, so that models with it can be pickled.

    Args:
        copied: give a copy of the output, which may be changed in place, where a leaf of autograd may not.
    """

    def __init__(self, copied: bool = False):
        self.copied = copied

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        parts = output if isinstance(output, tuple | list) else (output,)
        for part in parts:
            if isinstance(part, Tensor) and part.is_leaf and part.is_floating_point() and not part.is_inference():
                part.requires_grad_(True)
        return output.clone() if self.copied and isinstance(output, Tensor) else None


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

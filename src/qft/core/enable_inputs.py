"""Make the outputs of input embeddings require gradients."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor, nn


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

"""Leave PyTorch's inference mode where tensors are made or changed that outlive it."""

from __future__ import annotations

from contextlib import ContextDecorator, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.registry import quantizer_of


class normal_mode(ContextDecorator):
    """Run a block, or a function, without gradients and outside of inference mode.

    Tensors that are made in inference mode can neither be trained through nor be changed outside of it.
    """

    def __init__(self) -> None:
        self._entered: list[ExitStack] = []

    def __enter__(self) -> normal_mode:
        stack = ExitStack()
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        self._entered.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    def _recreate_cm(self) -> normal_mode:
        return normal_mode()  # each call of a decorated function has its own


def without_inference_tensors(model: nn.Module) -> None:
    """Replace parameters and buffers that were made in inference mode by copies that can be trained through.

    Codes and constants of quantized layers stay: autograd never saves them, and copies would cost memory.
    """
    copies: dict[int, Tensor] = {}

    def normal(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copy: Tensor = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
                copy.__dict__.update(tensor.__dict__)
            copies[id(tensor)] = copy
        return copies[id(tensor)]

    with normal_mode():
        for module in model.modules():
            is_packed = quantizer_of(module) is not None
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.is_inference() and (name == "bias" or not is_packed):
                        held[name] = normal(tensor)

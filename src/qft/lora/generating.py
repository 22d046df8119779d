"""Generation by a model in training mode whose layers recompute activations: transformers drops their cache there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Generate:
    """In place of a model's `generate`: no layer recomputes activations meanwhile.

    Layers of transformers that do, in training mode, drop the cache but not the one token that goes with it, so that each
    new token would be predicted from the last one alone.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model's class does."""
        model: Any = self.model
        with without_recomputation(model):
            return type(model).generate(model, *args, **kwargs)

    @staticmethod
    def put_on(model: nn.Module) -> None:
        """Put it on a model that generates."""
        if hasattr(type(model), "generate"):
            model.__dict__["generate"] = Generate(model)

    @staticmethod
    def take_off(model: nn.Module) -> None:
        """Give a model the `generate` of its class back."""
        if isinstance(model.__dict__.get("generate"), Generate):
            del model.__dict__["generate"]


@contextmanager
def without_recomputation(model: nn.Module) -> Iterator[None]:
    """Run a block without gradient checkpointing in any layer."""
    flagged = [m for m in model.modules() if m.__dict__.get("gradient_checkpointing") is True]
    for module in flagged:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in flagged:
            module.gradient_checkpointing = True  # type: ignore[assignment]

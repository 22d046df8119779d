"""A run over a folder that is quantized already: what it can train, and its model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qft.core.adopt import adopt
from qft.core.classifiers import is_classifier, with_new_head
from qft.errors import BadFolder, BadOption, NeedsOriginal
from qft.pipeline.from_pretrained import load_quantized, stored_quantization
from qft.training.config import TrainConfig


def check_stored(config: TrainConfig) -> str | None:
    """Return the method of a folder that is quantized already, or None for a float one.

    Raises:
        BadOption: all weights are to be trained. NeedsOriginal: the adapter's start needs the float weights.
    """
    stored = stored_quantization(config.model, {})
    if stored is None:
        return None
    if not config.peft:
        raise BadOption(
            f"model: {config.model} is quantized ({stored}), and without peft all weights are trained, which have to be "
            "floats: give the float model, or train adapters over this one (peft=True, --peft)"
        )
    if config.init is not None:
        raise NeedsOriginal(
            f"model: {config.model} is quantized already ({stored}), and init={config.init!r} needs the float weights: give "
            "the float model, or leave init out"
        )
    return stored


def load_stored(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, labels: list[str] | None, **options: Any
) -> nn.Module:
    """Load a quantized folder as it is.

    Args:
        labels: of a classification: the names of its classes.
        **options: of `from_pretrained`.

    Raises:
        BadFolder: a folder that cannot be loaded. UnsupportedOperation: a model that transformers has no classifier of.
    """
    model = load_quantized(config.model, None, device, False, dtype=dtype, **options)
    if adopt(model) is None:
        raise BadFolder(f"{config.model} says that it is quantized, and no quantized layer was found in it")
    if labels is None:
        return model
    names = dict(enumerate(labels))
    if not is_classifier(model):
        return with_new_head(model, names)
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    return model

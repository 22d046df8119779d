"""Classifiers over quantized models that were stored with another head, such as a language model's."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from qft.core import transformers_quantizer
from qft.core.adopt import adopt
from qft.core.console import first_sentence
from qft.errors import BadFolder, BadOption, UnsupportedOperation


def is_classifier(model: nn.Module) -> bool:
    """Whether a model of transformers sorts texts into classes."""
    return "ForSequenceClassification" in type(model).__name__


def noted_classes(model: nn.Module) -> dict[str, list[str]]:
    """Return what an adapter's note says of a classifier: the names of its classes, by index."""
    config = getattr(model, "config", None)
    if not is_classifier(model) or config is None:
        return {}
    return {"classes": [str(config.id2label[i]) for i in range(config.num_labels)]}


def class_names(noted: Any, count: int) -> dict[int, str]:
    """Return the names of a head's classes: those noted, or transformers' own where the note has none that fit."""
    if isinstance(noted, list) and len(noted) == count and all(isinstance(name, str) for name in noted):
        return dict(enumerate(noted))
    return {i: f"LABEL_{i}" for i in range(count)}


def name_classes(model: Any, noted: Any) -> None:
    """Give a classifier the names of classes that an adapter's note holds."""
    if noted is not None and is_classifier(model):
        names = class_names(noted, model.config.num_labels)
        model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}


def float_classifier(path: str, count: int, options: dict[str, Any]) -> nn.Module:
    """Load the classifier of a float folder, whatever head the folder has.

    Args:
        count: of classes.
        options: of `from_pretrained`.

    Raises:
        BadFolder: transformers cannot load it.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        return AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=count, **{"dtype": "auto", **options}
        )
    except Exception as error:
        raise BadFolder(f"cannot load a classifier from {path}: {first_sentence(error)}") from error


def with_new_head(model: nn.Module, names: dict[int, str]) -> nn.Module:
    """Make a classifier of a quantized model: its body as it is, and a new head in float.

    Args:
        model: it must not be used afterwards, since the classifier takes its layers.
        names: of the classes, by index.

    Raises:
        UnsupportedOperation: transformers has no such classifier, or its body is another.
    """
    record = adopt(model)
    if record is None:
        raise BadOption("this model is not quantized: load it with AutoModelForSequenceClassification")
    floats = [p for p in model.parameters() if p.is_floating_point() and not p.is_meta]
    device, dtype = floats[0].device, getattr(model, "dtype", None) or floats[0].dtype
    made = _empty_twin(model, names, dtype)
    prefix = made.base_model_prefix
    old, new = getattr(model, prefix, None), getattr(made, prefix, None)
    if old is None or new is None:
        raise UnsupportedOperation(
            f"a {type(model).__name__} and its classifier have different bodies: give the float model"
        )
    _move(old, new, type(model).__name__)
    inside = {n: q for n, q in record.quantizers.items() if n.startswith(f"{prefix}.")}
    here = {n for n, _ in made.named_modules()}
    if not inside or any(n not in here for n in inside):
        raise UnsupportedOperation(
            f"the classifier of a {type(model).__name__} lacks quantized layers of its body: give the float model"
        )
    _initialize(made, device)
    made.requires_grad_(False)
    made.name_or_path = getattr(model, "name_or_path", "")
    kept = {n: f for n, f in record.fingerprint.items() if n in inside}
    transformers_quantizer.mark(made, dataclasses.replace(record, quantizers=inside, fingerprint=kept))
    return made.eval()


def _initialize(model: Any, device: torch.device) -> None:
    """Draw what has no values yet, as transformers does for a new head."""
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and all(t.is_meta for t in own):
            module.to_empty(device=device, recurse=False)
            with torch.no_grad():
                model._init_weights(module)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise UnsupportedOperation(f"{left[0]} of a {type(model).__name__} has no values: give the float model")


def _empty_twin(model: Any, names: dict[int, str], dtype: torch.dtype) -> Any:
    """The classifier that goes with a model, without values."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    for part in [config, *transformers_quantizer._sub_configs(config)]:
        for key in ("quantization_config", "_is_quantized"):
            part.__dict__.pop(key, None)
    config.num_labels = len(names)
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # models' own checks of their configs raise errors of any class
        raise UnsupportedOperation(
            f"transformers makes no classifier of a {type(model).__name__}: {first_sentence(error)}; take another model"
        ) from error


def _move(old: nn.Module, new: nn.Module, name: str) -> None:
    """Put the layers of one body into another."""
    missing = [key for key in new._modules if new._modules[key] is not None and old._modules.get(key) is None]
    if missing:
        raise UnsupportedOperation(
            f"the classifier of a {name} reads {missing[0]!r}, which this folder does not hold: give the float model"
        )
    for key in new._modules.keys() & old._modules.keys():
        new._modules[key] = old._modules[key]
    for key in new._parameters.keys() & old._parameters.keys():
        new._parameters[key] = old._parameters[key]
    for key in new._buffers.keys() & old._buffers.keys():
        new._buffers[key] = old._buffers[key]

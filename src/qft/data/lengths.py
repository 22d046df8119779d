"""How many tokens a model has positions for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Positions:
    """The longest sequences that a model takes; None where it has no limit.

    Attributes:
        source: of what the model reads: an encoder-decoder's encoder, or the only sequence of other models.
        target: of what an encoder-decoder writes.
    """

    source: int | None
    target: int | None


def positions_of(model: nn.Module) -> Positions:
    """Return the positions of a model by its config, less those that its position embeddings keep for padding."""
    source, target = _configured(getattr(model, "config", None))
    if source is None:
        return Positions(source, target)
    kept = _kept(model, source)
    return Positions(source - kept, None if target is None else target - kept)


def positions_of_config(config: Any, auto_class: Any) -> Positions:
    """Return the positions of the model that a config describes, of which no weight is made.

    Args:
        auto_class: transformers' class of the task, such as `AutoModelForSequenceClassification`.
    """
    source, target = _configured(config)
    if source is None or _rotary(config):
        return Positions(source, target)
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=False)
    except Exception:  # code of its own, or a model that needs values: the config's number holds
        return Positions(source, target)
    kept = _kept(model, source)
    return Positions(source - kept, None if target is None else target - kept)


def counts_from_padding(model: nn.Module) -> bool:
    """Whether a model counts positions from behind the padding token's id, so that its config must keep that id."""
    source, _ = _configured(getattr(model, "config", None))
    return source is not None and _kept(model, source) > 0


def _configured(config: Any) -> tuple[int | None, int | None]:
    """The numbers of positions that a config names, of the source and of the target."""
    if config is None:
        return None, None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = _first(text, KEYS)
    source = _first(config, ("max_encoder_position_embeddings",)) or found
    return source, _first(config, ("max_decoder_position_embeddings", "max_target_positions")) or found


def _first(config: Any, keys: tuple[str, ...]) -> int | None:
    values = [getattr(config, key, None) for key in keys]
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 1), None)


def _rotary(config: Any) -> bool:
    """Whether positions are computed, so that there is no embedding of positions to look at."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "position_embedding_type", "rotary") == "absolute":  # ESM has either
        return False
    return bool(getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None))


def _kept(model: nn.Module, positions: int) -> int:
    """How many embeddings of positions come before the first token's.

    RoBERTa and its relatives count positions from behind the padding token's id.
    """
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        weight = getattr(module, "weight", None)
        if "position" not in name.rpartition(".")[2] or not isinstance(padding, int) or weight is None:
            continue
        if len(weight) == positions:
            return padding + 1
    return 0

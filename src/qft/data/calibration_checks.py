"""Whether calibration batches fit the model that reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qft.data.lengths import Positions
from qft.errors import BadOption, NeedsCalibration

Batch = dict[str, Any]


def check(found: list[Batch], model: nn.Module | None, positions: Positions) -> None:
    """Check batches against the model that will read them; empty ones are removed.

    Raises:
        NeedsCalibration: there are no tokens. BadOption: token ids, values, masks or lengths that do not fit.
    """
    _check_values(found, model)
    for batch in found:
        _check_masks(batch)
        _check_lengths(batch, positions, is_encoder_decoder(model))


def _check_values(found: list[Batch], model: nn.Module | None) -> None:
    if not any(_counts(batch) for batch in found):
        raise NeedsCalibration(
            "the calibration data holds no tokens: it is empty, or an iterator that was read to its end before; give a "
            "list, or a fresh iterator"
        )
    found[:] = [batch for batch in found if _counts(batch)]
    size = _vocabulary(model) if model is not None else None
    for batch in found:
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise BadOption(f"the calibration data's {key} holds NaN or infinity")
        for key in ("input_ids", "decoder_input_ids", *(["labels"] if is_encoder_decoder(model) else [])):
            ids = batch.get(key)
            if ids is None or not ids.numel():
                continue
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise BadOption(f"the calibration data's {key} are {ids.dtype}: token ids are integers")
            ids = batch[key] = ids.long()
            if key == "labels":  # what an encoder-decoder makes its decoder's ids of; -100 is one that does not count
                ids = ids.masked_fill(ids == -100, 0)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or (size is not None and high >= size):
                raise BadOption(
                    f"the calibration data's {key} hold the token id {low if low < 0 else high}, and the model has embeddings "
                    f"for 0 to {size - 1 if size else '...'}: it was tokenised for another model"
                )


def _check_masks(batch: Batch) -> None:
    """Refuse a mask that is not (batch, sequence): the statistics could not tell which tokens it leaves out."""
    for key, names in (
        ("attention_mask", ("input_ids", "inputs_embeds", "input_values")),
        ("decoder_attention_mask", ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids")),
    ):
        mask = batch.get(key)
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise BadOption(f"the calibration data's {key} is {shape}, and a mask is (batch, sequence)")
        masked = next((batch[n] for n in names if isinstance(batch.get(n), Tensor)), None)
        if masked is not None and mask.shape != masked.shape[:2]:
            raise BadOption(
                f"the calibration data's {key} is {tuple(mask.shape)}, and the tokens that it belongs to are "
                f"{tuple(masked.shape[:2])}: give a mask of the same shape"
            )
        if mask.is_floating_point() and (mask < 0).any():
            raise BadOption(
                f"the calibration data's {key} holds negative values: a mask is 1 for tokens, 0 for padding"
            )


def _check_lengths(batch: Batch, positions: Positions, two_sided: bool) -> None:
    """Refuse sequences that the model has no positions for."""
    limits = {"input_ids": positions.source, "inputs_embeds": positions.source}
    limits |= {"decoder_input_ids": positions.target, "decoder_inputs_embeds": positions.target}
    if two_sided:
        limits["labels"] = positions.target
        if not batch.keys() & {"decoder_input_ids", "decoder_inputs_embeds", "labels"}:  # `call` takes the input
            limits["input_ids"] = min((p for p in (positions.source, positions.target) if p is not None), default=None)
    for key, limit in limits.items():
        value = batch.get(key)
        if limit is not None and isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] > limit:
            raise BadOption(
                f"the calibration data's {key} hold a sequence of {value.shape[1]} tokens, and the model has {limit} "
                "positions: cut it, or give texts with a tokenizer, which are cut"
            )
    places = batch.get("position_ids")
    if positions.source is not None and isinstance(places, Tensor) and places.numel():
        if int(places.max()) >= positions.source:
            raise BadOption(
                f"the calibration data's position_ids go to {int(places.max())}, and the model has {positions.source} "
                "positions"
            )


def _counts(batch: Batch) -> bool:
    """Whether a batch holds anything to learn from."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and not mask.any():
        return False
    if "input_ids" in batch:
        return batch["input_ids"].numel() > 0
    return any(isinstance(v, Tensor) and v.numel() > 0 for k, v in batch.items() if k != "attention_mask")


def _vocabulary(model: nn.Module) -> int | None:
    try:
        return model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def is_encoder_decoder(model: nn.Module | None) -> bool:
    """Return whether the model's config says that it is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

"""Calibration data in, batches and activation statistics out; one pass over the model serves every consumer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qft.data.calibration_checks import Batch, check, is_encoder_decoder
from qft.data.lengths import Positions, positions_of
from qft.data.tokens import Tokens
from qft.errors import BadOption


@dataclass(frozen=True)
class Calibration:
    """Calibration data with its own settings, for `calibration=` and `data=`.

    Args:
        data: texts, tokenised sequences or batches, a `datasets.Dataset`, a DataLoader, or any iterable of these. Of a
            tuple of tensors the first is read, and its others are not: a mask needs a batch that is a dict. A mask has the
            shape of its token ids, (batch, sequence), and no sequence is longer than the model's positions.
        tokenizer: for texts.
        samples: sequences to read at most.
        length: tokens of a sequence that is cut from texts; no more than the model has positions for.
        batch_size: sequences that are run together, where the data comes without batches.
    """

    data: Any
    tokenizer: Any = None
    samples: int = 128
    length: int = 512
    batch_size: int = 4

    def __post_init__(self):
        for name in ("samples", "length", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BadOption(f"calibration: {name}={value!r}; it is a positive integer")


def batches(data: Any, tokenizer: Any = None, *, model: nn.Module | None = None, **settings: int) -> list[Batch]:
    """What a caller gave as data, as keyword arguments for the model's forward, on the host.

    Texts are tokenised, joined, and cut into full windows; only a last piece of at least a quarter of a window, or the
    only one, is kept short. Everything else is taken as it is.

    Args:
        data: what `Calibration` takes, or a `Calibration`.
        tokenizer: for texts.
        model: to check the token ids against.
        **settings: defaults of `Calibration` (samples, length, batch_size) for data that is none.

    Raises:
        NeedsCalibration: no tokens: empty texts, an iterator that was read before, masks of zeros only.
        BadOption: data of another kind, texts without a tokenizer, ids that the model has no embedding for, NaN, an
            attention mask that does not fit its tokens, or a sequence longer than the model's positions.
    """
    if not isinstance(data, Calibration):
        data = Calibration(data, tokenizer, **settings)
    elif data.tokenizer is None:
        data = replace(data, tokenizer=tokenizer)
    positions = Positions(None, None) if model is None else positions_of(model)
    longest = min((p for p in (positions.source, positions.target) if p is not None), default=data.length)
    if longest < data.length:
        data = replace(data, length=longest)
    found = list(_stacked(_items(data), data))
    check(found, model, positions)
    return found


def _items(calibration: Calibration) -> Iterator[tuple[Batch, bool]]:
    """Batches, and single sequences without a batch dimension (True), as many sequences as were asked for."""
    left, data = calibration.samples, calibration.data
    if isinstance(data, str) and os.path.exists(data):
        raise BadOption(f"calibration data {data!r} is the name of a file: give what it holds")
    if isinstance(data, np.ndarray) and data.dtype.kind in "biuf":
        data = _tensor(data, "data")
    if isinstance(data, str | Mapping) or (isinstance(data, Tensor) and data.ndim == 1) or _all(data, int):
        data = [data]
    if not isinstance(data, Iterable) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        data = map(data.__getitem__, range(len(data)))  # a torch Dataset
    if not isinstance(data, Iterable):
        raise BadOption(
            f"calibration data is texts, token ids, batches, a dataset or a DataLoader, not a {type(data).__name__}"
        )
    for batch, single in _windows(data, calibration):
        rows = 1 if single else _rows(batch)
        if rows > left and all(v.ndim and len(v) == rows for v in batch.values() if isinstance(v, Tensor)):
            batch = {k: v[:left] if isinstance(v, Tensor) else v for k, v in batch.items()}
            rows = left
        yield batch, single
        left -= rows
        if left <= 0:
            return


def _windows(data: Iterable[Any], calibration: Calibration) -> Iterator[tuple[Batch, bool]]:
    pending: list[int] = []  # tokens of texts, not yet a window
    cut = count = 0
    tokens: Tokens | None = None
    for item in data:
        texts = _texts(item)
        if texts is None:
            yield _as_batch(item)
            continue
        for text in texts:
            count += 1
            tokens = tokens or _tokenizer(calibration.tokenizer)
            pending += _tokens(text, tokens, f"text {count} of the calibration data")
            while len(pending) >= calibration.length:
                yield {"input_ids": torch.tensor(pending[: calibration.length])}, True
                del pending[: calibration.length]
                cut += 1
    if pending and (not cut or 4 * len(pending) >= calibration.length):
        yield {"input_ids": torch.tensor(pending)}, True


def _texts(item: Any) -> list[str] | None:
    """The texts of an item, or None where it holds tokens."""
    if isinstance(item, Mapping) and "input_ids" not in item:
        columns = [
            k
            for k, v in item.items()
            if isinstance(v, str) or _all(v, str) or (k == "text" and isinstance(v, list) and not v)
        ]
        column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
        if column is not None:
            item = item[column]
        elif columns or not any(isinstance(v, Tensor | np.ndarray) for v in item.values()):
            raise BadOption(
                f"which column of the calibration data to read? It has {', '.join(map(str, item))}: name it 'text', or "
                "tokenise it to 'input_ids'"
            )
    if isinstance(item, str):
        return [item]
    return list(item) if _all(item, str) or (isinstance(item, list) and not item) else None


def _all(value: Any, kind: type) -> bool:
    """Whether a value is a list of nothing but this kind."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, kind) for v in value)


def _tokenizer(tokenizer: Any) -> Tokens:
    if tokenizer is None:
        raise BadOption("the calibration data is texts: pass tokenizer= too")
    if not callable(tokenizer):
        raise BadOption(f"tokenizer={tokenizer!r:.100} cannot be called: pass the tokenizer itself")
    return Tokens(tokenizer)


def _tokens(text: str, tokens: Tokens, where: str) -> list[int]:
    if not text.strip():
        return []
    ids = tokens(text, where=where, verbose=False)
    end = getattr(tokens.tokenizer, "eos_token_id", None)
    return ids if end is None or tokens.ends(ids) else [*ids, end]


def _as_batch(item: Any) -> tuple[Batch, bool]:
    """An item as keyword arguments, and whether it is one sequence without a batch dimension."""
    if isinstance(item, Mapping):
        batch = {}
        for key, value in item.items():
            if isinstance(value, np.ndarray) or (isinstance(value, list | tuple) and not _foreign(value)):
                value = _tensor(value, key)
            if isinstance(value, Tensor) or key in ("use_cache", "return_dict"):
                batch[key] = value.detach().cpu() if isinstance(value, Tensor) else value
        ids = batch.get("input_ids")
        return batch, ids is not None and ids.ndim == 1
    if isinstance(item, list) and _all(item, Tensor) and item[0].ndim == 1:
        item = _stack(item)
    elif isinstance(item, list | tuple) and item and isinstance(item[0], Tensor) and item[0].ndim > 0:
        item = item[0]  # a TensorDataset's rows: the ids come first
    value = item.detach().cpu() if isinstance(item, Tensor) else _tensor(item, "input_ids")
    if value.ndim not in (1, 2):
        raise BadOption(f"token ids are (sequence,) or (batch, sequence), and these are {tuple(value.shape)}")
    return {"input_ids": value}, value.ndim == 1


def _foreign(value: list | tuple) -> bool:
    """Whether a column is none for a model: texts or messages beside the token ids."""
    return bool(value) and isinstance(value[0], str | Mapping)


def _tensor(value: Any, key: str) -> Tensor:
    if isinstance(value, list) and _all(value, Tensor) and value[0].ndim:
        return _stack(value)
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadOption(
            f"calibration: {key} is a {type(value).__name__} that is no tensor: give texts with a tokenizer, token ids, "
            f"or batches whose rows are equally long ({error})"
        ) from error
    return tensor.long() if tensor.numel() == 0 else tensor


def _stack(rows: list[Tensor]) -> Tensor:
    if len({r.shape for r in rows}) > 1:
        raise BadOption("calibration: a batch's rows are not equally long: pad them, with a mask, or give them singly")
    return torch.stack([r.detach().cpu() for r in rows])


def _rows(batch: Batch) -> int:
    ids = batch.get("input_ids")
    if ids is not None and ids.ndim:
        return len(ids)
    return max((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), default=1)


def _stacked(items: Iterable[tuple[Batch, bool]], calibration: Calibration) -> Iterator[Batch]:
    """Batches as they come; single sequences of one shape that follow each other become batches."""
    waiting: list[Batch] = []

    def flush() -> Iterator[Batch]:
        if waiting:
            yield {k: torch.stack([w[k] for w in waiting]) for k in waiting[0]}
            waiting.clear()

    def kind(batch: Batch) -> Any:
        return {k: (v.shape, v.dtype) for k, v in batch.items() if isinstance(v, Tensor)}

    for batch, single in items:
        if not single or (waiting and (kind(batch) != kind(waiting[0]) or len(waiting) == calibration.batch_size)):
            yield from flush()
        if single:
            waiting.append({k: v for k, v in batch.items() if isinstance(v, Tensor)})
        else:
            yield batch
    yield from flush()


def call(model: nn.Module, batch: Batch, device: torch.device | None = None) -> Any:
    """Run `model` on a batch of `batches`, without a cache; encoder-decoders read the input as their output too."""
    batch = {k: v.to(device) if isinstance(v, Tensor) and device is not None else v for k, v in batch.items()}
    config = getattr(model, "config", None)
    if is_encoder_decoder(model) and "input_ids" in batch:
        if "decoder_input_ids" not in batch and "labels" not in batch:
            batch["decoder_input_ids"] = batch["input_ids"]
    if config is not None and hasattr(config, "use_cache"):
        batch.setdefault("use_cache", False)
    return model(**batch)

"""Several sequences in one row, without any of them reading another.

transformers' own `DataCollatorWithFlattening` lays sequences end to end and restarts their positions, from which its
masks tell them apart. They do so only without a cache and without a padding mask, and only in models that go by
positions; where one of these fails, sequences read each other without a word. This collator adds what keeps that from
happening: `use_cache=False` in every batch, no padding mask, and a look at what the model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from qft.errors import BadOption, BadShape, UnsupportedOperation
from qft.ops.loss import IGNORE


class PackingCollator:
    """Pack the sequences of a batch into rows, each of which computes what the sequences alone would.

    >>> Trainer(model, args, train_dataset=data, data_collator=qft.PackingCollator(model, length=2048))

    Args:
        model: what the batches are for; a few tokens go through it to see that packed sequences stay apart.
        length: of every row, (rows, length): sequences go into the first row that has room, and what is left of a row
            is filled with tokens that no sequence reads and no label counts. None puts all of them into one row, as
            long as they are together.
        pad_token_id: what rows are filled with.

    Raises:
        UnsupportedOperation: in this model packed sequences read each other; pad them instead.
        BadOption: a `length` that is no positive integer.
    """

    def __init__(self, model: nn.Module, length: int | None = None, *, pad_token_id: int = 0):
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise BadOption(f"length={length!r}; it is a number of tokens, or None")
        self.length, self.pad_token_id = length, pad_token_id
        self._flatten = DataCollatorWithFlattening()
        _check(model, self)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Features with `input_ids`, and `labels` and `attention_mask` or not → a batch for the model.

        Returns:
            `input_ids`, `labels` and `position_ids`, int64 (rows, length), and `use_cache`, False. The first label of
            each sequence is -100: no sequence predicts the start of the next.

        Raises:
            BadShape: a sequence is longer than a row, or has another number of labels than tokens.
        """
        sequences = [s for s in map(_sequence, features) if s["input_ids"]]
        if not sequences:
            raise BadShape("there is no token in this batch: every sequence is empty or masked out")
        rows = [self._flatten(row) for row in self._rows(sequences)]
        if self.length is not None:
            rows = [self._filled(row) for row in rows]
        keys = ("input_ids", "labels", "position_ids")
        return {**{k: torch.cat([row[k] for row in rows]) for k in keys}, "use_cache": False}

    def _rows(self, sequences: list[dict[str, list[int]]]) -> list[list[dict[str, list[int]]]]:
        if self.length is None:
            return [sequences]
        rows: list[list[dict[str, list[int]]]] = []
        room: list[int] = []
        for sequence in sequences:
            size = len(sequence["input_ids"])
            if size > self.length:
                raise BadShape(
                    f"a sequence of {size} tokens does not fit into rows of {self.length}: truncate or split it"
                )
            at = next((i for i, left in enumerate(room) if left >= size), len(rows))
            if at == len(rows):
                rows.append([])
                room.append(self.length)
            rows[at].append(sequence)
            room[at] -= size
        return rows

    def _filled(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """What fills a row is a sequence of its own, since its positions start again."""
        left = self.length - row["input_ids"].shape[1]
        fill = {
            "input_ids": torch.full((1, left), self.pad_token_id),
            "labels": torch.full((1, left), IGNORE),
            "position_ids": torch.arange(left)[None],
        }
        return {k: torch.cat([row[k], v], dim=1) for k, v in fill.items()}


def _sequence(feature: Mapping[str, Any]) -> dict[str, list[int]]:
    def numbers(value: Any) -> list[int]:
        return value.tolist() if hasattr(value, "tolist") else list(value)

    ids = numbers(feature["input_ids"])
    labels = ids if feature.get("labels") is None else numbers(feature["labels"])
    mask = [1] * len(ids) if feature.get("attention_mask") is None else numbers(feature["attention_mask"])
    if not len(ids) == len(labels) == len(mask):
        raise BadShape(f"a sequence of {len(ids)} tokens has {len(labels)} labels and a mask of {len(mask)}")
    kept = [i for i, m in enumerate(mask) if m]
    return {"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]}


def _check(model: nn.Module, collator: PackingCollator) -> None:
    """Two pairs of short sequences whose second is the same: what comes out behind it has to be the same, too."""
    flatten = collator._flatten
    alone = [{"input_ids": [1, 2, 3, 1, 2]}]
    device = next(model.parameters()).device
    with _still(model), torch.no_grad():
        logits = []
        for first in ([], [{"input_ids": [3, 1, 2, 2]}], [{"input_ids": [2, 3, 3, 1]}]):
            batch = flatten(first + alone)
            inputs = {k: batch[k].to(device) for k in ("input_ids", "position_ids")}
            logits.append(model(**inputs, use_cache=False).logits[0, -5:].double())
    # of equal shapes, so that nothing but reading the first pair can make the second differ
    mixed = _apart(logits[1], logits[2])
    # of other shapes, which round otherwise: positions that go on instead of starting again show here
    moved = max(_apart(logits[0], other) for other in logits[1:])
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled()
    if not (mixed < (1e-3 if exact else 1e-2) and moved < (1e-3 if exact else 0.1)):
        raise UnsupportedOperation(
            f"packed sequences read each other in this {type(model).__name__}: its attention does not go by position_ids "
            "(another attn_implementation may); use a collator that pads, such as DataCollatorWithPadding"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / (a.std() + 1e-12))


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    training = {m for m in model.modules() if m.training}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = module in training

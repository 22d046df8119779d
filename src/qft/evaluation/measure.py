"""One pass over held-out sequences: next-token loss, and drift between two models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qft.core import record
from qft.data.calibration import Batch, call
from qft.errors import BadOption, UnsupportedDevice
from qft.evaluation.ranges import Range, Ranges, embeddings_of
from qft.evaluation.sequences import Sequence
from qft.lora.merging import drift

BINS = 32


@dataclass(frozen=True)
class Score:
    """Next-token loss of one model.

    Attributes:
        loss: mean negative log-likelihood of the tokens to be predicted, in nats; each token weighs the same.
        perplexity: exp(loss).
        tokens: how many were predicted.
        not_finite: for how many of them the logits hold NaN or infinity; the loss is NaN then.
    """

    loss: float
    tokens: int
    not_finite: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 or math.isnan(self.loss) else math.inf


@dataclass(frozen=True)
class SampleDrift:
    """How far a model's predictions are from its baseline's, over the tokens to be predicted of some sequences.

    Attributes:
        kl: mean KL(baseline ‖ model), in nats per token.
        mse: mean squared difference of the logits.
        agreement: the share of tokens for which both find the same token the most likely one.
        samples, tokens: how many sequences, and tokens in them, were compared.
        by_position: {"first-last position": mean KL}, at most 32 ranges of positions in the sequence, from 1.
    """

    kl: float
    mse: float
    agreement: float
    samples: int
    tokens: int
    by_position: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What one pass found."""

    score: Score
    baseline: Score | None
    drift: SampleDrift | None
    ranges: dict[str, Range]


def check_model(model: nn.Module, what: str = "the model") -> None:
    """Refuse what cannot be run as it is.

    Raises:
        BadOption, PartlyQuantized, UnsupportedDevice
    """
    record.record_of(model)
    base = record.base_model(model)
    for name, module in base.named_modules():
        if getattr(module, "merged_adapters", None) and getattr(module, "disable_adapters", False):
            raise BadOption(
                f"the adapter of {name} is merged and disabled, and PEFT takes it out of the weight at the next forward: "
                "enable the adapters, or call qft.unmerge(model), before"
            )
    if any(p.is_meta for p in base.parameters()):
        raise UnsupportedDevice(f"{what} has weights on the meta device, where they have no values")
    if next(base.parameters(), None) is None:
        raise BadOption(f"{what} has no parameters")


def measure(
    model: nn.Module,
    baseline: nn.Module | None,
    found: list[Sequence],
    *,
    samples: int,
    batch_size: int,
    progress: bool,
) -> Measured:
    """Run the models over the sequences, and compare them on the first `samples`.

    Raises:
        BadOption: token ids that a model has no embedding for, models that do not take this data, or of different
            vocabularies.
    """
    for which in (model, baseline) if baseline is not None else (model,):
        _check_ids(found, which)
    here, there = _Loss(), _Loss()
    compared = _Compared(max(len(s.ids if s.decoder is None else s.decoder) for s in found))
    ranges = Ranges(record.base_model(model))
    try:
        with drift.evaluated(*([model] if baseline is None else [model, baseline])):
            for part, sequences in _progress(_parts(found, samples, batch_size), len(found), progress):
                batch, counted, targets = _batch(sequences)
                ranges.mask = batch["attention_mask"].bool() if len(sequences) > 1 else None
                logits = _logits(model, batch, counted)
                ranges.mask = None
                ranges.add("logits", "", logits)
                here.add(logits, targets)
                if baseline is None:
                    continue
                other = _logits(baseline, batch, counted)
                if other.shape != logits.shape:
                    raise BadOption(
                        f"the model predicts one of {logits.shape[1]} tokens and the baseline one of {other.shape[1]}: "
                        "these are models of different vocabularies"
                    )
                there.add(other, targets)
                if part:
                    compared.add(other, logits, counted, len(sequences))
    finally:
        ranges.stop()
    return Measured(
        here.score(),
        there.score() if baseline is not None else None,
        compared.drift() if baseline is not None else None,
        ranges.result(),
    )


def _parts(found: list[Sequence], samples: int, size: int) -> Iterable[tuple[bool, list[Sequence]]]:
    """Batches, and whether they are of the first `samples`."""
    for part, sequences in ((True, found[:samples]), (False, found[samples:])):
        for start in range(0, len(sequences), size):
            yield part, sequences[start : start + size]


def _progress(parts: Iterable[tuple[bool, list[Sequence]]], total: int, shown: bool) -> Any:
    if not shown:
        yield from parts
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="evaluating", unit="sequence", leave=False) as bar:
        for part in parts:
            yield part
            bar.update(len(part[1]))


def _batch(sequences: list[Sequence]) -> tuple[Batch, Tensor, Tensor]:
    """Pad sequences on the right.

    Returns:
        The arguments of the forward pass; which positions' logits count, (batch, length); and what they should have
        predicted, (tokens,).
    """
    ids, mask = _padded([s.ids for s in sequences])
    batch = {"input_ids": ids, "attention_mask": mask}
    if sequences[0].decoder is not None:
        targets, counted = _padded([s.decoder or [] for s in sequences])
        batch["labels"] = targets.masked_fill(~counted.bool(), -100)
        return batch, counted.bool(), targets[counted.bool()]
    follow, _ = _padded([[int(c) for c in s.counted] for s in sequences])
    follow = follow.bool()
    return batch, follow.roll(-1, 1), ids[follow]  # the first token is never counted, so that nothing comes around


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return ids, mask


def _logits(model: nn.Module, batch: Batch, counted: Tensor) -> Tensor:
    """Logits at the counted positions, (tokens, vocabulary)."""
    try:
        out = call(model, batch, next(model.parameters()).device)
    except TypeError as error:
        raise BadOption(
            f"this {type(record.base_model(model)).__name__} does not take {', '.join(batch)}: {error}"
        ) from error
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < counted.shape[1]:
        name = type(record.base_model(model)).__name__
        raise BadOption(f"perplexity and drift need logits for each token, and this {name} gives none: leave out data=")
    logits = logits[:, logits.shape[1] - counted.shape[1] :]  # virtual tokens of prompt tuning come first
    return logits[counted.to(logits.device)]


def _check_ids(found: list[Sequence], model: nn.Module) -> None:
    embeddings = embeddings_of(record.base_model(model))
    count = getattr(embeddings, "num_embeddings", None)
    largest = max(max(s.ids + (s.decoder or [])) for s in found)
    smallest = min(min(s.ids + (s.decoder or [])) for s in found)
    if smallest < 0 or (isinstance(count, int) and largest >= count):
        wrong = smallest if smallest < 0 else largest
        raise BadOption(f"the data has token id {wrong}, and the model has embeddings for 0 to {count - 1 if count else '?'}: "
                        "is the tokenizer that of another model?")  # fmt: skip


class _Loss:
    def __init__(self) -> None:
        self.total, self.tokens, self.broken = 0.0, 0, 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        rows = max(1, drift.CHUNK // logits.shape[1])
        for piece, wanted in zip(logits.split(rows), targets.to(logits.device).split(rows)):
            piece = piece.float()
            self.broken += int((~(piece < math.inf)).any(-1).sum())  # NaN too; -inf rules a token out
            self.total += float(F.cross_entropy(piece, wanted, reduction="none").double().sum())
        self.tokens += len(targets)

    def score(self) -> Score:
        return Score(math.nan if self.broken else self.total / self.tokens, self.tokens, self.broken)


class _Compared:
    """Sums of what `SampleDrift` gives the means of."""

    def __init__(self, length: int):
        self.kl = torch.zeros(length, dtype=torch.float64)
        self.count = torch.zeros(length, dtype=torch.float64)
        self.squared, self.same, self.samples = 0.0, 0, 0

    def add(self, baseline: Tensor, model: Tensor, counted: Tensor, samples: int) -> None:
        positions = counted.nonzero()[:, 1]
        kls = []
        for kl, squared, same in drift.compared(baseline, model):
            kls.append(kl.double().cpu())
            self.squared += float(squared.double().sum())
            self.same += int(same.sum())
        self.kl.index_add_(0, positions, torch.cat(kls))
        self.count.index_add_(0, positions, torch.ones(len(positions), dtype=torch.float64))
        self.samples += samples

    def drift(self) -> SampleDrift:
        tokens = int(self.count.sum())
        kl = float(self.kl.sum()) / tokens
        used = self.count.nonzero().flatten()
        first, last = int(used[0]), int(used[-1]) + 1
        size = math.ceil((last - first) / BINS)
        by_position = {}
        for start in range(first, last, size):
            end = min(start + size, last)
            if count := float(self.count[start:end].sum()):
                name = f"{start + 1}-{end}" if end > start + 1 else str(end)
                by_position[name] = float(self.kl[start:end].sum()) / count
        kl = max(0.0, kl) if not math.isnan(kl) else kl
        return SampleDrift(kl, self.squared / tokens, self.same / tokens, self.samples, tokens, by_position)

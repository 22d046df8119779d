"""How far a model's predictions move when it is merged: KL divergence and agreement on data, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.core import record
from qft.data.calibration import Batch, batches, call
from qft.errors import BadOption, NonFiniteWeights

HELD_BYTES = 2 * 2**30
"""Logits of the tuned model that are kept in host memory at a time, until the merged model has given its own."""

CHUNK = 2**24
"""Logits that are compared at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class Drift:
    """How far a merged model is from the tuned one, on some data.

    Attributes:
        kl: mean Kullback-Leibler divergence KL(tuned ‖ merged) of the predicted tokens, in nats per token.
        agreement: the share of tokens for which both find the same token the most likely one.
        tokens: how many tokens were counted: those that the attention mask shows.
    """

    kl: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2e} nats per token, the same first choice for {self.agreement:.1%} of {self.tokens} tokens"
        )


class Probe:
    """A model and data to compare it on with what becomes of it; the data is read and checked here.

    Args:
        data: anything that `qft.calibration.batches` takes.
        tokenizer: for texts.

    Raises:
        BadOption, NeedsCalibration: as `batches`.
    """

    def __init__(self, model: nn.Module, data: Any, tokenizer: Any = None):
        self.model = record.base_model(model)
        with _random_state_kept(self.model):  # a DataLoader draws a seed
            self.batches = batches(data, tokenizer, model=self.model)

    def to(self, other: nn.Module) -> Drift:
        """The drift from the model to another one."""
        meter = _Meter()
        with evaluated(self.model, other):
            for batch in self.batches:
                meter.add(token_logits(self.model, batch), token_logits(other, batch))
        return meter.drift()

    def after(self, routes: Mapping[str, Callable[[], Any]], undo: Callable[[], Any]) -> dict[str, Drift]:
        """The drift from the model to what each route makes of it; at the end it is what the last route made.

        Args:
            routes: name → changes the model in place.
            undo: takes such a change back, to the bit.
        """
        meters = {name: _Meter() for name in routes}
        left, changed = list(self.batches), False
        with evaluated(self.model):
            while left:
                if changed:
                    undo()
                held, size = [], 0
                while left and size < HELD_BYTES:
                    logits = token_logits(self.model, left[0]).cpu()
                    held.append((left.pop(0), logits))
                    size += logits.nbytes
                for name, change in routes.items():
                    if name != next(iter(routes)):
                        undo()
                    change()
                    changed = True
                    for batch, tuned in held:
                        meters[name].add(tuned, token_logits(self.model, batch))
        return {name: meter.drift() for name, meter in meters.items()}


class _Meter:
    """Sums of what `Drift` gives the means of."""

    def __init__(self):
        self.kl, self.same, self.tokens = 0.0, 0, 0

    def add(self, tuned: Tensor, merged: Tensor) -> None:
        """Take in the logits of the same tokens, both (tokens, vocabulary)."""
        for kl, _, same in compared(tuned, merged):
            self.kl += float(kl.double().sum())
            self.same += int(same.sum())
        self.tokens += len(tuned)

    def drift(self) -> Drift:
        if math.isnan(self.kl):
            raise NonFiniteWeights("the model's logits on this data hold NaN: there is no drift to measure")
        return Drift(max(0.0, self.kl / self.tokens), self.same / self.tokens, self.tokens)


def compared(reference: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Compare two models' logits token by token, in pieces, in bounded memory.

    For each token: KL(reference ‖ other) in nats, the mean squared difference of the logits, and whether the first choice
    is the same.

    Args:
        reference, other: logits of the same tokens, (tokens, vocabulary), on any devices.
    """
    rows = max(1, CHUNK // reference.shape[1])
    for p, q in zip(reference.split(rows), other.split(rows)):
        p, q = p.to(q.device).float(), q.float()
        same = p.argmax(-1) == q.argmax(-1)
        squared = (p - q).masked_fill_(p == q, 0).square_().mean(-1)  # -inf on both sides: a token that is ruled out
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        # a token that cannot come adds nothing: 0 · log 0 is 0
        yield (p.exp() * (p - q)).masked_fill_(p == -math.inf, 0).sum(-1), squared, same


def token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of the tokens of a batch that its mask shows, (tokens, vocabulary), in the model's dtype.

    Raises:
        BadOption: the model gives no logits per token, or takes no such batch.
    """
    two_sided = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    given = {k: v for k, v in batch.items() if two_sided or k != "labels"}  # nobody asked for a loss
    try:
        out = call(model, given, next(model.parameters()).device)
    except TypeError as error:
        raise BadOption(f"this model does not take the data's {', '.join(given)}: {error}") from error
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise BadOption(
            f"data= compares logits per token, and this {type(model).__name__} gives none: merge without data="
        )
    mask = batch.get("attention_mask")
    if two_sided:
        mask = batch.get("decoder_attention_mask", None if "decoder_input_ids" in batch else mask)
        if "labels" in batch and "decoder_input_ids" not in batch:
            mask = batch["labels"] != -100
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
        return logits[mask.to(logits.device).bool()]
    return logits.flatten(0, 1)


@contextmanager
def evaluated(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and afterwards every module's mode and the random state as they were."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    with torch.no_grad(), _random_state_kept(*models):
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _random_state_kept(*models: nn.Module) -> Iterator[None]:
    devices = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
        yield

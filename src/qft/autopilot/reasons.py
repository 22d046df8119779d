"""Decisions of `qft.auto`, and the sentences that say why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qft.memory.report import GIB, Plan

if TYPE_CHECKING:
    from qft.training.setup import Prepared

ENOUGH_TOKENS = {"cpu": 512}
"""Tokens of a micro-batch beyond which a larger one is no faster: a CPU is busy with few; see also `enough_tokens`."""


@dataclass(frozen=True)
class Decision:
    """One thing that was decided: its name, its value as text, and a sentence that says why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Fit:
    """A micro-batch that fits."""

    name: str
    length: int
    batch: int
    recompute: bool
    plan: Plan


def enough_tokens(prepared: Prepared) -> int:
    """Tokens of a micro-batch beyond which a larger one is hardly faster."""
    return ENOUGH_TOKENS.get(prepared.device.type, 4096)


def rank_for(asked: int | None, learnt: int) -> tuple[int, str]:
    """Choose the rank by the number of tokens to learn.

    Returns:
        The rank, and the reason in one sentence.
    """
    if asked is not None:
        return asked, "It was given; alpha is twice the rank, so that the scaling does not depend on it."
    for rank, below in ((8, 20_000), (16, 5_000_000)):
        if learnt < below:
            return rank, (
                f"The data has {learnt:,} tokens to learn, below {below:,}: a higher rank would only fit their accidents; "
                "alpha is twice the rank."
            )
    return 32, f"The data has {learnt:,} tokens to learn, enough for a higher rank than 16; alpha is twice the rank."


def wanted_rows(rows: int) -> tuple[int, str]:
    """A power of two from 4 to 32 that leaves at least 25 steps an epoch, where there are so many rows."""
    found = min(32, max(4, 2 ** max(0, (rows // 25).bit_length() - 1)))
    return min(found, 2 ** (rows.bit_length() - 1)), (
        f"{rows:,} rows make {-(-rows // found):,} steps an epoch with {found} rows each, few enough rows for many steps"
    )


def why_quantizer(found: Fit, asked: str | None, tried: list[str], limit: int) -> str:
    """Return the reason for the chosen quantizer."""
    size = f"{gib(found.plan.needed)} of {gib(limit)}"
    if asked is not None:
        return f"It was given; the training step takes {size}."
    if found.name == "int8":
        return f"It loses the least, and the training step fits: {size}, with no need to recompute."
    return f"{'; '.join(tried)}; {found.name} fits with {size}."


def init_for(quantizer: str, asked: str | None) -> Decision:
    """Choose how the adapters start, by the quantizer."""
    if asked is not None:
        return Decision("init", asked, "It was given.")
    if re.search(r"int8|bits=8|fp8", quantizer):
        return Decision(
            "init", "zero", "8 bits lose next to nothing, so there is nothing for a better start to win back."
        )
    return Decision(
        "init",
        "qera",
        "Adapters that start as the weighted fit of what the quantizer lost win most of it back before any training, and "
        "training rows serve as its calibration.",
    )


def length_for(length: int, lengths: Sequence[int]) -> Decision:
    """Explain the sequence length by the lengths of the rows."""
    cut = sum(n > length for n in lengths)
    middle = lengths[len(lengths) // 2]
    if cut:
        reason = (
            f"Longer sequences do not fit the memory: {cut:,} of {len(lengths):,} rows are cut (median {middle:,})."
        )
    else:
        reason = f"The longest row has {length:,} tokens, the median one {middle:,}: nothing is cut."
    return Decision("sequence length", f"{length:,} tokens", reason)


def why_batch(found: Fit, wanted: int, accumulation: int, prepared: Prepared) -> str:
    """Return the reason for the batch size and the accumulation."""
    if accumulation == 1:
        return "all of them fit at once"
    if found.batch * found.length >= enough_tokens(prepared):
        return (
            f"{found.batch} at once keep the device busy, and gradients of {accumulation} such batches are accumulated"
        )
    how = "" if found.recompute else " without recomputing"
    return f"{found.batch} at once is what fits{how}, and gradients of {accumulation} such batches are accumulated"


def recomputes(found: Fit, limit: int) -> Decision:
    """Explain which activations are recomputed."""
    plan, step = found.plan, f"{gib(found.plan.needed)} of {gib(limit)}"
    if not found.recompute or plan.kept == plan.blocks:
        return Decision("recompute", "nothing", f"All activations fit: the step takes {step}.")
    if plan.kept:
        return Decision(
            "recompute",
            f"{plan.blocks - plan.kept} of {plan.blocks} blocks",
            f"The fewest that have to be, so that the step takes {step}.",
        )
    return Decision(
        "recompute", "all blocks", f"Their activations do not fit otherwise: with recomputing, the step takes {step}."
    )


def rate_for(parameters: int) -> tuple[float, str]:
    """Choose the learning rate by the number of parameters.

    Returns:
        The learning rate, and the reason in one sentence.
    """
    for rate, below, text in ((1e-3, 0.5e9, "0.5 billion"), (5e-4, 2e9, "2 billion")):
        if parameters < below:
            return rate, f"The model has {count(parameters)} parameters, below {text}: small models take larger steps."
    return 2e-4, f"The model has {count(parameters)} parameters: the rate that QLoRA uses for models of such sizes."


def count(number: int) -> str:
    """Such as "135 million"."""
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def gib(nbytes: int) -> str:
    """Bytes in GiB, with two decimals."""
    return f"{nbytes / GIB:.2f} GiB"

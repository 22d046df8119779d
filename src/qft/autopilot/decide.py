"""What `qft.auto` decides, each with its reason: data, sequence length, quantizer, init, rank, batch, recomputation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qft.autopilot.reasons import (
    Decision,
    Fit,
    enough_tokens,
    gib,
    init_for,
    length_for,
    rank_for,
    rate_for,
    recomputes,
    wanted_rows,
    why_batch,
    why_quantizer,
)
from qft.core.devices import free_bytes
from qft.errors import BadOption
from qft.memory.report import Plan, memory_of, needed

if TYPE_CHECKING:
    from qft.memory.estimate import Estimate
    from qft.training.setup import Prepared

QUANTIZERS = ("int8", "nf4", "nf4:double_quant=true")
"""By bits a weight: 8, 4.5, 4.13. Fewer bits lose more than a fine-tune wins back; see docs/how_to_start.md."""
MOST_HELD_OUT = 200


@dataclass(frozen=True)
class Choice:
    """What fits and was chosen.

    Attributes:
        fields: of `TrainConfig`.
        decisions: in the order in which they were made.
        plan: of the training step.
        rows_a_step: sequences in an optimizer step.
        wanted_steps: for as many epochs as the data's size suggests.
        beside: whether a float model fits beside the quantized one, to compare them. alone: whether it fits by itself.
    """

    fields: dict[str, Any]
    decisions: list[Decision]
    plan: Plan
    rows_a_step: int
    wanted_steps: int
    epochs: int
    beside: bool
    alone: bool


def limit_of(memory: int | str | None, device: Any) -> tuple[int, Decision]:
    """Bytes that the run may take.

    Raises:
        BadOption: a memory that is no amount.
    """
    where = "the GPU" if device.type == "cuda" else "this machine's RAM" if device.type == "cpu" else str(device)
    there = free_bytes(device)
    if memory is None:
        return there, Decision("memory", gib(there), f"No memory was given, and so much of {where} is free now.")
    asked = memory_of(memory)
    if asked > there:
        return there, Decision(
            "memory",
            gib(there),
            f"{gib(asked)} were given, and only so much of {where} is free now: the lesser counts.",
        )
    return asked, Decision("memory", gib(asked), f"It was given, and {where} has {gib(there)} free.")


def held_out_share(rows: int) -> float:
    """The share of the rows to hold out: a tenth, at least one row and at most `MOST_HELD_OUT`.

    Raises:
        BadOption: fewer than two rows.
    """
    if rows < 2:
        raise BadOption(f"the data has {rows} row: two or more are needed, one of them to be held out")
    return min(MOST_HELD_OUT, max(1, round(rows / 10))) / rows


def choose(
    prepared: Prepared,
    limit: int,
    *,
    quantizer: str | None = None,
    init: str | None = None,
    rank: int | None = None,
    parameters: int,
) -> Choice:
    """Decide on all that needs no weight, from token lengths and from plans.

    Args:
        prepared: of a configuration whose `max_length` is the model's.
        limit: bytes.
        quantizer, init, rank: the caller's; None leaves the choice here.
        parameters: of the model.

    Raises:
        BadOption: the memory is too little even for one short sequence.
        QftError: what `qft.plan` raises.
    """
    lengths = sorted(len(row["input_ids"]) for row in prepared.train.rows)
    decisions: list[Decision] = []
    r, why = rank_for(rank, prepared.train.counts.learnt)
    decisions.append(Decision("rank", f"r={r}, alpha={2 * r}", why))
    wanted, why_rows = wanted_rows(len(lengths))
    on_cpu = prepared.device.type == "cpu"
    named = [quantizer] if quantizer is not None else list(QUANTIZERS)
    tried: list[str] = []
    found: Fit | None = None
    full = lengths[-1]
    for name in named:
        estimate = _estimate(prepared, name, r)
        fit = _fit(estimate, name, full, wanted, limit, enough_tokens(prepared))
        last = name == named[-1]
        if fit is None:
            least = estimate.plan(1, full, "least").needed
            tried.append(f"{name} needs {gib(least)} for one sequence of {full:,} tokens")
        elif name == "int8" and quantizer is None and fit.recompute:
            tried.append("int8 leaves no room to keep activations, and recomputing them costs a third of the speed")
        else:
            found = fit
            break
        if last and fit is None:
            found = _shortened(estimate, name, lengths, wanted, limit, enough_tokens(prepared))
            if found is None:
                short = estimate.plan(1, min(128, full), "least").needed
                raise BadOption(
                    f"memory: {gib(limit)} are too little for this model: {name} needs {gib(short)} to train on one sequence "
                    f"of {min(128, full)} tokens; give more memory, or a smaller model"
                )
    assert found is not None
    decisions.append(Decision("quantizer", found.name, why_quantizer(found, quantizer, tried, limit)))
    start = init_for(found.name, init)
    decisions.append(start)
    decisions.append(length_for(found.length, lengths))
    accumulation = -(-wanted // found.batch)
    decisions.append(
        Decision(
            "batch",
            f"{found.batch} × {accumulation} = {found.batch * accumulation} rows a step",
            f"{why_rows}; {why_batch(found, wanted, accumulation, prepared)}.",
        )
    )
    decisions.append(recomputes(found, limit))
    lr, why = rate_for(parameters)
    decisions.append(Decision("learning rate", f"{lr:g}, cosine", why))
    rows_a_step = found.batch * accumulation
    epochs = 3 if len(lengths) < 1000 else 2 if len(lengths) < 10_000 else 1
    float_bytes = parameters * (4 if on_cpu else 2)
    weights = sum(found.plan.parts.get(k, 0) for k in ("codes", "constants", "embeddings", "other", "adapters"))
    return Choice(
        fields={
            "quantization": found.name,
            "init": None if start.value == "zero" else start.value,
            "lora_r": r,
            "lora_alpha": 2 * r,
            "max_length": max(2, found.length),
            "batch_size": found.batch,
            "gradient_accumulation": accumulation,
            "gradient_checkpointing": found.recompute or not on_cpu,
            "memory": "auto" if on_cpu else f"{limit}B",
            "lr": lr,
        },
        decisions=decisions,
        plan=found.plan,
        rows_a_step=rows_a_step,
        wanted_steps=math.ceil(epochs * len(lengths) / rows_a_step),
        epochs=epochs,
        beside=needed(float_bytes + weights) <= limit,
        alone=needed(float_bytes) <= limit,
    )


# ---- what fits -------------------------------------------------------------------------------------------


def _estimate(prepared: Prepared, quantizer: str, rank: int) -> Estimate:
    import os

    from qft.memory.estimate import Estimate
    from qft.training.models import adapter_of, autocast_dtype, float_dtype, optimizes
    from qft.training.setup import Prepared, optimizer_name

    config = prepared.config.replace(quantization=quantizer, lora_r=rank, lora_alpha=2 * rank)
    changed = Prepared(**{**vars(prepared), "config": config})
    return Estimate(
        config.model if os.path.isdir(config.model) else prepared.model_config,
        quantizer,
        adapter=adapter_of(changed),
        dtype=float_dtype(changed),
        fast=optimizes(changed),
        autocast=autocast_dtype(changed) == "bf16",
        optimizer=optimizer_name(config),
        on_gpu=prepared.device.type == "cuda",
    )


def _fit(estimate: Estimate, name: str, length: int, rows: int, limit: int, enough: int) -> Fit | None:
    """The largest micro-batch that fits, up to `enough` tokens; without recomputing where that is large enough."""
    if estimate.plan(1, length, "least").needed > limit:
        return None
    sizes = [b for b in _powers(rows) if b == 1 or b // 2 * length < enough]

    def largest(memory: str) -> tuple[int, Plan] | None:
        for batch in reversed(sizes):
            plan = estimate.plan(batch, length, memory)
            if plan.needed <= limit:
                return batch, plan
        return None

    kept = largest("most")
    if kept is not None and (kept[0] == sizes[-1] or kept[0] * length >= enough):
        return Fit(name, length, kept[0], False, kept[1])
    again = largest("least")
    if again is None:
        return None
    if estimate.fast and estimate.on_gpu:  # optimize_training keeps what there is room for
        return Fit(name, length, again[0], True, _widened(estimate, again[0], length, limit))
    if kept is not None and 2 * kept[0] >= again[0]:  # recomputing costs more than batches half as large
        return Fit(name, length, kept[0], False, kept[1])
    return Fit(name, length, again[0], True, again[1])


def _widened(estimate: Estimate, batch: int, length: int, limit: int) -> Plan:
    from qft.memory.fit import choose as widest

    return widest(estimate, batch, length, limit, gib(limit))


def _shortened(estimate: Estimate, name: str, lengths: Sequence[int], rows: int, limit: int, enough: int) -> Fit | None:
    """The longest cut of the rows that fits: what 99 % of them need, then halves of that, down to 128 tokens."""
    length = _quantile(lengths, 0.99)
    while True:
        fit = _fit(estimate, name, length, rows, limit, enough)
        if fit is not None or length <= 128:
            return fit
        length = max(128, length // 2)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def _quantile(lengths: Sequence[int], share: float) -> int:
    return lengths[min(len(lengths) - 1, int(len(lengths) * share))]

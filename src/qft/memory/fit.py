"""The answer to "what fits in 24 GB": which blocks to recompute, else which quantizer, else which batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qft.memory.report import GIB, Plan

if TYPE_CHECKING:
    from qft.memory.estimate import Estimate

TWINS = {"nf4": "nf4:double_quant=true", "fp4": "fp4:double_quant=true"}
"""What takes less at nearly the same error: NF4's constants in 8 bits are 0.37 bits a weight."""


def choose(estimate: Estimate, batch: int, sequence: int, limit: int, text: str) -> Plan:
    """The plan of the fastest combination within `limit` bytes, with its `answer`.

    As few blocks as possible are recomputed. Where recomputing all of them is not enough, block constants are quantized
    too; then the batch is halved, and then the sequence, until something fits. A plan that does not fit even so says what
    would.
    """
    if "weights" in estimate.offload and estimate.resident is None:
        return _streamed(estimate, batch, sequence, limit, text)
    found, why = _widest(estimate, batch, sequence, limit), ""
    if found is None:
        least = estimate.plan(batch, sequence, "least")
        need = f"need {least.needed / GIB:.2f} GiB with {least.quantizer}"
        why = f"{batch} × {sequence} tokens with all blocks recomputed {need}; {_offloaded(estimate, batch, sequence, limit)}"
        twin = TWINS.get(estimate.quantizer) if isinstance(estimate.quantizer, str) else None
        if twin is not None:
            estimate = replace(estimate, quantizer=twin)
            found = _widest(estimate, batch, sequence, limit)
    rows, length = batch, sequence
    while found is None and rows > 1:
        rows = rows // 2
        found = _widest(estimate, rows, sequence, limit)
    if found is not None:
        return replace(found, answer=f"{text} holds it: {_said(found)}. {why}{_why(found, rows < batch)}")
    while length > 128:
        length //= 2
        found = _widest(estimate, 1, length, limit)
        if found is not None:
            break
    smallest = estimate.plan(1, sequence, "least")
    if found is not None:
        would = f"what would fit: {_said(found)}"
    else:
        short = estimate.plan(1, length, "least")
        would = f"weights, adapters and optimizer leave no room: {_said(short)} needs {short.needed / GIB:.2f} GiB"
    answer = f"{text} is too little: {why}{_said(smallest)} needs {smallest.needed / GIB:.2f} GiB; {would}"
    return replace(smallest, answer=answer)


def _widest(estimate: Estimate, batch: int, sequence: int, limit: int) -> Plan | None:
    """With as few recomputed blocks as `limit` allows; None where all of them are too few."""
    low = estimate.plan(batch, sequence, 0)
    if low.needed > limit:
        return None
    few, many = 0, low.blocks
    while few < many:  # the bytes grow with the number of blocks that keep theirs
        middle = (few + many + 1) // 2
        if estimate.plan(batch, sequence, middle).needed <= limit:
            few = middle
        else:
            many = middle - 1
    return estimate.plan(batch, sequence, few)


def _offloaded(estimate: Estimate, batch: int, sequence: int, limit: int) -> str:
    """What `offload` would make fit of what was asked for."""
    if estimate.offload or not estimate.fast or estimate.cards > 1:
        return ""
    for names in ("activations", "weights", "all"):
        parts = frozenset(("activations", "weights") if names == "all" else (names,))
        found = estimate.offloading(parts).plan(batch, sequence, "least")
        if found.needed <= limit:
            slower = ", slowly" if "weights" in parts else ""
            return f"with offload={names!r} they would fit{slower}, and {found.host / GIB:.2f} GiB be in host memory; "
    return ""


def _streamed(estimate: Estimate, batch: int, sequence: int, limit: int, text: str) -> Plan:
    """With all blocks recomputed, as many blocks' weights on the device as `limit` allows."""
    least = estimate.plan(batch, sequence, "least")
    if least.needed > limit:
        answer = f"{text} is too little even without weights of blocks: that needs {least.needed / GIB:.2f} GiB"
        return replace(least, answer=answer)
    few, many = 0, least.blocks
    while few < many:
        middle = (few + many + 1) // 2
        if estimate.offloading(estimate.offload, middle).plan(batch, sequence, "least").needed <= limit:
            few = middle
        else:
            many = middle - 1
    found = estimate.offloading(estimate.offload, few).plan(batch, sequence, "least")
    answer = f"{text} holds it with the weights of {few} of {least.blocks} blocks on the device: {_said(found)}"
    return replace(found, answer=answer)


def _said(plan: Plan) -> str:
    memory = {0: "memory='least'", plan.blocks: "memory='most'"}.get(plan.kept, f"memory={plan.kept}")
    return f"{plan.quantizer}, batch {plan.batch_size} × {plan.sequence_length}, {memory}"


def _why(plan: Plan, smaller: bool) -> str:
    again = plan.blocks - plan.kept
    batch = "the batch was halved last: it is made up for by accumulating gradients; " if smaller else ""
    if not again:
        return f"{batch}no block has to be recomputed"
    return f"{batch}{again} of {plan.blocks} blocks are recomputed, which takes time: the fewest that fit"

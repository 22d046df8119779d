"""How many blocks keep their activations so that a training batch fits into the memory there is."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qft.core.console import one_line
from qft.core.devices import free_bytes
from qft.errors import BadOption, QftError, QftWarning, UnsupportedDevice
from qft.memory.report import GIB, OUTSIDE, SLACK, memory_limit
from qft.optimize.optimizers import has_states

if TYPE_CHECKING:
    from qft.memory.estimate import Estimate
    from qft.optimize.blocks import BlockPlan

LATER = OUTSIDE // 4
"""What CUDA may still load beside what it has loaded already: kernels of a first step."""
AUTO = frozenset({"cuda"})
"""Devices that "auto" fills: their allocator says what tensors hold. On a CPU what was freed may stay the process's."""
CPU = torch.device("cpu")
_log = logging.getLogger("qft")


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process uses on a device now, and those that it could."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
    else:
        import psutil

        used = psutil.Process(os.getpid()).memory_info().rss
    return used, used + free_bytes(device)


@dataclass(frozen=True)
class Size:
    """A batch, as far as memory depends on it; `sequence` is rounded up to an eighth of a power of two."""

    batch: int
    sequence: int
    masked: bool
    autocast: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> Size | None:
        """From what blocks' owner is called with: token ids (batch, sequence), or embeddings of them."""
        named = [kwargs.get(n) for n in ("input_ids", "inputs_embeds")]
        given = next((t for t in (*named, *args) if isinstance(t, Tensor) and t.dim() >= 2), None)
        if given is None or not given.numel():
            return None
        # a mask is made for padding, and for sequences that are packed; whether there is any would have to be waited for
        masked = any(kwargs.get(n) is not None for n in ("attention_mask", "position_ids"))
        return cls(given.shape[0], rounded_up(given.shape[1]), masked, torch.is_autocast_enabled(device))

    def within(self, other: Size) -> bool:
        smaller = self.batch <= other.batch and self.sequence <= other.sequence
        return smaller and self.masked <= other.masked and self.autocast == other.autocast


def rounded_up(n: int) -> int:
    """Round a number up to one of eight steps between powers of two, so that similar sizes share a decision."""
    step = max(1, 2 ** (n.bit_length() - 1) // 8)
    return -(-n // step) * step


@dataclass(frozen=True)
class Decision:
    """`keeps` stands while the process uses no more than `until` bytes when a step begins."""

    keeps: frozenset[int]
    until: int
    all: bool


class Chooser:
    """Asked at each training batch which blocks keep their activations; None leaves it to the model.

    Args:
        memory: "auto", or an amount.
        model: the language model, without PEFT's wrapper.
        plan: what its blocks do.
    """

    def __init__(self, memory: str, model: nn.Module, plan: BlockPlan):
        self.memory, self.model, self.plan = memory, model, plan
        self._forget()

    def _forget(self) -> None:
        self.known: dict[Size, Decision] = {}
        self.given_up = False
        self._estimate: Estimate | None = None
        self._stands: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: self.__dict__[k] for k in ("memory", "model", "plan")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int] | None:
        device = next((p.device for p in self.model.parameters()), CPU)
        if self.memory == "auto" and device.type not in AUTO:
            return None
        stands = self._as_it_stands()
        if stands != self._stands:
            self._forget()
            self._stands = stands
        if self.given_up:
            return None
        size = Size.of(args, kwargs, device.type)
        if size is None:
            return self._give_up("its batches are no token ids or embeddings of (batch, sequence)")
        used, most = device_memory(device)
        known = self.known.get(size) or next((d for s, d in self.known.items() if d.all and size.within(s)), None)
        if known is not None and (used <= known.until or device.type not in AUTO):
            return known.keeps
        try:
            self._measure(size)
        except Exception as error:  # what runs under fake tensors is anybody's code
            return self._give_up(one_line(error))
        found = self._decide(size, device, used, most, again=known is not None)
        self.known[size] = found
        return found.keeps

    def _as_it_stands(self) -> Any:
        """What a plan is for: another adapter, or another device, needs another."""
        return tuple((id(p), p.device) for p in self.model.parameters() if p.requires_grad)

    def _give_up(self, why: str) -> None:
        self.given_up = True
        warnings.warn(
            f"memory={self.memory!r}: a plan knows nothing of this model, so that its own gradient checkpointing decides "
            f"what is recomputed: {why}",
            QftWarning,
            stacklevel=4,
        )

    # ---- the estimate ------------------------------------------------------------------------------------

    def _measure(self, size: Size) -> Any:
        from qft.memory.estimate import Estimate
        from qft.memory.from_model import standing

        own = torch.autograd.graph.saved_tensors_hooks(_same, _same)  # whatever hooks the step runs under
        with warnings.catch_warnings(), CPU, torch.autocast("cpu", enabled=False), own:
            warnings.simplefilter("ignore")
            devices = {p.device for p in self.model.parameters()}
            if len(devices) > 1:
                raise BadOption(f"it is spread over {', '.join(sorted(map(str, devices)))}")
            if self._estimate is None:
                self._estimate = Estimate(
                    self.model, "", fast=self.plan.loss is not None, compiled=self.plan.compiles,
                    on_gpu=devices.pop().type == "cuda",
                    offload=frozenset({"activations"} if self.plan.checkpoints is not None else ()),
                )  # fmt: skip
                self._estimate.__dict__["outline"] = standing(self.model)
            self._estimate.autocast = size.autocast
            return self._estimate.measured(size.batch, size.sequence, size.masked)

    def _adds(self, size: Size, kept: int, offload: frozenset[str] | None = None) -> int:
        """The most that a step holds beside what is held now; with other offloading than the model's, if that is given."""
        found, trained = self._measure(size), self._trained()
        assert self._estimate is not None
        estimate = self._estimate if offload is None else self._estimate.offloading(offload)
        total = len(found.blocks)
        moments, _ = estimate.moments(found, frozenset(range(total - kept, total)))
        there = {"codes", "constants", "embeddings", "other", "adapters"}
        if has_states(trained[0]):
            there.add("optimizer")
        if all(p.grad is not None for p in trained):
            there.add("gradients")
        sums = (sum(v for k, v in parts.items() if k not in there) for n, parts in moments.items() if n != "loading")
        return max(sums)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    # ---- the decision ------------------------------------------------------------------------------------

    def _limit(self, device: torch.device, most: int) -> int:
        """Bytes of tensors that a step may hold, the allocator's losses included."""
        cuda = device.type == "cuda"
        limit = most - LATER if cuda else most
        amount = memory_limit(self.memory)
        return limit if amount is None else min(limit, amount - (OUTSIDE if cuda else 0))

    def _decide(self, size: Size, device: torch.device, used: int, most: int, again: bool) -> Decision:
        limit, total = self._limit(device, most), len(self._measure(size).blocks)

        def needs(kept: int) -> int:
            return int((used + self._adds(size, kept)) * (1 + SLACK))

        few, many = 0, total
        if needs(0) > limit:
            many = 0
            # without the slack it may well run, where nobody asked for less than the device has
            if not again and not (self.memory == "auto" and needs(0) / (1 + SLACK) <= most):
                raise self._too_little(size, device, used, limit, needs(0))
            warnings.warn(
                f"memory={self.memory!r}: {size.batch} × {size.sequence} tokens need {needs(0) / GIB:.2f} GiB with all blocks "
                f"recomputed, and {limit / GIB:.2f} GiB are there: the step may run out of memory",
                QftWarning,
                stacklevel=5,
            )
        while few < many:
            middle = (few + many + 1) // 2
            if needs(middle) <= limit:
                few = middle
            else:
                many = middle - 1
        need = needs(few)
        _log.info(
            "memory=%r: %d of %d blocks keep their activations for %d × %d tokens: %.2f of %.2f GiB, %.2f of them in use now",
            self.memory, few, total, size.batch, size.sequence, need / GIB, limit / GIB, used / GIB,
        )  # fmt: skip
        trained = sum(4 * p.numel() for p in self._trained())
        until = used + 3 * trained + int(need * SLACK / 2)  # gradients and states come without being asked about
        return Decision(frozenset(range(total - few, total)), until, few == total)

    def _too_little(self, size: Size, device: torch.device, used: int, limit: int, need: int) -> QftError:
        def fits(batch: int, sequence: int) -> bool:
            smaller = Size(batch, sequence, size.masked, size.autocast)
            return (used + self._adds(smaller, 0)) * (1 + SLACK) <= limit

        batch, sequence = size.batch, size.sequence
        while batch > 1 and not fits(batch, sequence):
            batch //= 2
        while sequence > 16 and not fits(batch, sequence):
            sequence //= 2
        would = []
        if fits(batch, sequence):
            more = (
                f" with {-(-size.batch // batch)} times the steps of gradient accumulation"
                if batch < size.batch
                else ""
            )
            would.append(f"{batch} × {sequence} tokens fit{more}")
        else:
            would.append(f"weights, adapters and optimizer leave no room for {batch} × {sequence} tokens either")
        saved = _by_double_quantization(self.model)
        if saved and (need - saved * (1 + SLACK)) <= limit:
            would.append(
                f"a quantizer with double_quant=true takes {saved / GIB:.2f} GiB less, and the batch would fit"
            )
        less = self._adds(size, 0) - self._adds(size, 0, frozenset({"activations"}))
        if device.type == "cuda" and need - less * (1 + SLACK) <= limit:
            would.append(f"offload='activations' takes {less / GIB:.2f} GiB less, and the batch would fit")
        text = (
            f"memory={self.memory!r} is too little: {size.batch} × {size.sequence} tokens need {need / GIB:.2f} GiB with all "
            f"blocks recomputed, {used / GIB:.2f} of them in use already, and there are {limit / GIB:.2f}; {'; '.join(would)}"
        )
        return UnsupportedDevice(text) if self.memory == "auto" else BadOption(text)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _by_double_quantization(model: nn.Module) -> int:
    """Bytes that constants of blocks would save in 8 bits, where they are in 32."""
    from qft.lora.weights import linear_weights
    from qft.memory.outline import weight_bytes

    saved = 0
    for quantizer, handle in linear_weights(model).values():
        if getattr(quantizer, "double_quant", None) is False and getattr(quantizer, "quant_type", "nf4") in (
            "nf4",
            "fp4",
        ):
            shape = tuple(handle.shape)
            saved += weight_bytes(quantizer, shape) - weight_bytes(replace(quantizer, double_quant=True), shape)
    return saved

"""How many bytes a training run takes, by part, before any is spent: `plan`."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qft.errors import BadOption, QftWarning
from qft.memory_activations import rounded
from qft.memory_model import Measured, Outline, Weights, measure, outline, stand_in
from qft.optimizing import _kept
from qft.quantizer import as_float_dtype

GIB = 2**30
WORKSPACE = 64 * 2**20
"""cuBLAS's, 32 MiB each for the threads of the forward and the backward pass: measured on an H100 (8 MiB before Hopper)."""
OUTSIDE = GIB // 2
"""What a process holds on a card outside of torch's allocator: CUDA's context and kernels."""
SLACK = 0.05
"""What the allocator may lose to fragments: `fits` adds it to the peak."""
ON_HOST = 100_000
"""bitsandbytes pages states of weights of at least this many elements out to the host."""
SMALL = 4096
"""bitsandbytes keeps states of weights below this many elements in 32 bits."""
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit", "sgd", "sgd_momentum")
_ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_8bit": "paged_adamw8bit",
    "paged_adamw_32bit": "paged_adamw32bit",
    "paged_adamw": "paged_adamw32bit",
}
PARTS = {
    "codes": "quantized weights",
    "constants": "their scales, zero points, codebooks",
    "embeddings": "embeddings and head",
    "other": "norms, biases, what stays in 16 bit",
    "adapters": "adapters, float32",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations kept for the backward pass",
    "logits": "logits and loss, or what replaces them",
    "dequantize": "a weight as floats",
    "temporary": "temporary",
    "workspace": "cuBLAS",
}
"""Part → what it is. A moment's parts add up to its bytes."""


def optimizer_bytes(optimizer: str, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """Bytes of states on the device and on the host, and of what a step needs for a moment, over float32 weights.

    Args:
        sizes: numbers of elements, one a weight.
    """
    device = host = 0
    for n in sizes:
        if optimizer == "adamw":
            device += 2 * rounded(4 * n)
        elif optimizer == "sgd_momentum":
            device += rounded(4 * n)
        elif optimizer != "sgd":
            wide = optimizer.endswith("32bit") or n < SMALL
            state = 2 * rounded(4 * n) if wide else 2 * rounded(n)
            constants = 0 if wide else 2 * rounded(4 * -(-n // 256))
            paged = optimizer.startswith("paged") and n >= ON_HOST
            host, device = (host + state, device) if paged else (host, device + state)
            device += constants
    # torch's multi-tensor AdamW takes the root of all second moments at once
    return device, host, sum(rounded(4 * n) for n in sizes) if optimizer == "adamw" else 0


@dataclass(frozen=True)
class Plan:
    """Bytes on one card, by part and by moment; `str()` is a table in GiB.

    Attributes:
        moments: "loading", "loss" (forward pass and loss), "backward" and "optimizer" → bytes by part, see `PARTS`.
        host: bytes of paged optimizer states, in host memory.
        quantizer, batch_size, sequence_length, optimizer, fast, autocast, cards: what was asked for.
        kept, blocks: how many of the model's blocks keep their activations; the others are recomputed.
        answer: what was chosen and why, of a plan for a given memory.
    """

    moments: dict[str, dict[str, int]]
    host: int
    quantizer: str
    batch_size: int
    sequence_length: int
    optimizer: str
    fast: bool
    autocast: bool
    cards: int
    kept: int
    blocks: int
    model: str
    dtype: str
    answer: str | None = None

    @property
    def totals(self) -> dict[str, int]:
        """Moment → bytes."""
        return {name: sum(parts.values()) for name, parts in self.moments.items()}

    @property
    def moment(self) -> str:
        """Where the peak is."""
        return max(self.totals, key=self.totals.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment, as `torch.cuda.max_memory_allocated` counts them."""
        return max(self.totals.values())

    @property
    def training_peak(self) -> int:
        """The same without loading."""
        return max(v for k, v in self.totals.items() if k != "loading")

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the worst moment."""
        return self.moments[self.moment]

    @property
    def needed(self) -> int:
        """What a card must have: the peak, its fragments, and what CUDA itself holds."""
        return _needed(self.peak)

    def fits(self, memory: int | str) -> bool:
        """Whether `needed` is within `memory`: bytes, or "24GB", "24GiB"."""
        return self.needed <= memory_of(memory)

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return {**own, "totals": self.totals, "moment": self.moment, "peak": self.peak, "needed": self.needed}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as text, written to `path` too where it is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def __str__(self) -> str:
        kept = {0: "all blocks recomputed", self.blocks: "no block recomputed"}.get(
            self.kept, f"{self.blocks - self.kept} of {self.blocks} blocks recomputed"
        )
        cards = "" if self.cards == 1 else f", sharded over {self.cards} cards, of each"
        lines = [
            f"{self.model}, {self.quantizer}, {self.batch_size} × {self.sequence_length} tokens, {kept}, {self.optimizer}, "
            f"{'optimize_training' if self.fast else 'as the model computes it'}{cards}"
        ]
        names = list(self.moments)
        lines.append(f"{'GiB':<44}" + "".join(f"{n:>11}" for n in names))
        for part, text in PARTS.items():
            row = [self.moments[n].get(part, 0) for n in names]
            if any(row):
                lines.append(f"{text:<44}" + "".join(f"{v / GIB:>11.3f}" for v in row))
        lines.append(f"{'sum':<44}" + "".join(f"{v / GIB:>11.3f}" for v in self.totals.values()))
        lines.append(f"peak {self.peak / GIB:.2f} GiB ({self.moment}); a card must have {self.needed / GIB:.2f} GiB")
        if self.host:
            lines.append(f"in host memory {self.host / GIB:.2f} GiB of optimizer states")
        return "\n".join([*lines, *([self.answer] if self.answer else [])])


def _needed(peak: int) -> int:
    return int(peak * (1 + SLACK)) + OUTSIDE


def memory_of(text: int | str) -> int:
    """Bytes of "24GB" (10⁹), "24GiB" (2³⁰), or a number of bytes."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    if isinstance(text, str):
        for unit, size in (("gib", 2**30), ("gb", 10**9), ("mib", 2**20), ("mb", 10**6)):
            number = text.strip().lower().removesuffix(unit)
            if number != text.strip().lower():
                try:
                    value = float(number)
                except ValueError:
                    break
                if 0 < value < 1e9:
                    return int(value * size)
    raise BadOption(f"memory {text!r}: write '24GB', '24GiB', or a number of bytes")


@dataclass
class Estimate:
    """A model over which plans for many options are made; what is measured once is kept."""

    source: Any
    quantizer: Any
    adapter: Any
    dtype: torch.dtype | None
    skip: Any
    fast: bool
    autocast: bool
    optimizer: str
    cards: int
    on_gpu: bool

    def __post_init__(self) -> None:
        self._measured: dict[tuple[int, int], Measured] = {}

    @cached_property
    def outline(self) -> Outline:
        found = outline(self.source, self.quantizer, self.adapter, self.dtype, self.skip)
        stand_in(found)
        return found

    def measured(self, batch: int, sequence: int) -> Measured:
        key = (batch, sequence)
        if key not in self._measured:
            self._measured[key] = measure(self.outline, batch, sequence, fast=self.fast, autocast=self.autocast)
        return self._measured[key]

    def plan(self, batch: int, sequence: int, memory: Any) -> Plan:
        found, weights = self.measured(batch, sequence), self.outline.weights
        total = len(found.blocks)
        kept = _kept(memory, total)
        keeps = kept if kept is not None else frozenset()
        moments, host = _moments(weights, found, keeps, self.optimizer, self.cards, self.on_gpu)
        model = self.outline.model
        name = "16 bit" if self.quantizer is None else _name(self.quantizer)
        return Plan(
            moments, host, name, batch, sequence, self.optimizer, self.fast, self.autocast, self.cards, len(keeps), total,
            type(model).__name__, str(getattr(model, "dtype", "")).removeprefix("torch."),
        )  # fmt: skip


def _name(quantizer: Any) -> str:
    return quantizer if isinstance(quantizer, str) else repr(quantizer)


def _moments(
    weights: Weights, found: Measured, keeps: frozenset[int], optimizer: str, cards: int, on_gpu: bool
) -> tuple[dict[str, dict[str, int]], int]:
    blocks = found.blocks
    states, host, needs = optimizer_bytes(optimizer, weights.trained)
    share = lambda n: -(-n // cards)  # noqa: E731
    still = {
        "codes": share(weights.codes),
        "constants": share(weights.constants),
        "embeddings": share(weights.embeddings),
        "other": share(weights.other),
    }
    # a sharded model gathers a block while it has the next one come
    gathered = 0 if cards == 1 else 2 * (weights.frozen - weights.embeddings) // len(blocks) + weights.embeddings
    loading = {**still, "temporary": 2 * weights.largest, "dequantize": 0}
    trained = {
        "adapters": share(weights.adapters),
        "optimizer": share(states),
        "workspace": WORKSPACE if on_gpu else 0,
    }
    still |= trained
    held = [b.saved if i in keeps else b.boundary for i, b in enumerate(blocks)]
    loss = {**still, "activations": sum(held), "logits": found.head, "temporary": gathered}
    worst: dict[str, int] = {}
    done = sum(b.gradients for b in blocks)
    before = 0  # what the blocks before this one hold
    for i, b in enumerate(blocks):
        done -= b.gradients  # gradients of those behind it are there
        adds = b.kept if i in keeps else b.recomputed
        parts = {
            **still,
            "gradients": share(done),
            "activations": found.shared + before + held[i],
            "dequantize": min(b.dequantized, adds),
            "temporary": adds - min(b.dequantized, adds) + gathered,
        }
        if sum(parts.values()) > sum(worst.values()):
            worst = parts
        before += held[i]
    step = {**still, "gradients": share(weights.adapters), "temporary": share(needs)}
    return {"loading": loading, "loss": loss, "backward": worst, "optimizer": step}, share(host)

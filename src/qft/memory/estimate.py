"""The moments of a training run, and the bytes of each: what `Plan` is made of."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qft.core.blocks import find_blocks
from qft.core.console import one_line
from qft.errors import BadOption, UnsupportedOperation
from qft.memory.outline import Outline, Weights, outline
from qft.memory.profile import rounded
from qft.memory.report import BUFFERS, Plan, kept_blocks
from qft.memory.stand_ins import Measured, measure, stand_in
from qft.ops.kernels import launch

WORKSPACE = 64 * 2**20
"""cuBLAS's, 32 MiB each for the threads of the forward and the backward pass: measured on an H100 (8 MiB before Hopper)."""
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


@dataclass
class Estimate:
    """A model over which plans for many options are made; what is measured once is kept. See `qft.plan`."""

    source: Any
    quantizer: Any
    adapter: Any = None
    dtype: torch.dtype | None = None
    skip: Any = None
    fast: bool = True
    autocast: bool = False
    optimizer: str = "adamw"
    cards: int = 1
    on_gpu: bool = True
    in_place: bool = False
    compiled: bool | None = None
    offload: frozenset[str] = frozenset()
    resident: int | None = None

    def __post_init__(self) -> None:
        name = _ALIASES.get(self.optimizer, self.optimizer)
        if name not in OPTIMIZERS:
            near = difflib.get_close_matches(str(name), OPTIMIZERS, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise BadOption(f"optimizer={self.optimizer!r}; {hint}known: {', '.join(OPTIMIZERS)}")
        self.optimizer = name
        self._measured: dict[tuple[int, int, bool, bool], Measured] = {}

    @cached_property
    def outline(self) -> Outline:
        found = outline(self.source, self.quantizer, self.adapter, self.dtype, self.skip)
        stand_in(found)
        return found

    def measured(self, batch: int, sequence: int, masked: bool = False) -> Measured:
        key = (batch, sequence, masked, self.autocast)
        if key not in self._measured:
            options: dict[str, Any] = {"fast": self.fast, "autocast": self.autocast, "compiled": self.compiled}
            # without triton, blocks are not compiled either
            kernel = self.fast and self.on_gpu and self.compiled is not False and launch.enabled
            options |= {"masked": masked, "kernel": kernel}
            try:
                self._measured[key] = measure(self.outline, batch, sequence, **options)
            except UnsupportedOperation:
                raise
            except Exception as error:
                raise UnsupportedOperation(
                    f"{type(self.outline.model).__name__} does not run under fake tensors, so that its activations cannot be "
                    f"measured: {one_line(error)}"
                ) from error
        return self._measured[key]

    def plan(self, batch: int, sequence: int, memory: Any, answer: str | None = None) -> Plan:
        found, model = self.measured(batch, sequence), self.outline.model
        keeps = kept_blocks(memory, len(found.blocks)) or frozenset()
        moments, host = self.moments(found, keeps)
        return Plan(
            moments=moments,
            host=host,
            quantizer=self.quantizer if isinstance(self.quantizer, str) else repr(self.quantizer),
            batch_size=batch,
            sequence_length=sequence,
            optimizer=self.optimizer,
            fast=self.fast,
            autocast=self.autocast,
            cards=self.cards,
            kept=len(keeps),
            blocks=len(found.blocks),
            model=type(model).__name__,
            dtype=str(self.outline.dtype).removeprefix("torch."),
            answer=answer,
            offload=tuple(sorted(self.offload)),
            resident=len(found.blocks) - self.streamed if "weights" in self.offload else None,
        )

    def offloading(self, offload: frozenset[str], resident: int | None = None) -> Estimate:
        """The same with other offloading; what was measured stays."""
        other = replace(self, offload=offload, resident=resident)
        other._measured, other.__dict__["outline"] = self._measured, self.outline
        return other

    @property
    def streamed(self) -> int:
        """Blocks whose packed weights are on the host."""
        if "weights" not in self.offload:
            return 0
        return max(0, len(self.block_weights) - (self.resident or 0))

    @cached_property
    def block_weights(self) -> list[int]:
        """Bytes of packed weights of each block."""
        (owner, blocks), *_ = find_blocks(self.outline.model)
        where = next(n for n, m in self.outline.model.named_modules() if m is owner)
        inner = next(n for n, m in owner.named_children() if isinstance(m, nn.ModuleList) and m[0] is blocks[0])
        sizes = [0] * len(blocks)
        for name, nbytes in self.outline.weights.quantized:
            rest = name.removeprefix(f"{where}.{inner}." if where else f"{inner}.")
            if rest != name and rest.partition(".")[0].isdecimal():
                sizes[int(rest.partition(".")[0])] += nbytes
        return sizes

    def moments(self, found: Measured, keeps: frozenset[int]) -> tuple[dict[str, dict[str, int]], int]:
        """Moment → bytes by part, when these blocks keep their activations, and bytes in host memory."""
        weights, blocks = self.outline.weights, found.blocks
        states, host, needs = optimizer_bytes(self.optimizer, weights.trained)
        frozen = {k: self._share(getattr(weights, k)) for k in ("codes", "constants", "embeddings", "other")}
        still = {
            **frozen,
            "adapters": self._share(weights.adapters),
            "optimizer": self._share(states),
            "workspace": WORKSPACE if self.on_gpu else 0,
        }
        if self.streamed:
            sizes = sorted(self.block_weights)[-self.streamed :]
            gone, packed = sum(sizes), weights.codes + weights.constants
            for part in ("codes", "constants"):
                frozen[part] -= int(gone * getattr(weights, part) / packed)
            still |= frozen | {"ring": min(BUFFERS, self.streamed) * max(sizes)}
            host += gone
        # of a sharded model two blocks are whole at a time, and the embeddings and the head
        gathered = self._gathered(weights, len(blocks))
        held = [b.saved if i in keeps else b.boundary for i, b in enumerate(blocks)]
        away = [0] * len(blocks)
        if "activations" in self.offload:
            stay = keeps | {0} if found.leaf else keeps
            away = [0 if i in stay else b.boundary for i, b in enumerate(blocks)]
        # the last input that leaves is still there, and in the backward pass the next one comes beside it
        near = max(away, default=0)
        held = [h - a for h, a in zip(held, away, strict=True)]
        host += sum(away)
        worst: dict[str, int] = {}
        behind, before = sum(b.gradients for b in blocks), 0
        for i, b in enumerate(blocks):
            behind -= b.gradients
            adds = b.kept if i in keeps else b.recomputed
            floats = min(b.dequantized, adds)
            parts = {
                **still,
                "gradients": self._share(behind),
                "activations": found.shared + before + held[i] + (min(i + 1, 2) * near if away[i] else 0),
                "dequantize": floats,
                "temporary": adds - floats + gathered,
            }
            if sum(parts.values()) > sum(worst.values()):
                worst = parts
            before += held[i]
        moments = {
            "loading": self._loading(weights, frozen),
            "loss": {**still, "activations": sum(held) + near, "logits": found.head, "temporary": gathered},
            "backward": worst,
            "optimizer": {**still, "gradients": self._share(weights.adapters), "temporary": self._share(needs)},
        }
        return moments, self._share(host)

    def _loading(self, weights: Weights, frozen: dict[str, int]) -> dict[str, int]:
        if self.streamed:  # it is quantized on the host
            return dict(frozen)
        if self.in_place:  # no layer is quantized yet, and the first one's codes come beside its floats
            first = next((n for _, n in weights.quantized), 0)
            return {"other": weights.floats, "codes": first}
        return {**frozen, "temporary": 2 * weights.largest}  # as it comes, and as its quantizer works on it

    def _share(self, nbytes: int) -> int:
        return -(-nbytes // self.cards)

    def _gathered(self, weights: Weights, blocks: int) -> int:
        if self.cards == 1:
            return 0
        return 2 * (weights.frozen - weights.embeddings) // blocks + weights.embeddings

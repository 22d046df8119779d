"""The plan of memory: its parts, limits and names."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qft.errors import BadFolder, BadOption

BUFFERS = 2
"""Blocks on the device at a time, beside those that stay there: one computes, the next one arrives."""


GIB = 2**30


OUTSIDE = GIB // 2
"""What a process holds on a card outside of torch's allocator: CUDA's context and kernels."""


SLACK = 0.05
"""What the allocator may lose to fragments: `fits` adds it to the peak."""


KEEP = ("auto", "model", "least", "most")
"""`optimize_training`'s words for which blocks keep their activations."""


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
    "ring": "buffers for weights that are streamed",
    "temporary": "temporary",
    "workspace": "cuBLAS",
}
"""Part → what it is. A moment's parts add up to its bytes."""


@dataclass(frozen=True)
class Plan:
    """Bytes on one card, by part and by moment; `str()` is a table in GiB.

    Attributes:
        moments: "loading", "loss" (forward pass and loss), "backward" and "optimizer" → bytes by part, see `PARTS`.
        host: bytes in host memory: paged optimizer states, and what is offloaded.
        quantizer, batch_size, sequence_length, optimizer, fast, autocast, cards: what was asked for.
        kept, blocks: how many of the model's blocks keep their activations; the others are recomputed.
        answer: what was chosen and why, of a plan for a given memory.
        offload: what is offloaded.
        resident: blocks whose packed weights stay on the device, with offload="weights"; else all.
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
    offload: tuple[str, ...] = ()
    resident: int | None = None

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
        return needed(self.peak)

    def fits(self, memory: int | str) -> bool:
        """Whether `needed` is within `memory`: bytes, or "24GB", "24GiB"."""
        return self.needed <= memory_of(memory)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "totals": self.totals, "moment": self.moment, "peak": self.peak, "needed": self.needed}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as text, written to `path` too where it is given.

        Raises:
            BadFolder: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            try:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError as error:
                raise BadFolder(f"cannot write {path}: {error}") from error
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
            lines.append(f"in host memory {self.host / GIB:.2f} GiB{self._on_host()}")
        return "\n".join([*lines, *([self.answer] if self.answer else [])])

    def _repr_html_(self) -> str:
        from qft.core.html import html_card

        tiles = [
            (f"{self.peak / GIB:.2f} GiB", f"at the peak ({self.moment})"),
            (f"{self.needed / GIB:.2f} GiB", "a card must have"),
            *([(f"{self.host / GIB:.2f} GiB", "in host memory")] if self.host else []),
        ]
        title, _, rest = str(self).partition("\n")
        return html_card(title, tiles, lines=[self.answer] if self.answer else [], details=rest)

    def _on_host(self) -> str:
        what = ["optimizer states"] if self.optimizer.startswith("paged") else []
        what += ["inputs of recomputed blocks"] if "activations" in self.offload else []
        if "weights" in self.offload and self.resident is not None:
            what.append(f"weights of {self.blocks - self.resident} of {self.blocks} blocks")
        return f": {', '.join(what)}" if what else ""


def needed(peak: int) -> int:
    """Bytes that a card must have for a peak of the allocator's."""
    return int(peak * (1 + SLACK)) + OUTSIDE


def memory_of(text: int | str) -> int:
    """Bytes of "24GB" (10⁹), "24GiB" (2³⁰), the same with M, "24000000000B", or a number of bytes."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    if isinstance(text, str):
        for unit, size in (("gib", 2**30), ("gb", 10**9), ("mib", 2**20), ("mb", 10**6), ("b", 1)):
            number = text.strip().lower().removesuffix(unit)
            if number != text.strip().lower():
                try:
                    value = float(number)
                except ValueError:
                    break
                if 0 < value * size < 1e18:
                    return int(value * size)
    raise BadOption(f"memory {text!r}: write '24GB', '24GiB', or a number of bytes")


def memory_limit(memory: Any) -> int | None:
    """Bytes where `memory` is an amount, such as "24GB"; None where it says which blocks keep their activations."""
    return memory_of(memory) if isinstance(memory, str) and memory not in KEEP else None


def kept_blocks(memory: Any, total: int) -> frozenset[int] | None:
    """Indices of the blocks that keep their activations, or None for the model's own choice."""
    if memory in ("auto", "model"):
        return None
    if memory == "least":
        return frozenset()
    if memory == "most":
        return frozenset(range(total))
    if isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        count = min(memory, total)
    elif isinstance(memory, float) and 0 <= memory <= 1:
        count = round(memory * total)
    else:
        raise BadOption(
            f"memory={memory!r}; it is 'auto', an amount such as '24GB', 'model', 'least', 'most', a number of blocks (an "
            "int), or a share of them (a float from 0.0 to 1.0)"
        )
    return frozenset(range(total - count, total))


_OFFLOADS = ("activations", "weights")


def offload_names(offload: Any) -> frozenset[str]:
    """Of "activations" and "weights", what `offload` asks for.

    Raises:
        BadOption: another value.
    """
    if offload is None:
        return frozenset()
    names = [offload] if isinstance(offload, str) else offload
    if names == ["all"]:
        names = _OFFLOADS
    if not isinstance(names, Collection) or not names or not all(n in _OFFLOADS for n in names):
        raise BadOption(f"offload={offload!r}; it is None, 'activations', 'weights', 'all', or a tuple of such names")
    return frozenset(names)

"""How many bytes a training run takes, by part, before any is spent: `plan`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from qft.errors import BadFolder, BadOption, QftWarning

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

MOST_TOKENS = 2**24
"""Upper bound of a planned batch size, sequence length and number of cards; a block is traced at these sizes."""


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
        from qft.html_card import html_card

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


def plan(
    model_or_config_or_path: Any,
    quantizer: Any = "nf4",
    *,
    sequence_length: int,
    batch_size: int = 1,
    adapter: Any = None,
    optimizer: str = "adamw",
    memory: Any = "least",
    fast: bool = True,
    autocast: bool = False,
    cards: int = 1,
    loading: str = "folder",
    dtype: Any = None,
    device: Any = None,
    skip: Any = None,
    offload: Any = None,
    resident: int | None = None,
) -> Plan:
    """Count the bytes of a training run of LoRA over a quantized decoder, without its weights: nothing is downloaded.

    The weights are weighed by the quantizer's own count. Activations are measured: what stands around the blocks, and one
    block of each kind, run forward and backward under fake tensors, on any machine. A mixture's tokens are taken to
    reach all experts.

    Args:
        model_or_config_or_path: a config of transformers, a folder with one, or a model in memory, which is not touched.
        quantizer: as `quantize` takes it.
        sequence_length, batch_size: tokens in a sequence, and sequences in a step, of each card.
        adapter: a `LoraConfig`; default rank 16 on all linear layers. Weights of adapters are float32.
        optimizer: "adamw" (torch's), "adamw8bit", "paged_adamw8bit", "paged_adamw32bit" (bitsandbytes'), "sgd",
            "sgd_momentum", or transformers' name of one of these. What is paged is in host memory.
        memory: which blocks keep their activations, as `optimize_training` takes it; "auto" and "model" recompute all. Or what
            there is, "24GB" or "24GiB": then the plan is for what fits in it, and `answer` says what was chosen and why.
        fast: under `optimize_training`: compiled blocks, no logits. False: as the model's own code computes it.
        autocast: the step runs under bfloat16 autocast.
        cards: shard weights, adapters and states over this many; each gathers two blocks, embeddings and head at a time.
            Not measured.
        loading: "folder" streams shards, one float weight at a time; "memory" quantizes a float model on the card in place.
        dtype: of the model; default its config's, else bfloat16.
        device: "cuda" (the default) or another accelerator; "cpu" leaves cuBLAS's workspace out.
        skip: as `quantize` takes it, a list.
        offload: as `optimize_training` takes it.
        resident: with offload="weights", blocks whose weights stay on the device; default none of them, or with a given
            memory as many as fit.

    Raises:
        BadOption: an option of another value. BadFolder: no config there.
        UnknownQuantizer, MissingDependency, BadShape, NoTargets: quantizer, adapter and model do not go together.
        UnsupportedOperation: encoder-decoders, models without one stack of repeated blocks; DoRA, QA-LoRA, biases of
            adapters, modules trained whole.
    """
    from qft.memory.choice import choose
    from qft.memory.moments import Estimate
    from qft.quantizer import as_float_dtype

    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length), ("cards", cards)):
        if type(value) is not int or value < 1:
            raise BadOption(f"{name}={value!r}; it is an int of at least 1")
        if value > MOST_TOKENS:
            raise BadOption(f"{name}={value!r}; it is at most {MOST_TOKENS}")
    if loading not in ("folder", "memory"):
        raise BadOption(f"loading={loading!r}; it is 'folder' or 'memory'")
    if isinstance(skip, str):
        raise BadOption(f"skip={skip!r}: give plan a list of names")
    try:
        kind = torch.device("cuda" if device is None else device).type
    except RuntimeError as error:
        raise BadOption(f"device={device!r}: {str(error).splitlines()[0]}") from error
    estimate = Estimate(
        model_or_config_or_path,
        quantizer,
        adapter=adapter,
        dtype=None if dtype is None else as_float_dtype(dtype),
        skip=skip,
        fast=fast,
        autocast=autocast,
        optimizer=optimizer,
        cards=cards,
        on_gpu=kind == "cuda",
        in_place=loading == "memory",
        offload=offload_names(offload),
        resident=resident,
    )
    if estimate.offload and (not fast or cards > 1):
        raise BadOption("offload is optimize_training's: for plans with fast=True, of one card")
    if resident is not None and (type(resident) is not int or resident < 0 or "weights" not in estimate.offload):
        raise BadOption(f"resident={resident!r}; it is a number of blocks, beside offload='weights'")
    positions = getattr(estimate.outline.model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and sequence_length > positions:
        warnings.warn(
            f"sequence_length={sequence_length}, and the model has {positions} positions: it was not made for that",
            QftWarning,
            stacklevel=2,
        )
    limit = memory_limit(memory)
    if limit is not None:
        return choose(estimate, batch_size, sequence_length, limit, str(memory))
    return estimate.plan(batch_size, sequence_length, memory)


def memory_limit(memory: Any) -> int | None:
    """Bytes where `memory` is an amount, such as "24GB"; None where it says which blocks keep their activations."""
    return memory_of(memory) if isinstance(memory, str) and memory not in KEEP else None


def check_memory(memory: Any) -> None:
    """Refuse what is neither an amount of memory, nor a number or share of blocks, nor one of the names.

    Raises:
        BadOption: what it can be.
    """
    if not isinstance(memory, str) or memory in KEEP:
        kept_blocks(memory, 1)
    else:
        memory_limit(memory)


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

"""How many bytes a training run takes, by part, before any is spent: `plan`."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from qft.errors import BadOption, QftWarning
from qft.memory.report import KEEP, Plan, kept_blocks, memory_limit, offload_names

MOST_TOKENS = 2**24
"""Upper bound of a planned batch size, sequence length and number of cards; a block is traced at these sizes."""


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
    from qft.core.quantizer import as_float_dtype
    from qft.memory.estimate import Estimate
    from qft.memory.fit import choose

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


def check_memory(memory: Any) -> None:
    """Refuse what is neither an amount of memory, nor a number or share of blocks, nor one of the names.

    Raises:
        BadOption: what it can be.
    """
    if not isinstance(memory, str) or memory in KEEP:
        kept_blocks(memory, 1)
    else:
        memory_limit(memory)

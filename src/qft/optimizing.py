"""Switch a model's training step to its fast form, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from qft import blocks as _blocks
from qft.choosing import Chooser
from qft.errors import BadOption, QftWarning, UnsupportedDevice, UnsupportedOperation
from qft.headless import HeadlessForward, Patch, why_not
from qft.memory import memory_limit
from qft.optimizers import wait_as_before, wait_once


@dataclass
class Switches:
    """For measurements; each part of `optimize_training` by itself.

    Attributes:
        loss: "own" or "liger" kernels for the loss, "auto" for liger-kernel's where it is installed and fits, or "off".
        compile: whether blocks are compiled, where there is a compiler for the device.
        backend: of torch.compile.
    """

    loss: Literal["auto", "own", "liger", "off"] = "auto"
    compile: bool = True
    backend: str | Callable[..., Any] = "inductor"


switches = Switches()


def optimize_training(
    model: nn.Module,
    *,
    memory: str | int | float = "auto",
    compute: str = "bf16",
    offload: str | None = None,
) -> nn.Module:
    """Switch the training step of a causal language model of transformers to its fast form; weights stay as they are.

    While the model trains (in `train()` mode, with gradients) its loss comes from hidden states, chunk by chunk, and
    `logits` of the output are None; repeated blocks run as one compiled function each, and what is recomputed in the
    backward pass is recomputed inside it; bitsandbytes' optimizers wait for the device once a step. Evaluation,
    generation, and calls without labels run the model's own code. Nothing of this is in the state dict, and `save`,
    `merge`, pickle and deepcopy work as before. A second call replaces the options of the first.

    Args:
        model: a model, quantized or not, or a PeftModel over one.
        memory: which blocks keep their activations for the backward pass; the others are recomputed. Those that keep
            theirs are the last ones.

            - "auto": on CUDA, as many as fit into what this process can have on the model's device. This overrides the
              model's own gradient checkpointing, which `prepare_model_for_kbit_training` switches on. Elsewhere "model".
            - "24GB" (10⁹), "24GiB" (2³⁰), "24000000000B": as many as fit when the whole process is to use no more than that.
            - "model": the model's own choice: none where gradient checkpointing is on, else all.
            - "least": none. "most": all. An integer, or a float from 0.0 to 1.0 as a share: that many.

            The first two are decided at each training batch of a new size, from `qft.plan`'s estimate of the model as it
            stands, with the states of torch's AdamW counted in until an optimizer has its own: a second at most, after
            which the decision is kept for batches of that size. A batch for which even recomputing all blocks is too
            much is refused before anything of it is computed. Where a plan knows nothing of the model (encoder-decoders,
            DoRA, weights that are trained whole), a warning says so, and it is "model".
        compute: "bf16" leaves the dtypes of the model and of autocast.
        offload: None keeps on the device what a recomputed block starts from.

    Returns:
        The same model.

    Raises:
        BadOption: an option of another value.
        UnsupportedOperation: compute="fp8", offload="activations".
        UnsupportedDevice: offload="activations" on another device than CUDA.

        And from a training forward, BadOption or UnsupportedDevice: the batch does not fit; the message says what does.
    """
    owners = _blocks.find_blocks(model)
    total = sum(len(members) for _, members in owners)
    chooses = _chooses(memory)
    keeps = None if chooses else _kept(memory, total)
    if compute == "fp8":
        raise UnsupportedOperation(
            "compute='fp8' is not available in this version: base weights are multiplied in the model's compute dtype; "
            "use compute='bf16'"
        )
    if compute != "bf16":
        raise BadOption(f"compute={compute!r}; it is 'bf16'")
    device = _device(model)
    if offload not in (None, "activations"):
        raise BadOption(f"offload={offload!r}; it is None or 'activations'")
    if offload and device.type != "cuda":
        raise UnsupportedDevice(
            f"offload='activations' keeps activations in host memory, and the model is on {device.type}: it is for CUDA"
        )
    if offload:
        raise UnsupportedOperation("offload='activations' is not available in this version; use memory='least'")
    unoptimize(model)
    wait_once(model)
    inner, loss = _language_model(model), None
    if switches.loss != "off":
        reason = why_not(inner)
        if reason is None:
            loss = HeadlessForward(inner, switches.loss)
            loss.put_on()
        else:
            _warn(f"the loss is computed from the logits of all tokens: {reason}")
    if not owners:
        _warn(f"{type(inner).__name__} has no repeated blocks that qft can find: its layers are not compiled")
        return model
    plan = _blocks.Plan(
        compiles=_compiles(device),
        backend=switches.backend,
        keeps=keeps,
        loss=loss,
    )
    if chooses:
        plan.chooser = Chooser(str(memory), inner, plan)
    index = 0
    for owner, members in owners:
        _blocks.BlocksForward(owner, members, plan).put_on()
        for block in members:
            _blocks.BlockForward(block, index, plan).put_on()
            index += 1
    return model


def unoptimize(model: nn.Module) -> nn.Module:
    """Undo `optimize_training`: the model computes what it computed before, to the bit. Without it, nothing happens."""
    wait_as_before(model)
    for module in model.modules():
        patch = module.__dict__.get("forward")
        if isinstance(patch, _blocks.BlockForward) and patch.plan.loss is not None:
            patch.plan.loss.take_off()  # a trainer may have put its own forward on top of it
        if isinstance(patch, Patch):
            patch.take_off()
    return model


def _chooses(memory: Any) -> bool:
    """Whether each batch decides which blocks keep their activations."""
    try:
        return memory == "auto" or memory_limit(memory) is not None
    except BadOption:  # `_kept` says what it can be
        return False


def _kept(memory: Any, total: int) -> frozenset[int] | None:
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


def _language_model(model: nn.Module) -> nn.Module:
    """The model of transformers inside a PeftModel, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _compiles(device: torch.device) -> bool:
    if not switches.compile:
        return False
    missing = _blocks.no_compiler(device)
    if missing is not None:
        _warn(f"blocks are not compiled: {missing}")
    return missing is None


def _warn(text: str) -> None:
    warnings.warn(text, QftWarning, stacklevel=3)

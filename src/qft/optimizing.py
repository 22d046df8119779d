"""Switch a model's training step to its fast form, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from qft import blocks as _blocks
from qft.errors import BadOption, QftWarning, UnsupportedDevice, UnsupportedOperation
from qft.headless import HeadlessForward, Patch, why_not
from qft.offloading import Checkpoints
from qft.optimizers import wait_as_before, wait_once
from qft.places import check
from qft.streaming import WeightStream


@dataclass
class Switches:
    """For measurements; each part of `optimize_training` by itself.

    Attributes:
        loss: "own" or "liger" kernels for the loss, "auto" for liger-kernel's where it is installed and fits, or "off".
        compile: whether blocks are compiled, where there is a compiler for the device.
        backend: of torch.compile.
        resident: with offload="weights", how many blocks' weights stay on the device; None: as many as there is room for.
        offload_on_cpu: whether a CPU may offload, to itself: copies without streams, which show nothing but the logic.
    """

    loss: Literal["auto", "own", "liger", "off"] = "auto"
    compile: bool = True
    backend: str | Callable[..., Any] = "inductor"
    resident: int | None = None
    offload_on_cpu: bool = False


switches = Switches()


def optimize_training(
    model: nn.Module,
    *,
    memory: str | int | float = "auto",
    compute: str = "bf16",
    offload: str | Collection[str] | None = None,
) -> nn.Module:
    """Switch the training step of a causal language model of transformers to its fast form; weights stay as they are.

    While the model trains (in `train()` mode, with gradients) its loss comes from hidden states, chunk by chunk, and
    `logits` of the output are None; repeated blocks run as one compiled function each, and what is recomputed in the
    backward pass is recomputed inside it; bitsandbytes' optimizers wait for the device once a step. Evaluation,
    generation, and calls without labels run the model's own code. Nothing of this is in the state dict, and `save`,
    `merge`, pickle and deepcopy work as before. A second call replaces the options of the first.

    Args:
        model: a model, quantized or not, or a PeftModel over one.
        memory: which blocks keep their activations for the backward pass. "auto" leaves that to the model: none where
            gradient checkpointing is on, else all. "least": none. "most": all. An integer, or a float from 0.0 to 1.0
            as a share: that many of the last ones, the others are recomputed.
        compute: "bf16" leaves the dtypes of the model and of autocast.
        offload: what is in host memory while nothing computes with it, copied beside the computation. "activations": what
            recomputed blocks start from, between forward and backward pass. "weights": the packed weights of as many
            blocks as do not fit, a block ahead of where they are dequantized, also in evaluation; all else goes to the
            device, which is CUDA's for a model that was quantized on the CPU. "all", or a tuple: both. None: nothing.

    Returns:
        The same model.

    Raises:
        BadOption: an option of another value.
        UnsupportedOperation: compute="fp8"; offload="weights" of weights that cannot be streamed.
        UnsupportedDevice: offload without CUDA.
    """
    owners = _blocks.find_blocks(model)
    total = sum(len(members) for _, members in owners)
    keeps = _kept(memory, total)
    if compute == "fp8":
        raise UnsupportedOperation(
            "compute='fp8' is not available in this version: base weights are multiplied in the model's compute dtype; "
            "use compute='bf16'"
        )
    if compute != "bf16":
        raise BadOption(f"compute={compute!r}; it is 'bf16'")
    offloads, device = _offloads(offload, model)
    members = [block for _, some in owners for block in some]
    if "weights" in offloads:
        check(members)
    _remove(model, back="weights" not in offloads)
    weights = WeightStream.over(model, members, device, switches.resident) if "weights" in offloads else None
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
        checkpoints=Checkpoints() if "activations" in offloads else None,
        weights=weights,
    )
    index = 0
    for owner, members in owners:
        _blocks.BlocksForward(owner, members, plan).put_on()
        for block in members:
            _blocks.BlockForward(block, index, plan).put_on()
            index += 1
    return model


def unoptimize(model: nn.Module) -> nn.Module:
    """Undo `optimize_training`: the model computes what it computed before, to the bit. Without it, nothing happens.

    Weights that were offloaded go to the device; where that has no room for them they stay on the host, and a warning
    says so.
    """
    return _remove(model, back=True)


def _remove(model: nn.Module, back: bool) -> nn.Module:
    """`unoptimize`, with offloaded weights going `back` to the device or not."""
    wait_as_before(model)
    plans: dict[int, _blocks.Plan] = {}
    for module in model.modules():
        patch = module.__dict__.get("forward")
        if isinstance(patch, _blocks.BlockForward):
            plans[id(patch.plan)] = patch.plan
            if patch.plan.loss is not None:
                patch.plan.loss.take_off()  # a trainer may have put its own forward on top of it
        if isinstance(patch, Patch):
            patch.take_off()
    for plan in plans.values():
        if plan.checkpoints is not None:
            plan.checkpoints.free()
        if plan.weights is not None:
            plan.weights.take_off(back)
    return model


def _kept(memory: Any, total: int) -> frozenset[int] | None:
    """Indices of the blocks that keep their activations, or None for the model's own choice."""
    if memory == "auto":
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
            f"memory={memory!r}; it is 'auto', 'least', 'most', a number of blocks (an int), or a share of them (a float "
            "from 0.0 to 1.0)"
        )
    return frozenset(range(total - count, total))


_OFFLOADS = ("activations", "weights")


def _offloads(offload: Any, model: nn.Module) -> tuple[frozenset[str], torch.device]:
    """What is offloaded, and the device that computes."""
    device = _device(model)
    found = offload_names(offload)
    if not found:
        return found, device
    if device.type == "cpu" and "weights" in found and torch.cuda.is_available() and not switches.offload_on_cpu:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda" and not (device.type == "cpu" and switches.offload_on_cpu):
        raise UnsupportedDevice(
            f"offload={offload!r} keeps {' and '.join(sorted(found))} in host memory, and the model is on {device.type}: it "
            "is for CUDA"
        )
    return found, device


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

"""Switch a model's training step to its fast form, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from qft.core.blocks import find_blocks
from qft.core.registry import quantizer_of
from qft.errors import BadOption, QftWarning, UnsupportedDevice, UnsupportedOperation
from qft.memory.report import kept_blocks, memory_limit, offload_names
from qft.ops.source import Sourced
from qft.optimize import blocks as _blocks
from qft.optimize.loss_without_logits import HeadlessForward, Patch, why_not
from qft.optimize.offload_activations import Checkpoints
from qft.optimize.offload_weights import WeightStream
from qft.optimize.optimizers import wait_as_before, wait_when_read
from qft.optimize.packed_tensors import check
from qft.optimize.recompute import Chooser


@dataclass
class Switches:
    """For measurements; each part of `optimize_training` by itself.

    Attributes:
        loss: the loss without logits, by "own" code or "liger" kernels, "auto" for liger-kernel's where it is installed and
            qft's kernel cannot run; or "off".
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
    backward pass is recomputed inside it; bitsandbytes' optimizers do not wait for the device in their steps. Evaluation,
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
        compute: "bf16" leaves the dtypes of the model and of autocast. "fp8": where a layer computes in bfloat16 while it
            trains, with gradients, its base weight's two products are of float8 (e4m3, a scale a row; `qft.ops.float8`),
            3 to 4 % off in the Frobenius norm, on CUDA devices of compute capability 8.9 and newer; a warning counts the
            layers that stay as they are. The adapters' products, evaluation, merging and saving are not touched.
        offload: what is in host memory while nothing computes with it, copied beside the computation. "activations": what
            recomputed blocks start from, between forward and backward pass. "weights": the packed weights of as many
            blocks as do not fit, a block ahead of where they are dequantized, also in evaluation; all else goes to the
            device, which is CUDA's for a model that was quantized on the CPU. "all", or a tuple: both. None: nothing.

    Returns:
        The same model.

    Raises:
        BadOption: an option of another value.
        UnsupportedOperation: compute="fp8" on a model without a layer that can; offload="weights" of weights that cannot be
            streamed.
        UnsupportedDevice: compute="fp8" where no layer is on a device that can; offload without CUDA.

        And from a training forward, BadOption or UnsupportedDevice: the batch does not fit; the message says what does.
    """
    owners = find_blocks(model)
    total = sum(len(members) for _, members in owners)
    chooses = _chooses(memory)
    keeps = None if chooses else kept_blocks(memory, total)
    offloads, device = _offloads(offload, model)
    members = [block for _, some in owners for block in some]
    if "weights" in offloads:
        check(members)
    in_float8, notes = _computes(model, compute)
    _remove(model, back="weights" not in offloads)
    for note in notes:
        _warn(note)
    for layer in in_float8:
        layer.float8 = True
    weights = WeightStream.over(model, members, device, switches.resident) if "weights" in offloads else None
    wait_when_read(model)
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
    plan = _blocks.BlockPlan(
        compiles=_compiles(device),
        backend=switches.backend,
        keeps=keeps,
        loss=loss,
        checkpoints=Checkpoints() if "activations" in offloads else None,
        weights=weights,
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
    """Undo `optimize_training`: the model computes what it computed before, to the bit. Without it, nothing happens.

    Weights that were offloaded go to the device; where that has no room for them they stay on the host, and a warning
    says so.
    """
    return _remove(model, back=True)


def _remove(model: nn.Module, back: bool) -> nn.Module:
    """`unoptimize`, with offloaded weights going `back` to the device or not."""
    wait_as_before(model)
    plans: dict[int, _blocks.BlockPlan] = {}
    for module in model.modules():
        patch = module.__dict__.get("forward")
        if isinstance(patch, _blocks.BlockForward):
            plans[id(patch.plan)] = patch.plan
            if patch.plan.loss is not None:
                patch.plan.loss.take_off()  # a trainer may have put its own forward on top of it
        if isinstance(patch, Patch):
            patch.take_off()
        module.__dict__.pop("float8", None)
    for plan in plans.values():
        if plan.checkpoints is not None:
            plan.checkpoints.free()
        if plan.weights is not None:
            plan.weights.take_off(back)
    return model


def _chooses(memory: Any) -> bool:
    """Whether each batch decides which blocks keep their activations."""
    try:
        return memory == "auto" or memory_limit(memory) is not None
    except BadOption:  # `kept_blocks` says what it can be
        return False


def _computes(model: nn.Module, compute: Any) -> tuple[list[Sourced], list[str]]:
    """The layers whose base is to be multiplied in float8, and what to say of the others."""
    if compute == "bf16":
        return [], []
    if compute != "fp8":
        raise BadOption(f"compute={compute!r}; it is 'bf16' or 'fp8'")
    from qft.ops import float8

    found: list[Sourced] = []
    others: dict[str, list[str]] = {}
    lacking: set[str] = set()
    floats = 0
    for name, module, why in _linears(model):
        device = _device(module)
        reason = why
        if reason is None:
            assert isinstance(module, Sourced)
            sides = (module.out_features, module.in_features)
            if any(n % float8.MULTIPLE for n in sides) or 0 in sides:
                reason = (
                    f"out_features and in_features are multiples of {float8.MULTIPLE} for float8, and these are not"
                )
        if reason is None:
            reason = float8.why_not(device)
            lacking.update([reason] if reason else [])
        if reason is None:
            found.append(module)
            floats += module.handle.dtype != torch.bfloat16
        else:
            others.setdefault(reason, []).append(name)
    if not found and lacking:
        raise UnsupportedDevice(f"compute='fp8': {'; '.join(sorted(lacking))}. Use compute='bf16'")
    if not found:
        why = "; ".join(f"{len(names)} of its layers: {reason}" for reason, names in others.items())
        raise UnsupportedOperation(
            f"compute='fp8' is for the layers of a model that qft quantized or wrapped, and none of this one can take it"
            f"{': ' + why if why else ''}. Use compute='bf16'"
        )
    total = len(found) + sum(map(len, others.values()))
    notes = [
        f"compute='fp8': {len(names)} of {total} layers keep their dtype ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}): {reason}"
        for reason, names in others.items()
    ]
    if floats:
        notes.append(
            f"compute='fp8': {floats} of {total} layers have weights of another dtype than bfloat16; they multiply in float8 "
            "where autocast, or the model, makes their inputs bfloat16, and as they did elsewhere"
        )
    return found, notes


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, layer, None or why its base is not multiplied by our code) of all layers that are quantized or adapted."""
    from qft.lora.experts import QftExperts

    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, Sourced):
            inside.update(id(m) for m in module.modules())
            native = getattr(module, "native", False)
            yield name, module, _VENDORS if native is True else None
        elif isinstance(module, QftExperts):
            inside.update(id(m) for m in module.modules())
            yield name, module, _EXPERTS
        elif quantizer_of(module) is not None:
            inside.update(id(m) for m in module.modules())
            kinds = {handle.kind for handle in quantizer_of(module).weights(module)}
            yield name, module, _EXPERTS if "experts" in kinds else _VENDORS


_VENDORS = "they compute by their format's own code"
_EXPERTS = "fused experts have no product of float8 here"


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

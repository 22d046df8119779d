"""Where a model's packed weights are, and how many of its blocks keep them on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.core import devices
from qft.core.packed import PackedLinear, PackedModule
from qft.core.quantizer import Quantizer
from qft.core.registry import quantizer_of
from qft.errors import UnsupportedOperation
from qft.lora.layer import QftLinear
from qft.memory.report import BUFFERS
from qft.optimize import copies

GIB = 2**30
FOR_A_STEP = 4 * GIB
"""What is left for activations where nobody says how many blocks stay on the device."""


@dataclass(eq=False)
class Place:
    """A quantized module, and whose method gives its floats."""

    quantizer: Quantizer
    module: nn.Module
    owner: nn.Module
    method: str

    def tensors(self) -> list[Tensor]:
        """What dequantizing reads, as the module holds it now."""
        return self.quantizer.tensors(self.quantizer.weights(self.module)[0])


def key_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def moved_once(moved: dict[Any, Tensor], tensor: Tensor, move: Any) -> Tensor:
    """`move` (tensor), once for all names of a tensor; the old one lives until all of them have it."""
    key = key_of(tensor)
    if key not in moved:
        moved[key] = move(tensor)
    return moved[key]


def places(block: nn.Module) -> list[Place]:
    """The quantized modules of a block that dequantize where a stream can see it.

    Raises:
        UnsupportedOperation: adapters or a vendor's forward that read a packed weight in another way.
    """
    owners = {id(m.base_layer): m for m in block.modules() if isinstance(m, QftLinear)}
    for owner in owners.values():
        if owner.native or owner.lora_variant:
            what = "forward='native'" if owner.native else "DoRA"
            raise UnsupportedOperation(
                f"{what} reads quantized weights in a way of its own, which offload='weights' cannot follow: wrap the model "
                "without it"
            )
    found = []
    for module in block.modules():
        quantizer = quantizer_of(module)
        if quantizer is None or not quantizer.weights(module):
            continue
        owner = owners.get(id(module))
        if owner is None and not isinstance(module, PackedModule):
            continue  # a vendor's layer without an adapter runs its own forward: it stays
        method = "dequantized" if owner is not None or isinstance(module, PackedLinear) else "unpacked"
        place = Place(quantizer, module, module if owner is None else owner, method)
        tensors = place.tensors()
        if not tensors or not all(copies.dense(t) for t in tensors):
            raise UnsupportedOperation(
                f"offload='weights' cannot stream weights of {type(quantizer).__name__}: its tensors are of a class of their "
                "own; choose another quantizer, or offload='activations'"
            )
        found.append(place)
    return found


def check(blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, list[Place]]]:
    """The blocks that have places, with them.

    Raises:
        UnsupportedOperation: weights that cannot be streamed, or none.
    """
    found = [(b, f) for b, f in ((b, places(b)) for b in blocks) if f]
    if not found:
        raise UnsupportedOperation(
            "offload='weights' streams the quantized weights of repeated blocks, and this model has none that qft can find: "
            "quantize and wrap it first"
        )
    return found


def nbytes_of(block: Sequence[Place]) -> int:
    """What a block's streamed tensors take."""
    seen = {key_of(t): copies.aligned(t.numel() * t.element_size()) for place in block for t in place.tensors()}
    return sum(seen.values())


def free_bytes(device: torch.device) -> int | None:
    """What this process may still allocate there; None where nobody counts (CPU)."""
    if device.type != "cuda":
        return None
    return devices.free_bytes(device)


def spread(total: int, streamed: int) -> list[int]:
    """Indices of the `streamed` of `total` blocks, evenly: what is resident between two gives the next one time to come."""
    return sorted({(2 * i + 1) * total // (2 * streamed) for i in range(streamed)}) if streamed else []


def stays(model: nn.Module, sizes: Sequence[int], device: torch.device) -> int:
    """How many of the blocks, whose packed weights take `sizes`, stay on the device beside a training step.

    What a step needs is not known here: `FOR_A_STEP`, and gradients and AdamW's states of what is trained.
    """
    room = free_bytes(device)
    if room is None or not sizes:
        return 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = bytes_elsewhere(model, device)
    there = sum(sizes) if _on(model, device) else 0
    left = room + there - (rest + 12 * trained + FOR_A_STEP + BUFFERS * max(sizes))
    return min(len(sizes), max(0, left // max(sizes)))


def _on(model: nn.Module, device: torch.device) -> bool:
    return next((p.device for p in model.parameters()), device) == device


def bytes_elsewhere(model: nn.Module, device: torch.device) -> int:
    """What is not on the device yet of all that is not packed."""
    packed = {id(t) for m in model.modules() if quantizer_of(m) is not None for t in (*m.parameters(), *m.buffers())}
    seen = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed and t.device != device}
    return sum(t.numel() * t.element_size() for t in seen.values())


def to_device(model: nn.Module, device: torch.device, streamed: set[int]) -> None:
    """Everything but the streamed tensors, by id; parameters stay the objects that an optimizer knows."""
    for module in model.modules():
        moved: dict[Any, Tensor] = {}
        quantizer: Any = quantizer_of(module)
        more = [t for w in quantizer.weights(module) for t in quantizer.tensors(w)] if quantizer is not None else []
        own = [t for store in (module._parameters, module._buffers) for t in store.values() if t is not None]
        for t in (*own, *more):
            if id(t) not in streamed and t.device != device:
                t.data = moved_once(moved, t, lambda t: t.detach().to(device))
                if t.grad is not None:
                    t.grad = None

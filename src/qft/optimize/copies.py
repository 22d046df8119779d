"""Copies between a device and pinned host memory that run beside the computation, and tensors laid out in flat buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNED = 512
"""Bytes between the starts of tensors in a flat buffer, as CUDA's allocator has them."""


class Lane:
    """A stream for copies of one device, which run in the order in which they were asked for.

    On the CPU there is no stream, and a copy is done at once: the logic around it stays the same.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy once all that the current stream was given so far is done; a mark to wait for."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            mark = torch.cuda.Event()
            mark.record(self._stream)
        return mark

    def wait(self, mark: Any) -> None:
        """What the current stream is given from now on comes after that copy; the host goes on."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def settle(self) -> None:
        """The host waits until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Bytes in host memory, (nbytes,) uint8, pinned where `device` copies from it beside its work."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory without gaps, in whatever order."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        return False
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) == tensor.numel()


def laid(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A view of flat bytes from `offset`, with shape, strides and dtype of the dense tensor `like`."""
    piece = flat[offset : offset + like.numel() * like.element_size()]
    return piece.view(like.dtype).as_strided(like.shape, like.stride())


def aligned(nbytes: int) -> int:
    """Round bytes up to the alignment of copies."""
    return -(-nbytes // ALIGNED) * ALIGNED

"""Whether and how a kernel runs; triton is imported when the first one does."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qft.errors import QftWarning

CONFIGS: dict[str, dict[str, int]] = {
    "stream": {"BLOCK": 256, "num_warps": 4},
    "parts": {"BLOCK": 256, "num_warps": 4},
    "eetq": {"BLOCK": 128, "num_warps": 4},
    "gptq": {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128, "num_warps": 4},
    "gptq_ordered": {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "num_warps": 4},
    "additive": {"BLOCK": 256, "num_warps": 4},
    "awq": {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 64, "num_warps": 4},
    "next_token": {"BLOCK": 4096, "num_warps": 8},
    "float8_transposed": {"ROWS": 128, "COLUMNS": 64, "num_warps": 4},
    "float8_codebook_transposed": {"ROWS": 128, "UNITS": 8, "num_warps": 4},
}
"""Block sizes by program, in units of eight weights or in rows and columns; `benchmarks/dequantize.py --sweep` tries others."""

enabled = os.environ.get("QFT_KERNELS", "1") != "0"
"""Read once: looking into the environment takes longer than all the other questions together."""

_PLAIN = (Tensor, nn.Parameter)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_broken: set[int] = set()  # indices of devices


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and _installed()


def usable(tensor: Tensor) -> bool:
    """Whether kernels can run on `tensor`: a plain CUDA tensor, triton installed, and `QFT_KERNELS` not 0."""
    return (
        enabled
        and (tensor.is_cuda or (_interpreted() and tensor.is_cpu))
        and not torch.compiler.is_compiling()
        and type(tensor) in _PLAIN
        and tensor.get_device() not in _broken
        and _installed()
    )


def fits(tensors: Sequence[Tensor | None], shape: Sequence[int], dtype: torch.dtype, out: Tensor | None) -> bool:
    """Whether kernels can take these: `tensors` contiguous, on one device that they run on, `out` on it, and as asked."""
    if not usable(tensors[0]) or 0 in shape:
        return False
    device = tensors[0].get_device()
    for tensor in tensors:
        if tensor is not None and (tensor.get_device() != device or not tensor.is_contiguous()):
            return False
    if out is None:
        return dtype in _FLOATS
    return out.dtype in _FLOATS and out.get_device() == device and out.shape == tuple(shape) and type(out) in _PLAIN


def launch(program: str, grid: tuple[int, ...], *args: Any, config: dict[str, int], **constants: Any) -> bool:
    """Run a program of `programs` or `programs_float8` on the device of its first argument; whether that went well.

    A device on which it does not, for want of a compiler or of hardware, is left to torch from now on.
    """
    device = args[0].get_device()
    try:
        if program.startswith("float8"):
            from qft.ops.kernels import programs_float8 as programs
        else:
            from qft.ops.kernels import programs

        run = getattr(programs, program)[grid]
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                run(*args, **constants, **config, enable_fp_fusion=False)
        else:
            run(*args, **constants, **config, enable_fp_fusion=False)
    except Exception as error:
        if _interpreted():
            raise
        _broken.add(device)
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(
            f"triton cannot run qft's kernel {program!r} on device {device} ({why}): weights are dequantized by torch code "
            "there, which is slower; QFT_KERNELS=0 in the environment avoids the attempt",
            QftWarning,
            stacklevel=2,
        )
        return False
    return True

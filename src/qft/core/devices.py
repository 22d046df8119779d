"""Which device qft uses: CUDA, XPU, MPS or the CPU; and what stands in for a quantizer that has no kernels for MPS.

Two variables of autotrain's are honoured, each where it is "1": AUTOTRAIN_DISABLE_MPS leaves MPS unused, and
AUTOTRAIN_ENABLE_MPS keeps a model on MPS that would go to the CPU for want of kernels: it is refused then. The first wins.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from qft.errors import QftWarning, UnsupportedDevice

DISABLE, ENABLE = "AUTOTRAIN_DISABLE_MPS", "AUTOTRAIN_ENABLE_MPS"


def present() -> dict[str, int]:
    """Kind of accelerator → how many this machine has, as torch sees them, the preferred kind first."""
    found = {}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.device_count()
    if torch.xpu.is_available():
        found["xpu"] = torch.xpu.device_count()
    if torch.backends.mps.is_available():
        found["mps"] = 1
    return found


def mps_disabled() -> bool:
    """Whether the environment forbids MPS. A trainer that picks its own device wants `use_cpu=True` then."""
    return os.environ.get(DISABLE) == "1"


def mps_forced() -> bool:
    """Whether the environment wants MPS or nothing."""
    return os.environ.get(ENABLE) == "1" and not mps_disabled()


def default_device() -> torch.device:
    """The accelerator where there is one that may be used, else the CPU."""
    for kind in present():
        if kind == "mps":
            if not mps_disabled():
                return torch.device("mps")
            continue
        backend = getattr(torch, kind)
        return torch.device(kind, backend.current_device() if backend.is_initialized() else 0)
    return torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device.

    They are what is free and what torch holds there unused, and no more than
    `torch.cuda.set_per_process_memory_fraction` leaves.
    """
    if device.type == "cuda":
        if device.index is None:  # not all of torch's questions take "cuda"
            device = torch.device("cuda", torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info(device)
        held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free + held, limit) - used
    import psutil

    return psutil.virtual_memory().available


def check_device(device: Any) -> torch.device | None:
    """A `torch.device` that exists here and may be used, or None.

    Raises:
        UnsupportedDevice: it does not, or may not.
    """
    if device is None:
        return None
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedDevice(f"{device!r} is no device: {error}".splitlines()[0]) from error
    if device.type == "meta":
        raise UnsupportedDevice("the meta device holds no values: nothing can be quantized there")
    if device.type == "mps" and mps_disabled():
        raise UnsupportedDevice(f"{device} was asked for, and {DISABLE}=1 forbids it: unset that, or try device='cpu'")
    if device.type in ("cuda", "xpu", "mps"):
        count = present().get(device.type, 0)
        if (device.index or 0) >= count:
            name = {"cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}[device.type]
            raise UnsupportedDevice(
                f"{device} was asked for, and this machine has {count} {name} devices; try device='cpu'"
            )
    elif device.type != "cpu":
        try:
            torch.empty(0, device=device)
        except Exception as error:
            raise UnsupportedDevice(f"{device} was asked for, and this machine has none; try device='cpu'") from error
    return device


def twin_for(quantizer: Any, device: torch.device) -> Any | None:
    """A quantizer of the same format in pure PyTorch that runs on `device`, or None."""
    twin = quantizer.for_experts()
    return twin if twin is not None and twin != quantizer and device.type in twin.capabilities.devices else None


def place(quantizers: Iterable[Any], *, stored: bool = False) -> torch.device:
    """Where to load a model for these quantizers, where the caller named no device.

    That is `default_device()`; where it is MPS, and one of them has neither kernels nor a twin there, it is the CPU, with a
    warning.

    Args:
        quantizers: None among them is a weight that stays in 16 bit.
        stored: the model was quantized before: a twin cannot take over.

    Raises:
        UnsupportedDevice: AUTOTRAIN_ENABLE_MPS=1, and one of them cannot run there.
    """
    device = default_device()
    if device.type != "mps":
        return device
    for q in quantizers:
        if q is None or "mps" in q.capabilities.devices or (not stored and twin_for(q, device) is not None):
            continue
        lacks = f"{q!r} has no kernels for MPS" + ("" if stored else ", and no twin in pure PyTorch")
        if mps_forced():
            raise UnsupportedDevice(
                f"{lacks}, and {ENABLE}=1 wants MPS or nothing: unset it for the CPU, or use 'reference', which runs "
                "everywhere"
            )
        warnings.warn(f"{lacks}: the model goes to the CPU", QftWarning, stacklevel=4)
        return torch.device("cpu")
    return device

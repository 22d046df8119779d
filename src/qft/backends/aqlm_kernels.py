"""The `aqlm` package's kernels over `AQLM`'s layers, for `forward="native"`.

Its CPU kernel for 8-bit codes adds up in several threads without a lock, wants the codes turned round, and turns those of
a layer round in place: here it runs in one thread, over a copy. Gradients are those of the dequantized weight.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qft.core.console import quiet_import
from qft.core.packed import PackedLinear
from qft.errors import MissingDependency, UnsupportedOperation

REQUIREMENT = "aqlm>=1.1.6,<1.2"

FEW = 6
"""Rows up to which the package takes its kernels for single vectors."""

OFF = 0.02
"""Of a result's norm: a kernel that is off by more is broken, the dtypes' rounding is below it."""

_checked: set[Any] = set()


def multiply(quantizer: Any, layer: PackedLinear, x: Tensor) -> Tensor:
    """Compute x Ŵᵀ + bias by the package's kernel for the device and format, differentiable in `x` and the bias.

    The first result of each kernel and shape is held against the dequantized weight's.

    Raises:
        MissingDependency: the package, or what its kernel is compiled with, is not there.
        UnsupportedOperation: the kernel computes something else on this machine.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _Product.apply(x.reshape(-1, x.shape[-1]), quantizer, layer).view(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantizer, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return _product(quantizer, layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g.to(ctx.dtype) @ ctx.layer.dequantized(ctx.dtype), None, None


def _product(quantizer: Any, layer: PackedLinear, x: Tensor) -> Tensor:
    _check_installed()
    packed = {n: t.detach() for n, t in layer.packed.items()}
    on_cpu = x.device.type == "cpu"
    turned = on_cpu and quantizer.nbits_per_codebook == 8 and quantizer.out_group_size == 1
    dtype = torch.float32 if turned else x.dtype
    codes, (books, scales) = packed["qweight"], (packed[n].to(dtype) for n in ("codebooks", "scales"))
    try:
        kernel = _kernel(books, many=math.prod(x.shape[:-1]) > FEW)
    except Exception as error:  # it is compiled when it is imported
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise MissingDependency(
            f"the aqlm package's kernel for {x.device.type} cannot be used ({line}): pip install 'aqlm[gpu,cpu]', and see "
            'that nvcc is there, or leave forward="native" out'
        ) from error
    if turned:
        with _one_thread():
            y = kernel(x.float().contiguous(), codes.transpose(0, 1).contiguous(), books, scales, None).to(x.dtype)
    else:
        y = kernel(x.contiguous(), codes, books, scales, None)
    key = (kernel, x.device, x.dtype, tuple(books.shape), tuple(codes.shape))
    if key not in _checked and len(x):
        wanted = x @ layer.dequantized(x.dtype).T
        off = float((y.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
        if not off < OFF:
            raise UnsupportedOperation(
                f"the aqlm package's kernel for {quantizer!r} on {x.device} is {off:.0%} off over a weight of "
                f'{layer.out_features} × {layer.in_features}: leave forward="native" out'
            )
        _checked.add(key)
    return y


def _kernel(books: Tensor, many: bool) -> Callable[..., Tensor]:
    selector = quiet_import("aqlm.inference_kernels.kernel_selector")
    if books.is_cuda and books.dtype == torch.float32:  # the CUDA kernels are for 16 bits
        return quiet_import("aqlm.inference_kernels.dequantization").dequantize_gemm
    return selector.get_forward_pass_kernel(books, many)


def _check_installed() -> None:
    from packaging.requirements import Requirement

    try:
        version = importlib.metadata.version("aqlm")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or not Requirement(REQUIREMENT).specifier.contains(version, prereleases=True):
        found = "is not installed" if version is None else f"is {version}"
        raise MissingDependency(
            f'forward="native" runs the aqlm package\'s kernels, and the package {found}: pip install {REQUIREMENT!r}'
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)

"""The base's products in float8 (e4m3): y = x Ŵᵀ and its gradient g Ŵ, summed by the device in float32, out in bfloat16.

Rows of x and of Ŵ are rounded to e4m3 with a scale each, s and t. The gradient sums over Ŵ's rows, so their scales go
to the other side first: Σₙ gₘₙ Ŵₙₖ = Σₙ (gₘₙ tₙ) qₙₖ, and rows of g t are rounded in the place of g's. Both products read
the same codes q of Ŵ. They and the scales are computed again at each product, as Ŵ itself is for products of bfloat16:
there is nothing to keep in step with a weight that merging or loading changes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qft.ops import kernels

if TYPE_CHECKING:
    from qft.ops.source import Sourced

CAPABILITY = (8, 9)
"""Of CUDA devices that multiply e4m3."""

MULTIPLE = 16
"""What in_features and out_features must be multiples of."""

emulated = False
"""For tests: on the CPU, codes are multiplied as float32."""


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, (n, in_features) and (n,)."""
    return kernels.float8_rows(x)


def forward_product(codes: Tensor, scale: Tensor, layer: Sourced) -> Tensor:
    """Compute x Ŵᵀ, bfloat16 (n, out_features), for the `rows` of x."""
    weight, factor = _weight(layer, transposed=False)
    return _multiply(codes, scale, weight, factor)


def gradient_product(g: Tensor, layer: Sourced) -> Tensor:
    """Compute g Ŵ, bfloat16 (n, in_features), for g (n, out_features)."""
    weight, factor = _weight(layer, transposed=True)
    codes, scale = kernels.float8_rows(g, factor)
    return _multiply(codes, scale, weight, _ones(len(weight), g.device))


@lru_cache
def _ones(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for calls of any mode
        return torch.ones(count, dtype=torch.float32, device=device)


def _weight(layer: Sourced, transposed: bool) -> tuple[Tensor, Tensor]:
    """Codes of Ŵ or of its transpose, with the scales of Ŵ's rows."""
    book = layer.codebook()
    found = None if book is None else kernels.float8_codebook(book, transposed=transposed)
    if found is not None:
        return found
    weight = layer.dequantized(torch.bfloat16).detach()
    return kernels.float8_transposed(weight) if transposed else kernels.float8_rows(weight)


def _multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """(n, k) by (m, k), with scales of n and of m rows: bfloat16 (n, m)."""
    if a.device.type == "cpu":
        return ((a.float() @ b.float().T) * a_scale[:, None] * b_scale).to(torch.bfloat16)
    # sums of fewer bits than float32's are what makes the product fast: an error far below that of e4m3 itself
    return torch._scaled_mm(
        a, b.T, scale_a=a_scale[:, None], scale_b=b_scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )


@lru_cache
def _works(device: torch.device) -> str | None:
    """Why the product does not work on a CUDA device, or None: tried once, whatever version torch and its CUDA are of."""
    scale = torch.ones(MULTIPLE, device=device)
    ones = torch.ones(MULTIPLE, 2 * MULTIPLE, device=device).to(torch.float8_e4m3fn)
    try:
        found = _multiply(ones, scale, ones, scale)
    except Exception as error:
        return f"torch {torch.__version__} cannot multiply e4m3 with a scale a row there ({str(error).splitlines()[0]})"
    return None if (found == 2 * MULTIPLE).all() else f"torch {torch.__version__} multiplies e4m3 wrongly there"


def why_not(device: torch.device) -> str | None:
    """What a device lacks for these products, or None."""
    if device.type == "cpu" and emulated:
        return None
    needed = f"it needs a CUDA device of compute capability {'.'.join(map(str, CAPABILITY))} or newer (Ada, Hopper, Blackwell)"
    if device.type != "cuda" or torch.version.hip:
        return f"{needed}, and this is {'ROCm' if torch.version.hip else device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"{needed}, and {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    return _works(device)

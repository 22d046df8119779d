"""y += s · h Bᵀ in one pass over y; cuBLAS takes half as long again for so small an inner dimension."""

from __future__ import annotations

from torch import Tensor

from qft.kernels.launch import CONFIGS, launch, usable

MOST = 64
"""The largest rank; beyond it the product is no longer bound by memory."""

LEAST = 2**24
"""Elements of y from which on the kernel pays: below, starting it costs more than it saves."""


def add_low_rank(y: Tensor, h: Tensor, b: Tensor, scaling: float) -> None:
    """Add `scaling * h @ b.T` to y, in place.

    Args:
        y: (n, out_features), float.
        h: (n, rank), of y's dtype.
        b: (out_features, rank), of y's dtype, any strides.
    """
    n, width = y.shape
    rank = h.shape[1]
    if (
        y.numel() >= LEAST
        and rank <= MOST
        and rank % 8 == 0
        and width % 8 == 0
        and y.dtype.itemsize == 2
        and y.is_contiguous()
        and h.is_contiguous()
        and b.dtype == h.dtype == y.dtype
        and usable(y)
    ):
        config = CONFIGS["add_low_rank"]
        grid = (-(-n // config["ROWS"]), -(-width // config["COLUMNS"]))
        padded = max(16, 1 << (rank - 1).bit_length())
        args = (y, h, b, scaling, n, width, rank, b.stride(0), b.stride(1))
        if launch("add_low_rank", grid, *args, config=config, RANK=padded):
            return
    y.addmm_(h, b.T, alpha=scaling)

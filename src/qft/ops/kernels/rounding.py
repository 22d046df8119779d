"""The inner loop of error feedback as one Triton kernel, where torch code would launch several for each column."""

from __future__ import annotations

from torch import Tensor

from qft.ops.kernels.launch import launch, usable

COLUMNS = 128
"""At most; a tile of them and `WIDTH` rows of the weight stays in registers."""

WIDTH = 16


def round_with_feedback(
    columns: Tensor, share: Tensor, inverse: Tensor, scale: Tensor, low: Tensor, high: Tensor, error: Tensor
) -> bool:
    """Round columns one after the other; whether a kernel did.

    Args:
        columns: float32 (n, out_features), contiguous; each becomes what it was when it was rounded.
        share: float32 (n, n), rows contiguous: what each later column takes over of an error, its upper triangle.
        inverse, scale, low, high: float32 (out_features,): a code is `columns * inverse` to nearest, between low and
            high, and stands for `scale * code`.
        error: float32 (n, out_features), contiguous, is filled.
    """
    n, width = columns.shape
    tensors = (columns, error, inverse, scale, low, high)
    if (
        n > COLUMNS
        or not width
        or share.stride(1) != 1
        or not usable(columns)
        or not all(t.is_contiguous() for t in tensors)
    ):
        return False
    padded = max(16, 1 << (n - 1).bit_length())
    return launch(
        "round_with_feedback", (-(-width // WIDTH),), columns, error, share, inverse, scale, low, high, n, width,
        share.stride(0), config={"WIDTH": WIDTH, "num_warps": 4}, COLUMNS=padded,
    )  # fmt: skip

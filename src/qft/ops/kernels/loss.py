"""The next-token loss of rows of logits, and its gradient in their place: one kernel that reads them twice."""

from __future__ import annotations

import torch
from torch import Tensor

from qft.ops.kernels.launch import CONFIGS, fits, launch


def next_token(logits: Tensor, targets: Tensor, loss: Tensor, scale: float, cap: float | None, gradient: bool) -> bool:
    """Whether there is a kernel for these; if so, it ran.

    Args:
        logits: (tokens, vocabulary), contiguous, of float32, bfloat16 or float16. With z = scale · logits, or
            cap · tanh(scale · logits / cap), they become the gradient of the summed loss where `gradient`.
        targets: (tokens,) of int64. Loss and gradient of one outside the vocabulary are NaN.
        loss: (tokens,) of float32; becomes logsumexp(z) − z[target].
    """
    if targets.dtype != torch.int64 or not fits([logits, targets, loss], logits.shape, logits.dtype, None):
        return False
    rows, columns = logits.shape
    config = CONFIGS["next_token"]
    return launch(
        "next_token", (rows,), loss, logits, targets, columns, float(scale), float(1.0 if cap is None else cap),
        GRADIENT=gradient, CAP=cap is not None, COUNT=-(-columns // config["BLOCK"]), config=config,
    )  # fmt: skip

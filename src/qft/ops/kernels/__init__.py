"""Dequantizers as single Triton kernels, for CUDA; the torch code of each backend's `unpack` is their twin.

`float8` makes float8 matrices with a scale a row of floats and of codes; `next_token` is the loss of rows of logits, whose
twin is in `qft.ops.loss`: its sums differ in their order, and it says whether it ran.

Every other function here computes what its twin does, bit for bit, and takes what its twin takes: the packed tensors, a shape,
a dtype, and perhaps a buffer to write into. It returns None where it has no kernel for what it was given, so that the
caller's torch code goes on: tensors that are not on a CUDA device, triton not installed, groups of a size that is no
multiple of eight, an empty weight, a dtype of the result that is none of float32, float16 and bfloat16, a trace of
torch.compile. Nothing here waits for the device.

`QFT_KERNELS=0` in the environment, read when this is imported, turns all of them off. A device that triton cannot compile
for gets the torch code, after one warning. With `TRITON_INTERPRET=1`, set before anything imports triton, CPU tensors run
in its interpreter, which is slow and only for tests.
"""

from qft.ops.kernels.dequantize import additive, awq, codebook, double_constants, eetq, gptq, integers, parts, rows
from qft.ops.kernels.float8 import Codebook, float8_codebook, float8_rows, float8_transposed
from qft.ops.kernels.launch import usable
from qft.ops.kernels.loss import next_token
from qft.ops.kernels.rounding import round_with_feedback

__all__ = [
    "Codebook",
    "additive",
    "awq",
    "codebook",
    "double_constants",
    "eetq",
    "float8_codebook",
    "float8_rows",
    "float8_transposed",
    "gptq",
    "integers",
    "next_token",
    "parts",
    "round_with_feedback",
    "rows",
    "usable",
]

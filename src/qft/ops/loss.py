"""Next-token loss from hidden states and the output head, without the logits of all tokens.

    z = s · (h Wᵀ + b),  or  c · tanh(s · (h Wᵀ + b) / c);   loss = Σ (logsumexp(z) − z[target]) / n

h is (tokens, hidden), W (vocabulary, hidden). Logits exist for one chunk of tokens at a time. The head is frozen, so that
the gradient with respect to h, (softmax(z) − onehot) · dz/dh, is known in the forward pass and is all that is kept.
Tokens without a label are left out before the product. On CUDA a kernel makes losses and gradients of a chunk's logits,
and the host waits for nothing but how many tokens count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qft.ops import kernels
from qft.ops.products import working_dtype

IGNORE = -100
CHUNK_BYTES = 1 << 28
"""Of logits, in the compute dtype: 1,024 tokens of 128,256 in bfloat16."""
BLOCK_BYTES = 1 << 27
"""Of float32 temporaries: the softmax takes part of a chunk at a time."""
PART_BYTES = 1 << 26
"""Of the head, where it has to be cast before it is multiplied with."""


@dataclass(frozen=True)
class LogitScaling:
    """What a model does to the head's product: `scale` times it, then cap · tanh(· / cap) where it has a `cap`."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def fit(cls, values: Tensor) -> LogitScaling | None:
        """Read off what a model made of `PROBE`, or None where it is neither a scale nor a soft cap."""
        if values.numel() != PROBE.numel():
            return None
        probe, seen = PROBE.double().flatten(), values.detach().double().flatten()
        small = probe.abs() == _SMALL
        scale = float((seen[small] / probe[small]).mean())
        if not math.isfinite(scale) or scale == 0:
            return None
        if torch.allclose(seen, probe * scale, rtol=1e-5, atol=0):
            return cls(_rounded(scale))
        cap = float(seen.max())
        if cap > 0 and torch.allclose(seen, cap * torch.tanh(probe * scale / cap), rtol=1e-5, atol=0):
            return cls(_rounded(scale), _rounded(cap))
        return None


_SMALL = 1e-4
PROBE = torch.tensor([[[-1e6, -40.0, -3.0, -_SMALL, 0.0, _SMALL, 1.0, 17.0, 1e6]]], dtype=torch.float64)
"""Logits to put into a model's own code in order to see what it does to them, (1, 1, 9)."""


def _rounded(value: float) -> float:
    """The float32 rounding that a model's code may have put in, taken off."""
    return float(f"{value:.6g}")


def shifted(labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """(..., tokens) labels → (..., tokens) targets: each token's is its successor's label, the last has none."""
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


class Targets:
    """Flattened targets, (tokens,), and which of them count.

    How many do, only the device knows: it is asked at once, and the host waits for its answer where it first needs it. By
    then it has launched the forward pass, so that the device need not stand still between two steps.
    """

    def __init__(self, values: Tensor, count: Tensor | None = None, order: Tensor | None = None):
        self.values, self._count, self._order = values, count, order
        waits = count is not None and values.is_cuda
        self._told = torch.cuda.current_stream(values.device).record_event() if waits else None

    @classmethod
    def of(cls, targets: Tensor, ignore_index: int = IGNORE) -> Targets:
        values = targets.reshape(-1)
        ignored = values == ignore_index
        # a sort has a result of known size, where nonzero() would wait; those that count come first, in their order
        order = ignored.to(torch.uint8).argsort(stable=True)
        return cls(values, (~ignored).sum().to("cpu", non_blocking=True), order)

    @cached_property
    def kept(self) -> Tensor | None:
        """Where targets count; None where all do."""
        if self._order is None or self._count is None:
            return None
        if self._told is not None:
            self._told.synchronize()
        count = int(self._count)
        return self._order[:count] if count < self.values.numel() else None

    def __len__(self) -> int:
        return self.values.numel() if self.kept is None else self.kept.numel()


class _LinearCrossEntropy(torch.autograd.Function):
    """`kernel` is `kernels.next_token`, or what stands for it where a loss is planned."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scaling, wanted, kernel):
        kept, losses = targets.kept, hidden.new_zeros(len(targets), dtype=torch.float32)
        grad = None if not wanted else torch.empty_like(hidden) if kept is None else torch.zeros_like(hidden)
        rows, block = _sizes(weight.shape[0], working_dtype(hidden).itemsize, scaling)
        for start in range(0, len(targets), rows):
            at = slice(start, start + rows) if kept is None else kept[start : start + rows]
            h, t, loss = hidden[at], targets.values[at], losses[start : start + rows]
            logits = _logits(h, weight, bias)
            if not kernel(logits, t, loss, scaling.scale, scaling.cap, wanted):
                for low in range(0, len(h), block):
                    part = slice(low, low + block)
                    loss[part] = _block(logits[part], t[part], scaling, wanted)
            if wanted and kept is None:
                _times_head(logits, weight, grad[at])
            elif wanted:
                grad.index_copy_(0, at, _times_head(logits, weight, torch.empty_like(h)))
            del logits  # before the next chunk's, which would otherwise stand beside it
        if wanted:
            ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (grad,) = ctx.saved_tensors
        return grad * g, None, None, None, None, None, None


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(tokens, vocabulary), in the working dtype of `h`; the head is cast to it a part at a time."""
    dtype = working_dtype(h)
    if dtype == weight.dtype == h.dtype:
        return torch.nn.functional.linear(h, weight, bias)
    h, logits = h.to(dtype), h.new_empty(len(h), len(weight), dtype=dtype)
    for at in _parts(weight, dtype):
        torch.mm(h, weight[at].to(dtype).T, out=logits[:, at])
    return logits if bias is None else logits.add_(bias)


def _times_head(logits: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`logits` (tokens, vocabulary) times the head, into `out` (tokens, hidden)."""
    if logits.dtype == weight.dtype == out.dtype:
        return torch.mm(logits, weight, out=out)
    total = out.new_zeros(out.shape, dtype=logits.dtype)
    for at in _parts(weight, logits.dtype):
        total.addmm_(logits[:, at], weight[at].to(logits.dtype))
    return out.copy_(total)


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    rows = max(1, PART_BYTES // (weight.shape[1] * dtype.itemsize))
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def _sizes(vocabulary: int, itemsize: int, scaling: LogitScaling) -> tuple[int, int]:
    rows = max(256, CHUNK_BYTES // (vocabulary * itemsize) // 128 * 128)
    block = BLOCK_BYTES // (vocabulary * 4 * (1 if scaling == LogitScaling() else 2))
    return rows, max(32, block // 32 * 32)


def _block(logits: Tensor, targets: Tensor, scaling: LogitScaling, wanted: bool) -> Tensor:
    """The loss of some tokens, (tokens,); where `wanted`, `logits` (tokens, vocabulary) becomes its gradient."""
    z, slope = logits, None
    if scaling.cap is not None:
        z = logits.float().mul(scaling.scale / scaling.cap).tanh_()
        slope = z if wanted else None
        z = z * scaling.cap
    elif scaling.scale != 1:
        z = logits.float() * scaling.scale
    logp = torch.log_softmax(z, dim=-1, dtype=torch.float32)
    del z
    at = torch.arange(len(targets), device=targets.device)
    loss = -logp[at, targets]
    if wanted:
        p = logp.exp_()
        p[at, targets] -= 1
        if slope is not None:
            p.mul_(slope.square_().neg_().add_(1))
        if scaling.scale != 1:
            p.mul_(scaling.scale)
        logits.copy_(p)
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | Targets,
    *,
    bias: Tensor | None = None,
    scaling: LogitScaling = LogitScaling(),
    num_items: Tensor | float | None = None,
    ignore_index: int = IGNORE,
    kernel: Literal["auto", "own", "liger"] = "own",
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against `targets`, as transformers' `ForCausalLMLoss` after its shift.

    Args:
        hidden: (..., hidden). Under autocast it and the head are cast to the autocast dtype first.
        weight: (vocabulary, hidden), frozen: no gradient comes back for it.
        targets: as many integers as `hidden` has tokens; those equal to `ignore_index` do not count.
        bias: (vocabulary,) or None, frozen.
        scaling: what is done to the logits before the softmax, which is taken in float32.
        num_items: what the summed loss is divided by; None is the number of targets that count.
        kernel: "own" is the code of this file, on CUDA with a kernel of qft's; "liger" is liger-kernel's, on CUDA and
            without a scale, which waits for the device three times; "auto" takes it where triton cannot run qft's.

    Returns:
        A float32 scalar, differentiable once in `hidden`. NaN where nothing counts and `num_items` is None. A target
        outside the vocabulary makes it and the gradient NaN on CUDA, and raises IndexError on a CPU.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    targets = targets if isinstance(targets, Targets) else Targets.of(targets, ignore_index)
    flat = hidden.reshape(-1, hidden.shape[-1])
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(device, enabled=False):
        liger = _liger(flat, scaling, kernel) if len(targets) else None
        if liger is None:
            wanted = flat.requires_grad and torch.is_grad_enabled()
            arguments = (flat.contiguous(), weight, bias, targets, scaling, wanted)
            total = _LinearCrossEntropy.apply(*arguments, kernels.next_token)
        else:
            values = targets.values
            if targets.kept is not None:
                flat, values = flat.index_select(0, targets.kept), values.index_select(0, targets.kept)
            total = liger(flat, weight, values, bias=bias, reduction="sum", softcap=scaling.cap).float()
    if num_items is None:
        return total / len(targets) if len(targets) else total + math.nan
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _liger(hidden: Tensor, scaling: LogitScaling, kernel: str) -> Any:
    if kernel == "own" or hidden.device.type != "cuda" or scaling.scale != 1:
        return None
    if kernel == "auto" and kernels.usable(hidden):
        return None
    if find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy

"""Statistics of what layers read, summed by hooks while the passes of `activations` run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

StatisticsKind = Literal["diagonal", "full"]

LARGEST = 1e15
"""Activations from here on are left out as infinity is: the sum of their squares would leave float32."""

running = threading.local()
"""In the thread of a pass: `batch`, the pass itself, and `last`, the tensor that was summed last with its sums."""


@dataclass
class Statistics:
    """What one layer read, over all tokens that the attention masks count.

    Attributes:
        tokens: how many rows x were counted.
        mean_square: E[x²], float32 (in_features,).
        mean_abs: E[|x|], float32 (in_features,).
        second_moment: E[x xᵀ], float32 (in_features, in_features); None for the diagonal kind.
        input_max, output_max: the largest absolute values that went in and came out.
        left_out: rows that held NaN, infinity, or what float32 cannot square and sum, and were not counted.
    """

    tokens: int
    mean_square: Tensor
    mean_abs: Tensor
    second_moment: Tensor | None = None
    input_max: float = 0.0
    output_max: float = 0.0
    left_out: int = 0


class Accumulator:
    """The sums behind one layer's `Statistics`, on the device where the layer runs."""

    def __init__(self, kind: StatisticsKind):
        self.kind = kind
        self.sums: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def _largest(self, name: str, value: Tensor) -> None:
        self.sums[name] = torch.maximum(self.sums[name], value) if name in self.sums else value

    def read(self, x: Tensor, mask: Tensor | None) -> None:
        found = _sums_of(x, mask, self.kind)
        self._largest("input", found["input"])
        for name in ("tokens", "left_out", "abs", "square", *(["product"] if self.kind == "full" else [])):
            self._add(name, found[name])

    def wrote(self, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """What came out of the rows that were counted; infinity out of a finite row is a figure, too."""
        size = y.detach().abs().reshape(-1, y.shape[-1]).amax(-1).float() if y.numel() else y.new_zeros(0)
        keep = _sums_of(x, mask, self.kind)["keep"]
        if size.numel() and keep.numel() == size.numel():
            self._largest("output", torch.where(keep & ~size.isnan(), size, 0.0).amax())

    def result(self) -> Statistics | None:
        """None where the layer read nothing."""
        tokens = int(self.sums["tokens"]) if self.sums else 0
        if not tokens:
            return None
        sums = self.sums
        return Statistics(
            tokens=tokens,
            mean_square=sums["square"] / tokens,
            mean_abs=sums["abs"] / tokens,
            second_moment=sums["product"].div_(tokens) if self.kind == "full" else None,
            input_max=float(sums["input"]),
            output_max=float(sums.get("output", 0.0)),
            left_out=int(sums["left_out"]),
        )


def _sums_of(x: Tensor, mask: Tensor | None, kind: StatisticsKind) -> dict[str, Tensor]:
    """What one tensor adds; computed once for layers that read the same one, such as q, k and v."""
    last, version, found = getattr(running, "last", (None, None, None))
    now = None if x.is_inference() else x._version  # one that was added to in place holds something else
    if last is x and version == now is not None and (kind == "diagonal" or "product" in found):
        return found
    counted = _counted(x, mask)
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    finite = (rows.abs() < LARGEST).all(-1)  # false for NaN, too
    keep = finite if counted is None else finite & counted
    rows = torch.where(keep[:, None], rows, 0.0)
    size = rows.abs()
    found = {
        "keep": keep,
        "tokens": keep.sum(),
        "left_out": (~finite if counted is None else counted & ~finite).sum(),
        "abs": size.sum(0),
        "square": (rows * rows).sum(0),
        "input": size.amax() if size.numel() else rows.new_zeros(()),
    }
    if kind == "full":
        found["product"] = rows.T @ rows
    running.last = (x, now, found)
    return found


def _counted(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which rows of x, flattened to (rows, features), the attention mask counts; None for all of them."""
    if mask is None or mask.ndim != 2:
        return None
    if x.shape[:-1] == mask.shape or (x.ndim == 2 and x.shape[0] == mask.numel()):
        return mask.reshape(-1).to(x.device) != 0
    return None


def watch(layer: nn.Module, sums: Accumulator) -> list[Any]:
    """Add the inputs of a layer to `sums` in every forward pass.

    Returns:
        The handles of the hooks.
    """

    def read(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _input(args, kwargs)
        if x is not None:
            with torch.inference_mode(False), torch.no_grad():  # or what is summed could not leave the model's own mode
                sums.read(x, _mask())

    def wrote(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = _input(args, kwargs)
        if x is not None and isinstance(output, Tensor):
            with torch.inference_mode(False), torch.no_grad():
                sums.wrote(x, output, _mask())

    return [
        layer.register_forward_pre_hook(read, with_kwargs=True),
        layer.register_forward_hook(wrote, with_kwargs=True),
    ]


def _input(args: Any, kwargs: Any) -> Tensor | None:
    """What a layer reads in one of our passes; None where somebody else calls it meanwhile."""
    if getattr(running, "batch", None) is None:
        return None
    x = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
    return x if isinstance(x, Tensor) else None


def _mask() -> Tensor | None:
    one = getattr(running, "batch", None)
    return one.batch.get("attention_mask") if one is not None else None

"""Weights and updates that break careless quantizers; `qft.testing` runs every quantizer over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, COLUMNS = 64, 128


@dataclass(frozen=True)
class Hostile:
    """A weight (out_features, in_features), and what quantizing may do to it.

    Attributes:
        name: what is hostile about it.
        weight: float32 values that bfloat16 holds exactly.
        as_usual: the error stays what it is for normal weights; else it stays below the weight's own norm.
    """

    name: str
    weight: Tensor
    as_usual: bool = False


def hostile_weights() -> Iterator[Hostile]:
    """Zeros, constants, an outlier, denormal values, narrow shapes, and weights that are not contiguous."""

    def normal(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
        value = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05
        return value.bfloat16().float()

    def changed(*places: tuple[object, float]) -> Tensor:
        weight = normal()
        for place, value in places:
            weight[place] = value  # type: ignore[index]
        return weight

    rows, columns = slice(None), slice(64, 96)
    yield Hostile("a row of zeros", changed((3, 0.0)), as_usual=True)
    yield Hostile("many rows of zeros", changed((slice(8, 48), 0.0)), as_usual=True)
    yield Hostile("columns of zeros", changed(((rows, 3), 0.0), ((rows, columns), 0.0)), as_usual=True)
    yield Hostile("zeros alone", torch.zeros(ROWS, COLUMNS), as_usual=True)
    yield Hostile("a constant column", changed(((rows, 5), 0.5)))
    nearly = changed()
    nearly[:, 5] = 0.5 + 2.0**-9 * (torch.arange(ROWS) % 2)
    yield Hostile("a nearly constant column", nearly)
    yield Hostile("constant rows", changed((3, 0.25), (9, -0.03125)))
    yield Hostile("an outlier", changed(((7, 9), 1e6)))
    yield Hostile("an outlier that float16 holds", changed(((7, 9), 6e4)))
    yield Hostile("a tiny row", changed((7, 2.0**-66)), as_usual=True)
    yield Hostile("tiny values alone", normal() * 2.0**-66)
    yield Hostile("denormal values", changed((5, 1e-40), ((rows, 3), -1e-40)), as_usual=True)
    yield Hostile("denormal values alone", torch.full((ROWS, COLUMNS), 1e-40))
    yield Hostile("one output feature", normal(1, COLUMNS))
    yield Hostile("one input feature", normal(ROWS, 1))
    yield Hostile("transposed storage", normal(COLUMNS, ROWS).T, as_usual=True)
    yield Hostile("sliced storage", normal(2 * ROWS, 2 * COLUMNS)[::2, ::2], as_usual=True)


def hostile_updates(weight: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Updates B A of a weight by name, rank 1: B (out_features, 1) and A (1, in_features), float32.

    One makes a row zero, one makes it constant up to rounding, and one puts a value beyond 16-bit scales into it.
    """
    row, rows = weight[5].float(), weight.shape[0]
    one = torch.zeros(rows, 1, device=weight.device)
    one[5] = 1
    spike = torch.zeros_like(row)
    spike[7] = 1e6
    yield "a row made zero", one, -row[None]
    yield "a row made constant", one, (0.125 - row)[None]
    yield "a value of 10^6", one, spike[None]

"""A fingerprint of what quantized layers store: bases made of the same weights may hold other codes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.experts import PackedExperts, packed_weights
from qft.core.quantizer import QuantizedWeight, Quantizer
from qft.core.registry import quantizer_of

PROJECTIONS = 16
LAYERS = 64
EXPERTS = 4
ALL_BELOW = 10**9
"""Weights in all below which every layer is read; of larger models 64 layers are, and 4 experts of a fused weight."""


def codes_fingerprint(base: nn.Module) -> dict[str, list[float]]:
    """Fingerprint the dequantized weights of a base model.

    Each layer's entry holds ‖Ŵ‖ and 16 numbers uₖᵀ Ŵ vₖ, where uₖ and vₖ are fixed vectors of signs. The mean square of
    their differences between two weights is an unbiased estimate of ‖Ŵ − Ŵ′‖², so that every code counts.

    Returns:
        Layer name, without adapters → 17 floats. Layers that cannot be dequantized are left out.
    """
    found = _layers(base)
    experts = None
    if sum(math.prod(handle.shape) for _, handle in found.values()) > ALL_BELOW:
        names = sorted(found, key=lambda name: zlib.crc32(name.encode()))[:LAYERS]
        found, experts = {name: found[name] for name in names}, EXPERTS
    entries = {name: _entry(quantizer, handle, experts) for name, (quantizer, handle) in found.items()}
    if not entries:
        return {}
    device = next(iter(entries.values())).device
    rows = torch.stack([entry.to(device) for entry in entries.values()]).tolist()  # one transfer from the device
    return {name: [float(f"{v:.7g}") for v in row] for name, row in zip(entries, rows)}


def codes_difference(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> float:
    """Estimate ‖Ŵ − Ŵ′‖ / ‖Ŵ‖ over the layers that both fingerprints hold; 0.0 where they hold none in common."""
    square = norm = 0.0
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if len(a) != len(b):
            continue
        square += sum((x - y) ** 2 for x, y in zip(a[1:], b[1:])) / (len(a) - 1)
        norm += a[0] ** 2
    return math.sqrt(square / norm) if norm else 0.0


def _layers(base: nn.Module) -> dict[str, tuple[Quantizer, Any]]:
    from qft.core.names import bare_layers

    found: dict[str, tuple[Quantizer, Any]] = {
        name: (stack.quantizer, stack.handle) for name, stack in packed_weights(base)
    }
    for name, module in bare_layers(base):
        quantizer = quantizer_of(module)
        if quantizer is None or not quantizer.capabilities.dequantize or isinstance(module, PackedExperts):
            continue
        if handles := quantizer.weights(module):  # an adapter's layer holds none itself
            found[name] = quantizer, handles[0]
    return found


def _entry(quantizer: Quantizer, handle: QuantizedWeight, experts: int | None) -> Tensor:
    """‖Ŵ‖ and the projections of a weight, float32; of a fused weight, of `experts` of its experts or of all."""
    if len(handle.shape) == 2:
        return _projected(quantizer.dequantize(handle, dtype=torch.float32))
    count = handle.shape[0]
    chosen = range(0, count, -(-count // (experts or count)))
    parts = []
    for i in chosen:  # one at a time, to keep the floats of one expert in memory
        index = torch.tensor([i], device=handle.module.device)
        parts.append(_projected(handle.module.unpacked(torch.float32, experts=index)[0], expert=i))
    stacked = torch.stack(parts)
    return torch.cat([stacked[:, :1].norm()[None], stacked[:, 1:].sum(0)])


def _projected(weight: Tensor, expert: int = 0) -> Tensor:
    """‖W‖ and the projections of a weight (out_features, in_features), float32."""
    out_features, in_features = weight.shape
    left, right = _signs(out_features, 1 + 2 * expert, weight.device), _signs(in_features, 2, weight.device)
    return torch.cat([weight.norm()[None], ((left @ weight) * right).sum(1)])


@lru_cache(maxsize=8)
def _signs(size: int, seed: int, device: torch.device) -> Tensor:
    """Fixed signs, (16, size), float32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (PROJECTIONS, size), generator=generator) * 2 - 1).float().to(device)

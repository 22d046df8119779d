"""How large a model's activations become, block by block, and what float16 would not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.blocks import find_blocks
from qft.pipeline.audit.figures import FLOAT16_MAX


@dataclass(frozen=True)
class Range:
    """What came out of the modules of one block, or of the embeddings, or the logits.

    Attributes:
        largest: the largest finite absolute value.
        module: where it came out, relative to the block; "" is the block itself.
        values: how many values came out, of all modules of the block together; padding is left out.
        beyond_float16: the share of finite values beyond float16's largest number, 65504.
        not_finite: the share of NaN and infinities.
        first_not_finite: the module that put the first of those out.
    """

    largest: float
    module: str
    values: int
    beyond_float16: float
    not_finite: float
    first_not_finite: str | None


class Ranges:
    """Watches a model between `start` and `stop`."""

    def __init__(self, model: nn.Module):
        self.mask: Tensor | None = None
        self.found: dict[str, dict[str, tuple[Tensor, Tensor, Tensor, int]]] = {}
        self.broken: dict[str, list[tuple[str, Tensor]]] = {}
        self.handles: list[Any] = []
        names = {id(m): n for n, m in model.named_modules()}
        embeddings = embeddings_of(model)
        if embeddings is not None:
            self._watch(names[id(embeddings)], embeddings)
        for _, blocks in find_blocks(model):
            for block in blocks:
                self._watch(names[id(block)], block)

    def _watch(self, name: str, block: nn.Module) -> None:
        self.found[name] = {}
        for inner, module in block.named_modules():
            self.handles.append(module.register_forward_hook(self._hook(name, inner)))

    def _hook(self, block: str, module: str) -> Callable[..., None]:
        return lambda _module, _args, output: self.add(block, module, output)

    def add(self, block: str, module: str, output: Any) -> None:
        """Take in what a module put out; of several tensors, the first."""
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            return
        x = output.detach()
        if self.mask is not None and x.shape[:2] == self.mask.shape:
            x = x[self.mask.to(x.device)]
        finite, size = x.isfinite(), x.abs()
        broken = x.numel() - finite.sum()
        beyond = ((size > FLOAT16_MAX) & finite).sum()
        largest = size.masked_fill_(~finite, 0).amax().float()
        self.broken.setdefault(block, []).append((module, broken > 0))
        if len(self.broken[block]) > 512:  # asked on the host now and then, not at every module
            self._settle(block)
        old = self.found.setdefault(block, {}).get(module)
        if old is None:
            self.found[block][module] = (largest, beyond, broken, x.numel())
        else:
            self.found[block][module] = (
                torch.maximum(old[0], largest.to(old[0].device)),
                old[1] + beyond.to(old[1].device),
                old[2] + broken.to(old[2].device),
                old[3] + x.numel(),
            )

    def _settle(self, block: str) -> None:
        first = next(((m, f) for m, f in self.broken.get(block, []) if bool(f)), None)
        self.broken[block] = [first] if first is not None else []

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()

    def result(self) -> dict[str, Range]:
        """Block → what was seen, in the model's order, the logits last; blocks that put nothing out are left out."""
        ranges = {}
        for block, modules in self.found.items():
            if not modules:
                continue
            self._settle(block)
            count = sum(n for *_, n in modules.values())
            largest = {m: float(v[0]) for m, v in modules.items()}
            module = max(largest, key=lambda m: largest[m])
            ranges[block] = Range(
                largest[module],
                module,
                count,
                sum(int(v[1]) for v in modules.values()) / count,
                sum(int(v[2]) for v in modules.values()) / count,
                self.broken[block][0][0] if self.broken[block] else None,
            )
        return ranges


def embeddings_of(model: nn.Module) -> nn.Module | None:
    """The module that turns token ids into vectors, where the model names one."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None

"""A quantized layer as PEFT's other methods want to see it: a plain linear, whose weight is floats when it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qft.core.names import HELD
from qft.core.quantizer import QuantizedWeight, Quantizer, replace_module
from qft.core.registry import quantizer_of
from qft.errors import UnsupportedOperation
from qft.ops.kernels import Codebook
from qft.ops.linear import lora_linear
from qft.ops.source import Source, Sourced


class LinearView(Sourced, nn.Linear):
    """An `nn.Linear` of shape (out_features, in_features) over a quantized layer of any backend.

    `weight` dequantizes on each access and cannot be written; the forward pass is x Ŵᵀ + b, or the vendor's own with
    `native`. The layer itself stays a submodule, so that codes move, are saved and are found as ever.
    """

    def __init__(self, layer: nn.Module, native: bool = False):
        nn.Module.__init__(self)
        self.native = native
        self.__dict__["_layer"] = layer  # a submodule only once PEFT no longer goes through the model's names
        shape = self.handle.shape
        self.out_features, self.in_features = shape
        self._source = Source(self)
        self.train(layer.training)

    @property
    def layer(self) -> nn.Module:
        """The quantized layer."""
        return self.__dict__.get("_layer") or self._modules[HELD]

    def settle(self) -> None:
        """Make the quantized layer a submodule."""
        self.add_module(HELD, self.__dict__.pop("_layer"))

    @property
    def quantizer(self) -> Quantizer:
        found = quantizer_of(self.layer)
        assert found is not None
        return found

    @property
    def handle(self) -> QuantizedWeight:
        return self.quantizer.weights(self.layer)[0]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.quantizer.dequantize(self.handle, dtype=dtype)

    def codebook(self) -> Codebook | None:
        return self.quantizer.codebook(self.handle)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return _ReadOnly(self.quantizer.dequantize(self.handle), requires_grad=False)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise UnsupportedOperation(_WRITTEN)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return self.layer(x)
        return lora_linear(x, self._source, self.bias, in_float8=self.float8 and self.training)


_WRITTEN = (
    "this writes to the weight of a quantized layer, which would lose the change: nothing was written. qft.merge(model) "
    "merges adapters into quantized weights, and qft.merge_to_float(model) into a float copy"
)


class _ReadOnly(nn.Parameter):
    """Floats that were computed for a reader: PEFT merges by assigning to `.data`, which would go nowhere."""

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UnsupportedOperation(_WRITTEN)


def views(model: nn.Module) -> list[LinearView]:
    """Every view in a model."""
    return [m for m in model.modules() if isinstance(m, LinearView)]


@contextmanager
def shown_as_linears(model: nn.Module, native: bool) -> Iterator[None]:
    """Show every quantized layer as a plain linear; those that the block puts no adapter on are themselves again.

    Raises:
        UnsupportedOperation: the block copied a layer, to train its weight whole.
    """
    made: list[LinearView] = []
    held = {id(m.layer) for m in views(model)}
    for name, module in list(model.named_modules()):
        if name and id(module) not in held and quantizer_of(module) is not None and not _adapted(model, name):
            made.append(LinearView(module, native))
            replace_module(model, name, made[-1])
    kept: set[int] = set()
    try:
        yield
        kept = {id(m.get_base_layer()) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    finally:
        fresh = {id(v) for v in made}
        for name, module in list(model.named_modules()):
            if id(module) in fresh and id(module) not in kept:
                replace_module(model, name, module.layer)  # type: ignore[arg-type]
    if any(v.__dict__.get("_layer") is not None and id(v) not in fresh for v in views(model)):
        raise UnsupportedOperation(
            "this adapter would train the weight of a quantized layer whole: target it with another method, such as LoRA, "
            "or leave it in float with skip="
        )
    for view in made:
        if id(view) in kept:
            view.settle()


def _adapted(model: nn.Module, name: str) -> bool:
    """Whether a layer is the base of an adapter that was put on by someone else."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, BaseTunerLayer) or hasattr(parent, "base_layer")


def take_off(model: nn.Module) -> None:
    """Put the quantized layers back in the place of views that stand alone, after adapters were unloaded."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearView) and not _adapted(model, name):
            replace_module(model, name, module.layer)

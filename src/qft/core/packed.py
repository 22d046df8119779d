"""Formats that need no layer of their own: two functions on tensors, and the modules that hold what they pack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qft.core.modes import normal_mode
from qft.core.quantizer import Kind, QuantizedWeight, Quantizer, float_weight, is_conv1d
from qft.errors import BadOption, QftError
from qft.ops.kernels import Codebook
from qft.ops.linear import lora_linear
from qft.ops.source import Source, Sourced

_RESERVED = {"weight", "bias", "quantizer", "in_features", "out_features", "kind", "dtype"}


class PackedModule(nn.Module):
    """A module over packed tensors.

    They are frozen parameters, so that FSDP shards them; casts such as `model.half()` leave their dtypes alone.

    Args:
        quantizer: knows how to unpack.
        packed: the tensors by name.
        dtype: of the float weight.
    """

    def __init__(self, quantizer: TensorQuantizer, packed: Mapping[str, Tensor], dtype: torch.dtype):
        super().__init__()
        clash = _RESERVED.intersection(packed)
        if clash or not packed:
            raise BadOption(
                f"{quantizer!r}.pack returned the names {sorted(packed)}: it must return at least one tensor, and none "
                f"of the names {sorted(_RESERVED)}"
            )
        self.quantizer, self.dtype = quantizer, dtype
        for name, tensor in packed.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self.packed_names = tuple(packed)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, name) for name in self.packed_names}

    @property
    def handle(self) -> QuantizedWeight:
        """The handle of the weight."""
        raise NotImplementedError

    def unpacked(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight as floats of `handle.shape`, in `dtype` or into `out`."""
        raise NotImplementedError

    def repacked(self, value: Tensor) -> dict[str, Tensor]:
        """The packed tensors of other floats of `handle.shape`."""
        raise NotImplementedError

    @normal_mode()
    def _apply(self, fn, recurse=True):
        packed = {name: self._parameters.pop(name) for name in self.packed_names}
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in packed.items():
                moved = fn(tensor.detach())
                if moved.dtype != tensor.dtype:
                    moved = tensor.detach().to(moved.device)
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._first.device)).dtype
        return self

    @property
    def _first(self) -> Tensor:
        return getattr(self, self.packed_names[0])


class PackedLinear(PackedModule, Sourced):
    """A linear layer over packed tensors.

    `.weight` dequantizes, so that model code which reads it gets the right numbers in the right dtype.

    Args:
        quantizer: knows how to unpack.
        packed: what `quantizer.pack` returned.
        shape: `(out_features, in_features)`.
        dtype: of the float weight.
        bias: `(out_features,)` or None.
        kind: "linear" or "conv1d".
    """

    def __init__(
        self,
        quantizer: TensorQuantizer,
        packed: Mapping[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        bias: Tensor | None = None,
        kind: Kind = "linear",
    ):
        super().__init__(quantizer, packed, dtype)
        self.kind = kind
        self.out_features, self.in_features = shape
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        codes = {name: self._parameters.pop(name) for name in self.packed_names}
        self.register_parameter("bias", bias)  # first: some models' `.dtype` is that of their first float parameter
        self._parameters.update(codes)
        self._source = Source(self)

    @property
    def handle(self) -> QuantizedWeight:
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(self, "weight", shape, self.kind, self.kind == "conv1d", self.dtype, self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight as floats, dequantized on each access: (out, in), or (in, out) in the place of a Conv1D."""
        weight = self.dequantized(self.dtype)
        return weight.T if self.kind == "conv1d" else weight

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as floats, (out_features, in_features) in `dtype`."""
        return self.unpacked(dtype)

    def codebook(self) -> Codebook | None:
        return self.quantizer.codebook(self.handle)

    def unpacked(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        shape = (self.out_features, self.in_features)
        return self.quantizer.unpack({n: t.detach() for n, t in self.packed.items()}, shape=shape, dtype=dtype, out=out)

    def repacked(self, value: Tensor) -> dict[str, Tensor]:
        return self.quantizer._pack(value, None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantizer.inputs(x, self)
        return lora_linear(x, self._source, self.bias, in_float8=self.float8 and self.training)

    def native(self, x: Tensor) -> Tensor:
        """The vendor's own forward, where the format has one."""
        return self.quantizer.native(self, x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, quantizer={self.quantizer!r}"


class TensorQuantizer(Quantizer):
    """A format given by two functions on tensors; everything else is inherited.

    Example:
        See `examples/custom_quantizer.py`, a whole quantizer in under 30 lines.
    """

    layer_types: ClassVar[tuple[str, ...]] = ("qft.core.packed.PackedLinear",)
    stored_names: ClassVar[Mapping[str, str]] = {}
    """Packed tensor → its name in checkpoints of the format, where that is another one."""
    stored_notes: ClassVar[frozenset[str]] = frozenset()
    """Further tensors that checkpoints keep with a layer and that only repeat its options."""

    @abstractmethod
    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        """Quantize `weight`, a float tensor (out_features, in_features) of any float dtype.

        Returns the tensors to keep, by name, on the device of `weight`; the codes are called "qweight".
        """

    @abstractmethod
    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """The inverse: floats of `shape` in `dtype`, computed in float32, written into `out` where it is given."""

    def inputs(self, x: Tensor, layer: PackedLinear) -> Tensor:
        """What a layer without adapters makes of its inputs first, in a format that rounds those, too (`exact_forward`)."""
        return x

    def loaded(self, name: str, layer: PackedLinear) -> None:
        """Look at the tensors of a layer that came from a checkpoint, once; `layer.quantizer` may be replaced.

        Raises:
            BadFolder: they cannot be right.
        """

    def native(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """`layer` (x) by the vendor's kernels, differentiable in x; a format without any computes it as ever."""
        return layer(x)

    # ---- inherited by every format -----------------------------------------------------------------------

    @classmethod
    def recognise(cls, module: nn.Module) -> Quantizer | None:
        return module.quantizer if isinstance(module, PackedModule) and type(module.quantizer) is cls else None

    def weights(self, module: nn.Module) -> Sequence[QuantizedWeight]:
        if not isinstance(module, PackedModule) or type(module.quantizer) is not type(self):
            return ()
        return (module.handle,)

    def for_experts(self) -> TensorQuantizer | None:
        own = self.capabilities
        return self if own.quantizes and not own.needs_calibration else None

    def quantize_layer(self, module: nn.Module, *, statistics: Any = None) -> nn.Module:
        weight = float_weight(module)
        packed = self._pack(weight, statistics)
        kind: Kind = "conv1d" if is_conv1d(module) else "linear"
        return PackedLinear(self, packed, tuple(weight.shape), weight.dtype, module.bias, kind)

    def dequantize(
        self, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        # the layer's own quantizer, not self: options may differ from layer to layer
        dtype = out.dtype if out is not None else dtype or weight.dtype
        return weight.module.unpacked(dtype, out)

    def requantize(self, weight: QuantizedWeight, value: Tensor) -> None:
        module = weight.module
        value = value.to(module._first.device)
        packed = module.repacked(value)
        if any(t.dtype != module.packed[n].dtype for n, t in packed.items()):
            packed = module.repacked(value.to(module.dtype))  # a format whose constants have the weight's dtype
        self.restore(weight, packed)

    def tensors(self, weight: QuantizedWeight) -> list[Tensor]:
        return list(weight.module.packed.values())

    def snapshot(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {n: t.detach().to("cpu", copy=True) for n, t in weight.module.packed.items()}

    def restore(self, weight: QuantizedWeight, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in saved.items():
            getattr(weight.module, name).data = tensor.to(getattr(weight.module, name).device, copy=True)

    def load_state(self, weight: QuantizedWeight, state: Mapping[str, Tensor]) -> None:
        # as restore does: a constant that a shift widened keeps its dtype, which load_state_dict would cast
        names = weight.module.packed_names
        self.restore(weight, {n: t for n, t in state.items() if n in names})
        super().load_state(weight, {n: t for n, t in state.items() if n not in names})

    def nbytes(self, shape: tuple[int, ...]) -> int:
        packed = self.pack(torch.zeros(shape, dtype=torch.bfloat16))
        return sum(t.numel() * t.element_size() for t in packed.values())

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each packed tensor of a weight of `shape` and `dtype`."""
        packed = self.pack(torch.zeros(shape, dtype=dtype))
        return {name: (tuple(t.shape), t.dtype) for name, t in packed.items()}

    def _pack(self, weight: Tensor, statistics: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            weight = weight.contiguous()
            packed = self.pack(weight, statistics=statistics) if statistics is not None else self.pack(weight)
        if not isinstance(packed, Mapping) or not all(isinstance(t, Tensor) for t in packed.values()):
            raise QftError(f"{self!r}.pack must return a dict of tensors, and returned {type(packed).__name__}")
        return dict(packed)


def dequantizer(quantizer: Quantizer, weight: QuantizedWeight) -> Callable[[torch.dtype], Tensor]:
    """`dequantize` of one weight as a function of the dtype alone, as `lora_linear` wants it."""
    return partial(_dequantize, quantizer, weight)


def _dequantize(quantizer: Quantizer, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return quantizer.dequantize(weight, dtype=dtype)

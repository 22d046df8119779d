"""torchao's weights inside linear layers: taken apart into plain tensors, put together again, and as floats.

A torchao weight is a tensor subclass around plain tensors, its leaves. Nothing here imports torchao: the tensors bring
their own methods along (`__tensor_flatten__`, `__tensor_unflatten__`, `dequantize`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.modes import normal_mode
from qft.ops import kernels
from qft.ops.linear import lora_linear

PREFIX = "_weight_"
"""Leaves in state dicts and files are called as torchao's own safetensors call them, such as `_weight_qdata`."""
CHUNK = 1024


def is_torchao(tensor: Any) -> bool:
    """Whether a tensor's class is torchao's, by its qualified name."""
    return type(tensor).__module__.partition(".")[0] == "torchao"


class TorchAOLinear(nn.Linear):
    """An `nn.Linear` over a torchao weight, mended: casts keep its constants, and gradients always flow.

    torchao casts some constants with the model, detaches outputs where activations are quantized, and leaves tensor
    subclasses in state dicts. Here casts change only the dtype that the weight shows, the state dict holds the leaves
    under torchao's own names, and torchao's kernels run where no gradient is wanted and the dtypes are theirs.
    """

    qft_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
        if wanted or x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return lora_linear(x, self._floats, self.bias)
        return super().forward(x)

    def _floats(self, dtype: torch.dtype) -> Tensor:
        return floats(self.weight, dtype)

    def set_leaves(self, change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        """Put a weight of changed leaves in the weight's place; `dtype` is what it shows, where its class lets it."""
        self.weight = _parameter(rebuilt(self.weight.detach(), change, dtype))

    @normal_mode()
    def __deepcopy__(self, memo: dict[int, Any]) -> TorchAOLinear:
        # torchao clones an NF4Tensor by quantizing it again
        if id(self.weight) not in memo:
            memo[id(self.weight)] = _parameter(rebuilt(self.weight.detach(), lambda _, leaf: leaf.clone()))
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    @normal_mode()
    def _apply(self, fn, recurse=True):
        weight, bias = self._parameters.pop("weight"), self._parameters.get("bias")
        try:
            super()._apply(fn, recurse)
        finally:
            bias = self._parameters.pop("bias", bias)
            self._parameters["weight"], self._parameters["bias"] = weight, bias

        def moved(_: str, leaf: Tensor) -> Tensor:
            new = fn(leaf)
            return new if new.dtype == leaf.dtype else leaf.to(new.device)

        self.qft_dtype = fn(torch.empty(0, dtype=self.qft_dtype)).dtype
        self.set_leaves(moved, self.qft_dtype)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, leaf in leaves(self.weight).items():
            destination[f"{prefix}{PREFIX}{name}"] = leaf if keep_vars else leaf.detach()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        here = leaves(self.weight)
        given = {n: state_dict[f"{prefix}{PREFIX}{n}"] for n in here if f"{prefix}{PREFIX}{n}" in state_dict}
        whole = state_dict.get(f"{prefix}weight")
        if is_torchao(whole):  # as an `nn.Linear`'s own state dict holds it
            given = leaves(whole)
        missing_keys += [f"{prefix}{PREFIX}{n}" for n in here if n not in given]
        wrong = [n for n, t in given.items() if n in here and (t.shape, t.dtype) != (here[n].shape, here[n].dtype)]
        error_msgs += [
            f"{prefix}{PREFIX}{n} is {given[n].dtype} {tuple(given[n].shape)}, and the layer's is {here[n].dtype} "
            f"{tuple(here[n].shape)}"
            for n in wrong
        ]
        if not wrong and here.keys() <= given.keys():
            self.set_leaves(lambda n, leaf: given[n].to(leaf.device, copy=True))
        ours = {f"{prefix}{PREFIX}{n}" for n in here} | ({f"{prefix}weight"} if is_torchao(whole) else set())
        rest = {k: v for k, v in state_dict.items() if k not in ours}
        weight = self._parameters.pop("weight")
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters["weight"] = weight
            self._parameters["bias"] = self._parameters.pop("bias")

    def extra_repr(self) -> str:
        weight = type(self.weight).__name__
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weight={weight}"


def _parameter(weight: Tensor) -> nn.Parameter:
    new = nn.Parameter(weight, requires_grad=False)
    new._is_hf_initialized = True  # type: ignore[attr-defined]
    return new


# ---- tensors ---------------------------------------------------------------------------------------------


def leaves(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a tensor subclass holds, by name; nested ones by names with dots."""
    found: dict[str, Tensor] = {}
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        inner = getattr(tensor, name)
        if hasattr(inner, "__tensor_flatten__"):
            found |= {f"{name}.{key}": leaf for key, leaf in leaves(inner).items()}
        else:
            found[name] = inner
    return found


def rebuilt(
    tensor: Any, change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None, at: str = ""
) -> Any:
    """A tensor of the same class and options over changed leaves, showing `dtype` where its class keeps one apart."""
    names, options = tensor.__tensor_flatten__()
    inner: dict[str, Tensor] = {}
    for name in names:
        part = getattr(tensor, name)
        if hasattr(part, "__tensor_flatten__"):
            inner[name] = rebuilt(part, change, dtype, f"{at}{name}.")
        else:
            inner[name] = change(f"{at}{name}", part.detach())
    if isinstance(options, Mapping):
        options = dict(options)
        if dtype is not None and "dtype" in options:
            options["dtype"] = dtype
        if dataclasses.is_dataclass(options.get("tensor_meta")):  # NF4Tensor
            new = {"device": inner[names[0]].device, **({"dtype": dtype} if dtype is not None else {})}
            options["tensor_meta"] = dataclasses.replace(options["tensor_meta"], **new)
    return type(tensor).__tensor_unflatten__(inner, options, tensor.shape, tensor.stride())


def without_nan(name: str, leaf: Tensor) -> Tensor:
    """For `rebuilt`: float8 codes that torchao made by dividing zero by zero become zeros."""
    if name != "qdata":
        return leaf
    return leaf.view(torch.uint8).masked_fill(leaf.to(torch.float16).isnan(), 0).view(leaf.dtype)


def _same(_: str, leaf: Tensor) -> Tensor:
    return leaf


def has_dequantize(weight: Tensor) -> bool:
    """Whether a torchao tensor gives its floats itself; some layouts are for a kernel alone."""
    return type(_unwrapped(weight)).dequantize is not Tensor.dequantize


def _unwrapped(weight: Any) -> Any:
    """The weight in torchao 0.17's wrapper that quantizes activations."""
    return weight.original_weight_tensor if type(weight).__name__ == "LinearActivationQuantizedTensor" else weight


@normal_mode()  # subclasses of tensors cannot be detached in inference mode
def floats(weight: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight in `dtype`, (out_features, in_features): torchao's own numbers, rounded once.

    NF4 is the exception: torchao computes it in the dtype of the weight that it came from, and so do these.
    """
    value = _by_our_kernel(weight, dtype, out)
    if value is None:
        value = _by_torchao(weight, dtype)
    return value if out is None or value is out else out.copy_(value)


_ROWS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def _by_our_kernel(weight: Any, dtype: torch.dtype, out: Tensor | None) -> Tensor | None:
    """Codes of 8 bits times scales along rows, where all zero points are zero; None where there is no kernel for it."""
    if type(weight).__name__ not in _ROWS or getattr(weight, "act_pre_scale", None) is not None:
        return None
    if not kernels.usable(weight.qdata) or not _centred(weight):
        return None
    return kernels.rows(weight.qdata, weight.scale, dtype=dtype, out=out)


def _centred(weight: Any) -> bool:
    """Whether there are no zero points but zeros. A weight is asked once: new leaves make a new weight."""
    known = weight.__dict__.get("_qft_centred")
    if known is None:
        zero = getattr(weight, "zero_point", None)
        known = weight._qft_centred = zero is None or not bool(zero.any())
    return known


def _by_torchao(weight: Any, dtype: torch.dtype) -> Tensor:
    weight = _unwrapped(weight.detach())
    if hasattr(weight, "get_original_weight"):
        return rebuilt(weight, _same, weight.nf4.dtype).get_original_weight().to(dtype)
    if not has_dequantize(weight):
        return _through_kernel(weight).to(dtype)
    scale = getattr(weight, "act_pre_scale", None)  # of AWQ and SmoothQuant: inputs are multiplied by it
    if scale is None and dtype == weight.dtype:
        return weight.dequantize()
    value = rebuilt(weight, _same, torch.float32).dequantize()
    return (value if scale is None else value.float() * scale.float()).to(dtype)


def _through_kernel(weight: Tensor) -> Tensor:
    """The weight of a layout that only torchao's kernel reads: its product with the identity, piece by piece."""
    rows, columns = weight.shape
    value = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    for at in range(0, columns, CHUNK):
        size = min(CHUNK, columns - at)
        piece = torch.zeros(size, columns, dtype=weight.dtype, device=weight.device)
        piece[:, at : at + size].fill_diagonal_(1)
        value[:, at : at + size] = nn.functional.linear(piece, weight).T
    return value

"""HQQ: affine codes of 1 to 8 bits whose zero points a half-quadratic solver fits, in the `hqq` package's own layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.backends.algorithms.sinkhorn import column_scales
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities, QuantizedWeight
from qft.errors import BadFolder, BadOption, BadShape, QftError, UnsupportedOperation
from qft.ops import kernels
from qft.ops.bits import codes_per_word, in_groups, pack_rows, unpack_rows

BITS = (1, 2, 3, 4, 8)
GROUP_SIZES = (128, 64, 32)
"""Tried in this order where the group size is left open."""

STEPS, P, BETA = 20, 0.7, 10.0
"""Steps of the solver at most, its norm, and its weight, as the package has them."""

NARROW, FINEST = 1e-4, 2e4
"""Groups narrower than this become constant, and steps are no finer than 1/2e4: the package's bounds."""

SMALL = 2.0**-5
"""Weights whose largest value is below this are scaled up first, lest those bounds bite."""

LARGEST_ZERO = 6e4
"""float16 has no room for more."""

_INFERENCE_ONLY = {
    "hqq.backends.torchao.HQQLinearTorchWeightOnlynt4": "was repacked for torchao's int4 kernel",
    "hqq.backends.marlin.MarlinLinear": "was repacked for the Marlin kernel",
    "hqq.backends.bitblas.HQQLinearBitBlas": "was repacked for BitBLAS",
    "hqq.core.peft.HQQLinearLoRA": "has an adapter of the hqq package's own",
    "hqq.core.peft.HQQLinearGroupedProj": "has an adapter of the hqq package's own",
}


@dataclass(frozen=True)
class HQQ(TensorQuantizer):
    """Half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/), without calibration.

    Args:
        bits: 1, 2, 3, 4 or 8; with 1 the error over normal weights is as large as the weights, in the package, too.
        group_size: weights that share a scale and a zero point; it must divide the number of weights, and groups may
            run on into the next row, as in the package. None is the largest of 128, 64 and 32 that divides every
            width.
        axis: 1 groups neighbours of a row, 0 weights of a column.
        optimize: fit the zero points; False is round-to-nearest between each group's extremes.
        round_zero: whether zero points start from whole numbers; None is the package's way, with 4 bits only.
        scaling: "sinq" divides columns by scales of their own first (SINQ, arXiv 2509.22944, section 3), which the package
            does not; for groups that divide in_features. It costs 16 / out_features bits a weight, and a while.

    A weight decodes as `(code - zero_point) * scale`, in float32; `HQQLinear` rounds to its compute dtype in between.
    Codes and constants are those of the package's `Quantizer.quantize` on a CPU, bit for bit, where weights are not
    tiny; its CUDA path runs the same solver in float16. The package is not needed: its solver stops the device at
    every step to look at the error, and this one does not.

    Packed tensors, `HQQLinear`'s own: `qweight` (its W_q) uint8, int32 for 3 bits, codes packed along the groups'
    first dimension; `scale` and `zero_point` in the weight's dtype, `(groups, 1)`, or `(1, groups)` with axis 0. Zero
    points of 8 bits over bfloat16 are float16, which takes a fifth off the error; one that was shifted is float32. With
    `scaling="sinq"` also `column_scale` (in_features,) in the weight's dtype.
    """

    name: ClassVar[str] = "hqq"
    foreign_types: ClassVar[tuple[str, ...]] = ("hqq.core.quantize.HQQLinear", *_INFERENCE_ONLY)
    config_methods: ClassVar[tuple[str, ...]] = ("hqq",)
    stored_names: ClassVar[Mapping[str, str]] = {"qweight": "W_q", "zero_point": "zero"}
    stored_notes: ClassVar[frozenset[str]] = frozenset(
        "nbits group_size shape axis packing unpack_view_dtype view_as_float compute_dtype offload_meta optimize "
        "encoded_state_dict stores_quant_config channel_wise round_zero quant_scale quant_zero".split()
    )
    folder_marks: ClassVar[tuple[str, ...]] = ("qmodel.pt",)

    bits: int = 4
    group_size: int | None = 64
    axis: int = 1
    optimize: bool = True
    round_zero: bool | None = None
    scaling: Literal["none", "sinq"] = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in BITS:
            raise BadOption(f"hqq: bits={self.bits}; it is one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size < 1:
            raise BadOption(f"hqq: group_size={self.group_size}; it is a positive number of weights")
        if self.axis not in (0, 1):
            raise BadOption(f"hqq: axis={self.axis}; it is 1 (groups of neighbours in a row) or 0 (in a column)")
        if self.scaling not in ("none", "sinq") or (self.scaling == "sinq" and self.axis != 1):
            raise BadOption(f"hqq: scaling={self.scaling!r}; it is 'none', or 'sinq' with axis=1")
        if self.round_zero == (self.bits == 4):
            object.__setattr__(self, "round_zero", None)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            bits=self.bits,
            devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
            requantize=True,
            float_zero_points=self.axis == 1 and self.scaling == "none",
        )

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> HQQ:
        shapes = list(shapes)
        if self.group_size is None:
            for size in GROUP_SIZES:
                if all(shape[-1] % size == 0 for _, shape in shapes):
                    return replace(self, group_size=size)
        for name, shape in shapes:
            size = self.group_size or GROUP_SIZES[-1]
            whole_rows = self.group_size is None or self.scaling == "sinq"
            if prod(shape) % size or (whole_rows and shape[-1] % size):
                raise BadShape(
                    f"{name} is {' × '.join(map(str, shape))}, which groups of {size} do not divide: give a group_size "
                    "that divides every weight, or skip this one"
                )
        return self

    # ---- the solver --------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        size = self._size(tuple(weight.shape))
        if self.scaling == "sinq":
            columns = column_scales(weight, size).to(weight.dtype)
            packed = replace(self, scaling="none").pack((weight.float() / columns.float()).to(weight.dtype))
            return {**packed, "column_scale": columns}
        groups, top = in_groups(weight.float(), size, self.axis), 2**self.bits - 1
        # a power of two, on the device: nothing waits for it, and it changes no code that the bounds leave alone
        largest = groups.abs().amax()
        factor = torch.where(largest > 0, SMALL / largest, 1.0).log2().ceil().clamp(0, 120).exp2()
        groups = groups * factor
        low, high = groups.amin(self.axis, keepdim=True), groups.amax(self.axis, keepdim=True)
        width = high - low
        inverse = torch.where(width <= NARROW, 1.0, top / width).clamp(max=FINEST)
        inverse = torch.minimum(inverse, LARGEST_ZERO / torch.maximum(low.abs(), high.abs()))
        zero = -low * inverse
        if self.bits == 4 if self.round_zero is None else self.round_zero:
            zero = zero.round()
        steps = groups * inverse
        if self.optimize:
            zero = _solve(groups, steps, inverse, zero, top, self.axis)
        codes = (steps + zero).round_().clamp_(0, top)
        scale = 1.0 / inverse / factor
        qweight = pack_rows(codes, self.bits, high_first=True, word=self._word)
        return {"qweight": qweight, "scale": scale.to(weight.dtype), "zero_point": zero.to(self._zeros(weight.dtype))}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        size = self._size(shape)
        if self.scaling == "sinq":  # the columns' scales last, and in float32
            value = replace(self, scaling="none").unpack(packed, shape=shape, dtype=torch.float32)
            value.mul_(packed["column_scale"].float())
            return value.to(dtype) if out is None else out.copy_(value)
        value = kernels.parts(
            packed, bits=self.bits, group_size=size, axis=self.axis, layout="hqq", shape=shape, dtype=dtype, out=out
        )
        if value is not None:
            return value
        result = out if out is not None and out.is_contiguous() else None
        if result is None:
            result = torch.empty(shape, dtype=dtype, device=packed["qweight"].device)
        groups = in_groups(result, size, self.axis)
        scale, zero = packed["scale"].float(), packed["zero_point"].float()
        for rows, codes in unpack_rows(packed["qweight"], self.bits, groups.shape[0], high_first=True):
            mine = rows if self.axis == 1 else slice(None)
            torch.mul(codes - zero[mine], scale[mine], out=groups[rows])
        return result if out is None or result is out else out.copy_(result)

    # ---- shapes ------------------------------------------------------------------------------------------

    @property
    def _word(self) -> torch.dtype:
        return torch.int32 if self.bits == 3 else torch.uint8

    def _zeros(self, dtype: torch.dtype) -> torch.dtype:
        # bfloat16 counts to 255 in whole steps at most: the error of 8 bits would be a quarter larger
        return torch.float16 if self.bits == 8 and dtype == torch.bfloat16 else dtype

    def _size(self, shape: tuple[int, ...]) -> int:
        size = self.group_size or next((s for s in GROUP_SIZES if shape[-1] % s == 0), GROUP_SIZES[-1])
        if prod(shape) % size or (self.scaling == "sinq" and shape[-1] % size):
            raise BadShape(f"a weight of {tuple(shape)} cannot be divided into groups of {size}")
        return size

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size = self._size(shape)
        groups = prod(shape) // size
        rows, columns = (groups, size) if self.axis == 1 else (size, groups)
        constants = (groups, 1) if self.axis == 1 else (1, groups)
        words = -(-rows // codes_per_word(self.bits, self._word))
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": ((words, columns), self._word),
            "scale": (constants, dtype),
            "zero_point": (constants, self._zeros(dtype)),
        }
        return {**found, "column_scale": ((shape[-1],), dtype)} if self.scaling == "sinq" else found

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(s) * dtype.itemsize for s, dtype in self.template(shape, torch.bfloat16).values())

    # ---- the exact merge ---------------------------------------------------------------------------------

    def group_size_of(self, weight: QuantizedWeight) -> int | None:
        own = weight.module.quantizer
        size = own._size(weight.shape)
        # groups that run on into the next row, or down a column, share their constants with other rows
        whole_rows = own.axis == 1 and weight.shape[-1] % size == 0
        return size if whole_rows and own.scaling == "none" else None

    def shift(self, weight: QuantizedWeight, delta: Tensor) -> None:
        module, size = weight.module, self.group_size_of(weight)
        if size is None:
            raise UnsupportedOperation(
                f"{module.quantizer!r} has no groups of neighbours within the rows of a weight of {weight.shape}: "
                "axis=1 and a group_size that divides in_features have, without scaling"
            )
        wanted = (*weight.shape[:-1], weight.shape[-1] // size)
        if tuple(delta.shape) != wanted:
            raise BadShape(f"delta is {tuple(delta.shape)}, and this weight has one group for each of {wanted}")
        # (code - zero_point) * scale + delta; float32 from now on, since 16 bits would round the sum
        delta = delta.to(module.scale.device, torch.float32).reshape(module.scale.shape)
        self.restore(weight, {"zero_point": module.zero_point.float() - delta / module.scale.float()})

    # ---- what the hqq package quantized ------------------------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        for kind in type(module).__mro__:
            why = _INFERENCE_ONLY.get(f"{kind.__module__}.{kind.__qualname__}")
            if why is not None:
                raise UnsupportedOperation(f"a {kind.__name__} {why}: load the model without that, as HQQLinear layers")
        meta: Any = module.meta
        if meta is None or not getattr(module, "ready", True):
            raise UnsupportedOperation("an HQQLinear holds no weights yet: load or quantize it before qft sees it")
        options = (getattr(module, "quant_config", None) or {}).get("weight_quant_params") or {}
        own, packed = _from_meta({**options, **meta}, module.W_q)
        bias = None if module.bias is None else module.bias.detach()
        return PackedLinear(own, packed, tuple(meta["shape"]), module.compute_dtype, bias)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HQQ:
        settings = config.get("quant_config") or {}
        if "weight_quant_params" not in settings:
            raise BadOption(
                f"this HqqConfig has options of their own for {', '.join(map(str, settings)) or 'no layer'}: give a "
                "mapping instead, such as {'*.q_proj': 'hqq:bits=8', '*': 'hqq:bits=3'}"
            )
        for name in ("scale_quant_params", "zero_quant_params", "offload_meta"):
            if settings.get(name):
                raise BadOption(f"HqqConfig: {name} is not supported, and ignored by recent versions of hqq")
        options = settings["weight_quant_params"]
        if options.get("view_as_float"):
            raise BadOption("HqqConfig: view_as_float is not supported: codes are kept as integers")
        try:
            return _options(options)
        except UnsupportedOperation as error:
            raise BadOption(f"HqqConfig: {error}") from error

    @classmethod
    def read_folder(cls, folder: Path, model: nn.Module) -> tuple[dict[str, PackedLinear], dict[str, Tensor]]:
        try:
            stored = torch.load(folder / "qmodel.pt", map_location="cpu", weights_only=True)
            layers, others = {}, {}
            for name, state in stored.items():
                if "meta" in state:
                    raise UnsupportedOperation(
                        f"{folder / 'qmodel.pt'} is sinq's: save the model with its save_quantized_safetensors, which is read"
                    )
                if "W_q" not in state:
                    others |= {f"{name}.{key}": value for key, value in state.items()}
                    continue
                own, packed = _from_meta(state, state["W_q"])
                shape, dtype = tuple(state["shape"]), state["compute_dtype"]
                layers[name] = PackedLinear(own, packed, shape, dtype, state.get("bias"))
        except QftError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
            raise BadFolder(f"{folder / 'qmodel.pt'} is not what hqq's save_quantized writes: {why}") from error
        return layers, others


def _solve(groups: Tensor, steps: Tensor, inverse: Tensor, zero: Tensor, top: int, axis: int) -> Tensor:
    """Zero points by the package's steps: shrink the error to its large entries, take the mean of what is left.

    A step that does not lower the mean error of the whole weight is the last; the package computes it, too, before it
    looks. On an accelerator all steps run, and those after the last change nothing, so that nothing waits.
    """
    best = torch.full((), torch.inf, device=groups.device)
    going = torch.ones((), dtype=torch.bool, device=groups.device)
    on_cpu = groups.device.type == "cpu"
    for _ in range(STEPS):
        codes = (steps + zero).round_().clamp_(0, top)
        error = groups - (codes - zero).div_(inverse)
        size = error.abs()
        loss = size.mean()
        if on_cpu and size.amax() ** (2 - P) < 0.99 / BETA:  # shrunk to nothing, which powers would tell more slowly
            new = codes.sub_(steps).mean(axis, keepdim=True)
        else:
            kept = size.sub_(size.pow(P - 1).mul_(1 / BETA)).clamp_min_(0).mul_(error.sign_())
            new = codes.sub_((groups - kept).mul_(inverse)).mean(axis, keepdim=True)
        zero = torch.where(going, new, zero)
        going = going & (loss < best)
        best = loss
        if on_cpu and not going:
            break
    return zero


def _options(given: Mapping[str, Any]) -> HQQ:
    """Options by their names in the package."""
    bits, size = given.get("nbits"), given.get("group_size")
    if bits not in BITS:
        raise UnsupportedOperation(
            f"nbits={bits} is not supported: the package keeps such codes in words of 2 or 8 bits"
        )
    if size is None or not given.get("channel_wise", True):
        raise UnsupportedOperation(
            f"group_size={size}, channel_wise={given.get('channel_wise', True)}: give a group_size"
        )
    return HQQ(
        bits=int(bits),
        group_size=size,
        axis=given.get("axis", 0),
        optimize=given.get("optimize", True),
        round_zero=given.get("round_zero"),
    )


def _from_meta(meta: Mapping[str, Any], codes: Tensor) -> tuple[HQQ, dict[str, Tensor]]:
    """Options and packed tensors of an `HQQLinear`; views of its own tensors.

    Raises:
        UnsupportedOperation: constants that are quantized or offloaded, or codes in words of another size.
    """
    if meta.get("quant_zero") or meta.get("quant_scale") or not {"scale", "zero"} <= meta.keys():
        raise UnsupportedOperation(
            "an HQQLinear has quantized or offloaded constants (quant_zero, quant_scale, offload_meta), which hqq itself "
            "deprecates: quantize the float model again"
        )
    own = _options(meta)
    if not meta.get("packing"):
        raise UnsupportedOperation("an HQQLinear holds codes that are not packed (packing None): quantize it again")
    codes = codes.detach()
    if meta.get("view_as_float"):
        codes = codes.view(own._word)
    packed = {"qweight": codes, "scale": meta["scale"], "zero_point": meta["zero"]}
    wanted = {k: s for k, (s, _) in own.template(tuple(meta["shape"]), torch.float16).items()}
    found = {k: tuple(t.shape) for k, t in packed.items()}
    if found != wanted or codes.dtype != own._word:
        raise UnsupportedOperation(f"an HQQLinear of {own!r} holds {found} ({codes.dtype}), and {wanted} was expected")
    return own, packed

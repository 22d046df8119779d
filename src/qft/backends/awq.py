"""AWQ's 4-bit layout: integers with a scale and a zero point a group, eight output channels to a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.backends.algorithms.feedback import doubt, nearest, with_feedback
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadOption, BadShape, UnsupportedOperation
from qft.ops import kernels
from qft.ops.bits import pack_bits, unpack_bits

BITS, TOP, MIDDLE = 4, 15, 8

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""-1 is one group a row; gptqmodel, and so transformers, reads those up to 128."""

OPEN = (128, 64, 32)
"""Tried in this order where a group size is left open."""

LARGEST = 2.0**15
"""Of a weight's absolute values: scales and products are float16, and end at 65504."""

RANGES = tuple(1 - i / 20 for i in range(10))
"""Shares of a group's range that the search goes through, as AWQ's code does."""

AT_ONCE = 2**24
"""Weights that the search tries at once, all shares of a group counted, lest small groups wait for the device."""

_GPTQMODEL, _AUTOAWQ = "gptqmodel.nn_modules.qlinear", "awq.modules.linear"
_PLAIN = frozenset({
    f"{_AUTOAWQ}.gemm.WQLinear_GEMM",
    *(f"{_GPTQMODEL}.{name}" for name in ("torch_awq.AwqTorchLinear", "gemm_awq.AwqGEMMLinear",
      "gemm_awq_triton.AwqGEMMTritonLinear", "torch_fused_awq.TorchFusedAwqLinear",
      "torch_aten_kernel_awq.TorchAtenAwqLinear", "torch_cpu_avx512_awq.TorchCpuAvx512AwqLinear")),
})  # fmt: skip
"""Layers that keep the checkpoint's layout, for as long as their `linear_mode` is not "inference"."""

_ELSEWHERE = frozenset({
    # what was or will be quantized: the checkpoint's tensors, and `quantize`, say so themselves
    "quant_method", "method", "modules_to_not_convert", "lm_head", "dataset", "tokenizer", "model_seqlen", "batch_size",
    "pad_token_id", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize",
    "cache_block_outputs",
    # how the codes came, in other tools; `sym` is GPTQ's, and says True beside any `zero_point`
    "sym", "damp_percent", "act_group_aware", "true_sequential", "damp_auto_increment", "static_groups", "mse",
    # other tools' kernels, versions and files
    "meta", "backend", "max_input_length", "pack_impl", "offload_to_disk", "offload_to_disk_path", "quantizer",
    "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "transformers_version", "config_file_name",
})  # fmt: skip


@dataclass(frozen=True)
class AWQ(TensorQuantizer):
    """4 bits in the layout of AWQ's checkpoints (autoawq's and gptqmodel's "gemm"), with an algorithm of our own.

    Of AWQ (arXiv 2306.00978) it has the search for each group's range by what the activations say: of ten shares of the
    range, down to 0.55, the one with the least E[x²]-weighted error. It does not have AWQ's channel scales. Those change
    the operations before a layer (a norm's gain, the rows of another weight), so that the model would no longer fit
    the float one: adapters, merges over the original weights and starts that were made over one would be wrong over
    the other. What the scales would spare is spared by rounding with error feedback instead
    (`qft.backends.algorithms.feedback`, GPTQ's
    Algorithm 1), over statistics of a block whose predecessors are quantized already. Checkpoints that hold AWQ's own
    scales are read, trained and merged like any others: theirs are part of their float tensors.

    Without statistics, as in a merge, weights are rounded to nearest between each group's extremes.

    Args:
        group_size: columns that share their constants: 16 to 1024, a power of two that divides in_features; -1 is the
            whole row; None is the largest of 128, 64 and 32 that divides every target's.
        zero_point: a zero point for each group; without, all of them are 8, the middle.
        apply_clip: search for ranges.
        damp_percent: added to the second moment's diagonal, as a share of its mean.

    Packed tensors: `qweight` int32 (in, out / 8), word j holding output channels 8j + (0, 2, 4, 6, 1, 3, 5, 7), the
    first in the lowest bits; `qzeros` int32 (groups, out / 8), in the same way; `scales` float16 (groups, out).
    out_features must be a multiple of 8. The weight is `scales * (code - zero)`, rounded to the dtype of the scales, as
    autoawq and gptqmodel compute it.
    """

    name: ClassVar[str] = "awq"
    statistics_kind: ClassVar[Literal["diagonal", "full"]] = "full"
    statistics_through: ClassVar[Literal["old", "new"]] = "new"
    config_methods: ClassVar[tuple[str, ...]] = ("awq",)
    config_conv1d: ClassVar[bool] = False
    foreign_types: ClassVar[tuple[str, ...]] = (
        f"{_GPTQMODEL}.AWQuantLinear",
        f"{_GPTQMODEL}.bitblas_awq.AWQBitBlasKernel",
        *(f"{_AUTOAWQ}.{name}" for name in ("gemm.WQLinear_GEMM", "gemv.WQLinear_GEMV", "marlin.WQLinear_Marlin",
          "gemv_fast.WQLinear_GEMVFast", "exllama.WQLinear_Exllama", "exllamav2.WQLinear_ExllamaV2",
          "gemm_ipex.WQLinear_IPEX")),
    )  # fmt: skip

    group_size: int | None = None
    zero_point: bool = True
    apply_clip: bool = True
    damp_percent: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise BadOption(f"awq: group_size={self.group_size}; it is one of {', '.join(map(str, GROUP_SIZES))}")
        if not 0 < self.damp_percent < 1:
            raise BadOption(f"awq: damp_percent={self.damp_percent}; it is above 0 and below 1")

    @property
    def capabilities(self) -> Capabilities:
        devices = frozenset({"cpu", "cuda", "xpu"})
        return Capabilities(bits=BITS, devices=devices, needs_calibration=True, requantize=True)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> AWQ:
        shapes = list(shapes)
        size = self.group_size
        if size is None:
            size = next((s for s in OPEN if all(shape[-1] % s == 0 for _, shape in shapes)), OPEN[-1])
        for name, shape in shapes:
            if shape[0] % 8:
                raise BadShape(
                    f"{name} has out_features {shape[0]}, and AWQ's layout holds multiples of 8 only: skip this weight, "
                    "or take gptq"
                )
            if size != -1 and shape[-1] % size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, which groups of {size} do not divide: give a group_size that "
                    "divides every width, or skip this weight"
                )
        return replace(self, group_size=size)

    # ---- codes -------------------------------------------------------------------------------------------

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        self.resolve([("a weight", tuple(weight.shape))])
        size = self._group_size(weight.shape)
        if not bool(weight.abs().amax() <= LARGEST):
            raise BadOption(f"awq: a weight holds values beyond {LARGEST:g}, and AWQ's scales are float16: skip it")
        if statistics is None:
            columns = weight.T.float().reshape(-1, size, weight.shape[0])
            scale, zero = self._constants(columns.amin(1), columns.amax(1))
            codes = nearest(columns, scale, zero, BITS).view(weight.shape[1], -1)
        else:
            if statistics.second_moment is None:
                raise BadOption('awq: the statistics hold no second moments: gather the kind "full"')
            codes, scale, zero, _ = with_feedback(
                weight,
                statistics.second_moment,
                self._searched,
                bits=BITS,
                group_size=size,
                order="groups",
                damp=self.damp_percent,
            )
        return {"qweight": _words(codes), "qzeros": _words(zero), "scales": scale.half()}

    def _constants(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, as float16 keeps it, and zero point of groups between two extremes; float32, of their shape."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.zero_point:
            scale = (high - low) / TOP
        else:
            scale = torch.maximum(-low / MIDDLE, high / (TOP - MIDDLE))
        scale = torch.where(scale == 0, 1.0, scale).half().clamp(min=2.0**-24).float()  # float16's smallest
        zero = (-low / scale).round_().clamp_(0, TOP) if self.zero_point else torch.full_like(scale, MIDDLE)
        return scale, zero

    def _searched(self, columns: Tensor, activity: Tensor) -> tuple[Tensor, Tensor]:
        """The constants of a group (group_size, out) whose rounding breaks least of what comes out."""
        low, high = columns.amin(0), columns.amax(0)
        scale, zero = self._constants(low, high)
        if not self.apply_clip:
            return scale, zero
        least = torch.full_like(scale, torch.inf)
        shares = torch.tensor(RANGES, device=columns.device)
        for some in shares.split(max(1, AT_ONCE // columns.numel())):
            tried = self._constants(low * some[:, None], high * some[:, None])
            codes = nearest(columns.expand(len(some), -1, -1), *tried, BITS)
            error = codes.sub_(tried[1][:, None]).mul_(tried[0][:, None]).sub_(columns).square_()
            lowest, where = torch.einsum("g,sgo->so", activity, error).min(0)
            found = (t.gather(0, where[None])[0] for t in tried)
            better = lowest < least
            scale, zero = (torch.where(better, new, old) for new, old in zip(found, (scale, zero), strict=True))
            least = torch.where(better, lowest, least)
        return scale, zero

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        value = kernels.awq(packed, shape=shape, dtype=dtype, out=out)
        if value is not None:
            return value
        rows, columns = shape
        scales = packed["scales"]
        # float16 arithmetic is emulated on the CPU; codes less zero points are exact, and the product rounds once
        wide = torch.float32 if scales.device.type == "cpu" else scales.dtype
        scale, zero = scales.T.to(wide)[..., None], _codes(packed["qzeros"]).to(wide)[..., None]
        value = _codes(packed["qweight"]).to(wide).view(rows, scale.shape[1], -1)
        value = value.sub_(zero).mul_(scale).view(rows, columns).to(scales.dtype)
        return value.to(dtype) if out is None else out.copy_(value)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(s) * kind.itemsize for s, kind in self.template(shape, torch.float16).values())

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        groups = columns // self._group_size(shape)
        return {
            "qweight": ((columns, rows // 8), torch.int32),
            "qzeros": ((groups, rows // 8), torch.int32),
            "scales": ((groups, rows), torch.float16),
        }

    def _group_size(self, shape: Sequence[int]) -> int:
        size = self.group_size or next((s for s in OPEN if shape[-1] % s == 0), OPEN[-1])
        return shape[-1] if size == -1 else size

    def doubt(self, shape: tuple[int, ...], statistics: Any) -> str | None:
        return doubt(shape, statistics)

    # ---- other tools' models -----------------------------------------------------------------------------

    @classmethod
    def converted(cls, module: nn.Module) -> PackedLinear:
        layer: Any = module
        kind = type(module).__name__
        again = 'load the model with qft, or with AwqConfig(backend="auto_trainable")'
        if f"{type(module).__module__}.{type(module).__qualname__}" not in _PLAIN:
            raise UnsupportedOperation(f"{kind} keeps its codes in a layout that only its own kernel reads: {again}")
        mode = getattr(module, "linear_mode", None)
        if str(getattr(mode, "value", mode)) == "inference" or getattr(module, "_cpu_transformed", False):
            raise UnsupportedOperation(f"{kind} has repacked its codes in its first forward: {again}, and use that")
        if getattr(module, "adapter", None) is not None:
            raise UnsupportedOperation(f"{kind} computes with an adapter of its own, which qft does not")
        bits = getattr(module, "bits", getattr(module, "w_bit", None))
        if bits != BITS or layer.qweight.dtype != torch.int32:
            raise UnsupportedOperation(
                f"{kind} has codes of {bits} bits in {layer.qweight.dtype}: qft reads 4 in int32"
            )
        shape = (layer.out_features, layer.in_features)
        asked = getattr(module, "requested_group_size", layer.group_size)
        quantizer = cls(group_size=-1 if asked == shape[1] and asked not in GROUP_SIZES else asked)
        device = layer.qweight.device
        packed = {n: getattr(layer, n).detach().to(device) for n in ("qweight", "qzeros", "scales")}
        # tensors that were made under inference_mode cannot be changed in place
        packed = {n: t.clone() if t.is_inference() else t for n, t in packed.items()}
        for name, (sizes, _) in quantizer.template(shape, torch.float16).items():
            if tuple(packed[name].shape) != sizes:
                raise UnsupportedOperation(
                    f"a {kind} of {shape[0]} × {shape[1]} with groups of {asked} holds {name} of "
                    f"{tuple(packed[name].shape)}, and {sizes} was expected"
                )
        new = PackedLinear(quantizer, packed, shape, packed["scales"].dtype, layer.bias)
        quantizer.loaded(kind, new)
        return new

    def loaded(self, name: str, layer: PackedLinear) -> None:
        middle = bool((_codes(layer.packed["qzeros"].detach()) == MIDDLE).all())  # tools disagree on what to call it
        layer.quantizer = replace(self, zero_point=not middle)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AWQ:
        bits = config.get("bits", config.get("w_bit"))
        if bits != BITS:
            raise BadOption(f"this AWQ config says bits={bits!r}: qft reads and writes 4")
        for key in ("version", "format", "checkpoint_format"):
            layout = config.get(key) or "gemm"
            layout = str(getattr(layout, "value", layout)).lower()
            if layout != "gemm":
                raise BadOption(
                    f"the checkpoint format {layout!r} is one kernel's own: qft reads gemm; save the model in that with the "
                    "tool that quantized it"
                )
        word = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
        if word != "int32":
            raise BadOption(f"codes packed in {word} words: qft reads int32 ones")
        if any(changes for pattern, changes in (config.get("dynamic") or {}).items() if not pattern.startswith("-")):
            raise BadOption(
                "dynamic gives layers their own options: qft reads AWQ checkpoints whose layers have the same"
            )
        known = {"bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "checkpoint_format",
                 "pack_dtype", "dynamic"}  # fmt: skip
        for key, value in config.items():
            if key not in known and key not in _ELSEWHERE and value not in (None, False, "", 0, {}, []):
                raise BadOption(f"this AWQ config has the option {key}={value!r}, which qft does not know")
        size = config.get("group_size", config.get("q_group_size"))
        zero_point = config.get("zero_point")
        return cls(group_size=128 if size is None else size, zero_point=True if zero_point is None else zero_point)

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        from transformers import AwqConfig

        size = -1 if self.group_size is None else self.group_size
        return AwqConfig(bits=BITS, group_size=size, zero_point=self.zero_point, modules_to_not_convert=list(skipped))


def _words(codes: Tensor) -> Tensor:
    """Codes (n, out) as int32 (n, out / 8): of eight channels the even ones first, then the odd ones."""
    n, rows = codes.shape
    nibbles = codes.to(torch.uint8).view(n, rows // 8, 4, 2).transpose(2, 3)
    return pack_bits(nibbles, BITS).view(torch.int32).view(n, rows // 8)


def _codes(words: Tensor) -> Tensor:
    """The inverse, and turned round: uint8 (out, n)."""
    n, per_row = words.shape
    nibbles = unpack_bits(words.contiguous().view(torch.uint8).view(-1), BITS, n * per_row * 8)
    return nibbles.view(n, per_row, 2, 4).permute(1, 3, 2, 0).reshape(per_row * 8, n)

"""bitsandbytes: NF4 and FP4 (`Linear4bit`), and LLM.int8() (`Linear8bitLt`)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.core.packed import PackedLinear, TensorQuantizer, dequantizer
from qft.core.quantizer import Capabilities, QuantizedWeight, Quantizer, as_dtype, float_weight
from qft.errors import BadOption, QftWarning
from qft.ops import kernels
from qft.ops.linear import lora_linear

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEVICES = frozenset({"cpu", "cuda", "xpu"})


class _BitsAndBytes(Quantizer):
    """What both formats share: where the float layer's class, dtype and bias are kept."""

    requires: ClassVar[tuple[str, ...]] = ("bitsandbytes>=0.49",)

    def weights(self, module: nn.Module) -> Sequence[QuantizedWeight]:
        if not self.owns(module) or not self._is_quantized(module):
            return ()
        # transformers notes the class of the float layer in source_cls, and so do we
        conv1d = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
        shape = (module.out_features, module.in_features)
        kind = "conv1d" if conv1d else "linear"
        return (QuantizedWeight(module, "weight", shape, kind, conv1d, self._dtype(module), module.bias),)

    @staticmethod
    def _is_quantized(module: nn.Module) -> bool:
        raise NotImplementedError

    @staticmethod
    def _dtype(module: nn.Module) -> torch.dtype:
        raise NotImplementedError

    @staticmethod
    def _shell(cls: type, source: nn.Module, shape: tuple[int, int], **options: Any) -> nn.Module:
        """An empty bitsandbytes layer for `source`, with its bias and without a float weight being drawn."""
        layer = copy.copy(_prototype(cls, tuple(options.items())))
        for name, value in layer.__dict__.items():  # parameters, hooks and state are the layer's own
            if isinstance(value, dict | set) or name == "state":
                layer.__dict__[name] = copy.copy(value)
        layer.out_features, layer.in_features = shape
        layer.bias = source.bias
        layer.source_cls = type(source)
        layer._is_hf_initialized = True
        return layer


@dataclass(frozen=True)
class BitsAndBytes4bit(_BitsAndBytes):
    """NF4 or FP4 over blocks of the flattened weight (QLoRA, arXiv 2305.14314), in bitsandbytes' `Linear4bit`.

    Args:
        quant_type: "nf4" or "fp4".
        double_quant: block constants in 8 bits (0.37 bits a weight less).
        block_size: weights that share a constant: a power of two from 32 to 4096.
        compute_dtype: of the vendor's own forward; None follows the input.
        quant_storage: dtype that the codes are kept as; a float one lets FSDP shard them with other weights.
    """

    name: ClassVar[str] = "bitsandbytes_4bit"
    layer_types: ClassVar[tuple[str, ...]] = ("bitsandbytes.nn.modules.Linear4bit",)
    config_methods: ClassVar[tuple[str, ...]] = ("bitsandbytes",)  # and BitsAndBytes8bit's: see from_config

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    block_size: int = 64
    compute_dtype: torch.dtype | None = None
    quant_storage: torch.dtype = torch.uint8

    def __post_init__(self):
        super().__post_init__()
        if self.quant_type not in ("nf4", "fp4"):
            raise BadOption(f"bitsandbytes: quant_type={self.quant_type!r}; it is nf4 or fp4")
        if self.block_size not in BLOCK_SIZES:
            raise BadOption(f"bitsandbytes: block_size={self.block_size}; it is one of {BLOCK_SIZES}")
        if self.compute_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise BadOption(f"bitsandbytes: compute_dtype={self.compute_dtype}; it is a 16- or 32-bit float")
        if self.quant_storage not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
            raise BadOption(f"bitsandbytes: quant_storage={self.quant_storage}; uint8, or a 16- or 32-bit float")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=4, devices=DEVICES, requantize=True)

    def on_device(self, device: torch.device) -> Quantizer:
        return self if device.type in DEVICES else self.fallback(f"bitsandbytes has no kernels for {device.type!r}")

    def for_experts(self) -> TensorQuantizer:
        """The reference quantizer: the same codes and constants; bitsandbytes has no layer for experts."""
        from qft.backends.reference import Reference

        return Reference(format=self.quant_type, group_size=self.block_size, double_quant=self.double_quant)

    def as_packed(self, module: nn.Module) -> nn.Module:
        state, (handle,) = _state(module), self.weights(module)
        packed = {"qweight": module.weight.data.view(torch.uint8).view(-1), "absmax": state.absmax}
        if state.nested:
            packed |= {"absmax_scale": state.state2.absmax, "absmax_mean": state.offset}
        return PackedLinear(self.for_experts(), packed, handle.shape, handle.dtype, module.bias, handle.kind)

    def fallback(self, why: str) -> Quantizer:
        """The reference quantizer with the same codes, and a warning that says why."""
        other = self.for_experts()
        warnings.warn(f"{why}: using {other!r}, the same codes in pure PyTorch", QftWarning, stacklevel=4)
        return other

    @classmethod
    def recognise(cls, module: nn.Module) -> BitsAndBytes4bit | None:
        if not cls.owns(module) or not cls._is_quantized(module):
            return None
        state = _state(module)
        return cls(
            quant_type=state.quant_type,
            double_quant=state.nested or getattr(state, "original_nested", False),
            block_size=state.blocksize,
            compute_dtype=module.compute_dtype if getattr(module, "compute_type_is_set", False) else None,
            quant_storage=module.weight.dtype,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantizer:
        """Both formats of bitsandbytes: their configs have one method."""
        if config.get("load_in_4bit") or config.get("_load_in_4bit"):
            return BitsAndBytes4bit(
                quant_type=config.get("bnb_4bit_quant_type", "fp4"),
                double_quant=config.get("bnb_4bit_use_double_quant", False),
                compute_dtype=as_dtype(config.get("bnb_4bit_compute_dtype") or "float32"),
                quant_storage=as_dtype(config.get("bnb_4bit_quant_storage") or "uint8"),
            )
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            if config.get("llm_int8_has_fp16_weight"):
                raise BadOption("llm_int8_has_fp16_weight keeps the weights in float16: nothing would be quantized")
            return BitsAndBytes8bit(threshold=config.get("llm_int8_threshold", 6.0))
        raise BadOption("this BitsAndBytesConfig asks for neither load_in_4bit nor load_in_8bit")

    def adopt(self, module: nn.Module) -> None:
        # On CPUs with AVX512-BF16, one forward in eval mode repacks the weight in a layout that dequantize_4bit,
        # merge and save read as garbage.
        module.support_avx512bf16_for_cpu = False
        _guard(module)
        _load_scales_too(module)
        if getattr(_state(module), "packing_format_for_cpu", False):
            _undo_cpu_packing(module)

    def quantize_layer(self, module: nn.Module, *, statistics: Any = None) -> nn.Module:
        import bitsandbytes as bnb

        weight = float_weight(module)
        data, state = self._quantize(weight)
        layer = self._shell(
            bnb.nn.Linear4bit,
            module,
            tuple(weight.shape),
            compute_dtype=self.compute_dtype,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        layer.support_avx512bf16_for_cpu = False
        layer.weight = bnb.nn.Params4bit(
            data,
            requires_grad=False,
            quant_state=state,
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
            module=layer,
            bnb_quantized=True,
        )
        layer.quant_state = state
        _guard(layer)
        _load_scales_too(layer)
        return layer

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Any]:
        """Codes and state as `bitsandbytes.functional.quantize_4bit` makes them, without its wait for the device."""
        from bitsandbytes.functional import QuantState, quantize_blockwise

        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            weight = weight.float()
        data, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
            weight.contiguous(), self.block_size, self.quant_type, self.quant_storage
        )
        offset = state2 = None
        if self.double_quant:
            offset = absmax.mean()
            absmax, state2 = quantize_blockwise(absmax - offset, blocksize=256)
        state = QuantState(
            absmax=absmax,
            shape=weight.shape,
            dtype=weight.dtype,
            blocksize=self.block_size,
            code=_codebook(self.quant_type, weight.device).clone(),
            quant_type=self.quant_type,
            offset=offset,
            state2=state2,
        )
        return data, state

    def dequantize(
        self, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        state = _state(weight.module)
        data = weight.module.weight.data
        dtype = out.dtype if out is not None else dtype or state.dtype
        if kernels.usable(data):
            book = self.codebook(weight)
            value = kernels.codebook(
                data, book.absmax, book.values, block_size=book.block_size, double=book.double, shape=book.shape,
                dtype=dtype, out=out,
            )  # fmt: skip
            if value is not None:
                return value
        kernel = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
        absmax = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = (dequantize_blockwise(absmax, state.state2) + state.offset).float()
        shape = state.shape
        if data.device.type == "cpu" and _misfit(state):
            # bitsandbytes' AVX512 kernel takes blocks row by row: wrong, without an error, where a block crosses rows
            if prod(shape) % state.blocksize:
                return _dequantize_plainly(data, absmax, state, dtype, out)
            shape = (prod(shape) // state.blocksize, state.blocksize)
        op, args = torch.ops.bitsandbytes.dequantize_4bit, (state.blocksize, state.quant_type, shape)
        if out is not None and out.is_cuda and out.is_contiguous() and out.dtype == kernel:
            op.out(data, absmax, *args, kernel, out=out)
            return out
        value = op.default(data, absmax, *args, kernel).view(state.shape)
        return value.to(dtype) if out is None else out.copy_(value)

    def codebook(self, weight: QuantizedWeight) -> kernels.Codebook:
        state = _state(weight.module)
        nested = state.state2
        double = (nested.code, nested.absmax, state.offset, nested.blocksize) if state.nested else None
        data = weight.module.weight.data
        return kernels.Codebook(data, state.absmax, state.code, state.blocksize, tuple(state.shape), double)

    def requantize(self, weight: QuantizedWeight, value: Tensor) -> None:
        old = _state(weight.module)
        data, state = self._quantize(value.to(weight.module.weight.device))
        state.dtype = old.dtype
        self._set(weight.module, data, state)

    def tensors(self, weight: QuantizedWeight) -> list[Tensor]:
        state = _state(weight.module)
        for one in (state, state.state2) if state.nested else (state,):
            if not hasattr(one.code, "qft_own"):  # bitsandbytes hands one map out to all layers
                one.code = one.code.clone()
                one.code.qft_own = True
        found = [weight.module.weight, state.absmax, state.code]
        return [*found, state.offset, state.state2.absmax, state.state2.code] if state.nested else found

    def snapshot(self, weight: QuantizedWeight) -> Any:
        state = copy.deepcopy(_state(weight.module))
        state.to("cpu")
        return weight.module.weight.data.to("cpu", copy=True), state

    def restore(self, weight: QuantizedWeight, saved: Any) -> None:
        data, state = saved
        device = weight.module.weight.device
        state = copy.deepcopy(state)
        state.to(device)
        self._set(weight.module, data.to(device, copy=True), state)

    def load_state(self, weight: QuantizedWeight, state: Mapping[str, Tensor]) -> None:
        import bitsandbytes as bnb

        module = weight.module
        stats = {k: v for k, v in state.items() if k.startswith("weight.")}
        module.weight = bnb.nn.Params4bit.from_prequantized(
            state["weight"], stats, device=module.weight.device, module=module
        )
        _guard(module)  # blocks of another size may cross rows

    @staticmethod
    def _set(module: nn.Module, data: Tensor, state: Any) -> None:
        module.weight.data = data
        module.weight.quant_state = module.quant_state = state

    def nbytes(self, shape: tuple[int, ...]) -> int:
        n = prod(shape)
        blocks = -(-n // self.block_size)
        constants = blocks + 4 * -(-blocks // 256) + 4 if self.double_quant else 4 * blocks
        return -(-n // 2) + constants

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype or dtype,  # float32, slow and unlike us, where it is left open
            bnb_4bit_quant_storage=self.quant_storage,
            llm_int8_skip_modules=skipped,
        )

    @staticmethod
    def _is_quantized(module: nn.Module) -> bool:
        return _state(module) is not None

    @staticmethod
    def _dtype(module: nn.Module) -> torch.dtype:
        return _state(module).dtype


@dataclass(frozen=True)
class BitsAndBytes8bit(_BitsAndBytes):
    """LLM.int8(): symmetric int8 per output channel (arXiv 2208.07339), in bitsandbytes' `Linear8bitLt`.

    Args:
        threshold: inputs above it are computed in float16 by the vendor's forward, which quantizes activations too;
            `x @ dequantize().T`, which qft computes with, does not.
    """

    name: ClassVar[str] = "bitsandbytes_8bit"
    layer_types: ClassVar[tuple[str, ...]] = ("bitsandbytes.nn.modules.Linear8bitLt",)

    threshold: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        if not self.threshold >= 0:
            raise BadOption(f"bitsandbytes: threshold={self.threshold}; it is zero or positive")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=8, devices=DEVICES, requantize=True, exact_forward=False)

    def leaves(self, shape: tuple[int, ...]) -> str | None:
        return "bitsandbytes computes int8 layers with one input feature wrongly" if shape[-1] == 1 else None

    def for_experts(self) -> TensorQuantizer:
        """Return quanto's int8, a scale a row as here, in the weight's dtype; bitsandbytes has no layer for experts."""
        from qft.backends.quanto import Quanto

        return Quanto(format="int8")

    def as_packed(self, module: nn.Module) -> nn.Module:
        (codes, scale), (handle,) = _int8(module), self.weights(module)
        packed = {"qweight": codes, "scale": (scale.float() / 127)[:, None]}
        return PackedLinear(self.for_experts(), packed, handle.shape, handle.dtype, module.bias, handle.kind)

    @classmethod
    def recognise(cls, module: nn.Module) -> BitsAndBytes8bit | None:
        if not cls.owns(module) or not cls._is_quantized(module):
            return None
        return cls(threshold=module.state.threshold)

    def adopt(self, module: nn.Module) -> None:
        _load_scales_too(module)

    def quantize_layer(self, module: nn.Module, *, statistics: Any = None) -> nn.Module:
        import bitsandbytes as bnb

        weight = float_weight(module)
        codes, scale = self._quantize(weight)
        layer = self._shell(
            bnb.nn.Linear8bitLt, module, tuple(weight.shape), has_fp16_weights=False, threshold=self.threshold
        )
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
        layer.qft_dtype = weight.dtype
        _load_scales_too(layer)
        return layer

    @staticmethod
    def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return codes, scale

    def dequantize(
        self, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        codes, scale = _int8(weight.module)
        value = kernels.rows(codes, scale, dtype=dtype or weight.dtype, out=out, divisor=127)
        if value is not None:
            return value
        value = codes * (scale.float() / 127)[:, None]
        return value.to(dtype or weight.dtype) if out is None else out.copy_(value)

    def requantize(self, weight: QuantizedWeight, value: Tensor) -> None:
        self.restore(weight, self._quantize(value.to(weight.module.weight.device)))

    def tensors(self, weight: QuantizedWeight) -> list[Tensor]:
        module = weight.module
        _int8(module)  # a holder of what was left behind on another device is brought up to date
        holders = (module.weight, module.state)
        found = [getattr(h, name, None) for h in holders for name in ("CB", "SCB")]
        return [module.weight, *(t for t in found if t is not None)]

    def snapshot(self, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
        return tuple(t.to("cpu", copy=True) for t in _int8(weight.module))

    def restore(self, weight: QuantizedWeight, saved: tuple[Tensor, Tensor]) -> None:
        module = weight.module
        codes, scale = (t.to(module.weight.device, copy=True) for t in saved)
        module.weight.data = codes
        # after its first forward the layer keeps codes and scales in its state
        holder = module.state if module.state.CB is not None else module.weight
        holder.CB, holder.SCB = module.weight.data, scale

    def load_state(self, weight: QuantizedWeight, state: Mapping[str, Tensor]) -> None:
        self.restore(weight, (state["weight"], state["SCB"]))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) + 4 * prod(shape[:-1])

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold, llm_int8_skip_modules=skipped)

    @staticmethod
    def _is_quantized(module: nn.Module) -> bool:
        return module.weight.dtype == torch.int8

    @staticmethod
    def _dtype(module: nn.Module) -> torch.dtype:
        # the layer does not know its float dtype: noted when qft quantized or adopted it
        if hasattr(module, "qft_dtype"):
            return module.qft_dtype
        return module.bias.dtype if module.bias is not None else torch.float16


@lru_cache
def _codebook(quant_type: str, device: torch.device) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(quant_type, device=device)


@lru_cache
def _prototype(cls: type, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    """One empty layer to copy: constructing each anew, with a random weight, takes longer than quantizing it."""
    return cls(1, 1, bias=False, device="meta", **dict(options))


def _state(module: nn.Module) -> Any:
    state = getattr(module.weight, "quant_state", None)
    return state if state is not None else getattr(module, "quant_state", None)


def _int8(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Codes and scales, which move from the weight to the layer's state at its first forward."""
    codes = module.weight.data
    holder = module.weight if getattr(module.weight, "SCB", None) is not None else module.state
    if holder.SCB.device != codes.device:  # bitsandbytes leaves the scales behind when a whole model moves
        holder.CB, holder.SCB = codes, holder.SCB.to(codes.device)
    return codes, holder.SCB.view(-1)


def _misfit(state: Any) -> bool:
    """Whether blocks of the flattened weight cross its rows."""
    return state.shape[-1] % state.blocksize != 0


def _dequantize_plainly(data: Tensor, absmax: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    from qft.backends.reference import Reference

    packed = {"qweight": data.view(torch.uint8).view(-1), "absmax": absmax}
    reference = Reference(format=state.quant_type, group_size=state.blocksize)
    return reference.unpack(packed, shape=tuple(state.shape), dtype=dtype, out=out)


def _guard(module: nn.Module) -> None:
    """Keep a layer from two things that bitsandbytes gets wrong without an error; see `guarded_linear4bit`."""
    float_codes = module.weight.dtype.is_floating_point
    if (float_codes or _misfit(_state(module))) and type(module).__name__ == "Linear4bit":
        module.__class__ = guarded_linear4bit()


def _load_scales_too(module: nn.Module) -> None:
    if not any(isinstance(getattr(h, "hook", h), _LoadScales) for h in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_LoadScales())


class _LoadScales:
    """A hook of `load_state_dict`, which hands codes and scales to the quantizer.

    bitsandbytes' 4-bit layer takes over the codes alone and keeps its old scales. Its 8-bit layer keeps them too where the
    state dict has none, cannot load after its first forward pass, and is broken by `assign=True`.
    """

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        codes, errors = state.get(f"{prefix}weight"), args[-1]
        found = (k for k in list(state) if k.startswith(f"{prefix}weight."))
        own = [*found, *(k for k in (f"{prefix}SCB", f"{prefix}weight_format") if k in state)]
        scales = {k.removeprefix(prefix): state.pop(k) for k in own}
        if codes is None or codes.shape != module.weight.shape:
            return  # torch says what differs; the layer is left alone
        same = codes.dtype == module.weight.dtype
        if same and not scales and torch.equal(codes.to(module.weight.device), module.weight):
            return
        quantizer = BitsAndBytes4bit.recognise(module) or BitsAndBytes8bit.recognise(module)
        if quantizer is None or not same or not _complete(quantizer, scales, module):
            errors.append(
                f"{prefix}weight is not codes with fitting scales: load the state dict of a model quantized alike"
            )
            state[f"{prefix}weight"] = module.weight  # for torch to leave the codes alone
            return
        quantizer.load_state(quantizer.weights(module)[0], {"weight": codes, **scales})
        state[f"{prefix}weight"] = module.weight  # with `assign=True` torch would put in a plain parameter


def _complete(quantizer: Quantizer, scales: Mapping[str, Any], module: nn.Module) -> bool:
    """Whether these scales are those of the layer's codes."""
    if isinstance(quantizer, BitsAndBytes8bit):
        return "SCB" in scales and scales["SCB"].numel() == module.out_features
    return any("quant_state" in key for key in scales) and "weight.absmax" in scales


@lru_cache
def guarded_linear4bit() -> type[nn.Module]:
    """`Linear4bit` whose float-stored codes survive casts, and whose CPU forward is right where blocks cross rows."""
    import bitsandbytes as bnb

    class GuardedLinear4bit(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu" or not _misfit(_state(self)):
                return super().forward(x)
            quantizer = BitsAndBytes4bit.recognise(self)
            return lora_linear(x, dequantizer(quantizer, quantizer.weights(self)[0]), self.bias)

        def _apply(self, fn, recurse=True):
            storage = self.weight.dtype

            def keep(t: Tensor) -> Tensor:
                moved = fn(t)
                is_code = t.dtype == storage and t.shape[-1:] == (1,) and t.numel() == self.weight.numel()
                return t.to(moved.device) if is_code and moved.dtype != storage else moved

            return super()._apply(keep, recurse)

        def __reduce_ex__(self, protocol):
            return _rebuild, (self.__dict__,)

    return GuardedLinear4bit


def _rebuild(state: dict[str, Any]) -> nn.Module:
    layer = guarded_linear4bit().__new__(guarded_linear4bit())
    layer.__dict__.update(state)
    return layer


def _undo_cpu_packing(module: nn.Module) -> None:
    """Bring back the layout that everything but bitsandbytes' AVX512-BF16 kernel reads.

    The kernel's layout: rows in blocks of 32; within one, the low nibbles of 32 bytes hold 32 codes and the high
    nibbles the next 32, of (in/2, 32, 2) code pairs; block constants are transposed and rounded to bfloat16.
    """
    state = _state(module)
    rows, columns = state.shape
    packed = module.weight.data.view(torch.uint8).view(-1, 32)
    codes = torch.cat([packed & 0xF, packed >> 4], dim=1)
    codes = codes.view(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(-1)
    data = (codes[::2] << 4 | codes[1::2]).view(state.original_qshape)
    storage = getattr(state, "original_storage_type", None)
    module.weight.data = data.view(storage) if storage else data
    state.absmax = state.absmax.T.contiguous().view(-1).float()
    state.nested = False  # double-quantized constants were expanded, and stay so
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False
    module.quant_state = module.weight.quant_state = state
    warnings.warn(
        "this bitsandbytes model ran a forward pass in eval mode before qft saw it, which rounded its block constants "
        "to bfloat16; quantize it again, or load it without a forward pass, to have them exact",
        QftWarning,
        stacklevel=2,
    )

"""torchao: int8, float8, integers of 1 to 8 bits, int4 and NF4, as tensor subclasses inside linear layers."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.backends.torchao_layer import TorchAOLinear, floats, is_torchao, leaves, rebuilt, without_nan
from qft.backends.torchao_options import (
    FLOAT8,
    ROW,
    WHOLE,
    check_folder,
    config_options,
    int4_config,
    int4_packing,
    older_than,
    package,
    read_options,
    to_nf4,
)
from qft.core.console import quiet_import
from qft.core.quantizer import Capabilities, QuantizedWeight, Quantizer, float_weight, is_conv1d
from qft.errors import BadOption, BadShape, QftWarning, UnsupportedDevice, UnsupportedOperation

_FOUND = ("other", "opaque")


@dataclass(frozen=True)
class TorchAO(Quantizer):
    """Round-to-nearest as torchao's weight-only configs do it; the layers hold torchao's own tensors.

    Args:
        format: "int8" and "float8" (e4m3fn), "float8_e5m2": a float32 scale a row; "int": integers of `bits` bits, each
            in a byte of its own in memory, with a scale in the weight's dtype a group; "int4": two codes a byte, where
            the device has a kernel; "nf4": blocks of 64 with constants in 8 bits. "other" and "opaque" are read off
            models that torchao quantized in further ways: "other" trains and merges to float, "opaque" gives no floats.
        bits: of "int", 1 to 8.
        group_size: weights of a row that share a scale; -1 is a whole row, 0 the whole weight. None is -1 for int8 and
            float8, 64 for nf4, and else the largest of 128, 64, 32 that divides every width.
        symmetric: of "int": no zero points.
        scaler_block_size: of "nf4": block constants that share a scale of theirs.
        activations: torchao's own forward quantizes the inputs, too; read off models, not offered. qft computes with
            x @ dequantize().T all the same.

    `dequantize` equals torchao's to the bit. The product of an adopted weight's input scales (AWQ, SmoothQuant) with
    the weight counts as the weight.
    """

    name: ClassVar[str] = "torchao"
    requires: ClassVar[tuple[str, ...]] = ("torchao>=0.17,<0.19",)
    layer_types: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear",)
    config_methods: ClassVar[tuple[str, ...]] = ("torchao",)

    format: Literal["int8", "float8", "float8_e5m2", "int", "int4", "nf4", "other", "opaque"] = "int8"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    scaler_block_size: int = 256
    activations: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.bits <= (64 if self.format in _FOUND else 8):
            raise BadOption(f"torchao: bits={self.bits}; 1 to 8")
        if self.group_size is not None and self.group_size < ROW:
            raise BadOption(f"torchao: group_size={self.group_size}; a number of weights, -1 for rows, 0 for all")
        if self.format in ("int4", "nf4") and self.group_size in (ROW, WHOLE):
            raise BadOption(f"torchao: {self.format} has groups; group_size={self.group_size} is none")
        if self.format == "int4" and self.group_size not in (None, 32, 64, 128, 256):
            raise BadOption(f"torchao: group_size={self.group_size}; int4 takes 32, 64, 128 or 256")
        if self.format == "int" and self.group_size == WHOLE:
            raise BadOption("torchao: int has a scale a group or a row: group_size=0 is for int8 and float8")
        if self.format == "nf4" and (self.group_size or 2) % 2:
            raise BadOption(f"torchao: group_size={self.group_size}; nf4 takes even ones")
        if self.scaler_block_size < 1:
            raise BadOption(f"torchao: scaler_block_size={self.scaler_block_size}; a positive number")

    @property
    def capabilities(self) -> Capabilities:
        bits = self.bits if self.format in ("int", *_FOUND) else 4 if self.format in ("int4", "nf4") else 8
        known = self.format not in _FOUND
        return Capabilities(
            bits=bits,
            devices=frozenset({"cuda", "xpu"} if self.format == "int4" else {"cpu", "cuda", "xpu"}),
            quantizes=known and not self.activations,
            dequantize=self.format != "opaque",
            requantize=known,
            exact_forward=not self.activations,
            serializable=known and not self.activations and self.format != "nf4",
        )

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> TorchAO:
        shapes = list(shapes)
        if not self.capabilities.quantizes:
            raise UnsupportedOperation(
                f"{self!r} is what torchao quantized in a way that qft does not offer: call torchao's quantize_ on the "
                "model and give qft.wrap that, or ask for int8, float8, int, int4 or nf4"
            )
        if self.format == "int" and self.bits == 1 and self.symmetric:
            raise BadOption(
                "torchao: bits=1 with symmetric=true rounds nearly every weight to zero: give symmetric=false"
            )
        size = self.group_size
        if size is None:
            size = 64 if self.format == "nf4" else ROW
            if self.format in ("int", "int4"):
                size = next((g for g in (128, 64, 32) if all(s[-1] % g == 0 for _, s in shapes)), 32)
        if size not in (ROW, None) and self.format.startswith("float8") and older_than("0.18"):
            raise BadOption(f"torchao: group_size={size} of {self.format} needs torchao>=0.18; -1 does not")
        for name, shape in shapes:
            if self.format == "nf4":
                if prod(shape) % (size * self.scaler_block_size):
                    raise BadShape(
                        f"{name} has {prod(shape)} weights, which torchao's nf4 cannot divide into blocks of {size} and "
                        f"these by {self.scaler_block_size}: give a smaller scaler_block_size, or use 'nf4'"
                    )
            elif size > 0 and shape[-1] % size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, which groups of {size} do not divide: give a group_size that "
                    "divides every width, or -1 for whole rows"
                )
        return dataclasses.replace(self, group_size=size)

    def leaves(self, shape: tuple[int, ...]) -> str | None:
        per_row = self.format != "nf4" and self.group_size in (None, ROW)
        return "torchao drops the scales of layers with one input feature" if per_row and shape[-1] == 1 else None

    def on_device(self, device: torch.device) -> Quantizer:
        if self.format == "int4" and device.type != "mps":
            self.check_installed()
            packing, why = int4_packing(device.type)
            if packing is None:
                raise UnsupportedDevice(
                    f"torchao has no int4 layout that works on {device.type!r} here ({why}): use format=int,bits=4, which "
                    "runs everywhere, or 'nf4', 'hqq' or 'gptq'"
                )
            return self
        return super().on_device(device)

    def for_experts(self) -> Quantizer | None:
        """The nearest format of tensors that can be stacked: torchao's own subclasses cannot be taken apart by expert.

        int8 and float8 are quanto's, with a scale a row; "int" and "int4" are affine integers of the same groups, packed;
        "nf4" has the same codes with doubly quantized constants.
        """
        from qft.backends.quanto import Quanto
        from qft.backends.reference import Reference

        if not self.capabilities.quantizes or (self.format == "int" and self.bits < 2):
            return None
        if self.format == "nf4":
            return Reference(group_size=self.group_size or 64, double_quant=True)
        if self.format in ("int", "int4"):
            size = self.group_size if self.group_size and self.group_size > 0 else None
            symmetric = self.symmetric and self.format == "int"
            return Reference(
                format="int", bits=self.bits if self.format == "int" else 4, group_size=size, symmetric=symmetric
            )
        return Quanto(format=self.format)  # type: ignore[arg-type]

    # ---- layers ------------------------------------------------------------------------------------------

    def weights(self, module: nn.Module) -> Sequence[QuantizedWeight]:
        if not isinstance(module, nn.Linear) or not is_torchao(module._parameters.get("weight")):
            return ()
        conv1d = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
        shape, dtype = tuple(module.weight.shape), getattr(module, "qft_dtype", module.weight.dtype)
        kind: Any = "conv1d" if conv1d else "linear"
        return (QuantizedWeight(module, "weight", shape, kind, conv1d, dtype, module.bias),)

    @classmethod
    def recognise(cls, module: nn.Module) -> TorchAO | None:
        if not isinstance(module, nn.Linear) or not is_torchao(module._parameters.get("weight")):
            return None
        found = cls(**read_options(module.weight))
        noted = module.__dict__.get("qft_group_size")  # a group may be as wide as the row
        return found if noted is None or found.group_size != ROW else dataclasses.replace(found, group_size=noted)

    def adopt(self, module: nn.Module) -> None:
        if self.format == "opaque":
            raise UnsupportedOperation(
                f"a {type(module.weight).__name__} of this torchao model quantizes activations and gives no floats, so "
                "nothing can be trained over it: quantize the float model with a weight-only config, or with qft"
            )
        if type(module) is nn.Linear:
            module.__dict__.pop("extra_repr", None)
            module.qft_dtype = module.weight.dtype
            module.__class__ = TorchAOLinear
        if type(module.weight).__name__ == "Float8Tensor" and isinstance(module, TorchAOLinear):
            if not module.weight.scale.all():
                warnings.warn(
                    "torchao made NaN of rows or groups of zeros in this float8 model: they are zeros again",
                    QftWarning,
                    stacklevel=4,
                )
                module.set_leaves(without_nan)

    def quantize_layer(self, module: nn.Module, *, statistics: Any = None) -> nn.Module:
        own = self.resolve([("the weight", tuple(float_weight(module).shape))])
        weight = float_weight(module)
        with torch.device("meta"):
            layer = TorchAOLinear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(own._quantized(weight), requires_grad=False)
        layer.bias = module.bias
        layer.source_cls = type(module) if is_conv1d(module) else nn.Linear
        layer.qft_dtype = weight.dtype
        if own.group_size == weight.shape[1] and own.format != "nf4":
            layer.qft_group_size = own.group_size
        layer.set_leaves(lambda _, leaf: leaf, weight.dtype)
        layer._is_hf_initialized = True
        return layer

    @torch.no_grad()
    def _quantized(self, weight: Tensor) -> Tensor:
        """Make torchao's tensor of a float weight."""
        ao = package()
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            weight = weight.float()
        if self.format == "nf4":
            return to_nf4(weight.contiguous(), self.group_size or 64, self.scaler_block_size)
        if self.format == "int4":
            weight = weight.to(torch.bfloat16)
        config = self._config(weight.device.type)
        if self.format == "int" and weight.dtype != torch.float32 and older_than("0.18"):
            # there no scale is below the epsilon of the weight's dtype: 0.0078 in bfloat16, many times what is right
            config.scale_dtype, weight = weight.dtype, weight.float()
        with torch.device("meta"):
            holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        holder.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        ao.quantize_(holder, config)
        if not is_torchao(holder.weight):
            raise BadShape(f"torchao left a weight of {tuple(weight.shape)} as it was: {self!r} does not fit it")
        return rebuilt(holder.weight.detach(), without_nan) if self.format in FLOAT8 else holder.weight.detach()

    def dequantize(
        self, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not self.capabilities.dequantize:
            raise UnsupportedOperation(
                f"a {type(weight.module.weight).__name__} of torchao gives no floats (capability dequantize)"
            )
        return floats(weight.module.weight, out.dtype if out is not None else dtype or weight.dtype, out)

    @classmethod
    def _own(cls, weight: QuantizedWeight) -> TorchAO:
        """The layer's own options."""
        known = weight.module.__dict__.get("_qft_quantizer") or cls.recognise(weight.module)
        assert isinstance(known, TorchAO)
        return known

    def requantize(self, weight: QuantizedWeight, value: Tensor) -> None:
        if not self.capabilities.requantize:
            super().requantize(weight, value)
        old, own = weight.module.weight, self._own(weight)
        here = leaves(old)
        value = value.to(old.device, torch.float32)
        scale = getattr(old, "act_pre_scale", None)
        if scale is not None:
            value = value / scale.float()
        constants = here["nf4" if own.format == "nf4" else "scale"].dtype if own.format != "int4" else torch.bfloat16
        new = leaves(own._quantized(value.to(constants)))  # torchao keeps some constants in the weight's dtype
        wrong = [n for n, t in new.items() if n not in here or (t.shape, t.dtype) != (here[n].shape, here[n].dtype)]
        if wrong:
            raise UnsupportedOperation(
                f"this torchao weight keeps its {wrong[0]} in another way than the installed torchao does: quantize the "
                "float model anew to merge into its codes, or merge to float"
            )
        self.restore(weight, {**here, **new})

    def snapshot(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {n: t.detach().to("cpu", copy=True) for n, t in leaves(weight.module.weight).items()}

    def restore(self, weight: QuantizedWeight, saved: Mapping[str, Tensor]) -> None:
        weight.module.set_leaves(lambda n, leaf: saved[n].to(leaf.device, copy=True))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        rows, columns = prod(shape[:-1]), shape[-1]
        size = {None: columns, ROW: columns, WHOLE: prod(shape)}.get(self.group_size, self.group_size)
        if self.format == "nf4":
            blocks = prod(shape) // (self.group_size or 64)
            return prod(shape) // 2 + blocks + 2 * (blocks // self.scaler_block_size + 1 + 16)
        if self.format == "int4":  # padded to whole tiles
            columns, rows = -(-columns // 1024) * 1024, -(-rows // 8) * 8
            return rows * columns // 2 + 4 * rows * columns // (self.group_size or 32)
        if self.format in _FOUND:
            return prod(shape) * self.bits // 8
        groups = -(-rows * columns // size)
        if self.format == "int":
            groups = rows * columns // (self.group_size if (self.group_size or 0) > 0 else columns)
            return rows * columns + 3 * groups
        constants = 4 if self.format != "int8" else 3 if older_than("0.18") else 5
        return rows * columns + constants * groups

    # ---- torchao's and transformers' configs -------------------------------------------------------------

    def _config(self, device: str) -> Any:
        """Make torchao's own config object."""
        ao = package()
        size = self.group_size
        granularity: Any = ao.PerGroup(size) if size and size > 0 else ao.PerRow()
        if size == WHOLE:
            granularity = ao.PerTensor()
        if self.format == "int8":
            return ao.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False, version=2)
        if self.format in FLOAT8:
            options = {} if size in (ROW, None) else {"granularity": granularity}
            return ao.Float8WeightOnlyConfig(
                weight_dtype=FLOAT8[self.format], set_inductor_config=False, version=2, **options
            )
        if self.format == "int4":
            return int4_config(size or 128, int4_packing(device)[0] or "plain")
        mapping = ao.MappingType.SYMMETRIC if self.symmetric else ao.MappingType.ASYMMETRIC
        return ao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{self.bits}"),
            granularity=granularity if size and size > 0 else ao.PerAxis(0),
            mapping_type=mapping,
            version=2,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TorchAO:
        for option in ("include_input_output_embeddings", "untie_embedding_weights"):
            if config.get(option):
                raise BadOption(f"TorchAoConfig({option}=True): qft quantizes linear layers alone")
        stored = config.get("quant_type")
        if not isinstance(stored, Mapping) or not isinstance(stored.get("default"), Mapping):
            raise BadOption(f"TorchAoConfig: quant_type={stored!r}; qft reads those of torchao 0.17 and later")
        return cls(**config_options(stored["default"]))

    def transformers_config(self, skipped: list[str], dtype: torch.dtype | None) -> Any | None:
        if not self.capabilities.serializable:
            return None
        from transformers import TorchAoConfig

        device = torch.accelerator.current_accelerator()
        return TorchAoConfig(self._config(device.type if device is not None else "cpu"), modules_to_not_convert=skipped)

    def stored_metadata(self, state: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, str]:
        conv1d = next((n for n, m in layers.items() if any(w.transposed for w in self.weights(m))), None)
        if conv1d is not None:
            raise UnsupportedOperation(
                f"{conv1d} is a Conv1D, and transformers would read torchao's weights of it transposed: keep the float "
                "model and quantize it anew, or use 'hqq' or 'reference'"
            )
        support = quiet_import("torchao.prototype.safetensors.safetensors_utils")
        found = {}
        for key in state:
            name, _, last = key.rpartition(".")
            if name not in layers or last == "bias":
                found[key] = json.dumps({"_type": "Tensor"})
            elif f"{name}.weight" not in found:
                weight = layers[name].weight.detach()
                found[f"{name}.weight"] = json.dumps(weight, cls=support.TensorSubclassAttributeJSONEncoder)
        return {**found, "tensor_names": json.dumps(list(found))}

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        check_folder(folder)

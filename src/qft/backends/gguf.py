"""GGUF: llama.cpp's blocks, kept as they lie in the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qft.backends.gguf_blocks import QUANTIZED, SIZES, dequantized, quantized
from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities
from qft.errors import BadFolder, BadOption, BadShape, MissingDependency, QftError, UnsupportedOperation

Kind = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Of GGUF files whose names, and whose order of rows, are known here."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AS_FLOATS = "for a float model, load it with transformers and GgufConfig(dequantize=True), and quantize that"


@dataclass(frozen=True)
class GGUF(TensorQuantizer):
    """llama.cpp's blocks. With `gguf_file=` a file is loaded as it is, each layer with the type that the file has for it.

    >>> qft.quantize(folder, "gguf", gguf_file="model.Q4_K_M.gguf")

    Linear layers stay packed; embeddings and norms become floats. The rows of queries and keys, which llama.cpp keeps in
    another order for Llama, are put back in transformers', block by block: no byte of a block changes. Layers are saved in
    qft's own method; `qft.export(format="gguf")` writes a file of a merged model.

    Args:
        type: of blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (32 weights) or Q2_K to Q6_K (256 weights). Floats are only
            quantized to the former, rounded to nearest, to the bytes that gguf's `quantize` makes. None is Q4_0 for floats
            and any type for a file.

    Packed tensors: `qweight` uint8 (out, in / weights a block · bytes a block). `dequantize` equals gguf's, in float32.
    """

    name: ClassVar[str] = "gguf"
    file_option: ClassVar[str | None] = "gguf_file"

    type: Kind | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.type is not None and self.type not in SIZES:
            raise BadOption(f"gguf: type={self.type!r}; it is one of {', '.join(SIZES)}")

    @property
    def _kind(self) -> str:
        return self.type or "Q4_0"

    @property
    def capabilities(self) -> Capabilities:
        can = self._kind in QUANTIZED
        devices = frozenset({"cpu", "cuda", "mps", "xpu"})
        return Capabilities(bits=int(self._kind[1]), devices=devices, quantizes=can, requantize=can)

    def resolve(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> GGUF:
        size = SIZES[self._kind][0]
        for name, shape in shapes:
            if shape[-1] % size:
                raise BadShape(
                    f"{name} has in_features {shape[-1]}, and blocks of {self._kind} have {size} weights: skip this weight"
                )
        return replace(self, type=self._kind)

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        if self._kind not in QUANTIZED:
            raise UnsupportedOperation(
                f"qft does not quantize to {self._kind}, whose scales llama.cpp searches for: take {', '.join(QUANTIZED)}, or "
                "make the file with llama-quantize and load it with gguf_file="
            )
        self.resolve([("a weight", tuple(weight.shape))])
        size, nbytes = SIZES[self._kind]
        blocks = quantized(weight.float().reshape(-1, size), self._kind)
        return {"qweight": blocks.view(weight.shape[0], weight.shape[1] // size * nbytes)}

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        blocks = packed["qweight"].view(-1, SIZES[self._kind][1])
        value = dequantized(blocks, self._kind).view(shape)
        return value.to(dtype) if out is None else out.copy_(value)

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        self.resolve([("a weight", tuple(shape))])
        size, nbytes = SIZES[self._kind]
        return {"qweight": ((shape[0], shape[1] // size * nbytes), torch.uint8)}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        size, nbytes = SIZES[self._kind]
        return prod(shape) // size * nbytes

    # ---- files -------------------------------------------------------------------------------------------

    @classmethod
    def read_folder(cls, folder: Path, model: nn.Module) -> tuple[dict[str, PackedLinear], dict[str, Tensor]]:
        try:
            import gguf
        except ImportError as error:
            raise MissingDependency("reading a GGUF file needs the package gguf: pip install gguf") from error
        try:
            reader = gguf.GGUFReader(folder)
            architecture = reader.get_field("general.architecture").contents()
            tensors = {t.name: t for t in reader.tensors}
        except Exception as error:
            raise BadFolder(f"{folder} is no GGUF file that can be read: {error}") from error
        if architecture not in ARCHITECTURES:
            raise UnsupportedOperation(
                f"{folder} is of the architecture {architecture!r}; blocks are kept for {', '.join(ARCHITECTURES)}: "
                f"{_AS_FLOATS}"
            )
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
        config: Any = model.config
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        layers: dict[str, PackedLinear] = {}
        state: dict[str, Tensor] = {}
        for key, wanted in model.state_dict().items():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            found = tensors.pop(name, None)
            if found is None:
                if name == "output.weight" and config.tie_word_embeddings:
                    continue
                raise BadFolder(f"{folder} lacks {name}, which is {key} of the model: the file is incomplete")
            rows = _heads(name, config) if architecture == "llama" else None
            owner = model.get_submodule(key.rpartition(".")[0])
            quantizer, value = _read(f"{name} in {folder}", found, tuple(wanted.shape), rows)
            if quantizer is not None and isinstance(owner, nn.Linear):
                shape = tuple(wanted.shape)
                layers[key.removesuffix(".weight")] = PackedLinear(quantizer, {"qweight": value}, shape, wanted.dtype)
            elif quantizer is not None:
                state[key] = quantizer.unpack({"qweight": value}, shape=tuple(wanted.shape), dtype=wanted.dtype)
            else:
                state[key] = value
        if tensors:
            raise UnsupportedOperation(
                f"{folder} holds {min(tensors)}, which the {type(model).__name__} of its config has no place for: it computes "
                f"something else; {_AS_FLOATS}, if transformers reads it"
            )
        return layers, state


def _heads(name: str, config: Any) -> int | None:
    """How many heads' rows llama.cpp has reordered in a tensor of a Llama: queries' and keys'."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else None


def _read(what: str, tensor: Any, shape: tuple[int, ...], heads: int | None) -> tuple[GGUF | None, Tensor]:
    """A tensor of a file in transformers' order of rows: its blocks and their quantizer, or None and floats."""
    kind = tensor.tensor_type.name
    sizes = tuple(int(n) for n in reversed(tensor.shape))
    if sizes != shape:
        raise BadFolder(f"{what} is {sizes}, and the model has {shape}: the file is damaged, or of another model")
    raw = torch.from_numpy(tensor.data.copy())
    quantizer = None
    if kind in SIZES:
        quantizer = GGUF(type=kind)
        try:
            ((wanted, _),) = quantizer.template(shape, torch.float32).values()
        except QftError as error:
            raise BadFolder(f"{what}: {error}") from error
        value = raw.reshape(wanted)
    elif kind in _FLOATS:
        value = raw.view(_FLOATS[kind]).reshape(shape)
    else:
        raise UnsupportedOperation(
            f"{what} has blocks of type {kind}; qft keeps {', '.join(SIZES)}: {_AS_FLOATS}, or make the file with one of these"
        )
    if heads is not None:  # llama.cpp has the two halves of a head's rotation side by side
        value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return quantizer, value.contiguous()

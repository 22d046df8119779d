"""Safetensors files written tensor by tensor: none of them is ever whole in memory."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from qft.errors import BadOption, UnsupportedOperation

_NAMES = {  # of the format, https://huggingface.co/docs/safetensors
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL", "complex64": "C64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


class ShardWriter:
    """Writes a state dict as `model.safetensors`, or as shards with an index, in any order of its tensors.

    Files are opened as their first tensor comes, with the header for all of them, and closed with their last.

    Args:
        folder: to write into.
        state: name → tensor, of which shape and dtype are read; "meta" will do.
        max_shard_size: bytes, or text such as "2GB"; a larger tensor gets a file of its own.
        metadata: of the index.

    Raises:
        BadOption: a `max_shard_size` that is no size.
        UnsupportedOperation: a dtype that the format does not have.
    """

    def __init__(
        self, folder: Path, state: Mapping[str, Tensor], max_shard_size: int | str, metadata: Mapping[str, int]
    ):
        self.folder = folder
        check_size(max_shard_size)
        for name, tensor in state.items():
            if _dtype(tensor) not in _NAMES:
                raise UnsupportedOperation(f"{name} is {tensor.dtype}, which safetensors files do not hold")
        # fresh tensors: those of the state may share or exceed their storage, and the sizes are those of storages
        metas = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}
        self.plan = split_torch_state_dict_into_shards(metas, max_shard_size=max_shard_size)
        self.index = {"metadata": {**metadata, **self.plan.metadata}, "weight_map": self.plan.tensor_to_filename}
        self.left = {file: set(names) for file, names in self.plan.filename_to_tensors.items()}
        self.metas = metas
        self.files: dict[str, BinaryIO] = {}
        self.places: dict[str, tuple[int, int]] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the state dict; it may be dropped then."""
        meta = self.metas[name]
        if tensor.shape != meta.shape or tensor.dtype != meta.dtype:
            raise RuntimeError(
                f"{name} was to be {meta.dtype} {tuple(meta.shape)}, and is {tensor.dtype} {tensor.shape}"
            )
        file_name = self.plan.tensor_to_filename[name]
        if file_name not in self.files:
            self._open(file_name)
        file = self.files[file_name]
        start, size = self.places[name]
        file.seek(start)
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        _write(file, memoryview(flat.view(torch.uint8).numpy()) if size else b"")
        self.left[file_name].discard(name)
        if not self.left[file_name]:
            self.files.pop(file_name).close()

    def finish(self) -> None:
        """Check that all is written, and write the index where there are several files."""
        missing = [n for names in self.left.values() for n in names]
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were not written, {missing[0]} first")
        if self.plan.is_sharded:
            text = json.dumps(self.index, indent=2, sort_keys=True) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text)

    def close(self) -> None:
        """Close what is open, after an error."""
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _open(self, file_name: str) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, places = 0, {}
        # wide dtypes first, so that every tensor is aligned to its own
        names = sorted(self.plan.filename_to_tensors[file_name], key=lambda n: (-self.metas[n].element_size(), n))
        for name in names:
            meta = self.metas[name]
            size = meta.numel() * meta.element_size()
            header[name] = {
                "dtype": _NAMES[_dtype(meta)],
                "shape": list(meta.shape),
                "data_offsets": [offset, offset + size],
            }
            places[name] = (offset, size)
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file = self.files[file_name] = open(self.folder / file_name, "wb", buffering=0)
        _write(file, struct.pack("<Q", len(text)) + text)
        self.places.update({n: (8 + len(text) + start, size) for n, (start, size) in places.items()})


def check_size(max_shard_size: int | str) -> None:
    """Raise `BadOption` for what is no size of a shard."""
    if isinstance(max_shard_size, str):
        good = re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", max_shard_size, re.IGNORECASE) is not None
    else:
        good = type(max_shard_size) is int and max_shard_size > 0
    if not good:
        raise BadOption(f"max_shard_size={max_shard_size!r}; it wants bytes, or text such as '2GB'")


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    data = memoryview(data)
    while len(data):  # an unbuffered file may take less than it is given
        data = data[file.write(data) :]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

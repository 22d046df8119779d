"""torchao's options: read off tensors, configs and folders, and what the installed package can do."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qft.backends.torchao_layer import floats, has_dequantize, leaves
from qft.core.console import quiet_import
from qft.errors import BadFolder, BadOption

ROW, WHOLE = -1, 0
"""Group sizes that stand for a whole row, and for the whole weight."""
FLOAT8 = {"float8": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
INT4_PACKINGS = ("tile_packed_to_4d", "plain", "plain_int32")


def read_options(weight: Any) -> dict[str, Any]:
    """The options of `TorchAO` that a torchao tensor was made with."""
    kind = type(weight).__name__
    block = tuple(getattr(weight, "block_size", None) or ()) if kind != "NF4Tensor" else ()
    size = None
    if len(block) == 2 and block[0] == 1:
        size = ROW if block[1] == weight.shape[1] else block[1]
    elif len(block) == 2 and block == tuple(weight.shape):
        size = WHOLE
    inner = leaves(weight)
    active = any(
        getattr(weight, n, None) is not None
        for n in ("act_quant_kwargs", "activation_quantization", "input_quant_func", "activation_dtype")
    )
    zero = getattr(weight, "zero_point", None)
    symmetric = zero is None or not zero.any()
    if kind == "Int8Tensor" and size is not None and symmetric and not getattr(weight, "reduce_range", False):
        return {"format": "int8", "group_size": size, "activations": active}
    if kind == "Float8Tensor" and size is not None and weight.qdata.dtype in FLOAT8.values():
        name = next(n for n, dtype in FLOAT8.items() if dtype == weight.qdata.dtype)
        return {"format": name, "group_size": size, "activations": active}
    if kind == "IntxUnpackedToInt8Tensor" and size not in (None, WHOLE) and zero.dtype == torch.int8:
        bits = int(str(weight.target_dtype).removeprefix("torch.int"))
        return {"format": "int", "bits": bits, "group_size": size, "symmetric": symmetric, "activations": active}
    if kind in ("Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor") or (kind == "Int4Tensor" and not active):
        return {"format": "int4", "group_size": block[1]}
    if kind == "NF4Tensor":
        return {"format": "nf4", "group_size": weight.block_size, "scaler_block_size": weight.scaler_block_size}
    bits = max(1, round(8 * sum(t.numel() * t.element_size() for t in inner.values()) / weight.numel()))
    opaque = active and not has_dequantize(weight)
    return {"format": "opaque" if opaque else "other", "bits": min(bits, 64), "activations": active}


def config_options(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Options of torchao's config as its JSON says it; "other" for what is read off the tensors alone."""
    kind, data = stored.get("_type"), stored.get("_data") or {}
    granularity = data.get("granularity")
    size = _size(granularity) if isinstance(granularity, Mapping) else None
    if kind == "Int8WeightOnlyConfig":
        group = data.get("group_size")
        return {"format": "int8", "group_size": group if group is not None else size if size is not None else ROW}
    if kind == "Float8WeightOnlyConfig":
        dtype = (data.get("weight_dtype") or {}).get("_data", "float8_e4m3fn")
        names = {str(d).removeprefix("torch."): n for n, d in FLOAT8.items()}
        if dtype not in names:
            raise BadOption(f"torchao's Float8WeightOnlyConfig: weight_dtype={dtype}; {' or '.join(names)}")
        return {"format": names[dtype], "group_size": ROW if size is None else size}
    if kind == "IntxWeightOnlyConfig":
        bits = int(str((data.get("weight_dtype") or {}).get("_data", "int8")).removeprefix("int"))
        mapping = (data.get("mapping_type") or {}).get("_data", "SYMMETRIC")
        algorithm = (data.get("intx_choose_qparams_algorithm") or {}).get("_data", "AFFINE")
        packing = (data.get("intx_packing_format") or {}).get("_data", "UNPACKED_TO_INT8")
        plain = (data.get("scale_dtype"), algorithm, packing) == (None, "AFFINE", "UNPACKED_TO_INT8")
        if plain and mapping in ("SYMMETRIC", "ASYMMETRIC"):
            return {
                "format": "int",
                "bits": bits,
                "group_size": ROW if size is None else size,
                "symmetric": mapping == "SYMMETRIC",
            }
    if kind == "Int4WeightOnlyConfig":
        algorithm = (data.get("int4_choose_qparams_algorithm") or {}).get("_data", "TINYGEMM")
        if algorithm == "TINYGEMM":
            return {"format": "int4", "group_size": data.get("group_size", 128)}
    return {"format": "other", "bits": 8}


def _size(granularity: Mapping[str, Any]) -> int | None:
    data = granularity.get("_data") or {}
    return {"PerGroup": data.get("group_size"), "PerTensor": WHOLE}.get(str(granularity.get("_type")), ROW)


def check_folder(folder: Path) -> None:
    """Raise `BadFolder`, by name, where the leaves of torchao weights in a folder are missing or do not fit their codes."""
    shapes: dict[str, tuple[int, ...]] = {}
    notes: dict[str, str] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:  # pickled: left to transformers
        return
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            notes |= file.metadata() or {}
    try:
        names = json.loads(notes["tensor_names"])
        entries = {name: json.loads(notes[name]) for name in names}
    except (KeyError, ValueError) as error:
        raise BadFolder(f"{folder} lacks torchao's notes on its tensors: it is damaged, or not torchao's") from error
    for name, entry in entries.items():
        module, _, weight = name.rpartition(".")
        wanted = [f"{module}._{weight}_{part}" for part in entry.get("_tensor_data_names") or ()]
        missing = [key for key in wanted if key not in shapes]
        if missing:
            raise BadFolder(f"{folder} lacks {missing[0]}: the folder is incomplete, download or save it again")
        block = (entry.get("_data") or {}).get("block_size")
        codes, scale = shapes.get(f"{module}._{weight}_qdata"), f"{module}._{weight}_scale"
        plain = entry.get("_type") in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
        if plain and block and codes and shapes[scale] != tuple(n // b for n, b in zip(codes, block, strict=True)):
            raise BadFolder(f"{scale} in {folder} is {shapes[scale]}, which does not fit codes of {codes}")


# ---- the package -------------------------------------------------------------------------------------------


def package() -> Any:
    """Import `torchao.quantization`."""
    return quiet_import("torchao.quantization")


def to_nf4(weight: Tensor, block: int, scaler_block: int) -> Tensor:
    """Quantize a weight to torchao's NF4 tensor, wherever the installed version keeps the function."""
    ao = package()
    make = getattr(ao, "to_nf4", None) or quiet_import("torchao.dtypes.nf4tensor").to_nf4
    return make(weight, block, scaler_block)


def older_than(version: str) -> bool:
    """Return whether the installed torchao is older than a version."""
    from packaging.version import Version

    try:
        return Version(importlib.metadata.version("torchao")) < Version(version)
    except importlib.metadata.PackageNotFoundError:
        return False


def int4_config(size: int, packing: str) -> Any:
    """Make the config of weight-only int4 for a group size and a packing format."""
    return package().Int4WeightOnlyConfig(group_size=size, int4_packing_format=packing, set_inductor_config=False)


@lru_cache
def int4_packing(device: str) -> tuple[str | None, str]:
    """The first int4 layout that quantizes and multiplies on a device, by trying; or None and why each does not."""
    why = []
    ao = package()
    for packing in INT4_PACKINGS:
        try:
            layer = nn.Linear(256, 64, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
            before = layer.weight.detach().clone()
            ao.quantize_(layer, int4_config(64, packing))
            after = floats(layer.weight, torch.float32)
            error = float((after - before.float()).norm() / before.float().norm())
            if error < 0.2:
                return packing, ""
            why.append(f"{packing}: off by {error:.0%}")
        except Exception as error:
            why.append(
                f"{packing}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            )
    return None, "; ".join(why)

"""Where saved adapters started: `start.safetensors` beside an adapter whose start was not B = 0.

Tensors `<layer>.lora_A` (r, in_features) and `<layer>.lora_B` (out_features, r), float32. Layers whose start is not
known are listed in the metadata, as JSON under `unknown`. An empty file says that nothing is recorded, as none does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qft.core import record
from qft.errors import BadFolder
from qft.lora.merge_weight import Merging

FILE = "start.safetensors"

Starts = dict[str, tuple[Tensor, Tensor] | None]


def save_starts(model: nn.Module, partial: Path, final: Path) -> None:
    """Write the starts of the adapters that PEFT saved in `partial`, which is to take the place of `final`."""
    for adapter in getattr(model, "peft_config", ()) if isinstance(model, PeftModel) else ():
        inside = "" if adapter == "default" else adapter  # as PEFT names the folders
        starts: Starts = {
            name: module.starts[adapter]
            for name, module in record.base_model(model).named_modules()
            if isinstance(module, Merging) and adapter in module.starts
        }
        if not (partial / inside).is_dir() or not (starts or (final / inside / FILE).exists()):
            continue  # a file that lies there already is of an adapter that lay there before
        tensors: dict[str, Tensor] = {}
        for name, pair in starts.items():
            if pair is not None:
                tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = (t.float().cpu().contiguous() for t in pair)
        unknown = [name for name, pair in starts.items() if pair is None]
        save_file(tensors, partial / inside / FILE, metadata={"unknown": json.dumps(unknown)})


def read_starts(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Starts:
    """The starts that lie beside an adapter, by layer name; empty where there is no such file.

    Args:
        folder: of the adapter.
        shapes: of the adapter's own weights, by their names in its file.

    Raises:
        BadFolder: a damaged file, or one that does not fit the adapter.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            unknown = json.loads((file.metadata() or {}).get("unknown", "[]"))
        starts: Starts = {str(name): None for name in unknown}
    except Exception as error:
        raise BadFolder(f"{path} is damaged: {error}") from error
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        wanted = shapes.get(f"base_model.model.{name}.{part}.weight")
        # a start may have another rank than the adapter: that of a transfer does; A's columns and B's rows are the layer's
        side = {"lora_A": 1, "lora_B": 0}.get(part)
        fits = side is not None and wanted is not None and tensor.ndim == 2 and tensor.shape[side] == wanted[side]
        if not fits or not tensor.isfinite().all():
            raise BadFolder(
                f"{path} does not fit the adapter beside it: {key} is {tuple(tensor.shape)}, and "
                f"{wanted or 'absent'} there"
            )
        if f"{name}.lora_A" not in tensors or f"{name}.lora_B" not in tensors:
            raise BadFolder(f"{path} is damaged: it lacks one half of the start of {name}")
        if tensors[f"{name}.lora_A"].shape[0] != tensors[f"{name}.lora_B"].shape[1]:
            raise BadFolder(f"{path} is damaged: the two halves of the start of {name} have different ranks")
        if part == "lora_A":
            starts[name] = (tensor.to(torch.float32), tensors[f"{name}.lora_B"].to(torch.float32))
    return starts


def put_starts(model: nn.Module, starts: Starts, adapter: str = "default") -> None:
    """Record the starts on the layers of a model that has the adapter.

    Raises:
        BadFolder: a layer that the model does not have, or that carries no such adapter.
    """
    layers = dict(record.base_model(model).named_modules())
    for name, pair in starts.items():
        layer = layers.get(name)
        if not isinstance(layer, Merging) or adapter not in layer.lora_A:
            raise BadFolder(f"{FILE} records a start for {name}, which carries no adapter in this model")
        layer.starts[adapter] = pair

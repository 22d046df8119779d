"""What an adapter is carried from: a wrapped model or a folder, and the float weights that its base was made of."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from qft.core import record as marks
from qft.core.adopt import adopt
from qft.core.configs import read_json_object
from qft.core.registry import get_quantizer
from qft.errors import BadFolder, BadOption, NeedsOriginal, NonFiniteWeights, UnsupportedOperation
from qft.lora.guard import as_it_was
from qft.lora.model import QftLoraModel, check_config
from qft.lora.weights import float_twin, is_quantized
from qft.pipeline.from_pretrained import stored_quantization
from qft.saving.load import load
from qft.saving.save import read_note


def original_of_folder(folder: Path, original: Any, base: Any, options: dict[str, Any]) -> Any:
    """The float weights for an adapter's folder: those given, a float base, or what base or config name."""
    if original is not None:
        return original
    if isinstance(base, nn.Module) and not hasattr(base, "peft_config") and not is_quantized(base):
        return base
    config = read_json_object(folder / "adapter_config.json")
    names = [base, config.get("base_model_name_or_path")] if isinstance(config, dict) else []
    return readable(names, options)


def readable(names: Iterable[Any], options: dict[str, Any]) -> str:
    """The first of these folders and hub ids that holds a float model.

    Raises:
        NeedsOriginal: none does.
    """
    tried: list[str] = []
    for name in names:
        if not isinstance(name, str | os.PathLike) or not os.fspath(name):
            continue
        name = os.fspath(name)
        try:
            stored = stored_quantization(name, options)
        except BadFolder:
            tried.append(f"{name} cannot be read")
            continue
        if stored is None:
            return name
        tried.append(f"{name} is quantized ({stored})")
    raise NeedsOriginal(
        f"the new base is made of the float weights, and {'; '.join(tried) or 'the adapter does not name its base model'}: "
        "pass original= (the float model, or its folder)"
    )


@contextmanager
def loaded(folder: Path, base: Any, device: torch.device | None, options: dict[str, Any]) -> Iterator[PeftModel]:
    """The adapter of a folder over its base; a base in memory is what it was when the block ends."""
    if not isinstance(base, nn.Module):
        yield load(folder, base, **options, **({"device": device} if device is not None else {}))
        return
    if hasattr(base, "peft_config"):
        raise BadOption("base= has adapters itself: give the model without them")
    if not is_quantized(base):
        note = read_note(folder) if folder.is_dir() else None
        with float_twin(base, [get_quantizer(q) for q in note["quantizers"]] if note else []) as twin:
            source = load(folder, twin)
        yield source
        return
    record = adopt(base)
    before = dict(vars(record))
    try:
        with as_it_was(base, always=True):
            yield load(folder, base)
    finally:
        vars(record).update(before)


def check_source(source: nn.Module) -> tuple[PeftModel, str, LoraConfig]:
    """The model, the name of its adapter, and a config to wrap the new base with."""
    record = marks.record_of(source)
    if not isinstance(source, PeftModel) or record is None:
        raise BadOption("give a model that qft.wrap or qft.load returned, or the folder of an adapter")
    others = [c.peft_type.value for c in source.peft_config.values() if c.peft_type != PeftType.LORA]
    if others:
        raise UnsupportedOperation(f"qft.transfer carries LoRA adapters, and these are {others[0]}")
    if not isinstance(source.base_model, QftLoraModel):
        raise UnsupportedOperation("these adapters were put on before qft was imported: wrap the model anew")
    layers = [m for m in source.modules() if isinstance(m, LoraLayer)]
    active = sorted({a for m in layers for a in m.active_adapters} | set(source.active_adapters))
    if len(active) != 1:
        raise BadOption(
            f"{len(active)} adapters are active ({', '.join(active)}), and one can be carried: choose it with "
            "model.set_adapter(name)"
        )
    if merged := sorted({a for m in layers for a in m.merged_adapters}):
        raise BadOption(f"adapter {merged[0]!r} is merged into the base: call qft.unmerge(model) before")
    if any(m.disable_adapters for m in layers):
        raise BadOption("the adapters are disabled: call model.enable_adapter_layers() before, or leave the context")
    name = active[0]
    config = copy.deepcopy(source.peft_config[name])
    if config.target_parameters or getattr(config, "use_qalora", False):
        what = "group-pooled (use_qalora)" if getattr(config, "use_qalora", False) else "on target_parameters"
        raise UnsupportedOperation(
            f"this adapter is {what}: qft.transfer carries plain LoRA, rsLoRA and DoRA on layers"
        )
    config.init_lora_weights, config.loftq_config = True, {}
    check_config(config)
    for key, value in get_peft_model_state_dict(source, adapter_name=name, save_embedding_layers=False).items():
        if not value.isfinite().all():
            raise NonFiniteWeights(f"{key} of adapter {name!r} holds NaN or infinity: it cannot be carried")
    for n, m in adapted(source, name).items():
        if m.lora_alpha[name] == 0:
            raise BadOption(
                f"lora_alpha is 0 on {n}: the adapter does nothing there, and nothing can be fitted into it"
            )
    return source, name, config


def adapted(model: PeftModel, name: str) -> dict[str, LoraLayer]:
    """Layers with this adapter, by the names that they have without."""
    found = marks.base_model(model).named_modules()
    return {n: m for n, m in found if isinstance(m, LoraLayer) and name in m.scaling}

"""Save adapters, and the base under them where it is asked for, under a temporary name that is renamed at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from qft.core import record as marks
from qft.core.files import as_path, atomic_folder
from qft.core.names import bare_state_dict
from qft.errors import BadFolder, BadOption, UnsupportedOperation
from qft.lora.noted import NOTE, mark_rewritten, note_of
from qft.saving.starts import save_starts


def save(model: nn.Module, folder: str | os.PathLike[str], *, base: bool = False) -> None:
    """Save an adapter, and with `base` the quantized model under it, in one folder.

    Writes PEFT's own adapter files, which plain PEFT loads over the same base, and `qft.json`: the quantizers, the
    base's fingerprint and the init; beside an adapter that did not start at zero, `start.safetensors`. Everything is
    written under a temporary name and renamed at the end. The base is stored in
    `folder/base` where `base=True`, and always where it is not q(W), as after iterated LoftQ.

    Args:
        model: what `qft.wrap` or `qft.quantize_and_wrap` returned.
        folder: created where it does not exist.
        base: store the quantized base too.

    Raises:
        BadOption: a model without adapters, or with merged ones.
        UnsupportedOperation: the base must be stored, and its backend cannot.
        BadFolder: the folder cannot be written; what was there before is intact.
    """
    record = marks.record_of(model)
    if not hasattr(model, "peft_config"):
        raise BadOption(
            "qft.save stores adapters, and this model has none: wrap it first, or use model.save_pretrained"
        )
    merged = [n for n, m in model.named_modules() if getattr(m, "merged_adapters", None)]
    if merged:
        raise BadOption(f"adapters are merged into {len(merged)} weights: call qft.unmerge(model) before saving")
    places = _adapter_places(model)
    stores_base = record is not None and (base or record.base_changed)
    _check_adapter_names(places, stores_base)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        save_starts(model, partial, as_path(folder))
        _lift(partial, places)
        if record is None:
            return
        note = note_of(record, marks.base_model(model), stores_base)
        if places:
            note |= {"adapters": places, "active": _active(model, places)}
        (partial / NOTE).write_text(json.dumps(note, indent=1))
        if stores_base:
            for place in places.values():
                mark_rewritten(partial / place, False)
            _save_base(model, partial / "base", record)


def _adapter_places(model: nn.Module) -> dict[str, str]:
    """Adapter name → its folder in the saved one. "default", or else the first active adapter, is at the top.

    Empty for models that are not a `PeftModel`: transformers saves the active adapter alone.
    """
    if not isinstance(model, PeftModel):
        return {}
    names = list(model.peft_config)
    top = "default" if "default" in names else _active(model, names)[0]
    return {name: "." if name == top else name for name in names}


def _active(model: Any, names: Iterable[str]) -> list[str]:
    active = model.active_adapters  # a list, or a method of transformers' models
    active = active() if callable(active) else active
    return [name for name in active if name in names] or list(names)[:1]


def _check_adapter_names(places: Mapping[str, str], stores_base: bool) -> None:
    for name, place in places.items():
        if place != "." and (name != Path(name).name or name in ("", ".", "..") or (name == "base" and stores_base)):
            raise BadOption(f"an adapter cannot be saved under the name {name!r}: load or add it under another name")


def _lift(partial: Path, places: Mapping[str, str]) -> None:
    """Move the adapter that is to lie at the top out of the folder that PEFT gave it."""
    name = next((n for n, place in places.items() if place == "."), "default")
    if name == "default":
        return
    for path in (partial / name).iterdir():
        os.replace(path, partial / path.name)
    (partial / name).rmdir()


def read_note(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """`qft.json` of a saved folder, or None where plain PEFT wrote it.

    Raises:
        BadFolder: it is not one that qft wrote.
    """
    path = Path(folder) / NOTE
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text())
        if note["format"] != 1:
            raise BadFolder(f"{path} has format {note['format']}, which this version of qft does not read")
        note["fingerprint"] = {n: (tuple(s), [float(x) for x in v]) for n, (s, v) in note["fingerprint"].items()}
        names = [q["name"] for q in note["quantizers"]]
        note["layers"] = {str(n): range(len(names))[i] for n, i in note["layers"].items()}
        note.setdefault("base_merged", False)
        note["codes"] = {str(n): [float(x) for x in v] for n, v in note.get("codes", {}).items()}
        note["adapters"] = {str(n): _inside(place) for n, place in note.get("adapters", {"default": "."}).items()}
        note["active"] = [n for n in note.get("active", list(note["adapters"])[:1]) if n in note["adapters"]]
        for key in ("rewritten_by", "name"):
            if not isinstance(note.setdefault(key, None), str | None):
                raise TypeError(f"{key} is {note[key]!r}")
        for flag in ("base_stored", "base_changed", "base_merged"):
            if not isinstance(note[flag], bool):
                raise TypeError(f"{flag} is {note[flag]!r}")
        return note
    except BadFolder:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFolder(f"{path} is not a file that qft wrote, or is damaged: {error!r}") from error


def _inside(place: Any) -> str:
    """The folder of an adapter in the saved one."""
    if place != "." and (place != Path(place).name or place == ".."):
        raise ValueError(f"an adapter's folder is {place!r}")
    return place


def _save_base(model: nn.Module, folder: Path, record: marks.Record) -> None:
    """The quantized base without its adapters, in its own format; plain modules as one safetensors file."""
    base = marks.base_model(model)
    bad = [q for q in record.quantizers.values() if not q.capabilities.serializable]
    if bad:
        raise UnsupportedOperation(f"the base must be stored too, and {bad[0]!r} cannot be (capability serializable)")
    if hasattr(base, "save_pretrained"):
        if base.hf_quantizer is not None and not base.hf_quantizer.is_serializable():
            raise UnsupportedOperation(
                "the base must be stored too, and a model with several quantizers has no format of its own yet"
            )
        _save_pretrained_bare(base, folder)
    else:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({k: v.contiguous() for k, v in bare_state_dict(base).items()}, folder / "model.safetensors")


def _save_pretrained_bare(base: nn.Module, folder: Path) -> None:
    # transformers saves only adapters where it sees any
    loaded = base.__dict__.pop("_hf_peft_config_loaded", None)
    peft_config = base.__dict__.pop("peft_config", None)
    try:
        base.save_pretrained(folder)
    finally:
        if loaded is not None:
            base._hf_peft_config_loaded = loaded
        if peft_config is not None:
            base.peft_config = peft_config

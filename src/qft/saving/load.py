"""Load what `save`, or plain PEFT, wrote: an adapter's folder over its base."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn

from qft.core import record as marks
from qft.core.adopt import adopt
from qft.core.classifiers import class_names, float_classifier, name_classes, with_new_head
from qft.core.codes import codes_difference, codes_fingerprint
from qft.core.configs import read_json_object
from qft.core.console import without_deprecations
from qft.core.devices import check_device, default_device, place
from qft.core.experts import fused_weight
from qft.core.files import as_path
from qft.core.modes import normal_mode, without_inference_tensors
from qft.core.names import bare_layers, bare_state_dict
from qft.core.packed import TensorQuantizer
from qft.core.quantizer import Quantizer, code_options, float_weight
from qft.core.registry import Spec, get_quantizer, quantizer_of
from qft.core.transformers_quantizer import weight_conversions
from qft.core.unquantized import is_float_linear
from qft.errors import AdapterMismatch, BadFolder, BadOption, QftError, QftWarning, UnsupportedOperation
from qft.lora.exact import merge_exactly
from qft.lora.guard import as_it_was, brief, rehearse_load
from qft.lora.layer import DequantizedForward
from qft.lora.merge_weight import Merging
from qft.lora.model import KEPT_INITS
from qft.lora.noted import REWRITTEN
from qft.lora.prompts import prepare_prompts
from qft.lora.tuners import check_method
from qft.pipeline.from_pretrained import check_tensors, load_quantized, stored_quantization
from qft.pipeline.quantize import quantize_as
from qft.pipeline.wrap import is_lora
from qft.saving.save import read_note
from qft.saving.starts import put_starts, read_starts

SAME_CODES = 1e-3
"""Relative difference below which two bases hold the same codes: devices round differently."""


def load(folder: str | os.PathLike[str], base: Any = None, *, is_trainable: bool = False, **kwargs: Any) -> nn.Module:
    """Load what `save`, or plain PEFT, wrote.

    Args:
        folder: of an adapter.
        base: a model, quantized or float, or a folder or hub id of one. None takes the base stored in the folder, or
            the one that the adapter's config names. A float base is quantized as the saved one was.
        is_trainable: go on training; else the adapter is frozen and the model in eval mode.
        **kwargs: passed to `from_pretrained` where a base is loaded.

    Returns:
        A `peft.PeftModel`.

    Raises:
        BadFolder: missing, corrupt or foreign files.
        AdapterMismatch: the adapter was trained over other original weights.
        UnknownQuantizer: the base's quantizer is not registered here.
    """
    folder = as_path(folder)
    if not (folder / "adapter_config.json").is_file():
        what = "has no adapter_config.json" if folder.is_dir() else "does not exist"
        inside = sorted(str(path.parent) for path in folder.glob("*/adapter_config.json"))
        hint = f"; there are adapters in {', '.join(inside[:3])}" if inside else ""
        raise BadFolder(f"{folder} {what}: give the folder of an adapter, as qft.save or PEFT writes it{hint}")
    check_adapter_files(folder)
    with normal_mode():
        return load_adapter(folder, base, read_note(folder), is_trainable=is_trainable, **kwargs)


def load_adapter(
    folder: Path, base: Any, note: dict[str, Any] | None, *, is_trainable: bool, **kwargs: Any
) -> PeftModel:
    """The rest of `qft.load`, once its files are known to be sound."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise BadFolder(f"{folder / 'adapter_config.json'} is no adapter config that PEFT reads: {error}") from error
    if note is not None and note["base_changed"] and not (note["base_stored"] or note["init"] or note["base_merged"]):
        raise BadFolder(f"{folder / 'qft.json'} says that the base was changed, and no base is stored next to it")
    if hasattr(base, "peft_config"):
        raise BadOption("the base has adapters already: model.load_adapter(folder, name) adds another")
    if is_lora(config):
        if config.init_lora_weights not in (*KEPT_INITS, REWRITTEN):
            raise UnsupportedOperation(
                f"this adapter was started with init_lora_weights={config.init_lora_weights!r}, which rewrote its base: "
                "over any other base it is wrong; save it as a plain LoRA adapter with PEFT's "
                "path_initial_model_for_weight_conversion, and load that"
            )
        config.init_lora_weights = True
    starts = read_starts(folder, adapter_shapes(folder)) if is_lora(config) else {}
    if isinstance(base, nn.Module) and _missing_head(base, folder, config):
        raise AdapterMismatch(
            f"this adapter holds the head of a classifier, and the base is a {type(base).__name__}: load the base with "
            "AutoModelForSequenceClassification, or give its folder"
        )
    if isinstance(base, nn.Module) and adopt(base) is None:
        if note is None:
            raise BadOption(
                "the base is a float model and the folder does not say how to quantize it: quantize it first"
            )
        _check_float_base(folder, base, config, note)
    model = _base_for(folder, base, config, note, kwargs)
    if adopt(model) is not None and (heads := _missing_head(model, folder, config)):
        model = with_new_head(model, class_names((note or {}).get("classes"), _classes(heads)))
    elif note is not None and not isinstance(base, nn.Module):
        name_classes(model, note.get("classes"))
    record = adopt(model)
    if record is None:
        raise BadOption("the base is a float model and the folder does not say how to quantize it: quantize it first")
    if note is not None:
        check_origin(note, record)
        check_codes(folder, note, model, record)
    if not is_lora(config):
        check_method(config, record.quantizers.values())
    before, record.forward = record.forward, (note or {}).get("forward", record.forward)
    try:
        with as_it_was(model), _strict_load(), without_deprecations():
            without_inference_tensors(model)
            name = _top_name(note)
            peft_model = PeftModel.from_pretrained(
                model, str(folder), adapter_name=name, is_trainable=is_trainable, config=config
            )
            put_starts(peft_model, starts, name)
            _load_others(peft_model, folder, note, is_trainable)
            if is_lora(config):
                check_extra(folder, peft_model)
            merge_exactly(peft_model)
            prepare_prompts(peft_model)
            if record.forward == "dequantize":
                DequantizedForward.put_on(model)
            if note is not None and note["base_changed"] and not record.base_changed:
                if note["base_stored"]:
                    restore_base(model, folder / "base", record)
                record.base_changed, record.merged = (
                    True,
                    note["base_merged"],
                )  # else its codes are known to be the same
    except BaseException:
        record.forward = before
        raise
    if note is not None:
        record.init = note.get("init")
        if note["base_changed"] and not note["base_merged"]:
            _mark_residuals(peft_model, note["rewritten_by"] if note["name"] is None else name)
    return peft_model


def _top_name(note: dict[str, Any] | None) -> str:
    """The name of the adapter whose files are at the top of a saved folder."""
    return next((n for n, place in note["adapters"].items() if place == "."), "default") if note else "default"


def _load_others(model: PeftModel, folder: Path, note: dict[str, Any] | None, is_trainable: bool) -> None:
    """Load the further adapters of a saved folder, and activate those that were active."""
    if note is None:
        return
    for name, inside in note["adapters"].items():
        if inside == ".":
            continue
        where = folder / inside
        check_adapter_files(where)
        model.load_adapter(str(where), name, is_trainable=is_trainable)
        if is_lora(model.peft_config[name]):
            put_starts(model, read_starts(where, adapter_shapes(where)), name)
    active = note["active"]
    if len(active) > 1:
        model.base_model.set_adapter(active, inference_mode=not is_trainable)
    elif active and active != [_top_name(note)]:
        model.set_adapter(active[0], inference_mode=not is_trainable)


def _mark_residuals(model: nn.Module, adapter: str | None) -> None:
    """Note on each layer that its base weight is a residual without the adapter whose init rewrote it.

    Args:
        adapter: None where an older note does not name it: then the one whose start is known.
    """
    for module in marks.base_model(model).modules():
        if not isinstance(module, Merging):
            continue
        if adapter is None and module.starts:
            module.mark_residual(next(iter(module.starts)))
        elif adapter is not None and adapter in module.lora_A:
            module.mark_residual(adapter)


def check_codes(folder: Path, note: dict[str, Any], model: nn.Module, record: marks.Record) -> None:
    """Compare the codes of the base that an adapter was trained over with those of the base that it is loaded over.

    Raises:
        AdapterMismatch: one of the two was rewritten by an init or by a merge, and the other was not, or otherwise.

    Warns:
        QftWarning: other codes of the same weights, with the measured difference.
    """
    if note["name"] is not None and note["rewritten_by"] not in (None, note["name"]):
        raise AdapterMismatch(
            f"this adapter was trained next to adapter {note['rewritten_by']!r}, whose init rewrote the base and without which "
            "the base is a residual: save both with qft.save, and load that folder"
        )
    if note["base_changed"] and not record.base_changed and note["base_stored"]:
        return  # the stored base is put over this one
    difference = codes_difference(note["codes"], codes_fingerprint(marks.base_model(model))) if note["codes"] else 0.0
    same = bool(note["codes"]) and difference < SAME_CODES
    if same or (not note["codes"] and note["base_changed"] == record.base_changed):
        return
    if note["base_changed"] != record.base_changed or note["base_merged"] != record.merged:
        what = (
            "has another adapter merged into it" if note["base_merged"] or record.merged else "was rewritten by an init"
        )
        whose = "the base that this adapter was trained over" if note["base_changed"] else "this base"
        raise AdapterMismatch(
            f"{whose} {what}, and {'this base' if note['base_changed'] else 'the one it was trained over'} is not the same "
            f"(the weights differ by {difference:.1%}): give that base, or save it with the adapter by qft.save"
        )
    if not same:
        warnings.warn(
            f"this adapter was trained over other codes of the same weights, which differ by {difference:.1%}: outputs will "
            "differ; qft.save(model, folder, base=True) stores the base with its adapter",
            QftWarning,
            stacklevel=5,
        )


def _heads(folder: Path, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """The layers of a classifier's head that an adapter holds, and the shapes of their weights."""
    if config.task_type != "SEQ_CLS":
        return {}
    stored = {n.removeprefix("base_model.model."): shape for n, shape in adapter_shapes(folder).items()}
    found = {
        n: shape for n, shape in stored.items() if n.split(".")[0] in ("score", "classifier") and ".lora_" not in n
    }
    return {n.rpartition(".")[0]: shape for n, shape in found.items() if len(shape) == 2}


def _missing_head(model: nn.Module, folder: Path, config: PeftConfig) -> list[tuple[int, ...]]:
    """The shapes of a head that an adapter holds and a base lacks: PEFT would leave it out without a word."""
    here = {name for name, _ in model.named_modules()}
    return [shape for name, shape in _heads(folder, config).items() if name not in here]


def _classes(shapes: Iterable[tuple[int, ...]]) -> int:
    return min(shape[0] for shape in shapes)


def _check_float_base(folder: Path, base: nn.Module, config: PeftConfig, note: dict[str, Any]) -> None:
    """Everything that can be wrong, before a float base is quantized as the saved one was."""
    quantizers = {n: q for n, q in _spec_of(note).quantizers.items() if q is not None}
    if not is_lora(config):
        check_method(config, quantizers.values())
    check_float_origin(note, base)
    if note["base_changed"] and not note["base_stored"]:
        raise AdapterMismatch(
            f"the base of this adapter was rewritten by {note['init'] or 'a merge'}, and {folder} does not store it: load the "
            "adapter over that base, or save both with qft.save"
        )
    rehearse_load(base, config, adapter_shapes(folder))
    if note["base_changed"]:
        check_stored_base(folder / "base", base, quantizers)


@contextmanager
def _strict_load():
    """PEFT warns of missing adapter weights, and loads a mixture: refuse that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with names_as_stored():
                yield
        except (QftError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise BadFolder(f"this adapter does not fit this base: {brief(error)}") from error
        for warning in caught:
            if "missing adapter keys" in str(warning.message):
                raise BadFolder(f"this adapter does not fit this base: {brief(warning.message)}")
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def names_as_stored() -> Iterator[None]:
    """Have PEFT rename adapter weights to a model's present names only where they do not have these names already.

    Some of transformers' patterns match what they make: "mlp.shared_expert." with a regular expression's dot matches
    "mlp.shared_experts" too, as in Laguna and Mistral Large.
    """
    from peft.utils import transformers_weight_conversion as conversion

    plain = conversion.convert_peft_adapter_state_dict_for_transformers

    def convert(model: nn.Module, peft_config: Any, adapter_state_dict: Any, adapter_name: str = "default") -> Any:
        present = {n.replace(f".{adapter_name}.", ".") for n, _ in model.named_parameters() if ".lora_" in n}
        if all(name in present for name in adapter_state_dict if ".lora_" in name):
            return adapter_state_dict
        return plain(model, peft_config, adapter_state_dict, adapter_name)

    conversion.convert_peft_adapter_state_dict_for_transformers = convert
    try:
        yield
    finally:
        conversion.convert_peft_adapter_state_dict_for_transformers = plain


def _base_for(folder: Path, base: Any, config: PeftConfig, note: dict[str, Any] | None, kwargs: Any) -> nn.Module:
    stored = folder / "base"
    if base is None and note is not None and note["base_stored"]:
        if not (stored / "config.json").is_file():
            raise BadFolder(f"{stored} is no transformers checkpoint: pass base=, a module such as it was made from")
        quantizers = [get_quantizer(q) for q in note["quantizers"]]
        device = check_device(kwargs.pop("device", None)) or place(quantizers, stored=True)
        model = load_quantized(str(stored), None, device, False, complete=True, **kwargs)
        record = adopt(model)
        record.fingerprint = note["fingerprint"]  # stored together: the same by construction
        record.base_changed = note["base_changed"]
        record.merged = note["base_merged"]
        return model
    return _given_base(folder, base, config, note, kwargs)


def _given_base(folder: Path, base: Any, config: PeftConfig, note: dict[str, Any] | None, kwargs: Any) -> nn.Module:
    if base is None:
        base = config.base_model_name_or_path
        if not base:
            raise BadFolder(f"{folder} does not name its base model: pass base=")
    if isinstance(base, nn.Module):
        if adopt(base) is None and note is not None:
            quantize_as(base, _spec_of(note), progress=False)
        return base
    spec = _spec_of(note) if note is not None else None
    if spec is None:
        device = check_device(kwargs.pop("device", None)) or default_device()
        return load_quantized(os.fspath(base), None, device, False, **kwargs)
    device = kwargs.pop("device", None)
    heads = _heads(folder, config)
    if heads and stored_quantization(os.fspath(base), kwargs) is None:
        model = float_classifier(os.fspath(base), _classes(heads.values()), kwargs)
        return quantize_as(model, spec, progress=False, device=device or default_device())
    return quantize_as(os.fspath(base), spec, progress=False, device=device, load_options=kwargs)


def _spec_of(note: dict[str, Any]) -> Spec:
    """The saved quantizers as patterns: each layer by its own name, everything else left."""
    quantizers = [get_quantizer(q) for q in note["quantizers"]]
    return Spec({**{n: quantizers[i] for n, i in note["layers"].items()}, "*": None})


def check_adapter_files(folder: Path) -> None:
    """Raise `BadFolder` where the adapter's files cannot be read, before any base is touched."""
    named = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise BadFolder(f"{folder / 'adapter_config.json'}: base_model_name_or_path is {named!r:.60}; it is a text")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise BadFolder(f"{folder} has no adapter_model.safetensors; qft reads no pickle files (adapter_model.bin)")
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():
                file.get_slice(key)
    except Exception as error:
        raise BadFolder(f"{weights} is damaged: {error}") from error


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in an adapter's file, by their names in it."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def check_extra(folder: Path, model: nn.Module) -> None:
    """Refuse LoRA weights in an adapter's file for layers that the model does not have, or that are not adapted.

    PEFT ignores them without a warning. Models whose names transformers converts are left to PEFT.

    Raises:
        AdapterMismatch: with the first name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(marks.base_model(model), add_legacy=False):
        return
    adapted = {name for name, module in model.named_modules() if getattr(module, "lora_A", None) is not None}
    adapted = {name.replace(".base_layer", "") for name in adapted}
    names = sorted(name for name in adapter_shapes(folder) if ".lora_" in name)
    extra = [n for n in names if n.partition(".lora_")[0].replace(".base_layer", "") not in adapted]
    if extra:
        more = f" and {len(extra) - 1} more weights" if len(extra) > 1 else ""
        raise AdapterMismatch(
            f"{folder} holds {extra[0]}{more}, and the model has no such adapted layer: give the base that this adapter was "
            "trained over"
        )


def restore_base(model: nn.Module, folder: Path, record: marks.Record) -> None:
    """Put the stored codes and constants of a base that is not q(W) over those of a freshly quantized one.

    Raises:
        BadFolder: files that are missing, damaged, or of another model.
    """
    tensors = _read_base(folder, record.quantizers, lambda file, key: file.get_tensor(key))
    layers = {n: m for n, m in bare_layers(marks.base_model(model)) if quantizer_of(m) is not None and n in tensors}
    for name, state in tensors.items():  # all of it before the first layer changes
        _check_state(folder, name, state, layers[name].state_dict(), record.quantizers[name])
    _check_others(folder, marks.base_model(model), record.quantizers)
    for name, state in tensors.items():
        quantizer = record.quantizers[name]
        quantizer.load_state(quantizer.weights(layers[name])[0], state)
    record.base_changed = True


def check_stored_base(folder: Path, base: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Check a stored base, without reading it, against a float model that is yet to be quantized.

    Raises:
        BadFolder: as `restore_base`.
    """
    from qft.pipeline.from_pretrained import with_weight

    stored = _read_base(folder, quantizers, _header)
    expected: dict[Any, dict[str, torch.Tensor]] = {}
    for name, quantizer in quantizers.items():
        weight = fused_weight(base, name)
        if weight is not None:
            one = cast(TensorQuantizer, quantizer).template(tuple(weight.shape[1:]), weight.dtype)
            here = {k: torch.empty((len(weight), *s), dtype=dtype, device="meta") for k, (s, dtype) in one.items()}
            _check_state(folder, name, stored[name], here, quantizer)
            continue
        old = base.get_submodule(name)
        kind = (quantizer, type(old), old.weight.shape, old.weight.dtype, old.weight.device)
        if kind not in expected:
            twin = with_weight(old, torch.zeros_like(old.weight))
            expected[kind] = quantizer.on_device(old.weight.device).quantize_layer(twin).state_dict()
        _check_state(folder, name, stored[name], expected[kind], quantizer)


def _check_others(folder: Path, base: nn.Module, quantized: Iterable[str]) -> None:
    """Check that the stored base has the tensors outside the quantized layers that `base` has, by their names.

    Raises:
        BadFolder: tensors are missing, or belong to no module.
    """
    if hasattr(base, "save_pretrained") and weight_conversions(base):  # the files have names of their own
        return
    owners = tuple(f"{name}." for name in quantized)
    names = _names_in(folder)
    here = {k: v for k, v in bare_state_dict(base).items() if not k.startswith(owners)}
    stored = {k for k in names if not k.startswith(owners)}
    ends = {(here[k].data_ptr(), here[k].shape) for k in stored & here.keys()}  # of tied tensors, one end is stored
    missing = [k for k, v in here.items() if k not in stored and (v.data_ptr(), v.shape) not in ends]
    check_tensors(folder, missing, stored - here.keys())


def _names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


def _read_base(folder: Path, names: Iterable[str], read: Callable[[Any, str], torch.Tensor]) -> dict[str, dict]:
    tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    longest_first = sorted(tensors, key=len, reverse=True)
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    owner = next((n for n in longest_first if key.startswith(n + ".")), None)
                    if owner is not None:
                        tensors[owner][key.removeprefix(owner + ".")] = read(file, key)
    except Exception as error:
        raise BadFolder(f"cannot read the base in {folder}: {error}") from error
    return tensors


def _header(file: Any, key: str) -> torch.Tensor:
    """A tensor's shape and dtype, as a tensor without values."""
    view = file.get_slice(key)
    shape = view.get_shape()
    return torch.empty(shape, dtype=(view[:0] if shape else file.get_tensor(key)).dtype, device="meta")


def _check_state(
    folder: Path, name: str, stored: Mapping[str, Any], here: Mapping[str, torch.Tensor], quantizer: Quantizer
) -> None:
    shifts = quantizer.capabilities.float_zero_points  # then a constant may have become float32
    for key, tensor in here.items():
        if key == "bias":
            continue
        found = stored.get(key)
        # bitsandbytes keeps its options as JSON in a tensor of bytes, whose length may differ
        same = "quant_state." in key or (
            found is not None
            and found.shape == tensor.shape
            and (
                found.dtype == tensor.dtype or (shifts and found.dtype == torch.float32 and tensor.is_floating_point())
            )
        )
        if found is None or not same:
            raise BadFolder(f"{folder} holds no fitting {name}.{key}: it is the base of another model, or incomplete")


def check_float_origin(note: dict[str, Any], base: nn.Module) -> None:
    """Compare an adapter's note with a float base, before that is quantized.

    Raises:
        AdapterMismatch: other original weights.
    """
    modules = dict(base.named_modules())
    fused = {n: w for n in note["layers"] if (w := fused_weight(base, n)) is not None}
    absent = [n for n in note["layers"] if n not in fused and (n not in modules or not is_float_linear(modules[n]))]
    if absent:
        raise AdapterMismatch(
            f"this adapter was trained over another kind of model: {len(absent)} of its {len(note['layers'])} quantized "
            f"layers are no linear layers of this {type(base).__name__}, {absent[0]} first"
        )
    here = {n: marks.of_weight(float_weight(modules[n])) for n in note["fingerprint"] if n in modules}
    _check_fingerprints(note, here | {n: marks.of_weight(fused[n]) for n in note["fingerprint"] if n in fused})


def _check_fingerprints(note: dict[str, Any], here: dict[str, Any]) -> None:
    differ = marks.same_origin(note["fingerprint"], here)
    if differ:
        raise AdapterMismatch(
            f"this adapter was trained over other original weights: {len(differ)} of {len({**note['fingerprint'], **here})} "
            f"layers differ, {differ[0]} first; load the base that it was trained over"
        )


def check_origin(note: dict[str, Any], record: marks.Record) -> None:
    """Compare an adapter's note with the base it is loaded over.

    Raises:
        AdapterMismatch: other original weights.
    """
    if note["fingerprint"] and record.fingerprint:
        _check_fingerprints(note, record.fingerprint)
    else:
        warnings.warn(
            "whether this adapter belongs to this base cannot be checked: one of them has no fingerprint of the "
            "original weights",
            QftWarning,
            stacklevel=4,
        )
    saved = {n: code_options(note["quantizers"][i]) for n, i in note["layers"].items()}
    here = {n: code_options(q.to_dict()) for n, q in record.quantizers.items()}
    stored: dict[str, Any] = {}
    if any(len(shape) == 3 for shape, _ in note["fingerprint"].values()):  # what a base with experts is stored as
        twins = [get_quantizer(q).for_experts() for q in note["quantizers"]]
        stored = {n: code_options(q.to_dict()) for n, i in note["layers"].items() if (q := twins[i]) is not None}
    differ = [n for n in {**saved, **here} if here.get(n) not in (saved.get(n), stored.get(n))]
    if differ:
        was, now = saved.get(differ[0], "not quantized"), here.get(differ[0], "not quantized")
        warnings.warn(
            f"this adapter was trained over another quantization of these weights: {len(differ)} layers differ, "
            f"{differ[0]} first (it was {was}, and is {now}); outputs will differ a little",
            QftWarning,
            stacklevel=4,
        )

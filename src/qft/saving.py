"""Save and load, and transformers' view of a model that qft quantized."""

from __future__ import annotations

import copy
import glob
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import qft.marks as marks
from qft.backends.unquantized import is_float_linear
from qft.errors import AdapterMismatch, BadFolder, BadOption, QftError, QftWarning, UnsupportedOperation
from qft.packed import PackedLinear, TensorQuantizer
from qft.quantizer import Quantizer, code_options, float_weight, is_conv1d, replace_module
from qft.registry import get_quantizer, quantizer_of

METHOD = "qft"
NOTE = "qft.json"


# ---- transformers' view ----------------------------------------------------------------------------------


@register_quantization_config(METHOD)
class QftConfig(QuantizationConfigMixin):
    """What `config.json` says of a model saved with packed weights, and what `from_pretrained` is told to quantize.

    Args:
        quantizers: quantizer by layer name, as objects or as `Quantizer.to_dict()` makes them.
        templates: shapes and dtypes of the packed tensors, by quantizer index and weight shape.
        layers: layer name → [quantizer index, out_features, in_features, kind, dtype].
    """

    def __init__(self, quantizers: Any = (), templates: Any = None, layers: Any = None, **kwargs: Any):
        self.quant_method = METHOD
        self.quantizers = list(quantizers)
        self.templates = templates or {}
        self.layers = layers or {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "quantizers": [q.to_dict() if isinstance(q, Quantizer) else q for q in self.quantizers],
            "templates": self.templates,
            "layers": self.layers,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> QftConfig:
        # configs of submodules are copies of the model's: they must not keep a plan, and what it holds, alive
        twin = copy.copy(self)
        twin.__dict__.pop("plan", None)
        return twin


@register_quantizer(METHOD)
class QftHfQuantizer(HfQuantizer):
    """transformers' handle on our models: trainers accept them, and what cannot be saved raises instead of lying.

    `plan`, an object of `qft.loading`, says how to quantize while `from_pretrained` streams the weights in; without
    it the checkpoint holds packed weights already.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.plan = getattr(quantization_config, "plan", None)
        if self.plan is not None:
            self.pre_quantized = False

    def is_serializable(self) -> bool:
        return getattr(self.quantization_config, "qft_serializable", True)

    @property
    def is_trainable(self) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters of transformers' add_adapter are what is saved
            return None, {}
        _keep_codes_apart(model)
        return _bare_state_dict(model), {}  # whatever state dict save_pretrained was given, it takes this one

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self.plan is not None and self.plan.wants(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self.plan)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        # transformers reserves this much on an accelerator before loading
        return self.plan.element_size(param_name, param) if self.plan is not None else param.element_size()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.plan is not None:
            self.plan.start(model)
        else:
            _build_packed_layers(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.plan is None:
            _dtype_floats(model, self.quantization_config)
            quantizers: dict[str, Quantizer] = {
                n: m.quantizer for n, m in model.named_modules() if isinstance(m, PackedLinear)
            }
            marks.mark(model, marks.Record(quantizers=quantizers))
        return model


class _QuantizeOnLoad(ConversionOps):
    """transformers gives each float weight as it arrives; it is quantized, put in its place, and dropped."""

    def __init__(self, plan: Any):
        self.plan = plan

    def convert(self, input_dict, *, model=None, missing_keys=None, **kwargs):
        others = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if not self.plan.wants(name):  # stored as one tensor with one that is quantized
                others[name] = value
                continue
            self.plan.arrive(model, name, value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return others


def _build_packed_layers(model: nn.Module, config: QftConfig) -> None:
    try:
        quantizers = [get_quantizer(q) for q in config.quantizers]
        for name, (index, out_features, in_features, kind, dtype) in config.layers.items():
            template = config.templates[f"{index}:{out_features}x{in_features}:{dtype}"]
            packed = {
                key: torch.empty(shape, dtype=getattr(torch, dt), device="meta")
                for key, (shape, dt) in template.items()
            }
            old = model.get_submodule(name)
            # constants keep the dtypes that they were saved in; the layer shows the dtype that is loaded now
            layer = PackedLinear(
                quantizers[index], packed, (out_features, in_features), old.weight.dtype, old.bias, kind
            )
            layer._is_hf_initialized = True
            replace_module(model, name, layer)
    except QftError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFolder(f"this model's quantization_config does not fit it: {error!r}") from error


def _dtype_floats(model: nn.Module, config: QftConfig) -> None:
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.bias is not None:
            module.bias.requires_grad_(False)


def describe_packed(model: nn.Module, record: marks.Record) -> QftConfig:
    """The config of a model whose quantized layers are all `PackedLinear`."""
    quantizers: list[Quantizer] = []
    templates, layers = {}, {}
    for name, module in _bare_layers(model):
        if not isinstance(module, PackedLinear):
            continue
        if module.quantizer not in quantizers:
            quantizers.append(module.quantizer)
        index = quantizers.index(module.quantizer)
        dtype = str(module.dtype).removeprefix("torch.")
        layers[name] = [index, module.out_features, module.in_features, module.kind, dtype]
        templates[f"{index}:{module.out_features}x{module.in_features}:{dtype}"] = {
            key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in module.packed.items()
        }
    return QftConfig(quantizers, templates, layers)


def _bare_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers by the names that they have, or had, without adapters."""
    for name, module in model.named_modules():
        yield name.replace(".base_layer", "").removeprefix("base_layer."), module


def mark_for_transformers(model: nn.Module, record: marks.Record) -> None:
    """Give an in-memory model the marks by which trainers and `save_pretrained` know a quantized model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    quantizers = list(dict.fromkeys(record.quantizers.values()))
    if all(isinstance(q, TensorQuantizer) for q in quantizers):
        described: Any = describe_packed(model, record)
        described.qft_serializable = all(q.capabilities.serializable for q in quantizers)
    else:
        described = None
        if len(quantizers) == 1:
            described = quantizers[0].transformers_config(_unquantized_linears(model), getattr(model, "dtype", None))
        if described is None:
            described = QftConfig(quantizers)
            described.qft_serializable = False
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # they make TRL cast adapters to bf16
        model.__dict__.pop(flag, None)
    model.hf_quantizer = QftHfQuantizer(described)
    model.is_quantized = True
    model.quantization_method = described.quant_method
    config.quantization_config = described
    if torch.cuda.device_count() > 1:  # Trainer would wrap in DataParallel, which copies packed weights wrongly
        model.is_parallelizable = model.model_parallel = True


def _keep_codes_apart(model: nn.Module) -> None:
    """Have `save_pretrained` fuse no quantized layers into the tensors that the model's original files had.

    transformers splits or fuses weights of some models while it loads them, and undoes that where it saves, with codes
    and constants as with floats: what it writes cannot be read. Unfused, it can.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # what save_pretrained takes for a model that was built in memory
        conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    weights = [f"{name}.weight" for name, module in _bare_layers(model) if quantizer_of(module) is not None]

    def touches(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        try:
            back = conversion.reverse_transform()
        except Exception:
            return True
        return any(back.rename_source_key(w)[1] is not None for w in weights)

    kept = [c for c in conversions if not touches(c)]
    if len(kept) < len(conversions):
        model.__dict__.setdefault("_qft_conversions", getattr(model, "_weight_conversions", None))
        model._weight_conversions = kept


def _unquantized_linears(model: nn.Module) -> list[str]:
    """What transformers must be told to leave in float, as it matches names: from the start, or by their ends."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    quantized = [n for n in linears if quantizer_of(model.get_submodule(n)) is not None]
    left = sorted(set(linears) - set(quantized))
    return [f"^{n}$" if any(q.endswith(n) for q in quantized) else n for n in left]


def unmark(model: nn.Module) -> None:
    """Remove every mark: the model is a plain float model again."""
    model.__dict__.pop("_qft", None)
    if "_qft_conversions" in model.__dict__:
        model._weight_conversions = model.__dict__.pop("_qft_conversions")
    for name in (
        "hf_quantizer",
        "is_quantized",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "quantization_method",
        "hqq_quantized",
        "is_parallelizable",
        "model_parallel",
    ):
        model.__dict__.pop(name, None)
    # submodules may hold configs of their own, copies made while the model was built
    configs = {id(c): c for m in model.modules() for c in (getattr(m, "config", None),) if c is not None}
    for config in list(configs.values()):
        for part in [config, *_sub_configs(config)]:
            for name in ("quantization_config", "_is_quantized"):
                if name in getattr(part, "__dict__", {}):
                    delattr(part, name)


def _sub_configs(config: Any) -> list[Any]:
    return [getattr(config, name) for name in getattr(config, "sub_configs", {}) if hasattr(config, name)]


# ---- files -----------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well; else the old one stays.

    Files of the old folder that the new one does not write are kept.
    """
    final = _path(folder)
    if final.exists() and not final.is_dir():
        raise BadFolder(f"{final} is a file, and a folder is to be written there")
    host = f".{final.name}.partial-{platform.node()}-"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f"{glob.escape(host)}*"):  # by a process that was killed
            if not _alive(left.name.removeprefix(host)):
                shutil.rmtree(left, ignore_errors=True)
        partial = final.parent / f"{host}{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise BadFolder(f"cannot write to {final}: {error.strerror or error}") from error
    try:
        yield partial
        final.mkdir(exist_ok=True)
        for path in sorted(partial.rglob("*")):
            target = final / path.relative_to(partial)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    except OSError as error:
        if isinstance(error, QftError):
            raise
        raise BadFolder(f"cannot write to {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _path(folder: Any) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise BadOption(f"give the path of a folder, not a {type(folder).__name__}") from None


def _alive(pid: str) -> bool:
    import psutil  # comes with accelerate and PEFT

    return pid.isdecimal() and psutil.pid_exists(int(pid))


def save(model: nn.Module, folder: str | os.PathLike[str], *, base: bool = False) -> None:
    """Save an adapter, and with `base` the quantized model under it, in one folder.

    Writes PEFT's own adapter files, which plain PEFT loads over the same base, and `qft.json`: the quantizers, the
    base's fingerprint and the init. Everything is written under a temporary name and renamed at the end. The base is
    stored in `folder/base` where `base=True`, and always where it is not q(W), as after iterated LoftQ.

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
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        if record is not None:
            stores_base = base or record.base_changed
            (partial / NOTE).write_text(json.dumps(_note(record, stores_base), indent=1))
            if stores_base:
                _save_base(model, partial / "base", record)


def _note(record: marks.Record, stores_base: bool) -> dict[str, Any]:
    import qft

    quantizers = list(dict.fromkeys(record.quantizers.values()))
    return {
        "format": 1,
        "qft": qft.__version__,
        "quantizers": [q.to_dict() for q in quantizers],
        "layers": {n: quantizers.index(q) for n, q in record.quantizers.items()},
        "init": record.init,
        "forward": record.forward,
        "base_stored": stores_base,
        "base_changed": record.base_changed,
        "fingerprint": {
            n: [list(shape), [float(f"{v:.6g}") for v in values]] for n, (shape, values) in record.fingerprint.items()
        },
    }


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
        for flag in ("base_stored", "base_changed"):
            if not isinstance(note[flag], bool):
                raise TypeError(f"{flag} is {note[flag]!r}")
        return note
    except BadFolder:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFolder(f"{path} is not a file that qft wrote, or is damaged: {error!r}") from error


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
        save_file({k: v.contiguous() for k, v in _bare_state_dict(base).items()}, folder / "model.safetensors")


def _bare_state_dict(base: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by the names that they have without adapters."""
    state = {}
    for key, value in base.state_dict().items():
        if ".lora_" in f".{key}" or ".modules_to_save." in key:
            continue
        state[key.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    return state


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


def restore_base(model: nn.Module, folder: Path, record: marks.Record) -> None:
    """Put the stored codes and constants of a base that is not q(W) over those of a freshly quantized one.

    Raises:
        BadFolder: files that are missing, damaged, or of another model.
    """
    tensors = _read_base(folder, record.quantizers, lambda file, key: file.get_tensor(key))
    layers = {n: m for n, m in _bare_layers(marks.base_model(model)) if quantizer_of(m) is not None and n in tensors}
    for name, state in tensors.items():  # all of it before the first layer changes
        _check_state(folder, name, state, layers[name].state_dict())
    for name, state in tensors.items():
        quantizer = record.quantizers[name]
        quantizer.load_state(quantizer.weights(layers[name])[0], state)
    record.base_changed = True


def check_stored_base(folder: Path, base: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Check a stored base, without reading it, against a float model that is yet to be quantized.

    Raises:
        BadFolder: as `restore_base`.
    """
    from qft.loading import with_weight

    stored = _read_base(folder, quantizers, _header)
    expected: dict[Any, dict[str, torch.Tensor]] = {}
    for name, quantizer in quantizers.items():
        old = base.get_submodule(name)
        kind = (quantizer, type(old), old.weight.shape, old.weight.dtype, old.weight.device)
        if kind not in expected:
            twin = with_weight(old, torch.zeros_like(old.weight))
            expected[kind] = quantizer.on_device(old.weight.device).quantize_layer(twin).state_dict()
        _check_state(folder, name, stored[name], expected[kind])


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


def _check_state(folder: Path, name: str, stored: Mapping[str, Any], here: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in here.items():
        if key == "bias":
            continue
        found = stored.get(key)
        # bitsandbytes keeps its options as JSON in a tensor of bytes, whose length may differ
        same = "quant_state." in key or (found is not None and (found.shape, found.dtype) == (tensor.shape, tensor.dtype))
        if found is None or not same:
            raise BadFolder(f"{folder} holds no fitting {name}.{key}: it is the base of another model, or incomplete")


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
    from qft.pipeline import load_adapter

    folder = _path(folder)
    if not (folder / "adapter_config.json").is_file():
        what = "has no adapter_config.json" if folder.is_dir() else "does not exist"
        raise BadFolder(f"{folder} {what}: give the folder of an adapter, as qft.save or PEFT writes it")
    check_adapter_files(folder)
    return load_adapter(folder, base, read_note(folder), is_trainable=is_trainable, **kwargs)


def check_adapter_files(folder: Path) -> None:
    """Raise `BadFolder` where the adapter's files cannot be read, before any base is touched."""
    try:
        json.loads((folder / "adapter_config.json").read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise BadFolder(f"{folder / 'adapter_config.json'} is damaged: {error}") from error
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


def check_float_origin(note: dict[str, Any], base: nn.Module) -> None:
    """Compare an adapter's note with a float base, before that is quantized.

    Raises:
        AdapterMismatch: other original weights.
    """
    modules = dict(base.named_modules())
    absent = [n for n in note["layers"] if n not in modules or not is_float_linear(modules[n])]
    if absent:
        raise AdapterMismatch(
            f"this adapter was trained over another kind of model: {len(absent)} of its {len(note['layers'])} quantized "
            f"layers are no linear layers of this {type(base).__name__}, {absent[0]} first"
        )
    _check_fingerprints(
        note, {n: marks.of_weight(float_weight(modules[n])) for n in note["fingerprint"] if n in modules}
    )


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
    differ = [n for n in {**saved, **here} if saved.get(n) != here.get(n)]
    if differ:
        was, now = saved.get(differ[0], "not quantized"), here.get(differ[0], "not quantized")
        warnings.warn(
            f"this adapter was trained over another quantization of these weights: {len(differ)} layers differ, "
            f"{differ[0]} first (it was {was}, and is {now}); outputs will differ a little",
            QftWarning,
            stacklevel=4,
        )

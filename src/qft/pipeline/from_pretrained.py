"""A folder or hub id, quantized shard by shard: the float model is never whole in memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qft.core import record, transformers_quantizer
from qft.core.configs import check_model_config, check_model_folder
from qft.core.console import first_sentence
from qft.core.experts import as_stack, pack_parameter
from qft.core.files import as_path, did_you_mean, is_adapter
from qft.core.finite import ResultCheck
from qft.core.quantizer import OnWeight, Quantizer, as_float_dtype, float_weight, is_conv1d, replace_module
from qft.core.registry import file_reader, folder_reader, quantizer_of
from qft.core.selection import SKIPPED, Selection, select, settle, target_weights
from qft.core.shard_index import read_weight_map
from qft.errors import BadFolder, BadOption, MissingDependency, NonFiniteWeights, QftError, about

TRIM_EVERY = 4 * 2**20
"""Bytes of float weights between two calls of `_trim`."""
CHECKED_AT_ONCE = 2**24
"""Elements of a float weight that are checked for NaN at once."""


class _Stop(BaseException):
    """Ends a load at once: transformers collects every `Exception` of a conversion, and goes on to the end."""


class LoadingPlan:
    """How to quantize a model while transformers streams its weights in."""

    def __init__(
        self,
        quantizers: Mapping[str, Quantizer | None],
        skip: str | Iterable[str] | None,
        on_weight: OnWeight | None = None,
        prepare: Any = None,
    ):
        self.quantizers, self.skip, self.on_weight, self.prepare = quantizers, skip, on_weight, prepare
        self.selection = Selection()
        self.record = record.Record()
        self.error: BaseException | None = None
        self._samples: dict[str, Tensor] = {}
        self._untrimmed = 0
        self._results = ResultCheck()

    def start(self, model: nn.Module) -> None:
        """Every check that needs no weights, on the empty model."""
        selection = select(model, self.quantizers, self.skip)
        self.selection = settle(selection, target_weights(model, selection))
        self.record.left, self.record.experts = self.selection.left, self.selection.experts
        if self.prepare is not None:
            parents = dict.fromkeys(name.rpartition(".")[0] for name in self.selection.stacks)
            self.prepare(model, [*self.selection.targets, *parents])

    def wants(self, parameter: str) -> bool:
        name, _, last = parameter.rpartition(".")
        return (last == "weight" and name in self.selection.targets) or parameter in self.selection.stacks

    def element_size(self, parameter: str, value: Tensor) -> float:
        """Bytes an element of what a parameter becomes."""
        if not self.wants(parameter):
            return value.element_size()
        return self._quantizers[parameter.removesuffix(".weight")].capabilities.bits / 8

    @property
    def _quantizers(self) -> dict[str, Quantizer]:
        return {**self.selection.targets, **self.selection.stacks}

    def arrive(self, model: nn.Module, parameter: str, value: Tensor) -> None:
        """One float weight: check it, quantize it, put the layer in its place."""
        try:
            if parameter in self.selection.stacks:
                self._arrive_stack(model, parameter, value)
            else:
                self._arrive(model, parameter.removesuffix(".weight"), value)
        except BaseException as error:
            self.error = error
            raise _Stop from error

    def _arrive(self, model: nn.Module, name: str, value: Tensor) -> None:
        quantizer = self.selection.targets[name]
        quantizer = self.selection.targets[name] = quantizer.on_device(value.device)
        old = model.get_submodule(name)
        if value.shape != old.weight.shape:
            raise BadFolder(
                f"the checkpoint's {name}.weight is {tuple(value.shape)}, and its config says {tuple(old.weight.shape)}"
            )
        layer = with_weight(old, value)
        weight = float_weight(layer)
        if not weight.isfinite().all():
            raise NonFiniteWeights(f"{name}.weight holds NaN or infinity: repair the checkpoint, or skip this weight")
        with about(name):
            new = quantizer.quantize_layer(layer)
        self._results.add(name, new)
        new.bias = old.bias  # on "meta" still, or loaded already
        new._is_hf_initialized = True
        for parameter in new.parameters():  # or transformers draws them anew, for some parent modules
            if not parameter.is_meta:
                parameter._is_hf_initialized = True
        new._qft_quantizer = quantizer
        new.requires_grad_(False)
        replace_module(model, name, new)
        self._note(name, quantizer, weight)
        if self.on_weight is not None:
            for handle in quantizer.weights(new):
                self.on_weight(name, weight, quantizer.dequantize(handle, dtype=torch.float32), None)

    def _arrive_stack(self, model: nn.Module, name: str, value: Tensor) -> None:
        quantizer: Any = self.selection.stacks[name].on_device(value.device)
        parent_name, _, last = name.rpartition(".")
        wanted = model.get_submodule(parent_name)._parameters[last].shape
        if value.shape != wanted:
            raise BadFolder(f"the checkpoint's {name} is {tuple(value.shape)}, and its config says {tuple(wanted)}")
        if not value.isfinite().all():
            raise NonFiniteWeights(f"{name} holds NaN or infinity: repair the checkpoint, or skip this weight")
        with about(name):
            stack = pack_parameter(model, name, quantizer, value)
        self._results.add(name, stack)
        weight = as_stack(value, stack.transposed)
        self._note(name, quantizer, weight)
        if self.on_weight is not None:
            self.on_weight(name, weight, stack.unpacked(torch.float32), None)

    def _note(self, name: str, quantizer: Quantizer, weight: Tensor) -> None:
        self.record.quantizers[name] = quantizer
        self.record.float_bytes += weight.numel() * weight.element_size()
        self._samples[name] = record.sample(weight)
        self._untrimmed += weight.numel() * weight.element_size()
        if self._untrimmed >= TRIM_EVERY:
            self._untrimmed = 0
            _trim()

    def finish(self, model: nn.Module, missing_keys: Collection[str]) -> None:
        """Check that every target arrived, and write the note."""
        for name in self.selection.targets:  # stored as one tensor with one that stays float: it came as a float, too
            weight = model.get_submodule(name).weight if name not in self.record.quantizers else None
            if weight is not None and not weight.is_meta and f"{name}.weight" not in missing_keys:
                self._arrive(model, name, weight.detach())
        for name in self.selection.stacks:
            parent_name, _, last = name.rpartition(".")
            value = model.get_submodule(parent_name)._parameters.get(last)
            if value is not None and not value.is_meta and name not in missing_keys:
                self._arrive_stack(model, name, value.detach())
        missing = {f"{n}.weight" for n in self.selection.targets if n not in self.record.quantizers}
        _check_complete([*missing, *missing_keys], self.selection.targets)
        absent = [n for n in self.selection.stacks if n not in self.record.quantizers]
        if absent:
            raise BadFolder(f"the checkpoint lacks {len(absent)} weights of its own model, {min(absent)} first")
        self._results.look()
        for name in self.selection.targets:  # a bias that came after its weight
            model.get_submodule(name).requires_grad_(False)
        shapes = {n: tuple(_shape(model, n)) for n in self._samples}
        self.record.fingerprint = record.fingerprint(shapes, self._samples)
        transformers_quantizer.mark(model, self.record)
        _trim()


def _check_complete(missing_keys: Iterable[str], targets: Collection[str]) -> None:
    """Refuse missing weights, which transformers draws at random: those of layers that are to be quantized must be there."""
    missing = {key for key in missing_keys if key.rpartition(".")[0] in targets}
    if missing:
        raise BadFolder(f"the checkpoint lacks {len(missing)} weights of its own model, {min(missing)} first")


def _trim() -> None:
    """Give the heap's free pages back: glibc keeps what was freed between two live tensors, floats by the gigabyte."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    module = model.get_submodule(name)
    return quantizer_of(module).weights(module)[0].shape


def with_weight(old: nn.Module, value: Tensor) -> nn.Module:
    """A float layer of the kind of `old` that holds `value` and no bias."""
    with torch.device("meta"):
        if is_conv1d(old):
            layer: nn.Module = type(old)(value.shape[1], value.shape[0])
            layer.bias = None
        else:
            layer = nn.Linear(value.shape[1], value.shape[0], bias=False)
    layer.weight = nn.Parameter(value, requires_grad=False)
    return layer


WITHOUT_ADAPTER = {"subfolder": ".no-adapter"}
"""As `adapter_kwargs` of `from_pretrained`: do not load an adapter that is stored in the folder of its base model."""


def load_quantized(
    path: str,
    plan: LoadingPlan | None,
    device: torch.device | None,
    progress: bool,
    needed: Callable[[nn.Module], Collection[str]] | None = None,
    complete: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """`from_pretrained` of the model class that the config names, quantizing as `plan` says.

    Args:
        needed: without a plan: names of the layers whose weights the folder must hold.
        complete: the folder must hold every tensor of the model, and no other.

    Raises:
        BadFolder: no such folder, or files that cannot be read, or that lack weights.
    """
    if device is not None:
        kwargs.setdefault("device_map", {"": device})
    kwargs.setdefault("dtype", "auto")
    if isinstance(kwargs["dtype"], str | torch.dtype) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = as_float_dtype(kwargs["dtype"])
    if plan is not None:
        config = transformers_quantizer.QftConfig()
        config.plan = plan
        kwargs["quantization_config"] = config
    kwargs.setdefault("adapter_kwargs", dict(WITHOUT_ADAPTER))
    cls = model_class(path, kwargs)
    reader = file_reader(kwargs) if plan is None and needed is None else None
    if reader is not None and reader.file_option is not None:
        cls = _causal_class(cls, path, kwargs)
        kwargs |= _packed(path, cls, kwargs)
        kwargs.pop(reader.file_option)
    elif kwargs.get("variant") is None and "gguf_file" not in kwargs:
        check_files(Path(path, kwargs.get("subfolder") or ""))
        if plan is None:
            kwargs |= _packed(path, cls, kwargs)
    source = None if "state_dict" in kwargs else path
    try:
        with _quiet(progress), _experts_as_stored(path, cls, kwargs):
            model, info = cls.from_pretrained(source, output_loading_info=True, **kwargs)
        transformers_quantizer.forget_renames(model, kwargs.get("key_mapping") or {})
    except _Stop as stop:
        raise stop.__cause__ from None
    except (QftError, torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except ImportError as error:
        raise MissingDependency(f"{path} cannot be loaded here: {first_sentence(error)}") from error
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise BadOption(f"from_pretrained takes no such option: {first_sentence(error)}") from error
        raise BadFolder(f"cannot load a model from {path}: {first_sentence(error)}") from error
    except Exception as error:
        raise BadFolder(f"cannot load a model from {path}: {first_sentence(error)}") from error
    if plan is not None:
        plan.finish(model, info["missing_keys"])
    elif missing := info["missing_keys"] if source is None else _missing_codes(model, info["missing_keys"]):
        raise BadFolder(f"{path} lacks {len(missing)} of the quantized model's weights, {min(missing)} first")
    elif needed is not None:
        _check_complete(info["missing_keys"], needed(model))
    left = {} if plan is None else plan.selection.left
    check_finite(model, except_for={name for name, reason in left.items() if reason == SKIPPED})
    if complete:
        check_tensors(path, info["missing_keys"], info["unexpected_keys"])
    return model


@contextlib.contextmanager
def _experts_as_stored(path: str, cls: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Load stacked experts as stacks where the folder stores them so.

    transformers takes the experts of Llama 4 apart for bitsandbytes and compressed-tensors, whatever the folder holds.
    """
    from transformers.quantizers import base

    from qft.pipeline.foreign import tensors_of

    apart = base.MODULES_TO_PATCH_FOR_QUANTIZATION
    stacked = "Llama4" in cls.__name__ and Path(path).is_dir() and "gguf_file" not in options
    if not stacked or not any(name.endswith("experts.gate_up_proj") for name in tensors_of(path, options)):
        yield
        return
    before = dict(apart)
    apart.clear()
    try:
        yield
    finally:
        apart.update(before)


def check_finite(model: nn.Module, except_for: Collection[str] = ()) -> None:
    """Raise `NonFiniteWeights` where a float weight outside of the quantized layers holds NaN or infinity.

    Args:
        except_for: names of layers that the caller skipped, and answers for.
    """
    packed = {id(p) for m in model.modules() if quantizer_of(m) is not None for p in m.parameters()}
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or weight.element_size() == 1 or id(weight) in packed:
            continue
        if name.rpartition(".")[0] in except_for:
            continue
        if not all(bool(part.isfinite().all()) for part in weight.detach().reshape(-1).split(CHECKED_AT_ONCE)):
            raise NonFiniteWeights(f"{name} holds NaN or infinity: repair the checkpoint")


def check_tensors(path: str | os.PathLike[str], missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise `BadFolder`, with their names, where tensors of a stored model are missing, or do not belong to it."""
    for keys, what in ((missing, "lacks"), (unexpected, "holds tensors that the model does not have:")):
        names = sorted(keys)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise BadFolder(f"the stored base in {path} {what} {', '.join(names[:3])}{more}: save it again")


def _packed(path: str, cls: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What to tell `from_pretrained` so that another tool's checkpoint comes as packed layers, if a backend can."""
    from qft.pipeline.foreign import packed_config, tool_folder

    config = read_config(path, kwargs)
    if getattr(config, "quantization_config", None) is None or folder_reader(Path(path, kwargs.get("subfolder") or "")):
        return tool_folder(path, config, cls, kwargs) or {}
    found = packed_config(path, config, cls, kwargs)
    if found is None:
        return {}
    config.quantization_config, renames = found
    return {"config": config, **({"key_mapping": renames} if renames else {})}


def _missing_codes(model: nn.Module, missing_keys: Iterable[str]) -> list[str]:
    """Return the missing weights of quantized layers.

    transformers draws missing weights at random, with a note in its log. A random head may be wanted, codes never.
    """
    owners = {n for n, m in model.named_modules() if quantizer_of(m) is not None}
    return [key for key in missing_keys if key.rpartition(".")[0] in owners]


def check_files(folder: Path) -> None:
    """Raise `BadFolder`, with the file's name, where the weights of a local folder are incomplete or damaged.

    Only headers are read. Pickled weights are left to transformers.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        files = [folder / name for name in sorted(set(read_weight_map(index).values()))]
    else:
        return
    for file in files:
        if not file.is_file():
            raise BadFolder(f"{file} is missing: the folder is incomplete, download or save it again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:
            raise BadFolder(f"{file} is damaged, download or save it again: {first_sentence(error)}") from error


def read_config(path: str, options: Mapping[str, Any]) -> Any:
    """The transformers config of a folder or hub id.

    Raises:
        BadFolder: it has none that can be read.
    """
    import transformers

    where = as_path(Path(path, options.get("subfolder") or ""))
    if where.is_dir() and not (where / "config.json").is_file() and "gguf_file" not in options:
        if is_adapter(where):
            raise BadFolder(f"{path} holds an adapter and no model: give its base model, or open both with qft.load")
        raise BadFolder(f"{path} holds no config.json: give the folder of a model, as save_pretrained writes it")
    if where.is_file():
        raise BadFolder(f"{path} is a file: give the folder of a model, as save_pretrained writes it")
    names = ("trust_remote_code", "revision", "subfolder", "token", "cache_dir", "local_files_only", "gguf_file")
    check_model_folder(where)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **{k: options[k] for k in names if k in options})
        check_model_config(config.to_dict(), path)
        return config
    except BadFolder:
        raise
    except Exception as error:
        if where.exists():
            file = where / (options.get("gguf_file") or "config.json")
            raise BadFolder(f"{file} is no model config that can be read: {first_sentence(error)}") from error
        raise BadFolder(
            f"cannot read a model from {path}: there is no such folder, and no model of that id in the cache or on the hub "
            f"({first_sentence(error)}){did_you_mean(path)}"
        ) from error


def stored_quantization(path: str, options: Mapping[str, Any]) -> str | None:
    """The method that a checkpoint's own config names, or None for a float one."""
    stored = getattr(read_config(path, options), "quantization_config", None)
    if stored is None:
        backend = folder_reader(Path(path, options.get("subfolder") or ""))
        return None if backend is None else backend.name
    get = stored.get if isinstance(stored, Mapping) else lambda key, other: getattr(stored, key, other)
    return str(get("quant_method", "unknown"))


def model_class(path: str, options: Mapping[str, Any]) -> Any:
    """The class that the model's own config names, else the causal language model that fits."""
    import transformers

    for name in getattr(read_config(path, options), "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    return transformers.AutoModelForCausalLM


def _causal_class(cls: Any, path: str, options: Mapping[str, Any]) -> Any:
    """The class itself, where the config of a file names none."""
    import transformers

    if cls is not transformers.AutoModelForCausalLM:
        return cls
    config = read_config(path, options)
    try:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise BadFolder(f"{path} is a {type(config).__name__}, which is no causal language model") from error


class _quiet:
    """transformers' own progress bars, off where the caller wants none."""

    def __init__(self, progress: bool):
        self.progress = progress

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.was = logging.is_progress_bar_enabled()
        if not self.progress:
            logging.disable_progress_bar()

    def __exit__(self, *exc: Any) -> None:
        from transformers.utils import logging

        if self.was:
            logging.enable_progress_bar()

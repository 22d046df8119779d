"""quantize → prepare_model_for_kbit_training → wrap; `quantize_and_wrap` is those three."""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from torch import Tensor, nn

from qft import marks
from qft.audit import audit
from qft.errors import (
    AlreadyQuantized,
    BadFolder,
    BadOption,
    NeedsCalibration,
    NeedsOriginal,
    QftError,
    QftWarning,
    UnsupportedDevice,
    UnsupportedOperation,
)
from qft.guard import as_it_was, brief, check_names, refused_by_peft, rehearse, rehearse_load
from qft.inits import InitRun, need_original, resolve_init
from qft.loading import Plan, load_quantized, stored_quantization
from qft.lora.layer import QftLinear
from qft.lora.model import KEPT_INITS, check_config, check_saved_modules, fill_targets, targeted
from qft.originals import Originals
from qft.quantizer import OnWeight, Quantizer, code_options, float_weight
from qft.registry import Spec, get_quantizer, parse_spec, quantizer_of
from qft.saving import adapter_shapes, check_float_origin, check_origin, check_stored_base, restore_base
from qft.selection import Selection, check_finite, select

Prepare = Callable[[nn.Module, Iterable[str]], None]

# ---- quantize --------------------------------------------------------------------------------------------


def quantize(
    model_or_path: nn.Module | str | os.PathLike[str],
    quantizer: Any = "nf4",
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    skip: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **load_options: Any,
) -> nn.Module:
    """Quantize the linear layers of a model, in place, or of a folder or hub id while it is loaded.

    Args:
        model_or_path: a model in memory, or where to load one from. From a folder the shards are streamed: the float
            model is never whole in memory.
        quantizer: a name ("nf4"), an option string ("reference:format=int,bits=3"), a quantizer object, transformers'
            own config, or a mapping of module patterns to these, the first match winning and None leaving a match as
            it is: `{"*.mlp.*": "reference:format=int,bits=3", "*": "nf4"}`.
        calibration: data for quantizers that need it.
        tokenizer: for calibration texts.
        skip: further modules to leave, as a regular expression for the whole name or a list of names. Output heads,
            tied weights, routers and what the model keeps in float32 are always left.
        device: None leaves a model where it is, and puts a path on the accelerator where there is one.
        progress: show a progress bar and a summary on stderr.
        **load_options: for a path, passed to `from_pretrained` (`dtype`, `revision`, `trust_remote_code`, ...).

    Returns:
        The same object, or the loaded model. The same spec over a model that is quantized already changes nothing.

    Raises:
        UnknownQuantizer, BadOption, MissingDependency: the quantizer.
        NoTargets, BadShape, NonFiniteWeights: the weights. The model is as it was.
        AlreadyQuantized: it is quantized in another way.
        UnsupportedDevice: no such device, no kernels for it, or weights on "meta".
        BadFolder: the path.
        PartlyQuantized: an earlier run over this model was interrupted.
    """
    return _quantize(
        model_or_path,
        parse_spec(quantizer),
        calibration=calibration,
        skip=skip,
        device=device,
        progress=progress,
        load_options=load_options,
    )


def _quantize(
    model_or_path: Any,
    spec: Spec,
    *,
    calibration: Any = None,
    skip: Any = None,
    device: Any = None,
    progress: bool = True,
    on_weight: OnWeight | None = None,
    prepare: Prepare | None = None,
    load_options: dict[str, Any] | None = None,
) -> nn.Module:
    if spec.skip:
        skip = _joined(skip, spec.skip)
    for q in spec.quantizers.values():
        if q is not None and q.capabilities.needs_calibration and calibration is None:
            raise NeedsCalibration(f"{q!r} needs calibration data: pass calibration=")
    target = check_device(device)
    if isinstance(model_or_path, nn.Module):
        if load_options:
            raise BadOption(f"{', '.join(load_options)}: these are for loading from a path, and a model was given")
        model = _quantize_in_memory(model_or_path, spec, skip, target, progress, on_weight, prepare, calibration)
    elif isinstance(model_or_path, str | os.PathLike):
        target = target or default_device()
        model = _quantize_path(
            os.fspath(model_or_path), spec, skip, target, progress, on_weight, prepare, load_options or {}
        )
    else:
        raise BadOption(f"give a torch module, a folder or a hub id, not a {type(model_or_path).__name__}")
    if progress:
        print(audit(model).summary(), file=sys.stderr)
    return model


def _joined(skip: Any, more: Sequence[str]) -> Any:
    if isinstance(skip, str):
        return "|".join([f"(?:{skip})", *(rf"(?:.*\.)?{m}(?:\..*)?" for m in more)])
    return [*(skip or ()), *more]


def _quantize_in_memory(
    model: nn.Module,
    spec: Spec,
    skip: Any,
    device: torch.device | None,
    progress: bool,
    on_weight: OnWeight | None,
    prepare: Prepare | None,
    calibration: Any,
) -> nn.Module:
    record = marks.adopt(model)
    if record is not None:
        return _already(model, record, spec)
    if hasattr(model, "peft_config"):
        raise BadOption("this model has adapters: quantize first, then wrap")
    selection = select(model, spec.quantizers, skip)
    layers = {name: model.get_submodule(name) for name in selection.targets}
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise UnsupportedDevice(
                f"{name}.weight is on the meta device and has no values: load the model, or give qft.quantize its folder"
            )
    check_finite(layers)
    selection = settle(selection, layers, device)
    if prepare is not None:
        prepare(model, selection.targets)

    record = marks.Record(left=selection.left, experts=selection.experts)
    shapes: dict[str, tuple[int, ...]] = {}
    samples: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight = float_weight(layer)
        shapes[name], samples[name] = tuple(weight.shape), marks.sample(weight)
        record.float_bytes += weight.numel() * weight.element_size()
    del layers, layer, weight  # from here on, each float weight goes when its quantized one has come
    order: dict[Quantizer, list[str]] = defaultdict(list)
    for name, q in selection.targets.items():
        order[q].append(name)
    one_by_one = device is None and all(type(q).quantize is Quantizer.quantize for q in order)
    with _all_or_marked(model, record, f"{len(selection.targets)} layers were to be quantized", one_by_one):
        for q, names in order.items():
            bar = _bar(progress, f"quantizing to {q.name}")
            q.quantize(
                model,
                names,
                calibration=calibration,
                on_weight=on_weight,
                progress=_moving(model, device, bar),
            )
            for name in names:
                module = model.get_submodule(name)
                module._qft_quantizer = q
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
                record.quantizers[name] = q
        if device is not None:
            model.to(device)
    record.fingerprint = marks.fingerprint(shapes, samples)
    marks.mark(model, record)
    return model


def _quantize_path(
    path: str,
    spec: Spec,
    skip: Any,
    device: torch.device,
    progress: bool,
    on_weight: OnWeight | None,
    prepare: Prepare | None,
    options: dict[str, Any],
) -> nn.Module:
    stored = stored_quantization(path, options)
    if stored and on_weight is not None:
        raise NeedsOriginal(f"{path} is quantized already ({stored}), and the init needs the float weights: load those")
    plan = None if stored else Plan(spec.quantizers, skip, on_weight, prepare)
    if plan is not None:
        for q in {q for q in spec.quantizers.values() if q is not None}:
            q.on_device(device)
    model = load_quantized(path, plan, device, progress, **options)
    if plan is None:
        record = marks.adopt(model)
        if record is None:
            raise BadFolder(f"{path} says that it is quantized ({stored}), and no quantized layer was found in it")
        return _already(model, record, spec)
    return model


def _already(model: nn.Module, record: marks.Record, spec: Spec) -> nn.Module:
    from fnmatch import fnmatchcase

    asked = {n: next((q for p, q in spec.quantizers.items() if fnmatchcase(n, p)), None) for n in record.quantizers}
    other = next((n for n, q in record.quantizers.items() if not _same(q, asked[n])), None)
    if other is not None:
        raise AlreadyQuantized(
            f"{other} is quantized already, with {record.quantizers[other]!r}, and {asked[other]!r} was asked for: "
            "load the float model, or give the same quantizer"
        )
    warnings.warn("this model is quantized in that way already: nothing to do", QftWarning, stacklevel=5)
    return model


def _same(found: Quantizer, asked: Quantizer | None) -> bool:
    """Equal in what decides the codes; an option that was left open matches any."""
    if asked is None or type(found) is not type(asked):
        return False
    a, b = code_options(found.to_dict()), code_options(asked.to_dict())
    return all(a[k] == b[k] or b[k] is None for k in a)


def settle(selection: Selection, layers: Mapping[str, nn.Module], device: torch.device | None = None) -> Selection:
    """Settle each quantizer's open options over its own targets, and check that it runs on their device."""
    groups: dict[Quantizer, list[str]] = defaultdict(list)
    for name, q in selection.targets.items():
        groups[q].append(name)
    for q, names in groups.items():
        q.check_installed()
        weights = [(n, layers[n]) for n in names]
        settled = q.resolve([(n, tuple(float_weight(m).shape)) for n, m in weights])
        devices = {torch.device(device)} if device is not None else {m.weight.device for _, m in weights}
        for d in devices:
            if d.type != "meta":
                settled = settled.on_device(d)
        for n in names:
            selection.targets[n] = settled
    return selection


def check_device(device: Any) -> torch.device | None:
    """A `torch.device` that exists here, or None.

    Raises:
        UnsupportedDevice: it does not.
    """
    if device is None:
        return None
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedDevice(f"{device!r} is no device: {error}".splitlines()[0]) from error
    if device.type == "meta":
        raise UnsupportedDevice("the meta device holds no values: nothing can be quantized there")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (count == 0 or (device.index or 0) >= count):
        raise UnsupportedDevice(f"{device} was asked for, and this machine has {count} CUDA devices; try device='cpu'")
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=device)
        except Exception as error:
            raise UnsupportedDevice(f"{device} was asked for, and this machine has none; try device='cpu'") from error
    return device


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def _all_or_marked(model: nn.Module, record: marks.Record, what: str, one_by_one: bool) -> Iterator[None]:
    """Run a block that changes weights; if it ends early, the model says so to every later verb.

    Where layers are replaced one by one and none was yet, nothing has changed, and nothing is marked.
    """
    try:
        yield
    except BaseException as error:
        done = _count(model)
        if done or not one_by_one:
            record.partly = f"{what}, and {type(error).__name__} stopped it after {done}"
            model.__dict__["_qft"] = record
        raise


def _count(model: nn.Module) -> int:
    return sum(quantizer_of(m) is not None for m in model.modules())


def _bar(progress: bool, text: str) -> Any:
    if not progress:
        return None
    from tqdm.auto import tqdm

    return lambda names: tqdm(names, desc=text, unit="layer", leave=False)


def _moving(model: nn.Module, device: torch.device | None, bar: Any) -> Any:
    """Give the names one by one, each layer moved to the device as its turn comes."""
    if device is None:
        return bar

    def names(targets: Sequence[str]) -> Iterator[str]:
        for name in bar(targets) if bar else targets:
            model.get_submodule(name).to(device)
            yield name

    return names


# ---- prepare ---------------------------------------------------------------------------------------------


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: str = "none",
) -> nn.Module:
    """Freeze a quantized model and switch on what training over it needs, for every backend alike.

    Args:
        model: a model that `quantize`, or another tool, quantized.
        use_gradient_checkpointing: recompute activations in the backward pass, where the model's class knows how.
        gradient_checkpointing_kwargs: as `gradient_checkpointing_enable` takes them; default non-reentrant.
        auto_clear_cache: empty the accelerator's cache after an upcast.
        upcast: "none" leaves every dtype as it is: norms compute in float32 anyway, and a float32 norm weight turns
            the whole residual stream into float32. "norms" keeps norm weights in float32 and casts their outputs
            back. "all" is PEFT's way: every 16-bit parameter that is not quantized becomes float32.

    Returns:
        The same model.

    Raises:
        BadOption: an unknown `upcast`.
    """
    if upcast not in ("none", "norms", "all"):
        raise BadOption(f"upcast={upcast!r}; it is none, norms or all")
    marks.adopt(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if upcast == "all":
        _upcast_all(model)
    elif upcast == "norms":
        _upcast_norms(model)
    if upcast != "none" and auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return model


def _upcast_all(model: nn.Module) -> None:
    for module in model.modules():
        if quantizer_of(module) is not None:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()


def _upcast_norms(model: nn.Module) -> None:
    for module in model.modules():
        if "norm" not in type(module).__name__.lower() or list(module.children()):
            continue
        dtypes = {p.dtype for p in module.parameters(recurse=False)} & {torch.float16, torch.bfloat16}
        if not dtypes:
            continue
        module.float()
        module.register_forward_hook(_Cast(dtypes.pop()))


class _Cast:
    """A forward hook that casts a norm's output back; a class, so that models with it can be pickled."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output


# ---- wrap ------------------------------------------------------------------------------------------------


def default_adapter() -> LoraConfig:
    """`LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")`."""
    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")


def wrap(
    model: nn.Module,
    adapter: PeftConfig | None = None,
    *,
    init: Any = None,
    original: Any = None,
    calibration: Any = None,
    tokenizer: Any = None,
    forward: str = "dequantize",
) -> PeftModel:
    """Put trainable adapters on a quantized model, whoever quantized it.

    Args:
        model: a quantized model; prepare it with `prepare_model_for_kbit_training` before or after.
        adapter: a PEFT config; default LoRA of rank 16 on all linear layers.
        init: where the adapters start: None (B = 0), "loftq", or an object such as `qft.LoftQ(steps=5)`. It wins
            over the config's `init_lora_weights` and `loftq_config`.
        original: the float model, or its folder, for inits that need float weights that are gone.
        calibration, tokenizer: for inits that need activation statistics.
        forward: "dequantize" computes x @ dequantize().T in training and in evaluation, so that what was trained is
            what is merged. "native" takes the vendor's forward, whose error bounds merges do not have.

    Returns:
        A `peft.PeftModel`, ready for any trainer.

    Raises:
        BadOption, BadShape, NoTargets: the config. UnsupportedOperation: a method that PEFT gets wrong over this
        backend. NeedsOriginal: the init. The model is as it was.
    """
    if forward not in ("dequantize", "native"):
        raise BadOption(f"forward={forward!r}; it is dequantize or native")
    record = marks.adopt(model)
    if record is None:
        raise BadOption("this model is not quantized: call qft.quantize first, or qft.quantize_and_wrap")
    if hasattr(model, "peft_config"):
        raise BadOption("this model has adapters already: model.add_adapter(name, config) adds another")
    adapter = _adapter(adapter)
    if not _is_lora(adapter):
        if init is not None:
            raise BadOption(f"init={init!r} is for LoRA adapters, not for {adapter.peft_type.value}")
        return _wrap_other(model, adapter, record)
    chosen, adapter = resolve_init(init, adapter)
    check_adapter(model, adapter)
    run = None
    if chosen is not None:
        if original is None:
            raise need_original(chosen)
        _check_init(chosen, adapter, record.quantizers.values())
        run = InitRun(chosen, adapter, model)
        run.run_over(Originals.of(original, record))
    return _wrap_lora(model, adapter, run, record, forward)


def _adapter(adapter: PeftConfig | None) -> PeftConfig:
    if adapter is None:
        return default_adapter()
    if not isinstance(adapter, PeftConfig):
        raise BadOption(
            f"adapter= is a PEFT config, such as LoraConfig(r=16, target_modules='all-linear'), not {adapter!r}"
        )
    return adapter


def _is_lora(adapter: PeftConfig) -> bool:
    return adapter.peft_type == PeftType.LORA  # AdaLoRA's config is a subclass of LoraConfig


def check_adapter(model: nn.Module, adapter: LoraConfig) -> None:
    """Everything that can be wrong with a LoRA config over this model; targets that were left open are filled in."""
    check_config(adapter)
    fill_targets(model, adapter)
    check_saved_modules(model, adapter)
    targeted(model, adapter)


def _check_init(init: Any, adapter: LoraConfig, quantizers: Iterable[Quantizer]) -> None:
    quantizers = list(quantizers)
    bits = getattr(init, "bits", None)
    have = {q.capabilities.bits for q in quantizers}
    if bits is not None and have != {bits}:
        raise BadOption(
            f"loftq_bits={bits}, and the model has {', '.join(f'{b:g}' for b in sorted(have))} bits a weight"
        )
    for q in quantizers:
        if not q.capabilities.loftq:
            raise UnsupportedOperation(
                f"{init!r} compares with the quantized weight, which {q!r} cannot give as floats"
            )
        if init.changes_base and not q.capabilities.iterated_loftq:
            raise UnsupportedOperation(
                f"{init!r} changes the quantized weights, which {q!r} cannot do (capability iterated_loftq); one step, "
                "qft.LoftQ(), leaves them alone"
            )
    if 0 in (adapter.lora_alpha, *(adapter.alpha_pattern or {}).values()):
        raise BadOption(f"lora_alpha is 0: the adapter could never do anything, and {init!r} cannot fit it")


def _wrap_lora(
    model: nn.Module, adapter: LoraConfig, run: InitRun | None, record: marks.Record, forward: str
) -> PeftModel:
    before, record.forward = record.forward, forward
    try:
        with as_it_was(model), refused_by_peft():
            peft_model = get_peft_model(model, adapter)
            if run is not None:
                run.apply(peft_model, "default")
    except BaseException:
        record.forward = before
        raise
    return peft_model


# methods that do not touch the weights, and those that PEFT has right layers for over bitsandbytes
_WEIGHTLESS = {PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING, PeftType.P_TUNING, PeftType.LN_TUNING}
_OVER_BNB = {PeftType.ADALORA, PeftType.VERA, PeftType.IA3}


_FLAGS = {"bitsandbytes_4bit": "is_loaded_in_4bit", "bitsandbytes_8bit": "is_loaded_in_8bit"}


def _wrap_other(model: nn.Module, adapter: PeftConfig, record: marks.Record) -> PeftModel:
    _check_kind(adapter, record.quantizers.values())
    check_names(model, adapter)
    with as_it_was(model), refused_by_peft(), _peft_flags(model, record):
        return get_peft_model(model, adapter)


def _check_kind(adapter: PeftConfig, quantizers: Iterable[Quantizer]) -> None:
    """Refuse a method that PEFT is not known to get right over these quantizers."""
    kind, names = adapter.peft_type, {q.name for q in quantizers}
    if kind not in _WEIGHTLESS and (kind not in _OVER_BNB or not names <= set(_FLAGS)):
        raise UnsupportedOperation(
            f"{kind.value} over {', '.join(sorted(names))} is not known to be right in PEFT, so qft refuses it; LoRA "
            "works over every backend, and ADALORA, VERA and IA3 over bitsandbytes"
        )


@contextmanager
def _peft_flags(model: nn.Module, record: marks.Record | None) -> Iterator[None]:
    """PEFT chooses its bitsandbytes layers by these flags; left on, they make TRL cast adapters to bf16."""
    for name in {q.name for q in record.quantizers.values()} & set(_FLAGS) if record is not None else ():
        setattr(model, _FLAGS[name], True)
    try:
        yield
    finally:
        for flag in _FLAGS.values():
            model.__dict__.pop(flag, None)


def quantize_and_wrap(
    model_or_path: nn.Module | str | os.PathLike[str],
    quantizer: Any = "nf4",
    *,
    adapter: PeftConfig | None = None,
    init: Any = None,
    calibration: Any = None,
    tokenizer: Any = None,
    skip: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    forward: str = "dequantize",
    use_gradient_checkpointing: bool = True,
    progress: bool = True,
    **load_options: Any,
) -> PeftModel:
    """Quantize a model, prepare it, and put trainable adapters on it: `quantize`, `prepare...`, `wrap` in one.

    Inits that need the float weights see each of them while it is quantized, so that no float copy is kept.

    Args:
        dtype: for a path: of what is loaded; "auto" is the checkpoint's own. For a model in memory: "auto" leaves it.
        use_gradient_checkpointing: as in `prepare_model_for_kbit_training`.
        (the others): as in `quantize` and `wrap`.

    Returns:
        A `peft.PeftModel`, ready for any trainer.

    Raises:
        What `quantize` and `wrap` raise; a refusal leaves a model in memory as it was.
    """
    if forward not in ("dequantize", "native"):
        raise BadOption(f"forward={forward!r}; it is dequantize or native")
    adapter, spec = _adapter(adapter), parse_spec(quantizer)
    quantizers = [q for q in spec.quantizers.values() if q is not None]
    run: InitRun | None = None
    if _is_lora(adapter):
        chosen, adapter = resolve_init(init, adapter)
        check_config(adapter)
        if chosen is not None:
            _check_init(chosen, adapter, quantizers)
            run = InitRun(chosen, adapter)
    elif init is not None:
        raise BadOption(f"init={init!r} is for LoRA adapters, not for {adapter.peft_type.value}")
    else:
        _check_kind(adapter, quantizers)
    if isinstance(model_or_path, nn.Module):
        if dtype != "auto":
            raise BadOption("dtype= is for loading from a path, and a model was given: cast it yourself, before")
        already = marks.adopt(model_or_path)
        if hasattr(model_or_path, "peft_config"):
            raise BadOption("this model has adapters already: model.add_adapter(name, config) adds another")
        if already is not None and run is not None:
            raise need_original(run.init)
    else:
        load_options["dtype"] = dtype

    def prepare(model: nn.Module, targets: Iterable[str]) -> None:
        if _is_lora(adapter):
            check_adapter(model, adapter)
            check_saved_modules(model, adapter, targets)
        else:
            check_names(model, adapter)
        if model is model_or_path:
            rehearse(model, adapter)
        if run is not None:
            run.over(model)

    model = _quantize(
        model_or_path,
        spec,
        calibration=calibration,
        skip=skip,
        device=device,
        progress=progress,
        on_weight=run.on_weight if run is not None else None,
        prepare=prepare,
        load_options=load_options,
    )
    with as_it_was(model):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing)
        record = marks.record_of(model)
        if not _is_lora(adapter):
            return _wrap_other(model, adapter, record)
        check_adapter(model, adapter)
        peft_model = _wrap_lora(model, adapter, run, record, forward)
    if progress:
        trainable, _ = peft_model.get_nb_trainable_parameters()
        print(f"  trainable: {trainable:,} parameters in {len(targeted_layers(peft_model))} layers", file=sys.stderr)
    return peft_model


def targeted_layers(model: nn.Module) -> list[str]:
    """Names of the adapted layers."""
    return [n for n, m in model.named_modules() if isinstance(m, QftLinear)]


# ---- load ------------------------------------------------------------------------------------------------


def load_adapter(
    folder: Path, base: Any, note: dict[str, Any] | None, *, is_trainable: bool, **kwargs: Any
) -> PeftModel:
    """The rest of `qft.load`, once its files are known to be sound."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise BadFolder(f"{folder / 'adapter_config.json'} is no adapter config that PEFT reads: {error}") from error
    if hasattr(base, "peft_config"):
        raise BadOption("the base has adapters already: model.load_adapter(folder, name) adds another")
    if _is_lora(config):
        if config.init_lora_weights not in KEPT_INITS:
            raise UnsupportedOperation(
                f"this adapter was started with init_lora_weights={config.init_lora_weights!r}, which rewrote its base: "
                "over any other base it is wrong; save it as a plain LoRA adapter with PEFT's "
                "path_initial_model_for_weight_conversion, and load that"
            )
        config.init_lora_weights = True
    if isinstance(base, nn.Module) and marks.adopt(base) is None:
        if note is None:
            raise BadOption(
                "the base is a float model and the folder does not say how to quantize it: quantize it first"
            )
        _check_float_base(folder, base, config, note)
    model = _base_for(folder, base, config, note, kwargs)
    record = marks.adopt(model)
    if record is None:
        raise BadOption("the base is a float model and the folder does not say how to quantize it: quantize it first")
    if note is not None:
        check_origin(note, record)
    if not _is_lora(config):
        _check_kind(config, record.quantizers.values())
    before, record.forward = record.forward, (note or {}).get("forward", record.forward)
    try:
        with as_it_was(model), _strict_load(), _peft_flags(model, None if _is_lora(config) else record):
            peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, config=config)
            if note is not None and note["base_changed"] and not record.base_changed:
                restore_base(model, folder / "base", record)
    except BaseException:
        record.forward = before
        raise
    if note is not None:
        record.init = note.get("init")
    return peft_model


def _check_float_base(folder: Path, base: nn.Module, config: PeftConfig, note: dict[str, Any]) -> None:
    """Everything that can be wrong, before a float base is quantized as the saved one was."""
    quantizers = {n: q for n, q in _spec_of(note).quantizers.items() if q is not None}
    if not _is_lora(config):
        _check_kind(config, quantizers.values())
    check_float_origin(note, base)
    rehearse_load(base, config, adapter_shapes(folder))
    if note["base_changed"]:
        check_stored_base(folder / "base", base, quantizers)


@contextmanager
def _strict_load():
    """PEFT warns of missing adapter weights, and loads a mixture: refuse that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
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


def _base_for(folder: Path, base: Any, config: PeftConfig, note: dict[str, Any] | None, kwargs: Any) -> nn.Module:
    stored = folder / "base"
    if base is None and note is not None and note["base_stored"]:
        if not (stored / "config.json").is_file():
            raise BadFolder(f"{stored} is no transformers checkpoint: pass base=, a module such as it was made from")
        device = check_device(kwargs.pop("device", None)) or default_device()
        model = load_quantized(str(stored), None, device, False, **kwargs)
        record = marks.adopt(model)
        record.fingerprint = note["fingerprint"]  # stored together: the same by construction
        record.base_changed = note["base_changed"]
        return model
    return _given_base(folder, base, config, note, kwargs)


def _given_base(folder: Path, base: Any, config: PeftConfig, note: dict[str, Any] | None, kwargs: Any) -> nn.Module:
    if base is None:
        base = config.base_model_name_or_path
        if not base:
            raise BadFolder(f"{folder} does not name its base model: pass base=")
    if isinstance(base, nn.Module):
        if marks.adopt(base) is None and note is not None:
            _quantize(base, _spec_of(note), progress=False)
        return base
    spec = _spec_of(note) if note is not None else None
    if spec is None:
        return load_quantized(os.fspath(base), None, default_device(), False, **kwargs)
    return _quantize(os.fspath(base), spec, progress=False, device=kwargs.pop("device", None), load_options=kwargs)


def _spec_of(note: dict[str, Any]) -> Spec:
    """The saved quantizers as patterns: each layer by its own name, everything else left."""
    quantizers = [get_quantizer(q) for q in note["quantizers"]]
    return Spec({**{n: quantizers[i] for n, i in note["layers"].items()}, "*": None})

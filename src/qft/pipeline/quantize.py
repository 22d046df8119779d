"""Quantize a model in memory, in place, or a folder while it is loaded."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.core import record as marks
from qft.core import transformers_quantizer
from qft.core.adopt import adopt
from qft.core.console import quiet, say
from qft.core.devices import check_device, place
from qft.core.experts import as_stack, pack_parameter, packed_weights
from qft.core.finite import ResultCheck, is_ordinary, largest_values, try_experts, try_layer
from qft.core.modes import normal_mode
from qft.core.quantizer import OnWeight, Quantizer, code_options
from qft.core.registry import Spec, file_reader, parse_spec, quantizer_of
from qft.core.selection import Selection, select, settle, target_weights
from qft.data.calibration import Batch, batches
from qft.data.collect import Group, collect
from qft.data.statistics import StatisticsKind
from qft.errors import (
    AlreadyQuantized,
    BadFolder,
    BadOption,
    NeedsCalibration,
    NeedsOriginal,
    QftWarning,
    UnsupportedDevice,
    about,
)
from qft.pipeline.audit.measure import audit
from qft.pipeline.from_pretrained import LoadingPlan, load_quantized, stored_quantization

Prepare = Callable[[nn.Module, Iterable[str]], None]
Needs = Callable[[], Mapping[str, StatisticsKind]]
"""Which statistics an init needs, by layer name; asked once the targets are settled."""


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
    """Quantize the linear layers and fused experts of a model, in place, or of a folder or hub id while it is loaded.

    Args:
        model_or_path: a model in memory, or where to load one from. From a folder the shards are streamed: the float
            model is never whole in memory.
        quantizer: a name ("nf4"), an option string ("reference:format=int,bits=3"), a quantizer object, transformers'
            own config, or a mapping of module patterns to these, the first match winning and None leaving a match as
            it is: `{"*.mlp.*": "reference:format=int,bits=3", "*": "nf4"}`.
        calibration: data for quantizers that need it.
        tokenizer: for calibration texts.
        skip: further modules to leave, as a regular expression for the whole name or a list of names. Output heads,
            tied weights, routers and what the model keeps in float32 are always left. So are layers whose weight the
            model's code reads without calling them, and layers that only select tokens: an adapter there would learn
            nothing. Fused experts go by the name of their parameter or module.
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
    return quantize_as(
        model_or_path,
        parse_spec(quantizer),
        calibration=calibration,
        tokenizer=tokenizer,
        skip=skip,
        device=device,
        progress=progress,
        load_options=load_options,
    )


def quantize_as(
    model_or_path: Any,
    spec: Spec,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    skip: Any = None,
    device: Any = None,
    progress: bool = True,
    on_weight: OnWeight | None = None,
    prepare: Prepare | None = None,
    needs: Needs | None = None,
    load_options: dict[str, Any] | None = None,
) -> nn.Module:
    """`quantize` with what the other verbs add.

    Args:
        on_weight: sees each weight while its float and its quantized form are both in hand.
        prepare: called with the model and its targets before the first weight changes, to refuse.
        needs: the statistics that `on_weight` wants.
    """
    progress = progress and not quiet()
    if spec.skip:
        skip = _joined(skip, spec.skip)
    quantizers = list(spec.quantizers.values())
    if calibration is None and spec.calibration is not None:
        calibration, tokenizer = spec.calibration, tokenizer if tokenizer is not None else spec.tokenizer
        if isinstance(calibration, str):
            raise NeedsCalibration(
                f"the data set {calibration!r} would have to be downloaded: pass calibration= with texts and tokenizer=, "
                "token ids, or a datasets.Dataset"
            )
    wanted = needs is not None or any(q is not None and q.capabilities.needs_calibration for q in quantizers)
    if calibration is not None and not wanted:
        warn_unused_calibration()
    data = _Data(calibration, tokenizer, needs) if wanted else None
    target = check_device(device)
    if isinstance(model_or_path, nn.Module):
        if load_options:
            raise BadOption(f"{', '.join(load_options)}: these are for loading from a path, and a model was given")
        with normal_mode():
            model = _quantize_in_memory(model_or_path, spec, skip, target, progress, on_weight, prepare, data)
    elif isinstance(model_or_path, str | os.PathLike):
        with normal_mode():
            model = _quantize_path(
                os.fspath(model_or_path), spec, skip, target, progress, on_weight, prepare, data, load_options or {}
            )
    else:
        raise BadOption(f"give a torch module, a folder or a hub id, not a {type(model_or_path).__name__}")
    if progress:
        say(audit(model).summary())
    return model


@dataclass
class _Data:
    """Calibration data as it was given, and what is to be gathered from it."""

    calibration: Any
    tokenizer: Any
    needs: Needs | None

    def kinds(self, targets: Mapping[str, Quantizer]) -> dict[str, StatisticsKind]:
        """What to gather of every target: a layer that nobody asks about is watched at no cost."""
        asked = self.needs() if self.needs is not None else {}
        full = {n for n, kind in asked.items() if kind == "full"}
        full |= {n for n, q in targets.items() if q.capabilities.needs_calibration and q.statistics_kind == "full"}
        return {n: "full" if n in full else "diagonal" for n in targets}

    def batches(self, model: nn.Module) -> list[Batch]:
        return batches(self.calibration, self.tokenizer, model=model)


def _check_calibration(spec: Spec, data: _Data | None) -> None:
    for q in spec.quantizers.values():
        if q is not None and q.capabilities.needs_calibration and (data is None or data.calibration is None):
            raise NeedsCalibration(
                f"{q!r} needs calibration data: pass calibration= (texts with tokenizer=, token ids, batches, a dataset)"
            )


def warn_unused_calibration() -> None:
    """Say that data was passed which nothing reads."""
    warnings.warn(
        "calibration= is not used: neither this quantizer nor this init needs data",
        QftWarning,
        stacklevel=4,
    )


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
    data: _Data | None,
) -> nn.Module:
    record = adopt(model)
    if record is not None:
        return _already(model, record, spec)
    _check_calibration(spec, data)
    if hasattr(model, "peft_config"):
        raise BadOption("this model has adapters: quantize first, then wrap")
    selection = select(model, spec.quantizers, skip)
    weights = target_weights(model, selection)
    named = {n if n in selection.stacks else f"{n}.weight": w for n, w in weights.items()}
    for name, weight in named.items():
        if weight.is_meta:
            raise UnsupportedDevice(
                f"{name} is on the meta device and has no values: load the model, or give qft.quantize its folder"
            )
    largest = dict(zip(weights, largest_values(named).values(), strict=True))
    selection = settle(selection, weights, device)
    _try_extremes(model, selection, weights, largest, device)
    if prepare is not None:
        prepare(model, [*selection.targets, *experts_modules(selection.stacks)])
    read = data.batches(model) if data is not None else []

    record = marks.Record(left=selection.left, experts=selection.experts)
    shapes: dict[str, tuple[int, ...]] = {}
    samples: dict[str, Tensor] = {}
    for name, weight in weights.items():
        shapes[name], samples[name] = tuple(weight.shape), marks.sample(weight)
        record.float_bytes += weight.numel() * weight.element_size()
    del weights, named, weight  # from here on, each float weight goes when its quantized one has come
    one_by_one = (device is None or data is not None) and all(
        type(q).quantize is Quantizer.quantize for q in set(selection.targets.values())
    )
    groups: Iterator[Group] = (Group(list(selection.targets), {}) for _ in range(1))
    if data is not None:
        kinds = data.kinds(selection.targets)
        new = any(q.statistics_through == "new" for q in selection.targets.values() if q.capabilities.needs_calibration)
        groups = collect(
            model,
            list(selection.targets),
            read,
            kinds,
            through="new" if new else "old",
            device=device,
            progress=progress,
        )
    doubts: dict[str, str] = {}
    results = ResultCheck()
    with (
        closing(groups),
        _all_or_marked(
            model, record, f"{len(selection.targets) + len(selection.stacks)} layers were to be quantized", one_by_one
        ),
    ):
        for group in groups:
            for q, names in _by_quantizer(selection.targets, group.names).items():
                if data is not None and q.capabilities.needs_calibration:
                    found = {n: q.doubt(shapes[n], group.statistics.get(n)) for n in names}
                    doubts |= {n: text for n, text in found.items() if text is not None}
                bar = _bar(progress and data is None, f"quantizing to {q.name}")
                q.quantize(
                    model,
                    names,
                    calibration=group.statistics,
                    on_weight=on_weight,
                    progress=_moving(model, device, bar),
                )
                for name in names:
                    module = model.get_submodule(name)
                    module._qft_quantizer = q
                    for parameter in module.parameters():
                        parameter.requires_grad_(False)
                    record.quantizers[name] = q
                    results.add(name, module)
            if data is not None:  # later groups would calibrate on what these compute
                results.look()
        _quantize_stacks(model, selection, record, device, on_weight, _bar(progress, "quantizing experts"), results)
        results.look()
        if device is not None:
            model.to(device)
    record.fingerprint = marks.fingerprint(shapes, samples)
    transformers_quantizer.mark(model, record)
    if doubts:
        name = next(iter(doubts))
        warnings.warn(f"{name} and {len(doubts) - 1} other layers: {doubts[name]}", QftWarning, stacklevel=4)
    return model


def _try_extremes(
    model: nn.Module,
    selection: Selection,
    weights: Mapping[str, Tensor],
    largest: Mapping[str, float],
    device: torch.device | None,
) -> None:
    """Try the weights whose values are not ordinary, so that a format that cannot hold them refuses before a change."""
    for name, q in selection.targets.items():
        if not is_ordinary(largest[name]):
            try_layer(name, model.get_submodule(name), q, device)
    for name, stack_quantizer in selection.stacks.items():
        if not is_ordinary(largest[name]):
            try_experts(name, weights[name], stack_quantizer)


def experts_modules(stacks: Iterable[str]) -> list[str]:
    """The modules that hold these fused expert weights."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in stacks))


def _quantize_stacks(
    model: nn.Module,
    selection: Selection,
    record: marks.Record,
    device: torch.device | None,
    on_weight: OnWeight | None,
    bar: Any,
    results: ResultCheck,
) -> None:
    """Pack fused experts, one weight after the other."""
    names = list(selection.stacks)
    for name in bar(names) if bar and names else names:
        parent_name, _, last = name.rpartition(".")
        value = model.get_submodule(parent_name)._parameters[last].detach()
        value = value if device is None else value.to(device)
        q: Any = selection.stacks[name]
        with about(name):
            stack = pack_parameter(model, name, q, value)
        record.quantizers[name] = q
        results.add(name, stack)
        if on_weight is not None:
            on_weight(name, as_stack(value, stack.transposed), stack.unpacked(torch.float32), None)


def _by_quantizer(targets: Mapping[str, Quantizer], names: Iterable[str]) -> dict[Quantizer, list[str]]:
    order: dict[Quantizer, list[str]] = defaultdict(list)
    for name in names:
        order[targets[name]].append(name)
    return order


def _quantize_path(
    path: str,
    spec: Spec,
    skip: Any,
    device: torch.device | None,
    progress: bool,
    on_weight: OnWeight | None,
    prepare: Prepare | None,
    data: _Data | None,
    options: dict[str, Any],
) -> nn.Module:
    stored = stored_quantization(path, options)
    chosen, reader = [q for q in spec.quantizers.values() if q is not None], file_reader(options)
    if reader is not None and chosen and all(isinstance(q, reader) for q in chosen):
        stored = reader.name
    if stored and on_weight is not None:
        raise NeedsOriginal(f"{path} is quantized already ({stored}), and the init needs the float weights: load those")
    if device is None:
        device = place(spec.quantizers.values(), stored=bool(stored))
    if not stored:
        _check_calibration(spec, data)
    # statistics take a model that runs, and transformers quantizes nothing out of a file of blocks: it waits in host memory
    if (data is not None or reader is not None) and not stored:
        model = load_quantized(
            path,
            None,
            torch.device("cpu"),
            progress,
            needed=lambda model: select(model, spec.quantizers, skip).targets,
            **options,
        )
        return _quantize_in_memory(model, spec, skip, device, progress, on_weight, prepare, data)
    plan = None if stored else LoadingPlan(spec.quantizers, skip, on_weight, prepare)
    if plan is not None:
        for q in {q for q in spec.quantizers.values() if q is not None}:
            q.on_device(device)
    model = load_quantized(path, plan, device, progress, **options)
    if plan is None:
        record = adopt(model)
        if record is None:
            raise BadFolder(f"{path} says that it is quantized ({stored}), and no quantized layer was found in it")
        return _already(model, record, spec)
    return model


def _already(model: nn.Module, record: marks.Record, spec: Spec) -> nn.Module:
    from fnmatch import fnmatchcase

    asked = {n: next((q for p, q in spec.quantizers.items() if fnmatchcase(n, p)), None) for n in record.quantizers}
    # experts, and what was stored with them, are in the format that stands for the asked one
    mixture = any(True for _ in packed_weights(marks.base_model(model)))
    twins = {n: q.for_experts() if q is not None and mixture else None for n, q in asked.items()}
    other = next((n for n, q in record.quantizers.items() if not _same(q, asked[n]) and not _same(q, twins[n])), None)
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

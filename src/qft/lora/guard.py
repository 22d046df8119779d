"""Leave a model as it was where an operation is refused: an undo for its structure, and a rehearsal of the wrapping."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from qft.core import record
from qft.core.console import without_deprecations
from qft.core.experts import PackedExperts, packed_weights
from qft.core.selection import READ, default_skips
from qft.errors import BadFolder, BadOption, MissingDependency, NoTargets, QftError, QftWarning

REFUSALS = (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, re.error)
"""What PEFT raises where a config does not fit a model."""


@contextmanager
def as_it_was(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """Run a block that wraps, freezes or marks modules; where it raises, or `always`, the model is what it was.

    Submodules, attributes, hooks, training modes and `requires_grad` come back. The values of tensors do not: the
    block must leave those alone.
    """
    modules = [(m, _shallow(m.__dict__)) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def put_back() -> None:
        for module, (attributes, contents) in modules:
            for held, content in contents:
                held.clear()
                held.update(content)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    try:
        yield
    except BaseException:
        put_back()
        raise
    if always:
        put_back()


def _shallow(attributes: dict) -> tuple[dict, list[tuple[dict, dict]]]:
    """A module's attributes, and what its own dicts (submodules, parameters, hooks, ...) hold."""
    return dict(attributes), [(v, dict(v)) for k, v in attributes.items() if isinstance(v, dict) and k.startswith("_")]


def rehearse(model: nn.Module, adapter: PeftConfig) -> None:
    """Wrap a copy of a float model that has no weights, so that what PEFT refuses is refused before anything changes.

    Raises:
        BadOption: PEFT does not take this config for this model.
    """
    with refused_by_peft():
        _wrapped_skeleton(model, adapter)


def rehearse_load(model: nn.Module, adapter: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check a file of adapter weights, given by their shapes, against a float model that is yet to be quantized.

    Raises:
        BadFolder: weights are missing, or of other shapes.
    """
    try:
        wrapped = _wrapped_skeleton(model, adapter)
    except REFUSALS as error:
        raise BadFolder(f"this adapter does not fit this base: {brief(error)}") from error
    if wrapped is None:
        return
    wants = {k: tuple(t.shape) for k, t in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()}
    missing = sorted(wants.keys() - shapes.keys())
    if missing and (len(missing) == len(wants) or shapes.keys() <= wants.keys()):
        raise BadFolder(
            f"this adapter does not fit this base: the file lacks {len(missing)} of the {len(wants)} weights that its "
            f"config asks for over a {type(model).__name__}, {missing[0]} first"
        )
    for key in sorted(wants.keys() & shapes.keys()):
        if wants[key] != shapes[key]:
            raise BadFolder(
                f"this adapter does not fit this base: {key} is {shapes[key]} in the file, and would be {wants[key]} here"
            )


def _wrapped_skeleton(model: nn.Module, adapter: PeftConfig) -> nn.Module | None:
    """A copy of a float model on the meta device with this adapter, or None where it takes values to make one."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        skeleton = copy.deepcopy(model, memo)
        if getattr(adapter, "use_qalora", False):  # PEFT's layers over floats ignore it: have ours built
            skeleton.__dict__["_qft"] = record.Record()
    except Exception:  # a model that cannot be copied: wrapping it will tell
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return get_peft_model(skeleton, copy.deepcopy(adapter), low_cpu_mem_usage=True)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" in str(error):
                return None
            raise


def check_names(model: nn.Module, adapter: PeftConfig) -> None:
    """Raise `NoTargets` where an adapter of another kind than LoRA names targets, and the model has none of them."""
    names = getattr(adapter, "target_modules", None)
    if not names or names == "all-linear":
        return
    with refused_by_peft():
        if not any(check_target_module_exists(adapter, name) for name, _ in model.named_modules()):
            raise NoTargets(f"target_modules={names!r} matches nothing in this {type(model).__name__}")
    check_called(model, adapter)


def check_not_nested(model: nn.Module, name: str) -> None:
    """Refuse to put a new adapter over others that it would be saved without, or under the name of one that is there.

    Raises:
        BadOption: the model is a `PeftModel`, or its layers have an adapter of this name.
    """
    if isinstance(model, PeftModel):
        raise BadOption("this model has adapters already: model.add_adapter(name, config) adds another")
    if any(isinstance(m, BaseTunerLayer) and name in m._get_available_adapters() for m in model.modules()):
        raise BadOption(
            f"this model has an adapter {name!r} already, whose layers the new one would share: give it another name, or "
            "delete that one first"
        )


HEADS = frozenset({"classifier", "qa_outputs", "score"})
"""Names that PEFT adds to `modules_to_save`, whichever of them the model has."""


def check_every_name(model: nn.Module, adapter: PeftConfig) -> None:
    """Refuse names in an adapter's lists that no module has: PEFT passes over them where another one matches.

    Raises:
        NoTargets: a name of `target_modules` or `modules_to_save`.
    """
    modules = [n.replace(".base_layer", "") for n, m in model.named_modules() if not isinstance(m, PackedExperts)]
    targets = getattr(adapter, "target_modules", None)
    if not isinstance(targets, str) and targets and set(targets) != _default_targets(model, adapter):
        ends = {f".{name}".split(".", i)[-1] for name in modules for i in range(1, name.count(".") + 2)}
        unknown = [t for t in _kept_by_peft(model, adapter) if t not in ends]
        if len(unknown) < len(targets):  # else nothing matches, which has an error of its own
            _refuse_parameters(model, unknown)
            refuse_unknown("target_modules", unknown, model)
        refuse_unknown("layers_to_transform", _unknown_layers(modules, adapter), model)
    saved = [t for t in getattr(adapter, "modules_to_save", None) or () if t not in HEADS]
    refuse_unknown("modules_to_save", [t for t in saved if not any(m.endswith(t) for m in modules)], model)


@contextmanager
def unknown_names_warned() -> Iterator[None]:
    """Warn of what the block refuses, where PEFT attaches an adapter: it may be a saved one, with its weights."""
    try:
        yield
    except NoTargets as error:
        warnings.warn(str(error), QftWarning, stacklevel=5)


def warn_of_patterns(model: nn.Module, adapter: PeftConfig) -> None:
    """Warn of keys of `rank_pattern` and `alpha_pattern` that no module has: one pattern may serve several models."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    names = [name.replace(".base_layer", "") for name in names]
    for field in ("rank_pattern", "alpha_pattern"):
        unknown = [k for k in getattr(adapter, field, None) or () if not any(_fits(k, name) for name in names)]
        if unknown:
            warnings.warn(
                f"{field} names {', '.join(unknown)}, and no module of this {type(model).__name__} has that name",
                QftWarning,
                stacklevel=5,
            )


def _unknown_layers(modules: list[str], adapter: PeftConfig) -> list[str]:
    """The layers of `layers_to_transform` in which no module is a target."""
    layers = getattr(adapter, "layers_to_transform", None)
    unknown = []
    for layer in [layers] if isinstance(layers, int) else layers or []:
        alone = copy.copy(adapter)
        alone.layers_to_transform = [layer]  # type: ignore[attr-defined]
        if not any(check_target_module_exists(alone, name) for name in modules):
            unknown.append(str(layer))
    return unknown if len(unknown) < len(layers if isinstance(layers, list) else [layers]) else []


def _fits(key: str, name: str) -> bool:
    """Tell whether a key of a pattern means this name, as `peft.utils.other.get_pattern_key` does."""
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except re.error:  # it is refused with the other patterns
        return True


def _kept_by_peft(model: nn.Module, adapter: Any) -> Iterable[str]:
    """The names of `target_modules` that PEFT does not take for parameters: those that fused experts had as layers."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT, which converts nothing
        return adapter.target_modules
    twin = copy.deepcopy(adapter)
    try:
        convert_peft_config_for_transformers(twin, model=model, conversions=None)
    except ValueError:  # PEFT raises it again where the adapter is attached
        return ()
    return twin.target_modules


def _refuse_parameters(model: nn.Module, names: list[str]) -> None:
    """Raise `NoTargets` where one of these is the name of a parameter, such as that of fused experts."""
    known = [name for name, _ in packed_weights(model)] + [name for name, _ in model.named_parameters()]
    for name in names:
        hit = next((n for n in known if n.endswith(f".{name}")), None)
        if hit is not None:
            raise NoTargets(
                f"target_modules names {name}, and {hit} is a parameter: name it in target_parameters, or leave it out"
            )


def refuse_unknown(field: str, unknown: list[str], model: nn.Module) -> None:
    """Raise `NoTargets` where names of a field of an adapter's config are unknown."""
    if unknown:
        raise NoTargets(
            f"{field} names {', '.join(sorted(unknown))}, and no module of this {type(model).__name__} has that name: correct "
            "it, or leave it out"
        )


def _default_targets(model: nn.Module, adapter: PeftConfig) -> set[str] | None:
    """What PEFT takes for a kind of model where the config names no targets: names of several of its variants."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(adapter.peft_type)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    found = getattr(tuner, "target_module_mapping", {}).get(kind)
    return None if found is None or isinstance(found, str) else set(found)


def check_called(model: nn.Module, adapter: PeftConfig) -> None:
    """Raise `BadOption` where an adapter names a linear layer whose weight the model's code reads without calling it."""
    if not getattr(adapter, "target_modules", None) or adapter.target_modules == "all-linear":  # type: ignore[attr-defined]
        return
    for name, reason in default_skips(model).items():
        if not reason.startswith(READ):
            continue
        hit = check_target_module_exists(adapter, name)
        if hit and type(hit).__name__ != "_ExcludedModule":
            raise BadOption(
                f"target_modules takes in {name}, and {reason}: an adapter there would never be called; leave it out"
            )


def brief(error: object) -> str:
    """What PEFT says, on one line that can be read."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else said[:300] + " ..."


@contextmanager
def refused_by_peft() -> Iterator[None]:
    """PEFT's own refusals as ours."""
    try:
        with without_deprecations():
            yield
    except QftError:
        raise
    except ImportError as error:
        raise MissingDependency(brief(error)) from error
    except REFUSALS as error:
        said = brief(error)
        if type(error).__name__ == "NoMatchingPeftModuleError":
            raise NoTargets(f"{said} 'all-linear' takes every linear layer.") from error
        raise BadOption(f"PEFT does not take this adapter config for this model: {said}") from error

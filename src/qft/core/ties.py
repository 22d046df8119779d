"""Tied weights: which tensors a model shares, and what a merge into one of them means for its config."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from qft.errors import UnsupportedOperation


def tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the parameters that the model's class ties, as (target, source): `lm_head.weight` and `embed_tokens.weight`."""
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return [(target, source) for target, source in pairs.items() if target != source]


def _own(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def settle_tie(
    plain: nn.Module,
    same: Callable[[Tensor, Tensor], bool] = torch.equal,
    own: Callable[[Tensor], nn.Parameter] = _own,
    *,
    was_tied: bool = False,
) -> None:
    """Tie weights that are equal; where training parted some, say in the config that none are tied.

    The config has one switch for all ties. Weights that are still shared get a tensor each when it is switched off: a
    shared tensor is stored under one name, and without the tie the other names would be loaded as random weights.

    Args:
        plain: a model without adapters, changed in place.
        same: whether two tensors have the same values.
        own: makes a separate parameter with the values of a tensor.
        was_tied: the config said so before; PEFT switches it off when it unloads a merged adapter from one end.
    """
    config = getattr(plain, "config", None)
    if was_tied and config is not None:
        config.tie_word_embeddings = True
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(plain, "tie_weights"):
        return
    ends = [(_parameter(plain, a), _parameter(plain, b)) for a, b in tied_pairs(plain)]
    ends += [_embeddings(plain)]
    apart = [(a, b) for a, b in ends if a is not None and b is not None and a is not b]
    if not apart:
        return
    if all(a.shape == b.shape and same(a, b) for a, b in apart):
        plain.tie_weights()
        return
    _separate(plain, own)
    config.tie_word_embeddings = False
    if hasattr(plain, "get_expanded_tied_weights_keys"):
        plain.all_tied_weights_keys = plain.get_expanded_tied_weights_keys(all_submodels=True)


def _separate(plain: nn.Module, own: Callable[[Tensor], nn.Parameter]) -> None:
    """Give each end of the model's ties a parameter of its own, except the first one of those that share it."""
    parameters: set[int] = set()
    modules: set[int] = set()
    for name in dict.fromkeys(n for pair in tied_pairs(plain) for n in reversed(pair)):
        where, _, key = name.rpartition(".")
        shared = _parameter(plain, name)
        if shared is None:
            continue
        module = plain.get_submodule(where)
        if id(shared) in parameters:
            new = own(shared)
            if id(module) in modules:  # one module under two names, as after resize_token_embeddings
                parent, _, last = where.rpartition(".")
                module = copy.deepcopy(module, {id(shared): new})
                setattr(plain.get_submodule(parent), last, module)
            else:
                module._parameters[key] = new
            shared = new
        parameters.add(id(shared))
        modules.add(id(module))


def is_tied(model: nn.Module) -> bool:
    """Whether the model's config says that it ties weights."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def check_shared_modules(base: nn.Module) -> None:
    """Refuse to merge into a module that the model also calls without the adapter, under another name.

    PEFT adapts one of the names. A merge would change all of them.

    Raises:
        UnsupportedOperation: an adapter is on such a module. Nothing was changed.
    """
    names: dict[int, list[tuple[nn.Module, str]]] = {}
    for where, parent in base.named_modules():
        if not isinstance(parent, AuxiliaryTrainingWrapper):  # it holds the module of its own adapter a second time
            for key, child in parent._modules.items():
                names.setdefault(id(child), []).append((parent, f"{where}.{key}".lstrip(".")))
    for name, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not hasattr(layer, "base_layer"):
            continue
        inside = {id(m) for m in layer.modules()}
        for module in layer.get_base_layer().modules():
            others = [n for parent, n in names.get(id(module), []) if id(parent) not in inside]
            if others and next(module.parameters(recurse=False), None) is not None:
                raise UnsupportedOperation(
                    f"{_bare(name)} and {others[0]} are one module, and the adapter is on the first name only: a merge would "
                    "change both. Nothing was merged; use qft.merge_to_float, or keep the adapter apart from its base"
                )


def check_parting(base: nn.Module) -> None:
    """Refuse to merge into one end of tied weights where the model's own code depends on the tie.

    T5 and its relatives scale the decoder's output only while `tie_word_embeddings` is set: stored with two tensors, the
    model would compute something else.

    Raises:
        UnsupportedOperation: an adapter is on one end of such a tie. Nothing was changed.
    """
    config = getattr(base, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not _reads_tie(base):
        return
    ends = {name for pair in tied_pairs(base) for name in pair}
    for name, module in base.named_modules():
        adapted = isinstance(module, AuxiliaryTrainingWrapper) or (
            isinstance(module, BaseTunerLayer) and bool(module.merged_adapters or module.active_adapters)
        )
        if adapted and not module.disable_adapters and f"{_bare(name)}.weight" in ends:
            raise UnsupportedOperation(
                f"{_bare(name)} shares its weight with other layers, and {type(base).__name__} scales its output by "
                "whether they share it: a merged model cannot be stored. Leave this layer out of target_modules, "
                "modules_to_save and trainable_token_indices, or keep the adapter apart from its base"
            )


def _reads_tie(base: nn.Module) -> bool:
    if hasattr(base.config, "scale_decoder_outputs"):
        return True
    try:
        return "tie_word_embeddings" in inspect.getsource(type(base).forward)
    except (OSError, TypeError):
        return False


def _bare(name: str) -> str:
    return name.removesuffix(".token_adapter")


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    owner, _, key = name.rpartition(".")
    try:
        return model.get_submodule(owner)._parameters.get(key)
    except AttributeError:
        return None


def _embeddings(model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    try:
        return model.get_output_embeddings().weight, model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None, None

"""Tied weights: which tensors a model shares, and what a merge into one of them means for its config."""

from __future__ import annotations

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


def settle_tie(plain: nn.Module, same: Callable[[Tensor, Tensor], bool] = torch.equal) -> None:
    """Tie weights that are equal; where training parted some, say in the config that none are tied.

    Args:
        plain: a model without adapters, changed in place.
        same: whether two tensors have the same values.
    """
    config = getattr(plain, "config", None)
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
    config.tie_word_embeddings = False
    if hasattr(plain, "get_expanded_tied_weights_keys"):
        plain.all_tied_weights_keys = plain.get_expanded_tied_weights_keys(all_submodels=True)


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

"""Generation with learnt prompts and prefixes: positions of padded rows, and caches that PEFT cannot prepend to."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftType
from torch import nn

from qft.core.console import one_line
from qft.errors import UnsupportedOperation
from qft.lora.generating import Generate

_PREFIXES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


class PrepareInputs:
    """In place of a PEFT model's `prepare_inputs_for_generation`, where its adapter is a prompt.

    PEFT drops position ids when it prepends a prompt, so that left padding would lie between the prompt and the tokens.
    It cannot prepend to a cache of a fixed size, and it prepends a prefix again and again where there is no cache.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model: Any = self.model
        plain = type(model).prepare_inputs_for_generation
        config = model.active_peft_config
        if not config.is_prompt_learning:
            return plain(model, *args, **kwargs)
        _refuse(config, kwargs)
        made = plain(model, *args, **kwargs)
        if config.peft_type not in _PREFIXES:
            _count_positions(model.get_base_model(), made)
        return made


def _refuse(config: Any, kwargs: dict[str, Any]) -> None:
    from transformers import DynamicCache

    cache, name = kwargs.get("past_key_values"), config.peft_type.value
    if config.peft_type in _PREFIXES and kwargs.get("use_cache") is False:
        raise UnsupportedOperation(f"{name} keeps its prefix in the cache: generate with use_cache=True")
    if cache is not None and hasattr(cache, "layers") and not isinstance(cache, DynamicCache):
        raise UnsupportedOperation(
            f"{name} cannot be put before a {type(cache).__name__}, whose size is fixed without it: generate without "
            "cache_implementation"
        )


def _count_positions(base: nn.Module, made: dict[str, Any]) -> None:
    """Count positions over the tokens that the mask shows, as transformers does without a prompt."""
    mask = made.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return
    given = made.get("inputs_embeds")
    length = (made["input_ids"] if given is None else given).shape[1]
    positions = (mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)
    made["position_ids"] = positions[:, -length:]


def prepare_prompts(model: nn.Module) -> None:
    """Have a PEFT model generate as `PrepareInputs` says, if it is a causal language model with a prompt."""
    Generate.put_on(model.get_base_model())
    if isinstance(model, PeftModelForCausalLM) and any(c.is_prompt_learning for c in model.peft_config.values()):
        check_prefix(model)
        model.__dict__["prepare_inputs_for_generation"] = PrepareInputs(model)


def check_prefix(model: PeftModelForCausalLM) -> None:
    """Refuse a prefix that the model cannot read, by one token: its cache may have other shapes than PEFT makes.

    Raises:
        UnsupportedOperation: such as over linear attention, or over heads that share one key.
    """
    config, weight = model.active_peft_config, next(model.parameters())
    if config.peft_type not in _PREFIXES or weight.device.type == "meta":
        return
    training = [module for module in model.modules() if module.training]
    token = torch.ones(1, 1, dtype=torch.long, device=model.get_base_model().get_input_embeddings().weight.device)
    try:
        with torch.no_grad():
            model.eval()
            model(input_ids=token, attention_mask=torch.ones_like(token))
    except Exception as error:  # of many kinds, from deep within the model
        name = type(model.get_base_model()).__name__
        raise UnsupportedOperation(
            f"{config.peft_type.value} does not work over {name}, with plain PEFT neither ({one_line(error)}); prompt tuning "
            "and LoRA do"
        ) from error
    finally:
        for module in training:
            module.training = True

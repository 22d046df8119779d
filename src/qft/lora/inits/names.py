"""Names to inits: what `init=`, and PEFT's own words for the same, mean."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from torch import nn

from qft.core.registry import parse_options
from qft.errors import BadOption, NeedsOriginal
from qft.lora.inits.base import AdapterInit, FromFunction
from qft.lora.inits.loftq import LoftQ
from qft.lora.inits.principal import OLoRA, PiSSA
from qft.lora.inits.qera import QERA, Auto, QERAFull
from qft.lora.model import KEPT_INITS

_inits: dict[str, type[AdapterInit] | Callable[..., Any]] = {
    cls.name: cls for cls in (LoftQ, QERA, QERAFull, PiSSA, OLoRA, Auto)
}
_ZERO = ("zero", "default")


def register_init(name: str, init: Any = None, *, replace: bool = False) -> Any:
    """Register an init under a name, directly or as a decorator; `init=name` then means it.

    Args:
        name: how it is called, such as `"mine"`; options of a class follow a colon, `"mine:steps=3"`.
        init: an `AdapterInit` class, or a function `(weight, quantized, rank, scaling, *, statistics) → (A, B)`.
        replace: allow a name that is taken.

    Raises:
        BadOption: a name that is taken or cannot be written, or something that is no init.

    Example:
        >>> @qft.register_init("mine")
        ... def mine(weight, quantized, rank, scaling, *, statistics): ...
    """
    if init is None:
        return lambda made: register_init(name, made, replace=replace)
    if not isinstance(name, str) or not name or any(c in name for c in ":,=* \t\n"):
        raise BadOption(f"an init cannot be called {name!r}: names are strings without spaces and ':,=*'")
    if isinstance(init, type):
        if not issubclass(init, AdapterInit) or not dataclasses.is_dataclass(init):
            raise BadOption(f"{init!r} is no init: subclass qft.AdapterInit as a frozen dataclass, or give a function")
    elif not callable(init):
        raise BadOption(f"{init!r:.100} is no init: give an AdapterInit class or a function")
    if (name in _inits or name in _ZERO) and not replace:
        raise BadOption(f"the name {name!r} is taken; pass replace=True to take it over")
    _inits[name] = init
    return init


def make_init(init: Any) -> AdapterInit | None:
    """An init from a name with options, an object, a class or a function; None for PEFT's own start."""
    if init is None or (isinstance(init, str) and init in _ZERO):
        return None
    if isinstance(init, str):
        name, _, text = init.partition(":")
        found = _inits.get(name.strip())
        if found is None:
            near = difflib.get_close_matches(name.strip().lower(), _inits, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise BadOption(f"no init is called {name!r}; {hint}known: {', '.join(_inits)}, zero (PEFT's own start)")
        options = parse_options(init, text)
        if not isinstance(found, type):
            if options:
                raise BadOption(f"{init!r}: {name} is a function and takes no options")
            return FromFunction(found)
        known = [f.name for f in dataclasses.fields(found)]
        if unknown := [k for k in options if k not in known]:
            raise BadOption(f"{init!r}: {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        return _made(found, options)
    if isinstance(init, AdapterInit):
        return init
    if isinstance(init, type) and issubclass(init, AdapterInit):
        return _made(init, {})
    if callable(init) and not isinstance(init, type | nn.Module):
        return FromFunction(init)
    raise BadOption(
        f"init={init!r:.100} is no init: give a name such as 'loftq', an object such as qft.LoftQ(steps=5), or a function"
    )


def _made(cls: type[AdapterInit], options: dict[str, Any]) -> AdapterInit:
    try:
        return cls(**options)
    except TypeError as error:  # abstract, or an option without a default
        raise BadOption(f"init {cls.__name__}: {error}") from error


def resolve_init(init: Any, config: LoraConfig) -> tuple[AdapterInit | None, LoraConfig]:
    """The init that was asked for, by `init=` or by PEFT's own words, and the config to wrap with.

    The returned config never asks PEFT to initialise from float weights, and is saved saying `True`.

    Raises:
        BadOption: an unknown init, or one of PEFT's that has no counterpart over a quantized base.
    """
    config = copy.copy(config)
    asked = config.init_lora_weights
    if init is None and isinstance(asked, str) and asked not in KEPT_INITS:
        init = _translated(asked, config)
    if asked not in KEPT_INITS:
        config.init_lora_weights = True
    config.loftq_config = {}
    made = make_init(init)
    if made is not None:
        config.init_lora_weights = True
    return made, config


def _translated(asked: str, config: LoraConfig) -> AdapterInit:
    """PEFT's word for an init that reads or rewrites the float weights, as ours."""
    if asked == "loftq":
        options = dict(config.loftq_config or {})
        steps = options.pop("loftq_iter", 1)
        bits = options.pop("loftq_bits", None)
        if options:
            raise BadOption(f"loftq_config has no {sorted(options)}; it has loftq_bits and loftq_iter")
        return LoftQ(steps=steps, bits=bits)
    if asked == "pissa" or re.fullmatch(r"pissa_niter_\d+", asked):
        return PiSSA()
    if asked == "olora":
        return OLoRA()
    raise BadOption(
        f"init_lora_weights={asked!r} is none that works over a quantized base, which has no float weights to "
        "start from or rewrite; init='loftq' starts from the quantization error instead"
    )


def settle_auto(init: AdapterInit | None, *, data: bool, floats: bool) -> AdapterInit | None:
    """`auto` as the init that the inputs allow; any other as it is.

    Args:
        data: calibration data was given.
        floats: the float weights are, or will be, in hand.
    """
    if not isinstance(init, Auto):
        return init
    if not floats:
        return None
    return init if data else LoftQ()


def need_original(init: AdapterInit) -> NeedsOriginal:
    """The error for an init over a model whose float weights are gone."""
    return NeedsOriginal(
        f"{init!r} needs the float weights, and this model is quantized already: pass original= (the float model, or "
        "its folder), or let qft.quantize_and_wrap quantize and initialise in one go"
    )

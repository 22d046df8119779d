"""The model of a plan: built from its config on "meta", and weighed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn

from qft.core import record
from qft.core.configs import check_model_config, read_json_object
from qft.core.console import one_line
from qft.core.quantizer import Quantizer, float_weight
from qft.core.registry import parse_spec
from qft.core.selection import Selection, select, settle, target_weights
from qft.errors import BadFolder, BadOption, UnsupportedOperation
from qft.lora.model import check_config, fill_targets, targeted
from qft.memory.profile import rounded
from qft.pipeline.from_pretrained import read_config

NOT_MODELLED = ("use_dora", "use_qalora", "modules_to_save", "trainable_token_indices", "lora_bias")


def hollow(source: Any, dtype: torch.dtype | None) -> nn.Module:
    """The float model on "meta", from a config, a model in memory or a folder; nothing is downloaded.

    Raises:
        BadFolder: no config in that folder. BadOption: something else. UnsupportedOperation: an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    kind: Callable[[Any], nn.Module] = lambda c: AutoModelForCausalLM.from_config(c, dtype=dtype or c.dtype)  # noqa: E731
    if isinstance(source, nn.Module):
        base = record.base_model(source)
        config = getattr(base, "config", None)
        if not isinstance(config, PretrainedConfig):
            raise BadOption(f"{type(base).__name__} has no config of transformers to build it from without its weights")
        floats = [p.dtype for p in base.parameters() if p.is_floating_point() and not p.requires_grad]
        own = dtype or config.dtype or (floats[0] if floats else torch.bfloat16)
        kind = lambda c: type(base)(c).to(own)  # noqa: E731
    elif isinstance(source, PretrainedConfig):
        config = source
    elif isinstance(source, str | os.PathLike):
        config = _read_config(os.fspath(source))
    else:
        raise BadOption(f"give a model, a config of transformers or a folder, not a {type(source).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedOperation(
            f"{config.model_type} is an encoder-decoder, whose two stacks hold activations at once: plans are for decoders"
        )
    check_model_config(config.to_dict(), type(config).__name__)
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if not isinstance(source, nn.Module) and dtype is None and config.dtype is None:
        config.dtype = torch.bfloat16
    try:
        with torch.device("meta"):
            return kind(config).train()
    except ValueError as error:
        raise UnsupportedOperation(
            f"transformers has no causal language model for {type(config).__name__}: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # of values that no check of a config's fields finds
        where = type(config).__name__ if isinstance(source, nn.Module | PretrainedConfig) else source
        raise BadFolder(
            f"no model can be built from the config of {where} ({type(error).__name__}: {one_line(error)})"
        ) from error


def _read_config(path: str) -> Any:
    """Read the config of a folder, or of a JSON file that holds one.

    Raises:
        BadFolder: there is none, or it cannot be read.
    """
    if not os.path.isfile(path):
        return read_config(path, {"local_files_only": True})
    from transformers import AutoConfig

    check_model_config(read_json_object(path), path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of many kinds, by the field
        raise BadFolder(f"{path} is no model config that can be read: {one_line(error)}") from error


@dataclass
class Weights:
    """Bytes of what lies on the device all the time, and of what is trained.

    Attributes:
        trained: numbers of elements of each adapter weight, float32 masters.
        largest: the largest float weight that is quantized, in its own dtype: loading holds one.
        floats: of the float model.
    """

    codes: int = 0
    constants: int = 0
    embeddings: int = 0
    other: int = 0
    trained: tuple[int, ...] = ()
    largest: int = 0
    floats: int = 0
    quantized: tuple[tuple[str, int], ...] = ()

    @property
    def adapters(self) -> int:
        return sum(rounded(4 * n) for n in self.trained)

    @property
    def frozen(self) -> int:
        return self.codes + self.constants + self.embeddings + self.other


@dataclass
class Outline:
    """A model on "meta" with its quantizers and ranks."""

    model: nn.Module
    selection: Selection
    ranks: dict[str, int]
    adapter: Any
    weights: Weights
    dtype: torch.dtype


@lru_cache(maxsize=512)
def _nbytes(quantizer: Quantizer, shape: tuple[int, ...]) -> int:
    return quantizer.nbytes(shape)


def weight_bytes(quantizer: Quantizer, shape: tuple[int, ...]) -> int:
    """Codes and constants of a weight (out, in), or of fused experts (experts, out, in)."""
    return prod(shape[:-2]) * _nbytes(quantizer, tuple(shape[-2:]))


def outline(source: Any, quantizer: Any, adapter: Any, dtype: torch.dtype | None, skip: Any = None) -> Outline:
    """Choose, as `quantize` and `wrap` would, what is quantized and what gets an adapter, and weigh it."""
    from peft import LoraConfig

    from qft.pipeline.wrap import default_adapter, is_lora

    adapter = copy.deepcopy(adapter) if adapter is not None else default_adapter()
    if not isinstance(adapter, LoraConfig) or not is_lora(adapter):
        raise UnsupportedOperation(f"plans are for LoRA adapters, not for {type(adapter).__name__}")
    there = [name for name in NOT_MODELLED if getattr(adapter, name, None)]
    if there:
        raise UnsupportedOperation(f"plans do not know the memory of {', '.join(there)}: leave it out for an estimate")
    check_config(adapter)
    model = hollow(source, dtype)
    spec = parse_spec(quantizer)
    selection = select(model, spec.quantizers, [*(skip or ()), *spec.skip] or None)
    selection = settle(selection, target_weights(model, selection))
    fill_targets(model, adapter)
    ranks = targeted(model, adapter)
    weights = target_weights(model, selection)
    return Outline(
        model, selection, ranks, adapter, _weighed(model, selection, ranks), next(iter(weights.values())).dtype
    )


def _weighed(model: nn.Module, selection: Selection, ranks: Mapping[str, int]) -> Weights:
    found = Weights()
    shapes = target_weights(model, selection)
    inside: set[int] = set()
    each: list[tuple[str, int]] = []
    for name, weight in shapes.items():
        q = selection.targets.get(name) or selection.stacks[name]
        nbytes = weight_bytes(q, tuple(weight.shape))
        codes = min(nbytes, int(weight.numel() * q.capabilities.bits) // 8)
        found.codes, found.constants = found.codes + codes, found.constants + nbytes - codes
        found.largest = max(found.largest, weight.numel() * weight.element_size())
        each.append((name, nbytes))
        where, _, last = (f"{name}.weight" if name in selection.targets else name).rpartition(".")
        inside.add(id(model.get_submodule(where)._parameters[last]))
    found.quantized = tuple(each)
    tables = {id(p) for m in _tables(model) for p in m.parameters(recurse=False)}
    for tensor in [*model.parameters(), *model.buffers()]:  # a tied one comes once
        nbytes = tensor.numel() * tensor.element_size()
        found.floats += nbytes
        if id(tensor) in inside:
            continue
        if id(tensor) in tables:
            found.embeddings += rounded(nbytes)
        else:
            found.other += rounded(nbytes)
    trained: list[int] = []
    for name, rank in ranks.items():
        shape = shape_of(model, name)
        trained += [prod(shape[:-2]) * rank * shape[-1], prod(shape[:-2]) * rank * shape[-2]]
    found.trained = tuple(trained)
    return found


def _tables(model: nn.Module) -> list[nn.Module]:
    found = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    return [m for m in found if m is not None]


def shape_of(model: nn.Module, name: str) -> tuple[int, ...]:
    """(out, in) of a linear layer, (experts, out, in) of a fused weight."""
    where, _, last = name.rpartition(".")
    owner = model.get_submodule(where)
    if last in owner._parameters:
        shape = tuple(owner._parameters[last].shape)  # type: ignore[union-attr]
        return (shape[0], shape[2], shape[1]) if owner.is_transposed else shape
    return tuple(float_weight(model.get_submodule(name)).shape)

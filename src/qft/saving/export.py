"""Export: the float model with its adapters merged in, written layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qft.core import record, transformers_quantizer
from qft.core.files import as_path, atomic_folder
from qft.core.quantizer import as_float_dtype
from qft.errors import BadFolder, BadOption, NonFiniteWeights, QftError
from qft.lora.merging.lazy_float_model import HollowModel
from qft.lora.merging.merge import originals_for_floats, require_float_merge
from qft.lora.merging.report import MergeReport
from qft.saving.card import write_card
from qft.saving.shards import ShardWriter, check_size

FORMATS = ("safetensors", "gguf")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")


@torch.no_grad()
def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    original: Any = None,
    format: str = "safetensors",
    tokenizer: Any = None,
    max_shard_size: int | str = "2GB",
) -> MergeReport:
    """Write the float model with the active adapters merged in, as one loads it without qft or PEFT.

    The weights are those of `qft.merge_to_float`, to the bit, and the float model is never whole in memory: beyond
    `model` itself there are the floats of one layer, or of the layers that transformers stores as one tensor.
    Everything is written under a temporary name and renamed at the end; weights of an earlier export are replaced.

    Args:
        model: a wrapped model, or a quantized one without adapters; it stays as it is.
        folder: created where it does not exist.
        dtype: of the files; None is that of the float model. GGUF takes float32, float16 and bfloat16.
        original: the float model that was quantized, or its folder: the adapters are merged into its weights.
        format: "safetensors" for `transformers` (a plain module becomes its state dict), or "gguf" for llama.cpp:
            one file `model.gguf`, of Llama, Mistral and Qwen2.
        tokenizer: written along; "gguf" needs it.
        max_shard_size: of a safetensors file, in bytes or as text; a single larger tensor has a file of its own.

    Returns:
        What `merge_to_float` leaves in `merge_report`. It is also in the folder's README.md, a model card; a
        README.md that qft did not write is kept.

    Raises:
        BadOption: a float model, an unknown format, dtype or size, a tokenizer that the format does not take.
        UnsupportedOperation: weights that cannot be had as floats, an adapter that cannot be merged, or an
            architecture that the format does not have.
        NonFiniteWeights: an adapter with NaN or infinity, or a weight too large for `dtype`.
        BadFolder: the folder cannot be written, the disk is full, or the folder holds an adapter, which
            `from_pretrained` would put over the merged weights.
        MissingDependency: "gguf" without the package gguf.

        In all of them the folder is what it was.
    """
    final = as_path(folder)
    if format not in FORMATS:
        raise BadOption(f"format={format!r} is not known; the formats are {', '.join(FORMATS)}")
    check_size(max_shard_size)
    wanted = None if dtype is None else as_float_dtype(dtype)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise BadOption(f"tokenizer= is a tokenizer of transformers, not a {type(tokenizer).__name__}")
    require_float_merge(model)
    originals = originals_for_floats(model, original)
    _check_adapters(record.base_model(model))
    if format == "safetensors" and os.path.exists(final / "adapter_config.json"):
        raise BadFolder(
            f"{final} holds an adapter, which from_pretrained would put over the merged weights once more: export into "
            "another folder"
        )
    if format == "gguf":
        from qft.saving import gguf

        gguf.check_installed()
    hollow = HollowModel(model, wanted, originals)
    if format == "gguf":
        write = gguf.plan(hollow, tokenizer)
    with atomic_folder(final, drop=_WEIGHTS if format == "safetensors" else ("model.gguf",)) as partial:
        if format == "gguf":
            write(partial / "model.gguf")
        else:
            _write_folder(hollow, partial, tokenizer, max_shard_size)
        write_card(partial, final, model, hollow, format)
    return hollow.report


def _check_adapters(base: nn.Module) -> None:
    """Refuse NaN and infinity before anything is computed."""
    for name, layer in base.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            groups = [layer.modules_to_save]
        elif isinstance(layer, BaseTunerLayer) and not layer.merged:
            groups = [getattr(layer, group, None) for group in layer.adapter_layer_names]
        else:
            continue
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            parts = [g[adapter] for g in groups if isinstance(g, nn.ModuleDict | nn.ParameterDict) and adapter in g]
            for tensor in (t for p in parts for t in (p.parameters() if isinstance(p, nn.Module) else [p])):
                if not tensor.isfinite().all():
                    raise NonFiniteWeights(f"adapter {adapter!r} holds NaN or infinity at {name}: nothing was written")


# ---- safetensors -------------------------------------------------------------------------------------------


def _write_folder(hollow: HollowModel, folder: Path, tokenizer: Any, max_shard_size: int | str) -> None:
    if isinstance(hollow.model, PreTrainedModel):
        with no_progress_bar():  # with no weights, transformers writes all that goes beside them
            hollow.model.save_pretrained(folder, state_dict={})
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    blocks = _blocks(hollow)
    files = {name: tensor for block in blocks for name, tensor in block.files.items()}
    count = sum(p.numel() for p in hollow.model.parameters())
    shards = ShardWriter(folder, files, max_shard_size, {"total_parameters": count})
    try:
        for block in blocks:
            for name, tensor in block.tensors(hollow):
                shards.write(name, tensor)
        shards.finish()
    finally:
        shards.close()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without transformers' own bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except (OSError, QftError):
        raise
    except Exception as error:  # the tokenizers library has no type for what the system refuses
        raise BadFolder(f"cannot write the tokenizer: {error}") from error


@dataclass
class _Block:
    """Tensors of the model that become tensors of the files together.

    Attributes:
        keys: names in the model's state dict.
        files: name in the files → tensor on "meta".
        converted: transformers splits or fuses them; else one key has one file name.
        context: what its conversion must see beside them.
    """

    keys: list[str]
    files: dict[str, Tensor]
    converted: bool = False
    context: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self, hollow: HollowModel) -> Iterator[tuple[str, Tensor]]:
        values = {key: hollow(key) for key in self.keys}
        if self.converted:
            values = _convert(hollow.model, {**self.context, **values})
        else:
            values = dict(zip(self.files, values.values(), strict=True))
        for name in self.files:
            yield name, values.pop(name)


def _blocks(hollow: HollowModel) -> list[_Block]:
    """The model's tensors as the files have them, in the order of the files."""
    model, state = hollow.model, dict(hollow.state)
    if not isinstance(model, PreTrainedModel):
        first: dict[int, str] = {}
        for key, tensor in state.items():
            first.setdefault(id(tensor), key)
        return [_Block([key], {key: state[key]}) for key in first.values()]
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    state = remove_tied_weights_from_state_dict(state, model)
    files = _convert(model, state)
    by_id = {id(tensor): key for key, tensor in state.items()}
    blocks = [_Block([by_id[id(t)]], {name: t}) for name, t in files.items() if id(t) in by_id]
    taken = {key for block in blocks for key in block.keys}
    rest = [key for key in state if key not in taken]
    blocks += _converted_blocks(model, state, rest, {n: t for n, t in files.items() if id(t) not in by_id})
    order = {name: i for i, name in enumerate(files)}
    return sorted((b for b in blocks if b.files), key=lambda b: min(order[name] for name in b.files))


def _converted_blocks(
    model: nn.Module, state: dict[str, Tensor], keys: list[str], files: dict[str, Tensor]
) -> list[_Block]:
    """Split what transformers converts into the smallest groups that can be converted one by one."""
    from transformers.core_model_loading import WeightConverter

    back = [
        c.reverse_transform()
        for c in transformers_quantizer.weight_conversions(model)[::-1]
        if isinstance(c, WeightConverter)
    ]
    groups: dict[str, list[str]] = {}
    for key in keys:
        found = (c.rename_source_key(key) for c in back)
        target = next((renamed for renamed, pattern in found if pattern is not None), key)
        groups.setdefault(target, []).append(key)
    blocks = [_Block(group, _convert(model, {k: state[k] for k in group}), True) for group in groups.values()]
    together = {n: (t.shape, t.dtype) for b in blocks for n, t in b.files.items()}
    if together != {n: (t.shape, t.dtype) for n, t in files.items()}:  # names that hang on those of other groups
        return [_Block(keys, files, True, state)]
    return blocks


def _convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)

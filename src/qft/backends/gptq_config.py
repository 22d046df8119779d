"""The `quantization_config` of GPTQ checkpoints: what it means for `GPTQ`, and what `GPTQ` writes into it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.errors import BadOption

if TYPE_CHECKING:
    from qft.backends.gptq import GPTQ

_NAMES = {"bits": "bits", "group_size": "group_size", "desc_act": "desc_act", "sym": "symmetric",
          "damp_percent": "damp_percent", "act_group_aware": "act_group_aware"}  # fmt: skip

_ELSEWHERE = frozenset({
    # what was or will be quantized: the checkpoint's tensors, and `quantize`, say so themselves
    "quant_method", "method", "format", "checkpoint_format", "lm_head", "dataset", "tokenizer", "model_seqlen",
    "batch_size", "pad_token_id", "block_name_to_quantize", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "cache_block_outputs", "true_sequential", "static_groups", "mse",
    # other tools' kernels, versions and files
    "meta", "backend", "max_input_length", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16",
    "model_name_or_path", "model_file_base_name", "damp_auto_increment", "pack_impl", "offload_to_disk",
    "offload_to_disk_path", "quantizer", "_attn_implementation_autoset", "transformers_version",
})  # fmt: skip


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `GPTQ` that a checkpoint's `quantization_config`, or transformers' `GPTQConfig`, names.

    Raises:
        BadOption: options that change what the codes mean and that `GPTQ` does not have.
    """
    found = {ours: config[theirs] for theirs, ours in _NAMES.items() if config.get(theirs) is not None}
    if found.get("desc_act"):
        found.pop("act_group_aware", None)
    if "bits" not in found:
        raise BadOption("this GPTQ config does not say how many bits its codes have")
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    layout = str(getattr(layout, "value", layout)).lower()
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise BadOption(
            f"the checkpoint format {layout!r} is one kernel's own: qft reads gptq and gptq_v2; save the model in one of "
            "these with the tool that quantized it"
        )
    found["checkpoint_format"] = layout
    word = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if word != "int32":
        raise BadOption(f"codes packed in {word} words: qft reads int32 ones")
    for pattern, changes in (config.get("dynamic") or {}).items():
        if pattern.startswith("-"):  # left in float
            continue
        for key, value in (changes or {}).items():
            if value != config.get(key):
                raise BadOption(
                    f"dynamic gives layers like {pattern!r} their own {key}={value!r}: qft reads GPTQ checkpoints whose "
                    "layers have the same options"
                )
    for key, value in config.items():
        if key not in _NAMES and key not in _ELSEWHERE and key not in ("pack_dtype", "is_marlin_format", "dynamic"):
            if value not in (None, False, "", 0) and value != {} and value != []:
                raise BadOption(f"this GPTQ config has the option {key}={value!r}, which qft does not know")
    return found


def written(quantizer: GPTQ, quantized: Sequence[str], skipped: Sequence[str]) -> Any | None:
    """Make transformers' `GPTQConfig` for a model whose `quantized` linear layers are, and `skipped` ones are not.

    transformers replaces the linear layers of one stack of blocks, all of them or those whose names end as listed.
    None where that cannot say which they are: it would draw the others' weights at random.
    """
    from transformers import GPTQConfig

    stacks = {re.split(r"\.\d+\.", name, maxsplit=1)[0] if re.search(r"\.\d+\.", name) else "" for name in quantized}
    if len(stacks) != 1 or "" in stacks:
        return None
    stack = stacks.pop()
    ends = None
    inside = [n for n in (s.removeprefix("^").removesuffix("$") for s in skipped) if n.startswith(stack)]
    if inside:
        ends = list(dict.fromkeys(re.split(r"\.\d+\.", n, maxsplit=1)[1] for n in quantized))
        if any(n.endswith(tuple(ends)) for n in inside):
            ends = list(quantized)
        if any(n.endswith(tuple(ends)) for n in inside):
            return None
    config = GPTQConfig(
        bits=quantizer.bits,
        group_size=quantizer.group_size,
        damp_percent=quantizer.damp_percent,
        desc_act=quantizer.desc_act,
        act_group_aware=quantizer.act_group_aware and not quantizer.desc_act,  # it warns of both
        sym=quantizer.symmetric,
        format=quantizer.checkpoint_format,
        block_name_to_quantize=stack,
    )
    if ends is not None:  # set afterwards: the constructor asks for optimum
        config.modules_in_block_to_quantize = [ends]
    return config

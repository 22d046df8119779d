"""GGUF, llama.cpp's file format: names, metadata and vocabulary of Llama-like models, tensors one at a time.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written through the package gguf.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft.errors import BadOption, MissingDependency, UnsupportedOperation
from qft.lora.merging.lazy_float_model import HollowModel

_CLASSES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# llama.cpp knows a pre-tokenizer by name: the ones whose splitting is certain, by their regular expressions
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2", _TEKKEN: "tekken"}


def check_installed() -> None:
    """Raise `MissingDependency` without the package gguf."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependency("format='gguf' needs the package gguf, not installed here: pip install gguf") from error


def plan(hollow: HollowModel, tokenizer: Any) -> Callable[[Path], None]:
    """Check that the model and the tokenizer can be had as GGUF; a function that writes the file.

    Raises:
        BadOption: no tokenizer, or one that llama.cpp would read differently.
        UnsupportedOperation: an architecture, an option of it, or a dtype that the file cannot hold.
    """
    import gguf

    model, config = hollow.model, getattr(hollow.model, "config", None)
    ours = type(model).__module__.startswith("transformers.models.")  # a subclass may compute something else
    arch_name = _CLASSES.get(type(model).__name__) if ours else None
    if arch_name is None:
        raise UnsupportedOperation(
            f"format='gguf' writes {', '.join(_CLASSES)}, and this is a {type(model).__name__}; format='safetensors' "
            "writes every model"
        )
    _check_config(config, arch_name)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch_name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    seen: set[int] = set()
    tensors: dict[str, tuple[str, torch.dtype]] = {}  # name in the file → name in the model, dtype in the file
    for key, tensor in hollow.state.items():
        if id(tensor) in seen:  # a tied head
            continue
        seen.add(id(tensor))
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None or tensor.dtype not in _FLOATS:
            raise UnsupportedOperation(
                f"{key}, {tensor.dtype}, has no place in a GGUF file of {arch_name}: give dtype= one of float32, float16, "
                "bfloat16, or use format='safetensors'"
            )
        tensors[name] = (key, torch.float32 if tensor.ndim == 1 else tensor.dtype)  # llama.cpp wants norms in float32
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path=None, arch=arch_name)
        try:
            _add_config(writer, config, model.dtype)
            vocabulary(writer)
            factors = _rope_factors(config)
            if factors is not None:
                _add_info(writer, "rope_freqs.weight", factors.shape, torch.float32)
            for name, (key, dtype) in tensors.items():
                _add_info(writer, name, hollow.state[key].shape, dtype)
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                _write(writer, factors)
            for name, (key, dtype) in tensors.items():
                value = hollow(key).to("cpu", dtype)
                count = next((n for part, n in heads.items() if part in name and arch_name == "llama"), None)
                _write(writer, value if count is None else _interleave(value, count))
        finally:
            writer.close()

    return write


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """The rows of q or k as llama.cpp's rotary embedding wants them: pairs beside each other, not in halves.

    `weight` is (heads * head_dim, in_features), or a bias (heads * head_dim,).
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _add_info(writer: Any, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    import gguf
    import numpy as np

    kind, width = {
        torch.float32: (gguf.GGMLQuantizationType.F32, np.float32),
        torch.float16: (gguf.GGMLQuantizationType.F16, np.float16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, np.uint16),  # numpy has no bfloat16
    }[dtype]
    writer.add_tensor_info(name, tuple(shape), np.dtype(width), shape.numel() * dtype.itemsize, raw_dtype=kind)


def _write(writer: Any, value: Tensor) -> None:
    value = value.contiguous()
    writer.write_tensor_data((value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy())


# ---- metadata ----------------------------------------------------------------------------------------------


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_config(config: Any, arch: str) -> None:
    rope = _rope(config)
    layers = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    short = (
        window is not None and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True)
    )
    kept = {
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "silu",
        "attention_bias": arch == "llama" and getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        f"sliding_window={window}": short or "sliding_attention" in layers,
        f"rope_type={rope.get('rope_type')!r}": rope.get("rope_type", "default") not in ("default", "linear", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"head_dim={_head_dim(config)}": arch == "qwen2"
        and _head_dim(config) * config.num_attention_heads != config.hidden_size,
    }
    bad = [name for name, hit in kept.items() if hit]
    if bad:
        raise UnsupportedOperation(
            f"this model's {', '.join(bad)} cannot be said in a GGUF file of {arch}: use format='safetensors'"
        )


def _add_config(writer: Any, config: Any, dtype: torch.dtype) -> None:
    import gguf

    types = gguf.LlamaFileType
    kinds = {torch.float32: types.ALL_F32, torch.float16: types.MOSTLY_F16, torch.bfloat16: types.MOSTLY_BF16}
    rope, head_dim = _rope(config), _head_dim(config)
    writer.add_file_type(kinds[dtype])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides Llama 3's rotary frequencies by, float32 (head_dim / 2,)."""
    if _rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = _head_dim(config)
    plain = _rope(config)["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / scaled).float()


# ---- vocabulary --------------------------------------------------------------------------------------------


def _vocabulary(tokenizer: Any, vocab_size: int) -> Callable[[Any], None]:
    """Check a tokenizer; a function that adds it to a writer."""
    import gguf

    if tokenizer is None:
        raise BadOption("format='gguf' holds the vocabulary too: give tokenizer=")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {}
    pre = _pre_tokenizer(parts)
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    before, after = _added(tokenizer, special["bos"], special["eos"])
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    added = {t["id"]: t for t in parts["added_tokens"]}
    for token, i in {**parts["model"]["vocab"], **{t["content"]: i for i, t in added.items()}}.items():
        if i >= vocab_size:
            raise BadOption(f"the tokenizer has a token {i}, {token!r}, and the model has {vocab_size} embeddings")
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for i, token in added.items():
        types[i] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise BadOption(f"the token {token['content']!r} strips what is around it, which a GGUF file cannot say")
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
    template = getattr(tokenizer, "chat_template", None)

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        for name, i in special.items():
            if i is not None:
                getattr(writer, f"add_{name}_token_id")(i)
        writer.add_add_bos_token(before)
        writer.add_add_eos_token(after)
        if template:
            several = isinstance(template, dict)
            writer.add_chat_template([{"name": n, "template": t} for n, t in template.items()] if several else template)

    return add


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    """llama.cpp's name of the way a byte-level BPE splits text."""
    steps = list(_steps(parts.get("pre_tokenizer")))
    kinds = [step["type"] for step in steps]
    normal = [step["type"] for step in _steps(parts.get("normalizer"), "normalizers")]
    plain = parts.get("model", {}).get("type") == "BPE" and kinds[-1:] == ["ByteLevel"] and set(normal) <= {"NFC"}
    if plain and not steps[-1].get("add_prefix_space"):
        regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and regex and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not regex and steps[0]["behavior"] == "Isolated":
            name = _SPLITS.get(steps[0]["pattern"].get("Regex"))
            if name is not None:
                return name
    raise BadOption(
        "format='gguf' takes fast tokenizers of byte-level BPE that split text as GPT-2, Llama 3, Qwen2, Mistral's Tekken "
        f"or SmolLM do; this one is {parts.get('model', {}).get('type', 'no fast tokenizer')} after "
        f"{', '.join(normal + kinds) or 'nothing'}, which llama.cpp would read in another way"
    )


def _steps(part: dict[str, Any] | None, key: str = "pretokenizers") -> Iterator[dict[str, Any]]:
    if part is not None:
        for step in part.get(key, [part]):
            yield from (_steps(step, key) if step["type"] == "Sequence" else [step])


def _added(tokenizer: Any, bos: int | None, eos: int | None) -> tuple[bool, bool]:
    """Whether the tokenizer puts a start token before a text, and an end token behind it."""
    bare, full = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if full == [bos] * before + bare + [eos] * after:
            return before, after
    raise BadOption("this tokenizer puts more around a text than a start and an end token, which GGUF cannot say")

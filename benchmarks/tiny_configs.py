"""Tiny configs of transformers' model classes, made by shrinking the fields of each class's default config."""

from __future__ import annotations

import re
from typing import Any

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
VOCABULARY = 256

FIELDS: list[tuple[str, Any]] = [
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (
        r"(num_hidden_layers|n_layers?|num_layers|(encoder|decoder|text_encoder)_layers|depth|num_hidden_blocks|n_block)",
        2,
    ),
    (r"(num_(encoder|decoder)_layers|num_blocks|layers|num_nextn_predict_layers_)", 2),
    (r"num_nextn_predict_layers|mtp_num_hidden_layers|num_mtp_layers", 0),
    (r"(num_(key_value|kv)_heads|n_head_kv|num_kv_heads|num_key_value_attention_heads|multi_query_group_num)", 2),
    (r"(num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|attention_heads|num_attn_heads)", 4),
    (r"(num_(encoder|decoder)_attention_heads)", 4),
    (r"((encoder|decoder)_num_key_value_heads)", 2),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|hidden_dim|emb_dim|dim_model)", 64),
    (r"(attention_hidden_size|lru_width|projection_dim|out_hidden_size|vision_output_dim)", 64),
    (
        r"(ffn_dim|n_inner|d_ff|(.*_)?intermediate_size(_.*)?|(encoder|decoder)_ffn_dim|ffn_hidden_size|inner_dim|dim_ff)",
        128,
    ),
    (r"(head_dim|attention_head_dim|d_kv|v_head_dim|global_head_dim|kv_channels|linear_(key|value)_head_dim)", 16),
    (r"(qk_nope_head_dim|qk_rope_head_dim|index_head_dim|rotary_dim)", 8),
    (r"(qk_head_dim)", 16),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank)", 16),
    (r"(index_topk)", 8),
    (r"(index_n_heads)", 2),
    (
        r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts|num_routed_experts|zero_expert_num)",
        4,
    ),
    (r"(num_experts_per_tok(en)?|moe_k|moe_top_k|moe_topk|top_k_experts|num_selected_experts|experts_per_token)", 2),
    (r"(n_group|topk_group|num_expert_groups?|n_groups|mamba_n_groups|mamba_ngroups|route_groups)", 1),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_k_dense_layers)", 1),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_(source|target)_positions)", 128),
    (r"(sliding_window|attention_window_size|local_window_size|window_size_left|attention_chunk_size)", 16),
    (r"(state_size|ssm_state_size|mamba_d_state|mamba_state_dim|time_step_rank|mamba_dt_rank)", 8),
    (r"(mamba_num_heads|mamba_n_heads|n_mamba_heads|linear_num_(key|value)_heads)", 4),
    (r"(mamba_head_dim|mamba_d_head|mamba_headdim)", 32),
    (r"(mamba_chunk_size|chunk_size)", 8),
    (r"(image_size|img_size|input_size)", 32),
    (r"(patch_size)", 8),
    (r"(ssm_cfg_size)", 8),
    (r"(num_mel_bins|feature_size)", 16),
    (r"(hidden_size_per_layer_input|vocab_size_per_layer_input_)", 16),
    (r"(laurel_rank|lora_rank)", 16),
    (r"(num_kv_shared_layers)", 0),
    (r"(num_self_attends_per_block)", 2),
    (r"(num_latents)", 8),
    (r"(d_latents)", 64),
    (r"(.*dropout.*|.*_drop|drop_.*|.*_pdrop|.*layerdrop|drop|router_jitter_noise|input_jitter_noise)", 0.0),
]
"""Names of fields and the value that a tiny config has; applied at every depth where the default is a larger number."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "xlnet": {"d_head": 16, "d_inner": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 32, "n_mamba_heads": 4},
    "hunyuan_v1_moe": {"moe_topk": 2, "num_experts": 4, "head_dim": 16},
    "afmoe": {"num_dense_layers": 1},
    "bloom": {"hidden_size": 64, "n_head": 4},
    "ctrl": {"dff": 128},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hashes": 1,
        "num_buckets": 2,
    },
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
    "xlm": {"n_words": VOCABULARY, "mask_token_id": 5, "lang_id": 0},
    "falcon": {"num_kv_heads": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32},
    "funnel": {"block_sizes": [1, 1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
}
"""What the fields' names do not say, by model type."""


_CODEC = "its acoustic codec takes minutes at any size that its config allows"
NOT_TINY = {"VibeVoiceAsrForConditionalGeneration": _CODEC, "VibeVoiceForConditionalGeneration": _CODEC}
"""Classes that are left out, with the reason."""


def shrunk(value: Any, name: str = "") -> Any:
    """Shrink one field of a config, or each field of a nested one.

    Args:
        value: the default value.
        name: the field's name; empty at the top.
    """
    if isinstance(value, dict):
        if name.startswith("rope_") or name in ("id2label", "label2id", "layer_types"):
            return value
        smaller = {k: shrunk(v, k) for k, v in value.items()}
        layers = next(
            (smaller[k] for k in ("num_hidden_layers", "n_layers", "n_layer") if isinstance(smaller.get(k), int)), 2
        )
        for k, v in value.items():
            if isinstance(v, list) and v and re.search(r"layer_types|layers_block_type|layer_type_list|block_types", k):
                kinds = list(dict.fromkeys(v))
                smaller[k] = kinds if len(kinds) > 1 else v[:1] * layers
                for key in ("num_hidden_layers", "n_layers", "n_layer"):
                    if key in smaller:
                        smaller[key] = len(smaller[k])
        _fit_layers(value, smaller)
        if smaller.get("qk_rope_head_dim") and "head_dim" in smaller:
            smaller["head_dim"] = smaller["qk_rope_head_dim"]
        elif "head_dim" in smaller and smaller["head_dim"] is None and value.get("hidden_size"):
            smaller["head_dim"] = 16
        _fit_sections(smaller)
        kv = next((k for k in value if re.fullmatch(FIELDS[4][0], k)), None)
        heads = next((k for k in ("num_attention_heads", "n_head", "num_heads") if k in value), None)
        if kv and heads and value[kv] in (None, value[heads]):
            smaller[kv] = smaller[heads]
        return smaller
    if name.endswith("token_id") or name.endswith("token_index"):
        return value if not isinstance(value, int) or value < VOCABULARY else VOCABULARY - 1 - sum(map(ord, name)) % 64
    for pattern, tiny in FIELDS:
        if re.fullmatch(pattern, name):
            if isinstance(value, bool) or not isinstance(value, int | float):
                return value
            return min(value, tiny) if value > 0 else value
    if isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        if name in ("depths", "layer_depths", "num_blocks"):
            return [1] * len(value)
        if name in ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "neck_hidden_sizes"):
            return [16 * 2 ** min(i, 3) for i in range(len(value))]
    return value


def _fit_sections(smaller: dict[str, Any]) -> None:
    """Scale the sections of multimodal rotary positions to the smaller head."""
    head = smaller.get("head_dim")
    if not head and smaller.get("hidden_size") and smaller.get("num_attention_heads"):
        head = smaller["hidden_size"] // smaller["num_attention_heads"]
    rope = smaller.get("rope_parameters") or smaller.get("rope_scaling")
    sectioned = re.match(
        r"(qwen2(_5)?_vl|glm4v|glm46v|glm_ocr)", str(smaller.get("model_type"))
    )  # with or without the field
    if isinstance(rope, dict) and head and (sectioned or isinstance(rope.get("mrope_section"), list)):
        half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _fit_layers(value: dict[str, Any], smaller: dict[str, Any]) -> None:
    """Cut lists that have one entry for each layer to the layers that are left; drop tables by layer."""
    for key in ("num_hidden_layers", "n_layers", "n_layer", "num_layers"):
        before, now = value.get(key), smaller.get(key)
        if not isinstance(before, int) or not isinstance(now, int) or before == now:
            continue
        for k, v in value.items():
            if isinstance(v, list) and len(v) == before and not re.search("layer_types|block_type", k):
                number = isinstance(v[0], int) and not isinstance(v[0], bool)
                smaller[k] = [shrunk(x, k.removesuffix("_per_layer")) if number else x for x in v[:now]]
    smaller.pop("per_layer_config", None)


def tiny_config(config_class: type, task: str) -> Any:
    """Make the tiny config of a class.

    Args:
        config_class: a class of transformers' configs, whose default is shrunk.
        task: a key of `TASKS`.

    Returns:
        A config of that class; experts, layer types and nested configs keep their structure.
    """
    default = config_class()
    fields = {k: v for k, v in default.to_dict().items() if k not in ("transformers_version", "model_type", "dtype")}
    fields = shrunk(fields)
    fields |= OVERRIDES.get(config_class.model_type, {})
    for name in list(fields):
        if isinstance(fields[name], dict) and "transformers_version" in fields[name]:
            fields[name].pop("transformers_version")
    for name in ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names"):  # of more stages
        fields.pop(name, None)
    fields.setdefault("pad_token_id", 0)
    if fields["pad_token_id"] is None:
        fields["pad_token_id"] = 0
    encodes = task in ("seq2seq", "speech-seq2seq") or fields.get("is_encoder_decoder")
    if encodes and fields.get("decoder_start_token_id") is None:
        fields["decoder_start_token_id"] = 0
    if task.endswith("classification"):
        fields["num_labels"] = 3
        fields.pop("id2label", None)
        fields.pop("label2id", None)
    if task == "causal-lm" and "is_decoder" in fields:
        fields["is_decoder"] = True
    return config_class(**fields)

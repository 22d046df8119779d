"""Random models of Llama's shapes, and what a training step over one costs by arithmetic."""

from __future__ import annotations

from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Llama-3.1-8B, Llama-3.2-3B and -1B, and one for trying the script out."""

STD = 0.02


def config(name: str, layers: int | None = None) -> Any:
    from transformers import LlamaConfig

    tiny = name == "tiny"
    sizes = SHAPES[name] | ({"num_hidden_layers": layers} if layers else {})
    return LlamaConfig(
        vocab_size=512 if tiny else 128256,
        num_key_value_heads=2 if tiny else 8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=name in ("3b", "1b"),
        dtype="bfloat16",
        **sizes,
    )


def random_model(shape: Any, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A model with normal weights of deviation 0.02 and unit norms, the same for a seed and a kind of device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # transformers would draw all weights, too
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=shape)  # its buffers are computed
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=STD, generator=generator)
            else:
                p.fill_(1.0)
    return model


def flops_per_token(shape: Any, sequence: int, rank: int, recomputed: float) -> float:
    """FLOPs of a training step a token: frozen linears, adapters on all of them, head and causal attention.

    A frozen linear costs 2 FLOPs a weight forward and 2 for its input's gradient, an adapter 6, the head 4. Attention
    reads half the sequence on average, and its backward pass costs 2.5 forward passes. `recomputed` is the share of
    layers that run forward twice.
    """
    hidden, wide, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    head_dim = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    inner, kv = head_dim * shape.num_attention_heads, head_dim * shape.num_key_value_heads
    linears = [
        (hidden, inner),
        (hidden, kv),
        (hidden, kv),
        (inner, hidden),
        (hidden, wide),
        (hidden, wide),
        (wide, hidden),
    ]
    frozen = layers * sum(i * o for i, o in linears)
    adapters = layers * rank * sum(i + o for i, o in linears)
    attention = layers * 4 * inner * sequence / 2  # two products forward
    once = 2 * frozen + 2 * adapters + attention
    backward = 2 * frozen + 4 * adapters + 2.5 * attention
    return once * (1 + recomputed) + backward + 4 * hidden * shape.vocab_size

"""Small models with random weights, built from configs, of every architecture that the tests go through."""

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Of a small Llama, and of its like."""


def llama(dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, **changes})
    return LlamaForCausalLM(config).to(dtype).eval()


def qwen2(dtype=torch.float32, seed=0):
    """Biases on q, k and v, and a tied head."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype)


def gpt2(dtype=torch.float32, seed=0):
    """Conv1D layers, with biases, and a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype)


def t5(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return T5ForConditionalGeneration(config).to(dtype).eval()


def qwen3_moe(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


class Plain(nn.Module):
    """A module that no transformers class knows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2))
        self.out = nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def plain(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Plain().to(dtype).eval()


BUILDERS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "t5": t5, "plain": plain}


def batch(seed=1, shape=(2, 12)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, shape, generator=generator)


def logits(model, ids=None, **kwargs):
    """The model's logits on a fixed batch, whatever its architecture."""
    ids = batch() if ids is None else ids
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(inner, "module", inner)
    parameter = next(model.parameters())
    ids = ids.to(parameter.device)
    if hasattr(inner, "encoder"):
        kwargs["decoder_input_ids"] = ids
    out = model(input_ids=ids, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.logits


def train_a_little(model, steps=3, lr=1e-2):
    """A few real steps, so that adapters are not at their start."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        out = logits(model, batch(seed=10 + step))
        loss = torch.nn.functional.cross_entropy(
            out.flatten(0, 1).float(), batch(seed=20 + step).to(out.device).flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model


def relative(a, b):
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def name_of(value):
    """A parameter's name in a test's id: functions by their own, since addresses differ between workers."""
    return getattr(value, "__name__", None) or str(value)

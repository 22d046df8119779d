"""Small models with random weights, built from configs, of every architecture that the tests go through."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
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
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
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


def t5(dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = T5Config(**{**sizes, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", **changes})
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


LENGTH = 12
_LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit(dtype=torch.float32, seed=0):
    """Pixels go in through a convolution, there are no token embeddings; as many labels as a batch of tokens has logits."""
    torch.manual_seed(seed)
    config = ViTConfig(**_LAYERS, image_size=32, patch_size=8, num_labels=LENGTH * VOCABULARY)
    return with_biases(ViTForImageClassification(config)).to(dtype)


def bert(dtype=torch.float32, seed=0):
    """An encoder with a pooler and a classifier on top."""
    torch.manual_seed(seed)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=VOCABULARY, **_LAYERS, **dropout, num_labels=LENGTH * VOCABULARY)
    return with_biases(BertForSequenceClassification(config)).to(dtype)


def whisper(dtype=torch.float32, seed=0):
    """Sound goes in through convolutions, text comes out of a decoder whose head is tied."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    return with_biases(WhisperForConditionalGeneration(config)).to(dtype)


@torch.no_grad()
def with_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    return model.eval()


BUILDERS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "t5": t5, "plain": plain}
OTHER_INPUTS = {"vit": vit, "bert": bert, "whisper": whisper}
"""Models of images, of whole texts and of sound; `logits` gives them inputs that are made from a batch of tokens."""
ALL_BUILDERS = {**BUILDERS, **OTHER_INPUTS}


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
    out = model(**inputs_of(inner, ids), **kwargs)
    out = out if isinstance(out, torch.Tensor) else out.logits
    return out.view(len(ids), LENGTH, VOCABULARY) if out.shape[1:] == (LENGTH * VOCABULARY,) else out


def inputs_of(model, ids):
    """What a model reads in the place of these tokens (batch, length)."""
    name, dtype = getattr(model, "main_input_name", "input_ids"), getattr(model, "dtype", torch.float32)
    shape = {"pixel_values": (3, 32, 32), "input_features": (8, 32)}.get(name)
    if shape is None:
        return {"input_ids": ids, **({"decoder_input_ids": ids} if hasattr(model, "encoder") else {})}
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(row.sum()))) for row in ids]
    found = {name: torch.stack(rows).to(ids.device, dtype)}
    return {**found, "decoder_input_ids": ids} if name == "input_features" else found


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

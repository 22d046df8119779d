"""Plans and memory="auto" go by what a block returns, not by its annotation."""

import warnings

import pytest
import torch
from models import batch
from peft import LoraConfig
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qft

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def gemma3():
    return Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8)


def granite():
    return GraniteMoeHybridConfig(
        **SIZES, layer_types=["attention"] * 4, shared_intermediate_size=128, num_local_experts=0, num_experts_per_tok=0
    )


@pytest.mark.parametrize(
    "config", [gemma3, granite, lambda: Qwen3Config(**SIZES, head_dim=16)], ids=["gemma3", "granite", "qwen3"]
)
@pytest.mark.parametrize("memory", ["least", "most"])
def test_a_plan_of_a_family(config, memory):
    plan = qft.plan(
        config(), "nf4", batch_size=2, sequence_length=32, memory=memory,
        adapter=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    like = qft.plan(
        LlamaConfig(**SIZES), "nf4", batch_size=2, sequence_length=32, memory=memory,
        adapter=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    ratio = max(sum(m.values()) for m in plan.moments.values()) / max(sum(m.values()) for m in like.moments.values())
    assert 0.5 < ratio < 2.5


@pytest.mark.parametrize(
    "builder",
    [lambda: Gemma3ForCausalLM(gemma3()), lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))],
    ids=["gemma3", "qwen3"],
)
def test_memory_auto_takes_the_blocks(builder, monkeypatch):
    torch.manual_seed(0)
    model = qft.quantize_and_wrap(builder(), "reference", progress=False)
    ids = batch(0, (2, 16))
    expected = model.train()(ids, labels=ids).loss.item()
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        qft.optimize_training(model, memory="8GB")
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_other_granite_is_built_as_planned():
    model = GraniteMoeHybridForCausalLM(granite())
    assert qft.quantize(model, "reference", progress=False)

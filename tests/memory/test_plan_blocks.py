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


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def sharing(kind, shared):
    """A config whose last `shared` blocks read keys and values of earlier blocks."""
    import transformers

    layers = ["sliding_attention", "full_attention"] * 3
    given = {**SMALL, "layer_types": layers, "num_kv_shared_layers": shared, "vocab_size_per_layer_input": 64}
    if kind == "Gemma3nTextConfig":
        given |= {"intermediate_size": [64] * 6, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 8}
    else:
        given |= {"global_head_dim": 16}
    return getattr(transformers, kind)(hidden_size_per_layer_input=8, **given)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("kind", ["Gemma3nTextConfig", "Gemma4TextConfig"])
def test_blocks_that_read_what_earlier_ones_leave_are_planned(kind, shared):
    few, many = (
        qft.plan(sharing(kind, shared), "nf4", sequence_length=n, batch_size=1, memory="most").moments["backward"]
        for n in (256, 512)
    )
    assert many["activations"] > 1.9 * few["activations"] > 0


def test_llama_4_is_planned():
    from transformers import Llama4TextConfig

    config = Llama4TextConfig(**{**SMALL, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_hidden_layers": 4})
    assert qft.plan(config, "nf4", sequence_length=64, batch_size=1).moments["backward"]["activations"] > 0

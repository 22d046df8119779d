"""Plans of models whose blocks do not return what their annotation says."""

import pytest
import torch
from models import llama
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

import qft

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def gemma3():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, head_dim=16, num_hidden_layers=2, layer_types=kinds, sliding_window=8)
    return Gemma3ForCausalLM(config)


def granite_hybrid():
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        **SIZES,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=8,
        mamba_n_groups=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    )
    return GraniteMoeHybridForCausalLM(config)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("make", [gemma3, granite_hybrid])
def test_blocks_are_asked_what_they_return(make, fast):
    model = make()
    plan = qft.plan(model.config, "nf4", sequence_length=16, fast=fast)
    assert plan.blocks == 2 and plan.needed > 0
    kept = qft.plan(model.config, "nf4", sequence_length=16, fast=fast, memory="most")
    assert kept.needed >= plan.needed and kept.kept >= plan.kept


@pytest.mark.parametrize("annotation", ["Tensor", "tuple[Tensor]", "nothing"])
@pytest.mark.parametrize("form", ["tensor", "tuple", "pair"])
def test_a_wrong_annotation_changes_nothing(form, annotation, monkeypatch):
    from transformers.models.llama import modeling_llama

    config = llama().config
    expected = qft.plan(config, "nf4", sequence_length=16).moments
    block = modeling_llama.LlamaDecoderLayer
    forward = block.forward

    def other(self, hidden_states, *args, **kwargs):
        y = forward(self, hidden_states, *args, **kwargs)
        return {"tensor": y, "tuple": (y,), "pair": (y, None)}[form]

    other.__annotations__ = {"return": annotation} if annotation != "nothing" else {}
    monkeypatch.setattr(block, "forward", other)
    if form != "tensor":
        call = nn.Module.__call__

        def first(self, *args, **kwargs):
            y = call(self, *args, **kwargs)
            assert isinstance(y, tuple) and len(y) == {"tuple": 1, "pair": 2}[form]
            return y[0]

        monkeypatch.setattr(block, "__call__", first)
    assert qft.plan(config, "nf4", sequence_length=16).moments == expected


@pytest.mark.parametrize("make", [gemma3, granite_hybrid])
def test_memory_is_chosen_for_them(make):
    model = qft.quantize_and_wrap(make(), "nf4", progress=False)
    qft.optimize_training(model, memory=4 << 30)

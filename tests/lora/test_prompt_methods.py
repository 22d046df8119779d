"""Learnt prompts and prefixes generate what the model says token by token, padded or not, or are refused."""

import copy

import pytest
import torch
from helpers import refuses
from models import gpt2, llama, qwen2
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

import qft

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def learnt(make, method):
    model = qft.wrap(qft.quantize(make(), "nf4", progress=False), CONFIGS[method]()).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g))
    return model


def steps(model, ids, **options):
    made = model.generate(
        input_ids=ids,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{"attention_mask": torch.ones_like(ids), **options},
    )
    return made.sequences, made.logits


@pytest.mark.parametrize("loaded", [False, True], ids=["wrapped", "loaded"])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("make", [llama, gpt2, qwen2])
def test_a_padded_row_generates_as_it_does_alone(make, method, loaded, tmp_path):
    model = learnt(make, method)
    if loaded:
        qft.save(model, tmp_path)
        model = qft.load(tmp_path, base=make()).eval()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    caches = (True,) if method == "prefix" else (True, False)
    for cache in caches:
        padded, found = steps(model, IDS, attention_mask=mask, use_cache=cache)
        alone, expected = steps(model, IDS[:1, 3:], use_cache=cache)
        assert torch.equal(padded[0, 7:], alone[0, 4:])
        for a, b in zip(found, expected, strict=True):
            assert (a[0] - b[0]).norm() / b[0].norm() < 1e-4
        with torch.no_grad():
            whole = model(input_ids=alone[:, :-1], attention_mask=torch.ones_like(alone[:, :-1])).logits[:, -4:]
        assert (whole[0] - torch.cat(expected)).norm() / whole.norm() < 1e-4


@pytest.mark.parametrize("method", CONFIGS)
def test_caches_of_a_fixed_size_are_refused(method):
    model = learnt(llama, method)
    before = steps(model, IDS)[0]
    with pytest.raises(qft.UnsupportedOperation, match="cache_implementation"):
        steps(model, IDS, cache_implementation="static")
    assert torch.equal(steps(copy.deepcopy(model), IDS)[0], before)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_prefix_without_a_cache_is_refused(make):
    with pytest.raises(qft.UnsupportedOperation, match="use_cache=True"):
        steps(learnt(make, "prefix"), IDS, use_cache=False)


def falcon():
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True, parallel_attn=True
    )
    return FalconForCausalLM(config)


def test_a_prefix_that_the_model_cannot_read_is_refused_and_nothing_changes():
    model = qft.quantize(falcon(), "nf4", progress=False).train()
    with refuses(qft.UnsupportedOperation, "PREFIX_TUNING", "FalconForCausalLM", model=model):
        qft.wrap(model, CONFIGS["prefix"]())
    assert model.training
    qft.wrap(model, CONFIGS["prompt"]())


def test_looking_at_a_prefix_leaves_the_modes_alone():
    model = qft.quantize(llama(), "nf4", progress=False).train()
    model.lm_head.eval()
    wrapped = qft.wrap(model, CONFIGS["prefix"]())
    assert wrapped.get_base_model().training and not wrapped.get_base_model().lm_head.training

"""A merged adapter gets no gradient: training it is refused on the first forward pass."""

import pytest
import torch
from models import batch, llama, logits, qwen3_moe
from peft import IA3Config, LoHaConfig, LoraConfig
from transformers import Trainer, TrainingArguments

import qft
from qft.errors import BadOption

CONFIGS = {
    "LoRA": LoraConfig(r=4, target_modules="all-linear"),
    "DoRA": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens"]),
    "token indices": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1]),
    "float layer": LoraConfig(r=4, target_modules=["lm_head"]),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj"]),
    "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


def step(model):
    ids = batch(0, (2, 8))
    return model(input_ids=ids, labels=ids).loss


def tuned(config, builder=llama, spec="reference"):
    model = qft.quantize_and_wrap(builder(), spec, adapter=config, progress=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("merge", [qft.merge, lambda m: m.merge_adapter()], ids=["qft", "PEFT"])
@pytest.mark.parametrize("config", CONFIGS)
def test_training_a_merged_adapter_is_refused(config, merge):
    model = tuned(CONFIGS[config])
    merge(model)
    with pytest.raises(BadOption, match=r"merged into the weights.*qft\.unmerge"):
        step(model.train())
    with torch.no_grad():
        assert step(model).isfinite()
    assert step(model.eval()).isfinite()
    qft.unmerge(model)
    step(model.train()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_experts():
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = tuned(config, qwen3_moe)
    qft.merge(model)
    for module in model.modules():
        if type(module).__name__ == "QftLinear":
            module.unmerge()
    with pytest.raises(BadOption, match="merged into the weights"):
        step(model.train())


def test_an_optimized_model_and_a_trainer(tmp_path):
    model = tuned(CONFIGS["LoRA"])
    qft.merge(model)
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 4
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    with pytest.raises(BadOption, match="merged into the weights"):
        Trainer(model, args, train_dataset=rows).train()
    qft.optimize_training(model)
    with pytest.raises(BadOption, match="merged into the weights"):
        step(model.train())


def test_another_adapter_trains_over_a_frozen_merged_one():
    model = tuned(CONFIGS["LoRA"])
    qft.merge(model)
    expected = logits(model.eval())
    for p in model.parameters():
        p.requires_grad_(False)
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    step(model.train()).backward()
    assert embedding.grad.any()
    assert torch.equal(logits(model.eval()), expected)

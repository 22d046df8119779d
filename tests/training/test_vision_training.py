"""Vision models train, whatever their embeddings return."""

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import (
    BeitConfig,
    ConvNextV2Config,
    Dinov2Config,
    SegformerConfig,
    SwinConfig,
    Swinv2Config,
    ViTConfig,
)

import qft

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
MODELS = {
    "ViTForImageClassification": ViTConfig(**SMALL, num_labels=3),
    "BeitForImageClassification": BeitConfig(**SMALL, num_labels=3),
    "Dinov2ForImageClassification": Dinov2Config(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, num_labels=3
    ),
    "SwinForImageClassification": SwinConfig(**SWIN, num_labels=3),
    "Swinv2ForImageClassification": Swinv2Config(**SWIN, num_labels=3),
    "SegformerForImageClassification": SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 1, 2, 2], num_labels=3
    ),
    "ConvNextV2ForImageClassification": ConvNextV2Config(
        hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_labels=3
    ),
}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_gives_every_adapter_a_gradient(name, checkpointing):
    torch.manual_seed(0)
    model = getattr(transformers, name)(MODELS[name])
    wrapped = qft.quantize_and_wrap(
        model,
        "reference",
        adapter=LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        use_gradient_checkpointing=checkpointing,
        progress=False,
    )
    loss = wrapped.train()(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2])).loss
    loss.backward()
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())

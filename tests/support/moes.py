"""Small mixtures of experts with random weights: fused experts as transformers 5 has them."""

import torch
from models import SIZES, qwen3_moe
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM


def mixtral(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).to(dtype).eval()


def gpt_oss(dtype=torch.float32, seed=0):
    """Experts as (experts, in, out), with biases, gate and up interleaved."""
    torch.manual_seed(seed)
    config = GptOssConfig(
        **{**SIZES, "intermediate_size": 96},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "sinks" in name:
                parameter.normal_(std=0.3)
    return model.to(dtype)


MOES = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
"""What `target_parameters` takes to adapt all of them."""

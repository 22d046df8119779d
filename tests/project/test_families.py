"""Families that people tune now: every check of the sweep is right, apart from those that are named with a reason."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAMILIES = [
    "causal-lm/DeepseekV3ForCausalLM",
    "causal-lm/DeepseekV4ForCausalLM",
    "causal-lm/FalconForCausalLM",
    "causal-lm/Gemma2ForCausalLM",
    "causal-lm/Gemma3ForCausalLM",
    "causal-lm/Gemma3nForCausalLM",
    "causal-lm/Gemma4ForCausalLM",
    "causal-lm/Glm4MoeForCausalLM",
    "causal-lm/Glm4MoeLiteForCausalLM",
    "causal-lm/GptOssForCausalLM",
    "causal-lm/GraniteMoeHybridForCausalLM",
    "causal-lm/LagunaForCausalLM",
    "causal-lm/Llama4ForCausalLM",
    "causal-lm/LlamaForCausalLM",
    "causal-lm/MinistralForCausalLM",
    "causal-lm/Ministral3ForCausalLM",
    "causal-lm/MistralForCausalLM",
    "causal-lm/NemotronHForCausalLM",
    "causal-lm/Olmo2ForCausalLM",
    "causal-lm/Olmo3ForCausalLM",
    "causal-lm/Phi3ForCausalLM",
    "causal-lm/Qwen2ForCausalLM",
    "causal-lm/Qwen3ForCausalLM",
    "causal-lm/Qwen3MoeForCausalLM",
    "causal-lm/Qwen3NextForCausalLM",
    "causal-lm/Qwen3_5ForCausalLM",
    "causal-lm/Qwen3_5MoeForCausalLM",
    "causal-lm/SmolLM3ForCausalLM",
    "image-text-to-text/Gemma3ForConditionalGeneration",
    "image-text-to-text/Gemma4ForConditionalGeneration",
    "image-text-to-text/Llama4ForConditionalGeneration",
    "image-text-to-text/Mistral3ForConditionalGeneration",
    "image-text-to-text/Qwen2_5_VLForConditionalGeneration",
    "image-text-to-text/Qwen3VLForConditionalGeneration",
    "speech-seq2seq/WhisperForConditionalGeneration",
]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    optimizing = importlib.import_module("qft.optimize.optimize")
    monkeypatch.setattr(optimizing, "switches", optimizing.Switches(compile=False))
    yield importlib.import_module("architectures"), importlib.import_module("architecture_checks")
    for name in ("architectures", "architecture_checks", "tiny_configs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("quantizer", ["nf4", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_is_right(tools, family, quantizer):
    architectures, checks = tools
    task, name = family.split("/")
    [(task, kind, name)] = architectures.classes([task], f"^{name}$")
    found = checks.run_class(task, kind, name, quantizer)
    assert len(found) == (9 if task == "causal-lm" else 8)
    assert {k: v for k, v in found.items() if v[0] != "right"} == {}

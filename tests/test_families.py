"""Families that people tune now: every check of the sweep is right, apart from those that are named with a reason."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAMILIES = [
    "DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "NemotronHForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3_5ForCausalLM",
    "DeepseekV4ForCausalLM",
    "GraniteMoeHybridForCausalLM",
]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    optimizing = importlib.import_module("qft.optimizing")
    monkeypatch.setattr(optimizing, "switches", optimizing.Switches(compile=False))
    yield importlib.import_module("architectures"), importlib.import_module("architecture_checks")
    for name in ("architectures", "architecture_checks", "tiny_configs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_check_is_right(tools, name):
    architectures, checks = tools
    [(task, kind, name)] = architectures.classes(["causal-lm"], f"^{name}$")
    found = checks.run_class(task, kind, name, "nf4")
    assert len(found) == 9 and {k: v for k, v in found.items() if v[0] != "right"} == {}

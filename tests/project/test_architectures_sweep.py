"""The part of benchmarks/architectures.py that runs with the tests, and its tools."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DECODERS = [
    "ApertusForCausalLM",
    "CohereForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "GraniteMoeHybridForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
]
OTHERS = [
    ("seq2seq", "T5ForConditionalGeneration"),
    ("sequence-classification", "BertForSequenceClassification"),
    ("token-classification", "DebertaV2ForTokenClassification"),
    ("image-classification", "ViTForImageClassification"),
]


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    optimizing = importlib.import_module("qft.optimize.optimize")
    monkeypatch.setattr(optimizing, "switches", optimizing.Switches(compile=False))
    yield importlib.import_module("architectures"), importlib.import_module("architecture_checks")
    for name in ("architectures", "architecture_checks", "tiny_configs"):
        sys.modules.pop(name, None)


def outcomes(sweep, task, name, quantizer):
    architectures, checks = sweep
    [(task, kind, name)] = architectures.classes([task], f"^{name}$")
    return checks.run_class(task, kind, name, quantizer)


@pytest.mark.parametrize("name", DECODERS)
def test_every_check_of_a_decoder_is_right(sweep, name):
    found = outcomes(sweep, "causal-lm", name, "nf4")
    assert len(found) == 9 and {k: v for k, v in found.items() if v[0] != "right"} == {}


@pytest.mark.parametrize(("task", "name"), OTHERS)
def test_every_check_of_another_task_is_right_or_refused(sweep, task, name):
    found = outcomes(sweep, task, name, "reference")
    assert {k: v for k, v in found.items() if v[0] not in ("right", "refused")} == {}
    assert all(found[k][0] == "right" for k in ("quantize", "gradients", "merge_to_float", "unmerge", "save", "export"))


def test_training_steps_of_a_decoder(sweep):
    architectures, checks = sweep
    [(task, kind, name)] = architectures.classes(["causal-lm"], "^LlamaForCausalLM$")
    assert checks.run_class(task, kind, name, "nf4", steps=3) == {"train": ["right", ""]}


def test_a_wrong_number_and_a_foreign_error_are_told(sweep):
    _, checks = sweep

    def off():
        import torch

        checks.equal(torch.ones(2), torch.zeros(2) + 2, "outputs")

    assert checks.outcome(off) == ["wrong", "outputs off by 0.5"]
    assert checks.outcome(lambda: {}["key"])[1].startswith("KeyError: 'key'")
    assert checks.outcome(lambda: None) == ["right", ""]


def test_the_page_is_that_of_the_stored_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    page = importlib.import_module("architectures_page").page
    results = json.loads((BENCHMARKS / "results" / "architectures-cpu.json").read_text())["results"]
    assert page(results) == (BENCHMARKS.parent / "docs" / "which_models.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("quantizer", ["reference", "nf4"])
def test_no_class_is_worse_than_stored(sweep, quantizer):
    """A check that is right in the stored results is right now."""
    architectures, checks = sweep
    stored = json.loads((BENCHMARKS / "results" / "architectures-cpu.json").read_text())["results"]
    worse = {}
    for task, kind, name in architectures.classes(list(architectures.TASKS), ""):
        expected = stored.get(f"{task}/{name}/{quantizer}", {})
        found = checks.run_class(task, kind, name, quantizer) if expected else {}
        worse |= {
            f"{name} {k}": found.get(k)
            for k, v in expected.items()
            if v[0] == "right" and found.get(k) != ["right", ""]
        }
    assert worse == {}

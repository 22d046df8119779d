"""A pytest plugin that runs PEFT's `tests/test_quantization.py` over models that `qft.quantize` made.

`peft_quantization.py` loads it with `-p`. It replaces two names of PEFT's module before the tests are generated: the list of
loaders, by one loader of ours, and `AutoModelForCausalLM`, which the tests take the float model from. Assertions stay PEFT's.
The model is an OPT with 12 layers, as in PEFT's tests, but narrow and with random weights from a fixed seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import qft
from qft.lora import view_merging

MODULE = "test_quantization"
LAYERS = 12
"""As in the model of PEFT's tests, opt-125m."""
CONTROLS = ("other-weights", "no-update")
"""Faults that PEFT's assertions must find: the quantized weights are not the float model's; a merge stores no update."""


def float_model(seed: int = 0) -> OPTForCausalLM:
    """Build the float model: the same weights on each call with the same seed, without a change to the global seed."""
    config = OPTConfig(
        vocab_size=128, hidden_size=128, ffn_dim=256, word_embed_proj_dim=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=64, init_std=128**-0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OPTForCausalLM(config).eval()


class FloatModels:
    """Stand in for `AutoModelForCausalLM`: no hub, the same float model for each name."""

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> OPTForCausalLM:
        """Build the float model on the device that the test asks for.

        Raises:
            ValueError: the test asks for an option that this stand-in would ignore.
        """
        device = options.pop("device_map")[""]
        if options:
            raise ValueError(
                f"{name} is loaded with {sorted(options)}: the stand-in for AutoModelForCausalLM lacks them"
            )
        return float_model().to(device)


class QftLoader:
    """A loader in the form of those in PEFT's module.

    Args:
        spec: a quantizer.
        seed: of the weights that are quantized; any but the float model's is a fault, which the tests must find.
    """

    supports_merge = True
    supports_non_quantized_comparison = True
    model_id = "random-opt"
    expected_layer_count = 2 * LAYERS  # q_proj and v_proj

    def __init__(self, spec: str, seed: int = 0):
        self.name, self.spec, self.seed = spec, spec, seed

    def load_model(self) -> OPTForCausalLM:
        """Quantize the float model."""
        with torch.random.fork_rng():
            return qft.quantize(float_model(self.seed), self.spec, progress=False)


class Outcomes:
    """Write what each test came to."""

    def __init__(self, path: Path):
        self.path, self.tests = path, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst phase of a test, with its message."""
        name = report.nodeid.partition("::")[2]
        if report.when == "call" or report.outcome != "passed":
            self.tests[name] = {"outcome": report.outcome, **_reason(report)}

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.tests), encoding="utf-8")


def _reason(report: pytest.TestReport) -> dict[str, str]:
    if report.outcome == "skipped":
        return {"reason": report.longrepr[2]}
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        return {"reason": (crash.message if crash else str(report.longrepr)).partition("\n")[0]}
    return {}


def _store_no_update() -> None:
    """Make merges store the base's own weight: a fault, which the tests must find."""
    merged_by_peft = view_merging.merged_by_peft

    def unmerged(layer: Any, names: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        before, _, bias = merged_by_peft(layer, names)
        return before, before.clone(), bias

    view_merging.merged_by_peft = unmerged


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `peft_quantization.py` passes."""
    group = parser.getgroup("qft")
    group.addoption("--quantizer", help="what the models of PEFT's tests are quantized with")
    group.addoption("--control", choices=CONTROLS, help="a fault that the tests must find")
    group.addoption("--outcomes", type=Path, help="the file for each test's outcome")


def pytest_configure(config: pytest.Config) -> None:
    """Collect outcomes."""
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))
    if config.getoption("--control") == "no-update":
        _store_no_update()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the loaders of PEFT's module, whose list the tests' parameters are taken from.

    Raises:
        AttributeError: this PEFT's module has another form, and the tests would run over PEFT's own models.
    """
    module: Any = metafunc.module
    if module.__name__.rpartition(".")[2] != MODULE:
        return
    seed = 1 if metafunc.config.getoption("--control") == "other-weights" else 0
    module.QUANTIZATION_BACKENDS[:] = [QftLoader(metafunc.config.getoption("--quantizer"), seed)]
    if not hasattr(module, "AutoModelForCausalLM"):
        raise AttributeError(f"{module.__file__} does not import AutoModelForCausalLM, which qft's plugin replaces")
    module.AutoModelForCausalLM = FloatModels

"""SmolLM2-135M-Instruct with its real weights, on the text that ships with Python; facts that were measured by hand."""

import os
import subprocess
import sys
import time

import pytest
import torch
from models import relative
from peft import LoraConfig

import qft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source():
    from qft.autopilot.packaged_model import find_model

    try:
        return find_model(None)
    except qft.errors.MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def windows(source):
    from qft.autopilot.packaged_model import load_tokenizer
    from qft.cli import _demo

    return _demo._text(load_tokenizer(source), 256, 2)[0]


@pytest.fixture
def model(source):
    from qft.autopilot.packaged_model import load_model

    return load_model(source, torch.float32, torch.device("cpu"))


def test_nf4_costs_what_was_measured_by_hand(model, windows):
    """Float 14.705 and NF4 18.749 on 8 windows of 512 tokens, float32 on the CPU, each within one percent."""
    from qft.cli._demo import perplexity

    before = perplexity(model, windows)
    qft.quantize(model, "nf4", progress=False)
    after = perplexity(model, windows)
    if sys.version_info[:2] == (3, 11):  # the text is Python's own help, and differs from release to release
        assert before == pytest.approx(14.705, rel=0.01)
        assert after == pytest.approx(18.749, rel=0.01)
    assert after / before == pytest.approx(18.749 / 14.705, rel=0.03)
    audit = qft.audit(model)
    assert audit.bits_per_weight == pytest.approx(4.5, abs=1e-6)
    assert "lm_head" in audit.left


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference", "reference:format=int,bits=3,group_size=64"])
def test_merge_to_float_is_exact_on_a_real_model(model, windows, spec):
    """Frobenius norm of the logits, all in float32, every linear adapted: within 1e-5."""
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = qft.quantize_and_wrap(model, spec, adapter=adapter, progress=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    ids = windows[:2, :128]
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            assert relative(model(ids).logits, tuned) > 0.05
        plain = qft.merge_to_float(model, dtype=torch.float32)
        assert relative(plain(ids).logits, tuned) < 1e-5


def test_import_is_quick():
    """`import qft` adds less than half a second to `import torch, peft`; the best of three."""
    code = "import time, torch, peft; start = time.perf_counter(); import qft; print(time.perf_counter() - start)"
    times = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        times.append(float(out.stdout.split()[-1]))
    assert min(times) < 0.5, times


def test_command_answers_help_at_once():
    """The console script's --help comes well under a second: it imports neither torch nor qft."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-m", "qft_cli", "--help"], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert "demo" in out.stdout
    assert best < 1.0

"""What other packages print, log or warn while qft imports and calls them does not reach the user."""

import importlib.util
import subprocess
import sys

import pytest

import qft

SPECS = ("nf4", "int8", "hqq", "torchao", "quanto", "reference", "inc:method=nf4,group_size=32", "sinq", "fp8")
CALLS = """
import sys
import qft
from transformers import LlamaConfig, LlamaForCausalLM

shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
for spec in sys.argv[1:]:
    print(spec)
    model = qft.quantize_and_wrap(LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), spec, progress=False)
    qft.merge(model)
    qft.unmerge(model)
    qft.merge_to_float(model)
"""


def printed(*call):
    """Run Python in a fresh process → everything that it wrote to stdout and stderr."""
    done = subprocess.run([sys.executable, *call], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).strip()


def test_nothing_is_printed_by_calls_over_any_backend():
    ready = {name for name, info in qft.available_quantizers().items() if info.state == "ready"}
    specs = [spec for spec in SPECS if spec.partition(":")[0] in ready]
    assert {"nf4", "int8", "reference"} <= set(specs)
    assert printed("-c", CALLS, *specs).splitlines() == specs


def test_importing_prints_nothing_and_leaves_logging_and_the_environment_alone():
    code = (
        "import os, logging; before = dict(os.environ); import qft; import peft; "
        "new = {k for k in os.environ if k not in before}; print(logging.root.manager.disable, sorted(new))"
    )
    assert printed("-c", code) == "0 []"


def test_the_checks_see_what_is_printed():
    assert "hello" in printed("-c", "import sys; print('hello', file=sys.stderr)")


def test_errors_that_are_logged_on_import_are_shown(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import logging, warnings\nprint('stdout')\nlogging.getLogger('loud').warning('warning')\n"
        "logging.getLogger('loud').error('error')\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from qft.core.console import hushed\nwith hushed(): import loud"
    assert printed("-c", code) == "error"


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="the command line needs typer")
def test_the_command_prints_its_own_lines_only():
    lines = printed("-m", "qft_cli", "backends").splitlines()
    assert lines and not any("Failed to load" in line or "WARNING" in line or "_pytree" in line for line in lines)

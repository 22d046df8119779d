"""The console script, as a person at a shell meets it."""

import json
import os
import subprocess
import sys

import pytest
from models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def qft(*words, **env):
    return subprocess.run(
        [sys.executable, "-m", "qft_cli", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **env},
        timeout=500,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a tokenizer of single characters, big enough for the demo's windows."""
    path = tmp_path_factory.mktemp("model")
    llama(vocab_size=256, max_position_embeddings=1024).save_pretrained(path)
    vocabulary = {chr(i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="\x00").save_pretrained(path)
    return path


def test_backends_lists_every_quantizer():
    out = qft("backends")
    assert out.returncode == 0
    for name in ("nf4", "fp4", "int8", "reference"):
        assert name in out.stdout


def test_demo_goes_the_whole_road(folder, tmp_path):
    out = qft("demo", "--model", folder, "--steps", 3, "--out", tmp_path / "out", "--json", tmp_path / "figures.json")
    assert out.returncode == 0, out.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["steps"] == 3
    assert figures["bits_per_weight"] == pytest.approx(4.5)
    assert figures["nbytes"]["quantized"] < figures["nbytes"]["float"]
    assert figures["perplexity"]["merged"] == pytest.approx(figures["perplexity"]["tuned"], rel=0.02)
    assert (tmp_path / "out").is_dir() and list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["demo", "--quantizer", "nf5"], 1, "did you mean"),
        (["demo", "--quantizer", "reference:bits=banana"], 1, "bits"),
        (["demo", "--model", "/nowhere/at/all"], 1, "/nowhere/at/all"),
        (["demo", "--steps", "0"], 2, "steps"),
        (["demo", "--json", "/nowhere/figures.json"], 1, "--json"),
        (["demo", "--no-such-option"], 2, "no-such-option"),
        (["dmeo"], 2, "dmeo"),
    ],
)
def test_a_wrong_argument_gets_one_clear_line(words, code, says, tmp_path):
    out = qft(*words)
    assert out.returncode == code
    assert says in out.stderr
    assert "Traceback" not in out.stderr
    if code == 1:
        assert out.stderr.strip().count("\n") == 0, out.stderr


def test_out_that_is_a_file(tmp_path, folder):
    (tmp_path / "out").write_text("mine")
    out = qft("demo", "--model", folder, "--steps", 1, "--out", tmp_path / "out")
    assert out.returncode == 1
    assert "it is a file" in out.stderr
    assert (tmp_path / "out").read_text() == "mine"

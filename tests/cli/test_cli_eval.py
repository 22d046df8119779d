"""`qft eval`, as a person at a shell meets it."""

import json
import os
import pathlib
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from models import llama
from test_evaluation import TEMPLATE, characters
from typer.testing import CliRunner

import qft as library
import qft_cli


def qft(*words):
    """The command in this process, which has imported all that it needs."""
    done = CliRunner().invoke(qft_cli.app(), list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval")
    llama().save_pretrained(path / "float")
    characters(TEMPLATE).save_pretrained(path / "float")
    wrapped = library.quantize_and_wrap(str(path / "float"), "nf4", device="cpu", progress=False)
    library.save(wrapped, path / "adapter")
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you there"}]}
    (path / "held.jsonl").write_text("\n".join(json.dumps(r) for r in ({"text": "some text"}, chat, {"text": "<b>&"})))
    (path / "broken.jsonl").write_text('{"text": "some text"}\n{"text": \n')
    (path / "empty.jsonl").write_text("")
    return path


def test_eval_goes_the_whole_road(place, tmp_path):
    report = tmp_path / "report.html"
    out = qft("eval", place / "adapter", "--data", place / "held.jsonl", "--report", report, "--json")
    assert out.returncode == 0, out.stderr
    values = json.loads(out.stdout)
    assert values["baseline"] == str(place / "float") and values["score"]["tokens"] == 8 + 10 + 3
    assert values["weights"]["bits_per_weight"] == pytest.approx(4.5)
    assert f"{values['perplexity']:.3f}" in report.read_text()
    plain = qft("eval", place / "adapter", "--data", place / "held.jsonl", "--baseline", "none", "--quiet")
    assert plain.returncode == 0 and f"{values['perplexity']:.4f}" in plain.stdout
    assert "no baseline: none was asked for" in plain.stdout


def test_dry_run_loads_and_writes_nothing(place, tmp_path):
    out = qft("eval", place / "adapter", "--data", place / "held.jsonl", "--report", tmp_path / "r.html", "--dry-run")
    assert out.returncode == 0 and "on 3 rows" in out.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere/at/all"], 1, "there is no folder 'nowhere/at/all'"),
        (["."], 1, "neither a model"),
        (["adapter", "--data", "nowhere.jsonl"], 1, "there is no file"),
        (["adapter", "--data", "empty.jsonl"], 1, "empty.jsonl is empty"),
        (["adapter", "--data", "broken.jsonl"], 1, "broken.jsonl line 2: broken JSON"),
        (["adapter", "--data", "float"], 1, "is a folder"),
        (["adapter", "--data", "held.jsonl", "--baseline", "no/such/model"], 1, "there is no folder"),
        (["adapter", "--data", "held.jsonl", "--report", "no/r.html"], 1, "there is no folder"),
        (["adapter", "--data", "held.jsonl", "--report", "."], 1, "it is a folder"),
        (["adapter", "--data", "held.jsonl", "--samples", "0"], 2, "samples"),
        (["adapter", "--data", "held.jsonl", "--device", "cuda:99"], 1, "cuda:99"),
        (["float"], 1, "nothing to measure"),
        (["adapter", "--no-such-option"], 2, "no-such-option"),
        ([], 2, "Missing argument"),
    ],
)
def test_a_wrong_argument_gets_one_clear_line(words, code, says, place, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    out = qft("eval", *words)
    assert out.returncode == code, out.stderr
    assert says in out.stderr and "Traceback" not in out.stderr
    if code == 1:
        assert out.stderr.strip().count("\n") == 0 and out.stdout == "", out.stderr
    assert sorted(place.rglob("*")) == before


def test_no_permission(place, tmp_path, monkeypatch):
    """As it is for anybody but root, whom no mode stops."""

    def denied(path, *_args, **_options):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", denied)
        out = qft("eval", place / "adapter", "--data", place / "held.jsonl")
    assert out.returncode == 1 and "held.jsonl: Permission denied" in out.stderr
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", denied)
        out = qft("eval", place / "adapter", "--data", place / "held.jsonl")
    assert out.returncode == 1 and "adapter: Permission denied" in out.stderr
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        out = qft("eval", place / "adapter", "--data", place / "held.jsonl", "--report", tmp_path / "r.html")
    assert out.returncode == 1 and "no permission" in out.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk(place, tmp_path):
    """A limit on the size of files stands for it: the write fails halfway."""
    report = tmp_path / "report.html"
    report.write_text("the old one")
    words = ["eval", place / "adapter", "--data", place / "held.jsonl", "--report", report, "--quiet"]
    out = subprocess.run(
        [sys.executable, "-m", "qft_cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=500,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert out.returncode == 1
    assert f"cannot write {report}" in out.stderr and out.stderr.strip().count("\n") == 0, out.stderr
    assert report.read_text() == "the old one" and list(tmp_path.iterdir()) == [report]


def test_help_comes_at_once():
    """In seconds of computing, the best of three: what else the machine does is not the command's business."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-m", "qft_cli", "eval", "--help"]
        out = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "--baseline" in out.stdout
    assert min(times) < 1.0, times

"""Files that an earlier version wrote load, merge and resume to the numbers that it had: see tests/fixtures/make.py."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import quick

import qft

FIXTURES = Path(__file__).parents[1] / "fixtures"
WRITTEN = FIXTURES / "written"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


@pytest.fixture
def make(monkeypatch):
    monkeypatch.syspath_prepend(str(FIXTURES))
    import make

    yield make
    sys.modules.pop("make", None)


def same(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(3))
def test_stored_bases_load_and_merge(make, number):
    numbers = EXPECTED[EXPECTED["formats"][number]]
    model = qft.load(WRITTEN / f"stored-{number}").eval()
    same(make.numbers(model), numbers["outputs"])
    same(make.numbers(qft.merge_to_float(model)), numbers["merged to float"])
    qft.merge(model)
    same(make.numbers(model), numbers["merged"])
    qft.unmerge(model)
    same(make.numbers(model), numbers["outputs"])


def test_an_adapter_loads_over_its_float_base_and_over_no_other(make):
    from tiny_training import small_llama

    numbers = EXPECTED["nf4"]
    same(make.numbers(qft.load(WRITTEN / "adapter", base=small_llama())), numbers["outputs"])
    with pytest.raises(qft.AdapterMismatch):
        qft.load(WRITTEN / "adapter", base=small_llama(seed=1))


def test_the_numbers_are_not_those_of_the_base_alone(make):
    model = qft.load(WRITTEN / "stored-0").eval()
    with model.disable_adapter():
        assert not torch.allclose(
            torch.tensor(make.numbers(model)), torch.tensor(EXPECTED["nf4"]["outputs"]), atol=1e-2
        )


def test_an_interrupted_run_goes_on_to_the_same_loss(make, tmp_path, monkeypatch):
    for name in ("model", "run", "data.jsonl"):
        source = WRITTEN / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    call = {"model": "model", "data_path": "data.jsonl", "project_name": "run", **quick(**make.RUN)}
    result = qft.train(**{**call, "log": "none", "save_total_limit": 1})
    assert Path(result.resumed_from).name == "checkpoint-4" and result.steps == EXPECTED["run"]["steps"]
    assert result.loss == pytest.approx(EXPECTED["run"]["loss"], rel=1e-4)

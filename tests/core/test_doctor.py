"""`qft.doctor` on this machine, and on machines with something wrong that the tests pretend."""

import importlib.metadata
import json
import shutil

import pytest
import torch

import qft
from qft.core import devices, doctor


@pytest.fixture(scope="module")
def here():
    return qft.doctor()


def test_the_public_name_stays_a_function():
    """A module of the same name would take its place once imported."""
    for _ in range(2):
        assert callable(qft.doctor) and qft.doctor is doctor.doctor


def test_every_quantizer_has_a_state_and_the_reference_works(here):
    assert here.quantizers.keys() == qft.available_quantizers().keys()
    assert here.quantizers["reference"]["state"] == "works"
    assert {q["state"] for q in here.quantizers.values()} <= {"works", "ready", "missing", "unusable", "fails"}
    for name, entry in here.quantizers.items():
        assert entry["state"] == "works" or entry["why"], name
    assert here.quantizers["gptq"]["why"] == "needs calibration data, and was not tried"


def test_its_figures_are_this_machines(here):
    assert here.versions["torch"] == importlib.metadata.version("torch")
    assert here.device == str(devices.default_device())
    assert here.devices[-1]["device"] == "cpu"
    assert 0 < here.memory["free"] <= here.memory["total"]
    assert all(d["free"] > 0 for d in here.disk.values())


def test_as_text_json_and_card(here):
    assert json.loads(here.to_json())["ok"] is here.ok
    text, card = str(here), here._repr_html_()
    for part in ("reference", "torch", "disk"):
        assert part in text and part in card


def test_problems_come_first_and_say_what_to_do():
    found = qft.Doctor(problems=[doctor.Problem("<it> is broken", "repair it")], versions={"torch": "1"})
    assert str(found).startswith("1 problem\n  <it> is broken\n    → repair it")
    assert not found.ok and "&lt;it&gt; is broken" in found._repr_html_()


def test_a_check_that_breaks_is_a_problem_and_the_rest_goes_on(monkeypatch):
    def broken(*args):
        raise OSError("the disk is on fire")

    monkeypatch.setattr(doctor, "_quantizers", lambda found: None)
    monkeypatch.setattr(shutil, "disk_usage", broken)
    found = qft.doctor()
    assert [p.what for p in found.problems] == ["disk space cannot be looked at"]
    assert "the disk is on fire" in found.problems[0].do
    assert found.versions and found.kernels


def test_a_quantizer_that_fails_is_a_problem(monkeypatch):
    found = qft.Doctor()
    one = {"reference": qft.available_quantizers()["reference"]}
    monkeypatch.setattr("qft.core.registry.available_quantizers", lambda: one)
    monkeypatch.setattr(qft.Reference, "quantize_layer", lambda *a, **k: 1 / 0)
    doctor._quantizers(found)
    assert found.quantizers["reference"]["state"] == "fails"
    assert "reference fails: division by zero" in found.problems[0].what


def test_a_quantizer_that_gives_other_numbers_is_a_problem(monkeypatch):
    found = qft.Doctor()
    one = {"reference": qft.available_quantizers()["reference"]}
    monkeypatch.setattr("qft.core.registry.available_quantizers", lambda: one)
    monkeypatch.setattr(qft.Reference, "dequantize", lambda self, weight, **k: torch.full(weight.shape, 5.0))
    doctor._quantizers(found)
    assert found.quantizers["reference"]["state"] == "fails"


def test_little_space_an_old_package_and_a_hidden_card(monkeypatch):
    found = qft.Doctor()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    doctor._disk(found)
    assert "free for downloads" in found.problems[0].what and "HF_HOME" in found.problems[0].do

    found = qft.Doctor()
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name == "peft" else version(name))
    doctor._versions(found)
    assert len(found.problems) == 1
    assert "peft is 0.1, and qft needs peft" in found.problems[0].what and "pip install 'peft" in found.problems[0].do

    found = qft.Doctor()
    monkeypatch.setattr(devices, "present", dict)
    monkeypatch.setattr(doctor, "_has_nvidia_card", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    doctor._devices(found)
    assert found.problems == [doctor.Problem("a CUDA device is hidden", "unset CUDA_VISIBLE_DEVICES")]


def test_a_mac_without_kernels(monkeypatch):
    monkeypatch.setattr(devices, "present", lambda: {"mps": 1})
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 2**34)
    monkeypatch.setenv(devices.DISABLE, "1")
    found = qft.Doctor()
    doctor._devices(found)
    doctor._environment(found)
    assert found.device == "cpu" and found.devices[0] == {"device": "mps:0", "name": "Apple MPS", "memory": 2**34}
    assert found.environment[devices.DISABLE] == "1" and found.ok

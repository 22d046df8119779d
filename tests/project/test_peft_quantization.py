"""PEFT's own tests over models that qft quantized: what the script reports, and what it measured."""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results" / "peft_quantization-cpu.json"
OFFLINE = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "Network is unreachable", "ProxyError")
"""What pip says where there is no package index."""

PASSES = """
    def test_float_and_quantized(self, config, quant):
        ids = torch.arange(10).view(1, -1)
        quantized, plain = quant.load_model(), AutoModelForCausalLM.from_pretrained("name", device_map={"": "cpu"})
        assert sum(isinstance(m, torch.nn.Linear) for m in plain.modules()) > 12 * 6
        a, b = (model(ids).logits.flatten() for model in (quantized, plain))
        assert 0.9 < torch.corrcoef(torch.stack((a, b)))[0, 1] and not torch.equal(a, b)
"""
SKIPS = """
    def test_skipped(self, config, quant):
        pytest.skip("PEFT's reason")
"""
FAILS = """
    def test_failing(self, config, quant):
        assert quant.name == "another", "by design"
"""
EXCLUDED = """
    def test_quantization_backend_is_set_and_repr(self, config, quant):
        assert quant is None
"""
EXCLUDED_PASSES = EXCLUDED.replace("is None", "is not None")
HEAD = """
import pytest, torch
from transformers import AutoModelForCausalLM
QUANTIZATION_BACKENDS = ["PEFT's loader"]
def _id(quant):
    return quant.name
@pytest.mark.parametrize("quant", QUANTIZATION_BACKENDS, ids=_id)
@pytest.mark.parametrize("config", ["config"])
class TestQuantization:
"""


@pytest.fixture(scope="module")
def script():
    """The script, as it is imported from its folder."""
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        found = importlib.util.spec_from_file_location("peft_quantization", BENCHMARKS / "peft_quantization.py")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


@pytest.fixture
def source(tmp_path):
    """A function that writes a folder in the form of PEFT's source package."""

    def write(*tests, version=None, head=HEAD):
        folder = tmp_path / "peft"
        for name in ("tests", "src/peft"):
            (folder / name).mkdir(parents=True)
        (folder / "tests" / "test_quantization.py").write_text(head + "".join(tests))
        version = version or importlib.metadata.version("peft")
        (folder / "src" / "peft" / "__init__.py").write_text(f'__version__ = "{version}"\n')
        return folder

    return write


def measured():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


# ---- the script ------------------------------------------------------------------------------------------


def test_outcomes_are_reported(script, source, tmp_path, capsys):
    folder = source(PASSES, SKIPS, FAILS, EXCLUDED)
    out = tmp_path / "out.json"
    assert script.main(["--source", str(folder), "--quantizers", "int8", "--controls", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    [run] = found["runs"]
    assert {k: run[k] for k in ("quantizer", "passed", "failed", "skipped", "excluded")} == {
        "quantizer": "int8", "passed": 1, "failed": 1, "skipped": 1, "excluded": 1,
    }  # fmt: skip
    outcomes = {name.partition("[")[0]: outcome["outcome"] for name, outcome in run["tests"].items()}
    assert outcomes["test_float_and_quantized"] == "passed"
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "test_failing" in line and "by design" in line
    assert not (folder / "tests" / "__init__.py").exists()  # the source is left alone


def test_an_exclusion_without_need_and_a_control_without_effect_are_faults(script, source, capsys):
    folder = source(SKIPS, EXCLUDED_PASSES)
    arguments = ["--source", str(folder), "--quantizers", "reference", "--controls", "no-update"]
    assert script.main(arguments) == 1
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "test_quantization_backend_is_set_and_repr" in first and "excluded without need" in first
    assert "control no-update: no test fails" in second


def test_a_module_of_another_form_is_an_error(script, source):
    """Else its tests would run over PEFT's own models, or none."""
    folder = source(SKIPS, head=HEAD.replace("QUANTIZATION_BACKENDS", "LOADERS").replace("_id(quant)", "_id(name)"))
    with pytest.raises(RuntimeError, match="QUANTIZATION_BACKENDS"):
        script.measure(folder, ["reference"], [])


def test_another_version_is_refused(script, source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--source", str(source(SKIPS, version="0.1.0"))])
    assert f"PEFT 0.1.0, and {importlib.metadata.version('peft')} is installed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--source", str(tmp_path / "missing.tar.gz")])
    assert "missing.tar.gz is not a source package" in capsys.readouterr().err


# ---- what was measured -----------------------------------------------------------------------------------


def skipped(run):
    return {name: outcome["reason"] for name, outcome in run["tests"].items() if outcome["outcome"] == "skipped"}


def failed(run):
    return {name for name, outcome in run["tests"].items() if outcome["outcome"] == "failed"}


def test_no_test_failed(script):
    result = measured()
    assert [r["quantizer"] for r in result["runs"]] == list(script.QUANTIZERS)
    assert result["excluded"] == script.EXCLUDED and not script.faults(result)
    names = [set(r["tests"]) for r in result["runs"]]
    assert all(n == names[0] for n in names)
    for run in result["runs"]:
        assert run["passed"] and run["failed"] == 0
        assert run["passed"] + run["skipped"] + run["excluded"] == len(run["tests"])
        assert all("MiSS is using 'bat' init" in reason for reason in skipped(run).values())
        assert {name.partition("[")[0] for name in failed(run)} == {"test_quantization_backend_is_set_and_repr"}
        assert {run["tests"][name]["reason"] for name in failed(run)} == {"assert 0 == 24"}


def test_the_tests_find_faults(script):
    """Other weights fail every comparison with the float model; merges without an update fail most merges."""
    controls = {c["control"]: failed(c) - failed(measured()["runs"][0]) for c in measured()["controls"]}
    assert list(controls) == list(script.CONTROLS)
    names = {name.partition("[")[0]: 0 for name in measured()["runs"][0]["tests"]}
    for name in measured()["runs"][0]["tests"]:
        names[name.partition("[")[0]] += 1
    compared, merged = "test_quantized_output_similar_to_non_quantized", "test_merge_unmerge_unload"
    assert {n.partition("[")[0] for n in controls["other-weights"]} == {compared}
    assert len(controls["other-weights"]) == names[compared]
    assert {n.partition("[")[0] for n in controls["no-update"]} == {merged}
    assert len(controls["no-update"]) > names[merged] / 2


def test_it_was_the_installed_minor_version():
    def minor(version):
        return version.split(".")[:2]

    assert minor(measured()["versions"]["peft"]) == minor(importlib.metadata.version("peft"))


@pytest.mark.slow
def test_a_quantizer_is_measured_anew(script, tmp_path):
    try:
        source = script.find_source(None, tmp_path)
    except script.NoSource as error:
        if any(said in str(error) for said in OFFLINE):
            pytest.skip("no package index to download PEFT's source from")
        raise
    result = script.measure(source, ["nf4"], script.CONTROLS)
    assert not script.faults(result)
    kept = measured()
    if result["sha256"] != kept["sha256"]:
        pytest.fail(f"PEFT {result['versions']['peft']} has other tests: run benchmarks/peft_quantization.py again")

    def outcomes(run):
        return {name: outcome["outcome"] for name, outcome in run["tests"].items()}

    assert outcomes(result["runs"][0]) == outcomes(kept["runs"][0])
    assert [outcomes(c) for c in result["controls"]] == [outcomes(c) for c in kept["controls"]]

"""A third party's package, installed by pip, is found through its entry point."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_python

PLUGIN = Path(__file__).parents[1] / "support" / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip installed the plug-in to, from a copy of its source."""
    missing = [n for n in ("pip", "setuptools") if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"installing the plug-in takes {' and '.join(missing)}: pip install pip setuptools")
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "site"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_plugin_is_listed_used_and_conforms(installed):
    out = run_python(
        """
        import sys, torch, qft
        assert "qft_toy" not in sys.modules, "importing qft imports no plug-in"
        assert qft.get_quantizer("toy:clip=0.9").clip == 0.9
        info = qft.available_quantizers()["toy"]
        assert (info.state, info.summary) == ("ready", "Symmetric 4-bit integers, two to a byte, one scale a row.")

        try:
            qft.get_quantizer("tay")
        except qft.UnknownQuantizer as error:
            assert "did you mean toy" in str(error), error

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        x = torch.randn(8, 64)
        y = model(x)
        qft.quantize(model, {"2": "toy", "*": "reference"}, progress=False)
        assert [w.quantizer[:4] for w in qft.audit(model).weights.values()] == ["Refe", "Toy("]
        print(float((model(x) - y).norm() / y.norm()))

        report = qft.testing.check_quantizer(qft.get_quantizer("toy"))
        assert not report.ruled_out, report
        print(len(report.passed))
        """,
        paths=[installed],
    )
    error, checks = map(float, out.split())
    assert 0.01 < error < 0.2
    assert checks == 17


def test_an_adapter_over_a_plugin_loads_only_where_the_plugin_is(installed, tmp_path):
    run_python(
        """
        import sys, torch, qft
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        torch.save(model.state_dict(), sys.argv[1] + "/float.pt")
        qft.save(qft.quantize_and_wrap(model, "toy", progress=False), sys.argv[1] + "/adapter")
        """,
        tmp_path,
        paths=[installed],
    )
    load = """
        import sys, torch, qft
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        model.load_state_dict(torch.load(sys.argv[1] + "/float.pt"))
        try:
            print(type(qft.load(sys.argv[1] + "/adapter", model).base_model.model[0].base_layer.quantizer).__name__)
        except qft.UnknownQuantizer as error:
            assert "'toy'" in str(error), error
            assert type(model[0]) is torch.nn.Linear
            print("unknown")
    """
    assert run_python(load, tmp_path, paths=[installed]).strip() == "Toy"
    assert run_python(load, tmp_path).strip() == "unknown"


def test_a_plugin_that_cannot_be_imported_is_reported_and_hurts_nobody(installed, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "qft_toy.py").write_text("import a_package_that_is_not_there\n")
    run_python(
        """
        import torch, qft
        info = qft.available_quantizers()["toy"]
        assert info.state == "unusable" and "a_package_that_is_not_there" in info.hint, info
        try:
            qft.get_quantizer("toy")
        except qft.MissingDependency as error:
            assert "qft_toy:Toy" in str(error), error
        else:
            raise SystemExit("no error")
        qft.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "reference", progress=False)
        """,
        paths=[site],
    )

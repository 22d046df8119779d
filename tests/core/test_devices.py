"""Which device qft uses, on machines that the tests only pretend to run on."""

import logging
import warnings

import pytest
import torch
from helpers import refuses
from models import llama

import qft
from qft.core import console, devices
from qft.pipeline import quantize

MPS = torch.device("mps")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (devices.DISABLE, devices.ENABLE, "QFT_QUIET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with these accelerators."""
    return lambda **kinds: monkeypatch.setattr(devices, "present", lambda: kinds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama(num_hidden_layers=1).save_pretrained(path)
    return path


def test_the_query_is_torchs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.present() == {"xpu": 3, "mps": 1}


@pytest.mark.parametrize(
    ("kinds", "variables", "expected"),
    [
        ({}, {}, "cpu"),
        ({"cuda": 2}, {}, "cuda:0"),
        ({"xpu": 1}, {}, "xpu:0"),
        ({"cuda": 1, "mps": 1}, {}, "cuda:0"),
        ({"mps": 1}, {}, "mps"),
        ({"mps": 1}, {devices.DISABLE: "1"}, "cpu"),
        ({"mps": 1}, {devices.DISABLE: "0"}, "mps"),
        ({"mps": 1}, {devices.DISABLE: "1", devices.ENABLE: "1"}, "cpu"),  # DISABLE wins
        ({"cuda": 1, "mps": 1}, {devices.DISABLE: "1"}, "cuda:0"),
        ({}, {devices.ENABLE: "1"}, "cpu"),
    ],
)
def test_the_default_device(machine, monkeypatch, kinds, variables, expected):
    machine(**kinds)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert devices.default_device() == torch.device(expected)


def test_a_device_that_was_named_must_exist_and_be_allowed(machine, monkeypatch):
    machine(cuda=2)
    assert devices.check_device("cuda:1") == torch.device("cuda:1")
    with refuses(qft.UnsupportedDevice, "cuda:2", "2 CUDA devices"):
        devices.check_device("cuda:2")
    with refuses(qft.UnsupportedDevice, "mps", "0 MPS devices"):
        devices.check_device("mps")
    machine(mps=1)
    assert devices.check_device("mps") == MPS
    monkeypatch.setenv(devices.DISABLE, "1")
    with refuses(qft.UnsupportedDevice, "AUTOTRAIN_DISABLE_MPS=1", "device='cpu'"):
        devices.check_device("mps")


@pytest.mark.parametrize(
    ("spec", "twin"),
    [
        ("nf4", qft.Reference(format="nf4", group_size=64)),
        ("fp4:double_quant=true", qft.Reference(format="fp4", group_size=64, double_quant=True)),
        ("int8", qft.Quanto(format="int8")),
    ],
)
def test_a_twin_takes_over_on_mps_and_says_so(spec, twin):
    with pytest.warns(qft.errors.QftWarning, match="kernels for (MPS|'mps'): using"):
        assert qft.get_quantizer(spec).on_device(MPS) == twin


def test_what_runs_on_mps_stays_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in ("reference", "hqq", "eetq"):
            q = qft.get_quantizer(spec)
            assert q.on_device(MPS) is q


def test_without_a_twin_it_is_refused_where_the_caller_chose_mps():
    with refuses(qft.UnsupportedDevice, "mps", "reference"):
        qft.get_quantizer("gptq").on_device(MPS)


def test_every_quantizer_is_placed_or_refused(machine):
    """Whatever is registered: it runs on MPS, a twin does, or the model goes to the CPU with a warning."""
    machine(mps=1)
    for name, info in qft.available_quantizers().items():
        if info.state != "ready":
            continue
        q = qft.get_quantizer(name) if name != "inc" else qft.get_quantizer("inc:method=rtn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            device = devices.place([q])
            if device == MPS:
                assert "mps" in q.on_device(device).capabilities.devices
        if device.type == "cpu":
            assert "the model goes to the CPU" in str(caught[0].message), name
        assert q.on_device(MPS) is q if "mps" in q.capabilities.devices else caught, name


def test_a_stored_format_has_no_twin(machine):
    machine(mps=1)
    q = qft.get_quantizer("nf4")
    assert devices.place([q]) == MPS
    with pytest.warns(qft.errors.QftWarning, match="no kernels for MPS: the model goes to the CPU"):
        assert devices.place([q], stored=True) == torch.device("cpu")


def test_enable_refuses_what_would_go_to_the_cpu(machine, monkeypatch):
    machine(mps=1)
    monkeypatch.setenv(devices.ENABLE, "1")
    assert devices.place([qft.get_quantizer("nf4")]) == MPS
    with refuses(qft.UnsupportedDevice, "AUTOTRAIN_ENABLE_MPS=1", "reference"):
        devices.place([qft.get_quantizer("gptq")])
    monkeypatch.setenv(devices.DISABLE, "1")
    assert devices.place([qft.get_quantizer("gptq")]) == torch.device("cpu")


def test_a_folder_goes_where_its_quantizer_runs(machine, folder):
    machine(mps=1)
    texts = [list(range(1, 33))] * 2
    with pytest.warns(qft.errors.QftWarning, match="the model goes to the CPU"):
        model = qft.quantize(folder, "gptq:group_size=32", calibration=texts, progress=False)
    assert model.device.type == "cpu"


def test_a_folder_is_loaded_onto_mps_with_the_twin(machine, monkeypatch, folder):
    """The last step, transformers' loading, is where a machine without MPS can no longer pretend."""
    machine(mps=1)
    asked = []

    def load(path, plan, device, progress, **options):
        asked.append((device, [q.on_device(device) for q in plan.quantizers.values()]))
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "load_quantized", load)
    with pytest.warns(qft.errors.QftWarning, match="no kernels for 'mps'"), pytest.raises(KeyboardInterrupt):
        qft.quantize(folder, "nf4", progress=False)
    assert asked == [(MPS, [qft.Reference(format="nf4", group_size=64)])]


def test_disabled_mps_leaves_the_folder_on_the_cpu(machine, monkeypatch, folder):
    machine(mps=1)
    monkeypatch.setenv(devices.DISABLE, "1")
    assert qft.quantize(folder, "reference", progress=False).device.type == "cpu"


# ---- what is said ------------------------------------------------------------------------------------------


def test_a_summary_goes_to_stderr_and_silence_is_kept(capsys, monkeypatch):
    qft.quantize_and_wrap(llama(num_hidden_layers=1), "reference", init="loftq")
    said = capsys.readouterr()
    assert said.out == "" and "bits a weight" in said.err and "trainable" in said.err
    monkeypatch.setenv("QFT_QUIET", "1")
    qft.quantize_and_wrap(llama(num_hidden_layers=1), "reference", init="loftq")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_logging_takes_the_summary_where_it_is_set_up(capsys, caplog):
    with caplog.at_level(logging.INFO, "qft"):
        console.say("something")
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [("qft", "INFO", "something")]
    assert capsys.readouterr().err == ""


def test_the_library_adds_no_handler_and_prints_nothing():
    import re
    from pathlib import Path

    assert logging.getLogger("qft").handlers == []
    sources = Path(qft.__file__).parent
    printing = [
        str(p)
        for p in sources.rglob("*.py")
        if p.parent.name != "cli" and re.search(r"^\s*print\(", p.read_text(), re.M)
    ]
    assert printing == []


@pytest.mark.gpu
def test_free_bytes_of_a_device_without_an_index():
    held = torch.zeros(2**28, device="cuda")
    total = torch.cuda.mem_get_info()[1]
    for device in ("cuda", "cuda:0"):
        assert 0 < devices.free_bytes(torch.device(device)) <= total - held.nbytes

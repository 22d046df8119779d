"""`qft train`, as a person at a shell meets it."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from helpers import hears_ctrl_c
from tiny_training import adapter_of, chats, save_model, write_jsonl
from typer.testing import CliRunner

import qft_cli

pytest.importorskip("trl", reason="pip install trl")


def qft(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "qft_cli", *map(str, words)], capture_output=True, text=True, timeout=500, **options
    )


def here(*words):
    """The same in this process, where nothing is trained: a new one takes seconds to import what it needs."""
    logger = logging.getLogger("qft")
    kept = logger.handlers[:], logger.level, logger.propagate
    try:
        out = CliRunner().invoke(qft_cli.app(), list(map(str, words)))
    finally:
        logger.handlers[:], logger.level, logger.propagate = kept
    assert out.exception is None or isinstance(out.exception, SystemExit), out.exception
    return subprocess.CompletedProcess(words, out.exit_code, out.stdout, out.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", chats())


FLAGS = (
    "--peft --quantization int4 --lora-r 4 --lora-alpha 8 --lora-dropout 0 --target-modules q_proj,v_proj --lr 1e-2 "
    "--mixed-precision no --merge-adapter --use-flash-attention-2 --batch-size 2 --gradient-accumulation 1 --max-steps 3 "
    "--seed 1 --log none --device cpu"
).split()


def one_line(out, code=1):
    assert out.returncode == code, out.stderr
    assert "Traceback" not in out.stderr
    lines = [line for line in out.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, out.stderr
    return lines[0]


def test_autotrains_flags_train_save_and_merge(model, data, tmp_path):
    out = qft("train", "--model", model, "--data-path", data, "--project-name", tmp_path / "out", *FLAGS, "--json")
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["steps"] == 3 and result["loss"] > 0
    assert "SDPA is used" in out.stderr  # where flash attention is not installed
    config = json.loads((tmp_path / "out" / "training.json").read_text())["config"]
    assert (config["quantization"], config["lora_r"], config["lora_alpha"], config["target_modules"]) == (
        "nf4",
        4,
        8,
        "q_proj,v_proj",
    )
    names = adapter_of(tmp_path / "out" / "adapter")
    assert len(names) == 2 * 2 * 2 and all("q_proj" in n or "v_proj" in n for n in names)
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


def test_a_yaml_file_with_overrides_is_checked_planned_and_not_run(model, data, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndata_path: {data}\nlr: 1e-3\nmax_steps: 3\nmax_seconds: 60\nlog: none\n"
    )
    call = [
        "train",
        tmp_path / "run.yaml",
        f"project_name={tmp_path / 'out'}",
        "lr=5e-4",
        "lora-r=2",
        "--dry-run",
        "device=cpu",
    ]
    out = here(*call)
    assert out.returncode == 0, out.stderr
    for text in ("causal-lm on cpu", "12 rows", "3 steps", "a card must have", "a new run", "would write"):
        assert text in out.stdout
    assert not (tmp_path / "out").exists()
    found = json.loads(here(*call, "--json").stdout)
    assert found["config"]["max_seconds"] == 60
    assert found["config"]["lr"] == 5e-4 and found["config"]["lora_r"] == 2 and found["config"]["peft"] is True


def test_quantization_without_peft_is_said_to_be_ignored(model, data, tmp_path):
    call = [
        "--model",
        model,
        "--data-path",
        data,
        "--project-name",
        tmp_path / "out",
        "--quantization",
        "int4",
        "--dry-run",
    ]
    out = here("train", *call)
    assert out.returncode == 0
    assert "--quantization is ignored without --peft" in out.stderr
    assert "all weights are trained" in out.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "MODEL"], "data_path must be given"),
        ([], "model and data_path must be given"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["RUN", "lerning_rate=1"], "did you mean lr"),
        (["RUN", "lr=fast"], "lr='fast'"),
        (["RUN", "--max-seconds", "0"], "max_seconds=0.0; it is above 0"),
        (["RUN", "other.yaml"], "one YAML file"),
        (["BAD"], "run.yaml line 3"),
        (["--model", "MODEL", "--data-path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "/nowhere/at/all", "--data-path", "DATA"], "/nowhere/at/all"),
        (["--model", "MODEL", "--data-path", "EMPTY"], "empty"),
        (["--model", "MODEL", "--data-path", "BROKEN"], "broken.jsonl line 2"),
        (["--model", "MODEL", "--data-path", "BROKEN"], "or --skip-bad-rows skips"),
        (["RUN", "project_name=FILE/out"], "project_name"),
    ],
)
def test_a_refusal_is_one_line(words, says, model, data, tmp_path, monkeypatch):
    texts = {
        "run.yaml": f"model: {model}\ndata_path: {data}\ndevice: cpu\n",
        "bad/run.yaml": "model: m\ndata_path: d\nepoch: 1\n",
        "empty.jsonl": "",
        "broken.jsonl": json.dumps(chats(1)[0]) + "\n{\n",
        "file": "mine",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    places = {
        "MODEL": model,
        "DATA": data,
        "RUN": "run.yaml",
        "BAD": "bad/run.yaml",
        "EMPTY": "empty.jsonl",
        "BROKEN": "broken.jsonl",
        "project_name=FILE/out": "project_name=file/out",
    }
    before = sorted(p.name for p in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    line = one_line(here("train", *(places.get(w, w) for w in words)))
    assert says in line and line.startswith("qft: error:")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_broken_rows_can_be_skipped_and_are_counted(model, tmp_path):
    rows = [json.dumps(row) for row in chats(4)]
    (tmp_path / "d.jsonl").write_text("\n".join([rows[0], "{", *rows[1:]]))
    call = ["--model", model, "--data-path", tmp_path / "d.jsonl", "--peft", "--skip-bad-rows", "--dry-run", "--json"]
    found = json.loads(here("train", *call, "--project-name", tmp_path / "out").stdout)
    assert found["data"]["train"]["rows"] == 4 and found["data"]["train"]["skipped"] == 1


def test_ctrl_c_names_the_last_checkpoint_and_the_same_command_goes_on(model, data, tmp_path):
    words = ["train", "--model", model, "--data-path", data, "--project-name", tmp_path / "out", *FLAGS, "--quiet"]
    words[words.index("--max-steps") + 1] = "2000"
    child = subprocess.Popen(
        [sys.executable, "-m", "qft_cli", *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=hears_ctrl_c,
    )  # fmt: skip
    end = time.time() + 200
    while not list((tmp_path / "out").glob("checkpoint-*")) and child.poll() is None and time.time() < end:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    last = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[-1]
    said = [line for line in stderr.splitlines() if "interrupted" in line]
    assert len(said) == 1 and str(last) in said[0] and "Traceback" not in stderr
    assert not list((tmp_path / "out").glob(".partial*"))
    found = json.loads(here(*words, "--dry-run", "--json").stdout)
    assert found["state"] == "resume" and found["checkpoint"] == str(last)


def test_a_disk_that_takes_no_more(model, data, tmp_path):
    """A limit on the size of files stands for a full disk: both fail in the middle of a write."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))

    call = ["--model", model, "--data-path", data, "--project-name", tmp_path / "out", *FLAGS, "--quiet"]
    out = qft("train", *(w for w in call if w != "--use-flash-attention-2"), preexec_fn=limit)
    line = one_line(out)
    assert "cannot write checkpoint-1" in line
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock") == ["training.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere: run as another user")
def test_a_folder_without_permission(model, data, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    line = one_line(
        qft("train", "--model", model, "--data-path", data, "--project-name", tmp_path / "shut" / "out", *FLAGS)
    )
    assert "cannot write" in line

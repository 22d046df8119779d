"""The verbs that plan, quantize, merge, export and look, as a person at a shell meets them; most of it in this process."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from helpers import hears_ctrl_c
from models import llama, logits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import qft
import qft_cli
from qft.cli import _common, _folders
from qft.core import doctor, files, registry
from qft.core.files import atomic_folder
from qft.data.files import read_texts
from qft.saving import open as opening

VERBS = ("audit", "backends", "doctor", "export", "merge", "plan", "quantize")


def run(*words, code=0, **options):
    """One verb in this process; its result, after the exit code was compared."""
    result = CliRunner().invoke(qft_cli.app(), list(map(str, words)), env={"COLUMNS": "200"}, **options)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def refused(*words, says, code=1, late=False):
    """One line on stderr, nothing on stdout. Where it comes `late`, progress is above it."""
    result = run(*words, code=code)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("qft: error:") or not late]
    assert len(lines) == 1, result.stderr
    for text in [says] if isinstance(says, str) else says:
        assert text in lines[0], lines[0]
    return lines[0]


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a tokenizer of single characters."""
    path = tmp_path_factory.mktemp("models") / "small"
    llama().save_pretrained(path)
    vocabulary = {chr(32 + i): i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="~").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """An adapter with something in it, over the model in NF4 of the reference quantizer."""
    path = tmp_path_factory.mktemp("adapters") / "tuned"
    model = qft.quantize_and_wrap(str(folder), "reference", device="cpu", progress=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    qft.save(model, path)
    return path


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "small-nf4"
    run("quantize", folder, path, "--quantizer", "nf4", "--device", "cpu")
    return path


# ---- help, completion, and what every verb shares ----------------------------------------------------------


def test_help_lists_every_verb_and_the_exit_codes():
    out = run("--help").stdout
    for verb in VERBS:
        assert f" {verb} " in out
    assert "130" in out and "refused" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb):
    out = run(verb, "--help").stdout
    assert "--json" in out
    if verb in ("export", "merge", "quantize"):
        assert "--dry-run" in out and "--overwrite" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys, qft_cli\nsys.argv = ['qft', 'quantize', '--help']\n"
        "try: qft_cli.main()\nexcept SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'qft', 'peft'} & set(sys.modules)\n"
        "others = [m for m in sys.modules if m.startswith('qft_cli_') and m != 'qft_cli_quantize']\n"
        "sys.exit(f'{bad} {others}' if bad or others else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--calibration" in done.stdout


def test_help_takes_less_than_a_second_of_this_machines_time():
    """CPU seconds of the process: the wall clock is what else the machine does."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "qft_cli", "export", "--help"], check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_completion_knows_the_registrys_names():
    assert set(qft_cli.QUANTIZERS) == set(registry._entries)
    assert qft_cli.complete_quantizer("a") == ["aqlm", "awq", "auto-round"]


@pytest.mark.parametrize("verb", ["quantize", "plan"])
def test_a_tab_completes_verbs_options_and_quantizers(verb):
    def tab(line):
        env = {"_QFT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
        return CliRunner().invoke(qft_cli.app(), [], env=env, prog_name="qft").stdout

    assert verb in tab(f"qft {verb[:2]}")
    assert "--quantizer" in tab(f"qft {verb} --quan")
    assert "gptq" in tab(f"qft {verb} --quantizer g") and "nf4" not in tab(f"qft {verb} --quantizer g")


def test_json_keeps_stdout_for_itself(capfd):
    with _common.answering(True) as answer:
        print("a library talks")
        os.write(1, b"and one in C\n")
        answer({"a": 1}, "text")
    said = capfd.readouterr()
    assert json.loads(said.out) == {"a": 1}
    assert "a library talks" in said.err and "and one in C" in said.err


def test_a_defect_keeps_its_traceback(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_folders, "audit", lambda model: 1 / 0)
    result = CliRunner().invoke(qft_cli.app(), ["quantize", str(folder), str(tmp_path / "out"), "--device", "cpu"])
    assert isinstance(result.exception, ZeroDivisionError)
    assert not (tmp_path / "out").exists()


# ---- plan --------------------------------------------------------------------------------------------------


def test_plan_is_the_librarys(folder):
    words = ("--quantizer", "reference", "--sequence-length", 64, "--batch-size", 2, "--lora-r", 4)
    found = json.loads(run("plan", folder, *words, "--optimizer", "adamw8bit", "--json").stdout)
    from peft import LoraConfig

    expected = qft.plan(
        str(folder), "reference", sequence_length=64, batch_size=2, optimizer="adamw8bit",
        adapter=LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"),
    )  # fmt: skip
    assert found == json.loads(expected.to_json())
    config = json.loads(run("plan", folder / "config.json", *words, "--optimizer", "adamw8bit", "--json").stdout)
    assert config["moments"] == found["moments"]
    assert "peak" in run("plan", folder, *words).stdout


def test_plan_within_a_memory(folder):
    words = ("plan", folder, "--sequence-length", 64)
    assert "holds it" in run(*words, "--memory", "24GB").stdout
    out = run(*words, "--memory", "100MB", code=1)
    assert "too little" in out.stdout
    refused(*words, "--memory", "24 potatoes", says="potatoes")
    refused(*words, "--optimizer", "adamx", says="adamx")


# ---- quantize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nf4", "reference:format=int,bits=3,group_size=32", "hqq:bits=4"])
def test_what_quantize_writes_loads_in_transformers(folder, tmp_path, spec):
    out = json.loads(run("quantize", folder, tmp_path / "q", "--quantizer", spec, "--device", "cpu", "--json").stdout)
    expected = qft.quantize(str(folder), spec, device="cpu", progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(logits(loaded), logits(expected))
    assert out["nbytes"] == sum(p.stat().st_size for p in (tmp_path / "q").iterdir()) == sum(out["files"].values())
    assert out["report"]["layers"] == 14
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_a_dry_run_writes_nothing_and_tells_the_size(folder, tmp_path):
    words = ("quantize", folder, tmp_path / "q", "--quantizer", "reference")
    told = json.loads(run(*words, "--dry-run", "--json").stdout)
    assert told["dry_run"] and not told["files"] and list(tmp_path.iterdir()) == []
    assert "would write about" in run(*words, "--dry-run").stdout
    run(*words, "--device", "cpu")
    weights = (tmp_path / "q" / "model.safetensors").stat().st_size
    assert told["nbytes"] == pytest.approx(weights, rel=0.1)  # the rest is the file's header


def test_calibration_from_a_file(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [
        "a text",
        {"text": "b" * 300},
        {"prompt": "c?", "completion": " d"},
        {"messages": [{"role": "user", "content": "e"}]},
    ]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ("quantize", folder, tmp_path / "q", "--quantizer", "gptq:group_size=32", "--device", "cpu")
    refused(*words, says=["needs calibration data", "--calibration"])
    run(*words, "--calibration", data)
    assert torch.isfinite(logits(opening.open_model(tmp_path / "q", device="cpu"))).all()  # without gptqmodel, too


@pytest.mark.parametrize("ending", ["json", "csv", "tsv", "parquet", "txt"])
def test_calibration_files_of_every_format(folder, tmp_path, ending, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # of training alone
    texts = ["one, two", 'three "four"\nfive', "sechs, sieben: ü"]
    file, rows = tmp_path / f"data.{ending}", [{"text": text, "id": i} for i, text in enumerate(texts)]
    if ending == "txt":
        file.write_bytes("\r\n\r\n".join(texts).encode("utf-8-sig"))
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif ending == "json":
        file.write_text(json.dumps({"note": "a [b]", "data": rows}))
    else:
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, ["text", "id"], delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    assert read_texts(file) == texts
    if ending in ("csv", "parquet"):
        words = ("--quantizer", "gptq:group_size=32", "--device", "cpu", "--calibration")
        run("quantize", folder, tmp_path / "q", *words, file)
        same = tmp_path / "same.jsonl"
        same.write_text("".join(json.dumps(text) + "\n" for text in texts))
        run("quantize", folder, tmp_path / "same", *words, same)
        assert listing(tmp_path / "q") == listing(tmp_path / "same")


def test_a_conversation_is_the_same_text_from_every_format(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]
    (tmp_path / "d.csv").write_text("messages\n" + '"' + json.dumps(messages).replace('"', '""') + '"\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps({"messages": messages}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for template in (None, "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"):
        tokenizer.chat_template = template
        found = {ending: read_texts(tmp_path / f"d.{ending}", tokenizer) for ending in ("csv", "parquet", "json")}
        assert found["csv"] == found["parquet"] == found["json"], found
    assert found["csv"] == ["['role', 'content']['role', 'content', 'name']"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('"good"\n{"text": "x"\n', "data.jsonl line 2: broken JSON"),
        ('"good"\n\n{"body": "x"}\n', "line 3: has body, and a row has"),
        ("[1]\n", "line 1"),
        ("", "holds no text"),
        ('{"text": " "}\n', "holds no text"),
    ],
)
def test_bad_calibration_files(folder, tmp_path, content, says):
    (tmp_path / "data.jsonl").write_text(content)
    words = ("quantize", folder, tmp_path / "q", "--quantizer", "gptq", "--calibration", tmp_path / "data.jsonl")
    refused(*words, says=says)
    assert (tmp_path / "data.jsonl").read_text() == content and not (tmp_path / "q").exists()


def test_calibration_files_that_are_none(folder, tmp_path):
    words = ("quantize", folder, tmp_path / "q", "--quantizer", "gptq", "--calibration")
    (tmp_path / "texts.jsonl").write_bytes(b"\xff\xfe\x00")
    refused(*words, tmp_path / "texts.jsonl", says="UTF-8")
    refused(*words, tmp_path / "text.jsonl", says=["there is no", "texts.jsonl"])
    refused(*words, tmp_path, says="cannot read")
    (tmp_path / "texts.parquet").write_bytes(b"PAR1nonsense")
    refused(*words, tmp_path / "texts.parquet", says="is no parquet file")
    (tmp_path / "texts.csv").write_text("text,id\na,1\nb\n")
    refused(*words, tmp_path / "texts.csv", says="texts.csv line 3: fewer values")
    refused(*words, folder / "config.yaml", says=["there is no file", "config.json"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--quantizer": "nf5"}, "did you mean"),
        ({"--quantizer": "hqq:bits=banana"}, "bits"),
        ({"--dtype": "float12"}, "float12"),
        ({"--device": "cuda:99"}, "CUDA devices"),
        ({"--device": "gpu"}, "is no device"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(folder, tmp_path, change, says):
    refused("quantize", folder, tmp_path / "q", *(w for pair in change.items() for w in pair), says=says)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_path_gets_near_names(folder, tmp_path):
    refused("quantize", folder.parent / "smal", tmp_path / "q", says=["there is no", f"did you mean {folder}?"])
    refused("quantize", "/nowhere/at/all", tmp_path / "q", says="/nowhere/at/all")
    refused("plan", folder / "confg.json", says="config.json")
    refused("quantize", "some/model-of-nobody", tmp_path / "q", says="some/model-of-nobody")
    refused("quantize", tmp_path, tmp_path / "q", says="config.json")


def test_an_id_of_the_hub_is_not_taken_for_a_near_name(folder, tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "Qwen3-4B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert files.check_model_path("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    monkeypatch.chdir(folder.parent)
    assert files.check_model_path("smalll") == "smalll"
    refused("quantize", "smalll", tmp_path / "q", says=["no model of that id", "did you mean small?"])  # once asked for


def test_models_that_are_not_for_quantize(folder, adapter, quantized, tmp_path):
    refused("quantize", adapter, tmp_path / "q", says="qft merge")
    refused("quantize", quantized, tmp_path / "q", says="quantized already")


# ---- output folders ----------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_without_overwrite(folder, tmp_path):
    out = tmp_path / "q"
    out.mkdir()
    words = ("quantize", folder, out, "--quantizer", "reference", "--device", "cpu")
    run(*words, "--dry-run")  # empty: nobody's
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    before = listing(out)
    refused(*words, says=["not empty", "--overwrite"])
    refused(*words, "--dry-run", says="not empty")
    assert listing(out) == before
    run(*words, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and (out / "model.safetensors").is_file()
    assert not (out / "model-00001-of-00002.safetensors").exists()


def test_outputs_that_cannot_be(folder, adapter, tmp_path):
    before = listing(folder)
    refused("quantize", folder, folder, "--overwrite", says="is what is read")
    assert listing(folder) == before
    (tmp_path / "file").write_text("mine")
    refused("quantize", folder, tmp_path / "file", says="is a file")
    refused("quantize", folder, tmp_path / "file" / "q", says="file")
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    refused("quantize", folder, copy, "--overwrite", says="holds an adapter")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_permission(folder, tmp_path, monkeypatch):
    """Root may write anywhere, so the question is answered for it."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("quantize", folder, tmp_path / "q", says="no permission")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_seen_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    refused("quantize", folder, tmp_path / "q", says=["are needed", "are free"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "safetensors"])
def test_a_disk_that_fills_up(folder, tmp_path, monkeypatch, error):
    if error == "safetensors":
        error = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    out = tmp_path / "q"
    out.mkdir()
    (out / "notes.txt").write_text("mine")

    def full(state, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    says = ["cannot write to", "No space left on device"]
    refused("quantize", folder, out, "--device", "cpu", "--overwrite", says=says, late=True)
    assert listing(tmp_path) == {"q/notes.txt": b"mine"}


def test_a_real_full_disk(folder, tmp_path, monkeypatch):
    """A file system of 64 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
        refused("quantize", folder, disk / "q", "--device", "cpu", says="cannot write to", late=True)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_ctrl_c_in_the_middle(folder, tmp_path, monkeypatch):
    def interrupted(state, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
    result = run("quantize", folder, tmp_path / "q", "--device", "cpu", code=130)
    assert "interrupted" in result.stderr and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_real_ctrl_c(folder, tmp_path):
    """SIGINT to the process once its temporary folder is there."""
    code = (
        "import sys, time, qft_cli, transformers.modeling_utils as m\n"
        "m.safe_save_file = lambda *a, **k: time.sleep(60)\n"
        f"sys.argv = ['qft', 'quantize', {str(folder)!r}, {str(tmp_path / 'q')!r}, '--device', 'cpu']\nqft_cli.main()"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=pipe, stdout=pipe, text=True, preexec_fn=hears_ctrl_c
    )
    end = time.monotonic() + 300
    while not any(tmp_path.iterdir()) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err and out == ""
    assert list(tmp_path.iterdir()) == []


# ---- merge and export --------------------------------------------------------------------------------------


def test_merge_into_floats_is_the_librarys(folder, adapter, tmp_path):
    told = json.loads(run("merge", adapter, tmp_path / "m", "--dry-run", "--json").stdout)
    out = json.loads(run("merge", adapter, tmp_path / "m", "--device", "cpu", "--json").stdout)
    expected = qft.merge_to_float(qft.load(adapter, device="cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(expected))
    assert out["report"]["route"] == "float" and out["report"]["weights"] == 14
    assert out["report"]["survived"] == pytest.approx(expected.merge_report.survived)
    assert told["nbytes"] == pytest.approx((tmp_path / "m" / "model.safetensors").stat().st_size, rel=0.02)
    assert (tmp_path / "m" / "tokenizer.json").is_file()  # the base's


def test_merge_into_the_quantized_weights(adapter, tmp_path):
    told = json.loads(run("merge", adapter, tmp_path / "m", "--into", "quantized", "--dry-run", "--json").stdout)
    text = run("merge", adapter, tmp_path / "m", "--into", "quantized", "--device", "cpu").stdout
    model = qft.load(adapter, device="cpu")
    report = qft.merge(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert report.recommendation in text
    assert qft.audit(loaded).bits_per_weight == pytest.approx(4.5)
    assert told["nbytes"] == pytest.approx((tmp_path / "m" / "model.safetensors").stat().st_size, rel=0.1)
    assert qft.wrap(loaded).peft_config  # and can be tuned once more


def test_merge_over_another_base_and_from_the_original(folder, adapter, tmp_path):
    run(
        "merge",
        adapter,
        tmp_path / "m",
        "--base",
        folder,
        "--original",
        folder,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.bfloat16


def test_what_merge_refuses(folder, adapter, quantized, tmp_path):
    refused("merge", folder, tmp_path / "m", says=["no adapter", "qft export"])
    refused("merge", adapter.parent / "tunde", tmp_path / "m", says=f"did you mean {adapter}?")
    refused("merge", adapter.parent, tmp_path / "m", says=f"did you mean {adapter}?")
    refused("merge", adapter, tmp_path / "m", "--into", "quantized", "--dtype", "float16", says="dtype")
    refused("merge", adapter, tmp_path / "m", "--dtype", "float12", says="float12")
    refused("merge", adapter, tmp_path / "m", "--base", folder.parent / "smalll", says=str(folder))
    refused("merge", adapter, adapter, "--overwrite", says="is what is read")
    refused("merge", adapter, folder, "--base", folder, "--overwrite", says="is what is read")
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"not it")
    refused("merge", broken, tmp_path / "m", says="damaged")
    assert not (tmp_path / "m").exists()
    assert run("merge", adapter, tmp_path / "m", "--into", "gold", code=2).stdout == ""


def test_export_an_adapter_and_a_quantized_model(adapter, quantized, tmp_path):
    run("export", adapter, tmp_path / "a", "--device", "cpu")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a")),
        logits(qft.merge_to_float(qft.load(adapter, device="cpu"))),
    )
    run("export", quantized, tmp_path / "q", "--device", "cpu")
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    packed = AutoModelForCausalLM.from_pretrained(quantized)
    for name, module in floats.named_modules():
        if "proj" in name:
            q = registry.quantizer_of(packed.get_submodule(name))
            weight = q.dequantize(q.weights(packed.get_submodule(name))[0], dtype=torch.float32)
            assert torch.equal(module.weight.data, weight)


def test_export_to_gguf_is_refused_where_it_has_no_tokenizer_or_name(adapter, folder, tmp_path):
    assert run("export", adapter, tmp_path / "a", "--format", "ggfu", code=2).stdout == ""
    refused("export", folder, tmp_path / "a", says="float model")
    assert not (tmp_path / "a").exists()


# ---- audit, backends, doctor -------------------------------------------------------------------------------


def test_audit_of_a_folder(folder, quantized, adapter, tmp_path):
    found = json.loads(run("audit", quantized, "--original", folder, "--device", "cpu", "--json").stdout)
    expected = qft.audit(AutoModelForCausalLM.from_pretrained(quantized), original=str(folder))
    assert found == json.loads(expected.to_json())
    (tmp_path / "data.jsonl").write_text(json.dumps("some text, " * 30) + "\n")
    out = run("audit", adapter, "--original", folder, "--data", tmp_path / "data.jsonl", "--device", "cpu").stdout
    assert "bits a weight" in out and "tokens" in out
    refused("audit", folder, says="float model")
    refused("audit", quantized, "--base", folder, says="--base goes with an adapter")
    refused("audit", str(quantized) + "x", says=str(quantized))


def test_backends_as_json():
    found = {row["name"]: row for row in json.loads(run("backends", "--json").stdout)}
    assert found.keys() == qft.available_quantizers().keys()
    assert found["reference"]["state"] == "ready" and found["reference"]["capabilities"]["requantize"] is True
    for name, row in found.items():
        assert row["state"] == "ready" or row["hint"], name


def test_a_missing_package_has_its_hint(monkeypatch):
    monkeypatch.setattr(qft.TorchAO, "requires", ("torchao-of-nobody>=9",))
    row = next(r for r in json.loads(run("backends", "--json").stdout) if r["name"] == "torchao")
    assert row["state"] == "missing" and "pip install" in row["hint"]


def test_doctor_exits_by_what_it_found(monkeypatch):
    monkeypatch.setattr(doctor, "_quantizers", lambda found: None)
    assert json.loads(run("doctor", "--json").stdout)["ok"] is True
    monkeypatch.setattr(doctor, "_disk", lambda found: 1 / 0)
    out = run("doctor", code=1).stdout
    assert out.startswith("1 problem\n  disk space cannot be looked at")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: qft.plan(str(folder), "reference", sequence_length=64), "at the peak"),
        (lambda folder: qft.lora.merging.merge.MergeReport("quantized"), "of the update survived"),
    ],
)
def test_cards(folder, make, says):
    result = make(folder)
    card = result._repr_html_()
    assert says in card and card.count("<div") == card.count("</div>") and "<script" not in card
    assert str(result).splitlines()[-1].strip()[:20] in card


# ---- the temporary folder ----------------------------------------------------------------------------------


def test_safetensors_own_error_is_a_bad_folder(tmp_path):
    with pytest.raises(qft.BadFolder, match="cannot write to"), atomic_folder(tmp_path / "out"):
        raise safetensors.SafetensorError("I/O error")
    assert list(tmp_path.iterdir()) == []

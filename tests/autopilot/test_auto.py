"""`qft.auto`: decisions go by data, model and memory; a run gives a merged model and a page; bad input leaves no trace."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import refuses
from models import llama
from tiny_training import SIZE, chats, save_model, write_jsonl
from transformers import LlamaConfig
from typer.testing import CliRunner

import qft
import qft_cli
from qft.autopilot import decide
from qft.memory.report import GIB

pytest.importorskip("trl", reason="pip install trl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = llama(vocab_size=SIZE, hidden_size=64, intermediate_size=128, max_position_embeddings=256)
    return save_model(tmp_path_factory.mktemp("model"), model=made)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The config of a model with 8 billion parameters, without weights."""
    folder = tmp_path_factory.mktemp("large")
    save_model(folder)
    (folder / "model.safetensors").unlink()
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", chats(40))


@pytest.fixture
def roomy(monkeypatch):
    monkeypatch.setattr(decide, "free_bytes", lambda device: 2000 * GIB)


def decided(*args, **options):
    result = qft.auto(*args, dry_run=True, device="cpu", progress=False, **options)
    return {d.name: d for d in result.decisions}


def rows(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- decisions ---------------------------------------------------------------------------------------------


def test_each_decision_has_a_value_and_a_sentence_and_a_dry_run_writes_nothing(model, data, tmp_path, roomy):
    found = decided(model, data, out=tmp_path / "out", memory="4GiB")
    assert list(found) == [
        "memory", "held-out rows", "rank", "quantizer", "init", "sequence length", "batch", "recompute", "learning rate",
        "steps",
    ]  # fmt: skip
    assert all(d.value and d.reason.endswith(".") for d in found.values())
    assert found["memory"].value == "4.00 GiB" and found["held-out rows"].value == "4"
    assert (found["quantizer"].value, found["init"].value, found["recompute"].value) == ("int8", "zero", "nothing")
    assert found["sequence length"].value == "29 tokens" and "nothing is cut" in found["sequence length"].reason
    assert found["batch"].value == "4 × 1 = 4 rows a step"
    assert found["steps"].value == "27"  # 3 epochs of 36 rows, 4 a step
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_less_memory_takes_fewer_bits_then_recomputes_then_is_refused(large, data, tmp_path, roomy):
    out = {"out": tmp_path / "out", "memory": "200GiB"}
    ample = decided(large, data, **out)
    assert (ample["quantizer"].value, ample["init"].value) == ("int8", "zero")
    assert ample["learning rate"].value == "0.0002, cosine"
    sizes = {}
    for name in ("int8", "nf4", "nf4:double_quant=true"):
        plan = qft.plan(large, name, sequence_length=29, device="cpu", fast=False, dtype="float32",
                        adapter=_adapter(), memory="least")  # fmt: skip
        sizes[name] = plan.needed
    assert sizes["int8"] > sizes["nf4"] > sizes["nf4:double_quant=true"]
    for limit, name in ((sizes["int8"] - 1, "nf4"), (sizes["nf4"] - 1, "nf4:double_quant=true")):
        found = decided(large, data, out=tmp_path / "out", memory=limit)
        assert (found["quantizer"].value, found["init"].value) == (name, "qera")
        assert f"{name} fits" in found["quantizer"].reason and "int8" in found["quantizer"].reason
    with refuses(qft.BadOption, "too little for this model", "GiB to train on one sequence of 29 tokens"):
        decided(large, data, out=tmp_path / "out", memory=sizes["nf4:double_quant=true"] - 1)


def _adapter():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def test_the_lesser_of_what_is_given_and_what_is_there_counts(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(decide, "free_bytes", lambda device: 3 * GIB)
    found = decided(model, data, out=tmp_path / "out", memory="24GB")["memory"]
    assert found.value == "3.00 GiB" and "22.35 GiB were given" in found.reason
    assert decided(model, data, out=tmp_path / "out")["memory"].value == "3.00 GiB"


def test_what_is_given_is_kept(model, data, tmp_path, roomy):
    found = decided(model, data, out=tmp_path / "o", quantizer="nf4", init="loftq", rank=4, steps=7)
    assert [found[k].value for k in ("quantizer", "init", "rank", "steps")] == ["nf4", "loftq", "r=4, alpha=8", "7"]
    assert all("given" in found[k].reason for k in ("quantizer", "init", "rank", "steps"))


# ---- a run -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_a_run_on_cuda(model, data, tmp_path, quantizer):
    options = {"memory": "4GiB", "device": "cuda", "time_limit": "5min", "quantizer": quantizer, "progress": False}
    result = qft.auto(model, data, out=tmp_path / "out", **options)
    assert result.perplexity["after"] < result.perplexity["before"]
    assert result.perplexity["merged"] == pytest.approx(result.perplexity["after"], rel=0.05)  # bfloat16
    assert 0 < result.nbytes["most on the GPU while training"] < 4 * GIB
    assert "cuda" in result.setup["device"].lower() or "nvidia" in result.setup["device"].lower()


def test_a_run_trains_merges_and_reports_and_is_not_done_twice(model, data, tmp_path):
    from transformers import AutoModelForCausalLM

    options = {"out": tmp_path / "out", "memory": "8GiB", "device": "cpu", "time_limit": "10min", "progress": False}
    result = qft.auto(model, data, **options)
    assert list(result.perplexity) == ["before", "quantized", "after", "merged"]
    assert result.perplexity["after"] < result.perplexity["before"]  # it learns to repeat a letter
    assert result.perplexity["merged"] == pytest.approx(result.perplexity["after"], rel=1e-3)
    assert result.drift["merging"]["kl"] < 1e-4 < result.drift["tuning"]["kl"]
    assert result.steps == 27 and result.history[-1]["step"] == 27
    assert "as measured" not in result.decisions[-1].reason and "s a step" in result.decisions[-1].reason
    assert rows(tmp_path / "out") == ["auto.json", "report.html", "training"]
    AutoModelForCausalLM.from_pretrained(result.merged)
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("Decisions", "because", "held-out loss", "Drift", "merged model on disk", "torch"):
        assert text in page, text
    again = qft.auto(model, data, **options)
    assert again.already_finished and again.perplexity == result.perplexity and again.decisions == result.decisions
    with refuses(qft.BadOption, "asked for otherwise", "seed was 0 and is 1"):
        qft.auto(model, data, **options, seed=1)


def test_an_interrupted_run_goes_on_with_what_was_decided(model, data, tmp_path, monkeypatch):
    options = {"out": tmp_path / "out", "memory": "8GiB", "device": "cpu", "steps": 3, "progress": False}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qft.training.run.train", stop)
        with pytest.raises(KeyboardInterrupt):
            qft.auto(model, data, **options)
    note = json.loads((tmp_path / "out" / "auto.json").read_text())
    assert note["state"] == "training"
    result = qft.auto(model, data, **options)
    assert result.resumed and result.steps == 3
    assert [d.value for d in result.decisions] == [d["value"] for d in note["decisions"]]


def test_a_time_limit_ends_training_early_and_the_rest_is_done_and_told(model, data, tmp_path):
    options = {"out": tmp_path / "out", "memory": "8GiB", "device": "cpu", "progress": False}
    result = qft.auto(model, data, **options, steps=5, time_limit=0.01)
    assert result.decisions[-1].value == "5" and result.steps == 1
    told = [n for n in result.notes if "1 of 5 steps" in n]
    assert len(told) == 1 and "time limit" in told[0]
    assert told[0] in str(result) and told[0] in (tmp_path / "out" / "report.html").read_text()
    assert set(result.perplexity) == {"before", "quantized", "after", "merged"}


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"memory": "lots"}, qft.BadOption, ["memory 'lots'", "24GB"]),
        ({"memory": "0GB"}, qft.BadOption, ["memory '0GB'"]),
        ({"memory": "100MB"}, qft.BadOption, ["too little for this model"]),
        ({"time_limit": "soon"}, qft.BadOption, ["time_limit='soon'", "8min"]),
        ({"time_limit": -1}, qft.BadOption, ["time_limit=-1"]),
        ({"rank": 0}, qft.BadOption, ["rank=0"]),
        ({"quantizer": "nf5"}, qft.UnknownQuantizer, ["nf5"]),
        ({"valid": "other"}, qft.BadOption, ["valid_split='other'"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(model, data, tmp_path, changes, error, says):
    with refuses(error, *says):
        qft.auto(model, data, out=tmp_path / "out", device="cpu", progress=False, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", qft.BadFolder, ["no rows"]),
        ('{"text": "a b"}\n{"text": \n', qft.BadFolder, ["line 2", "broken JSON"]),
        ('{"text": "abcdef"}\n', qft.BadOption, ["1 row", "held out"]),
        ('{"body": "a"}\n{"body": "b"}\n', qft.BadOption, ["body"]),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', qft.UnsupportedOperation, ["use qft train"]),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(model, tmp_path, text, error, says):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with refuses(error, *says):
        qft.auto(model, file, out=tmp_path / "out", device="cpu", progress=False)
    assert file.read_text() == text and not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_left_alone(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with refuses(qft.BadFolder, "thesis.txt", "new or an empty folder"):
        qft.auto(model, data, out=tmp_path / "out", device="cpu")
    with refuses(qft.BadFolder, "is a file"):
        qft.auto(model, data, out=tmp_path / "out" / "thesis.txt", device="cpu")
    assert rows(tmp_path / "out") == ["thesis.txt"]
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "out" / "auto.json")
    with refuses(qft.BadFolder, "damaged"):
        qft.auto(model, data, out=tmp_path / "out", device="cpu")


def test_no_model_and_no_data(data, model, tmp_path):
    for where, rows_, says in (("./none", data, "no folder"), (model, "./none.jsonl", "none.jsonl")):
        with refuses(qft.BadFolder, says):
            qft.auto(where, rows_, out=tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


# ---- the verb ----------------------------------------------------------------------------------------------


def run(*words, code=0):
    result = CliRunner().invoke(qft_cli.app("auto"), ["auto", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def test_the_verb_tells_decisions_as_text_and_as_json(model, data, tmp_path):
    words = (
        model,
        data,
        "--memory",
        "2GiB",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--quantizer",
        "nf4",
        "--dry-run",
    )
    text = run(*words).stdout
    assert text.startswith("would train") and text.endswith("nothing was written\n") and "It was given" in text
    told = json.loads(run(*words, "--json").stdout)
    assert told["dry_run"] and [d["value"] for d in told["decisions"] if d["name"] == "quantizer"] == ["nf4"]
    assert list(tmp_path.iterdir()) == []


def test_the_verb_refuses_in_one_line(model, data, tmp_path):
    for words, says in (
        ((model, data, "--memory", "much"), "memory 'much'"),
        ((model, tmp_path / "none.jsonl"), "none.jsonl"),
    ):
        result = run(*words, "--out", tmp_path / "out", "--device", "cpu", code=1)
        assert result.stdout == "" and says in result.stderr
        assert len([line for line in result.stderr.splitlines() if line.startswith("qft: error:")]) == 1
    assert list(tmp_path.iterdir()) == []


# ---- the instruction file ----------------------------------------------------------------------------------


def test_the_instruction_file_is_the_same_each_time_and_its_answers_are_right(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "make_instructions.py"
    for name in ("a.jsonl", "b.jsonl"):
        subprocess.run([sys.executable, script, tmp_path / name], check=True, capture_output=True)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    chats = [json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({question["content"] for question, _ in chats}) == 200
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    sums = [re.match(r"What is (\d+) (\w+) (\d+)\?", question["content"]) for question, _ in chats]
    right = [
        answer["content"].endswith(f" is {signs[m[2]](int(m[1]), int(m[3]))}.")
        for m, (_, answer) in zip(sums, chats)
        if m
    ]
    assert len(right) == 50 and all(right)

"""Configurations and data of `qft.train`: what is read, and what is refused before a model is loaded."""

import csv
import json
import shutil

import pytest
from helpers import refuses
from tiny_training import chats, quick, save_model, write_jsonl

import qft
from qft.data.splits import held_out, read_data

pytest.importorskip("trl", reason="pip install trl")
datasets = pytest.importorskip("datasets", reason="pip install datasets")


# ---- configurations ----------------------------------------------------------------------------------------


def test_a_configuration_goes_through_json_and_yaml(tmp_path):
    config = qft.TrainConfig("m", "d.jsonl", lr=3e-5, target_modules=["q_proj"], quantization={"*": "nf4"}, max_steps=3)
    assert qft.TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert qft.TrainConfig.from_yaml(tmp_path / "run.yaml") == config
    assert config.replace(lr=1).lr == 1.0 and config.lr == 3e-5


def test_yaml_as_people_write_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "# mine\nmodel: m\ndata_path: d.jsonl\nlr: 1e-4\nquantization: int4\nmixed_precision: none\nsave_steps: 50\n"
    )
    config = qft.TrainConfig.from_yaml(path, {"epochs": 3})
    assert (config.lr, config.quantization, config.mixed_precision, config.save_steps, config.epochs) == (
        1e-4,
        "nf4",
        "no",
        50,
        3,
    )


def test_defaults_are_those_of_quantized_training():
    config = qft.TrainConfig("m", "d")
    assert (config.lr, config.quantization, config.max_grad_norm, config.scheduler) == (2e-4, "nf4", 1.0, "cosine")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\ndata_path: d\nlora_rank: 8\n", ["line 3", "lora_rank", "did you mean lora_r"]),
        ("model: m\ndata_path: d\nlearning_rate: 1\n", ["line 3", "did you mean lr?"]),
        ("model: m\ndata_path: d\nxyzzy: 1\n", ["line 3", "qft.TrainConfig"]),
        ("model: m\ndata_path: d\n\nlr: fast\n", ["line 4", "lr='fast'", "a number"]),
        ("model: m\ndata_path: d\nlora_r: 0\n", ["line 3", "at least 1"]),
        ("model: m\ndata_path: d\nlora_r: 1.5\n", ["line 3", "an integer"]),
        ("model: m\ndata_path: d\nlr: -1\n", ["line 3", "above 0"]),
        ("model: m\ndata_path: d\nlr: .nan\n", ["line 3", "finite"]),
        ("model: m\ndata_path: d\nlora_dropout: 1\n", ["line 3", "a share"]),
        ("model: m\ndata_path: d\npacking: 1\n", ["line 3", "true or false"]),
        ("model: m\ndata_path: d\ntask: clm\n", ["line 3", "causal-lm"]),
        ("model: m\ndata_path: d\nmodel: n\n", ["line 3", "second time", "line 1"]),
        ("model: m\n", ["data_path must be given"]),
        ("model: [m\n", ["line", "not YAML"]),
        ("- model\n", ["a mapping"]),
    ],
)
def test_a_wrong_configuration_names_the_line(tmp_path, text, says):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with refuses(qft.BadOption, *says):
        qft.TrainConfig.from_yaml(path)


def test_a_configuration_that_is_not_there(tmp_path):
    with refuses(qft.BadFolder, "run.yaml"):
        qft.TrainConfig.from_yaml(tmp_path / "run.yaml")
    with refuses(qft.BadOption, "learning_rate", "lr"):
        qft.train(model="m", data_path="d", learning_rate=1)


# ---- files -------------------------------------------------------------------------------------------------

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'three "four"\nfive', "label": "b"}]


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    (tmp_path / "d.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "wrapped.json").write_text(json.dumps({"note": "a [b]", "data": ROWS}))
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "d.parquet")
    made.save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "wrapped.json", "d.csv", "d.parquet", "saved"])
def test_every_format_gives_the_same_rows(files, name):
    rows, valid = read_data(str(files / name))
    assert list(rows.rows) == ROWS and valid is None
    assert rows.columns == ["text", "label"]
    again, _ = read_data(str(files / name))
    assert again.digest == rows.digest


def test_places_are_lines_of_the_file(files):
    rows, _ = read_data(str(files / "d.csv"))
    assert [rows.where(i) for i in range(2)] == [f"{files}/d.csv line 2", f"{files}/d.csv line 3"]
    rows, _ = read_data(str(files / "d.json"))
    assert [rows.where(i) for i in range(2)] == [f"{files}/d.json line 2", f"{files}/d.json line 6"]
    assert read_data(str(files / "d.parquet"))[0].where(1) == f"{files}/d.parquet row 2"
    assert read_data(str(files / "wrapped.json"))[0].where(1) == f"{files}/wrapped.json row 2"


def test_folders_with_files_and_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", chats(3))
    write_jsonl(tmp_path / "valid.jsonl", chats(2))
    train, valid = read_data(str(tmp_path))
    assert (len(train), len(valid)) == (3, 2)
    with refuses(qft.BadOption, "train, valid"):
        read_data(str(tmp_path), valid_split="dev")
    made = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(chats(3)), "test": datasets.Dataset.from_list(chats(1))}
    )
    made.save_to_disk(tmp_path / "saved")
    train, valid = read_data(str(tmp_path / "saved"))
    assert (len(train), len(valid)) == (3, 1)
    other = write_jsonl(tmp_path / "other.jsonl", chats(4))
    assert len(read_data(other, valid_split=str(tmp_path / "valid.jsonl"))[1]) == 2


def test_a_broken_line_is_named_and_the_rest_is_untouched(tmp_path):
    good = [json.dumps(row) for row in chats(3)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([good[0], "", '{"messages": [', good[1], "[1]", good[2]]) + "\n")
    with refuses(qft.BadFolder, "d.jsonl line 3", "broken JSON", "skip_bad_rows"):
        read_data(str(path))
    rows, _ = read_data(str(path), skip_bad_rows=True)
    assert list(rows.rows) == chats(3) and rows.lines == [1, 4, 6]
    assert [s.split(":")[0] for s in rows.skipped] == [f"{path} line 3", f"{path} line 5"]


def test_broken_csv_rows(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text,label\n"a\nb",x\nc\nd,y,z\ne,w\n')
    with refuses(qft.BadFolder, "d.csv line 4", "1 fields", "header has 2"):
        read_data(str(path))
    rows, _ = read_data(str(path), skip_bad_rows=True)
    assert list(rows.rows) == [{"text": "a\nb", "label": "x"}, {"text": "e", "label": "w"}] and len(rows.skipped) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", b"", ["d.jsonl", "empty"]),
        ("d.jsonl", b"\n \n", ["empty"]),
        ("d.json", b"[]", ["no rows"]),
        ("d.json", b"[{]", ["line 1", "broken JSON"]),
        ("d.json", b"3", ["list of objects"]),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ["line 2", "UTF-8"]),
        ("d.parquet", b"PAR1nonsense", ["parquet"]),
        ("d.csv", b"text,label\n", ["no rows"]),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with refuses(qft.BadFolder, *says):
        read_data(str(tmp_path / name))


def test_paths_that_are_not_there(tmp_path):
    with refuses(qft.BadFolder, "no-such.jsonl"):
        read_data(str(tmp_path / "no-such.jsonl"))
    write_jsonl(tmp_path / "some-such.jsonl", chats(1))
    with refuses(qft.BadFolder, "did you mean", "some-such.jsonl?"):
        read_data(str(tmp_path / "no-such.jsonl"))
    (tmp_path / "some-such.jsonl").unlink()
    with refuses(qft.BadOption, "no data files"):
        read_data(str(tmp_path))
    (tmp_path / "d.txt").write_text("x")
    with refuses(qft.BadOption, ".txt", ".jsonl"):
        read_data(str(tmp_path / "d.txt"))


def test_a_share_is_held_out_by_the_seed(tmp_path):
    rows, _ = read_data(write_jsonl(tmp_path / "d.jsonl", chats(10)))
    train, valid = held_out(rows, 0.2, seed=1)
    assert (len(train), len(valid)) == (8, 2)
    assert sorted(train.lines + valid.lines) == list(range(1, 11))
    assert held_out(rows, 0.2, seed=1)[1].lines == valid.lines
    with refuses(qft.BadOption, "none would be left"):
        held_out(read_data(write_jsonl(tmp_path / "one.jsonl", chats(1)))[0], 0.5, seed=1)


# ---- rows, before a model is loaded ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def said(user="a", assistant="b"):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (said(assistant=" "), ["line 2", "answer is empty"]),
        ({"messages": []}, ["line 2", "empty"]),
        ({"messages": None}, ["line 2", "missing"]),
        ({"messages": "hello"}, ["line 2", "no JSON list"]),
        ({"messages": [{"role": "user"}]}, ["line 2", "no 'content'"]),
        ({"messages": [{"content": "x"}]}, ["line 2", "no message with 'role'"]),
        ({"messages": [{"role": "user", "content": "x"}]}, ["line 2", "nothing to learn"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_skipped(model, tmp_path, row, says, monkeypatch):
    from qft.training import run
    from qft.training.setup import prepare

    monkeypatch.setattr(run, "load_model", None)
    path = write_jsonl(tmp_path / "d.jsonl", [said(), row, said("c")])
    with refuses(qft.BadOption, *says, "skip_bad_rows"):
        qft.train(model=model, data_path=path, project_name=str(tmp_path / "out"), **quick())
    assert not (tmp_path / "out").exists()
    prepared = prepare(qft.TrainConfig(model, path, skip_bad_rows=True, **quick()))
    assert prepared.train.counts.rows == 2 and prepared.train.counts.skipped == 1
    assert prepared.train.skipped[0].startswith(f"{path} line 2")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a", "completion": ""}], ["line 1", "'completion' is empty"]),
        ([{"prompt": 3, "completion": "b"}], ["line 1", "'prompt' is int"]),
        ([{"text": ""}], ["line 1", "'text' is empty"]),
        ([{"question": "a", "reply": "b"}], ["'question', 'reply'", "'messages'", "*_column"]),
        ([{"text": "a", "label": "x"}], ["1 label(s)"]),
    ],
)
def test_columns_and_texts_that_cannot_be_used(model, tmp_path, rows, says):
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with refuses(qft.BadOption, *says):
        qft.train(model=model, data_path=path, project_name=str(tmp_path / "out"), **quick())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"quantization": "nf5"}, qft.UnknownQuantizer, ["did you mean"]),
        ({"optimizer": "adamw_trch"}, qft.BadOption, ["adamw_torch"]),
        ({"scheduler": "cosin"}, qft.BadOption, ["cosine"]),
        ({"optimizer": "paged_adamw_8bit"}, qft.UnsupportedDevice, ["CUDA"]),
        ({"mixed_precision": "fp16"}, qft.UnsupportedDevice, ["CPU"]),
        ({"peft": False, "merge_adapter": True}, qft.BadOption, ["no adapters"]),
        ({"quantization": None, "init": "loftq"}, qft.BadOption, ["init"]),
        ({"model": "/no/such/model"}, qft.BadFolder, ["/no/such/model"]),
        ({"max_length": 3}, qft.BadOption, ["no row is left", "answers cut away", "max_length"]),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused_before_a_model_is_loaded(model, tmp_path, changes, error, says):
    path = write_jsonl(tmp_path / "d.jsonl", chats())
    with refuses(error, *says):
        qft.train(**{"model": model, "data_path": path, "project_name": str(tmp_path / "out"), **quick(), **changes})
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_gets_near_names(model, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", chats())
    shutil.copytree(model, tmp_path / "models" / "one")
    for place, says in ((tmp_path / "models" / "onne", "there is no folder"), (tmp_path / "models", "config.json")):
        with refuses(qft.BadFolder, says, f"did you mean {tmp_path / 'models' / 'one'}?"):
            qft.train(model=str(place), data_path=path, project_name=str(tmp_path / "out"), **quick())


def test_generation_that_stops_elsewhere_is_said(tmp_path):
    folder = save_model(tmp_path / "m", eos_token="</s>")
    path = write_jsonl(tmp_path / "d.jsonl", chats())
    from qft.training.setup import prepare

    with pytest.warns(qft.QftWarning, match="generation_config"):
        found = prepare(qft.TrainConfig(folder, path, **quick())).findings
    assert "<|im_end|>" in found[0] and "</s>" in found[0]


def test_a_dry_run_writes_nothing_and_plans(model, tmp_path):
    from qft.training.run import outline

    path = write_jsonl(tmp_path / "d.jsonl", chats())
    found = outline(model=model, data_path=path, project_name=str(tmp_path / "out"), **quick(max_steps=None))
    assert found["steps"] == 6 and found["state"] == "new" and found["plan"]["peak"] > 0
    assert not (tmp_path / "out").exists()
    json.dumps(found)
    found = outline(model=model, data_path=path, project_name=str(tmp_path / "out"), **quick(peft=False))
    assert found["plan"] is None and "all weights" in found["no_plan"]

"""Names up to the file system's limit work everywhere; longer ones, zero bytes and places under a file are refused by name."""

import os

import pytest
from tiny_training import chats, quick, save_model, write_jsonl

import qft
from qft.core.files import LONGEST_NAME, partial_name
from qft.errors import BadFolder, BadOption

LONG = {"ascii": "n" * 255, "two bytes a letter": "ü" * 127 + "n"}
BAD = {
    "a name of 256 bytes": "n" * 256,
    "a path of 5000 bytes": "/".join(["n" * 200] * 25),
    "a zero byte": "a\0b",
    "under a file": "d.jsonl/x",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", chats(24))


def wrapped(model):
    return qft.quantize_and_wrap(model, "nf4", progress=False)


def train(model, data, **changes):
    return qft.train(**{"model": model, "data_path": data, **quick(max_steps=1), **changes})


WRITE = {
    "save": lambda model, data, path: qft.save(wrapped(model), path, base=True),
    "export": lambda model, data, path: qft.export(wrapped(model), path),
    "train": lambda model, data, path: train(model, data, project_name=str(path)),
    "auto": lambda model, data, path: qft.auto(
        model, data, out=path, memory="8GiB", device="cpu", steps=1, progress=False
    ),
    "audit": lambda model, data, path: qft.audit(wrapped(model)).to_html(path.with_suffix(".html")),
}
READ = {
    "load": lambda model, data, path: qft.load(path),
    "quantize": lambda model, data, path: qft.quantize(str(path), "nf4", progress=False),
    "plan": lambda model, data, path: qft.plan(str(path), "nf4", sequence_length=8),
    "transfer": lambda model, data, path: qft.transfer(path, "int8"),
    "evaluate a model": lambda model, data, path: qft.evaluate(str(path), data),
    "evaluate data": lambda model, data, path: qft.evaluate(model, str(path)),
    "train a model": lambda model, data, path: train(str(path), data, project_name=str(path.parent / "out")),
    "train on data": lambda model, data, path: train(model, str(path), project_name=str(path.parent / "out")),
    "a template": lambda model, data, path: train(
        model, data, project_name=str(path.parent / "out"), chat_template=str(path)
    ),
    "a configuration": lambda model, data, path: qft.TrainConfig.from_yaml(path),
}


@pytest.mark.parametrize("name", LONG.values(), ids=LONG)
@pytest.mark.parametrize("verb", [v for v in WRITE if v != "audit"])
def test_names_up_to_the_limit_are_written_and_read(model, data, tmp_path, verb, name):
    path = tmp_path / name
    WRITE[verb](model, data, path)
    assert sorted(os.listdir(tmp_path)) == sorted(["d.jsonl", name])
    if verb == "save":
        assert qft.load(path) is not None
    if verb == "train":
        assert train(model, data, project_name=str(path)).already_finished


@pytest.mark.parametrize("name", BAD.values(), ids=BAD)
@pytest.mark.parametrize("verb", [*(v for v in WRITE if v != "audit"), *READ])
def test_other_names_are_refused_and_nothing_is_written(model, data, tmp_path, verb, name):
    with pytest.raises((BadFolder, BadOption)) as caught:
        {**WRITE, **READ}[verb](model, data, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["d.jsonl"]


@pytest.mark.parametrize("suffix", ["", ".partial-host-"])
def test_temporary_names_fit(suffix):
    for name in ("short.html", "n" * 250 + ".html", "ü" * 127, "n" * 255):
        made = partial_name(".partial-1234567-", name, suffix)
        assert len(os.fsencode(made)) <= LONGEST_NAME
        assert made.endswith(os.path.splitext(name)[1] + suffix)
    assert partial_name(".", "n" * 255, suffix) != partial_name(".", "n" * 254 + "m", suffix)


@pytest.mark.parametrize("text", ["/nowhere/at/all", "folder/missing", "a\0b"])
def test_a_path_that_is_missing_is_not_evaluated_as_a_text(model, text):
    with pytest.raises(BadFolder, match="there is no file or folder"):
        qft.evaluate(model, text)

"""Rows that a tokenizer refuses are named by their line, or skipped and counted; no foreign error reaches the user."""

import pytest
from helpers import refuses
from models import llama
from tiny_training import CHATML, chats, quick, save_model, t5, tokenizer, vision, write_jsonl

import qft
from qft.data.calibration import batches
from qft.data.files import read_texts
from qft.evaluation.data import rows as evaluation_rows
from qft.evaluation.sequences import sequences
from qft.training.setup import prepare

pytest.importorskip("trl", reason="pip install trl")

HALF = "a\ud83d"
"""JSON can escape half of a character."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def said(question="ab", answer="cd", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def calling(argument):
    row = said()
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"x": argument}}}]
    return row


LANGUAGE = {
    "text": ({"text": "ab"}, {"text": HALF}),
    "prompt": ({"prompt": "ab", "completion": "cd"}, {"prompt": HALF, "completion": "cd"}),
    "completion": ({"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": HALF}),
    "question": (said(), said(HALF)),
    "answer": (said(), said(answer=HALF)),
    "part": (said(), said(answer=[{"type": "text", "text": HALF}])),
    "call": (said(), calling(HALF)),
    "tools": (said(), {**said(), "tools": [{"function": {"name": HALF}}]}),
    "messages": (
        {"prompt": said()["messages"][:1], "completion": said()["messages"][1:]},
        {"prompt": said(HALF)["messages"][:1], "completion": said()["messages"][1:]},
    ),
}


def is_named_or_skipped(folder, tmp_path, good, bad, *says):
    path = write_jsonl(tmp_path / "d.jsonl", [good, bad, good])
    with refuses(qft.BadOption, "line 2", "skip_bad_rows", *says):
        prepare(qft.TrainConfig(folder, path, **quick()))
    found = prepare(qft.TrainConfig(folder, path, skip_bad_rows=True, **quick())).train
    assert found.counts.rows == 2 and found.counts.skipped == 1
    assert found.skipped[0].startswith(f"{path} line 2")


@pytest.mark.parametrize("form", LANGUAGE)
def test_half_a_character_is_named_or_skipped_in_training(model, tmp_path, form):
    is_named_or_skipped(model, tmp_path, *LANGUAGE[form], "surrogate" if form != "tools" else "")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"source": "ab", "target": "cd"}, {"source": HALF, "target": "cd"}),
        ({"source": "ab", "target": "cd"}, {"source": "ab", "target": HALF}),
        ({"instruction": "ab", "input": "", "output": "cd"}, {"instruction": "ab", "input": HALF, "output": "cd"}),
    ],
    ids=["source", "target", "input"],
)
def test_an_encoder_decoders_rows(tmp_path, good, bad):
    folder = save_model(tmp_path / "m", model=t5(), eos_token="</s>")
    is_named_or_skipped(folder, tmp_path, good, bad, "surrogate")


@pytest.mark.parametrize("bad", [{"text": HALF, "label": 1}, {"text": "ab", "label": HALF}], ids=["text", "label"])
def test_a_classifiers_rows(model, tmp_path, bad):
    good = {"text": "ab", "label": "x"}
    path = write_jsonl(tmp_path / "d.jsonl", [good, {**bad, "label": str(bad["label"])}, {"text": "cd", "label": "y"}])
    with refuses(qft.BadOption, "line 2"):
        prepare(qft.TrainConfig(model, path, **quick()))
    found = prepare(qft.TrainConfig(model, path, skip_bad_rows=True, **quick())).train
    assert found.counts.rows == 2 and found.counts.skipped == 1


def test_a_vision_models_rows(tmp_path):
    pytest.importorskip("PIL")
    folder, _ = vision(tmp_path)
    rows = [{"images": ["0.png"], **said()}, {"images": ["1.png"], **said(HALF)}, {"images": "[", **said()}]
    path = write_jsonl(tmp_path / "e.jsonl", rows)
    found = prepare(qft.TrainConfig(folder, path, skip_bad_rows=True, **quick())).train
    assert found.counts.rows == 1 and found.counts.skipped == 2
    assert "surrogate" in found.skipped[0] and "not JSON" in found.skipped[1]


@pytest.mark.parametrize("form", [form for form in LANGUAGE if form != "tools"])
def test_evaluation_names_the_row(model, tmp_path, form):
    good, bad = LANGUAGE[form]
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls }}")
    with refuses(qft.BadOption, "row 2", "surrogate"):
        list(sequences(evaluation_rows([good, bad]), tokenizer(template), length=64))
    path = write_jsonl(tmp_path / "d.jsonl", [good, bad])
    with refuses(qft.BadOption, "line 2", "surrogate"):
        list(sequences(evaluation_rows(path), tokenizer(template), length=64))


def test_an_encoder_decoders_evaluation_names_the_row():
    for row in ({"prompt": HALF, "completion": "a"}, {"prompt": "a", "completion": HALF}, {"input_ids": [1], **said()}):
        with refuses(qft.BadOption, "row 1"):
            list(sequences(evaluation_rows([row]), tokenizer(), length=9, two_sided=True))


@pytest.mark.parametrize("form", ["text", "prompt", "question"])
def test_calibration_names_the_text(tmp_path, form):
    path = write_jsonl(tmp_path / "d.jsonl", LANGUAGE[form])
    with refuses(qft.BadOption, "line 2", "surrogate"):
        read_texts(path, tokenizer())
    model = llama()
    with refuses(qft.BadOption, "text 2 of the calibration data", "surrogate", model=model):
        qft.quantize(model, "awq", calibration=["ab", HALF], tokenizer=tokenizer())
    with refuses(qft.BadOption, "text 2 of the calibration data"):
        batches([{"text": ["ab", HALF]}], tokenizer())


def test_auto_names_the_line(model, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [*chats(12), said(HALF)])
    with refuses(qft.BadOption, "line 13", "surrogate"):
        qft.auto(model, path, memory="2GB", out=tmp_path / "out", device="cpu", dry_run=True)
    assert not (tmp_path / "out").exists()


class Refusing:
    """A tokenizer that refuses some texts with an error of its own."""

    def __init__(self, error):
        self.inner, self.error = tokenizer(), error

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, text=None, **options):
        if "x" in (text or options.get("text_target") or ""):
            raise self.error
        return self.inner(text, **options)


class PanicException(BaseException):
    """As PyO3's, which is not an Exception."""


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("no such\ntoken"), PanicException("at 7")], ids=repr)
def test_whatever_a_tokenizer_raises_is_said_about_the_row(monkeypatch, model, tmp_path, error):
    from qft.training import setup

    monkeypatch.setattr(setup, "_processor", lambda *_: Refusing(error))
    is_named_or_skipped(model, tmp_path, {"text": "ab"}, {"text": "x"}, "tokenizer refuses")
    with refuses(qft.BadOption, "row 2", "refuses"):
        list(sequences(evaluation_rows(["ab", "x"]), Refusing(error), length=64))
    with refuses(qft.BadOption, "text 2", "refuses"):
        batches(["ab", "x"], Refusing(error))


def test_an_interruption_is_not_a_bad_row(monkeypatch, model, tmp_path):
    from qft.training import setup

    monkeypatch.setattr(setup, "_processor", lambda *_: Refusing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(qft.TrainConfig(model, write_jsonl(tmp_path / "d.jsonl", [{"text": "x"}] * 2), **quick()))

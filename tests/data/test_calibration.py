"""Calibration data of every kind: the same tokens are the same batches, and what is no data is refused beforehand."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import refuses
from models import VOCABULARY, gpt2, llama, plain, t5
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedTokenizerFast

import qft
from qft.data.calibration import batches, call

WORDS = [f"w{i}" for i in range(VOCABULARY - 2)]
END = VOCABULARY - 1


@pytest.fixture(scope="module")
def tokenizer():
    """One id a word, and the end of a text."""
    vocabulary = {w: i for i, w in enumerate([*WORDS, "?", "<e>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<e>")


def text(ids):
    return " ".join(WORDS[i] for i in ids)


def ids(rows=6, length=8, seed=0):
    return torch.randint(0, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    assert [sorted(b) for b in found] == [sorted(b) for b in expected]
    for mine, theirs in zip(found, expected):
        for key, value in theirs.items():
            assert mine[key].device.type == "cpu"
            assert mine[key].dtype == value.dtype
            assert torch.equal(mine[key], value)


ROWS = ids()
IN_FOURS = [{"input_ids": ROWS[:4]}, {"input_ids": ROWS[4:]}]

SOURCES = {
    "a tensor": lambda: ROWS,
    "int32": lambda: ROWS.int(),
    "a numpy array": lambda: ROWS.numpy(),
    "uint16, as token files hold": lambda: ROWS.numpy().astype(np.uint16),
    "lists": lambda: ROWS.tolist(),
    "tuples": lambda: tuple(map(tuple, ROWS.tolist())),
    "rows": lambda: list(ROWS),
    "rows as numpy arrays": lambda: list(ROWS.numpy()),
    "a generator": lambda: (row for row in ROWS),
    "dicts of lists": lambda: [{"input_ids": row.tolist()} for row in ROWS],
    "dicts of tensors": lambda: [{"input_ids": row} for row in ROWS],
    "batch encodings": lambda: [BatchEncoding({"input_ids": row.tolist()}) for row in ROWS],
    "a dataset": lambda: datasets.Dataset.from_dict({"input_ids": ROWS.tolist()}),
    "its column": lambda: datasets.Dataset.from_dict({"input_ids": ROWS.tolist()})["input_ids"],
    "a dataset of tensors": lambda: datasets.Dataset.from_dict({"input_ids": ROWS.tolist()}).with_format("torch"),
    "a dataset of arrays": lambda: datasets.Dataset.from_dict({"input_ids": ROWS.tolist()}).with_format("numpy"),
    "a streamed dataset": lambda: datasets.Dataset.from_dict({"input_ids": ROWS.tolist()}).to_iterable_dataset(),
    "a dataset with more columns": lambda: datasets.Dataset.from_dict(
        {
            "input_ids": ROWS.tolist(),
            "text": ["a b"] * 6,
            "messages": [[{"role": "user", "content": "hi"}]] * 6,
            "number": list(range(6)),
        }
    ),
    "a TensorDataset": lambda: TensorDataset(ROWS),
    "a TensorDataset with targets": lambda: TensorDataset(ROWS, torch.zeros(6)),
    "a DataLoader": lambda: DataLoader(TensorDataset(ROWS), batch_size=4),
    "a DataLoader of dicts": lambda: DataLoader([{"input_ids": row} for row in ROWS], batch_size=4),
    "a DataLoader of rows": lambda: DataLoader(ROWS, batch_size=4, collate_fn=lambda rows: rows),
    "batches": lambda: [ROWS[:4], ROWS[4:]],
    "batches as lists": lambda: [ROWS[:4].tolist(), ROWS[4:].tolist()],
    "batches as dicts": lambda: [{"input_ids": ROWS[:4]}, {"input_ids": ROWS[4:].tolist()}],
    "inputs with targets": lambda: [(ROWS[:4], ROWS[:4]), (ROWS[4:], ROWS[4:])],
    "a Calibration": lambda: qft.Calibration(ROWS.tolist()),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_tokens_are_the_same_batches(source):
    same(batches(SOURCES[source](), model=llama()), IN_FOURS)


TEXTS = {
    "a text": lambda: text(ROWS.flatten().tolist()),
    "a list": lambda: [text(ROWS.flatten().tolist())],
    "a dict": lambda: {"text": text(ROWS.flatten().tolist())},
    "a dataset": lambda: datasets.Dataset.from_dict({"text": [text(ROWS.flatten().tolist())], "label": [1]}),
    "a column of another name": lambda: datasets.Dataset.from_dict({"body": [text(ROWS.flatten().tolist())]}),
    "text beside other texts": lambda: [{"title": "w1", "text": text(ROWS.flatten().tolist())}],
    "a DataLoader": lambda: DataLoader([text(ROWS.flatten().tolist())], batch_size=4),
    "a generator": lambda: (t for t in [text(ROWS.flatten().tolist())]),
}


@pytest.mark.parametrize("source", TEXTS)
def test_the_same_text_is_the_same_batches(source, tokenizer):
    """Full windows; the end of the text is a last piece too short to keep."""
    expected = [{"input_ids": ROWS[:4]}, {"input_ids": ROWS[4:]}]
    for given in (
        batches(TEXTS[source](), tokenizer, length=8),
        batches(qft.Calibration(TEXTS[source](), tokenizer, length=8)),
        batches(qft.Calibration(TEXTS[source](), length=8), tokenizer),
    ):
        same(given, expected)


def test_texts_are_joined_and_cut(tokenizer):
    """In their order, an end after each, windows filled across texts."""
    parts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    joined = [t for p in parts for t in [*p, END]]
    found = batches([*map(text, parts), "", "  \n"], tokenizer, length=5, batch_size=1)
    assert [b["input_ids"].tolist() for b in found] == [[joined[:5]], [joined[5:10]], [joined[10:]]]
    assert len(joined) == 12, "the last piece is 2 of 5: more than a quarter"
    found = batches([*map(text, parts)], tokenizer, length=11)
    assert [b["input_ids"].tolist() for b in found] == [[joined[:11]]], "1 of 11 is less"
    found = batches(text([1, 2]), tokenizer)
    assert [b["input_ids"].tolist() for b in found] == [[[1, 2, END]]], "the only piece is kept, however short"


def test_texts_are_cut_to_what_the_model_has_positions_for(tokenizer):
    assert gpt2().config.max_position_embeddings == 128
    found = batches(text([1] * 300), tokenizer, model=gpt2())
    assert [tuple(b["input_ids"].shape) for b in found] == [(2, 128), (1, 45)]
    assert batches(text([1] * 300), tokenizer)[0]["input_ids"].shape == (1, 301)


def test_how_much_is_read(tokenizer):
    """`samples` sequences: windows, rows, or rows of batches, the last of which is cut."""
    assert sum(len(b["input_ids"]) for b in batches(qft.Calibration(text([3] * 400), tokenizer, 5, 4, 2))) == 5
    assert [len(b["input_ids"]) for b in batches(qft.Calibration(ROWS, samples=5, batch_size=2))] == [2, 2, 1]
    loader = DataLoader(TensorDataset(ROWS), batch_size=2)
    assert [len(b["input_ids"]) for b in batches(qft.Calibration(loader, samples=3))] == [2, 1]
    found = batches(qft.Calibration({"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}, samples=3))
    same(found, [{"input_ids": ROWS[:3], "attention_mask": torch.ones(3, 8, dtype=torch.int64)}])

    def endless():
        while True:
            yield ROWS[0]
            read.append(1)

    read = []
    assert [len(b["input_ids"]) for b in batches(endless())] == [4] * 32
    assert len(read) <= 128


def test_a_batch_that_cannot_be_cut_by_its_rows_is_whole():
    """Patches of images are more than their sequences."""
    batch = {"input_ids": ROWS, "pixel_values": torch.randn(500, 3)}
    same(batches(qft.Calibration([batch, batch], samples=4)), [batch])


def test_sequences_of_several_lengths_are_not_padded():
    found = batches([[1, 2, 3], [4, 5, 6], [7, 8], [9, 1, 2]])
    assert [b["input_ids"].tolist() for b in found] == [[[1, 2, 3], [4, 5, 6]], [[7, 8]], [[9, 1, 2]]]


@pytest.mark.parametrize(
    "flat", [torch.tensor([5, 6, 7]), [5, 6, 7], np.array([5, 6, 7])], ids=["tensor", "list", "array"]
)
def test_one_sequence(flat):
    same(batches(flat), [{"input_ids": torch.tensor([[5, 6, 7]])}])


def test_masks_come_along():
    mask = torch.ones_like(ROWS)
    mask[:, 5:] = 0
    whole = [{"input_ids": ROWS[:4], "attention_mask": mask[:4]}, {"input_ids": ROWS[4:], "attention_mask": mask[4:]}]
    rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ROWS, mask)]
    same(batches(rows), whole)
    same(batches(DataLoader(rows, batch_size=4)), whole)
    same(batches(datasets.Dataset.from_list([{k: v.tolist() for k, v in r.items()} for r in rows])), whole)
    nothing = {"input_ids": ROWS[0], "attention_mask": mask[0] * 0}
    same(batches([*rows[:4], dict(whole[1]), nothing]), whole)


def test_embeddings_instead_of_tokens():
    embeds = torch.randn(2, 5, 64)
    same(batches({"inputs_embeds": embeds}, model=llama()), [{"inputs_embeds": embeds}])
    with refuses(qft.BadOption, "inputs_embeds", "NaN"):
        batches({"inputs_embeds": embeds * float("nan")}, model=llama())


def test_data_on_a_graph_is_detached():
    embeds = torch.randn(2, 5, 64, requires_grad=True)
    assert not batches({"inputs_embeds": embeds})[0]["inputs_embeds"].requires_grad


def test_how_a_model_is_called():
    """Without a cache; an encoder-decoder reads its input as its output, where the data has none."""
    seen = []

    class Reads:
        def __init__(self, config):
            self.config = config

        def __call__(self, **batch):
            seen.append(batch)

    call(Reads(t5().config), {"input_ids": ROWS})
    assert torch.equal(seen[-1]["decoder_input_ids"], ROWS)
    assert seen[-1]["use_cache"] is False
    call(Reads(t5().config), {"input_ids": ROWS, "labels": ROWS})
    assert "decoder_input_ids" not in seen[-1]
    call(Reads(llama().config), {"input_ids": ROWS})
    assert seen[-1].keys() == {"input_ids", "use_cache"}
    call(Reads(None), {"input_ids": ROWS})
    assert seen[-1].keys() == {"input_ids"}


# ---- what is refused ----------------------------------------------------------------------------------------


def exhausted():
    rows = iter(ROWS)
    list(rows)
    return rows


NOTHING = {
    "a list": [],
    "a tensor": torch.zeros(0, 8, dtype=torch.int64),
    "a sequence": [[]],
    "a batch": {"input_ids": []},
    "an empty text": "",
    "empty texts": ["", " \n"],
    "a dict of texts": {"text": []},
    "a dataset": datasets.Dataset.from_dict({"input_ids": []}),
    "an iterator that was read": exhausted(),
    "masks of zeros": {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]},
}


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("verb", ["quantize_and_wrap", "wrap"])
def test_no_tokens(nothing, verb, tokenizer):
    """Said before anything changes, whatever verb reads the data."""
    model = llama() if verb == "quantize_and_wrap" else qft.quantize(llama(), "reference", progress=False)
    options = {"init": "qera", "calibration": NOTHING[nothing], "tokenizer": tokenizer}
    with refuses(qft.NeedsCalibration, "no tokens", "fresh iterator", model=model):
        if verb == "wrap":
            qft.wrap(model, original=llama(), **options)
        else:
            qft.quantize_and_wrap(model, "reference", progress=False, **options)


BAD = {
    "another vocabulary": ([[1, VOCABULARY]], [f"token id {VOCABULARY}", f"0 to {VOCABULARY - 1}", "another model"]),
    "negative": ([[1, -100]], ["token id -100"]),
    "in a later batch": ([[1, 2], [3, 4, 5], [VOCABULARY + 3]], [f"token id {VOCABULARY + 3}"]),
    "decoder ids": ({"input_ids": [[1]], "decoder_input_ids": [[500]]}, ["token id 500"]),
    "floats": ([[1.0, 2.0]], ["float32", "integers"]),
    "a float tensor": (torch.randn(2, 3), ["integers"]),
    "bools": ([[True, False]], ["bool", "integers"]),
    "NaN": ({"input_ids": [[1, 2]], "attention_mask": [[1.0, float("nan")]]}, ["attention_mask", "NaN"]),
    "infinity": ({"inputs_embeds": torch.full((1, 2, 64), float("inf"))}, ["inputs_embeds", "infinity"]),
    "text without a tokenizer": ("w1 w2", ["tokenizer="]),
    "texts without a tokenizer": (["w1 w2"], ["tokenizer="]),
    "two columns of text": (datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), ["a, b", "'text'", "'input_ids'"]),
    "no column to read": (datasets.Dataset.from_dict({"number": [3]}), ["number", "'text'"]),
    "splits": ({"train": datasets.Dataset.from_dict({"text": ["x"]})}, ["train", "'text'"]),
    "ragged rows": ([[[1, 2], [3]]], ["equally long"]),
    "a ragged dict": ({"input_ids": [[1, 2], [3]]}, ["input_ids", "equally long"]),
    "ragged tensors": ([[torch.tensor([1, 2]), torch.tensor([3])]], ["equally long"]),
    "a ragged mask": ({"input_ids": [[1, 2]], "attention_mask": [[1], [1, 1]]}, ["attention_mask"]),
    "a path": (Path("data.txt"), ["PosixPath"]),
    "a file's name": (__file__, ["name of a file"]),
    "a folder's name": (str(Path(__file__).parent), ["name of a file"]),
    "a number": (7, ["not a int"]),
    "a function": (len, ["builtin_function"]),
    "None inside": ([None], ["NoneType"]),
    "bytes": (b"abc", ["token ids are"]),
    "four dimensions": (torch.zeros(1, 2, 3, 4, dtype=torch.int64), ["(2, 3, 4)"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_data_is_refused_before_anything_changes(bad):
    data, says = BAD[bad]
    model = llama()
    with refuses(qft.BadOption, *says, model=model):
        qft.quantize_and_wrap(model, "reference", init="qera", calibration=data, progress=False)


@pytest.mark.parametrize("builder", [gpt2, t5, plain])
def test_a_foreign_vocabulary_is_refused_for_every_model(builder):
    """Also where the model does not say how many embeddings it has: the first run tells."""
    model = builder()
    with refuses(qft.BadOption, model=model):
        qft.quantize_and_wrap(model, "reference", init="qera", calibration=[[1, 2, 400]], progress=False)


def test_an_encoder_decoders_labels_are_ids_too():
    model = t5()
    with refuses(qft.BadOption, "labels", "token id 400", model=model):
        labels = torch.tensor([[400, -100]])
        data = {"input_ids": ROWS[:1], "labels": labels}
        qft.quantize_and_wrap(model, "reference", init="qera", calibration=data, progress=False)
    found = batches({"input_ids": ROWS[:1], "labels": torch.tensor([[4, -100]])}, model=model)
    assert found[0]["labels"].tolist() == [[4, -100]]


def test_a_tokenizer_that_is_none():
    with refuses(qft.BadOption, "tokenizer='gpt2'", "the tokenizer itself"):
        batches("some text", "gpt2")


def test_none_is_no_data():
    model = llama()
    with refuses(qft.NeedsCalibration, "calibration=", model=model):
        qft.quantize_and_wrap(model, "reference", init="qera", calibration=None, progress=False)
    with refuses(qft.BadOption, "NoneType"):
        batches(None)


@pytest.mark.parametrize("setting", ["samples", "length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", None, True])
def test_settings_are_positive_integers(setting, value):
    with refuses(qft.BadOption, f"{setting}={value!r}", "positive integer"):
        qft.Calibration(ROWS, **{setting: value})


def test_data_that_nothing_reads_is_said_so():
    with pytest.warns(qft.QftWarning, match="calibration= is not used"):
        qft.quantize(llama(), "reference", calibration=ROWS, progress=False)
    with pytest.warns(qft.QftWarning, match="calibration= is not used"):
        qft.quantize_and_wrap(llama(), "reference", init="loftq", calibration=ROWS, progress=False)
    model = qft.quantize(llama(), "reference", progress=False)
    with pytest.warns(qft.QftWarning, match="calibration= is not used"):
        qft.wrap(model, init="loftq", original=llama(), calibration=ROWS)

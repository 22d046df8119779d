"""Encoders' lengths: the positions that a model really has, and cuts that keep the tokens at both ends."""

import pytest
import torch
from helpers import refuses
from models import bert, gpt2, llama
from test_calibration_checks import led
from tiny_training import SIZE, quick, save_model, t5, tokenizer, write_jsonl
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    EsmConfig,
    EsmForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

import qft
from qft.data.lengths import Positions, positions_of, positions_of_config
from qft.data.tokens import Tokens
from qft.evaluation.data import rows as evaluation_rows
from qft.evaluation.sequences import sequences
from qft.training.setup import prepare

pytest.importorskip("trl", reason="pip install trl")

SMALL = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 34,
}
RELATIVES = {
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**SMALL)),
    "pad of 5": (RobertaForSequenceClassification, RobertaConfig(**SMALL, pad_token_id=5)),
    "xlm-roberta": (XLMRobertaForSequenceClassification, XLMRobertaConfig(**SMALL)),
    "mpnet": (MPNetForSequenceClassification, MPNetConfig(**SMALL)),
    "esm": (EsmForSequenceClassification, EsmConfig(**SMALL, pad_token_id=1, mask_token_id=2)),
}


def closing(**changes):
    """A tokenizer that puts a token at both ends of a text, as BERT's and RoBERTa's do."""
    tok = tokenizer(None, cls_token="<|im_start|>", sep_token="<|im_end|>", **changes)
    ends = [(name, tok.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ends
    )
    return tok


def saved(folder, model, tok):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def classes(*lengths):
    return [{"text": "a" * n, "label": i % 2} for i, n in enumerate(lengths)]


# ---- positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELATIVES)
def test_positions_are_those_behind_the_paddings(name):
    cls, config = RELATIVES[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    found = positions_of(model)
    assert found == positions_of_config(config, AutoModelForSequenceClassification)
    assert found.source == 34 - config.pad_token_id - 1
    model(input_ids=torch.full((1, found.source), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, found.source + 1), 7))


def test_positions_of_other_models():
    assert positions_of(llama()) == Positions(128, 128) == positions_of(gpt2())
    assert positions_of(bert()) == Positions(512, 512)
    assert positions_of(led()) == Positions(64, 24)
    assert positions_of(t5()) == Positions(None, None)
    assert positions_of(torch.nn.Linear(2, 2)) == Positions(None, None)


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta"])
def test_a_classifier_trains_on_rows_as_long_as_its_positions(tmp_path, name):
    cls, config = RELATIVES[name]
    folder = saved(tmp_path / "m", cls(config), closing())
    path = write_jsonl(tmp_path / "d.jsonl", classes(60, 3, 31, 34))
    result = qft.train(
        model=folder,
        data_path=path,
        project_name=str(tmp_path / "out"),
        **quick(max_steps=2, quantization="reference", max_length=64),
    )
    assert result.steps == 2 and result.data["train"]["truncated"] == 3
    with refuses(qft.BadShape, "line 1", "62 tokens", "the model takes 32"):
        prepare(qft.TrainConfig(folder, path, **quick(too_long="refuse")))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [2, 3, 10])
def test_cut_rows_are_those_of_the_tokenizers_own_truncation(tmp_path, side, limit):
    tok = closing(truncation_side=side)
    folder = saved(tmp_path / "m", RELATIVES["roberta"][0](RELATIVES["roberta"][1]), tok)
    texts = ["abcdefghijklmnop", "ab", "abcdefgh", "abcdefghi"]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    found = prepare(qft.TrainConfig(folder, write_jsonl(tmp_path / "d.jsonl", rows), **quick(max_length=limit)))
    expected = [tok(text, truncation=True, max_length=limit)["input_ids"] for text in texts]
    assert [row["input_ids"] for row in found.train.rows] == expected


def test_an_encoders_cut_input_keeps_its_end_and_a_cut_target_gets_none(tmp_path):
    """A target that was cut must not teach to stop there."""
    folder = saved(tmp_path / "m", t5(), closing())
    path = write_jsonl(tmp_path / "d.jsonl", [{"source": "a" * 30, "target": "b" * 30}])
    (row,) = prepare(qft.TrainConfig(folder, path, **quick(max_length=10))).train.rows
    tok = closing()
    assert row["input_ids"] == tok("a" * 30, truncation=True, max_length=10)["input_ids"]
    assert tok.decode(row["labels"]) == "<|im_start|>" + "b" * 9


def test_a_language_models_cut_row_is_its_beginning(tmp_path):
    folder = save_model(tmp_path / "m")
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "abcdefghijkl"}])
    (row,) = prepare(qft.TrainConfig(folder, path, **quick(max_length=5))).train.rows
    assert tokenizer().decode(row["input_ids"]) == "abcde"


def test_an_encoder_decoder_with_fewer_positions_to_write(tmp_path):
    model = led()
    model.resize_token_embeddings(SIZE)
    folder = saved(tmp_path / "m", model, closing())
    path = write_jsonl(tmp_path / "d.jsonl", [{"source": "a" * 80, "target": "b" * 40}])
    (row,) = prepare(qft.TrainConfig(folder, path, **quick())).train.rows
    assert (len(row["input_ids"]), len(row["labels"])) == (64, 24)
    with refuses(qft.BadShape, "the model takes 64"):
        prepare(qft.TrainConfig(folder, path, **quick(too_long="refuse")))


def test_calibration_by_rows_of_an_encoder_decoder_fits_both_lengths(tmp_path):
    model = led()
    model.resize_token_embeddings(SIZE)
    folder = saved(tmp_path / "m", model, closing())
    path = write_jsonl(tmp_path / "d.jsonl", [{"source": "a" * 80, "target": "b" * 40}] * 4)
    options = quick(max_steps=1, quantization="reference", init="qera")
    assert qft.train(model=folder, data_path=path, project_name=str(tmp_path / "out"), **options).steps == 1


def test_special_tokens_that_do_not_fit_are_cut():
    assert Tokens(closing()).cut([130, 97, 131], 1) == [130]


# ---- calibration and evaluation ----------------------------------------------------------------------------


def test_calibration_texts_fit_a_roberta():
    cls, config = RELATIVES["roberta"]
    model = qft.quantize_and_wrap(
        cls(config),
        "reference",
        init="qera",
        calibration="+" * 200,
        tokenizer=tokenizer(),
        progress=False,
    )
    assert model.init_report is not None


def test_an_evaluation_fits_a_roberta_that_writes():
    torch.manual_seed(0)
    model = RobertaForCausalLM(RobertaConfig(**SMALL, is_decoder=True)).eval()
    found = qft.evaluate(
        model, ["a" * 100], tokenizer=tokenizer(), baseline=False, progress=False, samples=1, batch_size=2
    )
    assert found.length == 32
    with refuses(qft.BadOption, "length=33", "32 positions"):
        qft.evaluate(model, ["a" * 100], tokenizer=tokenizer(), baseline=False, length=33)


def test_an_encoders_long_prompt_keeps_both_ends_in_an_evaluation():
    tok = closing()
    row = {"prompt": "abcdefgh", "completion": "xy"}
    (cut,) = sequences(evaluation_rows([row]), tok, length=6, two_sided=True)
    assert tok.decode(cut.ids) == "<|im_start|>efgh<|im_end|>" and tok.decode(cut.decoder) == "<|im_start|>xy<|im_end|>"


def test_bart_has_all_of_its_positions():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=SIZE, max_position_embeddings=20, **sizes, **heads)
    ).eval()
    assert positions_of(model) == Positions(20, 20)
    model(input_ids=torch.full((1, 20), 7))

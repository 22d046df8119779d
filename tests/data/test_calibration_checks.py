"""Calibration data that does not fit: masks of another shape, and sequences longer than the model's positions."""

import numpy as np
import pytest
import torch
from helpers import refuses
from models import bert, gpt2, llama, t5
from transformers import LEDConfig, LEDForConditionalGeneration, RobertaConfig, RobertaForSequenceClassification

import qft
from qft.data.calibration import batches

IDS = torch.randint(2, 90, (4, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
WRONG = {
    "shorter": MASK[:, :7],
    "longer": torch.ones(4, 9),
    "one row": MASK[:1],
    "transposed": MASK.T,
    "four dimensions": torch.ones(4, 1, 8, 8),
    "three dimensions": torch.ones(4, 1, 8),
    "additive": torch.zeros(4, 8).masked_fill(torch.arange(8) > 5, -1e9),
}


def roberta():
    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=34,
        )
    ).eval()


def led():
    torch.manual_seed(0)
    config = LEDConfig(
        vocab_size=96,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=24,
        attention_window=8,
    )
    return LEDForConditionalGeneration(config).eval()


def tokens(length, rows=2):
    return torch.full((rows, length), 5)


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", WRONG)
@pytest.mark.parametrize("given", ["a batch", "an array", "with embeddings"])
def test_a_mask_of_another_shape_is_refused(mask, given):
    batch = {"input_ids": IDS, "attention_mask": WRONG[mask]}
    if given == "an array":
        batch = {k: np.asarray(v) for k, v in batch.items()}
    elif given == "with embeddings":
        batch = {"inputs_embeds": torch.randn(4, 8, 64), "attention_mask": WRONG[mask]}
    with refuses(qft.BadOption, "attention_mask"):
        batches([batch], model=llama())


@pytest.mark.parametrize("mask", [torch.ones(1, 8), torch.ones(7), torch.ones(9)], ids=["2-D", "shorter", "longer"])
def test_the_mask_of_a_single_sequence_is_checked_too(mask):
    with refuses(qft.BadOption, "attention_mask"):
        batches([{"input_ids": row, "attention_mask": mask} for row in IDS])


def test_masks_that_fit_are_taken_in_every_type():
    for dtype in (torch.bool, torch.int64, torch.int32, torch.float32):
        (found,) = batches([{"input_ids": IDS, "attention_mask": MASK.to(dtype)}], model=llama())
        assert torch.equal(found["attention_mask"], MASK.to(dtype))
    segments = torch.arange(8).expand(4, 8) // 4 + 1
    assert len(batches([{"input_ids": IDS, "attention_mask": segments}])) == 1


def test_the_masks_of_an_encoder_decoder():
    good = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3], "decoder_attention_mask": MASK[:, :3]}
    assert len(batches([good], model=t5())) == 1
    with refuses(qft.BadOption, "decoder_attention_mask", "(4, 8)", "(4, 3)"):
        batches([{**good, "decoder_attention_mask": MASK}], model=t5())


VERBS = {
    "quantize": lambda m, data: qft.quantize(m, "awq", calibration=data),
    "quantize_and_wrap": lambda m, data: qft.quantize_and_wrap(m, "reference", init="qera", calibration=data),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_refuse_before_anything_changes(verb):
    model = llama()
    with refuses(qft.BadOption, "attention_mask", model=model):
        VERBS[verb](model, [{"input_ids": IDS, "attention_mask": MASK[:, :7]}])
    with refuses(qft.BadOption, "129 tokens", "128 positions", model=model):
        VERBS[verb](model, tokens(129))


def test_merging_with_data_refuses_a_mask_of_another_shape():
    model = qft.quantize_and_wrap(llama(), "reference", progress=False)
    with refuses(qft.BadOption, "attention_mask"):
        qft.merge(model, data=[{"input_ids": IDS, "attention_mask": MASK[:, :7]}])
    with refuses(qft.BadOption, "128 positions"):
        qft.merge(model, data=tokens(129))


# ---- lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "longest"),
    [(llama, 128), (gpt2, 128), (bert, 512), (roberta, 32)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_sequence_longer_than_the_positions_is_refused(builder, longest):
    model = builder()
    model(input_ids=tokens(longest))
    for data in (tokens(longest), tokens(longest).tolist(), [{"input_ids": tokens(longest)[0]}]):
        assert batches(data, model=model)[0]["input_ids"].shape[1] == longest
    for data in (tokens(longest + 1), tokens(longest + 1).tolist(), [{"input_ids": tokens(longest + 1)[0]}]):
        with refuses(qft.BadOption, f"{longest + 1} tokens", f"{longest} positions"):
            batches(data, model=model)


def test_embeddings_and_position_ids_beyond_the_positions_are_refused():
    with refuses(qft.BadOption, "inputs_embeds", "129 tokens"):
        batches([{"inputs_embeds": torch.randn(1, 129, 64)}], model=llama())
    places = torch.arange(8)[None] + 121
    with refuses(qft.BadOption, "position_ids", "128"):
        batches([{"input_ids": IDS[:1], "position_ids": places}], model=llama())
    assert batches([{"input_ids": IDS[:1], "position_ids": places - 1}], model=llama())


def test_an_encoder_decoder_has_two_lengths():
    model = led()
    assert batches([{"input_ids": tokens(64), "decoder_input_ids": tokens(24)}], model=model)
    for batch in (
        {"input_ids": tokens(65), "decoder_input_ids": tokens(24)},
        {"input_ids": tokens(64), "decoder_input_ids": tokens(25)},
        {"input_ids": tokens(64), "labels": tokens(25)},
        {"input_ids": tokens(25)},  # which the decoder reads, too
    ):
        with refuses(qft.BadOption, "tokens", "positions"):
            batches([batch], model=model)
    assert batches([{"input_ids": tokens(500)}], model=t5()), "T5's positions are relative"


def test_texts_are_cut_to_the_positions_that_are_left():
    from tiny_training import tokenizer

    found = batches("+" * 100, tokenizer(), model=roberta().eval())
    assert found[0]["input_ids"].shape[1] == 32
    assert batches("+" * 100, tokenizer(), model=led())[0]["input_ids"].shape[1] == 24

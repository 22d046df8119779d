"""Packed sequences compute what they compute alone: losses, gradients, and a run of Trainer."""

import pytest
import torch
from helpers import refuses
from models import batch, gpt2, llama, relative
from peft import LoraConfig
from test_optimizing import MODELS, step, still
from transformers import DataCollatorWithFlattening, Trainer

import qft
from qft.optimize import optimize

LENGTHS = [5, 9, 3, 7]
ROWS = [batch(seed=i, shape=(1, n))[0].tolist() for i, n in enumerate(LENGTHS)]
FEATURES = [{"input_ids": row, "labels": row} for row in ROWS]
COUNT = sum(LENGTHS) - len(LENGTHS)
APART = [name for name in MODELS if name not in ("opt", "bloom")]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """test_optimizing.py compiles; here it would take half a minute a graph."""
    monkeypatch.setattr(optimize, "switches", optimize.Switches(compile=False))


def alone(model):
    """Sum of the losses of the sequences, each by itself, over the number of all predicted tokens; its gradients."""
    model.zero_grad()
    total = sum(
        model(input_ids=torch.tensor([r]), labels=torch.tensor([r]), num_items_in_batch=COUNT, use_cache=False).loss
        for r in ROWS
    )
    total.backward()
    return float(total.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def packed(model, collator):
    inputs = collator(FEATURES)
    loss, grads, _ = step(model, inputs.pop("input_ids"), inputs.pop("labels"), num_items_in_batch=COUNT, **inputs)
    return loss, grads


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("length", [None, 9, 13, 64])
@pytest.mark.parametrize("name", APART)
def test_packed_is_as_good_as_alone(name, length, optimized):
    """Whatever the rows: all in one, several, and mostly empty ones; sliding windows of 8 tokens included."""
    model = still(MODELS[name]()).train()
    for parameter in [*model.get_output_embeddings().parameters(), *model.get_input_embeddings().parameters()]:
        parameter.requires_grad_(False)
    expected = alone(model)
    collator = qft.PackingCollator(model, length)
    if optimized:
        qft.optimize_training(model, memory="least")
    loss, grads = packed(model, collator)
    assert loss == pytest.approx(expected[0], rel=3e-6)
    assert relative(grads, expected[1]) < 3e-6


@pytest.mark.parametrize("name", ["opt", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_sequences_would_read_each_other_is_refused(name, dtype):
    model = MODELS[name]().to(dtype).train()
    with refuses(qft.UnsupportedOperation, "read each other", "DataCollatorWithPadding", model=model):
        qft.PackingCollator(model)


@pytest.mark.parametrize("name", APART)
def test_half_precision_and_quantized_models_are_not_refused(name):
    qft.PackingCollator(MODELS[name]().to(torch.bfloat16))
    qft.PackingCollator(qft.quantize_and_wrap(llama(torch.bfloat16), "nf4", progress=False))


def test_without_it_a_cache_makes_sequences_read_each_other():
    """What the collator of transformers alone does in training, by the defaults of every config: the reason for ours."""
    model = still(llama()).train()
    model.lm_head.requires_grad_(False)
    expected = alone(model)
    assert abs(packed(model, DataCollatorWithFlattening())[0] / expected[0] - 1) > 1e-3
    assert packed(model, qft.PackingCollator(model))[0] == pytest.approx(expected[0], rel=1e-6)
    qft.optimize_training(model)
    assert packed(model, DataCollatorWithFlattening())[0] == pytest.approx(expected[0], rel=1e-6)


def test_rows():
    model = llama()
    out = qft.PackingCollator(model, 12, pad_token_id=7)(FEATURES)
    assert out["input_ids"].shape == out["labels"].shape == out["position_ids"].shape == (3, 12)
    assert out["use_cache"] is False and "attention_mask" not in out
    assert out["position_ids"].tolist() == [
        [*range(5), *range(3), *range(4)],
        [*range(9), *range(3)],
        [*range(7), *range(5)],
    ]
    assert out["input_ids"][0].tolist() == [*ROWS[0], *ROWS[2], 7, 7, 7, 7]
    assert out["labels"][0].tolist() == [-100, *ROWS[0][1:], -100, *ROWS[2][1:], -100, -100, -100, -100]
    assert int((out["labels"] != -100).sum()) == COUNT


def test_padding_and_missing_labels_of_features():
    collator = qft.PackingCollator(llama())
    padded = {"input_ids": torch.tensor([0, 0, 5, 6, 7]), "attention_mask": torch.tensor([0, 0, 1, 1, 1])}
    out = collator([padded, {"input_ids": [8, 9], "labels": [-100, 9]}, {"input_ids": []}])
    assert out["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert out["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert out["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_bad_input():
    model = llama()
    for length in [0, -1, 2.5, True]:
        with refuses(qft.BadOption, "length="):
            qft.PackingCollator(model, length)
    collator = qft.PackingCollator(model, 8)
    with refuses(qft.BadShape, "9 tokens", "rows of 8"):
        collator(FEATURES)
    with refuses(qft.BadShape, "3 tokens", "2 labels"):
        collator([{"input_ids": [1, 2, 3], "labels": [1, 2]}])
    with refuses(qft.BadShape, "no token"):
        collator([{"input_ids": []}])


def test_the_model_is_left_in_its_mode():
    model = gpt2().train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    qft.PackingCollator(model)
    assert [m.training for m in model.modules()] == modes


def test_trainer_over_packed_rows(tmp_path):
    """The loss that Trainer reports first is that of the sequences alone."""
    pytest.importorskip("datasets", reason="pip install datasets")
    from test_trainers import arguments, losses

    model = qft.quantize_and_wrap(llama(), "nf4", adapter=LoraConfig(r=4, target_modules="all-linear"), progress=False)
    expected = alone(model.train())[0]
    qft.optimize_training(model)
    trainer = Trainer(
        model,
        arguments(tmp_path, save_strategy="no", max_steps=4),
        train_dataset=FEATURES,
        data_collator=qft.PackingCollator(model, 16),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]

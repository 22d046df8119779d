"""`qft.train`: each task trains, learns what it should and nothing else, and goes on where it was stopped."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from helpers import refuses
from models import llama
from tiny_training import (
    CHATML,
    MARKED,
    adapter_of,
    chats,
    quick,
    same,
    save_model,
    small_llama,
    t5,
    tokenizer,
    vision,
    write_jsonl,
)

import qft
from qft.ops.loss import IGNORE
from qft.training.checks import Chat

pytest.importorskip("trl", reason="pip install trl")

TWO_TURNS = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "ef"},
    {"role": "assistant", "content": "gh"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", chats())


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


# ---- what is learnt ----------------------------------------------------------------------------------------


def learnt(labels, tok):
    return tok.decode([i for i in labels if i != IGNORE])


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by its prefix", "by its marks"])
def test_answers_and_the_token_that_ends_them_are_learnt_and_nothing_else(template):
    tok = tokenizer(template)
    ids, labels = Chat(tok)(TWO_TURNS)
    assert tok.decode(ids) == (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
        "<|im_start|>user\nef<|im_end|>\n<|im_start|>assistant\ngh<|im_end|>\n"
    )
    assert learnt(labels, tok) == "cd<|im_end|>gh<|im_end|>"
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
    ids, labels = Chat(tok, "last_answer")(TWO_TURNS)
    assert learnt(labels, tok) == "gh<|im_end|>"
    ids, labels = Chat(tok, "all")(TWO_TURNS)
    assert labels == ids


def test_the_end_of_a_turn_is_found():
    assert Chat(tokenizer(CHATML)).end == Chat(tokenizer(MARKED)).end == tokenizer().convert_tokens_to_ids("<|im_end|>")
    without = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    found = Chat(tokenizer(without)).findings
    assert len(found) == 1 and "will not learn to stop" in found[0] and "<|im_end|>" in found[0]
    found = Chat(tokenizer(CHATML.replace("<|im_end|>", ""))).findings
    assert len(found) == 1 and "eos_token" in found[0]


def test_a_template_that_hides_earlier_answers_is_refused_where_they_are_needed():
    """As Qwen3's: what earlier answers thought is dropped once another turn follows."""
    hiding = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].upper() }}{% else %}{{ m['content'] }}{% endif %}",
    )
    chat = Chat(tokenizer(hiding))
    assert learnt(chat(TWO_TURNS[:2])[1], tokenizer()) == "cd<|im_end|>"
    with refuses(qft.BadOption, "generation", "last_answer"):
        chat(TWO_TURNS)
    assert learnt(Chat(tokenizer(hiding), "last_answer")(TWO_TURNS)[1], tokenizer()) == "gh<|im_end|>"


def test_templates_that_cannot_be_used_are_refused():
    with refuses(qft.BadOption, "no chat template"):
        Chat(tokenizer(None))
    with refuses(qft.BadOption, "refuses this conversation"):
        Chat(tokenizer("{{ raise_exception('no') }}"))
    with refuses(qft.BadOption, "does not show the answer"):
        Chat(
            tokenizer("{% for m in messages %}{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}x{% endif %}"),
            "all",
        )
    with refuses(qft.BadOption, "neither"):
        Chat(tokenizer(None), template="no/such/file")
    assert Chat(tokenizer(None), template="chatml").end == tokenizer().convert_tokens_to_ids("<|im_end|>")


def test_a_template_that_is_given_is_saved_and_belongs_to_the_run(model, data, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "t.jinja").write_text(MARKED)
    call = {
        "model": model,
        "data_path": data,
        "project_name": str(tmp_path / "out"),
        "chat_template": str(tmp_path / "t.jinja"),
    }
    result = qft.train(**call, **quick(max_steps=1))
    assert AutoTokenizer.from_pretrained(result.adapter).chat_template == MARKED
    (tmp_path / "t.jinja").write_text(MARKED.replace("user", "person") + " ")
    with refuses(qft.BadOption, "chat template is another"):
        qft.train(**call, **quick(max_steps=1))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "4<|im_end|>"),
        ({"text": "abc"}, "bc<|im_end|>"),  # no position predicts the first token
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "b<|im_end|>",
        ),
        ({"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}, "gh<|im_end|>"),
    ],
    ids=["prompt and completion", "text", "messages", "an answer in the prompt"],
)
def test_labels_by_format(model, tmp_path, row, says):
    from qft.training.setup import prepare

    path = write_jsonl(tmp_path / "d.jsonl", [row, row])
    config = qft.TrainConfig(model, path, **quick())
    prepared = prepare(config)
    for encoded in prepared.train.rows:
        assert learnt(encoded["labels"], prepared.tokenizer) == says
    assert prepared.train.counts.learnt == 2 * len(prepared.tokenizer(says)["input_ids"])


def test_long_rows_are_cut_skipped_or_refused_and_counted(model, tmp_path):
    from qft.training.setup import prepare

    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "a", "completion": "b" * 20},
        {"prompt": "a" * 20, "completion": "b"},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    counts = prepare(qft.TrainConfig(model, path, **quick(max_length=10))).train.counts
    assert (counts.rows, counts.truncated, counts.without_answer) == (2, 1, 1)
    assert counts.tokens == 5 + 10 and counts.learnt == 3 + 9
    counts = prepare(qft.TrainConfig(model, path, **quick(max_length=10, too_long="skip"))).train.counts
    assert (counts.rows, counts.too_long) == (1, 2)
    with refuses(qft.BadShape, "line 2", "22 tokens", "max_length"):
        prepare(qft.TrainConfig(model, path, **quick(max_length=10, too_long="refuse")))


def test_padding_is_never_learnt_where_it_is_the_token_that_ends_a_turn(tmp_path):
    """The common trap: with pad = end of turn and labels masked by token, a model does not learn to stop."""
    from qft.training.checks import check_padding
    from qft.training.setup import prepare

    folder = save_model(tmp_path / "m", pad_token="<|im_end|>")
    rows = [*chats(2), {"messages": [{"role": "user", "content": "x" * 9}, {"role": "assistant", "content": "y" * 9}]}]
    prepared = prepare(qft.TrainConfig(folder, write_jsonl(tmp_path / "d.jsonl", rows), **quick()))
    result = qft.train(prepared.config, project_name=str(tmp_path / "out"), max_steps=1)
    assert result.steps == 1

    def by_token(features):
        width = max(len(f["input_ids"]) for f in features)
        pad = prepared.tokenizer.pad_token_id
        labels = torch.tensor([f["labels"] + [pad] * (width - len(f["labels"])) for f in features])
        return {"labels": labels.masked_fill(labels == pad, IGNORE)}

    with refuses(qft.BadOption, "padding token"):
        check_padding(by_token, prepared.train.rows, prepared.tokenizer.pad_token_id)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(tmp_path, data):
    folder = save_model(tmp_path / "m", model=llama(vocab_size=100))
    with refuses(qft.BadShape, "100 embeddings", "resize_token_embeddings"):
        qft.train(model=folder, data_path=data, project_name=str(tmp_path / "out"), **quick())
    assert not (tmp_path / "out").exists()


# ---- each task ---------------------------------------------------------------------------------------------


def test_the_adapter_is_that_of_a_hand_written_loop(model, data, tmp_path):
    """Whole batches, so that only the order of a sum differs."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, set_seed

    from qft.training.setup import prepare

    options = quick(batch_size=12, max_steps=4, lr=1e-3, max_grad_norm=0.05, gradient_checkpointing=False)
    result = qft.train(model=model, data_path=data, project_name=str(tmp_path / "out"), **options)
    rows = prepare(qft.TrainConfig(model, data, **options)).train.rows
    set_seed(42)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapter = LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    mine = qft.quantize_and_wrap(base, "nf4", adapter=adapter, progress=False).train()
    trained = [p for p in mine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    ids, labels = (torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels"))
    expected = []
    for _ in range(4):
        loss = mine(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(result) == pytest.approx(expected, rel=1e-5)
    qft.save(mine, tmp_path / "mine")
    found, wanted = adapter_of(tmp_path / "out" / "adapter"), adapter_of(tmp_path / "mine")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[k], wanted[k], atol=2e-5) for k in wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": "int8"},
        {"optimize": "no", "gradient_checkpointing": False},
        {"optimizer": "paged_adamw_8bit", "gradient_accumulation": 2},
        {"packing": True, "memory": "most"},
        {"quantization": None},
        {"peft": False, "lr": 1e-3},
        {"init": "qera", "calibration_samples": 4},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_a_language_model_learns_on_cuda(model, data, tmp_path, changes):
    from transformers import AutoModelForCausalLM

    out, whole = tmp_path / "out", changes.get("peft", True)
    call = {"model": model, "data_path": data, "project_name": str(out)}
    options = {
        "device": "cuda",
        "optimize": "auto",
        "max_steps": 30,
        "batch_size": 6,
        "merge_adapter": whole,
        **changes,
    }
    torch.cuda.reset_peak_memory_stats()
    result = qft.train(**call, **quick(**options))
    assert torch.cuda.max_memory_allocated() > 0
    found = losses(result)
    assert result.steps == 30 and found[-1] < 0.7 * found[0]
    loaded = AutoModelForCausalLM.from_pretrained(result.merged or result.model)
    ids = torch.tensor([[97, 98, 99]])
    assert loaded(input_ids=ids).logits.isfinite().all()
    if whole and options.get("quantization", "nf4") is not None:
        tuned = qft.load(result.adapter, device="cuda").eval()
        wanted = tuned(input_ids=ids.cuda()).logits.float().cpu()
        assert (loaded(input_ids=ids).logits.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantization": None},
        {"quantization": "int8", "optimizer": "adamw_8bit"},
        {"peft": False, "lr": 1e-3},
        {"init": "loftq"},
        {"quantization": "reference", "optimize": "yes", "target_modules": "q_proj,v_proj"},
        {"init": "qera", "calibration_samples": 4},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "nf4",
)
def test_a_language_model_learns(model, data, tmp_path, changes, monkeypatch):
    from transformers import AutoModelForCausalLM

    from qft.optimize import optimize

    monkeypatch.setattr(optimize, "switches", optimize.Switches(compile=False))
    options = quick(**{"max_steps": 12, "batch_size": 6, "merge_adapter": changes.get("peft", True), **changes})
    result = qft.train(model=model, data_path=data, project_name=str(tmp_path / "out"), eval_share=0.25, **options)
    assert losses(result)[-1] < 0.9 * losses(result)[0]
    assert result.steps == 12 and result.evaluation["eval_loss"] > 0
    folder = result.merged or result.model
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from qft.training.setup import prepare

    rows = prepare(qft.TrainConfig(model, data, eval_share=0.25, **options)).evaluation.rows
    with torch.no_grad():
        sums = [
            again(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss.item()
            for r in rows
        ]
    assert sum(sums) / len(sums) == pytest.approx(result.evaluation["eval_loss"], rel=1e-4)  # as many labels in each
    assert json.loads((tmp_path / "out" / "training.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", ["SFTConfig", "Seq2SeqTrainingArguments", "TrainingArguments"])
def test_the_trainers_get_no_deprecated_option(kind, recompute, tmp_path):
    """transformers renamed the options for recomputing activations; the old names go in its version 6."""
    import transformers
    import trl

    from qft.training.trainers import _checkpointing

    cls = getattr(transformers, kind, None) or getattr(trl, kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*checkpointing.* is deprecated", FutureWarning)
        found = cls(output_dir=str(tmp_path), use_cpu=True, bf16=False, **_checkpointing(recompute))
    assert {getattr(found, name) for name in _checkpointing(recompute) if "kwargs" not in name} == {recompute}


def test_packing_changes_no_loss(model, tmp_path):
    rows = [{"prompt": "ab" * (i % 4 + 1), "completion": "cd" * (i % 3 + 1)} for i in range(8)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    options = quick(batch_size=4, max_steps=4, lr=1e-3)
    padded = qft.train(model=model, data_path=path, project_name=str(tmp_path / "a"), **options)
    packed = qft.train(model=model, data_path=path, project_name=str(tmp_path / "b"), packing=True, **options)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)


def test_an_encoder_decoder_learns(tmp_path):
    folder = save_model(tmp_path / "m", model=t5(), eos_token="</s>")
    rows = [{"source": "abcdef"[i % 6], "target": "abcdef"[i % 6] * 2} for i in range(12)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    result = qft.train(
        model=folder,
        data_path=path,
        project_name=str(tmp_path / "out"),
        eval_share=0.25,
        **quick(max_steps=12, batch_size=6, lr=3e-2),
    )
    assert result.task == "seq2seq"
    assert losses(result)[-1] < 0.8 * losses(result)[0]
    assert result.data["train"] == {**result.data["train"], "rows": 9, "learnt": 27}
    assert result.evaluation["eval_loss"] < losses(result)[0]


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_classifier_learns_and_its_head_is_saved(model, tmp_path, quantization):
    rows = [{"text": f"{'ab'[i % 2]}{'xyz'[i % 3]}", "label": ["no", "yes"][i % 2]} for i in range(24)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    result = qft.train(
        model=model,
        data_path=path,
        project_name=str(tmp_path / "out"),
        eval_share=0.25,
        quantization=quantization,
        merge_adapter=True,
        **quick(max_steps=20, batch_size=6),
    )
    assert result.task == "classification"
    assert losses(result)[-1] < 0.2 < losses(result)[0]
    assert result.evaluation["eval_accuracy"] == 1.0
    assert any("score" in name for name in adapter_of(tmp_path / "out" / "adapter"))
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    merged = AutoModelForSequenceClassification.from_pretrained(result.merged)
    tok = AutoTokenizer.from_pretrained(result.merged)
    with torch.no_grad():
        says = [merged(**tok(text, return_tensors="pt")).logits.argmax().item() for text in ("ax", "bz")]
    assert [merged.config.id2label[i] for i in says] == ["no", "yes"]


def test_a_vision_language_model_learns_its_answers(tmp_path):
    folder, path = vision(tmp_path)
    result = qft.train(
        model=folder, data_path=path, project_name=str(tmp_path / "out"), **quick(max_steps=12, batch_size=4, lr=3e-2)
    )
    assert result.task == "vision-language"
    assert losses(result)[-1] < 0.7 * losses(result)[0]
    from qft.training.setup import prepare
    from qft.training.vision import VisionCollator

    prepared = prepare(qft.TrainConfig(folder, path, **quick()))
    batch = VisionCollator(prepared.processor, "answers", 256)(prepared.train.rows[:2])
    tok = prepared.tokenizer
    assert [learnt(labels.tolist(), tok) for labels in batch["labels"]] == ["red<|im_end|>", "blue<|im_end|>"]
    assert (batch["input_ids"] == tok.convert_tokens_to_ids("<image>")).sum() == 2 * 4
    assert batch["pixel_values"].shape[0] == 2


def test_missing_images_are_refused_early(tmp_path):
    folder, path = vision(tmp_path)
    (tmp_path / "0.png").unlink()
    with refuses(qft.BadOption, "line 1", "0.png"):
        qft.train(model=folder, data_path=path, project_name=str(tmp_path / "out"), **quick())


# ---- what is logged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["tensorboard", "auto"])
def test_tensorboard_has_the_losses_of_the_history(model, data, tmp_path, log):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25}
    result = qft.train(**call, **quick(max_steps=3, log=log))
    (file,) = out.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(result), rel=1e-6)
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(result.evaluation["eval_loss"], rel=1e-6)
    qft.train(**call, **quick(max_steps=3, log="none", resume="restart"))
    assert not list(out.rglob("events.out.tfevents.*"))


def test_tensorboard_that_is_not_installed_is_asked_for_before_anything_is_written(model, data, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    hidden = ("tensorboard", "tensorboardX")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else real(name, *a))
    call = {"model": model, "data_path": data, "project_name": str(tmp_path / "out")}
    with refuses(qft.MissingDependency, "log='tensorboard'", "pip install tensorboard"):
        qft.train(**call, **quick(log="tensorboard"))
    assert not (tmp_path / "out").exists()


# ---- stopped and continued ---------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step, when="on_step_end"):
    from qft.training.trainers import Watch

    real = getattr(Watch, when)

    def hook(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Stopped

    monkeypatch.setattr(Watch, when, hook)


RUN = {"max_steps": 8, "save_steps": 3, "lora_dropout": 0.1, "scheduler": "cosine", "gradient_accumulation": 2}


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return qft.train(model=model, data_path=data, project_name=str(folder), eval_share=0.25, **quick(**RUN)), folder


def test_a_stopped_run_goes_on_to_the_same_end_to_the_bit(model, data, tmp_path, whole, monkeypatch):
    """Dropout, order, schedule and optimizer are those of the run that was not stopped."""
    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25, **quick(**RUN)}
    for step in (2, 5, 8):
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            stop_at(patched, step)
            qft.train(**call)
    (out / ".partial-99").mkdir()  # what a kill leaves of a checkpoint
    broken = out / "checkpoint-7"
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{")
    result = qft.train(**call)
    assert result.resumed_from == str(out / "checkpoint-6") and not list(out.glob(".partial*"))
    expected, folder = whole
    assert same(adapter_of(out / "adapter"), adapter_of(folder / "adapter"))
    assert losses(result) == losses(expected) and result.evaluation == expected.evaluation
    assert [e.get("num_tokens") for e in result.history] == [e.get("num_tokens") for e in expected.history]
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7", "checkpoint-8"]


def test_a_run_stopped_after_its_last_step_only_saves(model, data, tmp_path, whole, monkeypatch):
    from qft.training import run

    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25, **quick(**RUN)}
    with monkeypatch.context() as patched, pytest.raises(Stopped):

        def stop(*args):
            raise Stopped

        patched.setattr(run, "_save", stop)
        qft.train(**call)
    result = qft.train(**call)
    assert result.resumed_from == str(out / "checkpoint-8") and result.steps == 8
    assert same(adapter_of(out / "adapter"), adapter_of(whole[1] / "adapter"))
    assert losses(result) == losses(whole[0]) and result.evaluation == whole[0].evaluation


def test_a_finished_run_does_nothing_and_says_so(model, data, whole, monkeypatch):
    result, folder = whole
    from qft.training import run

    monkeypatch.setattr(run, "load_model", None)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = qft.train(model=model, data_path=data, project_name=str(folder), eval_share=0.25, **quick(**RUN))
    assert again.already_finished and again.loss == result.loss and again.adapter == result.adapter
    assert "nothing was done" in str(again)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_other_settings_or_data_are_refused_with_what_differs(model, data, whole, tmp_path):
    _, folder = whole
    call = {"model": model, "data_path": data, "project_name": str(folder), "eval_share": 0.25, **quick(**RUN)}
    with refuses(qft.BadOption, "lr was 0.01 and is 0.02", "restart"):
        qft.train(**{**call, "lr": 0.02})
    other = write_jsonl(tmp_path / "other.jsonl", chats(13))
    with refuses(qft.BadOption, "training data is another"):
        qft.train(**{**call, "data_path": other})
    again = save_model(tmp_path / "m", model=small_llama(seed=3))
    with refuses(qft.BadOption, "the model is another"):
        qft.train(**{**call, "model": again})


def slow_steps(monkeypatch, seconds):
    from qft.training.trainers import Watch

    monkeypatch.setattr(Watch, "on_step_begin", lambda *args, **kwargs: time.sleep(seconds))


def test_no_bar_is_left_behind_a_failure(model, data, tmp_path, monkeypatch):
    """It would be drawn once more, below the error."""
    from tqdm.auto import tqdm

    from qft.training.folder import RunFolder

    def fails(*args):
        raise qft.BadFolder("full")

    monkeypatch.setattr(RunFolder, "adopt", fails)
    with refuses(qft.BadFolder, "full"):
        qft.train(model=model, data_path=data, project_name=str(tmp_path / "out"), **quick(progress=True))
    assert not tqdm._instances


def test_max_seconds_ends_a_run_after_a_whole_step(model, data, tmp_path, whole, monkeypatch):
    """It is saved, evaluated and merged as any other; what was trained is what a run without a limit has after that step."""
    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25, **quick(**RUN)}
    with monkeypatch.context() as patched:
        slow_steps(patched, 0.3)
        result = qft.train(**call, max_seconds=0.3, merge_adapter=True)
    assert (result.steps, result.cut_from) == (1, 8) and "1 of 8 steps" in str(result) and "max_seconds" in str(result)
    assert losses(result) == losses(whole[0])[:1]
    assert result.evaluation["eval_loss"] == result.history[-1]["eval_loss"] > 0
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-1"] and (out / "merged" / "config.json").is_file()
    again = qft.train(**call, max_seconds=100, merge_adapter=True)
    assert again.already_finished and (again.steps, again.cut_from) == (1, 8)


def test_a_killed_run_that_goes_on_has_its_max_seconds_anew(model, data, tmp_path, whole, monkeypatch):
    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25, **quick(**RUN)}
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 5)
        qft.train(**call, max_seconds=1000)
    with monkeypatch.context() as patched:
        slow_steps(patched, 0.3)
        result = qft.train(**call, max_seconds=0.3)
    assert result.resumed_from == str(out / "checkpoint-3") and (result.steps, result.cut_from) == (4, 8)
    assert losses(result) == losses(whole[0])[:4]


def test_a_run_that_max_seconds_does_not_cut_is_the_same_to_the_bit(model, data, tmp_path, whole):
    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25, **quick(**RUN)}
    result = qft.train(**call, max_seconds=1000)
    expected, folder = whole
    assert result.cut_from is None and same(adapter_of(out / "adapter"), adapter_of(folder / "adapter"))
    assert losses(result) == losses(expected) and result.evaluation == expected.evaluation
    assert str(result).replace(str(out), "") == str(expected).replace(str(folder), "")


def test_restart_begins_anew(model, data, tmp_path):
    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out)}
    qft.train(**call, **quick(max_steps=4))
    result = qft.train(**call, **quick(max_steps=2, resume="restart"))
    assert result.steps == 2 and result.resumed_from is None and not result.already_finished
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_folder_of_something_else_is_left_alone(model, data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with refuses(qft.BadFolder, "mine.txt", "empty folder"):
        qft.train(model=model, data_path=data, project_name=str(tmp_path), **quick())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with refuses(qft.BadFolder, "is a file"):
        qft.train(model=model, data_path=data, project_name=str(tmp_path / "mine.txt"), **quick())


def test_two_processes_do_not_train_into_one_folder(model, data, tmp_path):
    from qft.training.folder import RunFolder

    out = tmp_path / "out"
    out.mkdir()
    with RunFolder(out).alone(), refuses(qft.BadFolder, "another process"):
        qft.train(model=model, data_path=data, project_name=str(out), **quick())


def test_a_loss_that_is_not_finite_stops_the_run(model, data, tmp_path):
    with refuses(qft.NonFiniteWeights, "lower lr"):
        qft.train(
            model=model,
            data_path=data,
            project_name=str(tmp_path / "out"),
            **quick(lr=1e30, max_grad_norm=0.0, max_steps=5),
        )


def test_a_full_disk_leaves_the_last_checkpoint(model, data, tmp_path, monkeypatch, whole):
    """The second checkpoint cannot be written; afterwards the run goes on from the first."""
    import torch as t

    out = tmp_path / "out"
    call = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25, **quick(**RUN)}
    real, seen = t.save, []

    def full(value, path, *args, **kwargs):
        if "optimizer.pt" in str(path):
            seen.append(path)
            if len(seen) == 2:
                raise RuntimeError(
                    "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0: file write failed"
                )
        return real(value, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(t, "save", full)
        with refuses(qft.BadFolder, "checkpoint-6", "checkpoint-3"):
            qft.train(**call)
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-3"] and not list(out.glob(".partial*"))
    assert not (out / "adapter").exists()
    qft.train(**call)
    assert same(adapter_of(out / "adapter"), adapter_of(whole[1] / "adapter"))


CHILD = """
import json, sys
import qft
qft.train(json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(model, data, tmp_path, whole):
    out, chosen = tmp_path / "out", random.Random(1)
    config = {"model": model, "data_path": data, "project_name": str(out), "eval_share": 0.25, **quick(**RUN)}
    kills = 0
    for _ in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(config)], env=environment(), stderr=subprocess.DEVNULL
        )
        while not (out / "training.json").exists() and child.poll() is None:
            time.sleep(0.05)
        if kills < 3:
            try:
                child.wait(timeout=chosen.uniform(0.2, 1.0 + 2 * kills))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.wait()
                kills += 1
                continue
        assert child.wait(timeout=300) == 0
        break
    note = json.loads((out / "training.json").read_text())
    assert note["state"] == "finished" and kills
    assert same(adapter_of(out / "adapter"), adapter_of(whole[1] / "adapter"))
    assert note["result"]["loss"] == whole[0].loss and math.isfinite(whole[0].loss)


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

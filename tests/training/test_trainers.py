"""transformers' Trainer and TRL's SFTTrainer train, checkpoint and resume over a model quantized in memory."""

import pytest
import torch
from models import batch, llama, logits, relative
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import qft
from qft.lora.layer import QftLinear
from qft.optimize import optimize

Dataset = pytest.importorskip("datasets", reason="pip install datasets").Dataset

SPECS = ["nf4", "int8", "reference", "reference:format=int,bits=3,group_size=32"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """test_optimizing.py compiles; here it would take half a minute a graph."""
    monkeypatch.setattr(optimize, "switches", optimize.Switches(compile=False))


def rows(n=16, length=12):
    ids = batch(seed=5, shape=(n, length)).tolist()
    return Dataset.from_list([{"input_ids": i, "attention_mask": [1] * length, "labels": i} for i in ids])


def arguments(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": [],
            "seed": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def quantized_bits(model):
    return {n: m.base_layer.state_dict() for n, m in model.named_modules() if isinstance(m, QftLinear)}


@pytest.mark.parametrize("spec", SPECS)
def test_trainer_trains_checkpoints_and_resumes(tmp_path, spec):
    """A run that was stopped at its checkpoint ends as the one that was not, to the bit."""

    def trainer(**changes):
        model = qft.quantize_and_wrap(llama(), spec, adapter=LoraConfig(**LORA), progress=False)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                nn.init.normal_(parameter, std=0.1)
        return Trainer(model, arguments(tmp_path, **changes), train_dataset=rows())

    whole = trainer()
    frozen = {n: {k: v.clone() for k, v in s.items()} for n, s in quantized_bits(whole.model).items()}
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    after = quantized_bits(whole.model)
    assert all(torch.equal(v, after[n][k]) for n, s in frozen.items() for k, v in s.items())
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    end, expected = adapters(resumed.model), adapters(whole.model)
    assert all(torch.equal(end[n], p) for n, p in expected.items())
    assert losses(resumed)[-3:] == losses(whole)[-3:]


def test_trainer_saves_the_adapter_alone(tmp_path):
    model = qft.quantize_and_wrap(llama(), "nf4", adapter=LoraConfig(**LORA), progress=False)
    trainer = Trainer(model, arguments(tmp_path, max_steps=2, save_steps=2), train_dataset=rows())
    trainer.train()
    saved = {f.name for f in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    again = qft.load(tmp_path / "checkpoint-2", base=qft.quantize(llama(), "nf4", progress=False))
    assert torch.equal(logits(again.eval()), logits(model.eval()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_may_recompute_in_its_own_way(tmp_path, reentrant):
    """Checkpointing changes memory, not numbers."""

    def run(**changes):
        torch.manual_seed(0)
        model = qft.quantize_and_wrap(
            llama(), "nf4", adapter=LoraConfig(**LORA), progress=False, use_gradient_checkpointing=False
        )
        trainer = Trainer(model, arguments(tmp_path, save_strategy="no", **changes), train_dataset=rows())
        trainer.train()
        return losses(trainer)

    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert run(gradient_checkpointing=True, **kwargs) == pytest.approx(run(gradient_checkpointing=False), rel=1e-4)


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_evaluation_is_that_of_the_merged_model(tmp_path, spec):
    """LLM.int8()'s own evaluation differs from its training by 2 %; ours does not."""
    model = qft.quantize_and_wrap(llama(), spec, adapter=LoraConfig(**LORA), progress=False)
    trainer = Trainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    reported = trainer.evaluate()["eval_loss"]
    merged, ids = qft.merge_to_float(model, dtype=torch.float32), torch.tensor(rows()["input_ids"])
    with torch.no_grad():
        assert float(merged(input_ids=ids, labels=ids).loss) == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast_learns_the_same_with_float32_masters(tmp_path, dtype):
    def run(**changes):
        torch.manual_seed(0)
        model = qft.quantize_and_wrap(llama(dtype), "nf4", adapter=LoraConfig(**LORA), progress=False)
        trainer = Trainer(model, arguments(tmp_path, save_strategy="no", **changes), train_dataset=rows())
        trainer.train()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {m.weight.dtype for n, m in model.named_modules() if n.endswith("layernorm")} == {dtype}
        return losses(trainer)

    assert run(bf16=True) == pytest.approx(run(bf16=False), rel=0.02)


def test_a_quantized_model_without_adapters_is_refused_by_the_trainer(tmp_path):
    model = qft.quantize(llama(), "nf4", progress=False)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=rows())


# ---- TRL ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(94)} | {"?": 94, "<e>": 95}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<e>", pad_token="<e>")


def sft(model, folder, tokenizer, **changes):
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        max_length=16,
        report_to=[],
        seed=3,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    text = [{"text": " ".join(f"w{i % 94}" for i in row)} for row in batch(seed=5, shape=(16, 12)).tolist()]
    return SFTTrainer(model, config, train_dataset=Dataset.from_list(text), processing_class=tokenizer, **changes)


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_sft_trainer_trains_checkpoints_and_resumes(tmp_path, tokenizer, spec, wrapped):
    """Wrapped before, and with `peft_config=`: our layers, float32 masters, and a resume to the bit."""

    def trainer():
        torch.manual_seed(0)
        if wrapped:
            model = qft.quantize_and_wrap(llama(), spec, adapter=LoraConfig(**LORA), progress=False)
            return sft(model, tmp_path, tokenizer)
        model = qft.quantize(llama(), spec, progress=False)
        return sft(model, tmp_path, tokenizer, peft_config=LoraConfig(**LORA))

    whole = trainer()
    layers = [m for m in whole.model.modules() if isinstance(m, QftLinear)]
    assert len(layers) == 14
    assert {p.dtype for p in whole.model.parameters() if p.requires_grad} == {torch.float32}
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    end, expected = adapters(resumed.model), adapters(whole.model)
    assert all(torch.equal(end[n], p) for n, p in expected.items())
    tuned = logits(whole.model.eval())
    assert relative(logits(qft.merge_to_float(whole.model, dtype=torch.float32)), tuned) < 1e-5


def test_sft_over_a_bfloat16_model_keeps_float32_masters(tmp_path, tokenizer):
    model = qft.quantize(llama(torch.bfloat16), "nf4", progress=False)
    trainer = sft(model, tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


# ---- PEFT's other methods over bitsandbytes ----------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nf4", "int8"])
@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(init_r=6, target_r=4, total_step=20, tinit=2, tfinal=2, target_modules=["q_proj", "v_proj"]),
        VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_adalora_vera_and_ia3_over_bitsandbytes(spec, config):
    """They train, the codes stay, and they start as the quantized model does."""
    from copy import deepcopy

    model = qft.quantize(llama(), spec, progress=False)
    start = logits(model)
    codes = {id(m): m.weight.detach().clone() for m in model.modules() if hasattr(m, "source_cls")}
    qft.prepare_model_for_kbit_training(model)
    wrapped = qft.wrap(model, deepcopy(config)).train()
    assert relative(logits(wrapped.eval()), start) < (0.05 if spec == "int8" else 1e-5)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    wrapped.train()
    seen = []
    for _ in range(8):
        out = wrapped(input_ids=batch(), labels=batch())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(out.loss))
    assert seen[-1] < seen[0]
    layers = {id(m): m for m in model.modules() if hasattr(m, "source_cls")}
    assert codes and all(torch.equal(layers[n].weight, c) for n, c in codes.items())
    assert not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_loaded_in_8bit", False)


# ---- the fast step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True, False])
def test_trainer_over_an_optimized_model(tmp_path, checkpointing):
    """The same losses as without, evaluation with logits, checkpoints of the adapter alone, and a resume to the bit."""

    def trainer(optimized, folder, metrics=None):
        torch.manual_seed(0)
        model = qft.quantize_and_wrap(
            llama(), "nf4", adapter=LoraConfig(**LORA), progress=False, use_gradient_checkpointing=checkpointing
        )
        if optimized:
            qft.optimize_training(model)
        args = arguments(tmp_path / folder, gradient_accumulation_steps=2)
        return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(4), compute_metrics=metrics)

    plain, fast = trainer(False, "plain"), trainer(True, "fast", lambda p: {"shape": p.predictions.shape[-1]})
    plain.train()
    fast.train()
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)
    evaluated = fast.evaluate()
    assert evaluated["eval_shape"] == 96 and evaluated["eval_loss"] == pytest.approx(
        plain.evaluate()["eval_loss"], rel=1e-4
    )
    saved = {f.name for f in (tmp_path / "fast" / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    resumed = trainer(True, "fast")
    resumed.train(resume_from_checkpoint=str(tmp_path / "fast" / "checkpoint-3"))
    assert all(torch.equal(p, adapters(fast.model)[n]) for n, p in adapters(resumed.model).items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_sft_trainer_over_an_optimized_model(tmp_path, tokenizer, when):
    """TRL computes its loss, its entropy and its token accuracy itself, from hidden states; blocks are ours."""

    def run(when):
        torch.manual_seed(0)
        model = qft.quantize_and_wrap(llama(), "nf4", adapter=LoraConfig(**LORA), progress=False)
        if when == "before":
            qft.optimize_training(model)
        trainer = sft(model, tmp_path, tokenizer)
        if when == "after":
            qft.optimize_training(trainer.model)
        trainer.train()
        return trainer

    plain, fast = run("never"), run(when)
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)
    accuracy = [
        [e["mean_token_accuracy"] for e in t.state.log_history if "mean_token_accuracy" in e] for t in (fast, plain)
    ]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.03) and accuracy[0]
    qft.unoptimize(fast.model)
    assert fast.model(input_ids=batch(), labels=batch()).logits is not None


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_8bit",
        pytest.param("paged_adamw_8bit", marks=pytest.mark.gpu),
        pytest.param("paged_adamw_32bit", marks=pytest.mark.gpu),
    ],
)
def test_optimizers_of_bitsandbytes_keep_float32_masters(tmp_path, optim):
    """Paged ones need a device to page from. States of 4,096 numbers and more are 8-bit ones."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    model = qft.quantize_and_wrap(llama(dtype), "nf4", adapter=LoraConfig(**{**LORA, "r": 32}), progress=False)
    qft.optimize_training(model.cuda() if gpu else model)
    trainer = Trainer(
        model, arguments(tmp_path, save_strategy="no", optim=optim, use_cpu=not gpu, bf16=gpu), train_dataset=rows()
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.isfinite().all() for p in trained)
    if "8bit" in optim:
        inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert any(
            v.dtype == torch.uint8 for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        )

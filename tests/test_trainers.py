"""transformers' Trainer, TRL's SFTTrainer and PEFT's other methods over models that qft quantized in memory."""

import copy
import json
import warnings

import pytest
import torch
from models import BUILDERS, VOCABULARY, batch, llama, logits, relative
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments
from twins import dequantized_copy, gradient_error, loss_and_gradients, output_error

import qft
from qft.errors import BadOption, UnsupportedOperation
from qft.lora.layer import QftLinear
from qft.registry import quantizer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
]
SPECS = ["nf4", "reference"]
STEPS, HALF = 8, 4


def rows(count=32, length=12):
    """Sequences with a rule to learn: each counts up in steps of its own."""
    start, step = torch.arange(count)[:, None], 1 + torch.arange(count)[:, None] % 3
    return ((start + step * torch.arange(length)) % VOCABULARY).tolist()


def data():
    return [{"input_ids": r, "labels": r} for r in rows()]


def adapter(**changes):
    options = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**options, **changes})


def wrapped(spec, name="llama", dtype=torch.float32, checkpointing=True, **changes):
    """The same model each time: the adapters' random start is seeded."""
    torch.manual_seed(7)
    return qft.quantize_and_wrap(
        BUILDERS[name](dtype),
        spec,
        adapter=adapter(**changes),
        use_gradient_checkpointing=checkpointing,
        progress=False,
    )


def arguments(folder, **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": HALF,
        "logging_steps": 1,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
    }
    return {**options, **changes}


def losses(trainer):
    return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


def adapters(model):
    return {k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}


def frozen(model):
    """Every tensor of the base, codes and constants included."""
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k and "ia3_" not in k and "vera_" not in k}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def trained(make_trainer, folder, resume=None):
    trainer = make_trainer(folder)
    base = frozen(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    assert same(frozen(trainer.model), base), "training changed the quantized base"
    return trainer


def check_training_and_resuming(make_trainer, tmp_path):
    """Trained in one go, and stopped in the middle and resumed in a new process' place: the same, to the bit."""
    whole = trained(make_trainer, tmp_path / "whole")
    curve = losses(whole)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert sum(curve[s] for s in (STEPS - 1, STEPS)) < 0.85 * (curve[1] + curve[2]), curve

    checkpoint = tmp_path / "whole" / f"checkpoint-{HALF}"
    files = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
    assert not {f for f in files if f.startswith(("model", "pytorch_model"))}

    resumed = trained(make_trainer, tmp_path / "resumed", resume=str(checkpoint))
    assert losses(resumed) == curve
    assert same(adapters(resumed.model), adapters(whole.model))
    assert not same(adapters(resumed.model), adapters(make_trainer(tmp_path / "fresh").model))
    return whole


# ---- transformers' Trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainer_trains_checkpoints_and_resumes(tmp_path, spec, name):
    def make(folder):
        return Trainer(model=wrapped(spec, name), args=TrainingArguments(**arguments(folder)), train_dataset=data())

    whole = check_training_and_resuming(make, tmp_path)
    whole.save_model(str(tmp_path / "final"))
    base = qft.quantize(BUILDERS[name](), spec, progress=False)
    again = PeftModel.from_pretrained(base, str(tmp_path / "final"))
    assert torch.equal(logits(again.eval()), logits(whole.model.eval()))
    assert relative(logits(qft.merge_to_float(whole.model)), logits(whole.model)) < 1e-5


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_trainer_evaluates_what_is_merged(tmp_path, spec):
    """The loss that `evaluate` reports is that of the merged float model: evaluation computes as training does."""
    trainer = Trainer(
        model=wrapped(spec), args=TrainingArguments(**arguments(tmp_path)), train_dataset=data(), eval_dataset=data()
    )
    trainer.train()
    reported = trainer.evaluate()["eval_loss"]
    merged = qft.merge_to_float(trainer.model, dtype=torch.float32)
    ids = torch.tensor(rows())
    with torch.no_grad():
        assert merged(input_ids=ids, labels=ids).loss.item() == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_checkpointing_by_the_trainers_arguments(tmp_path, spec):
    """Recomputing changes nothing but the memory, and it is the Trainer's argument that switches it on."""
    results, calls = [], []
    for on in (False, True):
        model = wrapped(spec, checkpointing=False)
        assert not model.is_gradient_checkpointing
        count = [0]
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        layer.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        options = arguments(tmp_path / str(on), gradient_checkpointing=on, max_steps=4)
        trained(lambda _, m=model, o=options: Trainer(model=m, args=TrainingArguments(**o), train_dataset=data()), None)
        results.append(adapters(model))
        calls.append(count[0])
    assert calls == [4, 8]
    assert same(*results)


def test_trainer_with_bf16_autocast(tmp_path):
    """Autocast around a float32 model and a bf16 model without it learn alike; the adapters stay float32 masters."""
    curves = []
    for dtype, bf16 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = wrapped("nf4", dtype=dtype, lora_dropout=0.0)
        args = TrainingArguments(**arguments(tmp_path / f"{dtype}{bf16}", bf16=bf16))
        trainer = trained(lambda _, m=model, a=args: Trainer(model=m, args=a, train_dataset=data()), None)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        curves.append(list(losses(trainer).values()))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=0.03)


@pytest.mark.parametrize("spec", SPECS)
def test_trainer_refuses_a_quantized_model_without_adapters(tmp_path, spec):
    """transformers' own refusal, which it owes to our marks: nothing would train."""
    model = qft.quantize(llama(), spec, progress=False)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=data())


# ---- TRL's SFTTrainer ------------------------------------------------------------------------------------

trl = pytest.importorskip("trl", reason="pip install trl")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def sft(folder, model, tokenizer, **changes):
    from datasets import Dataset

    peft_config = changes.pop("peft_config", None)
    options = arguments(folder, bf16=False, max_length=16, packing=False, **changes)
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options),
        train_dataset=Dataset.from_dict({"input_ids": rows()}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def check_masters(model):
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and {p.dtype for p in trainable} == {torch.float32}
    ours = [m for m in model.modules() if isinstance(m, QftLinear)]
    assert len(ours) == 14 and all(quantizer_of(m.base_layer) is not None for m in ours)


@pytest.mark.parametrize("how", ["wrapped before", "peft_config"])
@pytest.mark.parametrize("spec", SPECS)
def test_sft_trains_checkpoints_and_resumes(tmp_path, tokenizer, spec, how):
    def make(folder):
        if how == "wrapped before":
            trainer = sft(folder, wrapped(spec), tokenizer)
        else:
            torch.manual_seed(7)
            trainer = sft(folder, qft.quantize(llama(), spec, progress=False), tokenizer, peft_config=adapter())
        check_masters(trainer.model)
        return trainer

    whole = check_training_and_resuming(make, tmp_path)
    check_masters(whole.model)
    assert relative(logits(qft.merge_to_float(whole.model.eval())), logits(whole.model)) < 1e-5


@pytest.mark.parametrize("how", ["wrapped before", "peft_config"])
def test_sft_leaves_adapters_over_a_bf16_base_in_float32(tmp_path, tokenizer, how):
    """It casts those of every model that says `is_loaded_in_4bit`, and a bfloat16 master loses small updates."""
    if how == "wrapped before":
        trainer = sft(tmp_path, wrapped("nf4", dtype=torch.bfloat16), tokenizer)
    else:
        model = qft.quantize(llama(torch.bfloat16), "nf4", progress=False)
        trainer = sft(tmp_path, model, tokenizer, peft_config=adapter())
    check_masters(trainer.model)
    trained(lambda _: trainer, None)
    check_masters(trainer.model)
    curve = losses(trainer)
    assert curve[STEPS] < 0.85 * curve[1]
    assert {v.dtype for v in adapters(trainer.model).values()} == {torch.float32}


def test_sft_and_trainer_learn_the_same(tmp_path, tokenizer):
    """The two trainers over the same wrapped model, without dropout: the same steps."""
    ours = sft(tmp_path / "sft", wrapped("nf4", lora_dropout=0.0), tokenizer)
    trained(lambda _: ours, None)
    plain = Trainer(
        model=wrapped("nf4", lora_dropout=0.0),
        args=TrainingArguments(**arguments(tmp_path / "trainer")),
        train_dataset=data(),
    )
    plain.train()
    assert list(losses(ours).values()) == pytest.approx(list(losses(plain).values()), rel=1e-3)


# ---- PEFT's other methods over bitsandbytes --------------------------------------------------------------

METHODS = {
    "AdaLoRA": AdaLoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"], init_r=6, target_r=4, tinit=1, tfinal=1, deltaT=1, total_step=6
    ),
    "VeRA": VeraConfig(target_modules=["q_proj", "o_proj"], r=8, d_initial=0.1),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
BNB = ["nf4", "fp4:double_quant=true", "int8"]


def methods_pair(spec, config):
    """A quantized model wrapped by qft, and PEFT's own over its dequantized float copy, with the same adapters."""
    model = llama()
    twin = copy.deepcopy(model)
    qft.quantize(model, spec, progress=False)
    dequantized_copy(model, twin)
    torch.manual_seed(0)
    ours = qft.wrap(model, copy.deepcopy(config))
    torch.manual_seed(0)
    theirs = get_peft_model(twin, copy.deepcopy(config))
    state = adapters(theirs)
    assert state.keys() == get_peft_model_state_dict(ours).keys()
    set_peft_model_state_dict(ours, state)
    return ours, theirs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", BNB)
def test_other_methods_are_what_they_are_over_floats(spec, method):
    ours, theirs = methods_pair(spec, METHODS[method])
    kinds = {type(m).__module__ for n, m in ours.named_modules() if hasattr(m, "base_layer")}
    assert all(k.endswith(".bnb") for k in kinds), kinds
    if spec == "int8":  # the vendor's own forward quantizes activations in evaluation
        assert output_error(ours.eval(), theirs.eval()) < 0.03
    else:
        assert output_error(ours.eval(), theirs.eval()) < 1e-5
    if method == "VeRA":
        with torch.no_grad():
            for model in (ours, theirs):
                for name, p in model.named_parameters():
                    if "vera_lambda_b" in name:
                        p.fill_(0.3)
    y, mine = loss_and_gradients(ours)
    z, other = loss_and_gradients(theirs)
    assert mine and relative(y, z) < (1e-2 if spec == "int8" else 1e-5)
    assert gradient_error(mine, other) < (5e-2 if spec == "int8" else 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", BNB)
def test_other_methods_train_and_leave_the_base_alone(spec, method):
    model = qft.quantize_and_wrap(llama(), spec, adapter=METHODS[method], progress=False)
    assert not hasattr(model.get_base_model(), "is_loaded_in_4bit")
    base = frozen(model)
    start, curve = adapters(model), []
    ids = torch.tensor(rows(8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0)
    model.eval()(input_ids=ids)  # an evaluation first: on some CPUs bitsandbytes repacks its weights there
    model.train()
    for step in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if method == "AdaLoRA":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        curve.append(loss.item())
    assert curve[-1] < 0.97 * curve[0], curve
    assert not same(adapters(model), start)
    assert same(frozen(model), base)


@pytest.mark.parametrize("method", ["VeRA", "IA3"])
def test_other_methods_round_trip(tmp_path, method):
    model = qft.quantize_and_wrap(llama(), "nf4", adapter=METHODS[method], progress=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1)
    expected = logits(model.eval())
    qft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == METHODS[method].peft_type.value
    assert torch.equal(logits(qft.load(tmp_path, base=llama())), expected)


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_over_other_backends_are_refused(method):
    for spec in ("reference", {"*.mlp.*": "reference", "*": "nf4"}):
        model = llama()
        before = logits(model)
        with pytest.raises(UnsupportedOperation, match="bitsandbytes"):
            qft.quantize_and_wrap(model, spec, adapter=METHODS[method], progress=False)
        assert torch.equal(logits(model), before) and not hasattr(model, "_qft")
        model = qft.quantize(model, spec, progress=False)
        before = logits(model)
        with pytest.raises(UnsupportedOperation, match="bitsandbytes"):
            qft.wrap(model, METHODS[method])
        assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")


def test_an_init_is_for_lora_alone():
    with pytest.raises(BadOption, match="LoRA"):
        qft.quantize_and_wrap(llama(), "nf4", adapter=METHODS["IA3"], init="loftq", progress=False)
    with pytest.raises(BadOption, match="LoRA"):
        qft.quantize_and_wrap(llama(), "nf4", adapter=METHODS["AdaLoRA"], init="loftq", progress=False)


def test_training_says_nothing_alarming(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(
            lambda _: Trainer(
                model=wrapped("nf4"), args=TrainingArguments(**arguments(tmp_path, max_steps=2)), train_dataset=data()
            ),
            None,
        )
    assert batch().shape == (2, 12)
    ours = [w for w in caught if "qft" in str(w.filename) or issubclass(w.category, qft.QftWarning)]
    assert not ours, [str(w.message) for w in ours]

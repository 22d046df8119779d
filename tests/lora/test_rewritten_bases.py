"""Adapters whose init rewrote the base: every folder says so, and the base without its adapter is never used in silence."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from helpers import refuses
from models import batch, llama, logits, qwen3_moe, relative
from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import qft
from qft.errors import AdapterMismatch, BadOption, UnsupportedOperation

INITS = {"pissa": "pissa", "olora": "olora", "loftq": qft.LoftQ(steps=3)}
SPECS = ["nf4", "reference", "hqq:group_size=32"]


def config():
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"])


def wrapped(init="pissa", spec="reference"):
    init = INITS.get(init, init)
    return qft.quantize_and_wrap(llama(), spec, adapter=config(), init=init, progress=False).eval()


def tuned(init="pissa", spec="reference"):
    model = wrapped(init, spec)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return model


def by_peft(model, folder):
    model.save_pretrained(folder)


def by_trainer(model, folder):
    args = TrainingArguments(str(folder / "run"), report_to=[], use_cpu=True)
    Trainer(model, args).save_model(str(folder))


def by_checkpoint(model, folder):
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 2
    args = TrainingArguments(str(folder), max_steps=1, save_steps=1, learning_rate=0.0, report_to=[], use_cpu=True)
    Trainer(model, args, train_dataset=rows).train()
    model.eval()
    return folder / "checkpoint-1"


SAVERS = [by_peft, by_trainer, by_checkpoint]


@pytest.mark.parametrize("save", SAVERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("init", INITS)
def test_whoever_saves_says_that_the_base_was_rewritten(tmp_path, init, save):
    model = tuned(init)
    expected = logits(model)
    folder = save(model, tmp_path) or tmp_path
    note = json.loads((folder / "qft.json").read_text())
    assert note["base_changed"] and not note["base_stored"]
    base = qft.quantize(llama(), "reference", progress=False)
    for over in (base, llama()):
        with refuses(AdapterMismatch, "rewritten", "qft.save", model=over):
            qft.load(folder, base=over)
    with pytest.raises(Exception, match=r"rewritten base|rewrites the float base"):
        PeftModel.from_pretrained(qft.quantize(llama(), "reference", progress=False), str(folder))
    same = copy.deepcopy(model)
    same.load_adapter(str(folder), "default", is_trainable=False)
    assert torch.equal(logits(same), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_saved_with_its_base_it_loads_as_ever(tmp_path, spec):
    model = tuned("pissa", spec)
    expected = logits(model)
    by_peft(model, tmp_path)
    qft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    for base in (None, llama(), qft.quantize(llama(), spec, progress=False)):
        assert torch.equal(logits(qft.load(tmp_path, base=base).eval()), expected)
    assert not list(tmp_path.glob("*/qft.json"))


def test_a_plain_adapter_says_its_base_too(tmp_path):
    model = tuned(None, "nf4")
    expected = logits(model)
    by_peft(model, tmp_path)
    assert not json.loads((tmp_path / "qft.json").read_text())["base_changed"]
    assert torch.equal(logits(qft.load(tmp_path, base=llama())), expected)
    plain = PeftModel.from_pretrained(qft.quantize(llama(), "nf4", progress=False), str(tmp_path)).eval()
    assert torch.equal(logits(plain), expected)
    with refuses(AdapterMismatch, "original weights"):
        qft.load(tmp_path, base=llama(seed=1))


def test_copies_and_pickled_models_say_it_too(tmp_path):
    model = tuned()
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        expected = logits(twin)
        del model.peft_config["default"].__dict__["_qft_base"]
        by_peft(twin, tmp_path / str(i))
        assert json.loads((tmp_path / str(i) / "qft.json").read_text())["base_changed"]
        assert torch.equal(logits(twin), expected)
        model = tuned()
    given = config()
    qft.quantize_and_wrap(llama(), "reference", adapter=given, init="pissa", progress=False)
    assert type(given) is LoraConfig and "_qft_base" not in given.__dict__


@pytest.mark.parametrize("init", INITS)
def test_the_residual_is_not_used_without_its_adapter(init):
    model = wrapped(init)
    expected = logits(model)
    with pytest.raises(UnsupportedOperation, match="residual"), model.disable_adapter():
        logits(model)
    assert torch.equal(logits(model), expected)
    for away in (model.unload, lambda: model.delete_adapter("default"), model.base_model.disable_adapter_layers):
        with refuses(UnsupportedOperation, "residual", model=model):
            away()
    model.add_adapter("second", config())
    model.set_adapter("second")
    with pytest.raises(UnsupportedOperation, match="residual"):
        logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    with pytest.raises(UnsupportedOperation, match="residual"):
        model(input_ids=batch(0, (2, 4)), adapter_names=["default", "__base__"])
    model.delete_adapter("second")  # the active adapter stays
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("stored", [True, False])
def test_a_loaded_residual_is_guarded_too(tmp_path, stored):
    model = tuned()
    qft.save(model, tmp_path)
    again = qft.load(tmp_path, base=None if stored else llama())
    with pytest.raises(UnsupportedOperation, match="residual"), again.disable_adapter():
        logits(again)


def test_inits_that_leave_the_base_alone_can_be_switched_off():
    base = logits(qft.quantize(llama(), "reference", progress=False))
    for init in ("loftq", "qera", None):
        options = {"calibration": [batch(0, (4, 16))]} if init == "qera" else {}
        model = qft.quantize_and_wrap(
            llama(), "reference", adapter=config(), init=init, progress=False, **options
        ).eval()
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert relative(logits(model.unload()), base) == 0


def test_merging_a_rewritten_base_is_right():
    model = tuned()
    expected = logits(model)
    plain = qft.merge_to_float(model)
    assert relative(logits(plain), expected) < 1e-5
    qft.merge(model)
    qft.unmerge(model)
    assert torch.equal(logits(model), expected)
    with pytest.warns(qft.QftWarning, match="survived"):
        assert logits(model.merge_and_unload()).isfinite().all()


def test_an_unknown_init_is_still_refused(tmp_path):
    model = tuned(None)
    by_peft(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises((UnsupportedOperation, BadOption), match="rewrote"):
        qft.load(tmp_path, base=llama())


def with_second(init="pissa", **options):
    model = wrapped(init, **options)
    model.add_adapter("second", config())
    model.set_adapter("second")
    return model


@pytest.mark.parametrize(
    "merge",
    [
        qft.merge,
        qft.merge_to_float,
        lambda m: m.merge_and_unload(adapter_names=["second"]),
        lambda m: m.merge_adapter(["second"]),
    ],
    ids=["merge", "merge_to_float", "merge_and_unload", "merge_adapter"],
)
@pytest.mark.parametrize("init", INITS)
def test_a_residual_is_not_merged_without_its_adapter(init, merge):
    model = with_second(init)
    with refuses(UnsupportedOperation, "residual", model=model, outputs=False):
        merge(model)
    model.set_adapter("default")
    expected = logits(model)
    assert relative(logits(qft.merge_to_float(model)), expected) < 1e-5


def test_the_adapter_of_a_residual_keeps_its_scaling():
    model = wrapped()
    expected = logits(model)
    with pytest.raises(UnsupportedOperation, match="residual"), rescale_adapter_scale(model, 0.5):
        logits(model)
    assert torch.equal(logits(model), expected)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(2.0)
    for use in (logits, qft.merge, qft.merge_to_float):
        with pytest.raises(UnsupportedOperation, match="residual"):
            use(model)


def test_experts_are_not_used_as_residuals():
    target = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = qft.quantize_and_wrap(qwen3_moe(), "reference", adapter=target, init="pissa", progress=False).eval()
    expected = logits(model)
    model.add_adapter("second", copy.deepcopy(target))
    model.set_adapter("second")
    with pytest.raises(UnsupportedOperation, match="residual"):
        logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("as_module", [False, True])
def test_the_rewritten_base_itself_is_accepted_from_files(tmp_path, as_module):
    model = tuned("pissa", "nf4")
    expected = logits(model)
    qft.save(model, tmp_path / "both")
    by_peft(model, tmp_path / "adapter")
    base = tmp_path / "both" / "base"
    if as_module:
        base = AutoModelForCausalLM.from_pretrained(base).eval()
    again = qft.load(tmp_path / "adapter", base=base)
    assert torch.equal(logits(again), expected)
    with pytest.raises(UnsupportedOperation, match="residual"), again.disable_adapter():
        logits(again)
    by_peft(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "qft.json").read_text())["base_changed"]


def test_a_second_adapter_over_a_residual_is_not_loaded_alone(tmp_path):
    model = with_second()
    qft.save(model, tmp_path / "both")
    by_peft(model, tmp_path / "peft")
    for folder in (tmp_path / "both" / "second", tmp_path / "peft" / "second"):
        with refuses(AdapterMismatch, "next to adapter 'default'"):
            qft.load(folder, base=tmp_path / "both" / "base")
    model.set_adapter("default")
    again = qft.load(tmp_path / "both")
    again.set_adapter("default")
    assert torch.equal(logits(again), logits(model))


def test_pefts_conversion_of_a_rewritten_base_is_refused(tmp_path):
    model = wrapped()
    by_peft(model, tmp_path / "start")
    with refuses(UnsupportedOperation, "qft.transfer", model=model):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


def test_an_adapter_of_a_rewritten_base_is_not_added_to_another_model(tmp_path):
    by_peft(tuned(), tmp_path)
    other = tuned(None)
    with refuses(BadOption, "rewritten base", "qft.load", model=other):
        other.load_adapter(str(tmp_path), "second")
    assert list(other.peft_config) == ["default"]


def test_an_adapter_saved_while_it_is_merged_belongs_to_the_unmerged_base(tmp_path):
    model = tuned(None)
    expected = logits(model)
    qft.merge(model)
    by_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        again = qft.load(tmp_path, base=llama())
    assert torch.equal(logits(again), expected)

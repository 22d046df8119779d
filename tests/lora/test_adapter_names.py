"""Adapters by name: several of them, other names than "default", and adapters that were swapped in place."""

import json
import shutil

import pytest
import torch
from helpers import refuses
from models import llama, logits, relative
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import qft
from qft.errors import BadFolder, BadOption


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})


def random(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n or "hada_" in n:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def wrapped(name="default", seed=0, spec="reference", **options):
    model = qft.quantize(llama(), spec, progress=False)
    return random(get_peft_model(model, lora(**options), adapter_name=name), seed)


def pair(active="second", first="default"):
    model = wrapped(first)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    random(model, 1).set_adapter(active)
    return model


@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.parametrize("stored", [True, False])
def test_two_adapters_come_back_with_the_active_one(tmp_path, active, stored):
    model = pair(active)
    by_name = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        by_name[name] = logits(model)
    model.set_adapter(active)
    qft.save(model, tmp_path, base=stored)
    again = qft.load(tmp_path, base=None if stored else llama())
    assert list(again.peft_config) == ["default", "second"] and again.active_adapters == [active]
    assert not [p for p in again.parameters() if p.requires_grad]
    assert torch.equal(logits(again), by_name[active])
    for name, expected in by_name.items():
        again.set_adapter(name)
        assert torch.equal(logits(again), expected)
    for name, where in (("default", tmp_path), ("second", tmp_path / "second")):
        plain = PeftModel.from_pretrained(qft.quantize(llama(), "reference", progress=False), str(where)).eval()
        assert torch.equal(logits(plain), by_name[name])
        if name == "second":
            assert torch.equal(logits(qft.load(where, base=llama())), by_name[name])


def test_two_adapters_that_are_active_at_once(tmp_path):
    model = pair()
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    qft.save(model, tmp_path)
    again = qft.load(tmp_path, base=llama(), is_trainable=True)
    assert again.active_adapters == ["default", "second"]
    assert relative(logits(again.eval()), expected) < 1e-6
    assert len([p for p in again.parameters() if p.requires_grad]) == 16


@pytest.mark.parametrize("name", ["mine", "base", "my adapter"])
@pytest.mark.parametrize("stored", [True, False])
def test_the_only_adapter_may_have_any_name(tmp_path, name, stored):
    model = wrapped(name)
    expected = logits(model)
    qft.save(model, tmp_path, base=stored)
    assert (tmp_path / "adapter_config.json").is_file()
    again = qft.load(tmp_path, base=None if stored else llama())
    assert list(again.peft_config) == [name] and again.active_adapters == [name]
    assert torch.equal(logits(again), expected)
    plain = PeftModel.from_pretrained(qft.quantize(llama(), "reference", progress=False), str(tmp_path)).eval()
    assert torch.equal(logits(plain), expected)


def test_neither_is_called_default(tmp_path):
    model = pair(first="first")
    expected = logits(model)
    qft.save(model, tmp_path)
    assert (tmp_path / "first" / "adapter_config.json").is_file()
    again = qft.load(tmp_path, base=llama())
    assert set(again.peft_config) == {"first", "second"} and torch.equal(logits(again), expected)


def test_names_that_would_leave_the_folder_are_refused(tmp_path):
    for name, base in (("..", False), ("a/b", False), ("base", True)):
        model = pair()
        model.add_adapter("third", lora())
        for layer in [model.base_model]:
            layer.peft_config[name] = layer.peft_config["third"]
        with pytest.raises(BadOption, match="another name"):
            qft.save(model, tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()


def test_adapters_of_an_earlier_save_do_not_come_back(tmp_path):
    qft.save(pair(), tmp_path)
    model = wrapped(seed=3)
    qft.save(model, tmp_path)
    assert (tmp_path / "second").is_dir()
    again = qft.load(tmp_path, base=llama())
    assert list(again.peft_config) == ["default"] and torch.equal(logits(again), logits(model))


def test_a_missing_second_adapter_is_named(tmp_path):
    qft.save(pair(), tmp_path)
    shutil.rmtree(tmp_path / "second")
    base = llama()
    with refuses(BadFolder, "second"):
        qft.load(tmp_path, base=base)
    note = json.loads((tmp_path / "qft.json").read_text())
    (tmp_path / "qft.json").write_text(json.dumps(note | {"adapters": {"default": ".", "x": "../x"}}))
    with refuses(BadFolder, "qft.json"):
        qft.load(tmp_path, base=llama())


def test_a_folder_that_peft_wrote_names_what_is_inside(tmp_path):
    wrapped("mine").save_pretrained(tmp_path)
    with refuses(BadFolder, "there are adapters in", "mine"):
        qft.load(tmp_path, base=llama())
    assert qft.load(tmp_path / "mine", base=llama())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options", [{"r": 8, "lora_alpha": 32}, {"r": 2, "lora_alpha": 1}, {"r": 6, "use_rslora": True}], ids=str
)
def test_a_hot_swap_of_another_rank_is_saved_as_it_is(tmp_path, options, compiled):
    model = wrapped(use_rslora=options.get("use_rslora", False))  # PEFT swaps only between equal settings of it
    other = wrapped(seed=5, **options)
    other.save_pretrained(tmp_path / "other")
    if compiled:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    assert relative(logits(model), logits(other)) < 1e-6
    for save in (lambda f: qft.save(model, f), lambda f: model.save_pretrained(f)):
        save(tmp_path / "saved")
        again = qft.load(tmp_path / "saved", base=llama())
        assert relative(logits(again), logits(other)) < 1e-6
        plain = PeftModel.from_pretrained(qft.quantize(llama(), "reference", progress=False), str(tmp_path / "saved"))
        assert relative(logits(plain.eval()), logits(other)) < 1e-6
        shutil.rmtree(tmp_path / "saved")


def test_patterns_and_other_methods_keep_their_configs(tmp_path):
    model = wrapped(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    qft.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"q_proj": 2} and config["alpha_pattern"] == {"q_proj": 3} and config["r"] == 4
    assert torch.equal(logits(qft.load(tmp_path, base=llama())), logits(model))
    other = qft.quantize(llama(), "reference", progress=False)
    other = random(get_peft_model(other, LoHaConfig(r=2, target_modules=["q_proj"]), adapter_name="loha"))
    qft.save(other, tmp_path / "loha")
    again = qft.load(tmp_path / "loha", base=llama())
    assert list(again.peft_config) == ["loha"] and torch.equal(logits(again), logits(other))

"""Models of images, of whole texts and of sound: quantized, trained, merged and saved as language models are."""

import copy

import pytest
import torch
from models import OTHER_INPUTS, logits, relative, train_a_little, vit, whisper
from peft import LoraConfig
from torch import nn
from twins import both_errors, fill, loss_and_gradients, pair

import qft
from qft.core.registry import quantizer_of
from qft.lora.layer import QftLinear

pytestmark = pytest.mark.filterwarnings("ignore")
SPECS = ["nf4", "reference", "hqq:group_size=32", "int8"]
LEFT = {
    "vit": {"classifier": "a head on top of the base model"},
    "bert": {"classifier": "a head on top of the base model"},
    "whisper": {"proj_out": "its weight is shared with another module"},
}
LAYERS = {"vit": 12, "bert": 13, "whisper": 32}


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def made(builder, spec, **options):
    model = qft.quantize_and_wrap(OTHER_INPUTS[builder](), spec, adapter=lora(), progress=False, **options)
    return model


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", OTHER_INPUTS)
def test_heads_and_stems_are_left_alone(builder, spec):
    float_model = OTHER_INPUTS[builder]()
    model = qft.quantize(OTHER_INPUTS[builder](), spec, progress=False)
    audit = qft.audit(model)
    assert audit.left == LEFT[builder] and len(audit.weights) == LAYERS[builder]
    for name, module in float_model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.LayerNorm | nn.Embedding):
            assert all(torch.equal(p, model.get_submodule(name).get_parameter(n)) for n, p in module.named_parameters())
    wrapped = qft.wrap(model, lora())
    assert sum(isinstance(m, QftLinear) for m in wrapped.modules()) == LAYERS[builder]
    if builder == "whisper":
        assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpoints", "none"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", OTHER_INPUTS)
def test_gradients_with_and_without_checkpoints_are_those_of_plain_peft(builder, spec, checkpointing):
    ours, theirs = pair(OTHER_INPUTS[builder], spec, lora())
    qft.prepare_model_for_kbit_training(ours.get_base_model(), checkpointing)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora_" in name)
    evaluated, trained, gradients = both_errors(ours, theirs)
    assert evaluated < 1e-6 and trained < 1e-6 and gradients < 2e-5
    assert ours.get_base_model().is_gradient_checkpointing == checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("builder", OTHER_INPUTS)
def test_checkpoints_of_either_kind_reach_every_adapter(builder, use_reentrant):
    """Reentrant ones drop the gradient unless their input asks for one: pixels and sound must be made to."""
    model = fill(made(builder, "nf4", use_gradient_checkpointing=False))
    _, expected = loss_and_gradients(model)
    qft.prepare_model_for_kbit_training(model.get_base_model(), True, {"use_reentrant": use_reentrant})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    _, found = loss_and_gradients(model)
    assert found.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(relative(found[n], g) < 1e-5 for n, g in expected.items() if g.norm() > 1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", OTHER_INPUTS)
def test_a_tuned_model_merges_saves_and_loads(builder, spec, tmp_path):
    model = made(builder, spec)
    start = logits(model.eval()).detach()
    train_a_little(model)
    y = logits(model).detach()
    assert relative(y, start) > 1e-3
    plain = qft.merge_to_float(model)
    assert relative(logits(plain), y) < 2e-6
    plain.save_pretrained(tmp_path / "float")
    again = type(plain).from_pretrained(tmp_path / "float").eval()
    assert relative(logits(again), y) < 2e-6
    if builder == "whisper":
        assert again.proj_out.weight is again.model.decoder.embed_tokens.weight
    qft.save(model, tmp_path / "adapter")
    assert torch.equal(logits(qft.load(tmp_path / "adapter", base=OTHER_INPUTS[builder]())), y)
    qft.save(model, tmp_path / "all", base=True)
    assert torch.equal(logits(qft.load(tmp_path / "all")), y)
    before = copy.deepcopy({k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)})
    qft.merge(model)
    assert relative(logits(model), y) > 0
    qft.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", OTHER_INPUTS)
def test_a_quantized_folder_loads(builder, spec, tmp_path):
    model = qft.quantize(OTHER_INPUTS[builder](), spec, progress=False)
    y = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert sum(quantizer_of(m) is not None for m in again.modules()) == LAYERS[builder]
    assert relative(logits(again), y) < 1e-6
    assert logits(qft.wrap(again, lora())).shape == y.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("builder", OTHER_INPUTS)
def test_sixteen_bit_models_train(builder, dtype):
    model = qft.quantize_and_wrap(OTHER_INPUTS[builder](dtype), "nf4", adapter=lora(), progress=False)
    y, gradients = loss_and_gradients(model)
    assert y.dtype == dtype and y.isfinite().all()
    assert gradients and all(g.isfinite().all() for g in gradients.values())


def test_a_classifier_is_trained_whole_beside_its_adapters(tmp_path):
    model = qft.quantize_and_wrap(vit(), "nf4", adapter=lora(modules_to_save=["classifier"]), progress=False)
    train_a_little(model)
    y = logits(model)
    assert relative(logits(qft.merge_to_float(model)), y) < 2e-6
    qft.save(model, tmp_path)
    assert torch.equal(logits(qft.load(tmp_path, base=vit())), y)


def test_sound_is_transcribed_token_by_token():
    model = fill(made("whisper", "nf4")).eval()
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    base = model.get_base_model()
    tokens = base.generate(input_features=features, max_new_tokens=4, do_sample=False)
    plain = qft.merge_to_float(model)
    assert torch.equal(tokens, plain.generate(input_features=features, max_new_tokens=4, do_sample=False))
    assert isinstance(whisper().model.encoder.conv1, nn.Conv1d)

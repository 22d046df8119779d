"""`qft.train` over folders that are quantized already: adapters over what is stored, or one clear refusal."""

import pytest
import torch
from helpers import refuses
from models import llama
from models import t5 as gated_t5
from tiny_training import SIZE, chats, quick, tokenizer, write_jsonl
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import qft
from qft.core.registry import quantizer_of
from qft.saving.open import open_model

pytest.importorskip("trl", reason="pip install trl")

STORED = ["nf4", "int8", "gptq", "awq", "reference", "hqq", "torchao", "quanto", "fp8", "compressed-tensors"]
SMALL = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 200,
}


def save_quantized(folder, model, spec):
    options = {"calibration": [torch.randint(0, 100, (4, 16))]} if spec in ("gptq", "awq") else {}
    try:
        model = qft.quantize(model, spec, progress=False, **options)
    except (qft.MissingDependency, qft.UnsupportedDevice) as error:
        pytest.skip(str(error))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder of a small Llama by its quantizer, made once."""
    found = {}

    def folder(spec):
        if spec not in found:
            model = llama(vocab_size=SIZE, hidden_size=64, num_hidden_layers=1)
            found[spec] = save_quantized(tmp_path_factory.mktemp("stored"), model, spec)
        return found[spec]

    return folder


def chat_file(tmp_path):
    return write_jsonl(tmp_path / "c.jsonl", chats(4))


def class_file(tmp_path):
    rows = [{"text": "abc"[i % 3] * 4, "label": "xy"[i % 2]} for i in range(4)]
    return write_jsonl(tmp_path / "l.jsonl", rows)


def train(folder, path, tmp_path, name="out", **changes):
    return qft.train(model=folder, data_path=path, project_name=str(tmp_path / name), **quick(max_steps=1, **changes))


IDS = torch.tensor([[97, 98, 99]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def is_the_merged_model(result, tolerance=1e-5):
    """The saved adapter, loaded over its folder, computes what the merged float model does."""
    loaded = qft.load(result.adapter)
    merged = AutoModelForSequenceClassification.from_pretrained(result.merged)
    assert type(loaded.get_base_model()) is type(merged)
    assert loaded.config.id2label == merged.config.id2label == {0: "x", 1: "y"}
    assert torch.allclose(logits(loaded), logits(merged), atol=tolerance)
    return loaded


# ---- what is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", STORED)
def test_a_classifier_over_a_stored_language_model(stored, tmp_path, spec):
    folder = stored(spec)
    result = train(folder, class_file(tmp_path), tmp_path, quantization=spec, merge_adapter=True)
    assert result.task == "classification" and result.steps == 1
    loaded = is_the_merged_model(result)
    name = "model.layers.0.mlp.up_proj"
    layers = (
        open_model(folder, device="cpu").get_submodule(name),
        loaded.get_base_model().get_submodule(name).base_layer,
    )
    one, other = (quantizer_of(m).dequantize(quantizer_of(m).weights(m)[0]) for m in layers)
    assert torch.equal(one, other), "the adapter is over the stored weights"


@pytest.mark.parametrize("spec", ["nf4", "gptq", "reference"])
def test_without_a_quantizer_adapters_are_over_the_folder_as_it_is(stored, tmp_path, spec):
    path = chat_file(tmp_path)
    same = train(stored(spec), path, tmp_path, quantization=spec)
    none = train(stored(spec), path, tmp_path, "none", quantization=None)
    assert none.loss == same.loss
    qft.load(none.adapter)
    assert train(stored(spec), class_file(tmp_path), tmp_path, "class", quantization=None).steps == 1


def test_a_stored_classifier_keeps_its_kind(tmp_path):
    folder = save_quantized(tmp_path / "m", BertForSequenceClassification(BertConfig(**SMALL)), "reference")
    is_the_merged_model(
        train(folder, class_file(tmp_path), tmp_path, quantization="reference", merge_adapter=True), 1e-6
    )


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_classifiers_of_other_families(tmp_path, spec):
    """GPT-2's layers are transposed; RoBERTa's head has two layers, and counts positions from its padding."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=64, n_layer=1, n_head=2, n_positions=64, eos_token_id=0))
    for name, model in (("gpt2", gpt2), ("roberta", RobertaForMaskedLM(RobertaConfig(**SMALL)))):
        folder = save_quantized(tmp_path / name, model.eval(), spec)
        result = train(folder, class_file(tmp_path), tmp_path, f"out-{name}", quantization=spec, merge_adapter=True)
        is_the_merged_model(result)


def test_an_encoder_decoder_over_a_stored_folder(tmp_path):
    folder = save_quantized(tmp_path / "m", gated_t5(vocab_size=SIZE, num_layers=1), "reference")
    path = write_jsonl(tmp_path / "s.jsonl", [{"source": "ab", "target": "cd"}] * 4)
    assert train(folder, path, tmp_path, quantization=None).steps == 1


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nf4", "gptq", "reference"])
@pytest.mark.parametrize("file", [chat_file, class_file], ids=["chat", "classes"])
def test_all_weights_of_a_quantized_folder_cannot_be_trained(stored, tmp_path, spec, file):
    with refuses(qft.BadOption, "is quantized", "without peft", "float model", "peft=True"):
        train(stored(spec), file(tmp_path), tmp_path, peft=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["loftq", "pissa", "auto"])
def test_an_init_needs_the_floats(stored, tmp_path, init):
    with refuses(qft.NeedsOriginal, "is quantized already", "init="):
        train(stored("reference"), chat_file(tmp_path), tmp_path, quantization="reference", init=init)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [chat_file, class_file], ids=["chat", "classes"])
def test_another_quantizer_is_refused_and_the_folder_is_free_for_the_right_one(stored, tmp_path, file):
    with refuses(qft.AlreadyQuantized, "quantization='quanto'", "quantization=None"):
        train(stored("reference"), file(tmp_path), tmp_path, quantization="quanto")
    assert not (tmp_path / "out").exists()
    assert train(stored("reference"), file(tmp_path), tmp_path, quantization="reference").steps == 1


@pytest.mark.parametrize("spec", ["reference", None], ids=["quantized", "float"])
def test_a_classifier_of_other_classes_is_refused(tmp_path, spec):
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))
    if spec is None:
        model.save_pretrained(tmp_path / "m")
        tokenizer().save_pretrained(tmp_path / "m")
    else:
        save_quantized(tmp_path / "m", model, spec)
    with refuses(qft.BadOption, "3 classes", "the data has 2"):
        train(str(tmp_path / "m"), class_file(tmp_path), tmp_path, quantization="reference")
    assert not (tmp_path / "out").exists()


def test_a_body_that_lacks_what_the_classifier_reads_is_refused(tmp_path):
    """Random layers of a body would be neither trained nor saved."""
    folder = save_quantized(tmp_path / "m", BertForMaskedLM(BertConfig(**SMALL)), "reference")
    with refuses(qft.UnsupportedOperation, "'pooler'", "float model"):
        train(folder, class_file(tmp_path), tmp_path, quantization="reference")


def test_auto_wants_the_float_model(stored, tmp_path):
    with refuses(qft.UnsupportedOperation, "is quantized already", "qft train"):
        qft.auto(stored("reference"), chat_file(tmp_path), memory="2GB", out=tmp_path / "auto", device="cpu")
    assert not (tmp_path / "auto").exists()


# ---- adapters of classifiers -------------------------------------------------------------------------------


def test_a_classifiers_adapter_is_never_loaded_without_its_head(tmp_path):
    """Over the float folder of a language model, too, which is what most adapters name."""
    model = llama(vocab_size=SIZE, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    result = train(
        str(tmp_path / "float"), class_file(tmp_path), tmp_path, quantization="reference", merge_adapter=True
    )
    is_the_merged_model(result)
    for base in (model, qft.quantize(llama(vocab_size=SIZE, num_hidden_layers=1), "reference", progress=False)):
        with refuses(qft.AdapterMismatch, "head of a classifier", "LlamaForCausalLM", model=base):
            qft.load(result.adapter, base)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float")
    qft.load(result.adapter, qft.quantize(base, "reference", progress=False))


@pytest.mark.parametrize("head", [BertForPreTraining, BertForMaskedLM], ids=["with a pooler", "without"])
def test_a_classifiers_adapter_over_a_float_encoder(tmp_path, head):
    """A pooler that the folder does not hold is drawn at random: another one is not taken for it."""
    head(BertConfig(**SMALL)).save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    result = train(
        str(tmp_path / "float"), class_file(tmp_path), tmp_path, quantization="reference", merge_adapter=True
    )
    if head is BertForPreTraining:
        is_the_merged_model(result)
    else:
        with refuses(qft.AdapterMismatch, "pooler"):
            qft.load(result.adapter)

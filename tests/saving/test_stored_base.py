"""A base that is stored with its adapter, or that an adapter was saved into."""

import json

import pytest
import torch
from helpers import refuses
from models import bert, gpt2, llama, logits, plain, relative, t5
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qft
from qft.core.names import bare_state_dict
from qft.errors import BadFolder

EMBEDDINGS = r".*(embed_tokens|wte|shared|word_embeddings|embed|q_proj|c_attn|SelfAttention.q|query)"
WRAPPERS = {
    "token indices": {"target_modules": "all-linear", "trainable_token_indices": [1, 5]},
    "embeddings with LoRA": {"target_modules": EMBEDDINGS},
    "a norm trained completely": {
        "target_modules": "all-linear",
        "modules_to_save": ["norm", "ln_f", "final_layer_norm"],
    },
}
BUILDERS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2, "t5": t5}


def tuned(builder, spec, **options):
    names = {n.rpartition(".")[2] for n, _ in builder().named_modules()}
    if "modules_to_save" in options:
        options["modules_to_save"] = [n for n in options["modules_to_save"] if n in names]
    init = options.pop("init", None)
    config = LoraConfig(r=4, **options)
    model = qft.quantize_and_wrap(builder(), spec, adapter=config, init=init, progress=False).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_a_stored_base_has_all_its_tensors(tmp_path, spec, builder, wrapper):
    model = tuned(BUILDERS[builder], spec, **WRAPPERS[wrapper])
    expected = logits(model)
    qft.save(model, tmp_path, base=True)
    assert torch.equal(logits(qft.load(tmp_path)), expected)
    fresh = qft.quantize(BUILDERS[builder](), spec, progress=False)
    names = {k for path in (tmp_path / "base").glob("*.safetensors") for k in safe_open(path, "pt").keys()}
    assert names <= set(bare_state_dict(fresh, stored=True)) | {k for k in names if "quant_state" in k}


@pytest.mark.parametrize("spec", ["int8", "hqq:group_size=32", "torchao", "quanto", "fp8"])
def test_every_format_stores_its_embeddings(tmp_path, spec):
    model = tuned(BUILDERS["tied"], spec, **WRAPPERS["token indices"])
    expected = logits(model)
    qft.save(model, tmp_path, base=True)
    assert torch.equal(logits(qft.load(tmp_path)), expected)


@pytest.mark.parametrize("init", ["pissa", "olora", qft.LoftQ(steps=2)], ids=str)
@pytest.mark.parametrize("builder", ["llama", "tied"])
def test_an_init_that_rewrites_the_base_stores_all_of_it(tmp_path, builder, init):
    model = tuned(BUILDERS[builder], "reference", init=init, **WRAPPERS["token indices"])
    expected = logits(model)
    qft.save(model, tmp_path)
    assert torch.equal(logits(qft.load(tmp_path)), expected)
    assert torch.equal(logits(qft.load(tmp_path, base=BUILDERS[builder]())), expected)


def test_a_plain_module_is_stored_by_its_own_names(tmp_path):
    model = tuned(plain, "reference", target_modules=EMBEDDINGS + r"|blocks\.\d\.[02]", init=qft.LoftQ(steps=2))
    expected = logits(model)
    qft.save(model, tmp_path, base=True)
    assert torch.equal(logits(qft.load(tmp_path, base=plain())), expected)
    assert "embed.weight" in load_file(tmp_path / "base" / "model.safetensors")


@pytest.mark.parametrize("base", [None, llama], ids=["the stored one", "over a float model"])
@pytest.mark.parametrize("change", ["missing", "extra", "renamed"])
def test_a_stored_base_with_other_tensors_is_refused(tmp_path, base, change):
    model = tuned(llama, "reference", target_modules="all-linear", init=qft.LoftQ(steps=2))
    qft.save(model, tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    if change != "extra":
        lost = state.pop("model.embed_tokens.weight")
    if change != "missing":
        state["model.embed_tokens.token_adapter.weight"] = lost if change == "renamed" else torch.zeros(2)
    save_file(state, path, metadata)
    says = "token_adapter" if change == "extra" else "model.embed_tokens.weight"
    with refuses(BadFolder, says):
        qft.load(tmp_path, base=None if base is None else base())


def with_adapter(folder, builder=llama):
    model = builder()
    model.save_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "c_attn"], init_lora_weights=False)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_an_adapter_in_the_folder_of_its_base_is_left_alone(tmp_path, spec):
    folder = with_adapter(tmp_path / "model")
    expected = qft.quantize(llama(), spec, progress=False)
    model = qft.quantize(folder, spec, progress=False)
    assert not hasattr(model, "peft_config") and torch.equal(logits(model), logits(expected))
    wrapped = qft.quantize_and_wrap(folder, spec, progress=False)
    assert list(wrapped.peft_config) == ["default"] and torch.equal(logits(wrapped), logits(expected))
    loaded = qft.load(folder, base=expected)
    assert relative(logits(loaded), logits(model)) > 1e-3
    qft.save(wrapped, tmp_path / "tuned", base=True)
    with_base = qft.load(tmp_path / "tuned")
    assert torch.equal(logits(with_base), logits(wrapped))


def test_a_quantized_folder_with_an_adapter(tmp_path):
    model = qft.quantize_and_wrap(llama(), "reference", progress=False)
    model.get_base_model()
    qft.save(model, tmp_path, base=True)
    stored = tmp_path / "base"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (stored / name).write_bytes((tmp_path / name).read_bytes())
    assert torch.equal(logits(qft.load(tmp_path)), logits(model))


def test_a_folder_with_an_adapter_alone_is_no_model(tmp_path):
    model = llama()
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    for call in (qft.quantize, qft.quantize_and_wrap):
        with refuses(BadFolder, "holds an adapter", "base model"):
            call(tmp_path, "nf4", progress=False)


def test_an_encoder_with_token_indices(tmp_path):
    model = tuned(
        bert, "reference", target_modules=["query", "value"], trainable_token_indices={"word_embeddings": [1, 2]}
    )
    expected = logits(model)
    qft.save(model, tmp_path, base=True)
    assert torch.equal(logits(qft.load(tmp_path)), expected)


def test_what_is_stored_is_read_by_transformers(tmp_path):
    model = tuned(BUILDERS["tied"], "nf4", **WRAPPERS["token indices"])
    qft.save(model, tmp_path, base=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with model.disable_adapter():
        assert relative(logits(base), logits(model)) < 1e-5
    assert json.loads((tmp_path / "qft.json").read_text())["base_stored"] is True


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    return Llama4ForCausalLM(config)


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_stacked_experts_are_loaded_as_they_are_stored(spec, tmp_path):
    """transformers takes the experts of Llama 4 apart for bitsandbytes, whatever a folder holds."""
    from transformers.quantizers import base

    before = dict(base.MODULES_TO_PATCH_FOR_QUANTIZATION)
    model = qft.quantize_and_wrap(llama4(), spec, progress=False).eval()
    qft.save(model, tmp_path, base=True)
    again = qft.load(tmp_path).eval()
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert base.MODULES_TO_PATCH_FOR_QUANTIZATION == before != {}


def laguna():
    from transformers import LagunaConfig, LagunaForCausalLM

    config = LagunaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        num_attention_heads_per_layer=[4, 4],
        mlp_layer_types=["dense", "sparse"],
    )
    torch.manual_seed(0)
    return LagunaForCausalLM(config)


@pytest.mark.parametrize("base", [False, True])
def test_adapter_names_that_a_renaming_of_transformers_matches_again(base, tmp_path):
    model = qft.quantize_and_wrap(laguna(), "nf4", progress=False).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    qft.save(model, tmp_path, base=base)
    again = (qft.load(tmp_path) if base else qft.load(tmp_path, base=laguna())).eval()
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    moved = qft.transfer(model, "nf4", original=laguna())
    moved = moved[0] if isinstance(moved, tuple) else moved
    assert "shared_experts" in " ".join(n for n, p in moved.named_parameters() if p.requires_grad)

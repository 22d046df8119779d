"""Heads, routers and odd linear layers are found by the structure of the model, whatever they are called."""

import pytest
import torch
import transformers
from helpers import refuses
from models import batch, llama, relative
from peft import LoraConfig
from torch import nn
from transformers import (
    ASTConfig,
    BertConfig,
    CLIPConfig,
    EncoderDecoderConfig,
    FalconConfig,
    JetMoeConfig,
    NllbMoeConfig,
    Qwen2MoeConfig,
    SiglipConfig,
    SwitchTransformersConfig,
    WhisperConfig,
    ZayaConfig,
)

import qft
from qft.core.registry import quantizer_of
from qft.core.selection import default_skips
from qft.core.structure import heads, routers, selectors
from qft.core.unquantized import computes_linear, is_float_linear

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8}  # fmt: skip
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSIFIERS = {
    "SiglipForImageClassification": lambda: SiglipConfig(vision_config=VISION, text_config=TEXT, num_labels=5),
    "CLIPForImageClassification": lambda: CLIPConfig(vision_config=VISION, text_config=TEXT, num_labels=5),
    "WhisperForAudioClassification": lambda: WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=16,
        max_source_positions=20, num_labels=5, classifier_proj_size=16,
    ),
    "ASTForAudioClassification": lambda: ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=5
    ),
    "BertForTokenClassification": lambda: BertConfig(**TEXT, num_labels=5),
    "BertForQuestionAnswering": lambda: BertConfig(**TEXT),
}  # fmt: skip
MIXTURES = {
    "SwitchTransformersForConditionalGeneration": lambda: SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    ),
    "NllbMoeForConditionalGeneration": lambda: NllbMoeConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=3, encoder_sparse_step=2, decoder_sparse_step=2,
    ),
    "JetMoeForCausalLM": lambda: JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16, intermediate_size=64,
        num_local_experts=3, num_experts_per_tok=2,
    ),
    "Qwen2MoeForCausalLM": lambda: Qwen2MoeConfig(
        **TEXT, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
}  # fmt: skip


def build(name, config):
    torch.manual_seed(0)
    return getattr(transformers, name)(config()).eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads_of_classifiers_are_left_alone(name):
    model = build(name, CLASSIFIERS[name])
    found = heads(model)
    outputs = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[0] in
               ("classifier", "projector", "score", "qa_outputs")]  # fmt: skip
    assert outputs and set(outputs) <= set(found)
    assert not any("layer" in n for n in found)
    quantized = qft.quantize(model, "reference", progress=False)
    assert all(quantizer_of(quantized.get_submodule(n)) is None for n in outputs)
    wrapped = qft.wrap(
        quantized, LoraConfig(r=2, target_modules="all-linear", modules_to_save=[outputs[0].split(".")[0]])
    )
    adapted = [n for n, _ in wrapped.get_base_model().named_modules() if n.endswith("lora_A")]
    assert adapted and not any(n.startswith(tuple(outputs)) for n in adapted)


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_left_alone(name):
    model = build(name, MIXTURES[name])
    found = routers(model)
    assert found and all("router" in n or "gate" in n for n in found)
    assert not any("gate_proj" in n for n in found)
    quantized = qft.quantize(model, "reference", progress=False)
    assert all(quantizer_of(quantized.get_submodule(n)) is None for n in found)
    wrapped = qft.wrap(quantized, LoraConfig(r=2, target_modules="all-linear"))
    assert not any(
        n.startswith(tuple(found)) for n, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")
    )


def test_a_router_of_any_name():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.choose = nn.Linear(32, 3, bias=False)
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
            self.up = nn.Linear(32, 64)

        def forward(self, x):
            weights = self.choose(x).softmax(-1)
            return sum(w[..., None] * e(x) for w, e in zip(weights.unbind(-1), self.experts))

    model = nn.Sequential(Mixture(), Mixture())
    assert routers(model) == {"0.choose", "1.choose"}
    assert set(default_skips(model)) == {"0.choose", "1.choose"}


def test_a_base_model_has_no_head():
    assert not heads(llama().model)
    assert set(heads(llama())) == {"lm_head"}


@pytest.mark.parametrize("spec", ["nf4", "int8", "hqq:group_size=32", "reference"])
def test_falcon_is_quantized(tmp_path, spec):
    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True)
    model = build("FalconForCausalLM", lambda: config)
    expected = model(batch(0, (2, 8)) % 64).logits
    expected = expected.detach()
    names = [n for n, m in model.named_modules() if type(m).__name__ == "FalconLinear"]
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        quantized = qft.quantize(given, spec, progress=False)
        assert len(names) == 8 and all(quantizer_of(quantized.get_submodule(n)) for n in names)
        with torch.no_grad():
            assert relative(quantized(batch(0, (2, 8)) % 64).logits, expected) < 0.3
    wrapped = qft.wrap(quantized, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    ids = batch(0, (2, 8)) % 64
    wrapped.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    wrapped.eval()
    plain = qft.merge_to_float(wrapped)
    assert relative(plain(ids).logits, wrapped(ids).logits) < 1e-5


def test_subclasses_that_compute_something_else_are_not_linear():
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert computes_linear(nn.Linear) and computes_linear(FalconLinear)
    assert not any(computes_linear(c) for c in (Llama4Router, PhimoeTopKRouter, Doubled))
    assert is_float_linear(FalconLinear(4, 4)) and not is_float_linear(Doubled(4, 4))


def test_a_head_that_the_caller_names_may_still_be_adapted():
    model = qft.quantize_and_wrap(llama(), "nf4", adapter=LoraConfig(r=4, target_modules=["lm_head"]), progress=False)
    assert hasattr(model.get_base_model().lm_head, "lora_A")
    with refuses(qft.BadOption, model=llama()):
        qft.quantize(llama(), {"lm_head2": "nf4", "*": "nf4"}, progress=False)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)


class Scorer(nn.Module):
    """A router of two layers; with one output more than there are experts, for tokens that skip them."""

    def __init__(self, outputs):
        super().__init__()
        self.hidden, self.out = nn.Linear(32, 16), nn.Linear(16, outputs)

    def forward(self, x):
        return self.out(self.hidden(x)).topk(2, dim=-1)


class Attention(nn.Module):
    """Its keys have as many features as there are experts."""

    def __init__(self):
        super().__init__()
        self.k_proj, self.o_proj = nn.Linear(32, 4), nn.Linear(4, 32)


class Block(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.attention, self.scorer = Attention(), Scorer(outputs)
        self.experts = nn.ModuleList(Expert() for _ in range(4))


@pytest.mark.parametrize("outputs", [4, 5])
def test_a_router_of_several_layers_and_its_neighbours(outputs):
    assert routers(nn.Sequential(Block(outputs))) == {"0.scorer.hidden", "0.scorer.out"}
    assert not routers(nn.Sequential(Block(7)))


def test_all_layers_of_zayas_routers_are_left_alone():
    with torch.device("meta"):
        config = ZayaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_experts=4, num_attention_heads=4)
        model = transformers.ZayaForCausalLM(config)
    found = {n.split(".mlp.gate.")[1] for n in routers(model)}
    assert found == {"down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj"}


def test_heads_of_a_language_model_inside():
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TEXT), BertConfig(**TEXT))
    with torch.device("meta"):
        model = transformers.EncoderDecoderModel(config)
    assert set(heads(model)) == {"decoder.cls.predictions.transform.dense", "decoder.cls.predictions.decoder"}


class Indexer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        return scores.topk(2, dim=-1).indices.to(torch.int32)


class Gathers(Indexer):
    def forward(self, x):
        indices = self.query(x).topk(2, dim=-1).indices
        return self.key(x).gather(-1, indices)


class Sparse(nn.Module):
    def __init__(self, indexer):
        super().__init__()
        self.indexer, self.value = indexer, nn.Linear(32, 32)


def test_layers_that_only_select_tokens_get_no_adapter():
    assert selectors(Sparse(Indexer())) == {"indexer.query", "indexer.key"}
    assert not selectors(Sparse(Gathers()))
    model = qft.quantize(Sparse(Indexer()), "reference", progress=False)
    assert "only selects tokens" in model._qft.left["indexer.key"]
    wrapped = qft.wrap(model, LoraConfig(r=4, target_modules="all-linear"))
    assert [n for n, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")] == ["value"]


def falcon():
    return build(
        "FalconForCausalLM",
        lambda: FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True),
    )


@pytest.mark.parametrize("spec", ["nf4", "fp4", "int8", "hqq:group_size=32", "reference"])
def test_falcon_is_stored_and_trained_over_one_target(tmp_path, spec):
    ids = batch(0, (2, 8)) % 64
    adapter = LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    wrapped = qft.quantize_and_wrap(falcon(), spec, adapter=adapter, progress=False)
    wrapped.train()(ids, labels=ids).loss.backward()  # Falcon changes outputs of layers without an adapter in place
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    wrapped.eval()
    with torch.no_grad():
        expected = wrapped(ids).logits
        qft.save(wrapped, tmp_path / "adapter", base=True)
        assert relative(qft.load(tmp_path / "adapter").eval()(ids).logits, expected) < 1e-5
        quantized = qft.quantize(falcon(), spec, progress=False)
        quantized.save_pretrained(tmp_path / "model")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        bound = 0.03 if spec == "int8" else 1e-5  # the int8 kernels of bitsandbytes round the inputs, too
        assert relative(loaded(ids).logits, quantized(ids).logits) < bound

"""Which weights are quantized, in every kind of model, and that what comes out still computes the same function."""

import pytest
import torch
from models import ALL_BUILDERS, BUILDERS, batch, llama, logits, plain, qwen3_moe, relative, t5
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import qft

SPEC = "reference"


def quantized(model, spec=SPEC, **kwargs):
    return qft.audit(qft.quantize(model, spec, progress=False, **kwargs))


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config).eval()


def test_llama_keeps_its_head():
    audit = quantized(llama())
    assert len(audit.weights) == 14
    assert audit.left == {"lm_head": "the output head"}


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_a_tied_head_stays_tied(architecture):
    model = BUILDERS[architecture]()
    audit = quantized(model)
    assert "lm_head" in audit.left
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_gpt2_quantizes_its_conv1d_layers():
    audit = quantized(BUILDERS["gpt2"]())
    assert sorted({n.rpartition(".")[2] for n in audit.weights}) == ["c_attn", "c_fc", "c_proj"]
    assert audit.weights["transformer.h.0.attn.c_attn"].shape == (192, 64)


def test_t5_keeps_wo_in_float():
    """T5 casts activations to the dtype of wo.weight: packed, that would be silently wrong."""
    audit = quantized(t5())
    assert not any(n.endswith("wo") for n in audit.weights)
    assert {n for n in audit.left if n.endswith("wo")} == {
        f"{side}.block.{i}.layer.{2 if side == 'decoder' else 1}.DenseReluDense.wo"
        for side in ("encoder", "decoder")
        for i in (0, 1)
    }


@pytest.mark.parametrize(("build", "head"), [(bert, "classifier"), (vit, "classifier")])
def test_classification_heads_stay(build, head):
    audit = quantized(build())
    assert head in audit.left
    assert audit.weights and not any(head in n for n in audit.weights)


def test_a_score_head_stays():
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64, num_labels=2, pad_token_id=0)
    assert "score" in quantized(GPT2ForSequenceClassification(config)).left


def test_fused_experts_that_are_skipped_are_named_loudly():
    model = qwen3_moe()
    audit = quantized(model, skip=["experts"])
    assert set(audit.experts) == {
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    assert sum(audit.experts.values()) == sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n
    )
    assert "ATTENTION" in audit.summary() and "16 bit" in audit.summary()
    assert not any("gate" in n.rpartition(".")[2] for n in audit.weights)


def test_a_linear_router_stays():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(64, 4)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

    audit = quantized(Model())
    assert audit.left == {"block.gate": "a router"}
    assert len(audit.weights) == 4


def test_pytorchs_own_attention_is_left_alone():
    """nn.MultiheadAttention and the fused encoder layer read weights directly."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
            self.out = nn.Linear(64, 64)

        def forward(self, x):
            return self.out(self.encoder(x))

    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(2, 5, 64)
    before = model(x)
    audit = quantized(model)
    assert set(audit.weights) == {"out"}
    assert set(audit.left) == {"encoder.linear1", "encoder.linear2", "encoder.self_attn.out_proj"}
    assert relative(model(x), before) < 0.15


FIRST_LAYER = {
    f"model.layers.0.{n}_proj"
    for n in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["down_proj"], {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}),
        (["layers.0"], FIRST_LAYER),
        (["model.layers.0"], FIRST_LAYER),
        (r".*\.layers\.1\.self_attn\..*", {f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"}),
        (r".*q_proj", {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
    ],
)
def test_skip_takes_names_and_patterns(skip, left):
    """As target_modules matches: a list of names or last parts of names, or one pattern for the whole name."""
    audit = quantized(llama(), skip=skip)
    assert set(audit.left) == left | {"lm_head"}
    assert not left & set(audit.weights)


@pytest.mark.parametrize("skip", [["no_such_layer"], r"no\.such\..*", "(", [3]])
def test_a_skip_that_matches_nothing_is_refused(skip):
    model = llama()
    before = logits(model)
    with pytest.raises(qft.BadOption, match="skip"):
        qft.quantize(model, SPEC, skip=skip, progress=False)
    assert torch.equal(logits(model), before)


def test_patterns_choose_quantizers_first_match_wins():
    model = llama()
    qft.quantize(
        model,
        {"*.layers.0.*": None, "*.mlp.*": "reference:format=int,bits=3,group_size=32", "*": "reference"},
        progress=False,
    )
    audit = qft.audit(model)
    assert all(".layers.0." not in n for n in audit.weights)
    assert all(("bits=3" in w.quantizer) == (".mlp." in n) for n, w in audit.weights.items())


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference:format=int,bits=8,group_size=32"])
@pytest.mark.parametrize("architecture", ALL_BUILDERS)
def test_a_quantized_model_computes_nearly_the_same(architecture, spec):
    model = ALL_BUILDERS[architecture]()
    before = logits(model)
    qft.quantize(model, spec, progress=False)
    assert relative(logits(model), before) < (0.3 if spec == "nf4" else 0.03)


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference:format=int,bits=8,group_size=32"])
def test_a_mixture_of_experts_computes_nearly_the_same(spec):
    """Most tokens still take the experts that they took."""
    model = qwen3_moe()
    before = logits(model)
    qft.quantize(model, spec, progress=False)
    assert relative(logits(model), before) < (0.3 if spec == "nf4" else 0.06)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ALL_BUILDERS)
def test_in_16_bit_it_computes_nearly_the_same(architecture, dtype):
    """Of T5 above all: what it casts its activations to is the dtype of a weight."""
    float_model = ALL_BUILDERS[architecture]()
    model = qft.quantize(ALL_BUILDERS[architecture](dtype), "reference:format=int,bits=8,group_size=32", progress=False)
    out = logits(model)
    assert out.dtype == dtype
    assert relative(out, logits(float_model)) < 0.03


def test_a_bare_multihead_attention_is_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.mlp = nn.Linear(64, 64)

        def forward(self, x):
            return self.mlp(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 5, 64)
    before, projection = model(x), model.attention.out_proj.weight.clone()
    audit = quantized(model, "nf4")
    assert set(audit.weights) == {"mlp"}
    assert torch.equal(model.attention.out_proj.weight, projection)
    assert relative(model(x), before) < 0.15


@pytest.mark.parametrize("build", [bert, vit])
def test_other_kinds_compute_nearly_the_same(build):
    model = build()
    torch.manual_seed(1)
    inputs = {"input_ids": batch()} if build is bert else {"pixel_values": torch.randn(2, 3, 32, 32)}
    before = model(**inputs).logits
    qft.quantize(model, "reference:format=int,bits=8,group_size=32", progress=False)
    assert relative(model(**inputs).logits, before) < 0.03


def test_a_plain_module_needs_no_transformers():
    audit = quantized(plain())
    assert set(audit.weights) == {"blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "out"}


def test_the_summary_says_what_happened():
    model = llama()
    text = quantized(model).summary()
    assert "14 layers in Reference(format='nf4'" in text
    assert "4.50 bits a weight" in text
    assert "left as it is: lm_head (the output head)" in text
    assert "merges: to float, into the quantized weights" in text


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(qft.BadOption, match=r"matches '\*\.ffn\.\*'"):
        qft.quantize(llama(), {"*.ffn.*": "reference", "*": "reference"}, progress=False)


def test_calibration_that_nothing_reads_is_not_passed_over_in_silence():
    with pytest.warns(qft.QftWarning, match="calibration= is not used"):
        model = qft.quantize(llama(), "reference", calibration=["some text"], progress=False)
    with pytest.warns(qft.QftWarning, match="calibration= is not used"):
        qft.wrap(model, calibration=["some text"])

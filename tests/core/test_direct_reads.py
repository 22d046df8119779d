"""Layers whose weight the model's own code reads stay float and get no adapter."""

import copy

import pytest
import torch
from helpers import refuses
from models import batch, llama, relative
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMForSequenceClassification,
)
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

import qft
from qft.core.direct_reads import direct_reads
from qft.core.registry import quantizer_of
from qft.errors import BadOption


def wavlm():
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16), conv_stride=(4, 4),
        conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        classifier_proj_size=16, layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip
    return WavLMForSequenceClassification(config).eval()


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2)).eval()


def bloom(**options):
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4, **options)).eval()


def run(model):
    x = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x if model.config.model_type == "wavlm" else batch(0, (2, 8))).logits


BUILDERS = {"wavlm": wavlm, "mamba": mamba, "exact bloom": lambda: bloom(pretraining_tp=2, slow_but_exact=True)}
READ = {"wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"}, "mamba": {"x_proj", "dt_proj", "out_proj"},
        "exact bloom": {"dense", "dense_4h_to_h"}}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_what_is_read_stays_float_and_the_rest_trains(tmp_path, name, spec):
    model = BUILDERS[name]()
    found = direct_reads(model)
    assert {n.rpartition(".")[2] for n in found} == READ[name]
    expected = run(model)
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        quantized = qft.quantize(given, spec, progress=False)
        left = quantized._qft.left
        assert all(quantizer_of(quantized.get_submodule(n)) is None and "read directly" in left[n] for n in found)
        assert relative(run(quantized), expected) < 0.5
    wrapped = qft.wrap(quantized, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    assert not any(hasattr(m, "lora_A") and n in found for n, m in wrapped.get_base_model().named_modules())
    with torch.no_grad():
        assert relative(run(qft.merge_to_float(wrapped)), run(wrapped)) < 1e-5
    x = torch.randn(2, 800) if name == "wavlm" else batch(0, (2, 8))
    wrapped.train()(x).logits.float().pow(2).sum().backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["wavlm", "mamba"])
def test_a_layer_that_is_never_called_is_refused_by_name(name):
    model = BUILDERS[name]()
    target = "q_proj" if name == "wavlm" else "dt_proj"
    config = LoraConfig(r=2, target_modules=[target, "intermediate_dense" if name == "wavlm" else "in_proj"])
    with refuses(BadOption, target, "read directly", "never be called", model=model, outputs=False):
        qft.quantize_and_wrap(model, "nf4", adapter=config, progress=False)
    quantized = qft.quantize(model, "nf4", progress=False)
    with refuses(BadOption, target, "never be called", model=quantized, outputs=False):
        qft.wrap(quantized, config)


def test_a_path_that_the_config_switches_off_does_not_count():
    assert not direct_reads(bloom()) and not direct_reads(bloom(pretraining_tp=2)) and not direct_reads(llama())
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    assert not direct_reads(t5)  # it asks `wo.weight` for its dtype alone


class Reader(nn.Module):
    def __init__(self, on=True):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8))
        self.on = on

    def forward(self, x):
        if not self.on:
            return self.second(self.first(x)).to(self.first.weight.dtype)
        y = nn.functional.linear(x, self.first.weight, self.first.bias)
        return self.second(y) if isinstance(self.second.weight, nn.Parameter) else y


def test_a_module_of_ones_own():
    assert set(direct_reads(nn.Sequential(Reader()))) == {"0.first"}
    assert not direct_reads(nn.Sequential(Reader(on=False)))
    model = qft.quantize(nn.Sequential(Reader(), nn.Linear(8, 8)), "reference", progress=False)
    assert "read directly by Reader.forward" in model._qft.left["0.first"]
    assert quantizer_of(model.get_submodule("0.second")) is not None


def test_pytorchs_fused_kernels():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = qft.quantize(nn.Sequential(layer, nn.Linear(16, 16)), "reference", progress=False)
    assert {n for n, r in model._qft.left.items() if "read directly" in r} >= {"0.linear1", "0.linear2"}
    wrapped = qft.wrap(model, LoraConfig(r=2, target_modules="all-linear"))
    assert [n for n, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")] == ["1"]


def rwkv(every=1):
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=96, hidden_size=64, attention_hidden_size=64, intermediate_size=128, num_hidden_layers=3, rescale_every=every
    )  # fmt: skip
    return RwkvForCausalLM(config).eval()


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_weights_that_a_model_rescales_in_evaluation(tmp_path, spec):
    assert {n.rpartition(".")[2] for n in direct_reads(rwkv())} == {"output", "value"} and not direct_reads(rwkv(0))
    ids = batch(0, (2, 8))
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = qft.quantize_and_wrap(rwkv(), spec, adapter=adapter, progress=False)
    with torch.no_grad():
        trained = wrapped.train()(ids, use_cache=False).logits
        evaluated = wrapped.eval()(ids, use_cache=False).logits
        assert relative(evaluated, trained) < 2e-3  # the float model's own difference is 8e-4
        assert relative(qft.merge_to_float(wrapped)(ids, use_cache=False).logits, evaluated) < 1e-5
        qft.save(wrapped, tmp_path, base=True)  # with weights that are rescaled at this moment
        assert relative(wrapped(ids, use_cache=False).logits, evaluated) < 1e-6
        assert relative(qft.load(tmp_path).eval()(ids, use_cache=False).logits, evaluated) < 1e-5


class Inherits(WavLMAttention):
    pass


class Aliases(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("local", "passed", "named", "transposed", "called", "one", "two"):
            setattr(self, name, nn.Linear(8, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.pairs = nn.ModuleDict({"a": nn.Linear(8, 8)})

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = nn.functional.linear(x, layer.weight) * i
        for _, layer in self.pairs.items():
            x = x @ layer.weight
        for called in (self.one, self.two):
            x = called(x)
        local, x = self.local, self.apply_to(x, self.passed)
        x = x @ local.weight @ getattr(self, "named").weight  # noqa: B009
        return self.called(x) @ self.transposed.weight.t().to(self.called.weight.dtype)

    def apply_to(self, x, layer):
        return x @ layer.weight


def test_reads_through_other_names_and_inherited_methods():
    assert set(direct_reads(nn.Sequential(Inherits(embed_dim=32, num_heads=2)))) == {
        f"0.{n}_proj" for n in ("q", "k", "v", "out")
    }
    found = set(direct_reads(Aliases()))
    assert found == {"layers.0", "layers.1", "pairs.a", "local", "passed", "named", "transposed"}


def test_a_layer_kept_in_float32_that_is_read_gets_no_adapter():
    class Keeps(Reader):
        _keep_in_fp32_modules = ("first",)

    model = qft.quantize(nn.Sequential(Keeps()), "reference", progress=False)
    assert "read directly" in model._qft.left["0.first"]
    wrapped = qft.wrap(model, LoraConfig(r=2, target_modules="all-linear"))
    assert [n for n, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")] == ["0.second", "0.inner.0"]


NAMED = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "intermediate_dense"]),
    "oft": OFTConfig(oft_block_size=8, target_modules=["q_proj", "intermediate_dense"]),
    "ia3": IA3Config(target_modules=["q_proj", "intermediate_dense"], feedforward_modules=[]),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("verb", [qft.wrap, get_peft_model])
def test_other_methods_and_plain_peft_are_refused_by_name_too(kind, verb):
    config = copy.deepcopy(NAMED[kind])
    model = wavlm()
    with refuses(BadOption, "q_proj", "never be called", model=model, outputs=False):
        qft.quantize_and_wrap(model, "nf4", adapter=config, progress=False)
    quantized = qft.quantize(model, "nf4", progress=False)
    with refuses(BadOption, "q_proj", "never be called", model=quantized, outputs=False):
        verb(quantized, config)


class Fusing(nn.Module):
    """Like diffusers' attention: one method reads weights, and no forward pass calls it; another is called by the parent."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.mixed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def fuse(self):
        return torch.cat([self.query.weight, self.key.weight])

    def mix(self, x):
        return x @ self.mixed.weight

    def forward(self, x):
        return self.key(self.query(x))


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Fusing()

    def forward(self, x):
        return self.inner.mix(self.inner(x))


def test_methods_that_a_forward_pass_does_not_call_do_not_count():
    assert set(direct_reads(Parent())) == {"inner.mixed"}

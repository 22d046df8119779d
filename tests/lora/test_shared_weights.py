"""Tensors that several modules share: a merge into one end leaves the others alone, and unmerging ties them again."""

import copy
import pickle

import pytest
import torch
from helpers import refuses
from models import batch, gpt2, llama, logits, qwen2, qwen3_moe, relative, t5
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration
from twins import fill

import qft
from qft.errors import BadOption, UnsupportedOperation

LAYERS = ["q_proj", "down_proj", "c_attn", "SelfAttention.q"]
TIED = {"llama": lambda: llama(tie_word_embeddings=True), "qwen2": qwen2, "gpt2": gpt2}
CONFIGS = {
    "head": {"target_modules": [*LAYERS, "lm_head"]},
    "embedding": {"target_modules": [*LAYERS, "embed_tokens", "wte"]},
    "both ends": {"target_modules": [*LAYERS, "lm_head", "embed_tokens", "wte"]},
    "embedding, tied": {"target_modules": [*LAYERS, "embed_tokens", "wte"], "ensure_weight_tying": True},
    "trained completely": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens", "wte"]},
    "trained completely, tied": {
        "target_modules": LAYERS, "modules_to_save": ["embed_tokens", "wte"], "ensure_weight_tying": True,
    },
    "token indices": {"target_modules": LAYERS, "trainable_token_indices": [3, 7]},
    "DoRA on the head": {"target_modules": [*LAYERS, "lm_head"], "use_dora": True},
}  # fmt: skip


def fitting(options, model):
    names = [n for n, _ in model.named_modules()]
    options = dict(options)
    for key in ("target_modules", "modules_to_save"):
        if key in options:
            options[key] = [t for t in options[key] if any(n == t or n.endswith(f".{t}") for n in names)]
    return options


def tuned(builder, spec="reference:format=int,bits=8", **options):
    model = qft.quantize(builder(), spec, progress=False)
    model = qft.wrap(model, LoraConfig(r=4, **fitting(options, model)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def ends(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = []
    for module in (base.get_output_embeddings(), base.get_input_embeddings()):
        while hasattr(module, "base_layer") or hasattr(module, "token_adapter") or hasattr(module, "original_module"):
            module = (
                getattr(module, "base_layer", None) or getattr(module, "original_module", None) or module.token_adapter
            )
        inner.append(module.weight)
    return inner


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("builder", TIED)
def test_a_merge_of_tied_weights_is_what_was_tuned(tmp_path, builder, config):
    model = tuned(TIED[builder], **CONFIGS[config])
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    tied = ends(model)
    assert tied[0] is tied[1]
    float_before = qft.merge_to_float(model)
    assert relative(logits(float_before), before) < 1e-5
    for merge, unmerge in (
        (lambda: qft.merge(model), lambda: qft.unmerge(model)),
        (lambda: model.base_model.merge_adapter(), lambda: model.base_model.unmerge_adapter()),
        (lambda: qft.merge(model, data=[batch(0, (1, 8))]), lambda: qft.unmerge(model)),
    ):
        merge()
        merged = logits(model)
        assert relative(merged, before) < 0.02
        assert relative(logits(qft.merge_to_float(model)), merged) < 1e-5
        unmerge()
        assert torch.equal(logits(model), before)
        now = ends(model)
        assert now[0] is tied[0] and now[1] is tied[1]
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    qft.merge(model)
    qft.export(model, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(again), logits(model)) < 1e-5
    float_before.save_pretrained(tmp_path / "float")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()), before) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.filterwarnings("ignore::qft.QftWarning")
def test_merge_and_unload_of_tied_weights(tmp_path, config):
    model = tuned(TIED["llama"], **CONFIGS[config])
    before = logits(model)
    plain = model.merge_and_unload()
    assert relative(logits(plain), before) < 0.02
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(logits(again), logits(plain)) < 1e-5


@pytest.mark.parametrize("original", [False, True])
def test_a_merge_over_the_original_weights(original):
    model = tuned(TIED["llama"], "nf4", **CONFIGS["head"])
    before = logits(model)
    report = qft.merge(model, original=TIED["llama"]() if original else None)
    head = report.weights["lm_head"]
    assert head.survived == pytest.approx(1, abs=1e-4) and head.relative_error < 1e-6
    assert ends(model)[0] is not ends(model)[1]
    qft.unmerge(model)
    assert torch.equal(logits(model), before) and ends(model)[0] is ends(model)[1]


def test_the_other_end_is_left_alone_while_merged_and_when_disabled():
    model = tuned(TIED["llama"], **CONFIGS["head"])
    embedding = model.get_base_model().get_input_embeddings()
    values, before = embedding.weight.detach().clone(), logits(model)
    qft.merge(model)
    assert torch.equal(embedding.weight, values)
    with model.disable_adapter():
        assert relative(logits(model), before) > 1e-3
    assert ends(model)[0] is ends(model)[1]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("config", ["head", "embedding", "token indices"])
def test_copies_and_pickles_of_a_merged_model(config):
    model = tuned(TIED["llama"], **CONFIGS[config])
    before = logits(model)
    qft.merge(model)
    merged, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), merged)
    qft.unmerge(twin)
    assert torch.equal(logits(twin), before) and ends(twin)[0] is ends(twin)[1]
    assert ends(twin)[0] is not ends(model)[0] and torch.equal(logits(model), merged)
    layers = pickle.loads(pickle.dumps([m for m in model.get_base_model().modules() if hasattr(m, "merged_adapters")]))
    assert [m.merged_adapters for m in layers if hasattr(m, "base_layer")]


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_another_adapter_on_the_head_with_token_indices_is_refused(options):
    config = LoraConfig(r=4, trainable_token_indices=[3], **{"target_modules": ["q_proj"], **options})
    model = TIED["llama"]()
    with refuses(UnsupportedOperation, "lm_head", "trainable_token_indices", model=model):
        qft.quantize_and_wrap(model, "nf4", adapter=config, progress=False)
    model = qft.quantize(model, "nf4", progress=False)
    for put_on in (qft.wrap, get_peft_model):
        with refuses(UnsupportedOperation, "lm_head", "trainable_token_indices", model=model):
            put_on(model, copy.deepcopy(config))
    assert qft.quantize_and_wrap(llama(), "nf4", adapter=config, progress=False)


@pytest.mark.parametrize("indices", [[96], [-1], [3, 3], ["a"], [1.5], 5, {"embed_tokens": [200]}], ids=str)
def test_token_indices_that_do_not_fit_are_refused(indices):
    for spec in ("nf4", "reference"):
        model = llama()
        config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
        with refuses(BadOption, "trainable_token_indices", model=model):
            qft.quantize_and_wrap(model, spec, adapter=config, progress=False)
        model = qft.quantize(model, spec, progress=False)
        with refuses(BadOption, "trainable_token_indices", model=model):
            qft.wrap(model, config)


class Shared(nn.Module):
    """Three linears that share one parameter, and a bias that two of them share."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.second.weight = self.third.weight = self.first.weight
        self.second.bias = self.first.bias
        self.other = nn.Linear(64, 64)
        self.other.bias = self.third.bias
        self.out = nn.Linear(64, 96)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in (self.first, self.second, self.other, self.third):
            x = x + layer(x).tanh()
        return self.out(x)


def shared():
    torch.manual_seed(0)
    return Shared().eval()


@pytest.mark.parametrize("targets", [["first"], ["first", "third"], ["second", "first", "third", "other"]], ids=len)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_a_parameter_that_several_linears_share(kind, bias, targets):
    model = qft.quantize(shared(), "reference:format=int,bits=8", progress=False)
    config = (
        LoraConfig(r=4, target_modules=targets, lora_bias=bias)
        if kind == "LoRA"
        else LoHaConfig(r=4, target_modules=targets)
    )
    model = qft.wrap(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.eval()
    before = logits(model)
    base = model.get_base_model()
    weights = [p for n, p in base.named_parameters(remove_duplicate=False) if "lora" not in n and "hada" not in n]
    for merge, unmerge in ((qft.merge, qft.unmerge), (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter())):
        merge(model)
        assert relative(logits(model), before) < 0.02
        assert relative(logits(qft.merge_to_float(model)), logits(model)) < 1e-5
        unmerge(model)
        assert torch.equal(logits(model), before)
        now = [p for n, p in base.named_parameters(remove_duplicate=False) if "lora" not in n and "hada" not in n]
        assert len(now) == len(weights) and all(a is b for a, b in zip(now, weights))


def test_another_method_on_a_tied_head():
    model = qft.wrap(qft.quantize(TIED["llama"](), "nf4", progress=False), LoHaConfig(r=4, target_modules=["lm_head"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    before = logits(model.eval())
    qft.merge(model)
    assert relative(logits(model), before) < 1e-5
    qft.unmerge(model)
    assert torch.equal(logits(model), before) and ends(model)[0] is ends(model)[1]


def seq2seq(model):
    with torch.no_grad():
        return model(input_ids=batch(0, (2, 8)), decoder_input_ids=batch(1, (2, 5))).logits


@pytest.mark.parametrize(
    "targets",
    [["lm_head", "SelfAttention.q"], ["shared", "SelfAttention.q"], ["embed_tokens", "SelfAttention.q"]],
    ids=str,
)
def test_ends_of_t5(tmp_path, targets):
    model = tuned(t5, target_modules=targets)
    before = seq2seq(model)
    qft.merge(model)
    assert relative(seq2seq(model), before) < 0.02
    qft.unmerge(model)
    assert torch.equal(seq2seq(model), before)
    for store in (qft.merge_to_float, lambda m: qft.export(m, tmp_path), lambda m: m.merge_and_unload()):
        with refuses(UnsupportedOperation, "shares its weight", "scales its output"):
            store(model)
    assert torch.equal(seq2seq(model), before)


def test_t5_without_its_ends_is_stored_right(tmp_path):
    model = tuned(t5, target_modules=["SelfAttention.q"])
    before = seq2seq(model)
    qft.export(model, tmp_path)
    assert relative(seq2seq(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()), before) < 1e-5


def bart(size=96):
    """Four ends of one tensor: shared, both embeddings and the head."""
    torch.manual_seed(0)
    ffn = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, **ffn, **tokens)
    model = BartForConditionalGeneration(config).eval()
    if size != 96:
        model.resize_token_embeddings(size)  # makes the embeddings one module under three names
    return model


@pytest.mark.parametrize("size", [96, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "shared"]},
    ],
    ids=["head", "head trained completely", "embedding"],
)
@pytest.mark.filterwarnings("ignore::qft.QftWarning")
def test_a_tie_of_four_ends_is_stored_right(tmp_path, options, size):
    model = tuned(lambda: bart(size), **options)
    before = seq2seq(model)

    def stored(name, write):
        write(tmp_path / name)
        return seq2seq(BartForConditionalGeneration.from_pretrained(tmp_path / name).eval())

    assert relative(stored("float", qft.merge_to_float(model).save_pretrained), before) < 1e-5
    assert relative(stored("export", lambda folder: qft.export(model, folder)), before) < 1e-5
    if size == 96 or "shared" not in options["target_modules"]:
        qft.merge(model)
        merged = seq2seq(model)
        assert relative(merged, before) < 0.02
        assert relative(stored("merged", lambda folder: qft.export(model, folder)), merged) < 1e-5
        qft.unmerge(model)
        plain = model.merge_and_unload()
        assert relative(stored("plain", plain.save_pretrained), seq2seq(plain)) < 1e-5


class Twice(nn.Module):
    """One linear module under two names."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(96, 64), nn.Linear(64, 96)
        self.first = self.again = nn.Linear(64, 64)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.out(self.again((x + self.first(x)).tanh()))


@pytest.mark.parametrize(
    "config", [LoraConfig(r=4, target_modules=["first"]), LoHaConfig(r=4, target_modules=["first"])]
)
def test_one_module_under_two_names(config):
    torch.manual_seed(0)
    model = qft.wrap(qft.quantize(Twice().eval(), {"out": "reference"}, progress=False), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    before = logits(model.eval())
    for merge in (qft.merge, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()):
        with refuses(UnsupportedOperation, "first", "again", "one module", model=model):
            merge(model)
    assert relative(logits(qft.merge_to_float(model)), before) < 1e-5


def test_one_embedding_under_several_names():
    model = tuned(lambda: bart(100), target_modules=["q_proj", "shared"])
    before = seq2seq(model)
    for merge in (qft.merge, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()):
        with refuses(UnsupportedOperation, "model.shared", "one module", model=model, outputs=False):
            merge(model)
    assert torch.equal(seq2seq(model), before)


def test_a_tie_that_is_changed_between_two_merges():
    model = tuned(TIED["llama"], **CONFIGS["both ends"])
    base = model.get_base_model()
    head, embedding = base.lm_head, base.model.embed_tokens
    head.merge()
    with torch.no_grad():
        embedding.get_base_layer().weight.add_(0.1)
    wanted = embedding.get_base_layer().weight.detach().clone()
    embedding.merge()
    head.unmerge()
    embedding.unmerge()
    assert torch.equal(ends(model)[0], wanted) and ends(model)[0] is ends(model)[1]


def test_a_large_drift_is_not_recommended():
    model = tuned(lambda: llama(), "reference:format=int,bits=2,group_size=64", target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.mul_(40)
    report = qft.merge(model, data=[batch(0, (2, 16))])
    if report.drift.kl > 0.05:
        assert "keep this merge" not in report.recommendation and "KL" in report.recommendation
    report.routes["dequantized"] = qft.lora.merging.drift.Drift(0.2, 0.5, 10)
    assert "keep this merge" not in report.recommendation and "0.2" in report.recommendation


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"], ["down_proj"]])
def test_float_experts_come_back_to_the_bit(spec, names):
    """PEFT stacks a wrapper for each parameter around one module: none may keep or restore the other's parameter."""
    model = qft.quantize(qwen3_moe(), spec, skip=["experts"], progress=False)
    targets = [n for n, _ in model.named_parameters() if n.rpartition(".")[2] in names and "experts" in n]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=sorted({n.split(".", 3)[3] for n in targets}))
    wrapped = qft.wrap(model, config).eval()
    fill(wrapped)
    before = {k: v.clone() for k, v in wrapped.state_dict().items()}
    y = logits(wrapped)
    for _ in range(2):
        qft.merge(wrapped)
        assert relative(logits(wrapped), y) < 0.2
        changed = [k for k, v in wrapped.state_dict().items() if k in before and not torch.equal(v, before[k])]
        assert sum("experts" in k for k in changed) == len(targets)
        qft.unmerge(wrapped)
        assert all(torch.equal(v, before[k]) for k, v in wrapped.state_dict().items())
    assert torch.equal(logits(wrapped), y)

"""`format="gguf"`: the file loads through transformers with the same logits, and its vocabulary encodes the same."""

import pydoc_data.topics
import sys

import pytest
import torch
from helpers import refuses
from models import SIZES, gpt2, llama, logits, name_of, plain, relative
from test_export import listing, tuned, weights
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import qft
from qft.saving.gguf import _SPLITS

gguf = pytest.importorskip("gguf", reason="pip install gguf")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 410
TEXT = "\n".join(list(pydoc_data.topics.topics.values())[:12])
STRINGS = [
    TEXT[:2000],
    "Hello world, it's 12345 o'clock!\n\n  def f(x):\n\treturn x**2",
    "Grüße, 世界 🙂 <s> and </s> <think>no</think>",
    "  leading and trailing  ",
    "I'LL we'Re  \r\n x",
    "",
]
SHAPE = {**SIZES, "vocab_size": VOCABULARY}


def small_llama(dtype=torch.float32, **changes):
    return llama(dtype, vocab_size=VOCABULARY, **changes)


def tied_llama(dtype=torch.float32):
    return small_llama(dtype, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5})


def mistral(dtype=torch.float32, **changes):
    """Heads that are wider than hidden_size / heads."""
    torch.manual_seed(0)
    config = MistralConfig(**{**SHAPE, "sliding_window": None, "head_dim": 32, "rms_norm_eps": 1e-5, **changes})
    return MistralForCausalLM(config).to(dtype).eval()


def qwen2(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(**{**SHAPE, "tie_word_embeddings": True, "rope_parameters": rope, **changes})
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype)


def bpe(pre="gpt-2", start=False, end=False, size=400, **options):
    """A byte-level BPE learned from Python's help, which splits text as `pre` does."""
    tokenizer = Tokenizer(models.BPE())
    split = {name: regex for regex, name in _SPLITS.items()}.get(pre)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    first += [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
        ),
    )
    tokenizer.add_tokens(["<think>"])
    if start or end:
        template = " ".join(["<s>"] * start + ["$A"] + ["</s>"] * end)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        **{
            "tokenizer_object": tokenizer,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
            **options,
        }
    )


def load(folder, dtype=torch.float32):
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", quantization_config=config, dtype=dtype
    ).eval()


def fields(folder):
    return {k: f.contents() for k, f in gguf.GGUFReader(folder / "model.gguf").fields.items()}


# ---- weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
@pytest.mark.parametrize("builder", [small_llama, tied_llama, mistral, qwen2], ids=name_of)
@torch.no_grad()
def test_the_same_logits(builder, spec, variant, tmp_path):
    model = tuned(builder, spec, **variant)
    report = qft.export(model, tmp_path, format="gguf", tokenizer=bpe())
    merged = qft.merge_to_float(model)
    assert report.to_dict() == merged.merge_report.to_dict()
    again = load(tmp_path)
    state = again.state_dict()
    assert {n: torch.equal(state[n], t) for n, t in merged.state_dict().items()} == dict.fromkeys(state, True)
    assert relative(logits(again), logits(merged)) < 1e-5
    assert again.config.tie_word_embeddings == merged.config.tie_word_embeddings
    assert {f.name for f in tmp_path.iterdir()} == {"model.gguf", "README.md"}
    assert "library_name: gguf" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("builder", [small_llama, qwen2], ids=name_of)
@pytest.mark.parametrize("cast", [True, False])
@torch.no_grad()
def test_sixteen_bit_files(builder, dtype, cast, tmp_path):
    """Matrices in the dtype, norms and biases in float32, as llama.cpp wants them."""
    model = tuned(builder, dtype=torch.float32 if cast else dtype)
    qft.export(model, tmp_path, format="gguf", tokenizer=bpe(), dtype=dtype if cast else None)
    merged = qft.merge_to_float(model, dtype=dtype)
    state = load(tmp_path, dtype).state_dict()
    assert all(torch.equal(state[n], t) for n, t in merged.state_dict().items())
    kinds = {(len(t.shape), t.tensor_type.name) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {(1, "F32"), (2, {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype])}


def test_q_and_k_are_interleaved_for_llama_and_no_other(tmp_path):
    """Row 2i of a head in the file is row i of the model's, row 2i + 1 is row i + head_dim / 2."""
    for builder, interleaved in ((small_llama, True), (qwen2, False)):
        model = qft.quantize(builder(), "nf4", progress=False)
        qft.export(model, tmp_path / builder.__name__, format="gguf", tokenizer=bpe())
        tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / builder.__name__ / "model.gguf").tensors}
        layer = qft.merge_to_float(model).model.layers[1].self_attn
        for name, weight in (("attn_q", layer.q_proj.weight), ("attn_k", layer.k_proj.weight)):
            found = torch.from_numpy(tensors[f"blk.1.{name}.weight"].copy())
            head, wanted = weight[16:32].detach(), found[16:32]  # the second head
            assert torch.equal(wanted[0::2] if interleaved else wanted[:8], head[:8])
            assert torch.equal(wanted[1::2] if interleaved else wanted[8:], head[8:])


def test_metadata(tmp_path):
    model = qft.quantize(mistral(), "nf4", progress=False)
    qft.export(model, tmp_path, format="gguf", tokenizer=bpe(start=True))
    found = fields(tmp_path)
    wanted = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {k: found[k] for k in wanted} == wanted
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]))
    assert len(types) == VOCABULARY
    assert (types["<s>"], types["<think>"], types["a"], types["[PAD405]"]) == (3, 4, 1, 5)


def test_llama_3_rotary_factors(tmp_path):
    """llama.cpp divides each rotary frequency by the tensor rope_freqs; dividing must give the model's own."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = qft.quantize(small_llama(rope_parameters=rope), "nf4", progress=False)
    qft.export(model, tmp_path, format="gguf", tokenizer=bpe("llama-bpe"))
    (factors,) = [t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight"]
    assert factors.shape == (8,) and factors[0] == 1 and factors[-1] == 8
    plain_frequencies = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain_frequencies / torch.from_numpy(factors.copy()), model.model.rotary_emb.inv_freq)


# ---- vocabulary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(False, False), (True, False)])
@pytest.mark.parametrize("pre", ["gpt-2", *_SPLITS.values()])
def test_the_vocabulary_encodes_the_same(pre, start, end, tmp_path):
    tokenizer = bpe(pre, start, end)
    qft.export(qft.quantize(small_llama(), "nf4", progress=False), tmp_path, format="gguf", tokenizer=tokenizer)
    assert fields(tmp_path)["tokenizer.ggml.pre"] == pre
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in STRINGS:
        assert again(text).input_ids == tokenizer(text).input_ids, text
        assert again.decode(again(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name), name


def test_smollms_way_of_splitting_has_its_name(tmp_path):
    qft.export(qft.quantize(small_llama(), "nf4", progress=False), tmp_path, format="gguf", tokenizer=bpe("smollm"))
    assert fields(tmp_path)["tokenizer.ggml.pre"] == "smollm"


def unigram():
    tokenizer = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def changed(change, **options):
    tokenizer = bpe(**options)
    change(tokenizer.backend_tokenizer)
    return tokenizer


TOKENIZERS = {
    "none": (lambda: None, "tokenizer="),
    "unigram": (unigram, "byte-level BPE"),
    "whitespace": (
        lambda: changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace())),
        "Whitespace",
    ),
    "unknown split": (
        lambda: changed(
            lambda t: setattr(
                t,
                "pre_tokenizer",
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(Regex("x"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
                ),
            )
        ),
        "Split, ByteLevel",
    ),
    "prefix space": (
        lambda: changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "another way",
    ),
    "lower case": (lambda: changed(lambda t: setattr(t, "normalizer", normalizers.Lowercase())), "Lowercase"),
    "stripping": (lambda: changed(lambda t: t.add_tokens([AddedToken("<m>", lstrip=True)])), "strips"),
    "too many": (lambda: bpe(size=500), "410 embeddings"),
    "much around": (
        lambda: changed(
            lambda t: setattr(
                t,
                "post_processor",
                processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)]),
            )
        ),
        "more around",
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_a_gguf_file_cannot_hold(kind, tmp_path):
    make, says = TOKENIZERS[kind]
    model = tuned(small_llama)
    with refuses(qft.BadOption, says, model=model):
        qft.export(model, tmp_path / "out", format="gguf", tokenizer=make())
    assert not list(tmp_path.iterdir())


# ---- refusals ------------------------------------------------------------------------------------------------


def classifier(dtype=torch.float32):
    return LlamaForSequenceClassification(small_llama().config).to(dtype).eval()


@pytest.mark.parametrize("builder", [gpt2, plain, classifier], ids=name_of)
def test_other_architectures_are_refused(builder, tmp_path):
    model = qft.quantize(builder(), "nf4", progress=False)
    with refuses(
        qft.UnsupportedOperation, "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM", type(model).__name__
    ):
        qft.export(model, tmp_path / "out", format="gguf", tokenizer=bpe())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("builder", "changes", "says"),
    [
        (small_llama, {"attention_bias": True}, "attention_bias"),
        (small_llama, {"mlp_bias": True}, "mlp_bias"),
        (small_llama, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (small_llama, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        (mistral, {"sliding_window": 64}, "sliding_window=64"),
        (qwen2, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window=64"),
    ],
    ids=name_of,
)
def test_options_that_a_gguf_file_cannot_say(builder, changes, says, tmp_path):
    model = qft.quantize(builder(**changes), "nf4", progress=False)
    with refuses(qft.UnsupportedOperation, says):
        qft.export(model, tmp_path / "out", format="gguf", tokenizer=bpe())
    assert not list(tmp_path.iterdir())


def test_float64_is_refused(tmp_path):
    model = qft.quantize(small_llama(), "nf4", progress=False)
    with refuses(qft.UnsupportedOperation, "float64", "bfloat16"):
        qft.export(model, tmp_path / "out", format="gguf", tokenizer=bpe(), dtype="float64")
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refuses(qft.MissingDependency, "pip install gguf"):
        qft.export(tuned(small_llama), tmp_path / "out", format="gguf", tokenizer=bpe())
    assert not list(tmp_path.iterdir())


def test_both_formats_in_one_folder(tmp_path):
    model = tuned(small_llama)
    qft.export(model, tmp_path, tokenizer=bpe())
    before = weights(tmp_path)
    qft.export(model, tmp_path, format="gguf", tokenizer=bpe(), dtype="float16")
    old = listing(tmp_path)
    qft.export(model, tmp_path, format="gguf", tokenizer=bpe(), dtype="float16")
    assert listing(tmp_path) == old, "the same export writes the same bytes"
    assert weights(tmp_path).keys() == before.keys()


# ---- a real model --------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_a_real_model(tmp_path):
    """SmolLM2: exported, loaded back, the same logits to 1e-5 and the same tokens on Python's help."""
    from qft.autopilot.packaged_model import find_model, load_model, load_tokenizer

    try:
        source = find_model(None)
    except qft.MissingDependency as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(source)
    model = load_model(source, torch.float32, torch.device("cpu"))
    model = qft.quantize_and_wrap(model, "nf4", progress=False).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.02)
    report = qft.export(model, tmp_path, format="gguf", tokenizer=tokenizer)
    assert len(report.weights) == 210
    again_tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [TEXT, *STRINGS]:
        assert again_tokenizer(text).input_ids == tokenizer(text).input_ids
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    assert again_tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :128]
    again = load(tmp_path)
    assert relative(again(ids).logits, model(ids).logits) < 1e-5

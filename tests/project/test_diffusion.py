"""Diffusion transformers: a tiny FLUX of diffusers, quantized, with a LoRA loaded onto it as its pipelines load one."""

import logging

import pytest
import torch
from helpers import refuses
from models import relative
from peft import LoraConfig

import qft
from qft.core.registry import quantizer_of

diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "ff.net.0.proj", "ff.net.2"]
SKIP = ["x_embedder"]
"""FLUX's smallest input, 16 wide here."""


def flux(dtype=torch.float32):
    torch.manual_seed(0)
    return (
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
        .to(dtype)
        .eval()
    )


def step(seed=1, dtype=torch.float32):
    """What a pipeline gives the transformer in one step of denoising."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": normal(2, 16, 16),
        "encoder_hidden_states": normal(2, 6, 32),
        "pooled_projections": normal(2, 32),
        "timestep": torch.tensor([0.3, 0.7], dtype=dtype),
        "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1).to(dtype),
        "txt_ids": torch.zeros(6, 3, dtype=dtype),
    }


def out(model, **kwargs):
    with torch.no_grad():
        return model(**step(**kwargs)).sample


def quantized(spec):
    data = [step(seed) for seed in range(30, 34)] if qft.capabilities(spec).needs_calibration else None
    return qft.quantize(flux(), spec, skip=SKIP, calibration=data, progress=False)


def float_copy(model):
    """The float model with the weights that a quantized one computes with."""
    copy = flux()
    with torch.no_grad():
        for name, module in model.named_modules():
            quantizer = quantizer_of(module)
            if quantizer is not None and not hasattr(module, "base_layer"):
                handle = quantizer.weights(module)[0]
                value = quantizer.dequantize(handle, dtype=torch.float32)
                target = copy.get_submodule(name.replace(".base_layer", ""))
                target.weight.copy_(value)
                target.bias.copy_(handle.bias)  # INC keeps them in float16
    return copy


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA file that diffusers saved of its float model."""
    folder = tmp_path_factory.mktemp("lora")
    model = flux()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), adapter_name="dog")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_lora_adapter(folder, adapter_name="dog")
    return folder


def load(model, folder):
    model.load_lora_adapter(folder, prefix=None, adapter_name="dog", use_safetensors=True)
    return model.eval()


LINEARS = [n for n, m in flux().named_modules() if isinstance(m, torch.nn.Linear)]
SPECS = ["nf4", "hqq:group_size=32", "inc:group_size=32", "inc:method=nf4,group_size=32", "inc:method=fp8"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_lora_file_loads_onto_a_quantized_transformer(spec, lora):
    model = quantized(spec)
    assert all((quantizer_of(model.get_submodule(n)) is None) == (n in SKIP) for n in LINEARS) and len(LINEARS) == 48
    twin = load(float_copy(model), lora)
    with_lora = out(load(model, lora))
    assert relative(with_lora, out(twin)) < 1e-5
    model.disable_adapters()
    assert relative(out(model), with_lora) > 1e-2, "the LoRA does nothing"


@pytest.mark.parametrize("spec", ["nf4", "inc:group_size=32"])
def test_the_model_tells_the_dtype_that_it_computes_in(spec):
    """Pipelines cast to it; diffusers takes the first float parameter's, which may be a scale's."""
    assert qft.quantize(flux(torch.bfloat16), spec, skip=SKIP, progress=False).dtype == torch.bfloat16


def test_gptq_reads_steps_of_denoising():
    error = relative(out(quantized("inc:method=gptq,group_size=32")), out(flux()))
    assert error < 1.05 * relative(out(quantized("inc:group_size=32")), out(flux()))


def by_inc(method, folder):
    quantization = pytest.importorskip(
        "neural_compressor.torch.quantization", reason="pip install neural-compressor-pt"
    )
    logging.disable(logging.WARNING)
    try:
        if method == "fp8":
            config = quantization.FP8Config(
                use_qdq=True, scale_method="maxabs_pow2", observer="maxabs", dump_stats_path=f"{folder}/stats"
            )
            model = quantization.prepare(flux(), config)
            for seed in range(30, 34):
                out(model, seed=seed)
            quantization.finalize_calibration(model)
            return quantization.convert(model)
        config = quantization.RTNConfig(group_size=32) if method == "rtn" else quantization.HQQConfig(group_size=32)
        return quantization.convert(quantization.prepare(flux(), config))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("method", ["fp8", "rtn"])
def test_a_transformer_that_inc_quantized_takes_a_lora_and_trains(method, lora, tmp_path):
    """As PEFT's example does on Gaudi: prepare, calibrate, convert, and then load the LoRA."""
    model = by_inc(method, tmp_path)
    plain = out(model)
    assert qft.audit(model).bits_per_weight < 10
    assert relative(out(model), plain) < 0.02
    twin = load(float_copy(model), lora)
    load(model, lora)
    assert relative(out(model), out(twin)) < 1e-5
    gradients = []
    for one in (model, twin):
        one.train()
        one(**step(5)).sample.square().mean().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if ".lora_" in n})
    mine, theirs = gradients
    assert mine.keys() == theirs.keys() and len(mine) == 2 * sum(".lora_A." in n for n in mine)
    assert max(relative(mine[n], theirs[n]) for n in mine) < 1e-4


@pytest.mark.parametrize("spec", ["nf4", "inc:group_size=32", "inc:method=fp8"])
def test_wrapped_transformers_train_and_merge_to_float(spec):
    model = qft.wrap(quantized(spec), LoraConfig(r=4, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (model(**step(5)).sample - step(6)["hidden_states"]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    model.eval()
    tuned = out(model)
    merged = qft.merge_to_float(model, dtype=torch.float32)
    assert type(merged) is type(flux()) and not hasattr(merged, "hf_quantizer")
    assert relative(out(merged), tuned) < 1e-5


def test_what_diffusers_cannot_save_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        quantized("inc:group_size=32").save_pretrained(tmp_path)


def test_widths_that_groups_do_not_divide():
    model = flux()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with refuses(qft.BadShape, "x_embedder", "16"):
        qft.quantize(model, "inc:group_size=32", progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

"""MXFP4: every code and tie, scales of its blocks, transformers' own dequantize. Folders: test_compressed_tensors.py."""

import pytest
import torch
from foreign import LORA, merges_and_back
from helpers import refuses
from models import gpt2, llama, logits
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from twins import both_errors, pair

import qft
from qft.backends.mxfp4 import MXFP4, dequantized, e2m1_values, quantized
from qft.testing import check_quantizer


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp4:rule=floor"])
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(spec), max_error=0.12)
    assert len(report.passed) == 17 and not report.ruled_out


def test_every_value_and_every_tie():
    """Codes are exact; half way goes to the even one; beyond 6 to 6."""
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert e2m1_values()[:8].tolist() == half and e2m1_values()[8:].tolist() == [-v for v in half]
    values = torch.tensor([*half, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 5.01, 0.251, 0.7499, 4.99])
    wanted = torch.tensor([*half, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0.5, 0.5, 4.0])
    for sign in (1, -1):
        block = torch.zeros(32)
        block[: len(values)] = sign * values
        found = dequantized(*quantized(block[None], "floor"))[0, : len(values)]
        assert torch.equal(found, sign * wanted)


@pytest.mark.parametrize("power", [-100, -3, 0, 20, 100])
def test_values_of_the_format_are_kept(power):
    codes = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(power + 200)).to(torch.uint8)
    scale = torch.full((16, 4), 127 + power, dtype=torch.uint8)
    value = dequantized(codes, scale)
    for rule in ("nearest", "floor"):
        assert torch.equal(dequantized(*quantized(value, rule)), value)


def test_the_better_of_two_scales():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    blocks = weight.view(256, -1, 32)
    errors = []
    for rule in ("nearest", "floor"):
        value = dequantized(*quantized(weight, rule)).view_as(blocks)
        errors.append((value - blocks).square().sum(-1))
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum()) < 0.95 * float(errors[1].sum())
    scale = quantized(weight, "floor")[1].float() - 127
    assert torch.equal(scale, blocks.abs().amax(-1).log2().floor() - 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_are_read_as_transformers_reads_them(dtype):
    """GPT-OSS's blocks (experts, out, in / 32, 16), which transformers turns to (experts, in, out)."""
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 24, 4, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(100, 140, (3, 24, 4), generator=generator).to(torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(dequantized(blocks.flatten(-2), scales).transpose(1, 2).to(dtype), wanted)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 3e38])
def test_extreme_weights_stay_finite(size):
    weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * size).clamp(-3.4e38, 3.4e38)
    for rule in ("nearest", "floor"):
        value = dequantized(*quantized(weight, rule))
        assert torch.isfinite(value).all() and float((value - weight).abs().max()) <= max(0.75 * size, 2.0**-128)


def test_bits_and_shapes():
    assert MXFP4().nbytes((64, 96)) * 8 == 4.25 * 64 * 96
    model = llama(intermediate_size=72)
    with refuses(qft.BadShape, "down_proj", "72", model=model):
        qft.quantize(model, "mxfp4", progress=False)
    with refuses(qft.BadOption, "rule"):
        qft.get_quantizer("mxfp4:rule=up")


def test_conv1d_models_keep_our_own_format(tmp_path):
    model = qft.quantize(gpt2(), "mxfp4", progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients(dora):
    config = type(LORA)(r=4, lora_alpha=12, target_modules="all-linear", use_dora=dora)
    assert max(both_errors(*pair(llama, "mxfp4", config))) < 1e-5


def test_merge_and_unmerge():
    merges_and_back("mxfp4", 0.25)

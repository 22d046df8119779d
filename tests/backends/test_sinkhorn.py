"""SINQ's scales of columns: what they undo, and what they save."""

import pytest
import torch
from foreign import LORA
from helpers import refuses
from models import llama, relative
from twins import both_errors, pair

import qft
from qft.backends.algorithms.sinkhorn import column_scales
from qft.backends.hqq import HQQ
from qft.backends.reference import Reference
from qft.testing import check_quantizer


def weight(spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(256, generator=generator))
    return torch.randn(192, 256, generator=generator) * scale, scale


def test_scales_of_columns_are_found():
    value, scale = weight(1.0)
    found = column_scales(value, 64)
    assert found.shape == (256,) and float(found.mean()) == pytest.approx(1.0)
    ratio = torch.log(found / scale).view(4, 64)  # a tile's own factor is left to the groups
    assert float((ratio - ratio.mean(1, keepdim=True)).std()) < 0.1


@pytest.mark.parametrize("bits", [3, 4])
def test_columns_of_different_sizes_survive(bits):
    """The error in the inputs' own units, as a product sees it where large columns meet small inputs."""
    value, scale = weight(1.0)
    errors = {}
    for scaling in ("none", "sinq"):
        own = Reference(format="int", bits=bits, group_size=64, scaling=scaling)
        found = own.unpack(own.pack(value), shape=(192, 256), dtype=torch.float32)
        errors[scaling] = relative(found / scale, value / scale)
    assert errors["sinq"] < 0.5 * errors["none"]


def test_even_weights_lose_nothing():
    value, _ = weight(0.0)
    errors = []
    for scaling in ("none", "sinq"):
        own = Reference(format="int", bits=4, group_size=64, scaling=scaling)
        errors.append(relative(own.unpack(own.pack(value), shape=(192, 256), dtype=torch.float32), value))
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_weights_stay_finite(size):
    value = weight(1.0)[0] * size
    value[:, 7], value[3] = 0, 0
    own = Reference(format="int", group_size=64, scaling="sinq")
    assert torch.isfinite(own.unpack(own.pack(value), shape=(192, 256), dtype=torch.float32)).all()


def test_kit_options_and_gradients():
    for more in ("", ",symmetric=true", ",double_quant=true"):
        report = check_quantizer(qft.get_quantizer(f"reference:format=int,group_size=32,scaling=sinq{more}"))
        assert len(report.passed) == 17 and not report.ruled_out
    with refuses(qft.BadOption, "scaling"):
        qft.get_quantizer("reference:scaling=sinq")
    assert max(both_errors(*pair(llama, "reference:format=int,group_size=32,scaling=sinq", LORA))) < 1e-5


@pytest.mark.parametrize("bits", [3, 4])
def test_hqq(bits):
    own = HQQ(bits=bits, group_size=32, scaling="sinq")
    report = check_quantizer(own)
    assert len(report.passed) == 17 and not report.ruled_out
    value, scale = weight(1.0)
    plain = HQQ(bits=bits, group_size=32)
    errors = []
    for q in (plain, own):
        found = q.unpack(q.pack(value), shape=(192, 256), dtype=torch.float32)
        errors.append(relative(found / scale, value / scale))
    assert errors[1] < 0.5 * errors[0]
    assert not own.capabilities.float_zero_points and own.nbytes((192, 256)) == plain.nbytes((192, 256)) + 512
    for text in ("scaling=other", "scaling=sinq,axis=0"):
        with refuses(qft.BadOption, "scaling"):
            qft.get_quantizer(f"hqq:{text}")
    with refuses(qft.BadShape, "down_proj", model=(model := llama(intermediate_size=96))):
        qft.quantize(model, "hqq:group_size=64,scaling=sinq", progress=False)

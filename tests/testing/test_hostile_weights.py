"""Weights of zeros, constants, extremes and narrow shapes: right, or refused by name before anything changes."""

import dataclasses

import pytest
import torch
from foreign import LORA
from helpers import Rows, refuses
from models import llama, relative
from peft import LoraConfig
from torch import nn

import qft
from qft.backends.algorithms.sinkhorn import column_scales
from qft.core.finite import ResultCheck, largest_values
from qft.core.registry import quantizer_of
from qft.testing import ConformanceError, check_quantizer

BEYOND = ("int8", "gguf", "gptq", "awq", "inc", "auto-round")
"""Backends whose constants do not hold 10^6."""


def normal(rows=64, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def model_of(*weights):
    """Linear layers of these weights, side by side: one model with a name for each."""
    layers = {}
    for i, weight in enumerate(weights):
        layers[f"layer{i}"] = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        layers[f"layer{i}"].weight = nn.Parameter(weight)
    return nn.ModuleDict(layers)


class Chain(nn.Module):
    def __init__(self, *weights):
        super().__init__()
        self.layers = nn.ModuleList(model_of(*weights).values())

    def forward(self, input):
        for layer in self.layers:
            input = layer(input)
        return input


def quantized(model, spec, columns=128):
    needs = qft.capabilities(spec).needs_calibration
    dtype = next(model.parameters()).dtype
    data = torch.randn(64, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    return qft.quantize(model, spec, calibration=[{"input": data}] if needs else None, progress=False)


def floats(layer):
    q = quantizer_of(layer)
    return q.dequantize(q.weights(layer)[0], dtype=torch.float32)


# ---- AQLM ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-40])
def test_aqlm_takes_rows_of_zeros_and_tiny_rows(dtype, scale):
    weight = normal()
    weight[3] *= scale
    weight = weight.to(dtype)
    model = quantized(Chain(weight), "aqlm:rounds=1,beam=2")
    found = floats(model.layers[0])
    plain = floats(quantized(Chain(normal().to(dtype)), "aqlm:rounds=1,beam=2").layers[0])
    assert relative(found, weight.float()) < 1.1 * relative(plain, normal())
    assert found[3].abs().max() <= 4 * weight[3].float().abs().max() + 1e-30


# ---- values beyond the scales -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", BEYOND)
def test_values_beyond_the_scales_are_refused_before_the_first_layer_changes(spec):
    if qft.available_quantizers()[spec].state != "ready":
        pytest.skip(qft.available_quantizers()[spec].hint)
    broken = normal(64, 64)
    broken[7, 9] = 1e6
    model = Chain(normal(64, 64), broken, normal(64, 64))
    before = [layer.weight for layer in model.layers]
    with pytest.raises(qft.QftError, match=r"layers\.1"):
        quantized(model, spec, 64)
    assert all(layer.weight is weight for layer, weight in zip(model.layers, before, strict=True))
    assert "_qft" not in vars(model)


@pytest.mark.parametrize("spec", ["int8", "gguf"])
def test_a_folder_with_values_beyond_the_scales_is_refused(tmp_path, spec):
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.data[3, 5] = 1e7
    model.save_pretrained(tmp_path)
    with refuses(qft.NonFiniteWeights, "layers.0.self_attn.q_proj", "skip="):
        qft.quantize(tmp_path, spec, progress=False)
    assert qft.quantize(tmp_path, spec, skip=["layers.0.self_attn.q_proj"], progress=False)


@dataclasses.dataclass(frozen=True)
class Careless(Rows):
    """Divides by the largest value of a row, which may be zero."""

    def pack(self, weight, *, statistics=None):
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        steps = (weight.float() / scale).nan_to_num().round()
        return {"qweight": steps.to(torch.int8), "scale": torch.where(scale == 0, torch.nan, scale)}


def test_every_result_is_checked_and_the_kit_finds_the_quantizer():
    weight = normal()
    weight[3] = 0
    model = Chain(normal(), weight.T.contiguous())
    with pytest.raises(qft.NonFiniteWeights, match=r"layers\.1"):
        pass_on = Chain(normal(128, 128), weight)
        qft.quantize(pass_on, Careless(), progress=False)
    with pytest.raises(qft.PartlyQuantized):
        qft.wrap(pass_on, LoraConfig(target_modules="all-linear"))
    qft.quantize(model, Rows(), progress=False)
    check_quantizer(Rows())
    with pytest.raises(ConformanceError, match=r"hostile_weights_are_right_or_refused.*row of zeros"):
        check_quantizer(Careless())


def test_experts_are_checked(monkeypatch):
    from moes import mixtral

    model = mixtral()
    name = next(n for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    model.get_parameter(name).data[1, 3, 5] = 1e7
    with refuses(qft.NonFiniteWeights, name, model=model):
        qft.quantize(model, "gguf", progress=False)


def test_results_are_looked_at_once():
    check = ResultCheck()
    model = quantized(Chain(normal(), normal(64, 64)), "nf4")
    looks = []

    class Counted(torch.Tensor):
        pass

    for name, layer in model.named_modules():
        check.add(name, layer)
    stack = torch.stack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "stack", lambda *a, **k: looks.append(1) or stack(*a, **k))
        check.look()
        check.look()
    assert len(looks) == 1


def test_largest_values_name_what_is_not_finite():
    good = {"a": torch.tensor([[-3.0, 2.0]]), "b": torch.zeros(0, 4), "c": torch.tensor([[7.0]]).half()}
    assert largest_values(good) == {"a": 3.0, "b": 0.0, "c": 7.0}
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(qft.NonFiniteWeights, match="broken"):
            largest_values({**good, "broken": torch.tensor([[1.0, bad, 2.0]])})


# ---- shapes that the packages compute wrongly ---------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int8", "torchao", "torchao:format=float8"])
def test_a_layer_with_one_input_feature_stays_float(spec):
    model = Chain(normal(1, 128), normal(64, 1), normal(64, 64))
    x = torch.randn(5, 128)
    exact = quantized(
        Chain(*(p.weight.detach().clone() for p in model.layers)), "reference:format=int,bits=8,group_size=1"
    )
    for layer, other in zip(exact.layers, model.layers, strict=True):
        layer.bias.data.copy_(other.bias.data)
    quantized(model, spec).eval()
    assert type(model.layers[1]) is nn.Linear and "one input feature" in qft.audit(model).left["layers.1"]
    assert relative(model(x), exact(x)) < 0.1


# ---- SINQ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("value", [0.7, 0.05, -0.3])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_sinq_over_constant_columns_is_no_worse_than_without(bits, value, noise):
    weight = normal(96, 128)
    weight[:, 5] = value + noise * torch.randn(96, generator=torch.Generator().manual_seed(2))
    for name in ("reference:format=int,group_size=32", "hqq:group_size=32"):
        error = {}
        for scaling in ("none", "sinq"):
            own = qft.get_quantizer(f"{name},bits={bits}" + (",scaling=sinq" if scaling == "sinq" else ""))
            error[scaling] = relative(own.unpack(own.pack(weight), shape=(96, 128), dtype=torch.float32), weight)
        assert error["sinq"] <= 1.05 * error["none"], (name, error)
    sinq, even = qft.get_quantizer(f"sinq:bits={bits}"), normal(96, 128)
    found, usual = (
        relative(sinq.unpack(sinq.pack(w), shape=(96, 128), dtype=torch.float32), w) for w in (weight, even)
    )
    assert found <= 1.1 * usual


def test_one_outlier_does_not_scale_its_column():
    weight = normal(96, 128)
    weight[7, 9] = 1e6
    own = qft.get_quantizer("hqq:bits=4,group_size=64,scaling=sinq")
    found = own.unpack(own.pack(weight), shape=(96, 128), dtype=torch.float32)
    rest = torch.arange(96) != 7
    assert relative(found[rest], weight[rest]) < 0.12
    assert column_scales(weight, 64).isfinite().all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 7])
def test_constants_in_8_bits_survive_groups_of_zeros(bits, symmetric):
    weight = normal()
    own = qft.get_quantizer(
        f"reference:format=int,group_size=32,bits={bits},double_quant=true,symmetric={symmetric}".lower()
    )
    usual = relative(own.unpack(own.pack(weight), shape=(64, 128), dtype=torch.float32), weight)
    weight[40:], weight[:, 64:96], weight[3] = 0, 0, 0.25
    found = own.unpack(own.pack(weight), shape=(64, 128), dtype=torch.float32)
    assert relative(found, weight) < 1.3 * usual
    assert found[40:].abs().max() < 0.02


# ---- merges -------------------------------------------------------------------------------------------------


def _push(layer, place, size):
    layer.lora_B["default"].weight.data.zero_()[place[0], 0] = 1
    layer.lora_A["default"].weight.data.zero_()[0, place[1]] = size


@pytest.mark.parametrize("spec", ["int8", "gguf", "hqq", "nf4", "reference:format=int", "torchao", "quanto", "sinq"])
def test_a_merge_beyond_the_scales_is_right_or_refused_by_name(spec):
    if qft.available_quantizers()[spec.partition(":")[0]].state != "ready":
        pytest.skip("not installed")
    model = qft.quantize_and_wrap(llama(), spec, adapter=LORA, progress=False)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    scaling = layer.scaling["default"]
    _push(layer, (3, 5), 1e9 / scaling)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        qft.merge(model)
    except qft.NonFiniteWeights as error:
        assert "layers.1.mlp.up_proj" in str(error) and "nothing was merged" in str(error)
    else:
        found = layer.quantizer.dequantize(layer.handle, dtype=torch.float32)
        assert found.isfinite().all() and float(found[3, 5]) == pytest.approx(1e9, rel=0.1)
    qft.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("spec", ["nf4", "hqq", "int8", "reference"])
def test_dora_over_a_row_of_zeros(spec):
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[5] = 0
    model = qft.quantize_and_wrap(
        model, spec, adapter=LoraConfig(r=4, use_dora=True, target_modules=["up_proj"]), progress=False
    )
    ids = torch.arange(12).view(2, 6)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.no_grad():
        y = model(ids).logits
        assert relative(qft.merge_to_float(model)(ids).logits, y) < 1e-5
        qft.merge(model)
        assert model(ids).logits.isfinite().all()
        qft.unmerge(model)
        assert torch.equal(model(ids).logits, y)


def test_a_weight_shared_by_two_layers_stays_right():
    model = Chain(normal(64, 64), normal(64, 64), normal(64, 64))
    model.layers[2].weight = model.layers[0].weight
    x = torch.randn(5, 64)
    quantized(model, "nf4", 64)
    assert model.layers[0].weight is model.layers[2].weight and model.layers[0].weight.is_floating_point()
    wanted = x
    for i, layer in enumerate(model.layers):
        wanted = wanted @ (floats(layer) if i == 1 else layer.weight).T + layer.bias
    assert relative(model(x), wanted) < 1e-5

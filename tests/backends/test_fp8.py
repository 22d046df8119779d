"""FP8 in blocks, rows and whole: transformers' own bytes, checkpoints both ways, what cannot be right."""

import json
from types import SimpleNamespace

import pytest
import torch
from foreign import LORA, edit, edit_config, loaded, merges_and_back, plainly, stands, with_tensor, without, written
from helpers import refuses
from models import llama, logits, relative
from torch import nn
from transformers import FbgemmFp8Config, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from twins import both_errors, pair, quantized

import qft
from qft.backends.fp8 import FP8
from qft.testing import check_quantizer

NAME = "model.layers.1.mlp.up_proj"
SPECS = ["fp8", "fp8:scale_format=ue8m0", "fp8:scaling=row", "fp8:scaling=tensor",
         "fp8:block_rows=16,block_columns=48"]  # fmt: skip


def theirs(block=(32, 32), scale_fmt="float"):
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    return SimpleNamespace(quantization_config=config)


def made(block=(32, 32), scale_fmt="float"):
    """What transformers' `Fp8Quantize` makes of a weight, by the names of its checkpoints."""

    def tensors(weight):
        found = Fp8Quantize(theirs(block, scale_fmt)).convert({"x.weight": weight})
        scale = found["x.weight_scale_inv"]
        return {"weight": found["x.weight"], "weight_scale_inv": scale.view(()) if block is None else scale}

    return tensors


def rows_made(weight):
    """FBGEMM's `quantize_fp8_per_row` (fbgemm_gpu/experimental/gemm/triton_gemm/fp8_gemm.py), one row after the other."""
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(len(weight), 1)
    for i, row in enumerate(weight.float()):
        factor = 448.0 / row.abs().max().clamp(min=1e-12)
        scales[i] = 1.0 / factor
        codes[i] = (row * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}


@pytest.mark.parametrize("spec", SPECS)
def test_kit(spec):
    """Three bits of mantissa: 2.6 % of normal weights, whatever the scale."""
    report = check_quantizer(qft.get_quantizer(spec), max_error=0.03)
    assert len(report.passed) == 17 and not report.ruled_out


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 32), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_weights_are_transformers_own(block, scale_fmt, dtype):
    if block is None and scale_fmt == "ue8m0":
        return
    weight = (torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    weight[:128, :128] = 0
    wanted = made(block, scale_fmt)(weight)
    own = FP8(scaling="tensor") if block is None else FP8("block", *block, scale_format=scale_fmt)
    packed = own.pack(weight)
    for ours, name in (("qweight", "weight"), ("weight_scale_inv", "weight_scale_inv")):
        assert packed[ours].dtype == wanted[name].dtype
        assert torch.equal(packed[ours].reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8))
    value = Fp8Dequantize(theirs(block)).convert(
        {"weight": wanted["weight"], "weight_scale_inv": wanted["weight_scale_inv"]}
    )
    value = value["weight"]
    assert torch.equal(own.unpack(packed, shape=(256, 384), dtype=value.dtype), value)


def test_rows_are_fbgemms():
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 33)[:, None]
    packed, wanted = FP8(scaling="row").pack(weight), rows_made(weight)
    assert torch.equal(packed["qweight"].view(torch.uint8), wanted["weight"].view(torch.uint8))
    assert torch.equal(packed["weight_scale"], wanted["weight_scale"])


def test_blocks_that_are_cut_short():
    """As DeepSeek's: ceil(rows / 128) scales; each block by itself."""
    weight = torch.randn(150, 200, generator=torch.Generator().manual_seed(2))
    packed = FP8(block_rows=128, block_columns=128).pack(weight)
    assert packed["weight_scale_inv"].shape == (2, 2)
    value = FP8(block_rows=128, block_columns=128).unpack(packed, shape=(150, 200), dtype=torch.float32)
    for rows in (slice(0, 128), slice(128, 150)):
        for columns in (slice(0, 128), slice(128, 200)):
            part = FP8(scaling="tensor").pack(weight[rows, columns])
            wanted = part["qweight"].float() * part["weight_scale_inv"]
            assert torch.equal(value[rows, columns], wanted)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e30])
def test_extreme_weights_stay_finite(size):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * size
    for spec in SPECS[:4]:
        own = qft.get_quantizer(spec)
        value = own.unpack(own.pack(weight), shape=(64, 64), dtype=torch.float32)
        assert torch.isfinite(value).all() and float((value - weight).abs().max()) <= max(0.13 * size * 4, 1e-30)


# ---- folders ---------------------------------------------------------------------------------------------------


CHECKPOINTS = {
    "blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"}, made()),
    "powers": ({"quant_method": "fp8", "weight_block_size": [16, 64], "scale_fmt": "ue8m0"}, made((16, 64), "ue8m0")),
    "tensor": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        lambda w: {**made(None)(w), "activation_scale": torch.tensor(0.5)},
    ),
    "rows": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, rows_made),
}  # fmt: skip


def value(name, tensors):
    if "weight_scale" in tensors:
        return tensors["weight"].float() * tensors["weight_scale"]
    names = ("weight", "weight_scale_inv")
    found = Fp8Dequantize(theirs()).convert({n: tensors[n] for n in names})["weight"]
    return found


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_others(kind, tmp_path):
    config, tensors = CHECKPOINTS[kind]
    folder = written(tmp_path / "made", llama(), config, tensors)
    spec = {
        "blocks": "fp8:block_rows=32,block_columns=32",
        "powers": "fp8:block_rows=16,block_columns=64,scale_format=ue8m0",
        "tensor": "fp8:scaling=tensor",
        "rows": "fp8:scaling=row",
    }[kind]
    model = stands(folder, spec, value, tmp_path)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == config["quant_method"]
    if kind == "rows":  # transformers reads these with a package of Meta's, on a GPU
        return
    plain = plainly(tmp_path / "again", dtype=torch.float32)
    assert relative(logits(plain), logits(model)) < 1e-5


def test_odd_shapes_keep_our_own_method(tmp_path):
    """transformers takes a block's size from the number of scales: 96 columns in two of 64 would be read as two of 48."""
    model = qft.quantize(llama(intermediate_size=96), "fp8:block_rows=64,block_columns=64", progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "qft"
    assert torch.equal(logits(loaded(tmp_path, "fp8:block_rows=64,block_columns=64")), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(f"{NAME}.weight_scale_inv"), f"lacks {NAME}.weight_scale_inv"),
        (with_tensor(f"{NAME}.weight_scale_inv", lambda t: t.T.contiguous()), f"{NAME}.weight_scale_inv"),
        (with_tensor(f"{NAME}.weight", lambda t: t.view(torch.float8_e5m2)), f"{NAME}.weight"),
        (with_tensor(f"{NAME}.weight_zero_point", lambda _: torch.zeros(3)), f"{NAME}.weight_zero_point"),
        (with_tensor("model.layers.7.mlp.up_proj.weight", lambda _: torch.zeros(64, 64).to(torch.float8_e4m3fn)), "layers.7"),
    ],
)  # fmt: skip
def test_damaged_checkpoints(tmp_path, change, says):
    folder = written(tmp_path / "made", llama(), CHECKPOINTS["blocks"][0], made())
    edit(folder, change)
    with refuses(qft.BadFolder, says):
        qft.quantize(folder, "fp8", device="cpu", progress=False)


def test_truncated_files(tmp_path):
    folder = written(tmp_path / "made", llama(), CHECKPOINTS["blocks"][0], made())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with refuses(qft.BadFolder, "model.safetensors"):
        qft.quantize(folder, "fp8", device="cpu", progress=False)


@pytest.mark.parametrize(
    "option",
    [{"weight_block_size": [128]}, {"expert_dtype": "fp4"}, {"fmt": "e5m2"}, {"dequantize": True}, {"bits": 4},
     {"modules_to_convert": ["embed_tokens"]}, {"scale_fmt": "bfloat16"}],
)  # fmt: skip
def test_options_that_are_not_honoured(option, tmp_path):
    folder = written(tmp_path / "made", llama(), CHECKPOINTS["blocks"][0], made())
    edit_config(folder, **option)
    with refuses(qft.BadOption, next(iter(option))):
        qft.quantize(folder, "fp8", device="cpu", progress=False)


def test_configs_and_options():
    assert qft.get_quantizer(FineGrainedFP8Config()) == FP8(block_rows=128, block_columns=128)
    assert qft.get_quantizer(FineGrainedFP8Config(weight_block_size=None)) == FP8(scaling="tensor")
    assert qft.get_quantizer(FbgemmFp8Config()) == FP8(scaling="row")
    for text in ("scaling=row,scale_format=ue8m0", "block_rows=4", "block_rows=0,block_columns=4", "scaling=column"):
        with refuses(qft.BadOption, "fp8"):
            qft.get_quantizer(f"fp8:{text}")


# ---- layers in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_layers_of_transformers_are_adopted_without_copies(kind):
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
    from transformers.integrations.finegrained_fp8 import FP8Linear

    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(4))
    if kind == "blocks":
        layer, tensors = FP8Linear(64, 96, block_size=(32, 64), has_bias=True), made((32, 64))(weight)
        layer.weight_scale_inv.data = tensors["weight_scale_inv"]
    else:
        layer, tensors = FbgemmFp8Linear(64, 96, bias=True), rows_made(weight)
        layer.weight_scale.data = tensors["weight_scale"]
    layer.weight.data = tensors["weight"]
    torch.nn.init.normal_(layer.bias)
    model = qft.wrap(nn.Sequential(layer))
    ((_, ours, q, handle),) = quantized(model)
    assert ours.qweight.data_ptr() == layer.weight.data_ptr() and torch.equal(ours.bias, layer.bias)
    assert torch.equal(q.dequantize(handle, dtype=torch.float32), value("", tensors).float())


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_merges_and_starts(spec):
    assert max(both_errors(*pair(llama, spec, LORA))) < 1e-5
    merges_and_back(spec, 0.1)


def test_dora():
    config = type(LORA)(r=4, lora_alpha=12, target_modules="all-linear", use_dora=True)
    assert max(both_errors(*pair(llama, "fp8", config))) < 1e-5

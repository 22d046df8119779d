"""SINQ: checkpoints that its own package and transformers made, and the same layout written here."""

import contextlib
import importlib
import io
import json

import pytest
import torch
from foreign import LORA, edit_config, loaded, merges_and_back, stands
from helpers import refuses
from models import llama, logits, relative
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SinqConfig
from twins import both_errors, pair, quantized

import qft
from qft.backends.sinq import SIDECAR, SINQ
from qft.testing import check_quantizer

NAME = "model.layers.1.mlp.up_proj"
SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("double", [True, False])
def test_kit(bits, double):
    report = check_quantizer(SINQ(bits=bits, group_size=32, double_quant=double))
    assert len(report.passed) == 17 and not report.ruled_out


# ---- its own tools ---------------------------------------------------------------------------------------


@pytest.fixture
def sinq(monkeypatch):
    """The package; what it patches into transformers is taken out again."""
    monkeypatch.setenv("SINQ_AUTO_PATCH", "0")
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.importorskip("sinq", reason="pip install --no-deps sinq")
        yield importlib.import_module("sinq.patch_model")
        importlib.import_module("sinq.hf_io").unpatch_hf_pretrained_io()


def made(sinq, folder, dtype=torch.float32, builder=llama, **options):
    """A folder of the package's own, and the quantized model that it was written from."""
    config = importlib.import_module("sinq.sinqlinear").BaseQuantizeConfig(**options)
    model = sinq.AutoSINQHFModel.quantize_model(builder(dtype), None, config, compute_dtype=dtype, device="cpu")
    sinq.AutoSINQHFModel.save_quantized_safetensors(model, None, str(folder), write_tokenizer=False)
    return model


def same(ours, theirs):
    """Every weight of `theirs`, a model of its SINQLinears in float32, to the bit."""
    layers = dict(theirs.named_modules())
    found = list(quantized(ours))
    assert len(found) == sum(type(m).__name__ == "SINQLinear" for m in layers.values())
    for name, _, quantizer, handle in found:
        assert torch.equal(quantizer.dequantize(handle, dtype=torch.float32), layers[name].dequantize()), name


OPTIONS = {
    "sinq": {"method": "sinq", "group_size": 32},
    "3": {"method": "sinq", "group_size": 32, "nbits": 3},
    "2": {"method": "sinq", "group_size": 16, "nbits": 2},
    "5": {"method": "sinq", "group_size": 32, "nbits": 5},
    "6": {"method": "sinq", "group_size": 32, "nbits": 6},
    "8": {"method": "sinq", "group_size": 64, "nbits": 8},
    "dual": {"method": "dual", "group_size": 32},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_checkpoints_of_its_own(kind, sinq, tmp_path):
    theirs = made(sinq, tmp_path / "made", **OPTIONS[kind])
    size, bits = OPTIONS[kind]["group_size"], OPTIONS[kind].get("nbits", 4)
    spec = f"sinq:bits={bits},group_size={size},double_quant={str(kind != 'dual').lower()}"
    again = stands(tmp_path / "made", spec, None, tmp_path)
    same(again, theirs)
    assert relative(logits(again), logits(theirs)) < 1e-6


def test_groups_that_the_package_halves(sinq, tmp_path):
    def builder(dtype=torch.float32):
        return llama(dtype, intermediate_size=96)

    theirs = made(sinq, tmp_path, builder=builder, method="sinq", group_size=64)
    same(loaded(tmp_path, {"*.down_proj": "sinq:group_size=32", "*": "sinq"}), theirs)


def test_checkpoints_of_transformers(sinq, tmp_path):
    """Its `save_pretrained`, patched by the package: the same files, a config that says so, and the head quantized."""
    llama().save_pretrained(tmp_path / "float")
    options = {"quantization_config": SinqConfig(nbits=4, group_size=32), "device_map": {"": "cpu"}}
    theirs = type(llama()).from_pretrained(tmp_path / "float", dtype=torch.float32, **options)
    theirs.save_pretrained(tmp_path / "made")
    assert json.loads((tmp_path / "made/config.json").read_text())["quantization_config"]["quant_method"] == "sinq"
    ours = loaded(tmp_path / "made", "sinq:group_size=32")  # with the package's patches in place
    same(ours, theirs)
    assert isinstance(ours.lm_head, qft.PackedLinear)
    assert relative(logits(ours), logits(theirs)) < 1e-6
    wrapped = qft.wrap(theirs)  # the live layers
    assert relative(logits(wrapped), logits(ours)) < 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [({"method": "sinq_nf4"}, "nf4"), ({"method": "sinq_noz"}, "noz"), ({"tiling_mode": "2D"}, "2D")],
)
def test_what_is_not_read(options, says, sinq, tmp_path):
    made(sinq, tmp_path, **{"method": "sinq", "group_size": 32, **options})
    with refuses(qft.UnsupportedOperation, says):
        qft.quantize(tmp_path, "sinq", device="cpu", progress=False)


def test_its_pickles_are_refused(sinq, tmp_path):
    config = importlib.import_module("sinq.sinqlinear").BaseQuantizeConfig(group_size=32, method="sinq")
    model = sinq.AutoSINQHFModel.quantize_model(llama(), None, config, compute_dtype=torch.float32, device="cpu")
    sinq.AutoSINQHFModel.save_quantized(model, None, str(tmp_path), write_tokenizer=False)
    with refuses(qft.UnsupportedOperation, "save_quantized_safetensors"):
        qft.quantize(tmp_path, "sinq", device="cpu", progress=False)


# ---- its layout, written here: CI has no package -------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Codes, constants of 8 bits as (codes, step, least), and a note a layer beside the index."""
    model = llama()
    folder = tmp_path / "made"
    folder.mkdir()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    edit_config(folder, quant_method="sinq", nbits=4, group_size=32, tiling_mode="1D", method="sinq")
    tensors, notes = {"model.rotary_emb.inv_freq": model.model.rotary_emb.inv_freq}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            tensors |= {f"{name}.{k}": p.detach() for k, p in module.named_parameters(recurse=False)}
            continue
        groups = module.weight.detach().view(-1, 32)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = ((high - low) / 15).view(32, -1)
        least = scale.amin(0, keepdim=True).half()
        step = ((scale.amax(0, keepdim=True) - least) / 255).half()
        codes = ((scale - least) / step).round().clamp(0, 255).byte()
        used = (codes * step + least).view(-1, 1).float()
        zero = (-low / used).round().clamp(0, 15)
        quantized = (groups / used + zero).round().clamp(0, 15).byte()
        half = len(groups) // 2
        meta = {
            "scale.x": codes, "scale.s": step, "scale.m": least, "zero.x": zero.byte(),
            "zero.s": torch.ones(1, 1).half(), "zero.m": torch.zeros(1, 1).half(),
            "scale2": torch.full((1, module.in_features), 2.0).half(),
        }  # fmt: skip
        tensors |= {f"{name}.meta.{k}": v for k, v in meta.items()} | {
            f"{name}.W_q": quantized[:half] << 4 | quantized[half:]
        }
        notes[name] = {"meta": {
            "nbits": 4, "group_size": 32, "shape": list(module.weight.shape), "scale.shape": [len(groups), 1],
            "awq_scale": None, "zero.shape": [len(groups), 1], "axis": 1, "packing": "4bit_u8",
            "method": "sinq_quantAux", "compute_dtype": "torch.float32", "unpack_view_dtype": "torch.uint8",
            "view_as_float": False,
        }}  # fmt: skip
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / SHARD, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / SIDECAR).write_text(json.dumps(notes))
    return folder


def test_the_layout(saved, tmp_path):
    model = stands(saved, "sinq:group_size=32", None, tmp_path)
    plain = llama()
    for name, _, quantizer, handle in quantized(model):
        value = 2 * plain.get_submodule(name).weight  # its columns are twice as large
        assert relative(quantizer.dequantize(handle), value) < 0.12


def test_without_the_notes(saved, tmp_path):
    """A folder whose config says it all is read without the package's notes, as from a hub's cache."""
    expected = logits(loaded(saved, "sinq:group_size=32"))
    (saved / SIDECAR).unlink()
    assert torch.equal(logits(stands(saved, "sinq:group_size=32", None, tmp_path)), expected)
    for option in ({"tiling_mode": "2D"}, {"method": "other"}, {"nbits": 7}, {"outliers": 2}):
        edit_config(saved, **option)
        with refuses(qft.BadOption, next(iter(option)).replace("nbits", "bits=7")):
            qft.quantize(saved, "sinq", device="cpu", progress=False)
        edit_config(saved, tiling_mode="1D", method="sinq", nbits=4, outliers=None)
    edit_config(saved, group_size=16)
    with refuses(qft.BadFolder, "W_q"):
        qft.quantize(saved, "sinq", device="cpu", progress=False)


def change_notes(folder, **changes):
    notes = json.loads((folder / SIDECAR).read_text())
    notes[NAME]["meta"].update(changes)
    (folder / SIDECAR).write_text(json.dumps(notes))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"view_as_float": True}, qft.UnsupportedOperation, "not packed"),
        ({"packing": None}, qft.UnsupportedOperation, "not packed"),
        ({"nbits": 1.58}, qft.UnsupportedOperation, "1.58"),
        ({"nbits": 8}, qft.UnsupportedOperation, "qweight"),
        ({"shape": [128, 32]}, qft.UnsupportedOperation, NAME),
        ({"shape": [64, 128]}, qft.UnsupportedOperation, NAME),
        ({"compute_dtype": "torch.complex"}, qft.BadFolder, NAME),
    ],
)
def test_notes_that_are_not_honoured(changes, error, says, saved):
    change_notes(saved, **changes)
    with refuses(error, says):
        qft.quantize(saved, "sinq", device="cpu", progress=False)


def drop(key):
    def change(tensors):
        del tensors[key]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(f"{NAME}.W_q"), "W_q"),
        (drop(f"{NAME}.meta.scale.s"), "scale.s"),
        (drop("model.norm.weight"), "model.norm.weight"),
    ],
)
def test_damaged_folders(change, says, saved):
    tensors = load_file(saved / SHARD)
    change(tensors)
    save_file(tensors, saved / SHARD, metadata={"format": "pt"})
    with refuses(qft.BadFolder, says):
        qft.quantize(saved, "sinq", device="cpu", progress=False)
    (saved / SIDECAR).write_text("{")
    with refuses(qft.BadFolder, "sinq"):
        qft.quantize(saved, "sinq", device="cpu", progress=False)


# ---- in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["group_size=32", "group_size=32,bits=3,double_quant=false"])
def test_gradients_and_merges(options):
    assert max(both_errors(*pair(llama, f"sinq:{options}", LORA))) < 1e-5
    merges_and_back(f"sinq:{options}", 0.25)


def test_options_and_shapes():
    for text in ("bits=1", "bits=7", "group_size=12", "group_size=0", "tiling_mode=2D"):
        with refuses(qft.BadOption, "sinq"):
            qft.get_quantizer(f"sinq:{text}")
    assert qft.get_quantizer(SinqConfig(nbits=3, group_size=32)) == SINQ(bits=3, group_size=32)
    with refuses(qft.BadShape, "down_proj", "72", model=(model := llama(intermediate_size=72))):
        qft.quantize(model, "sinq:group_size=32,double_quant=false", progress=False)
    with refuses(qft.BadShape, "double_quant", model=(model := llama(hidden_size=80, intermediate_size=16))):
        qft.quantize(model, "sinq:group_size=16", progress=False)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e6, 1e30])
def test_extreme_weights_stay_finite(size):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * size
    weight[:, 7], weight[3] = 0, 0
    own = SINQ(group_size=32)
    found = own.unpack(own.pack(weight), shape=(64, 64), dtype=torch.float32)
    assert torch.isfinite(found).all()
    if 1e-6 <= size <= 1e6:
        assert relative(found, weight) < 0.12

"""AutoRound: checkpoints that its own packers made, in GPTQ's and AWQ's words; ours in its own loader."""

import contextlib
import io
import json

import pytest
import torch
from foreign import LORA, edit, edit_config, plainly, stands, with_tensor, without, written
from helpers import refuses
from models import llama, logits, relative
from torch import nn
from twins import both_errors, pair

import qft
from qft.backends.auto_round import AutoRound
from qft.backends.awq import AWQ
from qft.backends.gptq import GPTQ
from qft.testing import check_quantizer

pytest.importorskip("auto_round", reason="pip install auto-round")

NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("spec", ["auto-round", "auto-round:bits=8,symmetric=false", "auto-round:bits=2,group_size=16"])
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(spec))
    assert len(report.passed) == 17 and not report.ruled_out


def grid(weight, bits, size, symmetric):
    """Scale and zero point of groups, float32 (out, groups)."""
    groups = weight.view(len(weight), -1, size)
    if symmetric:
        scale = groups.abs().amax(-1) / 2 ** (bits - 1)
        return scale.half().float(), torch.full_like(scale, 2 ** (bits - 1))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, (-low / scale).round().clamp(1, 2**bits - 1)


def made(layout, bits, size, symmetric):
    """What auto-round's own QuantLinear packs."""
    with contextlib.redirect_stdout(io.StringIO()):
        from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing

        cls = dynamic_import_quant_linear_for_packing(layout, bits, size, symmetric)

    def tensors(weight):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        scale, zero = grid(weight, bits, size, symmetric)
        if "awq" in layout:
            layer = cls.from_linear(
                linear, bits, size, scales=scale.T.contiguous(), zeros=zero.T.contiguous(), device="cpu"
            )
        else:
            layer = cls(bits, size, weight.shape[1], weight.shape[0], False)
            layer.device = torch.device("cpu")
            layer.pack(linear, scale, zero, None, device="cpu")
        return {k: v for k, v in layer.state_dict().items() if v is not None}

    def value(weight):
        scale, zero = grid(weight, bits, size, symmetric)
        scale, zero = scale.repeat_interleave(size, 1), zero.repeat_interleave(size, 1)
        codes = (weight / scale + zero).round().clamp(0, 2**bits - 1)
        return ((codes - zero) * scale).half()

    return tensors, value


CHECKPOINTS = {
    "gptq": ("auto_round:auto_gptq", 4, 32, True, "auto-round:group_size=32", AutoRound),
    "gptq 8": ("auto_round:auto_gptq", 8, 16, False, "auto-round:bits=8,group_size=16,symmetric=false", AutoRound),
    "gptq 2": ("auto_round:auto_gptq", 2, 32, True, "auto-round:bits=2,group_size=32", AutoRound),
    "plain": (
        "auto_round", 4, 32, False, "auto-round:group_size=32,symmetric=false,checkpoint_format=gptq_v2", AutoRound,
    ),
    "awq": ("auto_round:auto_awq", 4, 32, False, "awq:group_size=32", AWQ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_its_own_packers(kind, tmp_path):
    layout, bits, size, symmetric, spec, backend = CHECKPOINTS[kind]
    tensors, value = made(layout, bits, size, symmetric)
    config = {
        "quant_method": "auto-round", "packing_format": layout, "bits": bits, "group_size": size, "sym": symmetric,
        "data_type": "int", "block_name_to_quantize": "model.layers", "autoround_version": "0.16.1", "iters": 0,
    }  # fmt: skip
    folder = written(tmp_path / "made", llama(), config, tensors)
    model = stands(folder, spec, lambda name, _: value(llama().get_submodule(name).weight.data), tmp_path)
    assert {type(m.quantizer) for m in model.modules() if isinstance(m, qft.PackedLinear)} == {backend}
    if backend is AutoRound:
        saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
        assert {k: saved[k] for k in ("quant_method", "packing_format", "bits", "group_size", "sym")} == {
            k: config[k] for k in ("quant_method", "packing_format", "bits", "group_size", "sym")
        }


@pytest.fixture
def saved(tmp_path):
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
    }
    return written(tmp_path / "made", llama(), config, made("auto_round:auto_gptq", 4, 32, True)[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(f"{NAME}.scales"), f"lacks {NAME}.scales"),
        (with_tensor(f"{NAME}.qweight", lambda t: t.T.contiguous()), f"{NAME}.qweight"),
        (with_tensor(f"{NAME}.g_idx", lambda _: torch.zeros(64, dtype=torch.int32)), f"{NAME}.g_idx"),
    ],
)
def test_damaged_checkpoints(saved, change, says):
    edit(saved, change)
    with refuses(qft.BadFolder, says):
        qft.quantize(saved, "auto-round", device="cpu", progress=False)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"packing_format": "auto_round:fp8_static"}, "fp8_static"),
        ({"data_type": "mx_fp"}, "data_type"),
        ({"act_bits": 8}, "act_bits"),
        ({"super_bits": 6}, "super_bits"),
        ({"rotation_config": {"kind": "hadamard"}}, "rotation_config"),
        ({"extra_config": {NAME: {"bits": 8}}}, "extra_config"),
    ],
)
def test_options_that_are_not_honoured(saved, option, says):
    edit_config(saved, **option)
    with refuses(qft.BadOption, says):
        qft.quantize(saved, "auto-round", device="cpu", progress=False)


def test_configs():
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "extra_config": {"lm_head": {"bits": 16}}}
    assert AutoRound.from_config(config) == AutoRound(group_size=32)
    config["packing_format"] = "auto_round:gptqmodel"
    assert AutoRound.from_config(config) == GPTQ(group_size=32, checkpoint_format="gptq_v2")
    with refuses(qft.BadOption, "desc_act"):
        qft.get_quantizer("auto-round:desc_act=true")


def test_ours_says_what_is_left_in_float(tmp_path):
    qft.quantize(llama(), "auto-round:group_size=32", skip=["o_proj"], progress=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(saved["extra_config"]) == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    with pytest.warns(qft.QftWarning, match="already"):
        model = qft.quantize(tmp_path, "auto-round", device="cpu", dtype=torch.float32, progress=False)
    assert torch.isfinite(logits(model)).all()


def test_ours_in_plain_transformers(tmp_path):
    """auto-round computes in float16 there."""
    model = qft.quantize(llama(hidden_size=128, intermediate_size=256), "auto-round:group_size=32", progress=False)
    model.save_pretrained(tmp_path)
    assert relative(logits(plainly(tmp_path, dtype=torch.float32)), logits(model)) < 3e-3


def test_gradients():
    assert max(both_errors(*pair(llama, "auto-round:group_size=32", LORA))) < 1e-5

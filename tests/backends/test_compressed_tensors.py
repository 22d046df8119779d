"""compressed-tensors: checkpoints that its own compressors made, MXFP4 among them, and ours in plain transformers."""

import pytest
import torch
from foreign import LORA, edit, edit_config, loaded, merges_and_back, plainly, stands, with_tensor, without, written
from helpers import refuses
from models import llama, logits, relative
from twins import both_errors, pair

import qft
from qft.backends.compressed_tensors import CompressedTensors
from qft.testing import check_quantizer

pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

NAME = "model.layers.1.mlp.up_proj"
KIT = {
    "compressed-tensors": None,
    "compressed-tensors:bits=3,group_size=32,symmetric=false": None,
    "compressed-tensors:bits=8,strategy=channel": None,
    "compressed-tensors:bits=5,strategy=channel,symmetric=false": None,
    "compressed-tensors:format=int-quantized,bits=8,strategy=channel": None,
    "compressed-tensors:format=int-quantized,bits=8,strategy=tensor,symmetric=false": 0.05,
    "compressed-tensors:format=float-quantized,type=float,bits=8,strategy=block,block_rows=16,block_columns=48": 0.03,
    "compressed-tensors:format=naive-quantized,type=float,bits=8,strategy=tensor": 0.03,
}


@pytest.mark.parametrize("spec", KIT)
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(spec), max_error=KIT[spec])
    assert len(report.passed) == 17 and not report.ruled_out


# name: format, arguments of the weights, our spec, what else the config says
SCHEMES = {
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, "group_size=32", {}),
    "int4 asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False, "actorder": "weight"},
        "group_size=16,symmetric=false",
        {},
    ),
    "int3": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}, "bits=3,group_size=32", {}),
    "int8 rows": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        "bits=8,strategy=channel,symmetric=false",
        {},
    ),
    "w8a8": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel"},
        "format=int-quantized,bits=8,strategy=channel",
        {"input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}},
    ),
    "fp8 rows": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        "format=float-quantized,type=float,bits=8,strategy=channel",
        {"input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}},
    ),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]},
        "format=float-quantized,type=float,bits=8,strategy=block,block_rows=32,block_columns=64",
        {},
    ),
    "fp8 whole": (
        "naive-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "format=naive-quantized,type=float,bits=8,strategy=tensor",
        {},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        None,
        {},
    ),
}


def scheme_of(layout, arguments):
    arguments = {k: torch.uint8 if k == "scale_dtype" else v for k, v in arguments.items()}
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=layout)


def made(layout, arguments):
    """compressed-tensors' own scales and zero points, and what its compressor makes of a weight with them."""
    scheme = scheme_of(layout, arguments)
    args = scheme.weights

    def tensors(weight):
        rows, columns = weight.shape
        r, c = {
            "group": (1, args.group_size),
            "channel": (1, columns),
            "tensor": (rows, columns),
            "block": args.block_structure,
        }[args.strategy]
        blocks = weight.view(rows // r, r, columns // c, c)
        scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
        if args.strategy == "tensor":
            scale, zero = scale.view(1), zero.view(1)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        return BaseCompressor.get_value_from_registry(layout).compress(state, scheme)

    return tensors


def config_of(layout, arguments, more):
    group = {"targets": ["Linear"], "weights": arguments, "format": layout, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "version": "0.20.0",
    }


@pytest.mark.parametrize("name", SCHEMES)
def test_checkpoints_of_its_own_compressors(name, tmp_path):
    layout, arguments, options, more = SCHEMES[name]
    folder = written(tmp_path / "made", llama(), config_of(layout, arguments, more), made(layout, arguments))
    scheme = scheme_of(layout, arguments)

    def expected(_, tensors):
        return BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]

    spec = "mxfp4" if options is None else f"compressed-tensors:{options}"
    model = stands(folder, spec, expected, tmp_path)
    if layout == "pack-quantized" and not scheme.weights.symmetric:
        with pytest.raises(RuntimeError, match="mismatched"):  # transformers 5.23 makes no room for packed zero points
            plainly(folder)
        return
    same_in_plain_transformers(tmp_path / "again", spec, model)


def same_in_plain_transformers(folder, spec, model):
    """compressed-tensors decompresses MXFP4 to bfloat16, which all of its values fit into, and only computes in that."""
    halves = spec == "mxfp4"
    dtype = torch.bfloat16 if halves else torch.float32
    model = loaded(folder, spec, dtype) if halves else model
    assert relative(logits(plainly(folder, dtype=dtype)), logits(model)) < (1e-2 if halves else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "w8a8", "fp8 rows", "mxfp4"])
def test_weights_are_its_own_in_half_precision(name, dtype):
    layout, arguments, options, _ = SCHEMES[name]
    weight = (torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    tensors = made(layout, arguments)(weight)
    own = qft.get_quantizer("mxfp4" if options is None else f"compressed-tensors:{options}")
    packed = {ours: tensors[theirs] for ours, theirs in own.stored_names.items()}
    wanted = BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme_of(layout, arguments))["weight"]
    assert torch.equal(own.unpack(packed, shape=(64, 96), dtype=dtype), wanted.to(dtype))


@pytest.mark.parametrize(
    "spec", ["compressed-tensors:group_size=32", "compressed-tensors:bits=8,strategy=channel", "mxfp4"]
)
def test_ours_in_plain_transformers(spec, tmp_path):
    model = qft.quantize(llama(), spec, skip=["o_proj"], progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = plainly(tmp_path, dtype=torch.float32)
    kinds = {n: hasattr(m, "quantization_scheme") for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds["model.layers.0.self_attn.q_proj"] and not kinds["model.layers.0.self_attn.o_proj"]
    same_in_plain_transformers(tmp_path, spec, model)
    assert torch.equal(logits(loaded(tmp_path, spec)), expected)


@pytest.fixture
def saved(tmp_path):
    layout, arguments, _, more = SCHEMES["int4"]
    return written(tmp_path / "made", llama(), config_of(layout, arguments, more), made(layout, arguments))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(f"{NAME}.weight_scale"), f"lacks {NAME}.weight_scale"),
        (without(f"{NAME}.weight_shape"), f"lacks {NAME}.weight_shape"),
        (with_tensor(f"{NAME}.weight_packed", lambda t: t.T.contiguous()), f"{NAME}.weight_packed"),
        (with_tensor(f"{NAME}.weight_g_idx", lambda _: torch.zeros(64, dtype=torch.int32)), f"{NAME}.weight_g_idx"),
        (with_tensor(f"{NAME}.weight_shape", lambda t: t.flip(0)), f"{NAME}.weight_shape"),
        (with_tensor("model.layers.7.mlp.up_proj.weight_packed", lambda _: torch.zeros(64, 8, dtype=torch.int32)), "layers.7"),
    ],
)  # fmt: skip
def test_damaged_checkpoints(saved, change, says):
    edit(saved, change)
    with refuses(qft.BadFolder, says):
        qft.quantize(saved, "compressed-tensors", device="cpu", progress=False)


def groups(**changes):
    layout, arguments, _, _ = SCHEMES["int4"]
    return {"targets": ["Linear"], "weights": {**arguments, **changes}, "format": layout}


def weights(**changes):
    return {"config_groups": {"group_0": groups(**changes)}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        (weights(actorder="group"), "actorder"),
        (weights(dynamic=True), "dynamic"),
        (weights(rotation=7), "rotation"),
        (weights(num_bits=9), "2 to 8"),
        ({"config_groups": {}}, "config_groups"),
        ({"format": "marlin-24", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, "dequantize=True"),
        ({"config_groups": {"a": groups(), "b": groups(num_bits=8)}}, "2 different"),
        ({"config_groups": {"g": {**groups(), "output_activations": {"num_bits": 8}}}}, "outputs"),
    ],
)  # fmt: skip
def test_options_that_are_not_honoured(saved, changes, says):
    edit_config(saved, **changes)
    with refuses(qft.BadOption, says):
        qft.quantize(saved, "compressed-tensors", device="cpu", progress=False)


def test_options():
    for text in (
        "bits=1", "format=int-quantized", "type=float", "strategy=block", "group_size=0", "strategy=channel,group_size=32",
        "strategy=tensor,symmetric=false", "format=float-quantized,bits=8",
        "format=naive-quantized,type=float,bits=8,symmetric=false",
        "block_rows=4,block_columns=4", "format=naive-quantized,bits=8,strategy=block,block_rows=0,block_columns=8",
    ):  # fmt: skip
        with refuses(qft.BadOption, "compressed-tensors"):
            qft.get_quantizer(f"compressed-tensors:{text}")
    with refuses(qft.BadShape, "in_features 64", model=(model := llama())):
        qft.quantize(model, "compressed-tensors:group_size=48", progress=False)
    assert qft.get_quantizer("compressed_tensors") == CompressedTensors()


@pytest.mark.parametrize("options", ["group_size=16,symmetric=false", "bits=8,strategy=channel"])
def test_gradients_and_merges(options):
    spec = f"compressed-tensors:{options}"
    assert max(both_errors(*pair(llama, spec, LORA))) < 1e-5
    merges_and_back(spec, 0.25)

"""HQQ: the package's codes to the bit, its layers and folders, and everything that a backend owes."""

import copy
import json

import pytest
import torch
from helpers import refuses, run_python
from models import batch, gpt2, llama, logits, qwen2, relative, train_a_little
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from twins import both_errors, dequantized_copy, pair

import qft
from qft.testing import check_quantizer

SPECS = [
    *(f"hqq:bits={bits},axis={axis}" for bits in (1, 2, 3, 4, 8) for axis in (0, 1)),
    "hqq:bits=4,group_size=16,optimize=false",
    "hqq:bits=2,group_size=none",
]
SOME = ["hqq", "hqq:bits=3,axis=0", "hqq:bits=2,group_size=16"]


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def linear(rows, columns, dtype=torch.float32, seed=0, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows).to(dtype).requires_grad_(False)
    layer.weight.data = (torch.randn(rows, columns, generator=generator) * size).to(dtype)
    return layer


def error(quantizer, weight):
    packed = quantizer.pack(weight)
    return relative(quantizer.unpack(packed, shape=tuple(weight.shape), dtype=torch.float32), weight)


def package():
    pytest.importorskip("hqq", reason="pip install hqq termcolor")
    from hqq.core import quantize as core

    return core


def hqq_model(builder=qwen2, dtype=torch.float32, skip=("lm_head",), **options):
    """A model whose linears the package quantized, layer by layer."""
    core = package()
    model = builder(dtype)
    config = core.hqq_base_quant_config(**{"nbits": 4, "group_size": 64, **options})
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in skip:
            model.set_submodule(name, core.HQQLinear(module, config, compute_dtype=dtype, device="cpu"))
    return model.eval()


# ---- the kit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_kit(spec):
    report = check_quantizer(qft.get_quantizer(spec))
    assert len(report.passed) == 17 and not report.ruled_out


@pytest.mark.parametrize("size", [1.0, 0.02, 1e-4])
def test_small_weights_are_quantized_as_well_as_large_ones(size):
    """The package's absolute bounds turn a layer of small weights into constants."""
    weight = linear(64, 256).weight.data
    for bits in (3, 4, 8):
        own = qft.HQQ(bits=bits)
        assert error(own, weight * size) == pytest.approx(error(own, weight), rel=0.02)


def test_half_precision_keeps_eight_bits():
    for dtype in (torch.bfloat16, torch.float16):
        weight = linear(64, 256, dtype).weight.data
        assert error(qft.HQQ(bits=8), weight) < 1.2 * error(qft.HQQ(bits=8), weight.float())


def test_narrow_groups_far_from_zero_stay_finite():
    """Zero points of such groups overflow float16 in the package, and the weight is NaN."""
    weight = torch.full((8, 64), 3.5, dtype=torch.float16)
    weight[:, 0] = 3.502
    assert error(qft.HQQ(bits=8), weight) < 1e-3
    assert error(qft.HQQ(), torch.zeros(8, 64) + 1e-9) < 1e-3
    assert not qft.HQQ().quantize_layer(nn.Linear(64, 8, bias=False).requires_grad_(False)).weight.isnan().any()


def test_the_solver_pays():
    weight = linear(64, 256).weight.data
    for bits in (2, 3, 4):
        assert error(qft.HQQ(bits=bits), weight) < 0.98 * error(qft.HQQ(bits=bits, optimize=False), weight)


# ---- as the package does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_constants_are_the_packages(bits, axis, dtype):
    core = package()
    for rows, columns, size in ((64, 128, 0.05), (40, 96 * 8, 1.0)):
        for optimize in (True, False):
            layer = linear(rows, columns, dtype, size=size)
            config = core.hqq_base_quant_config(nbits=bits, group_size=64, axis=axis)
            config["weight_quant_params"]["optimize"] = optimize
            theirs = core.HQQLinear(layer, config, compute_dtype=dtype, device="cpu", del_orig=False)
            ours = qft.HQQ(bits=bits, axis=axis, optimize=optimize).quantize_layer(layer)
            assert torch.equal(ours.qweight, theirs.W_q)
            assert torch.equal(ours.scale, theirs.meta["scale"])
            rounded = ours.zero_point.to(dtype) - theirs.meta["zero"]  # 8 bits over bfloat16 are rounded twice here
            assert (rounded.abs() <= (1 if bits == 8 and dtype == torch.bfloat16 else 0)).all()
            if dtype == torch.float32:
                assert torch.equal(ours.weight, theirs.dequantize())
            elif bits < 8:  # they round after the difference, too
                assert relative(ours.weight, theirs.dequantize()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{"round_zero": False}, {"nbits": 3, "round_zero": True}])
def test_whole_zero_points_to_start_from(options):
    core = package()
    config = core.hqq_base_quant_config(nbits=options.get("nbits", 4))
    config["weight_quant_params"] |= options
    layer = linear(64, 128)
    theirs = core.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    own = qft.HQQ(bits=options.get("nbits", 4), round_zero=options["round_zero"])
    assert torch.equal(own.pack(layer.weight.data)["qweight"], theirs.W_q)
    assert qft.HQQ.converted(theirs).quantizer == own


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_our_tensors_work_in_the_packages_layer(bits):
    core = package()
    layer = linear(64, 128)
    ours = qft.HQQ(bits=bits).quantize_layer(layer)
    theirs = core.HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    state = core.HQQLinear(
        copy.deepcopy(layer), core.hqq_base_quant_config(nbits=bits), compute_dtype=torch.float32, device="cpu"
    ).state_dict()
    theirs.load_state_dict(state | {"W_q": ours.qweight, "scale": ours.scale, "zero": ours.zero_point})
    x = torch.randn(3, 128)
    assert relative(ours(x), theirs(x)) < 1e-6


# ---- what the package quantized ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"nbits": 3, "axis": 0}, {"nbits": 8, "view_as_float": True}, {"nbits": 2}])
def test_the_packages_model_is_adopted_without_copies(options):
    model = hqq_model(**options)
    expected = logits(model)
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "HQQLinear"}
    tuned = qft.wrap(model, lora())
    assert relative(logits(tuned), expected) < 1e-6, "biases included"
    for name, old in layers.items():
        new = model.get_submodule(name).base_layer
        assert isinstance(new, qft.PackedLinear) and isinstance(new.quantizer, qft.HQQ)
        assert new.qweight.data_ptr() == old.W_q.data_ptr()
        assert new.zero_point.data_ptr() == old.meta["zero"].data_ptr()
        assert torch.equal(new.weight, old.dequantize())
    train_a_little(tuned)
    after = logits(tuned)
    assert relative(after, expected) > 1e-4
    assert relative(logits(qft.merge_to_float(tuned, dtype=torch.float32)), after) < 1e-5
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    qft.merge(tuned)
    qft.unmerge(tuned)
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())


def test_a_merge_keeps_the_biases():
    """PEFT's merge over HQQ drops them: logits of this model are off by more than its adapter's effect."""
    tuned = train_a_little(qft.wrap(hqq_model(nbits=8), lora()))
    names = [n for n, m in tuned.named_modules() if n.endswith("q_proj")]
    assert names
    expected = logits(tuned)
    qft.merge(tuned)
    assert relative(logits(tuned), expected) < 0.05, "8 bits"
    merged = qft.unmerge(tuned) or qft.merge_to_float(tuned)
    for layer in qwen2().model.layers[0].self_attn.q_proj, merged.model.layers[0].self_attn.q_proj:
        assert layer.bias.abs().sum() > 1


def test_the_auto_classes_model_and_its_folder(tmp_path):
    core = package()
    from hqq.models.hf.base import AutoHQQHFModel

    model = qwen2()
    config = core.hqq_base_quant_config(nbits=4, group_size=32)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(tmp_path))
    expected = logits(model)
    with pytest.warns(qft.QftWarning, match="quantized in that way already"):
        loaded = qft.quantize(tmp_path, "hqq:group_size=32", progress=False)
    assert loaded.dtype == torch.float32
    assert relative(logits(loaded), expected) < 1e-6
    assert not qft.audit(loaded).left.keys() & qft.audit(loaded).weights.keys()
    adopted = qft.wrap(model, lora())
    assert relative(logits(adopted), expected) < 1e-6
    with refuses(qft.AlreadyQuantized, "HQQ", "nf4"):
        qft.quantize(tmp_path, "nf4", progress=False)

    stored = torch.load(tmp_path / "qmodel.pt", weights_only=True)
    stored["model.layers.0.mlp.elsewhere"] = stored.pop("model.layers.0.mlp.up_proj")
    torch.save(stored, tmp_path / "qmodel.pt")
    with refuses(qft.BadFolder, "elsewhere"):
        qft.quantize(tmp_path, "hqq", progress=False)
    del stored["model.layers.0.mlp.elsewhere"]
    torch.save(stored, tmp_path / "qmodel.pt")
    with refuses(qft.BadFolder, "model.layers.0.mlp.up_proj"):
        qft.quantize(tmp_path, "hqq:group_size=32", progress=False)
    (tmp_path / "qmodel.pt").write_bytes(b"no weights")
    with refuses(qft.BadFolder, "qmodel.pt"):
        qft.quantize(tmp_path, "hqq", progress=False)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_safetensors_checkpoint_of_transformers_four(tmp_path, axis):
    """What `save_pretrained` of transformers 4 wrote; version 5 cannot load it."""
    model = hqq_model(nbits=3, axis=axis)
    write_checkpoint(model, tmp_path, package().hqq_base_quant_config(nbits=3, axis=axis))
    with pytest.warns(qft.QftWarning, match="already"):
        loaded = qft.quantize(tmp_path, f"hqq:bits=3,axis={axis}", progress=False)
    assert relative(logits(loaded), logits(model)) < 1e-6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, q: t.pop("model.layers.1.mlp.up_proj.scale"), "model.layers.1.mlp.up_proj.scale"),
        (
            lambda t, q: t.update({"model.layers.0.mlp.up_proj.W_q": torch.zeros(3, 3, dtype=torch.uint8)}),
            "up_proj.W_q",
        ),
        (lambda t, q: t.update({"model.layers.7.mlp.up_proj.W_q": torch.zeros(64, 64, dtype=torch.uint8)}), "layers.7"),
        (lambda t, q: q["weight_quant_params"].update(axis=0), "axis=0"),
        (lambda t, q: q["weight_quant_params"].update(nbits=3), "bits=3"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, change, says):
    model = hqq_model()
    config = package().hqq_base_quant_config(nbits=4)
    write_checkpoint(model, tmp_path, config, change)
    with refuses(qft.BadFolder, says):
        qft.quantize(tmp_path, "hqq", progress=False)


def write_checkpoint(model, folder, config, change=None):
    tensors = {k: v.clone() for k, v in model.state_dict().items() if v is not None and k != "lm_head.weight"}
    if change is not None:
        change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_config": config, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    described = model.config.to_dict() | {"quantization_config": settings, "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(described))


def test_layers_that_cannot_be_read_are_refused_before_any_changes():
    model = hqq_model(llama)
    last = [m for m in model.modules() if type(m).__name__ == "HQQLinear"][-1]
    whole = dict(last.meta)
    for change, says in (
        ({"quant_zero": True}, "quantize the float model again"),
        ({"packing": None}, "packing"),
        ({"nbits": 5}, "nbits=5"),
        ({"group_size": 32}, "was expected"),
    ):
        last.meta = {**whole, **change}
        with refuses(qft.UnsupportedOperation, says, model=model, outputs=False):
            qft.wrap(model, lora())
    last.meta = whole
    kind = type("HQQLinearTorchWeightOnlynt4", (nn.Module,), {"__module__": "hqq.backends.torchao"})
    with refuses(qft.UnsupportedOperation, "torchao's int4 kernel"):
        qft.HQQ.converted(kind())


# ---- transformers' config ---------------------------------------------------------------------------------


def test_transformers_config():
    package()
    from transformers import HqqConfig

    assert qft.get_quantizer(HqqConfig(nbits=4, group_size=64)) == qft.HQQ()
    assert qft.get_quantizer(HqqConfig(nbits=3, group_size=32, axis=0)) == qft.HQQ(bits=3, group_size=32, axis=0)
    model = qft.quantize(llama(), HqqConfig(nbits=8, skip_modules=["lm_head", "o_proj"]), progress=False)
    assert qft.audit(model).left["model.layers.1.self_attn.o_proj"] == "skipped by the caller"
    assert {str(w.quantizer) for w in qft.audit(model).weights.values()} == {repr(qft.HQQ(bits=8))}


def test_transformers_config_that_is_not_honoured_is_refused():
    package()
    from transformers import HqqConfig

    model = llama()
    for options, says in (
        ({"dynamic_config": {"self_attn.q_proj": {"nbits": 8}, "mlp.up_proj": {"nbits": 3}}}, "mapping"),
        ({"view_as_float": True}, "view_as_float"),
        ({"nbits": 6}, "nbits=6"),
        ({"group_size": None}, "group_size=None"),
    ):
        with refuses(qft.BadOption, says, model=model):
            qft.quantize(model, HqqConfig(**options), progress=False)


# ---- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hqq:bits=5", "1, 2, 3, 4, 8"),
        ("hqq:bits=4.0", "wants int"),
        ("hqq:group_size=0", "group_size=0"),
        ("hqq:axis=2", "axis=2"),
        ("hqq:nbits=4", "bits"),
        ("hqq:optimize=1", "wants bool"),
    ],
)
def test_options_that_it_does_not_take(spec, says):
    with refuses(qft.BadOption, says):
        qft.get_quantizer(spec)


def test_group_sizes():
    assert qft.HQQ(group_size=None).resolve([("a", (8, 96))]) == qft.HQQ(group_size=32)
    assert qft.HQQ(group_size=None).resolve([("a", (8, 64)), ("b", (8, 128))]) == qft.HQQ(group_size=64)
    model = llama()
    with refuses(qft.BadShape, "model.layers.0.self_attn.q_proj", "100", model=model):
        qft.quantize(model, "hqq:group_size=100", progress=False)
    with refuses(qft.BadShape, "b", "33"):
        qft.HQQ(group_size=None).resolve([("a", (32, 64)), ("b", (32, 33))])


def test_it_needs_no_package():
    code = """
        import sys
        sys.modules["hqq"] = sys.modules["termcolor"] = None
        import torch, qft
        layer = qft.HQQ(bits=3).quantize_layer(torch.nn.Linear(64, 64))
        print(layer(torch.ones(1, 64)).shape, [m for m in sys.modules if m.startswith("hqq.")])
    """
    assert run_python(code).split() == ["torch.Size([1,", "64])", "[]"]


# ---- the exact merge's two verbs --------------------------------------------------------------------------


def test_whole_groups_shift_exactly():
    own = qft.HQQ(bits=3, group_size=16)
    layer = own.quantize_layer(linear(24, 64, torch.bfloat16))
    handle = own.weights(layer)[0]
    assert own.group_size_of(handle) == 16
    before, saved = own.dequantize(handle, dtype=torch.float32), own.snapshot(handle)
    codes = layer.qweight.clone()
    delta = torch.randn(24, 4) * 0.1
    own.shift(handle, delta)
    after = own.dequantize(handle, dtype=torch.float32)
    assert torch.equal(layer.qweight, codes)
    assert relative(after, before + delta.repeat_interleave(16, 1)) < 1e-6
    own.restore(handle, saved)
    assert torch.equal(own.dequantize(handle, dtype=torch.float32), before) and layer.zero_point.dtype == torch.bfloat16
    with refuses(qft.BadShape, "(24, 4)"):
        own.shift(handle, delta.T)


@pytest.mark.parametrize("own", [qft.HQQ(axis=0), qft.HQQ(group_size=64)])
def test_groups_over_several_rows_do_not_shift(own):
    layer = own.quantize_layer(linear(64, 96))
    handle = own.weights(layer)[0]
    assert own.group_size_of(handle) is None
    with refuses(qft.UnsupportedOperation, "axis=1"):
        own.shift(handle, torch.zeros(64, 1))
    assert not qft.HQQ(axis=0).capabilities.exact_merge and qft.HQQ().capabilities.exact_merge


# ---- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("builder", [qwen2, gpt2])
@pytest.mark.parametrize("spec", SOME)
def test_outputs_and_gradients_equal_those_over_a_float_copy(spec, builder, dora):
    assert max(both_errors(*pair(builder, spec, lora(use_dora=dora)))) < 2e-5


@pytest.mark.parametrize("spec", SOME)
def test_a_whole_run(spec, tmp_path):
    tuned = train_a_little(qft.quantize_and_wrap(qwen2(), spec, progress=False))
    expected = logits(tuned)
    assert relative(logits(qft.merge_to_float(tuned, dtype=torch.float32)), expected) < 1e-5
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    report = qft.merge(tuned)
    assert 0 < report.survived < 1.5
    qft.unmerge(tuned)
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())
    assert torch.equal(logits(tuned), expected)
    qft.save(tuned, tmp_path / "all", base=True)
    assert torch.equal(logits(qft.load(tmp_path / "all")), expected)
    assert torch.equal(logits(qft.load(tmp_path / "all", qwen2())), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folders_load_through_qft_and_transformers(dtype, tmp_path):
    model = qft.quantize(qwen2(dtype), "hqq:bits=8", progress=False)
    state = model.state_dict()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "qft"
    with pytest.warns(qft.QftWarning, match="already"):
        ours = qft.quantize(tmp_path, "hqq:bits=8", progress=False)
    for loaded in (ours, AutoModelForCausalLM.from_pretrained(tmp_path)):
        again = loaded.state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in again.items())
        assert relative(logits(loaded), logits(model)) < (1e-6 if dtype == torch.float32 else 0.02)


def test_from_a_folder_as_in_memory(tmp_path):
    qwen2().save_pretrained(tmp_path)
    streamed = qft.quantize(tmp_path, "hqq:bits=3", progress=False)
    assert torch.equal(logits(streamed), logits(qft.quantize(qwen2(), "hqq:bits=3", progress=False)))


@pytest.mark.parametrize("init", ["loftq", "qera", "pissa", qft.LoftQ(steps=3)])
def test_starts_lower_the_error(init):
    float_model = qwen2()
    with torch.no_grad():
        target = logits(float_model)
    data = [batch(seed=s) for s in range(4)] if init == "qera" else None
    model = qft.quantize_and_wrap(qwen2(), "hqq:bits=2", adapter=lora(r=8), init=init, calibration=data, progress=False)
    plain = dequantized_copy(qft.quantize(qwen2(), "hqq:bits=2", progress=False), qwen2())
    assert relative(logits(model), target) < 0.95 * relative(logits(plain), target)

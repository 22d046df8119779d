"""Group-pooled adapters (use_qalora): PEFT's formula over every backend, and merged exactly into float zero points."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import refuses, unchanged
from models import batch, gpt2, llama, logits, name_of, plain, qwen2, relative, train_a_little
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn
from transformers import AutoModelForCausalLM
from twins import SPECS, fill, gradient_error, loss_and_gradients, output_error, quantized

import qft
from qft.lora.layer import QftLinear
from qft.ops.linear import Update, lora_linear
from qft.pipeline.audit.measure import layer_bytes

pytestmark = pytest.mark.filterwarnings("ignore")

INT = "reference:format=int,group_size=16"
"""Its groups are those of the adapters below."""

MODELS = [llama, qwen2, gpt2]


def pooled(size=16, **options):
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 12,
            "target_modules": "all-linear",
            "use_qalora": True,
            "qalora_group_size": size,
            **options,
        }
    )


def wrapped(builder=llama, spec=INT, adapter=None, dtype=torch.float32, **options):
    model = qft.quantize(builder(dtype), spec, progress=False, **options)
    return qft.wrap(model, adapter or pooled()).eval()


def trained(*args, **kwargs):
    return train_a_little(wrapped(*args, **kwargs))


def loaded(builder, dtype, folder):
    """A model as a checkpoint gives it: `.to(dtype)` would round the rotary frequencies too."""
    builder(dtype).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QftLinear)}


def delta(layer, name="default"):
    """Δ by PEFT's formula, in float64: x ↦ s · B A (mean of each group of G inputs) · in / G."""
    a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    groups = a.shape[1]
    size = layer.in_features // groups
    pool = torch.zeros(groups, layer.in_features, dtype=torch.float64)
    for j in range(layer.in_features):
        pool[j // size, j] = 1 / size * groups
    return (layer.scaling[name] * b @ a @ pool).detach()


def weights(model):
    return {n: m.quantizer.dequantize(m.handle, dtype=torch.float32) for n, m in layers(model).items()}


def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_bits(after, before):
    assert after.keys() == before.keys()
    for key, old in before.items():
        assert after[key].dtype == old.dtype and torch.equal(after[key], old), key


def stock(ours, float_model):
    """PEFT's own QA-LoRA layers (it has them for GPTQ) over the dequantized weights, with our adapters."""
    twin = float_model
    for name, _, quantizer, handle in quantized(ours.get_base_model()):
        value = quantizer.dequantize(handle, dtype=torch.float32)
        twin.get_submodule(name.removesuffix(".base_layer")).weight.data = value.T if handle.transposed else value
    for name, layer in layers(ours.get_base_model()).items():
        parent, _, child = name.rpartition(".")
        config = ours.peft_config["default"]
        theirs = GPTQLoraLinear(twin.get_submodule(name), "default", config, r=config.r, lora_alpha=config.lora_alpha)
        for part in ("lora_A", "lora_B"):
            assert getattr(theirs, part).default.weight.shape == getattr(layer, part).default.weight.shape
            getattr(theirs, part).default.weight.data.copy_(getattr(layer, part).default.weight)
        setattr(twin.get_submodule(parent), child, theirs)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return twin.eval()


# ---- PEFT's formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", [llama, qwen2, gpt2, plain])
def test_outputs_and_gradients_are_stock_pefts(spec, builder):
    for options in ({}, {"lora_dropout": 0.3}, {"use_rslora": True}):
        ours = fill(wrapped(builder, spec, pooled(**options)))
        theirs = stock(ours, builder())
        assert output_error(ours, theirs) < 5e-6
        y, mine = loss_and_gradients(ours)
        z, other = loss_and_gradients(theirs)
        mine = {n.removeprefix("base_model.model."): g for n, g in mine.items()}
        assert relative(y, z) < 5e-6
        assert gradient_error(mine, other) < 3e-5


@pytest.mark.parametrize("rows", [(), (3,), (2, 5)])
@pytest.mark.parametrize("size", [1, 4, 12, 48])
def test_one_layer_against_float64_and_pefts_variant(rows, size):
    torch.manual_seed(0)
    model = qft.quantize(nn.Sequential(nn.Linear(48, 33)), "reference:format=int,group_size=12", progress=False)
    model = fill(qft.wrap(model, pooled(size, r=3, use_rslora=True)), size=0.3)
    (layer,) = layers(model).values()
    x = torch.randn(*rows, 48, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    x64 = x.detach().double().requires_grad_(True)
    a, b = (m.default.weight.detach().double().requires_grad_(True) for m in (layer.lora_A, layer.lora_B))
    groups = torch.stack([x64[..., g * size : (g + 1) * size].mean(-1) for g in range(48 // size)], -1) * (48 // size)
    base = x64 @ layer.quantizer.dequantize(layer.handle, dtype=torch.float32).double().T + layer.bias.double()
    exact = base + layer.scaling["default"] * (groups @ a.T @ b.T)
    exact.square().sum().backward()
    assert relative(y, exact) < 1e-6
    for mine, theirs in ((x, x64), (layer.lora_A.default.weight, a), (layer.lora_B.default.weight, b)):
        assert relative(mine.grad, theirs.grad) < 3e-6
    if rows:  # PEFT's own takes no single vector
        stub = SimpleNamespace(**{k: getattr(layer, k) for k in ("lora_A", "lora_B", "lora_dropout", "scaling")})
        stub.training, stub.in_features, stub.qalora_group_size = False, 48, {"default": size}
        theirs = QALoraLinearVariant.forward(stub, "default", x.detach(), base.detach().float())
        assert relative(y, theirs) < 1e-6
    assert relative(layer.get_delta_weight("default"), delta(layer)) < 1e-6


def test_the_fast_path_takes_pooled_inputs_beside_plain_ones():
    torch.manual_seed(0)
    x, w = torch.randn(2, 5, 32), torch.randn(7, 32)
    updates = [
        Update(torch.randn(3, 8), torch.randn(7, 3), 0.5, torch.randn(2, 5, 8)),
        Update(torch.randn(2, 32), torch.randn(7, 2), 2.0),
        Update(torch.randn(2, 4), torch.randn(7, 2), 1.5, torch.randn(2, 5, 4), torch.randn(7)),
    ]
    y = lora_linear(x, lambda dtype: w.to(dtype), None, updates)
    exact = x.double() @ w.double().T
    for u in updates:
        dropped = x if u.dropped is None else u.dropped
        extra = 0 if u.bias is None else u.bias.double()
        exact = exact + u.scaling * (dropped.double() @ u.A.double().T @ u.B.double().T + extra)
    assert relative(y, exact) < 1e-6


@pytest.mark.parametrize("spec", SPECS)
def test_autocast_and_sixteen_bit_models_compute_it_too(spec):
    ours = fill(wrapped(llama, spec))
    exact = logits(stock(ours, llama()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, mine = loss_and_gradients(ours)
    assert relative(y, exact) < 2e-2 and len(mine) == 2 * len(layers(ours))
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        model = fill(wrapped(llama, spec, dtype=dtype))
        y, mine = loss_and_gradients(model)
        assert relative(y, logits(stock(model, llama()))) < bound
        assert all(g.isfinite().all() for g in mine.values())


@pytest.mark.parametrize("spec", ["nf4", INT])
@pytest.mark.parametrize("forward", ["dequantize", "native"])
def test_beside_a_plain_adapter_in_mixed_batches_and_disabled(spec, forward):
    base = qft.quantize(llama(), spec, progress=False)
    bare = logits(base)
    model = qft.wrap(base, pooled(), forward=forward)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("wide", pooled(32, r=3))
    for name in ("default", "plain", "wide"):
        fill(model, name, seed=len(name))
    model.eval()
    each = {}
    for name in ("default", "plain", "wide"):
        model.set_adapter(name)
        each[name] = logits(model)
    with model.disable_adapter():
        assert relative(logits(model), bare) < 1e-6
    ids = batch(shape=(4, 12))
    names = ["wide", "default", "__base__", "plain"]
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else warnings.catch_warnings():
            assert relative(mixed[row], logits(model, ids)[row]) < 1e-5
    model.base_model.set_adapter(["default", "plain", "wide"])
    together = logits(model)
    assert min(relative(together, y) for y in each.values()) > 1e-3
    for layer in layers(model).values():  # what they compute together is the sum of their updates
        x = torch.randn(3, layer.in_features)
        total = sum(
            layer.get_delta_weight(n).double() for n in ("default", "plain", "wide") if n in layer.lora_A
        ) + layer.quantizer.dequantize(layer.handle, dtype=torch.float32)
        bias = 0 if layer.bias is None else layer.bias
        assert relative(layer(x), x.double() @ total.T + bias) < 1e-5


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_pefts_starts_are_for_the_pooled_width(init):
    torch.manual_seed(0)
    model = wrapped(spec="reference", adapter=pooled(4, r=8, init_lora_weights=init))
    plain_start = logits(qft.quantize(llama(), "reference", progress=False))
    a = torch.cat([m.lora_A.default.weight.detach().flatten() for m in layers(model).values()])
    zero = all(not m.lora_B.default.weight.any() for m in layers(model).values())
    assert zero == (init in (True, "gaussian"))
    assert (relative(logits(model), plain_start) < 1e-6) == zero
    for m in layers(model).values():
        assert m.lora_A.default.weight.shape == (8, m.in_features // 4)
        assert m.lora_A.default.weight.requires_grad and m.lora_A.default.in_features == m.in_features // 4
    if init == "gaussian":
        assert 0.9 < float(a.std()) * 8 < 1.1
    if init is True:  # uniform in ±1/√width
        assert 0.9 < float(layers(model).popitem()[1].lora_A.default.weight.abs().max()) * (128 / 4) ** 0.5 <= 1


# ---- the exact merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", MODELS)
@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (INT, 16),
        (INT, 32),
        (INT, 64),
        ("reference:format=int,bits=2,group_size=8", 16),
        ("reference:format=int,bits=3", 64),
        ("reference:format=int,bits=8,group_size=32", 32),
    ],
)
def test_merging_a_trained_adapter_changes_nothing(builder, spec, size):
    for options in ({}, {"use_rslora": True, "lora_alpha": 3}):
        model = trained(builder, spec, pooled(size, **options))
        y, before = logits(model), state(model)
        wanted = {n: w.double() + delta(m) for (n, m), w in zip(layers(model).items(), weights(model).values())}
        with model.disable_adapter():
            assert relative(logits(model), y) > 1e-3, "training did not move the adapter"
        report = qft.merge(model)
        assert relative(logits(model), y) < 2e-6
        for name, w in weights(model).items():
            assert relative(w, wanted[name]) < 2e-7
        assert len(report.weights) == len(layers(model))
        for w in report.weights.values():
            assert abs(w.survived - 1) < 1e-5 and w.relative_error < 2e-7 and w.update_norm > 1e-3
        assert "100.0% of the update survived" in str(report)
        qft.unmerge(model)
        assert_same_bits(state(model), before)
        assert torch.equal(logits(model), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("builder", MODELS)
def test_sixteen_bit_models_store_the_sum_in_float32(builder, dtype):
    model = trained(builder, dtype=dtype)
    y, before = logits(model), state(model)
    wanted = {n: w.double() + delta(m) for (n, m), w in zip(layers(model).items(), weights(model).values())}
    size = {n: layer_bytes(m.base_layer) for n, m in layers(model).items()}
    assert all(v.dtype == dtype for k, v in before.items() if k.endswith("zero_point"))
    report = qft.merge(model)
    assert relative(logits(model), y) < 8 * torch.finfo(dtype).eps
    for name, w in weights(model).items():
        assert relative(w, wanted[name]) < 2e-7
    assert report.relative_error < 2e-7 and abs(report.survived - 1) < 1e-5
    for name, m in layers(model).items():
        assert m.base_layer.zero_point.dtype == torch.float32 and m.handle.dtype == dtype and m.weight.dtype == dtype
        assert layer_bytes(m.base_layer) == size[name] + 2 * m.base_layer.zero_point.numel(), "real bytes"
    for w in qft.audit(model).weights.values():
        assert w.nbytes in {layer_bytes(m.base_layer) for m in layers(model).values()}
    qft.unmerge(model)
    assert_same_bits(state(model), before)
    assert torch.equal(logits(model), y)
    merged = qft.merge_to_float(model, dtype=torch.float32)
    for name, w in wanted.items():
        new = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert relative(new.T if builder is gpt2 else new, w) < 2e-7


def test_merge_adapter_and_copies_and_casts_keep_it():
    model = trained(dtype=torch.bfloat16)
    y = logits(model)
    model.merge_adapter()
    merged = weights(model)
    twin = copy.deepcopy(model).to(torch.float32)
    for name, w in weights(twin).items():
        assert torch.equal(w, merged[name])
    twin.unmerge_adapter()
    assert_same_bits(
        {k: v for k, v in state(twin).items() if "zero_point" in k},
        {k: v for k, v in state(trained(dtype=torch.bfloat16)).items() if "zero_point" in k},
    )
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize(
    ("spec", "size"), [(INT, 8), ("nf4", 16), ("int8", 16), ("reference:format=int,double_quant=true", 32)]
)
def test_where_it_cannot_be_exact_it_is_requantized_and_the_report_says_so(spec, size):
    model = trained(spec=spec, adapter=pooled(size))
    y, before = logits(model), state(model)
    old = weights(model)
    report = qft.merge(model)
    assert 1e-3 < report.relative_error < 0.3 and 1e-3 < relative(logits(model), y)
    for name, m in layers(model).items():
        d, stored = delta(m), weights(model)[name].double() - old[name].double()
        survived = float((stored * d).sum() / (d * d).sum())
        assert report.weights[name.removeprefix("base_model.model.")].survived == pytest.approx(survived, abs=1e-3)
    qft.unmerge(model)
    assert_same_bits(state(model), before)
    assert relative(logits(qft.merge_to_float(model)), y) < 2e-6


def test_two_pooled_adapters_are_exact_and_a_plain_one_among_them_is_not():
    model = wrapped()
    model.add_adapter("wide", pooled(32, r=3, use_rslora=True))
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"]))
    for seed, name in enumerate(("default", "wide", "plain")):
        fill(model, name, seed=seed)
    before = state(model)
    model.base_model.set_adapter(["default", "wide"])
    y = logits(model)
    assert qft.merge(model).relative_error < 2e-7
    assert relative(logits(model), y) < 2e-6
    # a third one joins: they are taken out, and all three merged from the unmerged weight
    model.merge_adapter(["plain"])
    for name, layer in layers(model).items():
        lossy = name.endswith("q_proj")
        assert layer.merged_adapters == ["default", "wide"] + ["plain"] * lossy
        assert (layer.last_merge.relative_error > 1e-3) == lossy
    qft.unmerge(model)
    assert_same_bits(state(model), before)
    model.base_model.set_adapter(["default", "wide", "plain"])
    report = qft.merge(model)
    assert {n.rpartition(".")[2] for n, w in report.weights.items() if w.relative_error > 1e-6} == {"q_proj"}


def test_a_float_layer_takes_a_pooled_adapter_too():
    model = trained(skip=["q_proj"])
    y, before = logits(model), state(model)
    report = qft.merge(model)
    assert len(report.weights) == 14 and report.relative_error < 2e-7
    assert relative(logits(model), y) < 2e-6
    qft.unmerge(model)
    assert_same_bits(state(model), before)


def test_lora_bias_is_merged_with_it():
    model = trained(qwen2, adapter=pooled(lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"]))
    assert all(m.lora_B.default.bias.abs().max() > 1e-3 for m in layers(model).values())
    y = logits(model)
    assert qft.merge(model).relative_error < 2e-7
    assert relative(logits(model), y) < 2e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_adapters_are_not_merged(value):
    model = trained()
    list(layers(model).values())[-1].lora_B.default.weight.data[0, 0] = value
    for verb in (qft.merge, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()):
        with refuses(qft.NonFiniteWeights, "NaN or infinity", model=model):
            verb(model)


def test_a_shift_beyond_float32_is_refused():
    model = wrapped()
    for layer in layers(model).values():
        layer.lora_B.default.weight.data.fill_(1e30)
        layer.lora_A.default.weight.data.fill_(1e9)
    with refuses(qft.NonFiniteWeights, model=model, outputs=False):
        qft.merge(model)


# ---- what is stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("builder", MODELS)
def test_a_merged_base_saves_and_loads(builder, dtype, tmp_path):
    # only the attention is adapted: layers of one shape differ in the dtype of their zero points
    targets = ["c_attn"] if builder is gpt2 else ["q_proj", "v_proj"]
    model = qft.quantize(loaded(builder, dtype, tmp_path / "float"), INT, progress=False)
    model = train_a_little(qft.wrap(model, pooled(target_modules=targets)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)  # nothing was lost: no warning says that something was
        base = model.merge_and_unload()
    y, values = logits(base), {n: q.dequantize(h, dtype=torch.float32) for n, _, q, h in quantized(base)}
    kinds = {m.zero_point.dtype for _, m, _, _ in quantized(base)}
    assert kinds == {dtype, torch.float32}
    base.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_bits(state(again), state(base))
    assert torch.equal(logits(again), y)
    for cast in (torch.float32, torch.bfloat16):  # constants keep their dtypes whatever the model is loaded in
        other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=cast)
        for name, _, q, handle in quantized(other):
            assert torch.equal(q.dequantize(handle, dtype=torch.float32), values[name])
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()), y)


def test_configs_of_before_are_read(tmp_path):
    """Layers that were never shifted are described as they always were: by quantizer, shape and dtype."""
    model = qft.quantize(llama(torch.bfloat16), INT, progress=False)
    model.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config
    assert all(len(entry) == 5 for entry in config.layers.values())
    assert all(key.count(":") == 2 and "+" not in key for key in config.templates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("builder", [llama, plain])
def test_another_adapter_over_a_merged_base(builder, dtype, tmp_path):
    float_model = loaded(builder, dtype, tmp_path / "float") if builder is llama else builder(dtype)
    base = qft.quantize(copy.deepcopy(float_model), INT, progress=False)
    base = train_a_little(qft.wrap(base, pooled())).merge_and_unload()
    start = state(base)
    model = train_a_little(qft.wrap(base, pooled(32, r=2)))
    y = logits(model)
    qft.save(model, tmp_path)
    if builder is llama:
        assert torch.equal(logits(qft.load(tmp_path)), y)
    for given in (copy.deepcopy(float_model), qft.quantize(float_model, INT, progress=False)):
        assert torch.equal(logits(qft.load(tmp_path, given)), y)
    assert qft.merge(model).relative_error < 2e-7
    assert relative(logits(model), y) < (2e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)
    qft.unmerge(model)
    assert torch.equal(logits(model), y)
    # a lossy merge over it packs anew, in the dtypes that fresh constants have, and is undone to the bit
    model.delete_adapter("default")
    model.add_adapter("plain", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("plain")
    fill(model, "plain", size=0.1)
    qft.merge(model)
    assert all(m.base_layer.zero_point.dtype == dtype for m in layers(model).values())
    qft.unmerge(model)
    after = state(model.unload())
    assert_same_bits(after, start)


@pytest.mark.parametrize("spec", ["nf4", INT])
def test_adapters_are_saved_and_loaded_by_both_libraries(spec, tmp_path):
    model = trained(spec=spec)
    y = logits(model)
    qft.save(model, tmp_path / "qft")
    model.save_pretrained(tmp_path / "peft")
    for folder in (tmp_path / "qft", tmp_path / "peft"):
        again = qft.load(folder, qft.quantize(llama(), spec, progress=False))
        assert torch.equal(logits(again), y)
        theirs = PeftModel.from_pretrained(qft.quantize(llama(), spec, progress=False), folder)
        assert torch.equal(logits(theirs), y)
        config = theirs.peft_config["default"]
        assert config.use_qalora is True and config.qalora_group_size == 16
    assert torch.equal(logits(qft.load(tmp_path / "qft", llama())), y)
    with model.disable_adapter():
        bare = logits(model)
    model.load_adapter(tmp_path / "peft", "second")
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), y)
    assert all(set(m.qalora_group_size) == {"second"} for m in layers(model).values())
    # a plain adapter by a name that a pooled one had
    model.delete_adapter("second")
    model.add_adapter("default", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("default")
    assert relative(logits(model), bare) < 1e-6
    assert all(m.lora_A.default.weight.shape == (4, m.in_features) for m in layers(model).values())


def test_an_adapter_of_another_group_size_does_not_load(tmp_path):
    qft.save(trained(), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"qalora_group_size": 16', '"qalora_group_size": 32'))
    for base in (llama(), qft.quantize(llama(), INT, progress=False)):
        with refuses(qft.BadFolder, "does not fit this base", model=base):
            qft.load(tmp_path, base)


def test_the_pooled_path_from_nothing_to_a_merged_model():
    model = llama()
    model = train_a_little(qft.quantize_and_wrap(model, INT, adapter=pooled(), progress=False))
    y = logits(model)
    assert qft.merge(model).relative_error < 2e-7 and relative(logits(model), y) < 2e-6


def test_weighted_adapters():
    model = wrapped()
    model.add_adapter("other", pooled())
    model.add_adapter("wide", pooled(32))
    model.add_adapter("plain", LoraConfig(r=4, target_modules={"q_proj"}))
    for seed, name in enumerate(("default", "other", "wide", "plain")):
        fill(model, name, seed=seed)
    wanted = {n: 0.5 * delta(m) + 2 * delta(m, "other") for n, m in layers(model).items()}
    for names, kind in ((["default", "other"], "svd"), (["default", "wide"], "cat"), (["default", "plain"], "cat")):
        with refuses(qft.UnsupportedOperation, "'cat'", "qalora_group_size", model=model):
            model.add_weighted_adapter(names, [0.5, 2.0], "sum", combination_type=kind)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", combination_type="cat")
    for name, layer in layers(model).items():
        assert relative(delta(layer, "sum"), wanted[name]) < 1e-6


# ---- shift ------------------------------------------------------------------------------------------------


def test_shift_by_hand():
    layer = nn.Linear(32, 3)
    q = qft.get_quantizer("reference:format=int,group_size=8")
    new = q.quantize_layer(layer)
    handle = q.weights(new)[0]
    assert q.group_size_of(handle) == 8
    before, zero = q.dequantize(handle), new.zero_point.clone()
    by = torch.arange(12.0).view(3, 4)
    q.shift(handle, by)
    assert (q.dequantize(handle) - before - by.repeat_interleave(8, 1)).abs().max() < 2e-6
    assert torch.equal(new.zero_point, zero - by / new.scale)
    with refuses(qft.BadShape, "(3, 1)", "(3, 4)"):
        q.shift(handle, by[:, :1])


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference", "reference:format=int,symmetric=true,group_size=8"])
def test_shift_is_refused_without_float_zero_points(spec):
    q = qft.get_quantizer(spec)
    handle = q.weights(q.quantize_layer(nn.Linear(64, 64)))[0]
    assert q.group_size_of(handle) is None
    with refuses(qft.UnsupportedOperation, "float_zero_points"):
        q.shift(handle, torch.zeros(64, 8))


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"use_dora": True}, qft.UnsupportedOperation, ["use_qalora", "use_dora"]),
        ({"init_lora_weights": "eva"}, qft.UnsupportedOperation, ["use_qalora", "eva"]),
        ({"target_parameters": ["weight"]}, qft.UnsupportedOperation, ["use_qalora", "target_parameters"]),
        ({"qalora_group_size": 0}, qft.BadOption, ["qalora_group_size=0"]),
        ({"qalora_group_size": -16}, qft.BadOption, ["qalora_group_size=-16"]),
        ({"qalora_group_size": 16.0}, qft.BadOption, ["qalora_group_size=16.0"]),
        ({"qalora_group_size": None}, qft.BadOption, ["qalora_group_size=None"]),
        ({"qalora_group_size": 48}, qft.BadShape, ["qalora_group_size=48", "model.layers.0.self_attn.q_proj", "64"]),
        (
            {"qalora_group_size": 128},
            qft.BadShape,
            ["qalora_group_size=128", "model.layers.0.self_attn.q_proj", "64"],
        ),
        (
            {"target_modules": ["up_proj", "embed_tokens"]},
            qft.UnsupportedOperation,
            ["use_qalora", "model.embed_tokens", "Embedding"],
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            qft.UnsupportedOperation,
            ["LoftQ", "use_qalora"],
        ),
    ],
)
def test_refusals_come_before_anything_changes(options, error, says):
    config = pooled(**{"target_modules": ["q_proj", "up_proj", "down_proj"], **options})
    float_model, model = llama(), qft.quantize(llama(), INT, progress=False)
    with refuses(error, *says, model=float_model):
        qft.quantize_and_wrap(float_model, INT, adapter=config, progress=False)
    with refuses(error, *says, model=model):
        qft.wrap(model, config)
    if config.init_lora_weights == "loftq":
        with refuses(error, *says, model=model):
            qft.wrap(model, config, original=llama())
        return
    with refuses(error, *says, model=model):
        get_peft_model(model, copy.deepcopy(config))
    wrapped = qft.wrap(model, LoraConfig(r=4, target_modules="all-linear"))
    with refuses(error, *says), unchanged(wrapped.base_model):
        wrapped.add_adapter("second", copy.deepcopy(config))


def test_inits_of_ours_are_refused():
    model = qft.quantize(llama(), INT, progress=False)
    with refuses(qft.UnsupportedOperation, "LoftQ", "use_qalora", model=model):
        qft.wrap(model, pooled(), init="loftq", original=llama())
    with refuses(qft.UnsupportedOperation, "LoftQ", "use_qalora", model=model):
        qft.wrap(model, pooled(), init=qft.LoftQ(steps=2))


def test_all_linear_is_checked_layer_by_layer():
    model = qft.quantize(llama(intermediate_size=96), "nf4", progress=False)
    with refuses(qft.BadShape, "qalora_group_size=64", "model.layers.0.mlp.down_proj", "96", model=model):
        qft.wrap(model, pooled(64))
    attention = qft.wrap(model, pooled(64, exclude_modules=["down_proj"]))
    assert len(layers(attention)) == 12
    with refuses(qft.BadShape, "qalora_group_size=64", "model.layers.0.mlp.down_proj", "96"):
        attention.add_adapter("second", pooled(64))

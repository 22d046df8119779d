"""The one LoRA layer against plain PEFT over a float copy whose weights are the dequantized ones."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from models import ALL_BUILDERS, BUILDERS, batch, gpt2, llama, logits, name_of, plain, qwen2, qwen3_moe, relative, t5
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaForSequenceClassification
from twins import (
    SPECS,
    both_errors,
    fill,
    gradient_error,
    loss_and_gradients,
    output_error,
    pair,
    quantized,
    share,
    stock_peft,
)

import qft
from qft.core.registry import quantizer_of
from qft.lora.layer import QftLinear
from qft.lora.model import QftLoraModel
from qft.ops.linear import Update, lora_linear

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = {
    "lora": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "dora": {"lora_alpha": 12, "use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True, "lora_alpha": 12},
    "base biases train": {"bias": "all"},
    "adapted biases train": {"bias": "lora_only"},
    "negative alpha": {"lora_alpha": -4},
}


def config(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def adapted(model):
    """Names of the adapted layers, without wrappers' prefixes."""
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


# ---- against plain PEFT -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", ALL_BUILDERS)
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias"])
def test_outputs_and_gradients_are_those_of_plain_peft(spec, builder, variant):
    """In float32: outputs to 1e-6, each parameter's gradient to 2e-5; the state dict's keys and shapes are the same."""
    evaluated, trained, gradients = both_errors(*pair(ALL_BUILDERS[builder], spec, config(**VARIANTS[variant])))
    assert evaluated < 1e-6
    assert trained < 1e-6
    assert gradients < 2e-5


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"lora", "dora", "lora_bias"}))
@pytest.mark.parametrize("builder", [qwen2, gpt2])
def test_variants_are_those_of_plain_peft(spec, variant, builder):
    evaluated, trained, gradients = both_errors(*pair(builder, spec, config(**VARIANTS[variant])))
    assert evaluated < 1e-6
    assert trained < 1e-6
    assert gradients < 5e-6


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, "alpha_pattern": {"q_proj": 3, "down_proj": 1}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 5}, "use_rslora": True, "use_dora": True},
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": r".*layers\.1\.(self_attn\.(q|v)_proj|mlp\..*_proj)"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1.*"},
        {"exclude_modules": ["down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"], "target_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [3, 5]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
    ],
    ids=name_of,
)
def test_what_a_config_chooses_is_what_plain_peft_chooses(options):
    ours, theirs = pair(llama, "reference", config(**options))
    assert adapted(ours) == adapted(theirs)
    evaluated, trained, gradients = both_errors(ours, theirs)
    assert evaluated < 1e-6
    assert trained < 1e-6
    assert gradients < 5e-6


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias"])
@pytest.mark.parametrize(
    ("builder", "skip"), [(qwen2, ["v_proj", "mlp"]), (gpt2, ["c_attn"]), (plain, ["blocks.1"])], ids=name_of
)
def test_float_layers_of_a_quantized_model_are_adapted_alike(spec, variant, builder, skip):
    ours, theirs = pair(builder, spec, config(**VARIANTS[variant]), skip=skip)
    layers = [m for m in ours.modules() if isinstance(m, QftLinear)]
    floats = [m for m in layers if quantizer_of(m.base_layer) is None]
    assert 0 < len(floats) < len(layers)
    evaluated, trained, gradients = both_errors(ours, theirs)
    assert evaluated < 1e-6
    assert trained < 1e-6
    assert gradients < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=name_of)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "dora", "dropout"])
def test_sixteen_bit_outputs_are_those_of_plain_peft(spec, variant, dtype, bound):
    """Adapters are cast to 16 bit inside the linear, where PEFT casts the input to float32: rounding apart, equal."""
    ours, theirs = pair(llama, spec, config(**VARIANTS[variant]), dtype=dtype)
    evaluated, trained, _ = both_errors(ours, theirs)
    assert evaluated < bound
    assert trained < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("spec", SPECS)
def test_sixteen_bit_is_as_exact_as_plain_peft(spec, dtype):
    """Errors against float64, of the output and of every gradient: at most twice those of PEFT, at most 2 roundings."""
    torch.manual_seed(0)
    ours, theirs = pair(lambda dt: nn.Sequential(nn.Linear(128, 96)).to(dt), spec, config(r=8), dtype=dtype)
    x = torch.randn(64, 128).to(dtype)
    g = torch.randn(64, 96).to(dtype)

    def run(model, x, g):
        x = x.clone().requires_grad_(True)
        y = model(x)
        y.backward(g)
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        result = {"output": y, "x": x.grad, **grads}
        model.zero_grad()
        return result

    exact = run(copy.deepcopy(theirs).double(), x.double(), g.double())
    mine, other = run(ours, x, g), run(theirs, x, g)
    for name, value in exact.items():
        error, peers = relative(mine[name], value), relative(other[name], value)
        assert error < max(2 * peers, torch.finfo(dtype).eps), name
        assert error < 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("spec", SPECS)
def test_adapters_are_float32_masters(spec, dtype):
    model = qft.wrap(qft.quantize(llama(dtype), spec, progress=False), config(use_dora=True))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    out, gradients = loss_and_gradients(model)
    assert out.dtype == dtype
    assert gradients.keys() == trainable.keys()
    assert {g.dtype for g in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_the_default_start_is_the_quantized_model(spec, variant):
    """B = 0: to the bit; DoRA's magnitude is the norm of the dequantized rows, so that it cancels up to rounding."""
    model = qft.wrap(qft.quantize(llama(), spec, progress=False), config(**VARIANTS[variant]))
    with torch.no_grad():
        started = logits(model)
        with model.disable_adapter():
            base = logits(model)
    if variant == "dora":
        assert relative(started, base) < 1e-6
        for layer in (m for m in model.modules() if isinstance(m, QftLinear)):
            rows = layer.quantizer.dequantize(layer.handle, dtype=torch.float32).norm(dim=1)
            assert torch.equal(layer.lora_magnitude_vector["default"].weight, rows)
    else:
        assert torch.equal(started, base)


# ---- several adapters -------------------------------------------------------------------------------------


def two_adapters(spec, builder=llama, first=None, second=None, **kwargs):
    ours, theirs = pair(builder, spec, first or config(lora_alpha=12), **kwargs)
    second = second or LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "down_proj"])
    ours.add_adapter("other", copy.deepcopy(second))
    again = copy.deepcopy(second)
    if again.target_modules == "all-linear":
        again.target_modules = set(ours.peft_config["other"].target_modules)
    with stock_peft():
        theirs.add_adapter("other", again)
    fill(ours, "other", seed=7)
    share(ours, theirs, "other")
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("spec", SPECS)
def test_adapters_are_switched_stacked_and_deleted_as_in_plain_peft(spec):
    ours, theirs = two_adapters(spec)
    seen = []

    def same():
        assert output_error(ours, theirs) < 1e-6
        with torch.no_grad():
            seen.append(logits(ours))

    same()
    for model in (ours, theirs):
        model.set_adapter("other")
    same()
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    same()
    out, mine = loss_and_gradients(ours)
    other, peers = loss_and_gradients(theirs)
    assert relative(out, other) < 1e-6
    assert gradient_error(mine, peers) < 5e-6
    assert {".default." in n for n in mine} == {True, False}
    with ours.disable_adapter(), theirs.disable_adapter():
        same()
    for model in (ours, theirs):
        model.delete_adapter("default")
    same()
    assert list(ours.peft_config) == ["other"]
    assert not [n for n in ours.state_dict() if ".default." in n]
    assert torch.equal(seen[4], seen[1])  # with "default" gone, what is left is "other"
    for i in range(4):
        assert all(relative(seen[i], seen[j]) > 1e-3 for j in range(i))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("second", [config(r=2, use_dora=True), config(r=2, lora_dropout=0.4)], ids=["dora", "dropout"])
def test_two_active_adapters_of_different_kinds(spec, second):
    """Order matters with DoRA: it scales what came before it."""
    ours, theirs = two_adapters(spec, second=second)
    for names in (["default", "other"], ["other", "default"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(names)
        evaluated, trained, gradients = both_errors(ours, theirs)
        assert evaluated < 1e-6
        assert trained < 1e-6
        assert gradients < 5e-6


def test_a_second_adapter_may_target_all_linear():
    """ "all-linear" means the same layers once some of them are adapted: no adapter on an adapter."""
    ours, theirs = two_adapters("nf4", first=LoraConfig(r=4, target_modules=["q_proj"]), second=config(r=2))
    linears = {n for n, *_ in quantized(llama_quantized("nf4"))}
    assert adapted(ours) == linears
    assert set(ours.peft_config["other"].target_modules) <= linears
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert output_error(ours, theirs) < 1e-6


def llama_quantized(spec):
    return qft.quantize(llama(), spec, progress=False)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_weighted_adapters(spec, builder, how):
    """An SVD of our float32 product and of PEFT's differ in the rounding of the small singular values."""
    same_rank = config(r=4, lora_alpha=7)
    ours, theirs = two_adapters(spec, builder, second=same_rank)
    before = output_error(ours, theirs)
    assert before < 1e-6
    for model in (ours, theirs):
        with stock_peft() if model is theirs else warnings.catch_warnings():
            model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mixed", combination_type=how)
        model.set_adapter("mixed")
    assert output_error(ours, theirs) < (1e-5 if how == "svd" else 1e-6)
    with torch.no_grad():
        mixed = logits(ours)
        with ours.disable_adapter():
            assert relative(mixed, logits(ours)) > 1e-3


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", [llama, gpt2, plain], ids=["llama", "gpt2", "plain"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_mixed_batches(spec, builder, grad):
    ours, theirs = two_adapters(spec, builder, second=config(r=2, lora_alpha=9))
    names = ["other", "__base__", "default", "other", "__base__"]
    ids = batch(shape=(5, 7))
    with torch.set_grad_enabled(grad):
        mixed = logits(ours, ids, adapter_names=names)
        expected = logits(theirs, ids, adapter_names=names)
    assert relative(mixed, expected) < 1e-6
    if grad:
        mixed.square().mean().backward()
        expected.square().mean().backward()
        mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        peers = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        assert gradient_error(mine, peers) < 5e-6
    with torch.no_grad():
        for row, name in enumerate(names):
            if name == "__base__":
                with ours.disable_adapter():
                    alone = logits(ours, ids[row : row + 1])
            else:
                ours.set_adapter(name)
                alone = logits(ours, ids[row : row + 1])
            assert relative(mixed[row], alone[0]) < 2e-6


@pytest.mark.parametrize("spec", SPECS)
def test_mixed_batches_over_the_vendors_forward(spec):
    model = qft.wrap(llama_quantized(spec), config(), forward="native").eval()
    fill(model)
    with torch.no_grad():
        full = logits(model)
        with model.disable_adapter():
            base = logits(model)
    mixed = logits(model, adapter_names=["default", "__base__"])
    mixed.sum().backward()
    tolerance = 2e-2 if spec == "int8" else 2e-6  # LLM.int8() scales what it rounds by the batch
    assert relative(mixed[0], full[0]) < tolerance
    assert relative(mixed[1], base[1]) < tolerance
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_mixed_batches_refuse_what_plain_peft_refuses():
    ours, _ = two_adapters("nf4")
    with pytest.raises(ValueError, match="nobody"):
        logits(ours, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="Length"):
        logits(ours, adapter_names=["default"])
    ours.train()
    with pytest.raises(ValueError, match="training mode"):
        logits(ours, adapter_names=["default", "default"])
    ours.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        logits(ours, adapter_names=["default", "default"])


# ---- what "all-linear" means ------------------------------------------------------------------------------

HEADS = {"llama": {"lm_head"}, "qwen2": {"lm_head"}, "gpt2": {"lm_head"}, "t5": {"lm_head"}, "plain": set()}


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("skip", [None, r".*(v_proj|c_proj|SelfAttention\.k|blocks\.0\.2)"], ids=["", "skip"])
def test_all_linear_is_every_linear_but_the_head(builder, skip):
    model = BUILDERS[builder]()
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    qft.quantize(model, "nf4", skip=skip, progress=False)
    codes = {n for n, *_ in quantized(model)}
    assert adapted(qft.wrap(model)) == linears - HEADS[builder]
    assert codes < linears if skip or HEADS[builder] else codes == linears


@pytest.mark.parametrize("skip", [["mlp"], r".*\.mlp", ["model.layers.0.mlp", "layers.1.mlp"]], ids=str)
def test_a_skipped_module_is_skipped_with_all_that_is_in_it(skip):
    """Nothing in it is quantized, and it is adapted like any other float layer."""
    float_model = llama()
    model = qft.quantize(llama(), "nf4", skip=skip, progress=False)
    assert {n.split(".")[-2] for n, *_ in quantized(model)} == {"self_attn"}
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, float_model.model.layers[1].mlp.up_proj.weight)
    assert {n for n in adapted(qft.wrap(model)) if ".mlp." in n}


@pytest.mark.parametrize("spec", SPECS)
def test_mixture_of_experts(spec):
    """Skipped experts stay in 16 bit and are named loudly; the router is neither quantized nor adapted."""
    float_model = qwen3_moe()
    experts = {
        n: p.numel() * p.element_size() for n, p in float_model.named_parameters() if p.ndim == 3 and "experts" in n
    }
    assert len(experts) == 4
    model = qft.quantize(copy.deepcopy(float_model), spec, skip=["experts"], progress=False)
    audit = qft.audit(model)
    assert audit.experts == experts
    loud = next(line for line in audit.summary().splitlines() if "ATTENTION" in line)
    assert f"{len(experts)} fused expert weights stay in 16 bit" in loud
    assert next(iter(experts)) in loud
    attention = {n for n, m in float_model.named_modules() if isinstance(m, nn.Linear) and "self_attn" in n}
    assert {n for n, *_ in quantized(model)} == attention

    wrapped = qft.wrap(model, config())
    assert adapted(wrapped) == attention
    state = wrapped.state_dict()
    for name, value in float_model.state_dict().items():
        if ".gate." in name or "experts" in name:
            assert torch.equal(state[f"base_model.model.{name}"], value), name
    ours, theirs = pair(qwen3_moe, spec, config())
    evaluated, trained, gradients = both_errors(ours, theirs)
    assert evaluated < 1e-6
    assert trained < 1e-6
    assert gradients < 5e-6


@pytest.mark.parametrize("spec", SPECS)
def test_classification_heads_stay_float_and_train(spec):
    def classifier(dtype=torch.float32):
        torch.manual_seed(0)
        settings = llama().config
        settings.num_labels, settings.pad_token_id = 3, 0
        return LlamaForSequenceClassification(settings).to(dtype).eval()

    ours, theirs = pair(classifier, spec, config(task_type="SEQ_CLS"))
    assert "score" not in {n for n, *_ in quantized(ours.get_base_model())}
    assert not [n for n in adapted(ours) if "score" in n]
    assert [n for n, p in ours.named_parameters() if p.requires_grad and "score.modules_to_save" in n]
    assert output_error(ours, theirs) < 1e-6


# ---- every door leads to the same layer -------------------------------------------------------------------


def only_ours(model):
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return bool(layers) and all(type(m) is QftLinear for m in layers)


@pytest.mark.parametrize("spec", SPECS)
def test_every_door_builds_our_layer(spec, tmp_path):
    base = llama_quantized(spec)
    wrapped = qft.wrap(copy.deepcopy(base), config(lora_alpha=12))
    fill(wrapped)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = logits(wrapped)

    direct = get_peft_model(copy.deepcopy(base), config(lora_alpha=12)).eval()
    fill(direct)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    added = copy.deepcopy(base)
    added.load_adapter(str(tmp_path))
    second = qft.wrap(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
    second.load_adapter(tmp_path, "again")
    second.set_adapter("again")
    for model in (loaded, added, second.eval()):
        assert only_ours(model)
        with torch.no_grad():
            assert torch.equal(logits(model), expected)
    assert only_ours(direct)
    assert isinstance(direct.base_model, QftLoraModel)


@pytest.mark.parametrize("spec", SPECS)
def test_transformers_own_add_adapter(spec):
    model = llama_quantized(spec)
    with torch.no_grad():
        before = logits(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert only_ours(model)
    _, gradients = loss_and_gradients(model)
    assert len(gradients) == 2 * 2 * 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
        assert relative(logits(model), before) > 1e-3
        model.disable_adapters()
        assert relative(logits(model), before) < (2e-2 if spec == "int8" else 1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("saver", [qft.save, lambda m, folder: m.save_pretrained(folder)], ids=["qft", "transformers"])
def test_adapters_of_transformers_own_add_adapter_are_saved_and_merged(spec, saver, tmp_path):
    model = llama_quantized(spec)
    model.add_adapter(config(lora_alpha=12))
    fill(model)
    with torch.no_grad():
        y = logits(model)
        saver(model, tmp_path)
        assert torch.equal(logits(qft.load(tmp_path, llama_quantized(spec)).eval()), y)
        merged = qft.merge_to_float(model)
        assert relative(logits(merged), y) < 2e-6
        assert not getattr(merged, "_hf_peft_config_loaded", False)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        qft.merge(model)
        assert relative(logits(model), y) > 1e-6
        qft.unmerge(model)
        assert torch.equal(logits(model), y)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_models_that_qft_did_not_mark_get_pefts_own_layers():
    model = get_peft_model(llama(), config())
    kinds = {type(m) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    assert kinds == {peft.tuners.lora.layer.Linear}
    torch.manual_seed(3)
    mine = get_peft_model(llama(), config())
    with stock_peft():
        torch.manual_seed(3)
        theirs = get_peft_model(llama(), config())
    assert type(theirs.base_model) is peft.tuners.lora.LoraModel
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())
    out, gradients = loss_and_gradients(mine)
    other, peers = loss_and_gradients(theirs)
    assert torch.equal(out, other)
    assert all(torch.equal(g, peers[n]) for n, g in gradients.items())


@pytest.mark.parametrize("flag", ["is_loaded_in_4bit", "is_loaded_in_8bit"])
def test_bitsandbytes_models_that_qft_did_not_mark_get_pefts_own_layers(flag):
    model = llama_quantized("nf4" if flag.endswith("4bit") else "int8")
    qft.core.transformers_quantizer.unmark(model)
    setattr(model, flag, True)
    wrapped = get_peft_model(model, config())
    kinds = {type(m).__name__ for m in wrapped.modules() if isinstance(m, BaseTunerLayer)}
    assert kinds == {"Linear4bit" if flag.endswith("4bit") else "Linear8bitLt"}
    assert not any(isinstance(m, QftLinear) for m in wrapped.modules())


# ---- the vendor's forward ---------------------------------------------------------------------------------


NATIVE = [
    (spec, variant)
    for spec in ("nf4", "fp4:double_quant=true", "int8")
    for variant in ("lora", "dora", "lora_bias", "dropout")
    if (spec, variant) != ("int8", "dora")  # PEFT's own loses the scales of a copied layer and raises
]


@pytest.mark.parametrize(("spec", "variant"), NATIVE)
@pytest.mark.parametrize("builder", [llama, qwen2], ids=["llama", "qwen2"])
def test_native_is_plain_peft_over_the_vendors_layers(spec, variant, builder):
    """`forward="native"` over bitsandbytes computes what PEFT's own bitsandbytes layers compute."""
    base = qft.quantize(builder(), spec, progress=False)
    twin = copy.deepcopy(base)
    qft.core.transformers_quantizer.unmark(twin)
    setattr(twin, "is_loaded_in_8bit" if spec == "int8" else "is_loaded_in_4bit", True)
    ours = qft.wrap(base, config(**VARIANTS[variant]), forward="native").eval()
    with stock_peft():
        theirs = get_peft_model(twin, config(**VARIANTS[variant])).eval()
    fill(ours)
    share(ours, theirs)
    evaluated, trained, gradients = both_errors(ours, theirs)
    assert evaluated < 1e-6
    assert trained < 1e-6
    assert gradients < 1e-5


@pytest.mark.parametrize("spec", SPECS)
def test_native_without_an_adapter_is_the_quantized_model(spec):
    model = llama_quantized(spec)
    with torch.no_grad():
        alone = logits(model)
        wrapped = qft.wrap(model, config(), forward="native").eval()
        fill(wrapped)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped), alone)
        native = logits(wrapped)
        for layer in wrapped.modules():
            if isinstance(layer, QftLinear):
                layer.native = False
        exact = qft.get_quantizer(spec).capabilities.exact_forward
        error = relative(logits(wrapped), native)
    assert error < (1e-6 if exact else 2e-2)
    assert exact or error > 1e-4, "LLM.int8() quantizes activations: that must be seen"


# ---- training conditions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "dora", "dropout"])
def test_autocast(spec, variant):
    """Under bf16 autocast over float32: gradients 3 % from float32's own, and no further than 1.5 times PEFT's."""
    ours, theirs = pair(llama, spec, config(**VARIANTS[variant]))
    exact_out, exact = loss_and_gradients(theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, mine = loss_and_gradients(ours)
        other, peers = loss_and_gradients(theirs)
    assert {g.dtype for g in mine.values()} == {torch.float32}
    error, peers_error = _whole_error(mine, exact), _whole_error(peers, exact)
    assert error < 3e-2
    assert error < 1.5 * peers_error
    assert relative(out, exact_out) < max(1.5 * relative(other, exact_out), 1e-2)


def _whole_error(mine, exact):
    assert mine.keys() == exact.keys()
    difference = sum(float((mine[n].double() - g.double()).square().sum()) for n, g in exact.items())
    return (difference / sum(float(g.double().square().sum()) for g in exact.values())) ** 0.5


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("variant", ["lora", "dora", "dropout"])
@pytest.mark.parametrize("builder", [llama, t5], ids=["llama", "t5"])
def test_gradient_checkpointing_changes_no_gradient(spec, reentrant, variant, builder):
    """Recomputed with the same random numbers: outputs and gradients are equal to the bit."""

    def run(checkpointing):
        model = qft.quantize(builder(), spec, progress=False)
        qft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        torch.manual_seed(0)
        model = qft.wrap(model, config(**VARIANTS[variant]))
        assert model.get_base_model().is_gradient_checkpointing == checkpointing
        fill(model)
        return loss_and_gradients(model)

    out, gradients = run(True)
    expected_out, expected = run(False)
    assert torch.equal(out, expected_out)
    assert gradients.keys() == expected.keys()
    if builder is t5:  # the encoder's output feeds every decoder layer, and its gradients are added in another order
        assert gradient_error(gradients, expected) < 2e-6
    else:
        assert all(torch.equal(g, expected[n]) for n, g in gradients.items())
    assert all(g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        (variant, shape)
        for variant in ("lora", "dora", "dropout", "lora_bias")
        for shape in [(0, 64), (2, 0, 64), (64,), (3, 64), (2, 3, 5, 64)]
        if (variant, shape) != ("dora", (64,))  # PEFT's DoRA, which is what computes here, adds a batch dimension
    ],
)
def test_inputs_of_any_shape(spec, variant, shape):
    """As `nn.Linear` takes them: empty batches, no batch dimension, several; gradients have the inputs' shapes."""
    torch.manual_seed(0)
    ours, theirs = pair(lambda dt: nn.Sequential(nn.Linear(64, 32)).to(dt), spec, config(**VARIANTS[variant]))
    if variant == "dropout":
        ours.train(), theirs.train()
    x = torch.randn(shape, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    expected = theirs(twin)
    assert y.shape == expected.shape == (*shape[:-1], 32)
    y.sum().backward()
    expected.sum().backward()
    assert x.grad.shape == shape
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-5, rtol=1e-5)
    peers = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, peers[name].grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", ["lora", "dora", "dropout"])
def test_inputs_that_are_not_contiguous(spec, variant):
    torch.manual_seed(0)
    ours, _ = pair(lambda dt: nn.Sequential(nn.Linear(64, 32)).to(dt), spec, config(**VARIANTS[variant]))
    ours.train()
    wide = torch.randn(6, 64, 10, requires_grad=True)

    def run(x):
        torch.manual_seed(1)
        y = ours(x)
        y.square().sum().backward()
        grads = [wide.grad.clone(), *(p.grad.clone() for p in ours.parameters() if p.requires_grad)]
        wide.grad = None
        ours.zero_grad()
        return y.detach(), grads

    strided = wide.transpose(1, 2)[:, ::2]
    assert not strided.is_contiguous()
    y, grads = run(strided)
    # dropout draws its mask in memory order, which differs between the two: it is compared with itself turned off
    if variant == "dropout":
        kept = {n: m for n, m in ours.named_modules() if isinstance(m, nn.Dropout)}
        assert kept
        ours.eval()
        y, grads = run(strided)
    expected, expected_grads = run(strided.contiguous())
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "wrapped"),
    # bitsandbytes' own forward, without an adapter, returns a view and refuses
    [(spec, wrapped) for spec in SPECS for wrapped in (True, False) if wrapped or "reference" in spec],
)
@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64), (64,)], ids=name_of)
def test_outputs_may_be_changed_in_place(spec, wrapped, shape):
    """As `nn.ReLU(inplace=True)` does behind a layer, while gradients are recorded."""
    torch.manual_seed(0)
    ours, theirs = pair(lambda dt: nn.Sequential(nn.Linear(64, 32)).to(dt), spec, config())
    if not wrapped:
        ours, theirs = ours.unload(), theirs.unload()
    x = torch.randn(shape, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    for model, z in ((ours, x), (theirs, twin)):
        y = model(z)
        torch.nn.functional.relu(y.mul_(2), inplace=True)[..., :7].square().sum().backward()
    assert relative(x.grad, twin.grad) < 1e-6


def test_an_input_that_is_used_twice_and_gradients_that_are_expanded():
    torch.manual_seed(0)
    ours, theirs = pair(lambda dt: nn.Sequential(nn.Linear(64, 64)).to(dt), "nf4", config())
    x = torch.randn(4, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    for model, z in ((ours, x), (theirs, twin)):
        (model(z) + z + model(model(z))).sum().backward()  # sum's gradient is one number, expanded
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_double_backward_is_refused(spec):
    """A second derivative would silently miss terms: it raises instead."""
    torch.manual_seed(0)
    ours, _ = pair(lambda dt: nn.Sequential(nn.Linear(64, 32)).to(dt), spec, config())
    x = torch.randn(3, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_frozen_parts_get_no_gradient_and_cost_none():
    """Only what asks for a gradient gets one: with B frozen, A alone; with a frozen input, none for it."""
    w = torch.randn(32, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4)
    x = torch.randn(5, 64)
    asked = []

    def dequantize(dtype):
        asked.append(dtype)
        return w.to(dtype)

    y = lora_linear(x, dequantize, None, [Update(a, b, 0.5)])
    assert asked == [torch.float32]
    y.sum().backward()
    assert asked == [torch.float32], "the backward dequantizes only where the input needs a gradient"
    torch.testing.assert_close(a.grad, 0.5 * (b.sum(0)[:, None] * x.sum(0)[None]), atol=1e-4, rtol=1e-5)
    assert b.grad is None


@pytest.mark.parametrize("spec", SPECS)
def test_the_backward_keeps_no_float_weight(spec):
    """Between forward and backward nothing of the weight's size is kept, whatever the model's depth."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    ours = qft.quantize_and_wrap(model, spec, adapter=config(r=2), progress=False)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ours.train()(torch.randn(8, 512))
    assert kept
    assert max(t.numel() for t in kept) <= 8 * 512
    y.sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_adapters_that_are_kept_in_sixteen_bit():
    """PEFT's `autocast_adapter_dtype=False` is honoured: adapters in the base's dtype train, too."""
    model = get_peft_model(
        qft.quantize(llama(torch.bfloat16), "nf4", progress=False), config(), autocast_adapter_dtype=False
    )
    fill(model)
    _, gradients = loss_and_gradients(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {g.dtype for g in gradients.values()} == {torch.bfloat16}
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())


def test_the_layer_says_what_it_is():
    model = qft.wrap(llama_quantized("nf4"), LoraConfig(r=4, target_modules=["q_proj"]))
    text = repr(model.base_model.model.model.layers[0].self_attn.q_proj)
    assert text.startswith("qft.lora.QftLinear(")
    assert "Linear4bit" in text
    assert (
        relative(
            model.base_model.model.model.layers[0].self_attn.q_proj.weight,
            llama().model.layers[0].self_attn.q_proj.weight,
        )
        < 0.12
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_a_copy_computes_from_its_own_weights(adapted):
    """Copies, and replicas of DataParallel, whose base layers are replicas, too."""
    model = qft.quantize(llama(), "reference", progress=False)
    layer = model.model.layers[0].mlp.up_proj
    if adapted:
        layer = qft.wrap(model, LoraConfig(r=4, target_modules="all-linear")).get_submodule(
            "base_model.model.model.layers.0.mlp.up_proj"
        )
    x = torch.randn(3, 64)
    before = layer(x)
    replica = layer._replicate_for_data_parallel()
    replica._parameters = dict(layer._parameters)
    if adapted:
        replica._modules["base_layer"] = copy.deepcopy(layer.base_layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), replica):
        base = copied.base_layer if adapted else copied
        base._parameters["absmax"] = nn.Parameter(base.absmax * 2, requires_grad=False)
        assert torch.equal(copied(x), 2 * before)
    assert torch.equal(layer(x), before)

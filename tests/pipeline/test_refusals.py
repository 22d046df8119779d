"""Bad input: every refusal says what to do, is the builtin that fits, and leaves the model as it was, to the bit."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from helpers import BUILTIN, Rows, refuses, run_python, unchanged
from models import batch, gpt2, llama, logits, plain, qwen2, relative, train_a_little
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import qft

ALL = "all-linear"


def lora(loftq=None, **options):
    config = LoraConfig(**{"r": 4, "target_modules": ALL, **options})
    if loftq is not None:  # as LoraConfig(init_lora_weights="loftq", loftq_config=...) does where scipy is installed
        config.init_lora_weights, config.loftq_config = "loftq", loftq
    return config


def quantized(spec="reference", model=None):
    return qft.quantize(llama() if model is None else model, spec, progress=False)


def in_use(model):
    """As a model may be when it is handed over: training, partly frozen, with hooks."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # outputs are compared
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and ("norm" in name or "layers.1" in name))
    model.register_forward_pre_hook(lambda module, args: None)
    return model


def test_the_error_tree_is_the_one_of_the_design():
    found = {e for e in vars(qft).values() if isinstance(e, type) and issubclass(e, qft.QftError)}
    assert found == {qft.QftError, *BUILTIN}
    assert all(issubclass(error, builtin) for error, builtin in BUILTIN.items())
    assert issubclass(qft.QftWarning, UserWarning)


def test_the_comparison_sees_what_it_is_there_to_see():
    def replaced(model):
        model.model.layers[0].mlp.up_proj = copy.deepcopy(model.model.layers[0].mlp.up_proj)

    changes = [
        lambda m: m.model.layers[1].mlp.up_proj.weight.data[3, 4].add_(1e-7),
        lambda m: m.model.norm.weight.requires_grad_(False),
        lambda m: m.model.layers[0].eval(),
        lambda m: m.model.embed_tokens.register_forward_hook(lambda *args: None),
        lambda m: setattr(m, "is_quantized", True),
        lambda m: setattr(m.config, "quantization_config", {}),
        lambda m: m.model.layers[0].mlp.up_proj.register_buffer("extra", torch.zeros(1)),
        lambda m: setattr(
            m.model.layers[1].mlp.up_proj, "weight", nn.Parameter(m.model.layers[1].mlp.up_proj.weight.data)
        ),
        replaced,
    ]
    for change in changes:
        model = in_use(llama())
        with pytest.raises(AssertionError), unchanged(model):
            change(model)
    with unchanged(model):
        pass


# ---- quantize: names, options, devices, weights -----------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "error", "says"),
    [
        ("nf5", {}, qft.UnknownQuantizer, ["'nf5'", "did you mean nf4"]),
        ("", {}, qft.UnknownQuantizer, ["known: nf4"]),
        ({"*.mlp.*": "nf5", "*": "nf4"}, {}, qft.UnknownQuantizer, ["'nf5'"]),
        ("nf4:bits=3", {}, qft.BadOption, ["'bits'", "block_size"]),
        ("nf4:block_size", {}, qft.BadOption, ["key=value"]),
        (None, {}, qft.BadOption, ["'nf4'"]),
        ("nf4", {"skip": ["nope"]}, qft.BadOption, ["'nope'"]),
        ("nf4", {"skip": "("}, qft.BadOption, ["regular expression"]),
        ("nf4", {"skip": [3]}, qft.BadOption, ["list of module names"]),
        ("nf4", {"dtype": "bfloat16"}, qft.BadOption, ["dtype", "a model was given"]),
        ("nf4", {"nonsense": 3}, qft.BadOption, ["nonsense"]),
        ("nf4", {"skip": ".*"}, qft.NoTargets, ["LlamaForCausalLM", "skipped by the caller"]),
        ({"*.nope.*": "nf4"}, {}, qft.NoTargets, ["no pattern asks for it"]),
        ({"*": None}, {}, qft.NoTargets, ["no pattern asks for it"]),
        ("nf4", {"device": "tpu"}, qft.UnsupportedDevice, ["'tpu'"]),
        ("nf4", {"device": 3.5}, qft.UnsupportedDevice, ["3.5"]),
        ("nf4", {"device": "meta"}, qft.UnsupportedDevice, ["meta"]),
        ("nf4", {"device": "cuda:99"}, qft.UnsupportedDevice, ["cuda:99", "device='cpu'"]),
        ("reference:format=int,group_size=128", {}, qft.BadShape, ["layers.0.self_attn.q_proj", "64", "128", "skip"]),
        ("reference:format=int,group_size=48", {}, qft.BadShape, ["layers.0.self_attn.q_proj", "48"]),
        (
            {"*.1.mlp.down_proj": "reference:format=int,group_size=96", "*": "nf4"},
            {},
            qft.BadShape,
            ["model.layers.1.mlp.down_proj", "128", "96"],
        ),
    ],
)
def test_quantize_refuses_before_the_first_weight_changes(spec, options, error, says):
    model = in_use(llama())
    with refuses(error, *says, model=model):
        qft.quantize(model, spec, progress=False, **options)
    with refuses(error, *says, model=model):
        qft.quantize_and_wrap(model, spec, progress=False, **options)
    assert qft.audit(quantized(model=model)).weights  # and nothing stands in the way afterwards


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA: there is nothing to refuse")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_cuda_without_one(device):
    model = llama()
    with refuses(qft.UnsupportedDevice, "cuda", "0 CUDA devices", "device='cpu'", model=model):
        qft.quantize(model, "nf4", device=device)


@pytest.mark.parametrize("device", ["xpu", "mps", "hpu"])
def test_other_accelerators_without_one(device):
    kind = getattr(torch, device, None)
    if kind is not None and kind.is_available():
        pytest.skip(f"this machine has {device}")
    model = llama()
    with refuses(qft.UnsupportedDevice, device, model=model):
        qft.quantize(model, "reference", device=device)


def test_what_is_no_model():
    for thing in (None, 3, ["folder"], llama):
        with refuses(qft.BadOption, "a torch module, a folder or a hub id"):
            qft.quantize(thing)
    for verb in (qft.wrap, qft.merge, qft.unmerge, qft.merge_to_float, qft.audit):
        with refuses(qft.BadOption, "a torch module, not a str"):
            verb("model")


def test_a_model_without_linear_layers():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())
    with refuses(qft.NoTargets, "Sequential", "no linear layers", model=model, outputs=False):
        qft.quantize(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference:format=int,bits=3"])
def test_weights_that_are_not_finite_are_named(value, spec):
    model = llama()
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data[3, 5] = value
    with refuses(qft.NonFiniteWeights, "model.layers.1.mlp.down_proj.weight", "skip=", model=model):
        qft.quantize(model, spec, progress=False)
    with refuses(qft.NonFiniteWeights, "model.layers.1.mlp.down_proj.weight", model=model):
        qft.quantize_and_wrap(model, spec, init="loftq", progress=False)
    qft.quantize(model, spec, skip=["layers.1.mlp.down_proj"], progress=False)


def test_a_finite_weight_whose_sum_overflows_is_no_refusal():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    model[0].weight.data[:] = 3e38
    assert qft.audit(quantized(model=model)).weights


@pytest.mark.parametrize("spec", ["nf4", "reference", "int8"])
def test_models_on_the_meta_device(spec):
    with torch.device("meta"):
        model = llama()
    with refuses(qft.UnsupportedDevice, "q_proj.weight", "meta", "folder", model=model, outputs=False):
        qft.quantize(model, spec, progress=False)
    with refuses(qft.UnsupportedDevice, "meta", model=model, outputs=False):
        qft.quantize_and_wrap(model, spec, progress=False)
    half = llama()
    half.model.layers[1].mlp.up_proj.to("meta")
    with refuses(qft.UnsupportedDevice, "model.layers.1.mlp.up_proj.weight", model=half, outputs=False):
        qft.quantize(half, spec, progress=False)


def test_widths_that_no_group_size_fits_are_named_and_codebooks_take_them():
    def odd():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 64))

    model = odd()
    with refuses(qft.BadShape, "1 has in_features 40", "group_size", "skip", model=model, outputs=False):
        qft.quantize(model, "reference:format=int", progress=False)
    assert qft.audit(quantized("reference:format=int,group_size=8", odd())).weights
    for spec in ("nf4", "reference"):
        assert len(qft.audit(quantized(spec, odd())).weights) == 2


@dataclass(frozen=True)
class NeedsData(Rows):
    name: ClassVar[str] = "needs-data"

    @property
    def capabilities(self):
        return replace(super().capabilities, needs_calibration=True)


@dataclass(frozen=True)
class CudaOnly(Rows):
    name: ClassVar[str] = "cuda-only"

    @property
    def capabilities(self):
        return replace(super().capabilities, devices=frozenset({"cuda"}))


def test_capabilities_that_rule_a_run_out():
    model = llama()
    with refuses(qft.NeedsCalibration, "NeedsData", "calibration=", model=model):
        qft.quantize(model, NeedsData(), progress=False)
    with refuses(qft.UnsupportedDevice, "CudaOnly", "'cpu'", "cuda", "reference", model=model):
        qft.quantize(model, CudaOnly(), progress=False)
    with refuses(qft.UnsupportedDevice, "CudaOnly", model=model):
        qft.quantize(model, {"*.1.*": CudaOnly(), "*": "reference"}, progress=False)


# ---- already quantized ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [
        ("nf4", ["nf4", qft.BitsAndBytes4bit(), "nf4:compute_dtype=bfloat16"], ["fp4", "int8", "reference"]),
        ("nf4:double_quant=true", ["nf4:double_quant=true"], ["nf4", "nf4:double_quant=true,block_size=128"]),
        ("int8", ["int8"], ["nf4"]),
        ("reference", ["reference:group_size=64"], ["nf4", "reference:group_size=32", "reference:format=int"]),
        (
            "reference:format=int,bits=3",  # its open group size became 64: the spec that left it open still fits
            ["reference:format=int,bits=3", "reference:format=int,bits=3,group_size=64"],
            ["reference:format=int,bits=3,group_size=32", "reference:format=int,bits=4"],
        ),
        ({"*.mlp.*": "int8", "*": "nf4"}, [{"*.mlp.*": "int8", "*": "nf4"}], ["nf4", {"*": None}]),
    ],
)
def test_quantizing_again(first, same, other):
    model = quantized(first)
    for spec in same:
        with unchanged(model), pytest.warns(qft.QftWarning, match="already") as caught:
            assert qft.quantize(model, spec, progress=False) is model
        assert len(caught) == 1 and caught[0].filename == __file__
    for spec in other:
        with refuses(qft.AlreadyQuantized, "model.layers.0.", "float model", model=model):
            qft.quantize(model, spec, progress=False)
        with refuses(qft.AlreadyQuantized, "model.layers.0.", model=model):
            qft.quantize_and_wrap(model, spec, progress=False)


def test_a_wrapped_model_is_quantized_already_too():
    model = qft.wrap(quantized())
    with refuses(qft.AlreadyQuantized, "Reference", model=model):
        qft.quantize(model, "nf4", progress=False)
    float_with_adapter = get_peft_model(llama(), LoraConfig(r=4, target_modules=ALL))
    for thing in (float_with_adapter, float_with_adapter.get_base_model()):
        with refuses(qft.BadOption, "quantize first, then wrap", model=thing):
            qft.quantize(thing, "nf4", progress=False)


# ---- adapters: through quantize_and_wrap over floats, and through wrap over quantized weights --------------


def both_doors(spec="reference", model=llama):
    """(verb, model) for the two ways in."""
    float_model, quantized_model = in_use(model()), in_use(quantized(spec, model()))
    return [
        (lambda adapter=None, **k: qft.quantize_and_wrap(float_model, spec, adapter=adapter, progress=False, **k), float_model),
        (lambda adapter=None, **k: qft.quantize_and_wrap(quantized_model, spec, adapter=adapter, progress=False, **k),
         quantized_model),
        (lambda adapter=None, **k: qft.wrap(quantized_model, adapter, **k), quantized_model),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"r": 0}, qft.BadShape, ["rank", "positive", "0"]),
        ({"r": -4}, qft.BadShape, ["rank", "-4"]),
        ({"r": 4.0}, qft.BadShape, ["rank", "4.0"]),
        ({"r": True}, qft.BadShape, ["rank", "True"]),
        ({"r": 65}, qft.BadShape, ["rank 65", "model.layers.0.self_attn.q_proj", "64 × 64"]),
        ({"r": 40, "target_modules": ["k_proj"]}, qft.BadShape, ["rank 40", "k_proj", "32 × 64"]),
        ({"r": 4, "rank_pattern": {"up_proj": 100}}, qft.BadShape, ["rank 100", "up_proj", "128 × 64"]),
        ({"r": 4, "rank_pattern": {"up_proj": 0}}, qft.BadShape, ["rank", "0"]),
        ({"target_modules": ["nope"]}, qft.NoTargets, ["nope", "q_proj", "all-linear"]),
        ({"target_modules": "nope"}, qft.NoTargets, ["nope", "all-linear"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, qft.NoTargets, ["q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, qft.NoTargets, ["q_proj"]),
        ({"target_modules": "((q_proj"}, qft.BadOption, ["regular expression"]),
        ({"target_modules": ["q_proj", "input_layernorm"]}, qft.BadOption, ["input_layernorm", "LlamaRMSNorm"]),
        ({"target_modules": ["mlp"]}, qft.BadOption, ["layers.0.mlp", "LlamaMLP"]),
        ({"lora_dropout": 2.0}, qft.BadOption, ["dropout"]),
        ({"bias": "some"}, qft.BadOption, ["PEFT does not take"]),
        ({"modules_to_save": ["up_proj"]}, qft.UnsupportedOperation, ["modules_to_save", "up_proj", "skip="]),
    ],
)
def test_adapter_configs_that_cannot_be(options, error, says):
    for verb, model in both_doors():
        config = LoraConfig(**{"r": 4, "target_modules": ALL, **options})
        with refuses(error, *says, model=model):
            verb(config)


def test_target_modules_left_open():
    """PEFT's default for the kind of model, or a refusal that says what to write."""
    for door in range(3):
        wrapped = both_doors()[door][0](LoraConfig(r=4))
        assert wrapped.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    for verb, model in both_doors(model=plain):
        with refuses(qft.NoTargets, "target_modules", "Plain", "all-linear", model=model):
            verb(LoraConfig(r=4))


@pytest.mark.parametrize("adapter", ["lora", {"r": 4}, LoraConfig, 3])
def test_adapters_that_are_no_config(adapter):
    for verb, model in both_doors():
        with refuses(qft.BadOption, "LoraConfig(", model=model):
            verb(adapter)


@pytest.mark.parametrize("options", [{"forward": "vendor"}, {"forward": None}])
def test_a_forward_that_is_not_known(options):
    for verb, model in both_doors():
        with refuses(qft.BadOption, "dequantize or native", model=model):
            verb(**options)


REFUSED_METHODS = [("GloraConfig", {"r": 4}), ("OSFConfig", {"effective_rank": 4})]


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
@pytest.mark.parametrize(("name", "options"), REFUSED_METHODS, ids=[n for n, _ in REFUSED_METHODS])
def test_methods_that_peft_gets_wrong_are_refused_before_anything_is_wrapped(name, options, spec):
    if not hasattr(peft, name):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    config = getattr(peft, name)(target_modules=["q_proj"], **options)
    for verb, model in METHOD_DOORS.setdefault(spec, both_doors(spec)):
        with refuses(qft.UnsupportedOperation, config.peft_type.value, "LoRA works", model=model):
            verb(config)


METHOD_DOORS: dict[str, Any] = {}


@pytest.mark.parametrize(
    "config",
    [
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        peft.VeraConfig(target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_configs_of_other_methods_that_do_not_fit(config):
    for verb, model in both_doors("nf4"):
        bad = type(config)(**{**config.to_dict(), "target_modules": ["nope"]})
        with refuses(qft.NoTargets, "nope", model=model):
            verb(bad)
        with refuses(qft.BadOption, "init='loftq' is for LoRA", model=model):
            verb(config, init="loftq")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arrow_config", ArrowConfig(top_k=1)),
        ("use_bdlora", BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
        ("alora_invocation_tokens", [1, 2]),
        ("velora_config", VeloraConfig()),
        ("monteclora_config", MontecloraConfig()),
        ("kasa_config", KasaConfig()),
        ("layer_replication", [(0, 2), (1, 2)]),
        ("megatron_config", {"tensor_model_parallel_size": 1}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_lora_variants_that_need_float_weights(field, value):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **{field: value})
    for verb, model in both_doors():
        with refuses(qft.UnsupportedOperation, field, "rsLoRA and DoRA", model=model):
            verb(config)


# ---- inits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["corda", "lora_ga", "mica", "no such init"])
@pytest.mark.filterwarnings("ignore")
def test_inits_that_rewrite_the_base(name):
    for verb, model in both_doors():
        with refuses(qft.BadOption, repr(name), "loftq", model=model):
            verb(LoraConfig(r=4, target_modules=ALL, init_lora_weights=name))
        with refuses(qft.BadOption, repr(name), "loftq", model=model):
            verb(LoraConfig(r=4, target_modules=ALL), init=name)


@pytest.mark.parametrize("init", [3, object, LoraConfig(), {"loftq": 1}])
def test_what_is_no_init(init):
    for verb, model in both_doors():
        with refuses(qft.BadOption, "is no init", "qft.LoftQ", model=model):
            verb(init=init)


@pytest.mark.parametrize("spec", ["int8", "reference:format=int,bits=3"])
def test_loftq_bits_are_those_of_the_quantizer(spec):
    bits = f"{qft.capabilities(spec).bits:g}"
    config = lora(loftq={"loftq_bits": 4})
    float_model, model = llama(), quantized(spec)
    with refuses(qft.BadOption, "loftq_bits=4", bits, model=float_model):
        qft.quantize_and_wrap(float_model, spec, adapter=config, progress=False)
    with refuses(qft.BadOption, "loftq_bits=4", bits, model=model):
        qft.wrap(model, config, original=llama())


@pytest.mark.parametrize(
    ("config", "init", "says"),
    [
        (lora(loftq={"loftq_rank": 4}), None, ["loftq_rank", "loftq_iter"]),
        (lora(loftq={"loftq_iter": 0}), None, ["steps=0"]),
        (lora(loftq={"loftq_iter": "5"}), None, ["steps='5'"]),
        (lora(lora_alpha=0), "loftq", ["lora_alpha is 0"]),
        (lora(alpha_pattern={"q_proj": 0}), "loftq", ["lora_alpha is 0"]),
    ],
)
def test_loftq_options_that_cannot_be(config, init, says):
    float_model, model = llama(), quantized()
    with refuses(qft.BadOption, *says, model=float_model):
        qft.quantize_and_wrap(float_model, "reference", adapter=config, init=init, progress=False)
    with refuses(qft.BadOption, *says, model=model):
        qft.wrap(model, config, init=init, original=llama())


def test_inits_that_need_the_original():
    model = quantized()
    for call in (
        lambda: qft.wrap(model, init="loftq"),
        lambda: qft.wrap(model, init=qft.LoftQ(steps=3)),
        lambda: qft.wrap(model, lora(loftq={"loftq_bits": 4})),
        lambda: qft.quantize_and_wrap(model, "reference", init="loftq", progress=False),
    ):
        with refuses(qft.NeedsOriginal, "original=", "quantize_and_wrap", model=model):
            call()


@pytest.mark.parametrize("init", ["loftq", qft.LoftQ(steps=3)])
def test_originals_that_are_not_the_original(init, tmp_path):
    """Also where a later layer is the first to differ: iterated LoftQ changes the base, and all of it comes back."""
    model = quantized()
    almost = llama()
    almost.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    with refuses(qft.AdapterMismatch, "model.layers.1.mlp.down_proj", model=model):
        qft.wrap(model, init=init, original=almost)
    with refuses(qft.AdapterMismatch, "q_proj", model=model):
        qft.wrap(model, init=init, original=llama(seed=1))
    with refuses(qft.BadOption, "has no layer", model=model):
        qft.wrap(model, init=init, original=plain())
    with refuses(qft.BadOption, "quantized itself", model=model):
        qft.wrap(model, init=init, original=quantized())
    with refuses(qft.BadOption, "its folder", model=model):
        qft.wrap(model, init=init, original=3)
    with refuses(qft.BadFolder, "nowhere", model=model):
        qft.wrap(model, init=init, original=tmp_path / "nowhere")
    llama().save_pretrained(tmp_path / "cut")
    cut(tmp_path / "cut" / "model.safetensors")
    with refuses(qft.BadFolder, "cut", model=model):
        qft.wrap(model, init=init, original=tmp_path / "cut")


def test_iterated_loftq_without_a_fingerprint_comes_back_whole():
    """A model that somebody else quantized has no fingerprint: the misfit shows at its layer, halfway."""
    model = quantized()
    model._qft.fingerprint.clear()
    original = llama()
    original.model.layers[1].mlp.down_proj = nn.Linear(64, 64, bias=False)
    with refuses(qft.AdapterMismatch, "model.layers.1.mlp.down_proj", "(64, 64)", model=model):
        qft.wrap(model, init=qft.LoftQ(steps=2), original=original)


@dataclass(frozen=True)
class ReadOnly(Rows):
    """Weights that can be read and never stored again, as where the vendor has no quantizer."""

    name: ClassVar[str] = "read-only"

    @property
    def capabilities(self):
        return replace(super().capabilities, requantize=False)

    requantize, snapshot, restore = qft.Quantizer.requantize, qft.Quantizer.snapshot, qft.Quantizer.restore


@dataclass(frozen=True)
class Opaque(ReadOnly):
    """Weights that cannot even be read."""

    name: ClassVar[str] = "opaque"

    @property
    def capabilities(self):
        return replace(super().capabilities, dequantize=False)


def test_inits_that_the_backend_cannot_do():
    model = llama()
    for init in (qft.LoftQ(steps=2), lora(loftq={"loftq_iter": 2})):
        options = {"adapter": init} if isinstance(init, LoraConfig) else {"init": init}
        with refuses(qft.UnsupportedOperation, "ReadOnly", "iterated_loftq", "qft.LoftQ()", model=model):
            qft.quantize_and_wrap(model, ReadOnly(), progress=False, **options)
    with refuses(qft.UnsupportedOperation, "Opaque", "as floats", model=model):
        qft.quantize_and_wrap(model, Opaque(), init="loftq", progress=False)
    model = quantized(ReadOnly(), model)
    with refuses(qft.UnsupportedOperation, "iterated_loftq", model=model):
        qft.wrap(model, init=qft.LoftQ(steps=2), original=llama())
    assert qft.wrap(model, init="loftq", original=llama()).peft_config  # one step stores nothing back


# ---- verbs in the wrong order -----------------------------------------------------------------------------


def test_verbs_over_models_that_are_not_what_they_need(tmp_path):
    float_model, bare, wrapped = in_use(llama()), in_use(quantized()), qft.wrap(quantized())
    with refuses(qft.BadOption, "qft.quantize first", "quantize_and_wrap", model=float_model):
        qft.wrap(float_model)
    with refuses(qft.BadOption, "adapters already", "add_adapter", model=wrapped):
        qft.wrap(wrapped)
    with refuses(qft.BadOption, "adapters already", "add_adapter", model=wrapped.get_base_model()):
        qft.wrap(wrapped.get_base_model())
    for thing in (wrapped, wrapped.get_base_model()):
        with refuses(qft.BadOption, "adapters already", "add_adapter", model=thing):
            qft.quantize_and_wrap(thing, "reference", progress=False)
    for verb in (qft.merge, qft.unmerge):
        with refuses(qft.BadOption, "no adapters", "qft.wrap", model=bare):
            verb(bare)
        with refuses(qft.BadOption, "no adapters", model=float_model):
            verb(float_model)
    with refuses(qft.BadOption, "float model already", model=float_model):
        qft.merge_to_float(float_model)
    with refuses(qft.BadOption, "not quantized", model=float_model):
        qft.audit(float_model)
    for thing in (bare, float_model):
        with refuses(qft.BadOption, "wrap it first", "save_pretrained", model=thing):
            qft.save(thing, tmp_path / "adapter")
    with refuses(qft.BadOption, "none, norms or all", model=bare):
        qft.prepare_model_for_kbit_training(bare, upcast="some")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["junk", "int8", torch.uint8, torch.bool, "float", 16])
def test_dtypes_that_are_none(dtype, tmp_path):
    if dtype == "float":
        dtype = "Tensor"  # an attribute of torch, and no dtype
    model = qft.wrap(quantized())
    with refuses(qft.BadOption, "bfloat16", model=model):
        qft.merge_to_float(model, dtype=dtype)
    llama().save_pretrained(tmp_path)
    if dtype != 16:
        for verb in (qft.quantize, qft.quantize_and_wrap):
            with refuses(qft.BadOption, "bfloat16"):
                verb(tmp_path, dtype=dtype, progress=False)
    float_model = llama()
    with refuses(qft.BadOption, "dtype", model=float_model):
        qft.quantize_and_wrap(float_model, dtype=dtype)


# ---- merging ----------------------------------------------------------------------------------------------


def tuned(spec="reference", model=llama, **options):
    model = qft.quantize_and_wrap(
        model(), spec, adapter=lora(**options), use_gradient_checkpointing=False, progress=False
    )
    return train_a_little(model)


MERGES = [
    qft.merge,
    qft.merge_to_float,
    lambda model: model.merge_adapter(),
    lambda model: model.merge_adapter(safe_merge=True),
    lambda model: model.merge_and_unload(),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_broken_adapters_are_not_merged(where, value):
    model = tuned(use_dora=where == "lora_magnitude_vector")
    parameter = next(p for n, p in reversed(list(model.named_parameters())) if where in n)
    parameter.data.view(-1)[3] = value
    for merge in MERGES:
        with refuses(qft.NonFiniteWeights, "nothing was merged", model=model):
            merge(model)


def test_a_broken_lora_bias_is_not_merged():
    model = tuned(model=qwen2, lora_bias=True, target_modules=["q_proj", "v_proj"])
    next(p for n, p in model.named_parameters() if "lora_B" in n and n.endswith("bias")).data[0] = float("nan")
    for merge in MERGES:
        with refuses(qft.NonFiniteWeights, model=model):
            merge(model)


def test_a_lora_bias_without_a_bias_to_merge_it_into():
    model = tuned(lora_bias=True)
    for merge in MERGES:
        with refuses(qft.UnsupportedOperation, "lora_bias", "no bias", model=model):
            merge(model)


@pytest.mark.parametrize("spec", ["reference", "nf4", "int8"])
def test_finite_adapters_whose_product_overflows_are_not_merged(spec):
    """The last layer shows it, when all the others are merged: they are unmerged again."""
    model = tuned(spec)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    for matrix in (layer.lora_A, layer.lora_B):
        matrix["default"].weight.data.fill_(1e30)
    for merge in MERGES:
        with refuses(qft.NonFiniteWeights, model=model):
            merge(model)


def test_an_update_that_the_format_cannot_hold_is_not_merged():
    """LLM.int8() quantizes through float16: 1e5 is finite, and would be stored as infinity."""
    model = tuned("int8")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.lora_A["default"].weight.data.fill_(1e3)
    layer.lora_B["default"].weight.data.fill_(1e3)
    for merge in (qft.merge, lambda m: m.merge_adapter()):
        with refuses(qft.NonFiniteWeights, "nothing was merged", model=model):
            merge(model)
    with refuses(qft.NonFiniteWeights, "float16", "dtype=torch.float32", model=model):
        qft.merge_to_float(model, dtype="float16")


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_second_merge_that_fails_keeps_the_first(value):
    """Refused at once for NaN; for a product that overflows, at the last of the layers."""
    model = tuned()
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data.fill_(value if "layers.1.mlp.down_proj" in name else 0.01)
    model.merge_adapter(["default"])

    def merged():
        return [list(m.merged_adapters) for m in model.modules() if hasattr(m, "merged_adapters")]

    assert merged() == [["default"]] * 14
    for merge in (qft.merge, lambda m: m.merge_adapter(["second"])):
        with refuses(qft.NonFiniteWeights, "nothing was merged", model=model, outputs=False):
            merge(model)
        assert merged() == [["default"]] * 14
    qft.unmerge(model)
    assert torch.equal(
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.qweight,
        quantized().model.layers[0].mlp.up_proj.qweight,
    )


def test_merges_that_the_backend_cannot_do():
    model = tuned(ReadOnly())
    for merge in (qft.merge, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()):
        with refuses(qft.UnsupportedOperation, "ReadOnly", "merge_to_quantized", "merge_to_float works", model=model):
            merge(model)
    with torch.no_grad():
        assert relative(logits(qft.merge_to_float(model)), logits(model)) < 1e-5
    model = qft.wrap(quantized(Opaque()), lora())
    with refuses(qft.UnsupportedOperation, "Opaque", "merge_to_float", model=model):
        qft.merge_to_float(model)
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = qft.wrap(quantized("nf4"), config)
    for merge in (qft.merge, qft.unmerge):
        with refuses(qft.UnsupportedOperation, "PROMPT_TUNING", "changes no weight", model=model, outputs=False):
            merge(model)


def test_a_merged_model_is_not_saved_as_an_adapter(tmp_path):
    model = tuned()
    qft.merge(model)
    with refuses(qft.BadOption, "merged into 14 weights", "qft.unmerge", model=model):
        qft.save(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


# ---- interrupted runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stops(Rows):
    """Raises in the middle of a run, at the layer that `at` says."""

    name: ClassVar[str] = "stops"
    at: int = 3
    error: Any = None
    seen: ClassVar[list[int]] = []

    def pack(self, weight, *, statistics=None):
        self.seen.append(1)
        if len(self.seen) == self.at and self.error is not None:
            raise self.error("stopped here")
        return super().pack(weight)


INTERRUPTIONS = [KeyboardInterrupt, torch.OutOfMemoryError, MemoryError]


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_after_an_interrupted_run_every_verb_says_so(error, tmp_path):
    qft.save(qft.wrap(quantized(), lora()), tmp_path / "adapter")
    model = llama()
    Stops.seen.clear()
    with pytest.raises(error, match="stopped here"):
        qft.quantize(model, Stops(error=error), progress=False)
    says = ["partly quantized", "14 layers", error.__name__, "after 2", "load the float model"]
    verbs = {
        "quantize": lambda: qft.quantize(model, "nf4", progress=False),
        "quantize as before": lambda: qft.quantize(model, Stops(), progress=False),
        "quantize_and_wrap": lambda: qft.quantize_and_wrap(model, "nf4", progress=False),
        "prepare": lambda: qft.prepare_model_for_kbit_training(model),
        "wrap": lambda: qft.wrap(model),
        "get_peft_model": lambda: get_peft_model(model, lora()),
        "merge": lambda: qft.merge(model),
        "unmerge": lambda: qft.unmerge(model),
        "merge_to_float": lambda: qft.merge_to_float(model),
        "save": lambda: qft.save(model, tmp_path / "new"),
        "load": lambda: qft.load(tmp_path / "adapter", model),
        "audit": lambda: qft.audit(model),
        "original": lambda: qft.audit(quantized(), original=model),
    }
    for verb in verbs.values():
        with refuses(qft.PartlyQuantized, *says, model=model):
            verb()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_quantize_and_wrap_marks_an_interrupted_model_too(error):
    model = llama()
    Stops.seen.clear()
    with pytest.raises(error, match="stopped here"):
        qft.quantize_and_wrap(model, Stops(error=error), init="loftq", progress=False)
    with refuses(qft.PartlyQuantized, error.__name__, model=model):
        qft.wrap(model)


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_a_run_that_ends_before_its_first_layer_leaves_a_float_model(error):
    model = in_use(llama())
    Stops.seen.clear()
    with unchanged(model), pytest.raises(error, match="stopped here"):
        qft.quantize(model, Stops(at=1, error=error), progress=False)
    assert qft.audit(quantized(model=model)).weights


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_an_interrupted_load_leaves_nothing_behind(error, tmp_path):
    llama().save_pretrained(tmp_path)
    Stops.seen.clear()
    with pytest.raises(error, match="stopped here"):
        qft.quantize(tmp_path, Stops(error=error), progress=False)
    Stops.seen.clear()
    model = qft.quantize(tmp_path, Stops(), progress=False)
    assert len(qft.audit(model).weights) == 14


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("merge", MERGES)
def test_an_interrupted_merge_is_taken_back(merge, error):
    Stops.seen.clear()
    model = tuned(Stops(at=14 + 9, error=error))
    with unchanged(model), pytest.raises(error, match="stopped here"):
        merge(model)
        raise error("stopped here")  # merging to float packs nothing


# ---- saving -----------------------------------------------------------------------------------------------


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), qft.BadFolder)],
)
@pytest.mark.parametrize("there_before", [True, False])
def test_a_save_that_is_interrupted_leaves_the_old_files(error, raised, there_before, tmp_path, monkeypatch):
    """PEFT's files are written when the interruption comes, and none of them is seen."""
    model, folder = tuned(), tmp_path / "adapter"
    if there_before:
        qft.save(model, folder, base=True)
        (folder / "notes.txt").write_text("mine")
    before = files(tmp_path)
    train_a_little(model)
    save_pretrained = PeftModel.save_pretrained

    def interrupted(self, *args, **kwargs):
        save_pretrained(self, *args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", interrupted)
        with unchanged(model), pytest.raises(raised):
            qft.save(model, folder, base=True)
    assert files(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["adapter"] if there_before else [])
    qft.save(model, folder)
    assert torch.equal(logits(qft.load(folder, quantized())), logits(model))
    assert (folder / "notes.txt").exists() == there_before


KILLED = """
    import os, signal, sys, torch
    sys.path.insert(0, sys.argv[2])
    import qft
    from models import llama
    from peft import PeftModel

    save_pretrained = PeftModel.save_pretrained

    def killed(self, *args, **kwargs):
        save_pretrained(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    PeftModel.save_pretrained = killed
    model = qft.quantize_and_wrap(llama(seed=1), "reference", progress=False)
    qft.save(model, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_save_whose_process_is_killed_leaves_the_old_files_and_the_next_one_cleans_up(tmp_path):
    model, folder = tuned(), tmp_path / "adapter"
    qft.save(model, folder)
    before = files(folder)
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), str(Path(__file__).parents[1] / "support")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert files(folder) == before
    assert len(list(tmp_path.iterdir())) == 2  # what the killed process was writing
    assert torch.equal(logits(qft.load(folder, quantized())), logits(model))
    qft.save(model, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_folders_that_cannot_be_written(tmp_path):
    model = qft.wrap(quantized(), lora())
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with refuses(qft.BadFolder, str(tmp_path / "file"), model=model):
            qft.save(model, folder)
    for folder in (None, 3):
        with refuses(qft.BadOption, "path of a folder", model=model):
            qft.save(model, folder)
    assert files(tmp_path) == {"file": b"mine"}


def test_a_base_that_has_no_format_is_not_stored(tmp_path):
    model = qft.wrap(quantized({"*.mlp.*": "int8", "*": "nf4"}), lora())
    with refuses(qft.UnsupportedOperation, "several quantizers", model=model):
        qft.save(model, tmp_path / "adapter", base=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not serializable"):  # transformers' own verb writes no garbage either
        quantized({"*.mlp.*": "int8", "*": "nf4"}).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- folders of models ------------------------------------------------------------------------------------


def cut(path, keep=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def drop(path, *, key):
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})


def change(path, *, key, value):
    tensors = load_file(path)
    tensors[key] = value(tensors[key]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
SPOILT_MODELS = {
    "no folder": (lambda f: shutil.rmtree(f), qft.BadFolder, ["no such folder"]),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], qft.BadFolder, ["config.json"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), qft.BadFolder, ["model.safetensors"]),
    "cut weights": (lambda f: cut(f / "model.safetensors"), qft.BadFolder, ["model.safetensors"]),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), qft.BadFolder, ["model.safetensors"]),
    "text as weights": (
        lambda f: (f / "model.safetensors").write_text("weights"),
        qft.BadFolder,
        ["model.safetensors"],
    ),
    "a weight missing": (lambda f: drop(f / "model.safetensors", key=UP), qft.BadFolder, [UP]),
    "a weight of another shape": (
        lambda f: change(f / "model.safetensors", key=UP, value=lambda t: t.T),
        qft.BadFolder,
        ["model.layers.1.mlp.up_proj"],
    ),
    "a weight with NaN": (
        lambda f: change(f / "model.safetensors", key=UP, value=lambda t: t.masked_fill(t > 0.05, float("nan"))),
        qft.NonFiniteWeights,
        ["model.layers.1.mlp.up_proj"],
    ),
    "cut config": (lambda f: cut(f / "config.json"), qft.BadFolder, ["config.json"]),
    "empty config": (lambda f: (f / "config.json").write_text("{}"), qft.BadFolder, ["config.json"]),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), qft.BadFolder, ["config.json"]),
}


@pytest.mark.parametrize("name", SPOILT_MODELS)
def test_folders_that_hold_no_sound_model(name, tmp_path):
    spoil, error, says = SPOILT_MODELS[name]
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    spoil(folder)
    for verb in (qft.quantize, qft.quantize_and_wrap):
        with refuses(error, *says):
            verb(folder, "reference", progress=False)


def test_folders_refuse_what_models_in_memory_do(tmp_path):
    llama().save_pretrained(tmp_path)
    for spec, options, error, says in [
        ("nf5", {}, qft.UnknownQuantizer, "nf4"),
        ("nf4", {"skip": ["nope"]}, qft.BadOption, "'nope'"),
        ("nf4", {"skip": ".*"}, qft.NoTargets, "skipped by the caller"),
        ("nf4", {"device": "cuda:99"}, qft.UnsupportedDevice, "cuda:99"),
        ("reference:format=int,group_size=128", {}, qft.BadShape, "q_proj"),
        (NeedsData(), {}, qft.NeedsCalibration, "calibration="),
        ("nf4", {"nonsense": 3}, qft.BadOption, "nonsense"),
    ]:
        with refuses(error, says):
            qft.quantize(tmp_path, spec, progress=False, **{"device": "cpu", **options})
    for config, error, says in [
        (lora(r=65), qft.BadShape, "rank 65"),
        (lora(target_modules=["nope"]), qft.NoTargets, "nope"),
        (lora(init_lora_weights="lora_ga"), qft.BadOption, "lora_ga"),
        (peft.GloraConfig(target_modules=["q_proj"]), qft.UnsupportedOperation, "GLORA"),
    ]:
        with refuses(error, says):
            qft.quantize_and_wrap(tmp_path, "reference", adapter=config, progress=False)
    with refuses(qft.BadFolder, "is a file"):
        qft.quantize(tmp_path / "config.json")


# ---- folders of adapters ----------------------------------------------------------------------------------

A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def edit(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key, None) if value is ... else values.update({key: value})
    path.write_text(json.dumps(values))


CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "qft.json"
SPOILT_ADAPTERS = {
    "no folder": (lambda f: shutil.rmtree(f), ["does not exist"]),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], [CONFIG]),
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG]),
    "cut config": (lambda f: cut(f / CONFIG), [CONFIG]),
    "empty config": (lambda f: (f / CONFIG).write_text(""), [CONFIG]),
    "a list as config": (lambda f: (f / CONFIG).write_text("[1]"), [CONFIG]),
    "bytes as config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00junk"), [CONFIG]),
    "another tool's config": (lambda f: (f / CONFIG).write_text('{"alpha": 3}'), [CONFIG]),
    "an unknown method": (lambda f: edit(f / CONFIG, peft_type="NO_SUCH_METHOD"), [CONFIG]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS]),
    "pickled weights": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), [WEIGHTS, "pickle"]),
    "cut weights": (lambda f: cut(f / WEIGHTS), [WEIGHTS]),
    "cut header": (lambda f: cut(f / WEIGHTS, 0.001), [WEIGHTS]),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS]),
    "text as weights": (lambda f: (f / WEIGHTS).write_text("weights"), [WEIGHTS]),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), ["does not fit"]),
    "a weight missing": (lambda f: drop(f / WEIGHTS, key=A), ["does not fit", "up_proj"]),
    "a weight of another shape": (
        lambda f: change(f / WEIGHTS, key=A, value=lambda t: t[:, :32]),
        ["does not fit", "up_proj"],
    ),
    "another rank in the config": (lambda f: edit(f / CONFIG, r=8), ["does not fit"]),
    "cut note": (lambda f: cut(f / NOTE), [NOTE]),
    "empty note": (lambda f: (f / NOTE).write_text(""), [NOTE]),
    "bytes as note": (lambda f: (f / NOTE).write_bytes(b"\xff\xfe\x00junk"), [NOTE]),
    "a list as note": (lambda f: (f / NOTE).write_text("[]"), [NOTE]),
    "another tool's note": (lambda f: (f / NOTE).write_text('{"name": "Quantum Field Theory"}'), [NOTE]),
    "a later format": (lambda f: edit(f / NOTE, format=2), [NOTE, "format 2"]),
    "no quantizers": (lambda f: edit(f / NOTE, quantizers=...), [NOTE]),
    "junk quantizers": (lambda f: edit(f / NOTE, quantizers=3), [NOTE]),
    "nameless quantizers": (lambda f: edit(f / NOTE, quantizers=[{}]), [NOTE]),
    "no layers": (lambda f: edit(f / NOTE, layers=...), [NOTE]),
    "layers of a quantizer that is not there": (lambda f: edit(f / NOTE, layers={"model.layers.0.mlp.up_proj": 7}), [NOTE]),
    "junk layers": (lambda f: edit(f / NOTE, layers={"model.layers.0.mlp.up_proj": "x"}), [NOTE]),
    "no word of the base": (lambda f: edit(f / NOTE, base_stored=...), [NOTE]),
    "junk fingerprint": (lambda f: edit(f / NOTE, fingerprint={"a": 3}), [NOTE]),
    "more junk fingerprint": (lambda f: edit(f / NOTE, fingerprint={"a": [[3, 3], ["x"]]}), [NOTE]),
    "a stored base that is gone": (lambda f: edit(f / NOTE, base_changed=True), ["base"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that `qft.save` wrote, and the logits of its model."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = tuned()
    qft.save(model, folder)
    return folder, logits(model).detach()


@pytest.mark.parametrize("name", SPOILT_ADAPTERS)
def test_adapter_folders_that_are_not_sound(name, saved, tmp_path):
    spoil, says = SPOILT_ADAPTERS[name]
    folder = tmp_path / "adapter"
    shutil.copytree(saved[0], folder)
    spoil(folder)
    for base in (in_use(quantized()), in_use(llama())):
        with refuses(qft.BadFolder, *says, model=base):
            qft.load(folder, base)
    loaded = qft.load(saved[0], base)  # the sound folder still goes over it
    assert torch.equal(logits(loaded), saved[1])


def test_adapter_folders_of_quantizers_that_are_not_known_here(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "adapter")
    edit(tmp_path / "adapter" / NOTE, quantizers=[{"name": "no-such-quantizer", "bits": 3}])
    base = llama()
    with refuses(qft.UnknownQuantizer, "no-such-quantizer", model=base):
        qft.load(tmp_path / "adapter", base)
    edit(tmp_path / "adapter" / NOTE, quantizers=[{"name": "reference", "colour": 3}])
    with refuses(qft.BadOption, "colour", model=base):
        qft.load(tmp_path / "adapter", base)


def test_load_refuses_folders_and_bases_that_are_none(saved, tmp_path):
    with refuses(qft.BadFolder, "nowhere", "does not exist"):
        qft.load(tmp_path / "nowhere")
    with refuses(qft.BadFolder, "adapter_config.json"):
        qft.load(tmp_path)
    for folder in (None, 3):
        with refuses(qft.BadOption, "path of a folder"):
            qft.load(folder)
    with refuses(qft.BadFolder, "base="):  # a model built from a config has no name to load it by
        qft.load(saved[0])
    with refuses(qft.BadFolder, "nowhere"):
        qft.load(saved[0], tmp_path / "nowhere")
    wrapped = qft.wrap(quantized(), lora())
    for base in (wrapped, wrapped.get_base_model()):
        with refuses(qft.BadOption, "adapters already", "load_adapter", model=base):
            qft.load(saved[0], base)


@pytest.mark.parametrize("prepare", [in_use, lambda m: in_use(quantized(model=m))], ids=["float", "quantized"])
def test_an_adapter_over_another_base(saved, prepare):
    nearly = llama()
    nearly.model.layers[1].mlp.down_proj.weight.data.mul_(1.05)
    deeper = llama(num_hidden_layers=3)
    wider = llama(intermediate_size=192)
    for other, says in [
        (llama(seed=1), "14 of 14"),
        (nearly, "1 of 14 layers differ, model.layers.1.mlp.down_proj"),
        (deeper, "model.layers.2" if prepare is not in_use else ""),
        (wider, "mlp"),
        (gpt2(), "model.layers"),
    ]:
        base = prepare(other)
        with refuses(qft.AdapterMismatch, says, model=base):
            qft.load(saved[0], base)


def test_an_adapter_over_another_quantization_or_without_a_fingerprint_is_a_warning(saved, tmp_path):
    with pytest.warns(qft.QftWarning, match="another quantization.*reference.*bitsandbytes_4bit"):
        model = qft.load(saved[0], quantized("nf4"))
    assert relative(logits(model), saved[1]) < 1e-5  # the same codes, in fact
    shutil.copytree(saved[0], tmp_path / "adapter")
    edit(tmp_path / "adapter" / NOTE, fingerprint={})
    with pytest.warns(qft.QftWarning, match="cannot be checked"):
        model = qft.load(tmp_path / "adapter", quantized())
    assert torch.equal(logits(model), saved[1])
    (tmp_path / "adapter" / NOTE).unlink()
    base = llama()
    with refuses(qft.BadOption, "float model", "quantize it first", model=base):
        qft.load(tmp_path / "adapter", base)
    assert torch.equal(logits(qft.load(tmp_path / "adapter", quantized())), saved[1])


def test_the_right_base_loads_without_a_warning(saved):
    for base in (llama(), quantized()):
        with warnings.catch_warnings():
            warnings.simplefilter("error", qft.QftWarning)
            assert torch.equal(logits(qft.load(saved[0], base)), saved[1])


STORED = "model.layers.1.mlp.up_proj.qweight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: cut(f / "model.safetensors"), ["base"]),
        (lambda f: (f / "model.safetensors").unlink(), ["base"]),
        (lambda f: shutil.rmtree(f), ["base"]),
        (lambda f: drop(f / "model.safetensors", key=STORED), [STORED]),
        (lambda f: change(f / "model.safetensors", key=STORED, value=lambda t: t[:7]), ["up_proj"]),
        (lambda f: change(f / "model.safetensors", key=STORED, value=lambda t: t.half()), ["up_proj"]),
    ],
    ids=["cut", "no file", "no folder", "a layer missing", "another shape", "another dtype"],
)
def test_stored_bases_that_are_not_sound(spoil, says, request, tmp_path):
    """After iterated LoftQ the codes are in the folder: over a base that is given, and without one."""
    folder = tmp_path / "adapter"
    model = qft.quantize_and_wrap(llama(), "reference", adapter=lora(), init=qft.LoftQ(steps=2), progress=False).eval()
    qft.save(model, folder)
    sound = qft.load(folder, quantized())
    assert torch.equal(logits(sound), logits(model))
    spoil(folder / "base")
    for base in (in_use(quantized()), in_use(llama())):
        with refuses(qft.BadFolder, *says, model=base):
            qft.load(folder, base)
    if "another dtype" not in request.node.name:  # transformers casts codes back as it loads them, which loses nothing
        with refuses(qft.BadFolder):
            qft.load(folder)


def test_a_changed_base_goes_over_no_other_base(tmp_path):
    model = qft.quantize_and_wrap(llama(), "reference", adapter=lora(), init=qft.LoftQ(steps=2), progress=False)
    qft.save(model, tmp_path)
    for base in (in_use(quantized(model=llama(seed=1))), in_use(llama(seed=1))):
        with refuses(qft.AdapterMismatch, "14 of 14", model=base):
            qft.load(tmp_path, base)


# ---- what an error costs ----------------------------------------------------------------------------------


def test_the_first_refusal_of_a_script_is_readable():
    """A user sees the message in one line, and the frames of qft above it, not those of the libraries below."""
    out = run_python(
        """
        import sys, traceback, torch, qft
        try:
            qft.quantize_and_wrap(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf5")
        except ValueError as error:
            assert error.__cause__ is None and error.__context__ is None
            print(traceback.format_exc().strip().splitlines()[-1])
        """
    )
    assert out.strip().startswith("qft.errors.UnknownQuantizer: no quantizer is called 'nf5'; did you mean")


def test_a_refused_model_goes_on_to_train_as_if_nothing_had_been():
    """Refusals of every stage, then the real thing: the same losses as without them."""

    def losses(with_refusals):
        model = llama()
        if with_refusals:
            for options in ({"quantizer": "nf5"}, {"adapter": lora(r=65)}, {"adapter": lora(lora_dropout=2.0)}):
                with pytest.raises(qft.QftError):
                    qft.quantize_and_wrap(model, progress=False, **options)
        torch.manual_seed(0)
        model = qft.quantize_and_wrap(model, "reference", adapter=lora(), progress=False)
        train_a_little(model, steps=2)
        return logits(model, batch())

    assert torch.equal(losses(True), losses(False))

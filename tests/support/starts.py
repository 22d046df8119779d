"""Adapters at their start, and what the layers and the float weights they belong to hold."""

import torch
from models import logits
from peft import LoraConfig
from twins import quantized

import qft
from qft.lora.layer import QftLinear


def config(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def started(builder, spec, init="loftq", dtype=torch.float32, skip=None, calibration=None, **options):
    return qft.quantize_and_wrap(
        builder(dtype),
        spec,
        adapter=config(**options),
        init=init,
        skip=skip,
        calibration=calibration,
        progress=False,
    ).eval()


def layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, QftLinear)}


def original(model, name):
    """The float weight (out, in) in float64."""
    module = model.get_submodule(name)
    return (module.weight.T if type(module).__name__ == "Conv1D" else module.weight).detach().double()


def base_weight(layer):
    return layer.quantizer.dequantize(layer.handle, dtype=torch.float32).double()


def start(layer):
    """s·B·A as the layer would compute it."""
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    return layer.scaling["default"] * (b @ a)


def errors(model, float_model):
    """‖W − (Ŵ + sBA)‖ of each adapted layer."""
    return {n: float((original(float_model, n) - base_weight(m) - start(m)).norm()) for n, m in layers(model).items()}


def tail(matrix, rank):
    """The error of the best fit of this rank (Eckart and Young): the norm of the singular values left out."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


@torch.no_grad()
def run(model):
    return logits(model)


SCALINGS = {
    "alpha = r": {"lora_alpha": 4},
    "alpha > r": {"lora_alpha": 32},
    "alpha < r": {"lora_alpha": 1},
    "negative": {"lora_alpha": -12},
    "rslora": {"lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, "c_attn": 9, r"blocks\.0\.0": 7, "wi_0": 3},
        "alpha_pattern": {"q_proj": 5, "c_fc": 3, "down_proj": -2},
    },
    "patterns, rslora": {
        "rank_pattern": {"v_proj": 1, "c_proj": 6},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": True,
    },
}


def quantized_weights(model):
    for name, _, quantizer, handle in quantized(model):
        yield name, quantizer.dequantize(handle, dtype=torch.float32).double()


def same_start(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(v, b[k]) for k, v in a.items())

"""A quantized model beside plain PEFT over a float copy of it, whose weights are the dequantized ones."""

import copy
from contextlib import contextmanager

import torch
from models import batch, logits, relative
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

import qft
from qft.core.registry import quantizer_of

SPECS = ["nf4", "fp4:double_quant=true", "int8", "reference", "reference:format=int,bits=3,group_size=32"]


@contextmanager
def stock_peft():
    """PEFT as it is without qft."""
    ours = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
    try:
        yield
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = ours


def quantized(model):
    """Name, layer, quantizer and handle of every quantized layer."""
    for name, module in model.named_modules():
        quantizer = quantizer_of(module)
        if quantizer is not None and not hasattr(module, "base_layer"):
            yield name, module, quantizer, quantizer.weights(module)[0]


@torch.no_grad()
def dequantized_copy(model, float_model):
    """`float_model` with the weights that the quantized `model` computes with."""
    for name, _, quantizer, handle in quantized(model):
        name, fused = name.replace(".base_layer", ""), handle.kind == "experts"
        target = float_model.get_parameter(name if fused else f"{name}.weight")
        value = quantizer.dequantize(handle, dtype=target.dtype)
        target.copy_(value.mT if handle.transposed else value)
    return float_model


def pair(builder, spec, config, dtype=torch.float32, skip=None, forward="dequantize", fill_with=0, **options):
    """Our wrapped quantized model, and stock PEFT over its float copy, with the same random adapters."""
    model = builder(dtype)
    twin = copy.deepcopy(model)
    qft.quantize(model, spec, skip=skip, progress=False, **options)
    dequantized_copy(model, twin)
    ours = qft.wrap(model, copy.deepcopy(config), forward=forward)
    theirs = stock(twin, config, ours.peft_config["default"])
    if fill_with is not None:
        fill(ours, seed=fill_with)
        share(ours, theirs)
    return ours, theirs


def stock(twin, config, resolved, **kwargs):
    """Stock PEFT with `config`; "all-linear" is what it means over the quantized model."""
    config = copy.deepcopy(config)
    if config.target_modules == "all-linear":
        config.target_modules = set(resolved.target_modules)
    with stock_peft():
        model = get_peft_model(twin, config, **kwargs)
    return model.eval()


@torch.no_grad()
def fill(model, adapter="default", seed=0, size=0.03):
    """Random adapters, so that nothing is at its start: B is no longer zero, and DoRA's magnitudes are off by 3 %."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." not in f"{name}.":
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "magnitude" in name:
            parameter.mul_(1 + size * noise)
        else:
            parameter.add_(size * noise)
    return model


def share(ours, theirs, adapter="default"):
    """Give the twin our adapter, through the state dict that a saved file would hold."""
    state = {k: v.clone() for k, v in get_peft_model_state_dict(ours, adapter_name=adapter).items()}
    expected = get_peft_model_state_dict(theirs, adapter_name=adapter)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    result = set_peft_model_state_dict(theirs, state, adapter_name=adapter)
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if f".{adapter}." in k]


def loss_and_gradients(model, seed=3, train=True, **kwargs):
    """The logits of a training step, and the gradients of everything that is trainable."""
    model.train(train)
    torch.manual_seed(seed)
    model.zero_grad()
    out = logits(model, **kwargs)
    torch.nn.functional.cross_entropy(out.flatten(0, 1).float(), batch(seed=4).flatten().to(out.device)).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.eval()
    return out.detach(), gradients


def gradient_error(mine, theirs):
    """The largest relative difference of a parameter's gradients.

    One that is below a thousandth of the whole gradient is held against that thousandth: keys' biases, for one, have
    gradients that are rounding noise, because attention does not change with them.
    """
    assert mine.keys() == theirs.keys()
    whole = sum(float(g.double().square().sum()) for g in theirs.values()) ** 0.5
    return max(
        float((mine[n].double() - g.double()).norm()) / max(float(g.double().norm()), 1e-3 * whole)
        for n, g in theirs.items()
    )


def output_error(ours, theirs, **kwargs):
    with torch.no_grad():
        return relative(logits(ours, **kwargs), logits(theirs, **kwargs))


def both_errors(ours, theirs):
    """Errors of the evaluated outputs, the training outputs and the gradients."""
    evaluated = output_error(ours, theirs)
    y, mine = loss_and_gradients(ours)
    z, other = loss_and_gradients(theirs)
    assert mine, "nothing is trainable"
    return evaluated, relative(y, z), gradient_error(mine, other)

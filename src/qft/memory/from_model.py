"""A plan's model made from one in memory, as it stands: its quantizers, adapters, dtypes. Nothing of it is changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from qft.core.experts import PackedExperts, stacks
from qft.core.registry import quantizer_of
from qft.core.selection import Selection
from qft.errors import UnsupportedOperation
from qft.lora.experts import QftExperts, chain
from qft.lora.layer import QftLinear
from qft.memory.outline import Outline, Weights
from qft.memory.stand_ins import Experts, Linear
from qft.pipeline.prepare import _Cast


def standing(model: nn.Module) -> Outline:
    """An outline of a language model of transformers (inside its PeftModel, if there is one), ready to be measured.

    Its `weights` are what is trained; what lies in memory can be asked for. Modules are copied without their data, those
    over quantized weights get stand-ins.

    Raises:
        UnsupportedOperation: encoder-decoders, native forwards, DoRA and other variants of LoRA, pooled adapters, other
            methods than LoRA, weights that are trained whole.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedOperation("plans are for decoders, and this is an encoder-decoder")
    memo: dict[int, Any] = {id(getattr(model, "hf_quantizer", None)): None}
    adapters: set[int] = set()
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise UnsupportedOperation("plans do not know the memory of modules that are trained whole")
        if isinstance(module, BaseTunerLayer):
            adapters.update(id(p) for n, p in module.named_parameters() if "lora_A" in n or "lora_B" in n)
        new = _stand_in(module)
        if new is not None:
            memo[id(module)] = new
            inside.update(id(m) for m in module.modules())
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained or any(id(p) not in adapters for p in trained):
        raise UnsupportedOperation("plans are for LoRA adapters: here other weights are trained, or none")
    return Outline(
        _copied(model, memo, inside), Selection({}, {}), {}, None, Weights(trained=tuple(p.numel() for p in trained)),
        trained[0].dtype,
    )  # fmt: skip


def _copied(model: nn.Module, memo: dict[int, Any], inside: set[int]) -> Any:
    for module in model.modules():
        # forwards of instances are ours, stand-ins of a step that runs, or hooks of accelerate's
        memo[id(module.__dict__.get("forward"))] = None
        memo[id(module.__dict__.get("_loss_function"))] = None
        for hooks in _hooks(module):
            memo.update((id(h), h) for h in hooks.values())
        if id(module) in inside:
            continue
        for place in (module._parameters, module._buffers, module.__dict__):
            for t in place.values():
                if isinstance(t, Tensor) and id(t) not in memo:
                    new = torch.empty(t.shape, dtype=t.dtype, device="meta")
                    memo[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    mark = model.__dict__.pop("_qft", None)
    try:
        found = copy.deepcopy(model, memo)
    finally:
        if mark is not None:
            model.__dict__["_qft"] = mark
    for module in found.modules():
        for name in ("forward", "_loss_function"):
            if module.__dict__.get(name, 0) is None:
                del module.__dict__[name]
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
        for hooks in _hooks(module):  # others' are for others' calls
            for key in [k for k, h in hooks.items() if not isinstance(h, _Cast)]:
                del hooks[key]
    return found.train()


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def _stand_in(module: nn.Module) -> nn.Module | None:
    """What computes the same over a weight that is not there, for layers over quantized weights; None for others."""
    if isinstance(module, QftLinear):
        handle = module.handle
        new = Linear(_empty(handle), _meta(module.base_layer.bias), module.quantizer.name != "unquantized")
        if module.native or module.lora_variant or module.qalora_group_size:
            raise UnsupportedOperation("plans do not know the memory of native forwards, DoRA, QA-LoRA and the like")
        if not (module.disable_adapters or module.merged):
            for name in module.active_adapters:
                if name not in module.lora_A:
                    continue
                a, b, dropout = module.lora_A[name].weight, module.lora_B[name], module.lora_dropout[name]
                if b.bias is not None:
                    raise UnsupportedOperation("plans do not know the memory of biases of adapters")
                new.adapt(a.shape[0], getattr(dropout, "p", 0.0), a.dtype, a.requires_grad)
        return new
    if isinstance(module, QftExperts):
        layers = list(chain(module))
        return _experts(module.get_base_layer(), layers)
    if stacks(module):
        return _experts(module, [])
    quantizer = quantizer_of(module)
    if quantizer is None or isinstance(module, PackedExperts):
        return None
    return Linear(_empty(quantizer.weights(module)[0]), _meta(getattr(module, "bias", None)), True)


def _experts(module: nn.Module, layers: list[QftExperts]) -> nn.Module:
    packed = stacks(module)
    shapes = {name: (p.experts, p.out_features, p.in_features) for name, p in packed.items()}
    new = _copied_shallow(module, set(shapes))
    for layer in layers:
        if layer.disable_adapters or layer.merged:
            continue
        ranks = [layer.lora_A[n].weight.shape[0] for n in layer.active_adapters if n in layer.lora_A]
        if ranks:
            _, out, inner = shapes[layer.parameter_name]
            for end, shape in (("A", (sum(ranks), inner)), ("B", (out, sum(ranks)))):
                new.register_parameter(f"{layer.parameter_name}_{end}", nn.Parameter(torch.empty(shape, device="meta")))
    forward = Experts(new, shapes, True)
    new.__dict__["forward"] = forward
    new.__dict__["dequantized_bytes"] = forward.dequantized_bytes
    return new


def _copied_shallow(module: nn.Module, without: set[str]) -> nn.Module:
    """The experts module itself, on "meta", without its packed weights and their forward."""
    memo: dict[int, Any] = {id(module._modules[name]): None for name in without}
    memo[id(module.__dict__.get("forward"))] = None
    for t in [*module.parameters(), *module.buffers()]:
        new = torch.empty(t.shape, dtype=t.dtype, device="meta")
        memo[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    found = copy.deepcopy(module, memo)
    for name in without:
        del found._modules[name]
    found.__dict__.pop("forward", None)
    return found


def _empty(handle: Any) -> Tensor:
    return torch.empty(handle.shape, dtype=handle.dtype, device="meta")


def _meta(bias: Tensor | None) -> Any:
    if bias is None:
        return None
    return nn.Parameter(torch.empty(bias.shape, dtype=bias.dtype, device="meta"), requires_grad=False)

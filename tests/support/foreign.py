"""Checkpoints as other tools leave them, and what every one of them must stand here."""

import copy
import json
from math import prod

import pytest
import torch
from models import llama, logits, relative, train_a_little
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from twins import both_errors, dequantized_copy, fill, quantized, share, stock

import qft
from qft.pipeline.audit.measure import layer_bytes as audit_bytes

LORA = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")


def edit(folder, change):
    """Rewrite the tensors of a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def without(key):
    return lambda tensors: tensors.pop(key)


def with_tensor(key, value):
    return lambda tensors: tensors.__setitem__(key, value(tensors.get(key)))


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), **changes}
    file.write_text(json.dumps(config))


def written(folder, model, config, made):
    """Save `model` with its blocks' linear layers as `made(weight)` has them: tensors by the names that they have there."""
    model.save_pretrained(folder)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]

    def change(tensors):
        for name in names:
            weight = tensors.pop(f"{name}.weight")
            tensors.update({f"{name}.{key}": value for key, value in made(weight).items()})

    edit(folder, change)
    edit_config(folder, **config)
    return folder


def loaded(folder, spec, dtype=torch.float32):
    with pytest.warns(qft.QftWarning, match="already"):
        return qft.quantize(folder, spec, device="cpu", dtype=dtype, progress=False)


def stands(folder, spec, expected, tmp_path, builder=llama, dtype=torch.float32, bound=1e-5):
    """Load a folder that a tool made; weights, gradients, merge, and the way back through our own files.

    Args:
        expected: (layer name, that tool's tensors by name) → the weight as the tool itself has it.

    Returns:
        The quantized model.
    """
    stored = load_file(folder / "model.safetensors") if expected is not None else {}
    model = loaded(folder, spec, dtype)
    layers = list(quantized(model))
    assert len(layers) == 14, "seven in each of two blocks"
    for name, _, quantizer, handle in layers if expected is not None else ():
        own = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        wanted = expected(name, own)
        found = quantizer.dequantize(handle, dtype=wanted.dtype)
        assert torch.equal(found, wanted), name
    twin = builder(dtype)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in twin.state_dict()}, strict=False)
    dequantized_copy(model, twin)
    plain = logits(model)
    assert relative(plain, logits(twin)) < bound
    for name, module, quantizer, handle in layers:
        template = quantizer.template(handle.shape, module.dtype)
        assert {n: (tuple(t.shape), t.dtype) for n, t in module.packed.items()} == template, name
        assert audit_bytes(module) == sum(prod(sizes) * kind.itemsize for sizes, kind in template.values()), name
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(logits(loaded(again, spec, dtype)), plain)
    ours = qft.wrap(model, copy.deepcopy(LORA))
    theirs = stock(twin, LORA, ours.peft_config["default"])
    fill(ours)
    share(ours, theirs)
    assert max(both_errors(ours, theirs)) < bound
    train_a_little(ours)
    tuned = logits(ours)
    assert relative(tuned, plain) > 1e-3
    qft.save(ours, tmp_path / "adapter", base=True)
    assert torch.equal(logits(qft.load(tmp_path / "adapter", device="cpu")), tuned)
    assert relative(logits(qft.merge_to_float(ours, dtype=torch.float32)), tuned) < bound
    return loaded(again, spec, dtype)


def merges_and_back(spec, bound, builder=llama):
    """Quantize and train a little; the merged model is near the tuned one, and `qft.unmerge` gives every bit back."""
    model = qft.wrap(qft.quantize(builder(), spec, progress=False))
    train_a_little(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = logits(model)
    qft.merge(model)
    assert relative(logits(model), tuned) < bound
    qft.unmerge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():  # bytes: float8 is not comparable
        assert torch.equal(value.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)), name


def plainly(folder, **options):
    """The same folder in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options).eval()

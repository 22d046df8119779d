"""The float copy of a tuned model is a model of its own: it runs its own weights and keeps nothing of the old one."""

import copy
import functools
import gc
import types
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from models import batch, bert, llama, logits, relative
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

import qft
from qft.core.registry import quantizer_of


def wrapped(spec="nf4", builder=llama):
    model = qft.quantize_and_wrap(builder(), spec, adapter=LoraConfig(r=4, target_modules="all-linear"), progress=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.05)
    return model.eval()


def closure(base):
    forward = base.forward

    def patched(*args, **kwargs):
        return forward(*args, **kwargs)

    base.forward = patched


def method_over_a_closure(base):
    forward = base.forward

    @functools.wraps(type(base).forward)
    def patched(self, *args, **kwargs):
        return forward(*args, **kwargs)

    base.forward = types.MethodType(patched, base)


def partial(base):
    base.forward = functools.partial(lambda old, *args, **kwargs: old(*args, **kwargs), base.forward)


def inner_block(base):
    closure(next(m for m in base.modules() if type(m).__name__.endswith("DecoderLayer")))


def hook(base):
    base.register_forward_hook(lambda module, args, out: base.eval() and None)


def cached_method(base):
    base.cache = {"forward": base.forward}
    base.generate = lambda *args, **kwargs: type(base).generate(base, *args, **kwargs)


def weak(base):
    reference = weakref.ref(base)
    base.forward = lambda *args, **kwargs: type(base).forward(reference(), *args, **kwargs)


PATCHES = [closure, method_over_a_closure, partial, inner_block, hook, cached_method, weak]


def own(plain):
    """The copy computes with its own weights, in its own dtype."""
    ids = batch(0, (2, 8))
    with torch.no_grad():
        half = copy.deepcopy(plain).to(torch.bfloat16)(input_ids=ids).logits
        assert half.dtype == torch.bfloat16
        for p in plain.parameters():
            p.zero_()
        return not plain(input_ids=ids).logits.any()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.__name__)
def test_a_copy_runs_its_own_weights(patch):
    model = wrapped()
    expected = logits(model)
    patch(model.get_base_model())
    with nullcontext() if patch is partial else pytest.warns(qft.QftWarning, match="code of its classes"):
        plain = qft.merge_to_float(model)
    assert relative(logits(plain), expected) < 1e-5
    assert plain.generate(batch(0, (1, 4)), max_new_tokens=2, do_sample=False).shape == (1, 6)
    assert own(plain)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.__name__)
def test_nothing_of_the_old_model_stays_in_memory(patch):
    model = wrapped("reference")
    patch(model.get_base_model())
    layers = [weakref.ref(m) for m in model.modules() if quantizer_of(m) is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = qft.merge_to_float(model)
    del model
    gc.collect()
    assert not [r for r in layers if r() is not None]
    assert plain(input_ids=batch(0, (1, 4))).logits.isfinite().all()


def test_a_copy_after_trl(tmp_path):
    from datasets import Dataset
    from tiny_training import tokenizer
    from trl import SFTConfig, SFTTrainer

    model = wrapped()
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4})
    config = SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], save_strategy="no", bf16=False
    )
    SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        plain = qft.merge_to_float(model.eval())
    assert relative(logits(plain), logits(model)) < 1e-5
    assert own(plain)


def test_a_copy_of_an_optimized_model():
    model = wrapped()
    expected = logits(model)
    qft.optimize_training(model)
    plain = qft.merge_to_float(model)
    assert not [m for m in plain.modules() if type(m.__dict__.get("forward")).__module__.startswith("qft")]
    assert relative(logits(plain), expected) < 1e-5 and own(plain)


def test_code_that_refers_to_nothing_old_is_kept():
    model = wrapped()
    base = model.get_base_model()
    base.generate = types.MethodType(lambda self, ids: ids + self.config.vocab_size, base)
    base.model.norm.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, base.model.norm)
    plain = qft.merge_to_float(model)
    assert plain.generate.__self__ is plain and plain.generate(1) == 97
    assert relative(logits(plain), logits(model)) < 1e-5


def test_an_export_runs_its_own_weights(tmp_path):
    model = wrapped()
    expected = logits(model)
    closure(model.get_base_model())
    qft.export(model, tmp_path)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected) < 1e-5


def test_a_quantized_model_without_adapters_and_an_encoder():
    for model in (qft.quantize(llama(), "int8", progress=False), wrapped("hqq:group_size=32", bert)):
        expected = logits(model)
        closure(model if not hasattr(model, "get_base_model") else model.get_base_model())
        with pytest.warns(qft.QftWarning, match="code of its classes"):
            plain = qft.merge_to_float(model)
        for p in plain.parameters():
            p.data.zero_()
        assert not logits(plain).any() and expected.any()


def test_a_plain_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.apply_both = lambda x: self.second(self.first(x))

        def forward(self, x):
            return self.second(self.first(x))

    model = qft.quantize(Net(), "reference", progress=False)
    x = torch.randn(3, 64)
    with pytest.warns(qft.QftWarning, match="apply_both"):
        plain = qft.merge_to_float(model)
    assert relative(plain(x), model(x)) < 1e-5 and not hasattr(plain, "apply_both")

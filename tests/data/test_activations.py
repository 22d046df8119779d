"""Activation statistics, block by block: those of a plain pass with hooks, whatever happens between the blocks."""

import _thread
import gc
import signal
import threading
import time
import weakref
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import Rows, refuses, unchanged
from models import VOCABULARY, batch, gpt2, llama, plain, qwen2, qwen3_moe, relative, t5
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

import qft
from qft.core.quantizer import is_conv1d, replace_module
from qft.core.registry import quantizer_of
from qft.data.calibration import call
from qft.data.collect import collect

pytestmark = pytest.mark.filterwarnings("ignore")


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).eval()


def albert(groups=1):
    """Every block is gone through three times, with the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3 * groups, "num_attention_heads": 4, "intermediate_size": 96}
    config = AlbertConfig(vocab_size=VOCABULARY, embedding_size=32, num_hidden_groups=groups, **sizes)
    return AlbertModel(config).eval()


class Flat(nn.Module):
    """No list of blocks anywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.net = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))
        self.out = nn.Linear(24, 8)

    def forward(self, input_ids):
        return self.out(self.net(self.embed(input_ids)))


MODELS = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "t5": t5,
    "qwen3_moe": qwen3_moe,
    "plain": plain,
    "bert": bert,
    "albert": albert,
    "albert, two groups": lambda: albert(2),
    "flat": Flat,
}


def linears(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]


def padded(shape=(4, 12), seed=1):
    """Tokens with two rows padded on the right and one on the left."""
    ids = batch(seed, shape)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[1, :3] = 0
    mask[2, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def takes_masks(model):
    return not isinstance(model, Flat | type(plain()))


def data_for(model):
    return padded() if takes_masks(model) else {"input_ids": batch(1, (4, 12))}


@torch.no_grad()
def reference(model, names, data):
    """A whole pass with plain hooks; inputs and outputs of the rows that count, in float64."""
    read, wrote = {}, {}

    def hook(name):
        def keep(module, args, kwargs, output):
            for store, value in ((read, args[0] if args else next(iter(kwargs.values()))), (wrote, output)):
                value = value.reshape(-1, value.shape[-1])
                mask = data.get("attention_mask")
                if mask is not None and len(value) == mask.numel():  # BERT's pooler reads one token a row
                    value = value[mask.flatten() != 0]
                store.setdefault(name, []).append(value.double())

        return keep

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    training = {m: m.training for m in model.modules()}
    call(model.eval(), data)
    for module, mode in training.items():
        module.training = mode
    for handle in handles:
        handle.remove()
    return {n: (torch.cat(read[n]), torch.cat(wrote[n])) for n in read}


def gathered(model, names, data, kinds="full", **options):
    """All statistics, each layer in one group."""
    groups = list(collect(model, names, data, kinds, **options))
    assert sorted(n for g in groups for n in g.names) == sorted(names)
    assert all(set(g.statistics) <= set(g.names) for g in groups)
    return {n: s for g in groups for n, s in g.statistics.items()}


def check(found, expected, kind="full", tolerance=3e-6):
    assert found.keys() == expected.keys()
    for name, (x, y) in expected.items():
        s = found[name]
        assert s.tokens == len(x), name
        assert s.left_out == 0
        assert s.mean_square.dtype == s.mean_abs.dtype == torch.float32
        assert relative(s.mean_square, x.square().mean(0)) < tolerance, name
        assert relative(s.mean_abs, x.abs().mean(0)) < tolerance, name
        assert s.input_max == pytest.approx(float(x.abs().max()), rel=tolerance)
        assert s.output_max == pytest.approx(float(y.abs().max()), rel=tolerance)
        if kind == "diagonal":
            assert s.second_moment is None
        else:
            assert s.second_moment.dtype == torch.float32
            assert relative(s.second_moment, x.T @ x / len(x)) < tolerance, name


def cut(data, sizes):
    """The same rows in batches of these sizes."""
    pieces = {k: v.split(sizes) for k, v in data.items()}
    return [{k: v[i] for k, v in pieces.items()} for i in range(len(sizes))]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [1, 3]], ids=str)
def test_they_are_those_of_a_whole_pass(name, kind, sizes):
    """With padding, in batches of any shape; the head too, and layers outside the blocks."""
    model = MODELS[name]()
    data, names = data_for(model), linears(model)
    expected = reference(model, names, data)
    with unchanged(model, outputs=False):
        found = gathered(model, names, cut(data, sizes), kind)
    check(found, expected, kind)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_batches_of_several_lengths(name):
    model = MODELS[name]()
    names = linears(model)
    data = [{"input_ids": batch(s, shape)} for s, shape in enumerate([(2, 9), (1, 4), (3, 1), (1, 17)])]
    parts = [reference(model, names, b) for b in data]
    expected = {n: tuple(torch.cat([p[n][i] for p in parts]) for i in (0, 1)) for n in parts[0]}
    check(gathered(model, names, data), expected)


def test_a_kind_for_each_layer():
    model = llama()
    names = linears(model)
    kinds = {n: "full" if "k_proj" in n or "down" in n else "diagonal" for n in names}
    data = padded()
    expected, found = reference(model, names, data), gathered(model, names, [data], kinds)
    for name in names:
        check({name: found[name]}, {name: expected[name]}, kinds[name])


def test_layers_that_read_the_same_tensor_share_the_work():
    """q, k and v of one block have the same second moment, and it is computed once."""
    model = llama()
    products = []

    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default and args[0].shape == (64, 48):
                products.append(1)
            return function(*args, **(kwargs or {}))

    names = [n for n in linears(model) if n.endswith(("q_proj", "k_proj", "v_proj"))]
    run = type(model).forward

    def counted(self, *args, **kwargs):
        with Counts():
            return run(self, *args, **kwargs)

    model.forward = counted.__get__(model)
    found = gathered(model, names, [padded()])
    assert len(products) == 2
    assert torch.equal(found[names[0]].second_moment, found[names[2]].second_moment)


class InPlace(nn.Module):
    """Adds to what the next layer reads, in the same tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids):
        x = self.embed(input_ids).clone()
        x += self.a(x)
        return self.b(x)


class UnderInference(InPlace):
    def forward(self, input_ids):
        with torch.inference_mode():
            return super().forward(input_ids)


@pytest.mark.parametrize("cls", [InPlace, UnderInference])
def test_a_tensor_that_was_added_to_is_another_one(cls):
    model, data = cls(), {"input_ids": batch(1, (3, 5))}
    expected = {}
    with torch.no_grad():
        x = model.embed(data["input_ids"])
        expected["a"] = (x.reshape(-1, 16).double(), model.a(x).reshape(-1, 16).double())
        x = x + model.a(x)
        expected["b"] = (x.reshape(-1, 16).double(), model.b(x).reshape(-1, 16).double())
    check(gathered(model, ["a", "b"], [data]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_models(dtype):
    """Sums are float32: what they hold is the 16-bit activations' own."""
    model = llama(dtype)
    data, names = padded(), linears(llama())
    check(gathered(model, names, cut(data, [4])), reference(model, names, data))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_training_and_checkpointing_models(name):
    """Dropout is off, checkpoints are not taken, and everything is as it was afterwards."""
    model = MODELS[name]()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model.get_submodule(linears(model)[0]).eval()
    data, names = padded(), linears(model)
    expected = reference(model, names, data)
    with unchanged(model, outputs=False):
        found = gathered(model, names, cut(data, [2, 2]))
        assert not any(p.grad is not None for p in model.parameters())
    check(found, expected)


def test_models_that_peft_wrapped():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    data = padded()
    names = [n for n in linears(model) if "lora" not in n]
    assert any(n.endswith("q_proj.base_layer") for n in names)
    expected = reference(model, names, data)
    with unchanged(model, outputs=False):
        found = gathered(model, names, cut(data, [2, 2]))
    check(found, expected)


def test_quantized_models():
    """What `wrap` runs where the float model is gone."""
    model = qft.quantize(llama(), "reference", progress=False)
    names = [n for n, m in model.named_modules() if quantizer_of(m) is not None]
    data = padded()
    check(gathered(model, names, cut(data, [1, 3])), reference(model, names, data))


def test_labels_and_caches_make_no_difference():
    model, data = llama(), padded()
    expected = reference(model, linears(model), data)
    check(gathered(model, linears(model), [{**data, "labels": data["input_ids"]}]), expected)
    check(gathered(model, linears(model), [{**data, "labels": data["input_ids"] + 10**6}]), expected)
    check(gathered(model, linears(model), [{**data, "use_cache": True}]), expected)


def test_an_encoder_decoder_with_an_output_of_its_own():
    """Masks are of what was read, and decoders of another length count all that they read."""
    model = t5()
    data = {**padded(), "decoder_input_ids": batch(5, (4, 7))}
    names = [n for n in linears(model) if n.startswith("encoder")]
    check(gathered(model, names, cut(data, [2, 2])), reference(model, names, data))
    names = [n for n in linears(model) if n.startswith("decoder") and "EncDec" not in n]
    found = gathered(model, names, [data])
    assert {s.tokens for s in found.values()} == {28}
    expected = {}
    with torch.no_grad():
        handles = [
            model.get_submodule(n).register_forward_hook(
                lambda m, a, y, n=n: expected.update({n: (a[0].flatten(0, 1).double(), y.flatten(0, 1).double())})
            )
            for n in names
        ]
        call(model, data)
    for handle in handles:
        handle.remove()
    check(found, expected)


def test_the_order_of_the_groups():
    """Block by block as the model goes through them, and what is outside comes last."""
    groups = [g.names for g in collect(llama(), linears(llama()), [padded()], "diagonal")]
    assert [len(g) for g in groups] == [7, 7, 1]
    assert all(".layers.0." in n for n in groups[0])
    assert groups[2] == ["lm_head"]
    groups = [g.names for g in collect(t5(), linears(t5()), [padded()], "diagonal")]
    assert [n[0].split(".layer.")[0] for n in groups] == [
        *(f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)),
        "lm_head",
    ]
    assert [g.names for g in collect(Flat(), linears(Flat()), [{"input_ids": batch()}], "full")] == [linears(Flat())]


def test_nothing_to_watch():
    assert list(collect(llama(), [], [padded()], "full")) == []


class Aside(nn.Module):
    """One block and one layer are never run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(3))
        self.unused = nn.Linear(16, 16)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.blocks[2](self.blocks[0](x))


def test_layers_that_no_batch_comes_through():
    """They are in a group all the same, without statistics."""
    model, data = Aside(), {"input_ids": batch()}
    groups = list(collect(model, linears(model), [data], "full"))
    assert sorted(n for g in groups for n in g.names) == sorted(linears(model))
    found = {n: s for g in groups for n, s in g.statistics.items()}
    check(found, reference(model, linears(model), data))
    assert found.keys() == {"blocks.0.0", "blocks.2.0"}
    model = qft.quantize_and_wrap(
        Aside(),
        "reference",
        adapter=LoraConfig(r=2, target_modules="all-linear"),
        init="qera",
        calibration=batch(),
        progress=False,
    )
    assert model.init_report.weights["unused"].kept
    assert "no calibration tokens" in model.init_report.weights["unused"].note
    assert not model.init_report.weights["blocks.0.0"].note


class Loops(nn.Module):
    """Goes through all of its blocks twice, in turn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return x


def test_blocks_that_are_come_back_to_are_refused():
    """Their statistics would lack what they read later, and miss the layers that were replaced meanwhile."""
    model, threads = qft.quantize(Loops(), "reference", progress=False), threading.active_count()
    original = Loops()
    with refuses(qft.BadOption, "Loops", "more than once", model=model):
        qft.wrap(
            model, LoraConfig(r=2, target_modules="all-linear"), init="qera", original=original, calibration=batch()
        )
    assert clean(original)
    assert threading.active_count() == threads
    last = ["blocks.1.0"]  # nothing of the first one is wanted: the last one's are whole
    check(gathered(Loops(), last, [{"input_ids": batch()}]), reference(Loops(), last, {"input_ids": batch()}))


# ---- replacing layers meanwhile -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "plain", "bert", "albert, two groups"])
def test_replacing_layers_does_not_change_what_later_blocks_read(name):
    model = MODELS[name]()
    data, names = data_for(model), linears(model)
    expected, found = reference(model, names, data), {}
    for group in collect(model, names, cut(data, [1, 3]), "full"):
        found.update(group.statistics)
        for layer in group.names:
            old = model.get_submodule(layer)
            size = old.weight.shape if is_conv1d(old) else old.weight.shape[::-1]
            with torch.no_grad():
                new = nn.Linear(*size)
                new.weight.fill_(7.0)
            replace_module(model, layer, new)
    check(found, expected)
    assert all(float(model.get_submodule(n).weight.max()) == 7 for n in names)
    assert clean(model)


def test_float_layers_that_were_replaced_are_freed_while_the_pass_goes_on():
    """Only one block's float weights need to be in memory with the quantized ones."""
    model = llama(num_hidden_layers=3)
    names = [n for n in linears(model) if n != "lm_head"]
    alive = {n: weakref.ref(model.get_submodule(n).weight) for n in names}
    gc.disable()
    try:
        for index, group in enumerate(collect(model, names, cut(padded(), [1, 1, 2]), "full")):
            assert all(
                (alive[n]() is None) == (f"layers.{i}." in n and i < index) or i >= index
                for n in names
                for i in [int(n.split(".")[2])]
            )
            for name in group.names:
                replace_module(model, name, nn.Identity())
            del name
            assert all(alive[n]() is None for n in group.names)
    finally:
        gc.enable()


def test_quantizing_frees_them_too():
    model = llama(num_hidden_layers=3)
    alive = {n: weakref.ref(model.get_submodule(n).weight) for n in linears(model) if n != "lm_head"}
    seen = []

    @dataclass(frozen=True)
    class Looks(Rows):
        name: ClassVar[str] = "looks"

        @property
        def capabilities(self):
            return qft.Capabilities(bits=8, devices=frozenset({"cpu"}), needs_calibration=True, requantize=True)

        def pack(self, weight, *, statistics=None):
            seen.append(sum(ref() is not None for ref in alive.values()))
            return super().pack(weight)

    gc.disable()
    try:
        qft.quantize(model, Looks(), calibration=[batch()], progress=False)
    finally:
        gc.enable()
    assert seen == list(range(21, 0, -1))


# ---- where it ends early ------------------------------------------------------------------------------------


def clean(model):
    """No hooks, no patched forwards."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_consumer_that_stops(after):
    model, threads = llama().train(), threading.active_count()
    model.model.norm.eval()
    with unchanged(model, outputs=False):
        with pytest.raises(Stop), closing(collect(model, linears(model), cut(padded(), [2, 2]), "full")) as groups:
            for index, _ in enumerate(groups):
                assert not model.training
                if index == after:
                    raise Stop
        assert threading.active_count() == threads
        assert clean(model)


@pytest.mark.parametrize("after", [3, 9])
def test_an_init_that_fails_leaves_both_models_as_they_were(after):
    """Also while somebody holds the exception, and with it the frames that ran."""
    calls = []

    def fails(weight, quantized, rank, scaling, *, statistics):
        assert statistics.second_moment.shape == (weight.shape[1],) * 2
        calls.append(1)
        if len(calls) > after:
            raise Stop("halfway")
        return torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)

    fails.needs = "full"
    original, model = llama().train(), qft.quantize(llama(), "reference", progress=False)
    threads = threading.active_count()
    with unchanged(model), unchanged(original):
        with pytest.raises(Stop) as held:
            qft.wrap(model, init=fails, original=original, calibration=[batch()])
        assert held.value
        assert threading.active_count() == threads
        assert clean(original)


def test_a_quantizer_that_fails_marks_the_model_and_leaves_nothing_else():
    @dataclass(frozen=True)
    class Fails(Rows):
        name: ClassVar[str] = "fails"

        @property
        def capabilities(self):
            return qft.Capabilities(bits=8, devices=frozenset({"cpu"}), needs_calibration=True, requantize=True)

        def pack(self, weight, *, statistics=None):
            if len(packed) == 9:
                raise Stop("halfway")
            packed.append(1)
            return super().pack(weight)

    packed, model, threads = [], llama().train(), threading.active_count()
    model.model.norm.eval()
    with pytest.raises(Stop) as held:
        qft.quantize(model, Fails(), calibration=[batch()], progress=False)
    assert held.value
    assert threading.active_count() == threads
    assert clean(model)
    assert all(m.training for n, m in model.named_modules() if n != "model.norm")
    assert not model.model.norm.training
    with pytest.raises(qft.PartlyQuantized, match="Stop stopped it after 9"):
        qft.quantize(model, "reference", progress=False)
    packed, model = [1] * 9, llama().train()
    with unchanged(model), pytest.raises(Stop):
        qft.quantize(model, Fails(), calibration=[batch()], progress=False)  # at the first: nothing has changed
    qft.quantize(model, "reference", progress=False)


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), AssertionError("no"), ZeroDivisionError("no")])
@pytest.mark.parametrize("verb", ["quantize_and_wrap", "wrap"])
def test_a_model_that_cannot_run_on_the_second_batch(error, verb):
    model = llama().train()
    threads = threading.active_count()

    def fails(module, args, output):
        if int(args[0][0, 0]) == 7:
            raise error

    model.model.embed_tokens.register_forward_hook(fails)
    data = [torch.tensor([[1, 2, 3]]), torch.tensor([[7, 2, 3]])]
    quantized = qft.quantize(llama(), "reference", progress=False)
    with refuses(qft.BadOption, "LlamaForCausalLM cannot run", "no", model=model):
        if verb == "wrap":
            with unchanged(quantized):
                qft.wrap(quantized, init="qera", original=model, calibration=data)
        else:
            qft.quantize_and_wrap(model, "reference", init="qera", calibration=data, progress=False)
    assert threading.active_count() == threads


def test_data_that_the_model_does_not_take():
    model = llama()
    with refuses(qft.BadOption, "LlamaForCausalLM cannot run", model=model):
        data = {"pixels": torch.zeros(1, 3)}
        qft.quantize_and_wrap(model, "reference", init="qera", calibration=data, progress=False)


@pytest.mark.parametrize("where", ["in the first block", "in the second block"])
def test_an_interrupt_in_the_middle_of_a_pass(where, request):
    """Ctrl-C reaches the main thread, which waits for the batch; the batch ends, and everything is as it was."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    model, threads = llama().train(), threading.active_count()

    def interrupts(module, args):
        _thread.interrupt_main()
        time.sleep(0.1)

    index = int("second" in where)
    handle = model.model.layers[index].mlp.register_forward_pre_hook(interrupts)
    with unchanged(model, outputs=False):
        with pytest.raises(KeyboardInterrupt):
            list(collect(model, linears(model), cut(padded(), [2, 2]), "full"))
        assert threading.active_count() == threads
    handle.remove()
    assert clean(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError])
def test_errors_that_are_not_the_datas_pass_as_they_are(error):
    model = llama()

    def fails(module, args):
        raise error("stop")

    model.model.layers[0].mlp.register_forward_pre_hook(fails)
    with unchanged(model, outputs=False), pytest.raises(error):
        list(collect(model, linears(model), [padded()], "full"))


# ---- values that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_activations_that_are_not_finite_are_left_out_and_counted(value):
    model = plain()
    ids = batch(1, (3, 11))
    ids[ids == 5] = 6
    ids[0, 4] = ids[2, 7] = ids[2, 8] = 5
    names = linears(model)
    expected = reference(model, names, {"input_ids": ids[ids != 5][None]})
    with torch.no_grad():
        model.embed.weight[5, 3] = value
    found = gathered(model, names, cut({"input_ids": ids}, [1, 2]))
    assert found["blocks.0.0"].left_out == 3
    for name, s in found.items():
        assert s.left_out in ((3,) if value != 1e30 else (0, 3))  # 1e30 squashed by nothing stays too large
        s.left_out = 0
        if name != "out":
            assert s.tokens == 30
    finite = {n: s for n, s in found.items() if value != 1e30}
    check(finite, {n: expected[n] for n in finite})
    assert found["blocks.0.0"].second_moment.isfinite().all()


def test_a_layer_that_reads_nothing_finite_has_no_statistics():
    model = plain()
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    assert gathered(model, linears(model), [{"input_ids": batch()}]) == {}


def test_somebody_else_may_call_a_layer_meanwhile():
    """A quantizer that compares outputs, for one; it is not counted."""
    model, data = llama(), padded()
    names, found = linears(model), {}
    expected = reference(model, names, data)
    for group in collect(model, names, [data], "full"):
        found.update(group.statistics)
        for name in names:
            layer = model.get_submodule(name)
            layer(torch.full((3, layer.weight.shape[1]), 1e3))
    check(found, expected)

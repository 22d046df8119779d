"""Offloading changes where things lie, and no number: gradients are the same to the bit."""

import contextlib
import copy
import gc
import pickle
import warnings

import pytest
import torch
from helpers import Rows, refuses, unchanged
from models import batch, gpt2, llama, logits, qwen3_moe, relative
from peft import LoraConfig
from test_optimizing import MODELS, adapted, own_switches, step, still  # noqa: F401

import qft
from qft.optimize import copies, offload_weights, optimize, packed_tensors
from qft.optimize.blocks import BlockForward

IDS = batch(shape=(2, 13))
DEEP = {"num_hidden_layers": 5}


class Late(copies.Lane):
    """Copies as late as their order allows: when somebody waits. What they will overwrite is garbage until then."""

    def __init__(self, device):
        super().__init__(device)
        self.queue = []

    def copy(self, target, source):
        target.untyped_storage().fill_(0xFF) if target.dtype == torch.uint8 else target.fill_(float("nan"))
        self.queue.append((mark := object(), target, source))
        return mark

    def wait(self, mark):
        while any(entry[0] is mark for entry in self.queue):
            _, target, source = self.queue.pop(0)
            target.copy_(source)

    def settle(self):
        if self.queue:
            self.wait(self.queue[-1][0])


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch, own_switches):  # noqa: F811
    own_switches.offload_on_cpu = True
    own_switches.resident = 0
    if getattr(request, "param", "late") == "late":
        monkeypatch.setattr(copies, "Lane", Late)
    return own_switches


both_ways = pytest.mark.parametrize("on_cpu", ["at once", "late"], indirect=True)


def same(a, b):
    """Loss and gradients, to the bit."""
    return a[0] == b[0] and torch.equal(a[1], b[1])


def plan_of(model):
    return next(m.forward.plan for m in model.modules() if isinstance(m.__dict__.get("forward"), BlockForward))


def quantized(spec="nf4", build=llama, adapter=None, **changes):
    torch.manual_seed(0)
    model = qft.quantize_and_wrap(still(build(**changes)), spec, adapter=adapter, progress=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.train()


# ---- activations -----------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    ("name", "compiles"),
    [("llama", False), ("gpt2", False), ("gemma2", False), pytest.param("llama", True, marks=pytest.mark.slow)],
)
def test_gradients_are_the_same_to_the_bit(on_cpu, name, compiles):
    on_cpu.compile, on_cpu.backend = compiles, "aot_eager"
    model = adapted(MODELS[name]())
    model.enable_input_require_grads()
    qft.optimize_training(model, memory="least")
    before = step(model)
    qft.optimize_training(model, memory="least", offload="activations")
    for _ in range(3):
        assert same(step(model), before)
    qft.optimize_training(model, memory=1, offload="activations")
    mixed = step(model)
    qft.optimize_training(model, memory=1)
    assert same(mixed, step(model))


def test_what_blocks_start_from_is_not_kept(monkeypatch):
    """All but the last input are gone from the device when the forward pass is over."""
    import weakref

    inputs = []
    model = qft.optimize_training(adapted(llama(**DEEP)), memory="least", offload="activations")
    model.enable_input_require_grads()
    checkpoints = plan_of(model).checkpoints
    around = type(checkpoints).around

    def watched(self, x):
        inputs.append(weakref.ref(x.untyped_storage()))
        return around(self, x)

    monkeypatch.setattr(type(checkpoints), "around", watched)
    loss = model(input_ids=IDS, labels=IDS).loss
    gc.collect()
    # the first is a leaf, whose gradient is wanted, the last is needed at once
    assert [r() is not None for r in inputs] == [True, False, False, False, True]
    assert not checkpoints.idle_bytes
    loss.backward()
    assert checkpoints.idle_bytes == 4 * 2 * 13 * 64 * 4


def test_buffers_are_used_again_and_come_back():
    model = qft.optimize_training(adapted(llama(**DEEP)), memory="least", offload="activations")
    model.enable_input_require_grads()
    checkpoints = plan_of(model).checkpoints
    step(model)
    buffers = {b.data_ptr() for b in checkpoints._free}
    assert len(buffers) == 4
    for length in [13, 5, 9, 13]:  # shorter ones fit into what is there
        step(model, IDS[:, :length], IDS[:, :length])
    out = model(input_ids=IDS, labels=IDS)  # a forward without a backward
    assert not checkpoints._free
    del out
    assert {b.data_ptr() for b in checkpoints._free} == buffers
    step(model, batch(shape=(2, 20)), batch(shape=(2, 20)))
    assert len(checkpoints._free) == 4 and all(b.numel() == 2 * 20 * 64 * 4 for b in checkpoints._free)
    qft.unoptimize(model)
    assert not checkpoints.idle_bytes


def test_two_forwards_before_a_backward_and_a_graph_that_is_kept():
    model = adapted(llama(**DEEP))
    model.enable_input_require_grads()

    def run(retain):
        model.zero_grad()
        losses = [model(input_ids=i, labels=i).loss for i in (IDS, IDS[:, :7])]
        sum(losses).backward(retain_graph=retain)
        if retain:
            sum(losses).backward()
        return float(sum(losses).detach()), torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    for retain in [False, True]:
        qft.optimize_training(model, memory="least")
        before = run(retain)
        qft.optimize_training(model, memory="least", offload="activations")
        assert same(run(retain), before)


def test_an_exception_between_the_passes_loses_nothing(monkeypatch):
    model = adapted(llama(**DEEP))
    qft.optimize_training(model, memory="least", offload="activations")
    before = step(model)
    mlp = model.get_base_model().model.layers[2].mlp
    calls = []

    def fails(*args, where):
        calls.append(1)
        if len(calls) == where:
            raise KeyboardInterrupt
        return type(mlp).forward(mlp, *args)

    for where in [1, 2]:  # in the forward pass, while it is computed again
        calls.clear()
        mlp.__dict__["forward"] = lambda *a, where=where: fails(*a, where=where)
        with contextlib.suppress(KeyboardInterrupt):
            step(model)
        assert len(calls) >= where
        del mlp.__dict__["forward"]
        gc.collect()
        free = plan_of(model).checkpoints._free
        # torch itself holds the graph of a backward pass that failed until the next one
        assert len(free) == (5 if where == 1 else 2)
        assert same(step(model), before)
        gc.collect()
        assert len(free) == (5 if where == 1 else 8)


def test_an_input_that_is_changed_in_place_is_an_error_and_no_wrong_gradient():
    model = adapted(llama(**DEEP))
    model.enable_input_require_grads()
    layers = model.get_base_model().model.layers
    layers[2].register_forward_hook(lambda m, args, out: (args[0].detach().mul_(2), None)[1])
    qft.optimize_training(model, memory="least", offload="activations")
    loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("offload", ["activations", "weights", "all"])
def test_copies_and_pickles(offload):
    model = quantized(**DEEP)
    model.get_input_embeddings()._forward_hooks.clear()  # transformers' hook there cannot be pickled
    qft.optimize_training(model, memory="least", offload=offload)
    before = step(model)
    for twin in [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]:
        for _ in range(2):
            assert same(step(twin), before)
        plan, own = plan_of(twin), plan_of(model)
        assert plan.checkpoints is None or plan.checkpoints is not own.checkpoints
        assert plan.weights is None or plan.weights is not own.weights
        qft.unoptimize(twin)
        assert relative(step(twin)[1], before[1]) < 3e-6
    assert same(step(model), before)


# ---- weights ---------------------------------------------------------------------------------------------------

SPECS = [
    "nf4",
    "fp4:double_quant=true",
    "int8",
    "reference",
    "reference:format=nf4,double_quant=true",
    "hqq:bits=3,group_size=32",
    "gptq:group_size=32",
    "awq:group_size=32",
    "quanto",
    Rows(),
]


@both_ways
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_streamed_weights_give_the_same_gradients(on_cpu, spec):
    calibration = [batch(seed=3)] if "gptq" in str(spec) or "awq" in str(spec) else None
    torch.manual_seed(0)
    model = qft.quantize_and_wrap(llama(**DEEP), spec, calibration=calibration, progress=False).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    own = logits(model.eval())
    qft.optimize_training(model.train(), memory="least")
    before = step(model)
    for resident in [0, 2, 5]:
        on_cpu.resident = resident
        qft.optimize_training(model, memory="least", offload="weights")
        assert len(plan_of(model).weights.blocks) == 5 - resident
        for _ in range(2):
            assert same(step(model), before)
        assert torch.equal(logits(model.eval()), own)
        assert same(step(model.train()), before)
        assert_same_state(model, state)
    qft.unoptimize(model)
    assert_same_state(model, state)
    assert torch.equal(logits(model.eval()), own)


def assert_same_state(model, state):
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[k].to(v.device), v) for k, v in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["least", 2])
def test_streamed_weights_under_compiled_blocks(on_cpu, memory):
    on_cpu.compile, on_cpu.backend, on_cpu.resident = True, "aot_eager", 1
    model = quantized("nf4:double_quant=true", **DEEP)
    qft.optimize_training(model, memory=memory)
    before = step(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    qft.optimize_training(model, memory=memory, offload=("weights", "activations"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        for _ in range(2):
            assert same(step(model), before)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (2 if memory == 2 else 1)


@pytest.mark.parametrize("build", [gpt2, qwen3_moe])
def test_streamed_weights_of_other_architectures(build):
    targets = None
    if build is qwen3_moe:
        experts = ["experts.gate_up_proj", "experts.down_proj"]
        targets = LoraConfig(r=4, target_modules="all-linear", target_parameters=experts)
    model = quantized("reference", build, targets)
    qft.optimize_training(model, memory="least")
    before = step(model)
    qft.optimize_training(model, memory="least", offload="weights")
    for _ in range(2):
        assert same(step(model), before)


def test_each_block_is_sent_for_once_a_pass(monkeypatch):
    """Forward and backward: a block ahead, and the two at the turn are there still."""
    model = quantized(**DEEP)
    qft.optimize_training(model, memory="least", offload="weights")
    stream, copied = plan_of(model).weights, []
    step(model)
    load = stream._lane.copy

    def watched(target, source):
        copied.append(next(i for i, b in enumerate(stream.blocks) if b.buffer.data_ptr() == source.data_ptr()))
        return load(target, source)

    monkeypatch.setattr(stream._lane, "copy", watched)
    step(model)
    assert copied == [0, 1, 2, 3, 4, 2, 1, 0]
    copied.clear()
    logits(model.eval())
    assert copied == [0, 1, 2, 3, 4]
    assert stream.ring_nbytes == 2 * stream.nbytes // 5


def test_two_forwards_and_blocks_out_of_order():
    model = quantized(**DEEP)
    layers = model.get_base_model().model.layers
    x = torch.randn(1, 4, 64)
    rotary = model.get_base_model().model.rotary_emb(x, torch.arange(4)[None])

    def run():
        model.zero_grad()
        losses = [model(input_ids=i, labels=i).loss for i in (IDS, IDS[:, :7])]
        for i in [3, 0, 4, 1]:
            out = layers[i](x, position_embeddings=rotary)
            losses.append((out[0] if isinstance(out, tuple) else out).mean())
        sum(losses[1:]).backward()
        losses[0].backward()
        return float(sum(losses).detach()), torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    qft.optimize_training(model, memory="least")
    before = run()
    qft.optimize_training(model, memory="least", offload="weights")
    assert same(run(), before) and same(run(), before)


@pytest.mark.parametrize("spec", ["nf4", "nf4:double_quant=true", "int8", "reference", "hqq:bits=3,group_size=32"])
def test_save_merge_and_load_see_the_true_weights(tmp_path, spec):
    plain, model = quantized(spec, **DEEP).eval(), quantized(spec, **DEEP).eval()
    qft.optimize_training(model, offload="weights")
    assert torch.equal(logits(model), logits(plain))
    folders = [tmp_path / "plain", tmp_path / "streamed"]
    for one, folder in zip((plain, model), folders):
        qft.save(one, folder, base=True)
    a, b = (logits(qft.load(f)) for f in folders)
    assert torch.equal(a, b)
    for one in (plain, model):
        qft.merge(one)
    assert torch.equal(logits(model), logits(plain))
    for one in (plain, model):
        qft.unmerge(one)
    assert torch.equal(logits(model), logits(plain))
    found = [step(one.train()) for one in (plain, model)]
    assert relative(found[1][1], found[0][1]) < 3e-6
    plain.eval(), model.eval()
    assert torch.equal(model.generate(input_ids=IDS[:1, :5], max_new_tokens=4, do_sample=False),
                       plain.generate(input_ids=IDS[:1, :5], max_new_tokens=4, do_sample=False))  # fmt: skip
    floats = [qft.merge_to_float(one, dtype=torch.float32) for one in (plain, model)]
    assert torch.equal(logits(floats[1]), logits(floats[0]))


def test_a_state_dict_that_is_loaded_is_what_is_computed_with():
    """In place, into the host's buffers: what is on the device counts no longer."""
    other = quantized("reference", seed=1, **DEEP)
    model = qft.optimize_training(quantized("reference", **DEEP), memory="least", offload="weights")
    step(model)
    model.load_state_dict(other.state_dict())
    qft.optimize_training(other, memory="least")
    assert same(step(model), step(other))


@pytest.mark.parametrize("spec", ["reference", "nf4:double_quant=true", "int8"])
def test_moving_the_model_leaves_streamed_weights_where_they_are(spec):
    """Trainers do that. Parameters of packed layers are made anew, and still are views of the host's buffers."""
    model = qft.optimize_training(quantized(spec, **DEEP), memory="least", offload="weights")
    before, blocks = step(model), plan_of(model).weights.blocks
    buffers, moved = [b.buffer.data_ptr() for b in blocks], []
    model._apply(lambda t: (moved.append(t.data_ptr()), t.clone())[1])
    assert not set(moved) & {p for b in blocks for place in b.host.values() for p in place}
    assert same(step(model), before)
    assert [b.buffer.data_ptr() for b in blocks] == buffers


def test_weights_that_do_not_fit_stay_on_the_host_and_it_is_said(monkeypatch):
    model = qft.optimize_training(quantized(**DEEP), memory="least", offload="weights")
    before = step(model)
    stream = plan_of(model).weights
    monkeypatch.setattr(offload_weights, "free_bytes", lambda device: 1000)
    with pytest.warns(qft.QftWarning, match="stay in host memory"):
        qft.unoptimize(model)
    assert all(b.buffer is None for b in stream.blocks)
    qft.optimize_training(model, memory="least")
    assert same(step(model), before)


def test_what_stays_on_the_device_is_what_there_is_room_for(on_cpu, monkeypatch):
    model = quantized(**DEEP)
    sizes = [packed_tensors.nbytes_of(p) for _, p in packed_tensors.check(model.get_base_model().model.layers)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    on_cpu.resident = None
    monkeypatch.setattr(packed_tensors, "_on", lambda *_: False)
    for room, expected in [(0, 5), (1, 4), (3.5, 2), (9, 0)]:
        fixed = 12 * trained + packed_tensors.FOR_A_STEP + 2 * max(sizes)
        with monkeypatch.context() as patch:
            patch.setattr(packed_tensors, "free_bytes", lambda *_, r=room, f=fixed: int(f + r * max(sizes)))
            qft.optimize_training(model, memory="least", offload="weights")
            assert len(plan_of(model).weights.blocks) == expected
    assert packed_tensors.spread(80, 3) == [13, 40, 66] and packed_tensors.spread(4, 4) == [0, 1, 2, 3]


# ---- plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_a_plan_counts_the_buffers_that_there_are(on_cpu, name):
    """The first block of a Llama reads the embeddings themselves, a leaf; others add positions to them, or a scale."""
    on_cpu.compile = False
    model = adapted(MODELS[name]())
    model.enable_input_require_grads()
    qft.optimize_training(model, memory="least", offload="activations")
    step(model)
    asked = {"sequence_length": IDS.shape[1], "batch_size": len(IDS), "optimizer": "sgd", "dtype": torch.float32}
    plan = qft.plan(model.config, "reference", **asked, offload="activations")
    there = plan_of(model).checkpoints.idle_bytes
    assert len(plan_of(model).checkpoints._free) == (1 if name == "llama" else 2)
    assert there == plan.host


def test_a_plan_counts_what_is_offloaded():
    config = llama(num_hidden_layers=12, hidden_size=128, intermediate_size=512).config
    asked = {"sequence_length": 128, "batch_size": 16, "optimizer": "sgd", "memory": "least"}
    asked["adapter"] = LoraConfig(r=1, target_modules="all-linear")
    none = qft.plan(config, **asked)
    inputs = qft.plan(config, **asked, offload="activations")
    boundary = 16 * 128 * 128 * 2
    assert inputs.host == 11 * boundary and not none.host
    # the first stays, since it is a leaf, and the last until it is needed
    assert none.moments["loss"]["activations"] - inputs.moments["loss"]["activations"] == 10 * boundary
    # the worst block of the one is the last, of the other one of the first, beside the gradients of all others
    assert 8 * boundary < none.totals["backward"] - inputs.totals["backward"] <= 9 * boundary
    packed = sum(none.moments["loading"][k] for k in ("codes", "constants"))
    for resident in [None, 3, 12]:
        some = qft.plan(config, **asked, offload="weights", resident=resident)
        streamed = 12 - (resident or 0)
        assert some.host == pytest.approx(packed * streamed / 12, abs=12)
        there = some.moments["backward"]
        kept = there["codes"] + there["constants"] + there.get("ring", 0)
        assert kept == pytest.approx(packed * (12 - streamed + min(2, streamed)) / 12, abs=12)
        assert some.resident == 12 - streamed
    both = qft.plan(config, **asked, offload="all")
    assert both.host == pytest.approx(inputs.host + packed, abs=12)
    assert "inputs of recomputed blocks, weights of 12 of 12 blocks" in str(both)
    for wrong in [{"offload": "disk"}, {"resident": 2}, {"offload": "weights", "resident": -1}]:
        with refuses(qft.BadOption):
            qft.plan(config, **asked, **wrong)
    with refuses(qft.BadOption, "fast=True"):
        qft.plan(config, **asked, offload="all", fast=False)


def test_a_plan_for_a_memory_says_what_offloading_would_do():
    config = llama(num_hidden_layers=6, hidden_size=512, intermediate_size=2048, dtype=torch.bfloat16).config
    asked = {"sequence_length": 128, "batch_size": 8, "optimizer": "sgd"}
    least, most = (qft.plan(config, **asked, offload=o, memory="least") for o in ("weights", None))
    assert least.needed < most.needed
    between = (least.needed + most.needed) // 2
    some = qft.plan(config, **asked, offload="weights", memory=f"{between}e-6MB")
    assert 0 < some.resident < 6 and some.needed <= between
    one_more = qft.plan(config, **asked, offload="weights", memory="least", resident=some.resident + 1)
    assert one_more.needed > between
    inputs = qft.plan(config, **asked, offload="activations", memory="least")
    refused = qft.plan(config, **asked, memory=f"{inputs.needed + 1000}e-6MB")
    assert "with offload='activations' they would fit" in refused.answer


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["weight", ("activations", "disk"), (), 1])
def test_other_values_are_refused(offload):
    model = adapted().eval()
    with refuses(qft.BadOption, "offload=", "'weights'", model=model):
        qft.optimize_training(model, offload=offload)


@pytest.mark.parametrize("offload", ["activations", "weights", "all", ("weights",)])
def test_a_cpu_is_refused(on_cpu, offload):
    on_cpu.offload_on_cpu = False
    model = quantized().eval()
    with refuses(qft.UnsupportedDevice, "is on cpu", "CUDA", model=model):
        qft.optimize_training(model, offload=offload)


def test_weights_that_cannot_be_streamed_are_refused():
    with refuses(qft.UnsupportedOperation, "quantized weights", model=(model := adapted().eval())):
        qft.optimize_training(model, offload="weights")
    pytest.importorskip("torchao", reason="pip install torchao")
    with refuses(qft.UnsupportedOperation, "TorchAO", "offload='activations'", model=(model := quantized("torchao"))):
        qft.optimize_training(model, offload="weights")
    dora = quantized(adapter=LoraConfig(r=4, target_modules="all-linear", use_dora=True)).eval()
    with refuses(qft.UnsupportedOperation, "DoRA", model=dora):
        qft.optimize_training(dora, offload="weights")


def test_unoptimize_leaves_no_trace():
    model = quantized().eval()
    with unchanged(model):
        for offload in ["weights", "all", "activations"]:
            qft.optimize_training(model, offload=offload)
        qft.unoptimize(model)
    assert not any(
        "_apply" in m.__dict__ or "dequantized" in m.__dict__ or "unpacked" in m.__dict__ for m in model.modules()
    )


def test_switches_are_off_by_default():
    assert not optimize.Switches().offload_on_cpu and optimize.Switches().resident is None


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch, on_cpu):
    monkeypatch.undo()
    monkeypatch.setattr(optimize, "switches", optimize.Switches(compile=False, resident=1))
    torch.backends.cuda.matmul.allow_tf32 = False
    return optimize.switches


WIDE = {"attn_implementation": "eager", "num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 2048}
LONG = batch(shape=(8, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("offload", ["activations", "weights", "all"])
def test_gradients_on_cuda(on_gpu, offload, compiles):
    """Copies that do overlap: many steps, and any difference of one bit fails."""
    on_gpu.compile = compiles
    model = quantized("nf4:double_quant=true", lambda **k: llama(torch.bfloat16, **k).cuda(), **WIDE)
    qft.optimize_training(model, memory="least")
    before = step(model, LONG, LONG)
    again = step(model, LONG, LONG)
    assert same(before, again), "the step itself is not deterministic here"
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    qft.optimize_training(model, memory="least", offload=offload)
    for _ in range(10):
        assert same(step(model, LONG, LONG), before)
    assert_same_state(model, state)
    qft.unoptimize(model)
    assert all(p.is_cuda for p in model.parameters())
    qft.optimize_training(model, memory="least")
    assert same(step(model, LONG, LONG), before)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["nf4", "nf4:double_quant=true", "int8", "reference", "hqq"])
def test_a_model_that_was_quantized_on_the_cpu_trains_on_cuda(on_gpu, spec):
    model = quantized(spec, lambda **k: llama(torch.bfloat16, **k), **WIDE)
    whole = copy.deepcopy(model).cuda()
    qft.optimize_training(whole, memory="least")
    before = step(whole, LONG, LONG)
    qft.optimize_training(model, memory="least", offload="weights")
    stream = plan_of(model).weights
    assert len(stream.blocks) == 5 and all(b.buffer.is_pinned() for b in stream.blocks)
    assert same(step(model, LONG, LONG), before)
    assert torch.equal(logits(model.eval()), logits(whole.eval()))
    for one in (model, whole):
        qft.merge(one)
    assert relative(logits(model), logits(whole)) < 0.05  # requantized on the CPU here
    qft.unmerge(model)
    qft.unoptimize(model)
    assert all(p.is_cuda for p in model.parameters())
    qft.optimize_training(model.train(), memory="least")
    assert same(step(model, LONG, LONG), before)


@pytest.mark.gpu
def test_memory_that_offloading_saves(on_gpu):
    def peak(offload):
        torch.manual_seed(0)
        model = quantized("nf4", lambda **k: llama(torch.bfloat16, **k).cuda(), **{**WIDE, "num_hidden_layers": 24})
        qft.optimize_training(model, memory="least", offload=offload)
        ids = batch(shape=(16, 128))
        step(model, ids, ids)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step(model, ids, ids)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        return torch.cuda.max_memory_allocated(), gradients

    boundary, (none, gradients) = 16 * 128 * 512 * 2, peak(None)
    # without inputs the most is held at the end of the backward pass, when all gradients are there, not at its beginning
    assert none - peak("activations")[0] > (24 - 3) * boundary - gradients
    model = quantized("nf4", lambda **k: llama(torch.bfloat16, **k), **WIDE)
    sizes = [packed_tensors.nbytes_of(p) for _, p in packed_tensors.check(model.get_base_model().model.layers)]
    assert none - peak("weights")[0] > (24 - 1 - 2) * sizes[0] * 0.95

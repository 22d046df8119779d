"""`optimize_training(memory="auto" | "24GB")`: as few blocks are recomputed as fit, and nothing else changes."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from models import gpt2, llama, qwen3_moe, t5
from peft import LoraConfig, get_peft_model

import qft
from qft.memory.estimate import Estimate
from qft.memory.from_model import standing
from qft.optimize import optimize, recompute
from qft.optimize.blocks import BlockForward
from qft.optimize.loss_without_logits import Patch

BLOCKS = 6
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(optimize, "switches", optimize.Switches(compile=False))


class Device:
    """A device of a simulated size: `used` bytes are in use, of `most`."""

    def __init__(self):
        self.used, self.most, self.asked = 0, 10**12, 0

    def __call__(self, device):
        self.asked += 1
        return self.used, self.most


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setattr(recompute, "device_memory", found)
    monkeypatch.setattr(recompute, "AUTO", frozenset({"cpu"}))
    return found


def model(quantizer="nf4", dtype=torch.float32, checkpointing=True, make=llama, **changes):
    torch.manual_seed(0)
    changes = {"num_hidden_layers": BLOCKS, **changes} if make is llama else changes
    return qft.quantize_and_wrap(
        make(dtype, **changes),
        quantizer,
        adapter=LoraConfig(**LORA),
        use_gradient_checkpointing=checkpointing,
        progress=False,
    ).train()


def ids(batch=2, sequence=32, seed=0):
    return torch.randint(0, 96, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def step(model, given, **kwargs):
    model.zero_grad()
    out = model(input_ids=given, labels=given, **kwargs)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def chooser(model):
    return next(f.plan.chooser for m in model.modules() if isinstance(f := m.__dict__.get("forward"), BlockForward))


def kept(model):
    """Indices of blocks whose next training step does not run them again."""
    return next(
        sorted(f.plan.keeps) if f.plan.keeps is not None else None
        for m in model.modules()
        if isinstance(f := m.__dict__.get("forward"), BlockForward)
    )


def needs(model, given, count):
    """Bytes that a device must have for so many blocks to keep theirs, by the plan of the model in memory."""
    probe = recompute.Chooser("auto", model.get_base_model(), optimize._blocks.BlockPlan(compiles=False, loss=True))
    size = recompute.Size(*given.shape, False, False)
    return int(probe._adds(size, count) * (1 + recompute.SLACK)) + 1


# ---- what is chosen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(BLOCKS + 1))
def test_the_fewest_that_fit_are_recomputed(device, count):
    network = model()
    device.most = needs(network, ids(), count)
    qft.optimize_training(network, memory="auto")
    step(network, ids())
    # the last block is needed first, and keeping what it would make anew costs nothing
    assert kept(network) == list(range(BLOCKS - max(count, 1), BLOCKS))


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_gradients_are_those_of_full_recomputation_to_the_bit(device, share):
    network = model(dtype=torch.float64)
    qft.optimize_training(network, memory="least")
    loss, grads = step(network, ids())
    device.most = needs(network, ids(), int(share * BLOCKS))
    qft.optimize_training(network, memory="auto")
    before = torch.get_rng_state()
    for _ in range(2):
        again, found = step(network, ids())
        assert torch.equal(loss, again) and grads.keys() == found.keys()
        assert all(torch.equal(grads[n], found[n]) for n in grads)
    assert len(kept(network)) == max(1, share * BLOCKS)
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_draws_what_it_drew(device):
    network = get_peft_model(llama(num_hidden_layers=BLOCKS), LoraConfig(**LORA, lora_dropout=0.3)).train()
    found = []
    for memory in ("least", "auto", "1GB"):
        qft.optimize_training(network, memory=memory)
        torch.manual_seed(3)
        found.append(step(network, ids()))
    assert len(kept(network)) == BLOCKS
    for loss, grads in found[1:]:
        assert torch.equal(loss, found[0][0]) and all(torch.equal(g, found[0][1][n]) for n, g in grads.items())


def test_an_amount_is_a_cap_on_what_the_process_uses(device):
    network = model()
    device.used = 10**6
    amount = int((10**6 * (1 + recompute.SLACK)) + needs(network, ids(), 2)) + 2
    qft.optimize_training(network, memory=f"{amount}B")
    step(network, ids())
    assert len(kept(network)) == 2
    device.most = device.used + 1000  # and on what there is
    with pytest.raises(qft.BadOption):
        step(network, ids(4))


def test_larger_batches_recompute_more_and_shorter_ones_less(device):
    network = model()
    device.most = needs(network, ids(2, 64), 3)
    qft.optimize_training(network, memory="auto")
    counts = {}
    for sequence in (64, 16, 96, 64, 16):
        step(network, ids(2, sequence))
        counts.setdefault(sequence, []).append(len(kept(network)))
    assert counts == {64: [3, 3], 16: [BLOCKS, BLOCKS], 96: counts[96]}
    assert counts[96][0] < 3


def test_a_size_is_measured_once(device, monkeypatch):
    network = qft.optimize_training(model(), memory="auto")
    measured = []
    real = Estimate.measured
    monkeypatch.setattr(Estimate, "measured", lambda self, *a: measured.append(a) or real(self, *a))
    for sequence in (64, 64, 63, 61, 40, 8):  # less than a batch that keeps everything keeps everything
        step(network, ids(2, sequence))
    assert set(measured) == {(2, 64, False)}
    measured.clear()
    step(network, ids(2, 70))
    step(network, ids(2, 71))
    step(network, ids(2, 72))
    assert set(measured) == {(2, 72, False)}


def test_what_is_in_use_when_a_step_begins_counts(device):
    network = model()
    device.most = needs(network, ids(), BLOCKS)
    qft.optimize_training(network, memory="auto")
    step(network, ids())
    assert len(kept(network)) == BLOCKS
    device.used = device.most // 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(network, ids())
    assert 0 < len(kept(network)) < BLOCKS


def test_states_of_an_optimizer_are_not_counted_twice(device):
    network = qft.optimize_training(model(), memory="auto")
    size = recompute.Size(2, 512, False, False)
    trained = [p for p in network.parameters() if p.requires_grad]
    before = chooser(network)._adds(size, 0)
    assert before == recompute.Chooser("auto", network.get_base_model(), chooser(network).plan)._adds(size, 0)
    optimizer = torch.optim.AdamW(trained)
    step(network, ids())
    optimizer.step()
    optimizer.zero_grad()
    states = sum(2 * (-(-4 * p.numel() // 512) * 512) for p in trained)
    assert before - chooser(network)._adds(size, 0) == states


def test_a_mask_counts(device):
    network = qft.optimize_training(model(), memory="auto")
    asks = chooser(network)._adds
    plain, masked = (asks(recompute.Size(1, 128, m, False), BLOCKS) for m in (False, True))
    assert masked - plain >= 128 * 128
    step(network, ids(), attention_mask=torch.ones(2, 32, dtype=torch.long))
    assert [s.masked for s in chooser(network).known] == [True]


# ---- less than possible ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["auto", "20MB"])
def test_less_than_possible_is_refused_before_anything_is_spent(device, memory):
    network = model()
    before = step(network, ids(1, 16))
    network.zero_grad()
    qft.optimize_training(network, memory=memory)
    device.used = 10**6
    device.most = int(10**6 * (1 + recompute.SLACK)) + needs(network, ids(2, 64), 0) + 1
    calls = []
    network.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    error = qft.UnsupportedDevice if memory == "auto" else qft.BadOption
    with pytest.raises(error, match=r"is too little: 16 × 64 tokens need .*; 2 × 64 tokens fit with") as caught:
        network(input_ids=ids(16, 64), labels=ids(16, 64))
    assert isinstance(caught.value, qft.QftError) and len(str(caught.value)) < 700
    assert not calls and "forward" not in network.get_output_embeddings().__dict__
    assert all(layer.gradient_checkpointing for layer in network.get_base_model().model.layers)
    after = step(network, ids(1, 16))  # and a batch that fits runs
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-6)


def test_offloading_is_named_where_it_makes_the_batch_fit(device):
    """On CUDA, by the plan with offloading; a model that offloads already is not told to."""
    network = model()
    qft.optimize_training(network, memory="auto")
    size, cuda = recompute.Size(16, 64, False, False), torch.device("cuda")
    asks = chooser(network)
    need, away = (asks._adds(size, 0, o) for o in (None, frozenset({"activations"})))
    assert 0 < away < need

    def said(limit):
        return str(asks._too_little(size, cuda, 0, limit, int(need * (1 + recompute.SLACK))))

    fits = int(away * (1 + recompute.SLACK)) + 1
    assert "offload='activations' takes" in said(fits) and "offload=" not in said(fits - 2)
    asks.plan.checkpoints = object()
    asks._forget()
    assert asks._adds(size, 0) == away and "offload=" not in said(fits)


def test_what_would_fit(device):
    network = model()
    device.used, device.most = 10**9, 10**9
    qft.optimize_training(network, memory="auto")
    with pytest.raises(qft.UnsupportedDevice, match="leave no room for 1 × 16 tokens either"):
        step(network, ids())
    saved = recompute._by_double_quantization(network.get_base_model())
    count = sum(q.numel() for n, q in llama(num_hidden_layers=BLOCKS).named_parameters() if "proj" in n)
    assert saved == pytest.approx(count * 0.373 / 8, rel=0.05)
    device.used, device.most = 0, 10**9
    qft.optimize_training(network, memory=f"{needs(network, ids(), 0) - saved // 2}B")
    with pytest.raises(qft.BadOption, match="double_quant=true takes"):
        step(network, ids())


def test_within_the_slack_of_a_device_a_step_is_tried(device):
    network = qft.optimize_training(model(), memory="auto")
    device.most = int(needs(network, ids(), 0) / 1.03)
    with pytest.warns(qft.QftWarning, match="may run out of memory"):
        step(network, ids())
    assert kept(network) == []


# ---- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nf4", "int8", "hqq", "reference:format=int,bits=3", {"*.mlp.*": "int8", "*": "nf4"}])
@pytest.mark.parametrize("fast", [True, False])
def test_the_model_as_it_stands_is_measured_as_a_plan_measures_it(spec, fast):
    network = model(spec)
    config = network.get_base_model().config
    planned = Estimate(config, spec, adapter=LoraConfig(**LORA), dtype=torch.float32, fast=fast).measured(2, 48)
    estimate = Estimate(network, "", fast=fast)
    estimate.__dict__["outline"] = standing(network.get_base_model())
    assert estimate.measured(2, 48) == planned


def test_experts_as_they_stand():
    adapter = LoraConfig(
        r=4, target_modules="all-linear", target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    network = qft.quantize_and_wrap(qwen3_moe(), "nf4", adapter=adapter, progress=False).train()
    estimate = Estimate(network, "", fast=False)
    estimate.__dict__["outline"] = standing(network.get_base_model())
    planned = Estimate(network.get_base_model().config, "nf4", adapter=adapter, dtype=torch.float32, fast=False)
    assert estimate.measured(2, 48) == planned.measured(2, 48)


def test_several_adapters_float_bases_and_upcast_norms():
    network = model()
    one = Estimate(network, "")
    one.__dict__["outline"] = standing(network.get_base_model())
    network.add_adapter("second", LoraConfig(**{**LORA, "r": 8}))
    network.base_model.set_adapter(["default", "second"])
    two = Estimate(network, "")
    two.__dict__["outline"] = standing(network.get_base_model())
    assert two.measured(2, 48).blocks[0].saved > one.measured(2, 48).blocks[0].saved
    assert len(two.outline.weights.trained) == 2 * len(one.outline.weights.trained)
    for make in (llama, gpt2):
        plain = Estimate(None, "", fast=False)
        plain.__dict__["outline"] = standing(get_peft_model(make(), LoraConfig(**LORA)).get_base_model())
        assert plain.measured(1, 16).blocks[0].saved > plain.measured(1, 16).blocks[0].boundary


def test_standing_leaves_the_model_alone():
    network = model()
    before = {n: (p, p.requires_grad, p.grad) for n, p in network.named_parameters()}
    keys = {n: set(m.__dict__) for n, m in network.named_modules()}
    standing(network.get_base_model())
    assert {n: set(m.__dict__) for n, m in network.named_modules()} == keys
    assert all(p is before[n][0] and p.grad is before[n][2] for n, p in network.named_parameters())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_that_plans_do_not_know_chooses_itself(device, checkpointing):
    network = qft.quantize_and_wrap(
        llama(),
        "nf4",
        adapter=LoraConfig(**LORA, use_dora=True),
        use_gradient_checkpointing=checkpointing,
        progress=False,
    ).train()
    loss, _ = step(network, ids())
    qft.optimize_training(network, memory="auto")
    with pytest.warns(qft.QftWarning, match="its own gradient checkpointing decides"):
        again, _ = step(network, ids())
    assert kept(network) is None and float(again) == pytest.approx(float(loss), rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(network, ids())


def test_encoder_decoders_choose_themselves(device):
    network = get_peft_model(t5(), LoraConfig(r=4, target_modules=["q", "v"])).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qft.optimize_training(network, memory="auto")
    with pytest.warns(qft.QftWarning, match="encoder-decoder"):
        network(input_ids=ids(), labels=ids()).loss.backward()


# ---- the rest --------------------------------------------------------------------------------------------


def test_without_cuda_auto_is_the_models_own_choice(monkeypatch):
    def never(device):
        raise AssertionError

    monkeypatch.setattr(recompute, "device_memory", never)
    network = qft.optimize_training(model())
    step(network, ids())
    assert kept(network) is None


def test_it_is_silent_and_logs_one_line(device, caplog, capfd):
    network = qft.optimize_training(model(), memory="auto")
    with caplog.at_level(logging.INFO, "qft"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(network, ids())
    assert len(caplog.records) == 1
    assert f"{BLOCKS} of {BLOCKS} blocks keep their activations for 2 × 32 tokens" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_copies_pickles_and_undoing(device):
    network = qft.optimize_training(qft.wrap(qft.quantize(llama(), "reference", progress=False)).train(), memory="auto")
    loss, _ = step(network, ids())
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not chooser(twin).known and chooser(twin).model is twin.get_base_model()
        assert torch.equal(step(twin, ids())[0], loss)
    qft.merge_to_float(copy.deepcopy(network))
    qft.unoptimize(network)
    assert not any(isinstance(m.__dict__.get("forward"), Patch) for m in network.modules())


def test_another_adapter_is_another_plan(device):
    network = qft.optimize_training(model(), memory="auto")
    step(network, ids())
    first = chooser(network)._estimate
    network.add_adapter("second", LoraConfig(**{**LORA, "r": 8}))
    network.set_adapter("second")
    step(network, ids())
    assert chooser(network)._estimate is not first
    assert chooser(network)._estimate.outline.weights.trained[0] % 8 == 0


def test_evaluation_asks_nobody(device):
    network = qft.optimize_training(model(), memory="auto").eval()
    with torch.no_grad():
        network(input_ids=ids(), labels=ids())
    assert not device.asked

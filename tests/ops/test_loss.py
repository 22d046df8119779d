"""The next-token loss from hidden states, held against float64 and against transformers' own."""

import pytest
import torch
from models import relative
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss

from qft.ops import kernels
from qft.ops import loss as module
from qft.ops.loss import PROBE, LogitScaling, Targets, linear_cross_entropy, shifted

VOCABULARY, HIDDEN = 131, 24
PLAIN = LogitScaling()
SCALINGS = [LogitScaling(), LogitScaling(0.25), LogitScaling(1.0, 5.0), LogitScaling(2.0, 30.0)]


def problem(shape=(3, 300), dtype=torch.float32, seed=0, ignored=0.4, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, HIDDEN, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(device, dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(device, dtype)
    labels = torch.randint(0, VOCABULARY, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return hidden, weight, bias, labels.to(device)


def reference(hidden, weight, bias, labels, scaling=PLAIN, num_items=None):
    """In float64, with all logits."""
    hidden = hidden.detach().double().requires_grad_()
    z = hidden @ weight.double().T * scaling.scale
    if bias is not None:
        z = z + bias.double() * scaling.scale
    if scaling.cap is not None:
        z = scaling.cap * torch.tanh(z / scaling.cap)
    targets = shifted(labels).reshape(-1)
    value = cross_entropy(z.reshape(-1, VOCABULARY), targets, reduction="sum")
    value = value / ((targets != -100).sum() if num_items is None else num_items)
    value.backward()
    return value.detach(), hidden.grad


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, and several blocks in each."""
    monkeypatch.setattr(module, "_sizes", lambda *_: (96, 32))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_value_and_gradient_are_those_of_float64(small_chunks, scaling, num_items, ignored):
    hidden, weight, bias, labels = problem(ignored=ignored)
    value = linear_cross_entropy(hidden, weight, shifted(labels), bias=bias, scaling=scaling, num_items=num_items)
    value.backward()
    expected, grad = reference(hidden, weight, bias, labels, scaling, num_items)
    assert value.dtype == torch.float32 and value.shape == ()
    assert relative(value, expected) < 1e-6
    assert relative(hidden.grad, grad) < 2e-6


@pytest.mark.parametrize("num_items", [None, torch.tensor(11)])
def test_same_number_as_transformers(num_items):
    hidden, weight, _, labels = problem()
    ours = linear_cross_entropy(hidden, weight, shifted(labels), num_items=num_items)
    theirs = ForCausalLMLoss(hidden @ weight.T, labels, VOCABULARY, num_items_in_batch=num_items)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_with_all_logits(small_chunks, dtype):
    """Softmax and sum in float32: against float64 no worse than transformers' loss over 16-bit logits."""
    hidden, weight, bias, labels = problem(dtype=dtype)
    _, grad = reference(hidden, weight, bias, labels)
    linear_cross_entropy(hidden, weight, shifted(labels), bias=bias).backward()
    ours, hidden.grad = hidden.grad, None
    ForCausalLMLoss(hidden @ weight.T + bias, labels, VOCABULARY).backward()
    assert ours.dtype == dtype
    assert relative(ours, grad) < 1.2 * relative(hidden.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_the_product_only(dtype):
    hidden, weight, bias, labels = problem(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_cross_entropy(hidden, weight, shifted(labels), bias=bias)
        theirs = ForCausalLMLoss(torch.nn.functional.linear(hidden, weight, bias), labels, VOCABULARY)
    value.backward()
    assert value.dtype == torch.float32 and hidden.grad.dtype == dtype
    # the arguments are rounded to bfloat16; the logits too, where the processor multiplies in it
    exact, _ = reference(*(t.detach().bfloat16().requires_grad_(t is hidden) for t in (hidden, weight, bias)), labels)
    error, their_error = (abs(float(v.detach()) - exact) for v in (value, theirs))
    assert error < 1.001 * their_error + 1e-6 * exact and their_error < 1e-2 * exact


def test_labels_that_do_not_count_are_left_out_before_the_product(monkeypatch):
    rows = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda h, *a: rows.append(len(h)) or linear(h, *a))
    hidden, weight, _, labels = problem()
    linear_cross_entropy(hidden, weight, shifted(labels)).backward()
    assert sum(rows) == int((shifted(labels) != -100).sum()) < labels.numel()
    assert (hidden.grad[shifted(labels) == -100] == 0).all()


def test_nothing_counts():
    """As transformers: 0 / 0 without a number of items, 0 with one; the gradient is zero, not NaN."""
    hidden, weight, _, labels = problem()
    labels.fill_(-100)
    value = linear_cross_entropy(hidden, weight, shifted(labels))
    assert value.isnan() and ForCausalLMLoss(hidden @ weight.T, labels, VOCABULARY).isnan()
    value.backward()
    assert (hidden.grad == 0).all()
    assert linear_cross_entropy(hidden, weight, shifted(labels), num_items=3) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (0, 5), (2, 0)])
def test_tiny_and_empty_batches(shape):
    hidden, weight, _, labels = problem(shape, ignored=0.0)
    value = linear_cross_entropy(hidden, weight, shifted(labels), num_items=2)
    value.backward()
    expected, grad = reference(hidden, weight, None, labels, num_items=2)
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(hidden.grad.double(), grad, atol=1e-6)


def test_a_hidden_state_that_is_no_contiguous_tensor():
    hidden, weight, _, labels = problem((300, 3))
    value = linear_cross_entropy(hidden.transpose(0, 1), weight, shifted(labels.T))
    value.backward()
    expected, grad = reference(hidden.detach().transpose(0, 1), weight, None, labels.T)
    assert relative(value, expected) < 1e-6 and relative(hidden.grad, grad.transpose(0, 1)) < 2e-6


def test_backward_twice_and_without_gradients():
    hidden, weight, _, labels = problem()
    value = linear_cross_entropy(hidden, weight, shifted(labels))
    value.backward(retain_graph=True)
    once = hidden.grad.clone()
    value.backward()
    assert torch.equal(hidden.grad, 2 * once)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, shifted(labels)), value)


def test_a_label_outside_the_vocabulary_raises():
    hidden, weight, _, labels = problem(ignored=0.0)
    labels[0, 5] = VOCABULARY
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden, weight, shifted(labels))


def test_another_index_to_ignore():
    hidden, weight, _, labels = problem()
    other = linear_cross_entropy(hidden, weight, shifted(labels.masked_fill(labels == -100, 5), 5), ignore_index=5)
    same = linear_cross_entropy(hidden, weight, shifted(labels.masked_fill(labels == 5, -100)))
    assert torch.equal(other, same)


def test_targets_know_how_many_they_are():
    assert len(Targets.of(torch.tensor([[1, -100, 3]]))) == 2
    assert Targets.of(torch.tensor([1, 2])).kept is None


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocabulary", [32000, 128256, 262144])
def test_chunks_are_large_and_temporaries_half_a_gibibyte(vocabulary, itemsize):
    for scaling in SCALINGS[0], SCALINGS[-1]:
        rows, block = module._sizes(vocabulary, itemsize, scaling)
        copies = 1 if scaling == LogitScaling() else 2
        assert rows * vocabulary * itemsize + block * vocabulary * 4 * copies <= 1.01 * 2**29
        assert rows * block >= 256 * 32
    assert module._sizes(128256, 2, LogitScaling())[0] >= 1024


# ---- what a model does to its logits -----------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [*SCALINGS, LogitScaling(0.0625), LogitScaling(1 / 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scaling_is_read_off_a_probe(scaling, dtype):
    z = PROBE.to(dtype) * scaling.scale
    if scaling.cap is not None:
        z = torch.tanh(z / scaling.cap) * scaling.cap
    found = LogitScaling.fit(z)
    assert found.scale == pytest.approx(scaling.scale, rel=1e-5)
    assert found.cap == (pytest.approx(scaling.cap, rel=1e-5) if scaling.cap else None)


@pytest.mark.parametrize(
    "other",
    [
        lambda z: z + 1,
        lambda z: z.clamp(-5, 5),
        lambda z: z * 0,
        lambda z: z[..., :-1],
        lambda z: z.abs(),
        lambda z: z.relu(),
        lambda z: torch.atan(z),
        lambda z: z / 0,
        lambda z: z.log_softmax(-1),
    ],
)
def test_anything_else_is_not_taken_for_a_scaling(other):
    assert LogitScaling.fit(other(PROBE)) is None


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["own", "liger", "torch"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(monkeypatch, small_chunks, kernel, scaling, dtype):
    """By qft's kernel, by liger-kernel's where it is installed and fits, and by torch code."""
    torch.backends.cuda.matmul.allow_tf32 = False
    ran, real = [], kernels.next_token
    if kernel == "torch":
        monkeypatch.setattr(kernels, "next_token", lambda *_: False)
    else:
        monkeypatch.setattr(kernels, "next_token", lambda *a: ran.append(real(*a)) or ran[-1])
    hidden, weight, _, labels = problem(dtype=dtype, device="cuda")
    kind = "liger" if kernel == "liger" else "own"
    value = linear_cross_entropy(hidden, weight, shifted(labels), scaling=scaling, kernel=kind)
    value.backward()
    assert all(ran) and (kernel != "own" or ran)
    expected, grad = reference(hidden, weight, None, labels, scaling)
    assert relative(value, expected) < (2e-6 if dtype == torch.float32 else 2e-3)
    assert relative(hidden.grad, grad) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("ignored", [0, 1000])
def test_memory_and_synchronisations_on_cuda(ignored):
    """4,096 tokens of 128,256: their logits would take 1 GiB in bfloat16, 2 more in float32."""
    hidden = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 512, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 128256, (4096,), device="cuda")
    labels[:ignored] = -100
    count = torch.tensor(4096, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, num_items=count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 0.6 * 2**30

"""A quantizer that wants activation statistics gets them: of its own kind, from memory and from a folder."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import Rows, refuses
from models import batch, gpt2, llama, logits, plain, qwen2, relative, t5, train_a_little
from starts import config, layers
from torch import nn
from twins import quantized

import qft
from qft.core.quantizer import is_conv1d
from qft.data.calibration import batches
from qft.data.collect import collect

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = batch(3, (6, 20))
seen = []


@dataclass(frozen=True)
class Diagonal(Rows):
    """Rows of integers over columns that are scaled by what they read, as activation-aware formats do."""

    name: ClassVar[str] = "diagonal"
    bits: int = 4

    @property
    def capabilities(self):
        return qft.Capabilities(bits=self.bits, devices=frozenset({"cpu", "cuda"}), needs_calibration=True)

    def pack(self, weight, *, statistics=None):
        seen.append(statistics)
        column = statistics.mean_square.sqrt().clamp(min=1e-4).sqrt()
        return {**super().pack(weight.float() * column), "column": column}

    def unpack(self, packed, *, shape, dtype, out=None):
        value = packed["qweight"] * packed["scale"] / packed["column"]
        return value.to(dtype) if out is None else out.copy_(value)


@dataclass(frozen=True)
class Full(Diagonal):
    name: ClassVar[str] = "full"
    statistics_kind: ClassVar[str] = "full"


@pytest.fixture(autouse=True)
def _fresh():
    seen.clear()


def expected(model, kind):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    return {n: s for g in collect(model, names, batches(DATA), kind) for n, s in g.statistics.items()}


def equal(a, b):
    """Two statistics, to the bit."""
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(vars(a).values(), vars(b).values())
    )


@pytest.mark.parametrize("cls", [Diagonal, Full])
@pytest.mark.parametrize("builder", [llama, gpt2, qwen2, t5, plain], ids=lambda b: b.__name__)
def test_each_layer_gets_its_own(cls, builder):
    """Those of the float model, for each layer that is quantized; the second moment for who asks for it."""
    wanted = expected(builder(), cls.statistics_kind)
    model = qft.quantize(builder(), cls(), calibration=DATA, progress=False)
    names = [n for n, *_ in quantized(model)]
    assert len(seen) == len(names)
    for name, layer, _, handle in quantized(model):
        assert torch.equal(layer.column, wanted[name].mean_square.sqrt().clamp(min=1e-4).sqrt())
        assert handle.shape[1] == len(layer.column)
    assert all((s.second_moment is None) == (cls is Diagonal) for s in seen)
    for name in names:
        assert any(equal(wanted[name], s) for s in seen), name


@pytest.mark.parametrize("cls", [Diagonal, Full])
@pytest.mark.parametrize("builder", [llama, gpt2], ids=["llama", "gpt2"])
def test_from_a_folder(cls, builder, tmp_path):
    builder().save_pretrained(tmp_path, max_shard_size="60KB")
    a = qft.quantize(builder(), cls(), calibration=DATA, progress=False).state_dict()
    for b in (
        qft.quantize(tmp_path, cls(), calibration=DATA, device="cpu", progress=False).state_dict(),
        qft.quantize(builder(), cls(), calibration=DATA, device="cpu", progress=False).state_dict(),
        qft.quantize(builder(), cls(), calibration=(row for row in DATA), progress=True).state_dict(),
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_what_they_are_for():
    """Scaled columns lose less of the output than plain ones: the right statistics went to the right layers."""
    float_model = llama()
    float_model.model.embed_tokens.weight.data[:, :6] *= 12
    wanted, lost = expected(float_model, "full"), {}
    for spec in (Diagonal(), Rows(bits=4)):
        model = copy.deepcopy(float_model)
        qft.quantize(model, spec, calibration=DATA if spec.name == "diagonal" else None, progress=False)
        total = 0.0
        for name, _, q, handle in quantized(model):
            gap = float_model.get_submodule(name).weight.detach() - q.dequantize(handle, dtype=torch.float32)
            total += float(((gap @ wanted[name].second_moment) * gap).sum())
        lost[spec.name] = total
    assert lost["diagonal"] < 0.9 * lost["rows"]


def test_several_quantizers_and_an_init_in_one_pass():
    """Each layer's kind is the larger of what its quantizer and its init ask for, and both read the same."""
    spec = {"*.mlp.*": Full(), "*.v_proj": Diagonal(), "*": "reference"}
    reads = {}

    def init(weight, quantized, rank, scaling, *, statistics):
        reads[id(statistics)] = statistics
        return torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)

    init.needs = "diagonal"
    model = qft.quantize_and_wrap(llama(), spec, adapter=config(), init=init, calibration=DATA, progress=False)
    assert len(layers(model)) == len(reads) == 14
    assert len(seen) == 8
    assert all(id(s) in reads for s in seen)
    assert sum(s.second_moment is not None for s in reads.values()) == 6
    init.needs = "full"
    reads.clear()
    qft.quantize_and_wrap(llama(), spec, adapter=config(), init=init, calibration=DATA, progress=False)
    assert all(s.second_moment is not None for s in reads.values())


@pytest.mark.parametrize("init", [None, "loftq", "qera", "auto"])
def test_the_whole_way(init):
    """Quantize with data, wrap, train a step, merge to floats."""
    model = qft.quantize_and_wrap(
        llama(),
        Diagonal(),
        adapter=config(),
        init=init,
        calibration=DATA,
        use_gradient_checkpointing=False,
        progress=False,
    )
    train_a_little(model)
    with torch.no_grad():
        y = logits(model)
        assert relative(logits(qft.merge_to_float(model)), y) < 2e-6


def test_without_data(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    for spec in (Diagonal(), Full(), {"*.mlp.*": Full(), "*": "reference"}):
        with refuses(qft.NeedsCalibration, "needs calibration data", "calibration=", model=model):
            qft.quantize(model, spec, progress=False)
        with refuses(qft.NeedsCalibration, "calibration=", model=model):
            qft.quantize_and_wrap(model, spec, init="loftq", progress=False)
        with refuses(qft.NeedsCalibration, "calibration="):
            qft.quantize(tmp_path, spec, progress=False)
    with refuses(qft.NeedsCalibration, "no tokens", model=model):
        qft.quantize(model, Diagonal(), calibration=[], progress=False)
    with refuses(qft.BadOption, "token id 1000", model=model):
        qft.quantize(model, Diagonal(), calibration=[[1000]], progress=False)
    assert not seen


def test_data_that_is_no_statistics_is_refused_by_the_method_itself():
    model = llama()
    with refuses(qft.BadOption, "statistics by layer name", "list", model=model):
        Diagonal().quantize(model, ["model.layers.0.mlp.up_proj"], calibration=[1, 2])

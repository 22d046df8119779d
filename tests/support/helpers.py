"""What several test files share: a quantizer of one's own, a fresh interpreter, what a refusal must leave alone."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import logits
from torch import Tensor

import qft

BUILTIN = {
    qft.UnknownQuantizer: ValueError,
    qft.BadOption: ValueError,
    qft.NoTargets: ValueError,
    qft.MissingDependency: ImportError,
    qft.UnsupportedDevice: RuntimeError,
    qft.BadFolder: OSError,
    qft.UnsupportedOperation: NotImplementedError,
    qft.NeedsCalibration: ValueError,
    qft.NeedsOriginal: ValueError,
    qft.BadShape: ValueError,
    qft.NonFiniteWeights: ValueError,
    qft.AlreadyQuantized: ValueError,
    qft.AdapterMismatch: ValueError,
    qft.PartlyQuantized: RuntimeError,
}
"""The builtin that each error is, too; from the design."""


@dataclass(frozen=True)
class Rows(qft.TensorQuantizer):
    """Symmetric integers, one scale a row."""

    name: ClassVar[str] = "rows"
    bits: int = 8
    clip: float = 1.0

    @property
    def capabilities(self) -> qft.Capabilities:
        return qft.Capabilities(bits=self.bits, devices=frozenset({"cpu", "cuda"}), requantize=True)

    def pack(self, weight: Tensor, *, statistics=None) -> dict[str, Tensor]:
        top = 2 ** (self.bits - 1) - 1
        scale = (weight.float().abs().amax(1, keepdim=True) * self.clip / top).clamp(min=1e-30)
        return {"qweight": (weight.float() / scale).round().clamp(-top, top).to(torch.int8), "scale": scale}

    def unpack(self, packed, *, shape, dtype, out=None) -> Tensor:
        value = packed["qweight"] * packed["scale"]
        return value.to(dtype) if out is None else out.copy_(value)


def hears_ctrl_c():
    """Before a program starts, as `preexec_fn`: a job in a shell's background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_python(code, *args, paths=(), check=True):
    """Run code in a fresh interpreter with this one's search path, after `paths`; its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def refuses(error, *says, model=None, outputs=True):
    """The block raises `error`, which is both ours and a builtin and says these things, and `model` is what it was."""
    before = _snapshot(model, outputs) if model is not None else None
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert isinstance(caught.value, qft.QftError) and isinstance(caught.value, BUILTIN[error])
    message = str(caught.value)
    for text in says:
        assert text in message, f"{text!r} is not in {message!r}"
    assert len(message) < 700, "nobody reads a message of this length"
    if before is not None:
        _compare(before, _snapshot(model, outputs))


@contextmanager
def unchanged(model, outputs=True):
    """The block leaves the model as it is, to the bit."""
    before = _snapshot(model, outputs)
    yield
    _compare(before, _snapshot(model, outputs))


@torch.no_grad()
def _snapshot(model, outputs):
    config = getattr(model, "config", None)
    return {
        "outputs": {"logits": logits(model).clone()} if outputs else {},
        "state": {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)},
        "parameters": {n: (p, p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        "modules": {
            n: (m, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        },
        "attributes": set(vars(model)),
        "config": config.to_dict() if hasattr(config, "to_dict") else config,
        "adapters": dict(getattr(model, "peft_config", {})),
    }


def _compare(before, after):
    for part in ("outputs", "state"):
        assert before[part].keys() == after[part].keys()
        changed = [k for k, v in before[part].items() if not _same_bits(v, after[part][k])]
        assert not changed, f"{part} changed: {changed}"
    for part in ("parameters", "modules"):
        assert before[part].keys() == after[part].keys()
        for name, (thing, *facts) in before[part].items():
            assert after[part][name][0] is thing, f"{name} is another object"
            assert list(after[part][name][1:]) == facts, f"{name} was {facts}, and is {after[part][name][1:]}"
    for part in ("attributes", "config", "adapters"):
        assert before[part] == after[part], part


def _same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))

"""What the tests of kernels share: where they run, and which programs ran.

`pytest -m gpu` runs them on a device. Without one, a test of each file starts it again with TRITON_INTERPRET=1, which triton
reads when it is imported, and what is marked gpu here runs on CPU tensors there.
"""

import os

import pytest
import torch

from qft.ops.kernels import launch as launching

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

on_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu


def recorded(monkeypatch, module):
    """The programs that `module` launches from now on, in order."""
    ran = []

    def launch(program, *args, **kwargs):
        done = launching.launch(program, *args, **kwargs)
        if done:
            ran.append(program)
        return done

    monkeypatch.setattr(module, "launch", launch)
    return ran

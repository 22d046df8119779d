import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# pytest-xdist reads the workers' warnings in one thread each: were QftWarning's module not there yet, two of them would
# import it, and PEFT, at the same time, which deadlocks.
import qft  # noqa: F401


def pytest_collection_modifyitems(items):
    """Tests that need a GPU skip without one, and the run says how many."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run `pytest -m gpu` on one"))


@pytest.fixture
def fused_on_disk(monkeypatch):
    """Llamas whose files hold gate_proj and up_proj as one tensor, and q, k and v: some models' files do."""
    from models import llama
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    gate_up = WeightConverter("mlp.gate_up_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    qkv = WeightConverter("attn.qkv", ["attn.q_proj", "attn.k_proj", "attn.v_proj"], [Chunk(dim=0)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [gate_up, qkv])
    return lambda: llama(num_key_value_heads=4)

"""all-linear leaves out layers that are smaller than the rank, and names them; layers that the user names are refused."""

import pytest
import torch
from helpers import refuses
from models import bert, llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, Swinv2Config, Swinv2ForImageClassification

import qft
from qft.errors import BadShape


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.gated = nn.Linear(64, 64), nn.Linear(64, 4), nn.Linear(4, 64)

    def forward(self, x):
        return self.gated(self.narrow(self.wide(x)))


def adapted(model):
    return {n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_small_layers_are_left_out_and_named(spec):
    with pytest.warns(qft.QftWarning, match=r"leaves out 2 layers: narrow, gated: smaller than the rank"):
        model = qft.quantize_and_wrap(
            Narrow(),
            spec,
            adapter=LoraConfig(r=8, target_modules="all-linear"),
            progress=False,
            skip=["narrow", "gated"],
        )
    assert adapted(model) == {"wide"}
    quantized = qft.quantize(Narrow(), spec, skip=["narrow", "gated"], progress=False)
    assert adapted(get_peft_model(quantized, LoraConfig(r=8, target_modules="all-linear"))) == {"wide"}
    patterned = LoraConfig(r=8, target_modules="all-linear", rank_pattern={"narrow": 2})
    assert adapted(qft.wrap(qft.quantize(Narrow(), spec, skip=["narrow", "gated"], progress=False), patterned)) == {
        "wide", "narrow",
    }  # fmt: skip


def test_a_small_layer_that_the_user_names_is_refused():
    model = Narrow()
    config = LoraConfig(r=8, target_modules=["wide", "narrow"])
    with refuses(BadShape, "narrow", model=model, outputs=False):
        qft.quantize_and_wrap(model, "reference", adapter=config, progress=False)


def swin():
    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return Swinv2ForImageClassification(config).eval()


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2)).eval()


@pytest.mark.parametrize("builder", [swin, mamba])
def test_families_that_were_refused(tmp_path, builder):
    model = builder()
    names = {n for n, _ in model.named_modules()}
    wrapped = qft.quantize_and_wrap(
        model, "reference", adapter=LoraConfig(r=16, target_modules="all-linear"), progress=False
    )
    assert adapted(wrapped) and adapted(wrapped) <= names
    assert not any("cpb_mlp" in n or "out_proj" in n for n in adapted(wrapped))
    qft.save(wrapped, tmp_path)
    assert adapted(qft.load(tmp_path, base=builder())) == adapted(wrapped)


def test_models_without_small_layers_are_as_before(recwarn):
    for builder in (llama, bert):
        qft.quantize_and_wrap(
            builder(), "reference", adapter=LoraConfig(r=4, target_modules="all-linear"), progress=False
        )
    assert not [w for w in recwarn if "leaves out" in str(w.message)]

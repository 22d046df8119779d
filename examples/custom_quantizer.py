"""A quantizer of your own: two functions on tensors, and every verb of qft works over it.

python examples/custom_quantizer.py
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qft


@qft.register_quantizer("rowwise8")
@dataclass(frozen=True)
class Rowwise8(qft.TensorQuantizer):
    """Symmetric 8-bit integers with one scale a row; weights beyond `clip` times the row's largest are cut off."""

    name: ClassVar[str] = "rowwise8"
    clip: float = 1.0

    @property
    def capabilities(self):
        return qft.Capabilities(bits=8, devices=frozenset({"cpu", "cuda", "mps"}), requantize=True)

    def pack(self, weight, *, statistics=None):
        largest = weight.float().abs().amax(1, keepdim=True)
        scale = (largest * self.clip / 127).clamp(min=1e-30)
        codes = (weight.float() / scale).round().clamp(-127, 127)
        return {"qweight": codes.to(torch.int8), "scale": scale}

    def unpack(self, packed, *, shape, dtype, out=None):
        weight = packed["qweight"] * packed["scale"]
        return weight.to(dtype) if out is None else out.copy_(weight)


# ---- using it -----------------------------------------------------------------------------------------------


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def train(model, ids, steps=30):
    """Learn one batch; the loss before and after."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


def main():
    print(qft.testing.check_quantizer(Rowwise8()))

    model = qft.quantize_and_wrap(small_llama(), "rowwise8:clip=0.98")
    ids = torch.arange(4 * 32).view(4, 32) % 7  # a rhythm to learn
    first, last = train(model, ids)
    print(f"trained: loss {first:.3f} -> {last:.3f}")
    assert last < 0.8 * first

    with torch.no_grad():
        tuned = model(input_ids=ids).logits

        print(qft.merge(model))  # into the 8-bit weights
        qft.unmerge(model)
        assert torch.equal(model(input_ids=ids).logits, tuned)

        merged = qft.merge_to_float(model)  # a plain model
        error = (merged(input_ids=ids).logits - tuned).norm() / tuned.norm()
        print(f"merged to float: {error:.1e} off")
        assert error < 1e-5

        with tempfile.TemporaryDirectory() as folder:
            qft.save(model, Path(folder) / "adapter")
            again = qft.load(Path(folder) / "adapter", base=small_llama())  # quantized as the saved base was
            assert torch.equal(again(input_ids=ids).logits, tuned)

            qft.save(model, Path(folder) / "both", base=True)
            alone = qft.load(Path(folder) / "both")  # the 8-bit base is in the folder
            assert torch.equal(alone(input_ids=ids).logits, tuned)
    print("saved and loaded: the same logits")


if __name__ == "__main__":
    main()

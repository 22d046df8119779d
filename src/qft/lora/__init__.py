"""LoRA over any quantized weight: one layer, one autograd linear, and PEFT's door to them."""

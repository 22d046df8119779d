"""Differentiable products, the loss, bit packing, and kernels."""

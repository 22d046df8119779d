"""Make a training step fast and small: compiled blocks, recomputation, offloading, a loss without logits."""

"""Merge adapters into quantized and float weights, and measure what the merge costs."""

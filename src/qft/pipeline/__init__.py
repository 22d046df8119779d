"""From a float model or folder to a quantized model with adapters."""

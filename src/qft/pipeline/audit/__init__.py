"""What a quantized model holds: bits, errors, what stayed float and why."""

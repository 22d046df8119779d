"""Plan the memory of a fine-tune before it is spent."""

"""Choose everything about a fine-tune within a memory limit, and run it."""

"""Save, load, export and transfer adapters and models."""

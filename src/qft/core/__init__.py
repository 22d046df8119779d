"""The interface of a backend, packed layers, the registry, selection, and what qft keeps on a model."""

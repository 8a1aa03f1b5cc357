"""Mixing adapters inside the model: per token and module, how much of which. Tensors only."""

"""LoRA adapters as files and tensors. Knows nothing of engines, routing or settings."""

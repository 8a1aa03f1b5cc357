"""Miniature experts: character-level Llama bases and LoRA adapters, trained from a fixed seed."""

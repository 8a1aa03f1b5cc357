"""GLIDER's global half: how near a request is to each member's instruction, as logits for every
layer's gate. Knows no embedder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from composer.adapters.gates.files import Gate

ROWS = "prior.rows"
"""The members' instruction vectors (E, dim), each of length 1."""


def prior(gate: Gate, embedding: Sequence[float]) -> Tensor:
    """(E,) γ·cos(request, instruction) (Li et al., GLIDER, arXiv 2410.07172, section 3.3), with γ
    the setting `gamma`; the gate's own tensor `prior.rows` (E, dim) and `embedding` (dim,) are of
    unit length. Raises ValueError where the embedding is another model's."""
    rows = gate.tensors[ROWS].float()
    if rows.shape[1] != len(embedding):
        raise ValueError(
            f"the gate reads embeddings of {rows.shape[1]} numbers, and the request's has "
            f"{len(embedding)}"
        )
    gamma = gate.manifest.settings.get("gamma", 1.0)
    if not isinstance(gamma, int | float):
        raise ValueError(f"the gate's `gamma` is {gamma!r}, not a number")
    return gamma * (rows @ torch.tensor(embedding, dtype=torch.float32, device=rows.device))

"""A gate's weights averaged over a prompt: one weight for each member and layer, which a composed
adapter can have. Knows no model and no request."""

from __future__ import annotations

import torch
from torch import Tensor


class PromptMeans:
    """Collapses a gate to the query while its model reads prompts: the mean weights over the
    prompt's tokens, by module, of each row. `of`: module → (B, E)."""

    def __init__(self, real: Tensor) -> None:
        """`real` (B, t) is False at padding."""
        self._real = real
        self.of: dict[str, Tensor] = {}

    def add(self, module: str, weights: Tensor) -> None:
        """weights (B, t', E), or fewer tokens or rows that broadcast: t' are the last of the t
        tokens, where the layer sees no others (the head)."""
        real = self._real[:, -weights.shape[1] :, None].to(weights.dtype)
        total = torch.where(real > 0, weights, 0.0).sum(1)
        self.of[module] = total / real.sum(1).clamp(min=1)

    def row(self, row: int) -> dict[str, tuple[float, ...]]:
        return {module: tuple(means[row].tolist()) for module, means in self.of.items()}

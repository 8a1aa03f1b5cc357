"""From a layer's input to a gate's logits: one vector a member, and how both are normalised. Knows
no selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["none", "absolute", "standardised"]
"""none: x·v, a trained gate. absolute: |x·v|, Arrow, for which v and −v are the same. standardised:
LN(x)·LN(v) / √d with layer norms without affine parts, PHATGOOSE."""

EPS = 1e-5
"""Of torch's layer norm."""


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """`rows` (E, d_in) float32, one a member: of "standardised" already LN(v) / √d, so that what is
    left to do is one product and a division by x's standard deviation. `bias` (E,), or None."""

    rows: Tensor
    normalise: Normalise = "none"
    bias: Tensor | None = None

    @classmethod
    def of(
        cls, vectors: Tensor, normalise: Normalise = "none", bias: Tensor | None = None
    ) -> Projection:
        """From the members' vectors (E, d_in) as they were trained."""
        rows = vectors.float()
        if normalise == "standardised":
            width = rows.shape[1]
            rows = torch.nn.functional.layer_norm(rows, (width,), eps=EPS) / width**0.5
        return cls(rows.contiguous(), normalise, None if bias is None else bias.float())

    def to(self, device: torch.device) -> Projection:
        bias = None if self.bias is None else self.bias.to(device)
        return Projection(self.rows.to(device), self.normalise, bias)

    def logits(self, x: Tensor) -> Tensor:
        """(…, d_in) → (…, E) in float32."""
        return self.finish(x.float() @ self.rows.T, x)

    def finish(self, product: Tensor, x: Tensor) -> Tensor:
        """`product` (…, E) is x·rows, however it was computed: a row-parallel layer sums it over
        its shards first. LN(v) has mean 0, so x's own mean falls out of the product."""
        if self.normalise == "absolute":
            product = product.abs()
        elif self.normalise == "standardised":
            variance = x.float().var(dim=-1, keepdim=True, correction=0)
            product = product * torch.rsqrt(variance + EPS)
        return product if self.bias is None else product + self.bias

"""From logits to weights over a gate's members. Every published gate selects by one of these
settings. Knows no layer and no query."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor


class Tsallis(BaseModel):
    """DynMoLE's switch (arXiv 2504.00661, section 3): a token whose routing is this uncertain is
    routed softly over all members, any other sparsely."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    q: float = Field(1.1, gt=0, description="Of the entropy (1 − Σ p^q) / (q − 1); not 1.")
    above: float = Field(0.9, ge=0, description="Entropy above which all members take part.")

    @field_validator("q")
    @classmethod
    def _apart_from_one(cls, q: float) -> float:
        if abs(q - 1) < 9e-4:  # nearer, float32 loses the quotient
            raise ValueError("the entropy is not defined at 1; set 1.001, nearly Shannon's")
        return q

    def highest(self, outs: int) -> float:
        """The entropy of `outs` equal shares, which nothing exceeds."""
        return float((1 - outs ** (1 - self.q)) / (self.q - 1))


class Selection(BaseModel):
    """softmax(logits / temperature), of which the `top_k` likeliest are kept, or as many as it
    takes to reach the mass `top_p`, and made to add up to 1. With `null`, the last logit is that of
    the base model alone (AdaMoE's null expert, arXiv 2406.13233): its share goes to no member."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    null: bool = False
    tsallis: Tsallis | None = None

    def weights(self, logits: Tensor) -> Tensor:
        """(…, E) logits → (…, E) weights in float32 that add up to 1, without the null expert's
        column where there is one: then to at most 1. No shape depends on the data."""
        p = torch.softmax(logits.float() / self.temperature, dim=-1)
        kept = self._kept(p)
        if self.tsallis is not None:
            q = self.tsallis.q
            entropy = (1 - p.pow(q).sum(-1, keepdim=True)) / (q - 1)
            kept = torch.where(entropy > self.tsallis.above, p, kept)
        kept = kept / kept.sum(-1, keepdim=True)
        return kept[..., :-1] if self.null else kept

    def _kept(self, p: Tensor) -> Tensor:
        """`p` with 0 for those that are not selected; ties are won by the first."""
        if self.top_k is None and self.top_p is None:
            return p
        # Stable, so that equal logits select the same members on every device.
        ordered, place = p.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k is not None:
            keep[..., self.top_k :] = False
        if self.top_p is not None:
            keep &= ordered.cumsum(-1) - ordered < self.top_p
        return torch.zeros_like(p).scatter(-1, place, torch.where(keep, ordered, 0.0))

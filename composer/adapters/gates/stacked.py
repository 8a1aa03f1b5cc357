"""A gated layer's adapters as two matrices and a gate: no loop over members, no gather, no shape
that depends on the data. Knows neither papers nor models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composer.adapters.factors import Factors
from composer.adapters.gates.projection import Projection
from composer.adapters.gates.selection import Selection


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """A (Σr, d_in) and B (d_out, Σr), scales folded into B; `ranks` (E,) is each member's share of
    the rows of A, 0 for one that has no factors here."""

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, members: Sequence[Factors | None], dtype: torch.dtype) -> Stacked:
        """Raises ValueError where no member has factors here, or two disagree on the layer."""
        present = [factors for factors in members if factors is not None]
        if not present:
            raise ValueError("no member has factors here; leave the layer out of the gate")
        if len({factors.shape for factors in present}) > 1:
            sizes = " and ".join(str(factors.shape) for factors in present)
            raise ValueError(f"the layer is {sizes} in different adapters; gate those of one base")
        a = torch.cat([factors.a.float() for factors in present])
        b = torch.cat([factors.b.float() * factors.scale for factors in present], dim=1)
        ranks = tuple(0 if factors is None else factors.rank for factors in members)
        return cls(a.to(dtype).contiguous(), b.to(dtype).contiguous(), ranks)

    def to(self, device: torch.device, dtype: torch.dtype) -> Stacked:
        return Stacked(self.a.to(device, dtype), self.b.to(device, dtype), self.ranks)

    def expanded(self, weights: Tensor) -> Tensor:
        """(…, E) → (…, Σr): each member's weight once for each of its ranks."""
        if len(set(self.ranks)) == 1:
            rank = self.ranks[0]
            return weights.unsqueeze(-1).expand(*weights.shape, rank).flatten(-2)
        ranks = torch.tensor(self.ranks, device=weights.device)
        return weights.repeat_interleave(ranks, dim=-1, output_size=sum(self.ranks))

    def delta(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (…, d_in), weights (…, E) → (…, d_out): Σ_i w_i s_i B_i A_i x."""
        hidden = x.to(self.a.dtype) @ self.a.T
        return (hidden * self.expanded(weights).to(hidden.dtype)) @ self.b.T


@dataclass(frozen=True, slots=True, eq=False)
class GatedLayer:
    """The stacked adapters of one layer and the gate over them."""

    stacked: Stacked
    projection: Projection
    selection: Selection

    def weights(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """(…, d_in) → (…, E). `prior` (…, E) is added to the logits of the members: what is known
        of the whole query (GLIDER, arXiv 2410.07172, section 3.3)."""
        logits = self.projection.logits(x)
        if prior is not None:
            # The null expert has no instruction, so its logit stays.
            logits = logits + torch.nn.functional.pad(prior, (0, int(self.selection.null)))
        return self.selection.weights(logits)

    def to(self, device: torch.device, dtype: torch.dtype) -> GatedLayer:
        """Factors in `dtype`; the gate stays in float32."""
        return GatedLayer(
            self.stacked.to(device, dtype), self.projection.to(device), self.selection
        )

    def delta(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        return self.stacked.delta(x, self.weights(x, prior)).to(x.dtype)

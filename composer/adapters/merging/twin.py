"""What members share, once, and what each has of its own, compressed and weighed for an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from composer.adapters.factors import Modules
from composer.adapters.merging.base import Merged, MergeSettings, Weights, aligned
from composer.adapters.merging.cat import stack
from composer.adapters.merging.truncation import truncated
from composer.types import Tier


class TwinSettings(MergeSettings):
    shared: float = Field(0.3, gt=0, description="Weight of each member in the shared part.")
    rank: int = Field(8, ge=1, description="Of each member's own part.")


class Twin:
    """Twin-Merging: shared S = Σ_i shared · ΔW_i (task arithmetic); own part of member i is
    ΔW_i − S cut to `rank` by singular values; the adapter for an input is S + Σ_i w_i · own_i, with
    weights from the router. Reports `energy`, the smallest share of an own part's squared norm that
    is kept.

    Its rank is at most Σ r_i + M · rank. The weights are the query's: one adapter for each
    combination of quantised weights, built when first asked for.
    """

    name: ClassVar[str] = "twin"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Twin-Merging, arXiv 2406.15479, sections 3.2 and 3.3"
    settings: ClassVar[type[MergeSettings]] = TwinSettings
    whole: ClassVar[bool] = True

    @staticmethod
    def merge(members: Sequence[Modules], weights: Weights, settings: TwinSettings) -> Merged:
        weights.check(len(members))
        everybody = aligned(members, Weights((1.0,) * len(members)))
        out, energy = {}, 1.0
        for module, present in everybody.items():
            shared = [factors.times(settings.shared) for _, factors in present]
            parts = list(shared)
            for weight, member in zip(weights.of(module), members, strict=True):
                if weight == 0 or module not in member:
                    continue
                own = stack([member[module], *(part.times(-1.0) for part in shared)])
                cut, kept = truncated(own, settings.rank)
                parts.append(cut.times(weight))
                energy = min(energy, kept)
            out[module] = stack(parts)
        return Merged(out, {"energy": energy}, energy)

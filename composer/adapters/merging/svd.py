"""The exact sum, cut to a rank: the nearest adapter of that size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from composer.adapters.factors import Modules
from composer.adapters.merging.base import Merged, MergeSettings, Weights
from composer.adapters.merging.cat import Cat, CatSettings
from composer.adapters.merging.truncation import fitted
from composer.types import Tier


class SvdSettings(MergeSettings):
    rank: int = Field(16, ge=1, description="Of the merged adapter.")


class Svd:
    """Σ w_i s_i B_i A_i truncated to its `rank` largest singular values in every module. Reports
    `energy`, the smallest share of a module's squared Frobenius norm that is kept."""

    name: ClassVar[str] = "svd"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Eckart and Young, Psychometrika 1, 1936; peft's combination type svd"
    settings: ClassVar[type[MergeSettings]] = SvdSettings
    whole: ClassVar[bool] = False

    @staticmethod
    def merge(members: Sequence[Modules], weights: Weights, settings: SvdSettings) -> Merged:
        whole = Cat.merge(members, weights, CatSettings()).modules
        modules, energy = fitted(whole, settings.rank)
        return Merged(modules, {"energy": energy}, energy)

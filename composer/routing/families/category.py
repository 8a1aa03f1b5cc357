"""Two steps: what kind of question it is, and how good each expert is at that kind. Knows nothing
of the query beyond its kind. `subsets.py` has the exact choices over kinds: a map within a budget,
and which experts to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from composer.routing.families.clusters import smoothed_rates
from composer.routing.families.common import FamilySettings, teaching
from composer.routing.families.labels import VIEWS, Labels, kinds_of
from composer.routing.families.sharing import sharing
from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View
from composer.types import FloatArray, Tier


class CategorySettings(FamilySettings):
    """`prior`: questions that the expert's mean is worth beside a kind's own. `sharpness`: the
    classifier's inverse penalty."""

    prior: float = Field(10.0, ge=0)
    sharpness: float = Field(8.0, gt=0)


@dataclass(frozen=True, slots=True, eq=False)
class Category:
    """`labels` knows C kinds; `rates` (C, E)."""

    name: ClassVar[str] = "category"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Composition of Experts, arXiv 2412.01868; rates smoothed by us"
    settings: ClassVar[type[BaseModel]] = CategorySettings

    labels: Labels
    rates: FloatArray
    chosen: CategorySettings

    @classmethod
    def grid(cls) -> Sequence[CategorySettings]:
        return [CategorySettings(prior=prior) for prior in (10.0, 3.0, 40.0, 100.0)]

    @classmethod
    def views(cls, settings: CategorySettings) -> frozenset[View]:
        return frozenset(VIEWS)

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: CategorySettings, seed: int
    ) -> Category:
        return cls.fit_all(features, outcomes, [settings], seed)[0]

    @classmethod
    def fit_all(
        cls,
        features: Features,
        outcomes: Outcomes,
        settings: Sequence[CategorySettings],
        seed: int,
    ) -> list[Category]:
        """As `fit` for each of the settings; what they have in common is done once."""
        features, outcomes = teaching(features, outcomes)
        kinds = kinds_of(features, outcomes, seed)
        quality = np.asarray(outcomes.quality, np.float32)
        named = np.array([kind != "" for kind in kinds])
        # Questions of no kind count in every expert's mean, for which they have a row of their own
        # that nothing leads to.
        fitted = []
        with sharing():
            for chosen in settings:
                labels = Labels.fit(features, kinds, chosen.sharpness)
                count = len(labels.names)
                owner = np.array([labels.names.index(k) if k else count for k in kinds])
                rates = smoothed_rates(owner, count + (not named.all()), quality, chosen.prior)
                fitted.append(cls(labels, rates[:count], chosen))
        return fitted

    def predict(self, features: Features) -> FloatArray:
        return np.asarray(self.labels.posterior(features) @ self.rates, np.float32)

    def state(self) -> State:
        own = State({"rates": self.rates}, {})
        return packed({"labels": self.labels.state(), "category": own})

    @classmethod
    def restore(cls, state: State, settings: Any) -> Category:
        labels = Labels.restore(part_of(state, "labels"))
        return cls(labels, part_of(state, "category").arrays["rates"], settings)

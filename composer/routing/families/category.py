"""Two steps: what kind of question it is, and how good each expert is at that kind. Knows nothing
of the query beyond its kind. `subsets.py` has the exact choices over kinds: a map within a budget,
and which experts to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from composer.routing.families.clusters import smoothed_rates
from composer.routing.families.common import FamilySettings, expert_means, teaching
from composer.routing.families.labels import VIEWS, Labels, kinds_of
from composer.routing.families.near_labels import NearLabels
from composer.routing.families.sharing import sharing
from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View, rows_of
from composer.types import FloatArray, Tier


class CategorySettings(FamilySettings):
    """`prior`: questions that the expert's mean is worth beside a kind's own. `classifier`: kinds
    by logistic regression with the inverse penalty `sharpness`, or by the nearest `k` questions.
    `kinds`: all count by their probability, or as published the likeliest alone. Where even this is
    less probable than for the share `unsure` of the questions fitted on, experts count by their
    means. (Logistic regression is surer of those than of new ones, more of which are below.)"""

    prior: float = Field(10.0, ge=0)
    sharpness: float = Field(8.0, gt=0)
    classifier: Literal["logistic", "neighbours"] = "logistic"
    k: int = Field(20, ge=1)
    kinds: Literal["all", "likeliest"] = "all"
    unsure: float = Field(0.0, ge=0, lt=1)


@dataclass(frozen=True, slots=True, eq=False)
class Category:
    """`labels` knows C kinds; `rates` (C, E), `mean` (E,). Below `bound`, on the probability of the
    likeliest kind, the kind is not believed."""

    name: ClassVar[str] = "category"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Composition of Experts, arXiv 2412.01868; rates smoothed by us"
    settings: ClassVar[type[BaseModel]] = CategorySettings

    labels: Labels | NearLabels
    rates: FloatArray
    mean: FloatArray
    bound: float
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
                labels, own = _labels(features, kinds, chosen)
                bound = float(np.quantile(own, chosen.unsure)) if chosen.unsure else 0.0
                count = len(labels.names)
                owner = np.array([labels.names.index(k) if k else count for k in kinds])
                rates = smoothed_rates(owner, count + (not named.all()), quality, chosen.prior)
                fitted.append(cls(labels, rates[:count], expert_means(quality), bound, chosen))
        return fitted

    def predict(self, features: Features) -> FloatArray:
        posterior = self.labels.posterior(features)  # (n, C)
        weight = posterior
        if self.chosen.kinds == "likeliest":
            weight = np.eye(posterior.shape[1], dtype=np.float32)[posterior.argmax(axis=1)]
        sure = posterior.max(axis=1, keepdims=True) >= self.bound
        return np.asarray(np.where(sure, weight @ self.rates, self.mean), np.float32)

    def state(self) -> State:
        own = State({"rates": self.rates, "mean": self.mean}, {"bound": self.bound})
        return packed({"labels": self.labels.state(), "category": own})

    @classmethod
    def restore(cls, state: State, settings: Any) -> Category:
        kind = NearLabels if settings.classifier == "neighbours" else Labels
        own = part_of(state, "category")
        rates = own.arrays["rates"]
        # Older artefacts have no bound, so their mean is never asked for.
        mean = own.arrays.get("mean", rates.mean(axis=0))
        bound = own.values.get("bound", 0.0)
        return cls(kind.restore(part_of(state, "labels")), rates, mean, bound, settings)


def _labels(
    features: Features, kinds: Sequence[str], chosen: CategorySettings
) -> tuple[Labels | NearLabels, FloatArray]:
    """The classifier, and how probable the likeliest kind of each question is to it that it was
    fitted on: (m,), of none where nobody asks."""
    nothing = np.empty(0, np.float32)
    if chosen.classifier == "neighbours":
        near = NearLabels.fit(features, kinds, chosen.k)
        return near, near.of_others().max(axis=1) if chosen.unsure else nothing
    labels = Labels.fit(features, kinds, chosen.sharpness)
    if not chosen.unsure:
        return labels, nothing
    named = np.array([kind != "" for kind in kinds])
    return labels, labels.posterior(rows_of(features, named)).max(axis=1)

"""Kernel ridge regression of every expert's outcomes at once, over several views of the query and
the kind of question it seems to be. Knows no family but the classifier of kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field, model_validator

from composer.routing.families.common import FamilySettings, Parts, chunks, teaching
from composer.routing.families.labels import VIEWS, Labels, kinds_of
from composer.routing.families.points import Centres, Points, Table, solved, table_of
from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View
from composer.types import FloatArray, Tier

CATEGORY_FOLDS = 4
"""Parts of the questions in which the classifier of kinds is cross-fitted."""


class KernelSettings(FamilySettings):
    """k(x, z) = exp(−`gamma` · Σ_v w_v ‖x_v − z_v‖² / Σ_v w_v) with the weights of the views below;
    0 leaves a view out. `category` is the root of the predicted probabilities, a unit vector.

    What is common to all experts (the difficulty of a question) and what tells them apart are
    fitted apart, for the first is far better seen than the second: on zeroeval's training part the
    one ridge for both that has the least squared error decides worse than the best single expert.
    Of the second, each expert's speciality in the predicted kind of question comes first, drawn to
    0 as by `prior` more questions (None: left out); the kernel has the rest, under `ridge`. The
    difficulty has `difficulty_ridge`. `sharpness` is the inverse penalty of the classifier of
    kinds.

    Five-fold on the training parts, accuracy and Brier score of zeroeval without o1-mini: ridge 3
    83.9 and .1456; 100 with prior 20 85.3 and .1460; the category family 85.4 and .1575.
    """

    ridge: float = Field(30.0, gt=0)
    prior: float | None = Field(20.0, gt=0)
    difficulty_ridge: float = Field(1.0, gt=0)
    gamma: float = Field(1.5, gt=0)
    embedding: float = Field(1.0, ge=0)
    stem: float = Field(0.5, ge=0)
    words: float = Field(0.5, ge=0)
    format: float = Field(0.5, ge=0)
    category: float = Field(0.5, ge=0)
    sharpness: float = Field(8.0, gt=0)

    @model_validator(mode="after")
    def _some(self) -> KernelSettings:
        if not self.weights():
            raise ValueError("every view has weight 0; give at least one a weight")
        return self

    def weights(self) -> dict[str, float]:
        """Of the views that count, by name."""
        of = {view: float(getattr(self, view)) for view in (*VIEWS, "category")}
        return {view: weight for view, weight in of.items() if weight > 0}


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """`alpha` (m, E) for m centres, `mean` (E,). `weights` are those of the views that count:
    without `stem` where no question had options. `labels` is None where the category has none;
    otherwise `rates` (C, E) is how far each expert is above its mean in each kind of question,
    the difficulty of its questions apart.

    Missing outcomes are filled in with the fit's own predictions until these settle, beginning
    with the expert's mean and the question's difficulty: a minimiser of the squared error over
    the known outcomes alone, by majorisation. Its limit: where most are missing it takes more
    rounds than are made, and predictions stay nearer to the experts' means than they should.
    """

    name: ClassVar[str] = "kernel"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "Kernel ridge regression: Saunders et al., ICML 1998; above 10,000 rows Nyström: Williams "
        "and Seeger, NIPS 2000. The views and the predicted category are ours"
    )
    settings: ClassVar[type[BaseModel]] = KernelSettings

    weights: Mapping[str, float]
    centres: Centres
    alpha: FloatArray
    mean: FloatArray
    rates: FloatArray
    labels: Labels | None
    chosen: KernelSettings

    @classmethod
    def grid(cls) -> Sequence[KernelSettings]:
        tried = (
            (30.0, 20.0),
            (100.0, 20.0),
            (10.0, 20.0),
            (3.0, 20.0),
            (100.0, 100.0),
            (30.0, None),
        )
        return [KernelSettings(ridge=ridge, prior=prior) for ridge, prior in tried]

    @classmethod
    def views(cls, settings: KernelSettings) -> frozenset[View]:
        if settings.category > 0:
            return frozenset(VIEWS)
        return frozenset(view for view in VIEWS if view in settings.weights())

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: KernelSettings, seed: int
    ) -> Kernel:
        return cls.fit_all(features, outcomes, [settings], seed)[0]

    @classmethod
    def fit_all(
        cls, features: Features, outcomes: Outcomes, settings: Sequence[KernelSettings], seed: int
    ) -> list[Kernel]:
        """As `fit` for each of the settings; what they have in common is done once."""
        features, outcomes = teaching(features, outcomes)
        parts = Parts.of(np.asarray(outcomes.quality, np.float32))
        priors = list(dict.fromkeys(chosen.prior for chosen in settings))
        alike = "stem" in features and np.array_equal(features["stem"], features["embedding"])
        labelled: dict[float, tuple[Labels, FloatArray]] = {}
        tables: dict[str, tuple[Centres, Table]] = {}
        answers: dict[tuple[float, float], FloatArray] = {}
        fitted = []
        for chosen in settings:
            weights, labels, posterior = chosen.weights(), None, None
            if "embedding" in weights and alike:
                weights.pop("stem", None)
            if chosen.category > 0:
                if chosen.sharpness not in labelled:
                    labelled[chosen.sharpness] = _labelled(features, outcomes, chosen, seed)
                labels, posterior = labelled[chosen.sharpness]
            key = repr((weights, chosen.category and chosen.sharpness))
            if key not in tables:
                tables.clear()  # one at a time: they are large
                answers.clear()
                tables[key] = table_of(Points.of(features, posterior, weights), seed)
                rates = [_rates(parts.rest, posterior, prior) for prior in priors]
                # One solution serves all priors; the difficulty is fitted as one more expert.
                left = [
                    parts.rest if posterior is None else parts.rest - posterior @ r for r in rates
                ]
                target = np.hstack([*left, parts.difficulty[:, None]])
            centres, table = tables[key]
            for ridge in (chosen.ridge, chosen.difficulty_ridge):
                if (chosen.gamma, ridge) not in answers:
                    answers[chosen.gamma, ridge] = solved(table, target, chosen.gamma, ridge)
            number, n_experts = priors.index(chosen.prior), len(parts.mean)
            own = slice(number * n_experts, (number + 1) * n_experts)
            rest = answers[chosen.gamma, chosen.ridge][:, own]
            difficulty = answers[chosen.gamma, chosen.difficulty_ridge][:, -1:]
            alpha = rest + difficulty
            fitted.append(cls(weights, centres, alpha, parts.mean, rates[number], labels, chosen))
        return fitted

    def predict(self, features: Features) -> FloatArray:
        posterior = None if self.labels is None else self.labels.posterior(features)
        points = Points.of(features, posterior, self.weights)
        out = np.empty((len(points.length), len(self.mean)), np.float32)
        for part in chunks(len(out)):
            near = np.exp(-self.chosen.gamma * points.rows(part).distances(self.centres))
            out[part] = near @ self.alpha + self.mean
        return out if posterior is None else out + posterior @ self.rates

    def state(self) -> State:
        arrays = {"alpha": self.alpha, "mean": self.mean, "rates": self.rates}
        own = State(arrays, {"weights": dict(self.weights)})
        parts = {"kernel": own, "centres": self.centres.state()}
        if self.labels is not None:
            parts["labels"] = self.labels.state()
        return packed(parts)

    @classmethod
    def restore(cls, state: State, settings: Any) -> Kernel:
        own, centres = part_of(state, "kernel"), Centres.restore(part_of(state, "centres"))
        labels = Labels.restore(part_of(state, "labels")) if "labels" in state.values else None
        alpha, mean, rates = (own.arrays[name] for name in ("alpha", "mean", "rates"))
        return cls(own.values["weights"], centres, alpha, mean, rates, labels, settings)


def _rates(rest: FloatArray, posterior: FloatArray | None, prior: float | None) -> FloatArray:
    """(C, E) mean rest in each kind, a question counting for each as likely as it is of it."""
    if posterior is None or prior is None:
        return np.zeros((0 if posterior is None else posterior.shape[1], rest.shape[1]), np.float32)
    known = ~np.isnan(rest)
    total = posterior.T @ np.where(known, rest, 0)
    return np.asarray(total / (posterior.T @ known + prior), np.float32)


def _labelled(
    features: Features, outcomes: Outcomes, chosen: KernelSettings, seed: int
) -> tuple[Labels, FloatArray]:
    kinds = kinds_of(features, outcomes, seed)
    labels = Labels.fit(features, kinds, chosen.sharpness)
    return labels, labels.crossfitted(
        features, kinds, outcomes.group, chosen.sharpness, CATEGORY_FOLDS
    )

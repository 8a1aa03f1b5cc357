"""Kernel ridge regression of every expert's outcomes at once, over several views of the query and
the kind of question it seems to be. Knows no family but the classifier of kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
from pydantic import BaseModel, Field, model_validator

from composer.routing.families.common import (
    FamilySettings,
    Parts,
    chunks,
    folds_of,
    followed,
    teaching,
)
from composer.routing.families.labels import VIEWS, Labels, kinds_of
from composer.routing.families.points import Centres, Points, Table, solved, table_of
from composer.routing.families.sharing import sharing
from composer.routing.family import Kind
from composer.routing.outcomes import IntArray, Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View
from composer.types import FloatArray, Tier

FOLDS = 5
"""Parts in which it is found how far each ridge is to be followed."""

MOST_EXACT = 10_000
"""Labelled questions of intents that are all centres: a few tables of 0.4 GB to fit."""

CATEGORY_FOLDS = 4
"""Parts of the questions in which the classifier of kinds is cross-fitted."""


class KernelSettings(FamilySettings):
    """k(x, z) = exp(−`gamma` · Σ_v w_v ‖x_v − z_v‖² / Σ_v w_v) with the weights of the views below;
    0 leaves a view out. `category` is the root of the predicted probabilities, a unit vector.

    What is common to all experts (the difficulty of a question) and what tells them apart are
    fitted apart, for the first is far better seen than the second: on zeroeval's training part the
    one ridge for both that has the least squared error decides worse than the best single expert.
    Of the second, each expert's speciality in the predicted kind of question comes first, drawn to
    0 as by `prior` more questions (None: left out); the kernel has the rest, once for each of
    `ridges`. One ridge is followed as it is. Of several, cross-fitting finds how far each of them
    and the specialities by kind are followed, with the experts counting by their `closeness` to
    the best (see `followed`). The difficulty has `difficulty_ridge`. `sharpness` is the inverse
    penalty of the classifier of kinds. Up to `exact` labelled questions every one is a centre.
    """

    ridges: tuple[float, ...] = (3.0, 10.0, 100.0)
    closeness: float | None = Field(0.02, gt=0)
    prior: float | None = Field(20.0, gt=0)
    difficulty_ridge: float = Field(1.0, gt=0)
    gamma: float = Field(1.5, gt=0)
    embedding: float = Field(1.0, ge=0)
    stem: float = Field(0.5, ge=0)
    words: float = Field(0.5, ge=0)
    chars: float = Field(0.0, ge=0)
    format: float = Field(0.5, ge=0)
    category: float = Field(0.5, ge=0)
    sharpness: float = Field(8.0, gt=0)
    exact: int = Field(4_000, ge=1)

    @model_validator(mode="after")
    def _some(self) -> KernelSettings:
        if not self.weights():
            raise ValueError("every view has weight 0; give at least one a weight")
        if not self.ridges or min(self.ridges) <= 0:
            raise ValueError("ridges are positive numbers; give at least one")
        return self

    def weights(self) -> dict[str, float]:
        """Of the views that count, by name."""
        of = {view: float(getattr(self, view)) for view in (*VIEWS, "chars", "category")}
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
    suits: ClassVar[frozenset[Kind]] = frozenset({"outcomes", "intents"})

    weights: Mapping[str, float]
    centres: Centres
    alpha: FloatArray
    mean: FloatArray
    rates: FloatArray
    labels: Labels | None
    chosen: KernelSettings

    @classmethod
    def grid(cls) -> Sequence[KernelSettings]:
        return [KernelSettings(closeness=closeness) for closeness in (0.02, 0.05, None)]

    @classmethod
    def grid_of_intents(cls, outcomes: Outcomes) -> Sequence[KernelSettings]:
        """Plain kernel ridge on every question: of intents there is no kind but themselves, and no
        difficulty. Above MOST_EXACT questions there are landmarks, and one try is enough."""
        plain = KernelSettings(
            ridges=(0.1,),
            closeness=None,
            prior=None,
            difficulty_ridge=0.1,
            embedding=0.6,
            stem=0.0,
            words=0.2,
            chars=0.2,
            format=0.0,
            category=0.0,
            exact=MOST_EXACT,
        )
        if len(outcomes) > MOST_EXACT:
            return [plain]
        return [plain, plain.model_copy(update={"embedding": 1.2})]

    @classmethod
    def views(cls, settings: KernelSettings) -> frozenset[View]:
        weights = settings.weights()
        own = frozenset(view for view in get_args(View) if view in weights)
        return own | frozenset(VIEWS) if "category" in weights else own

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
        with sharing():
            return cls._fit_all(features, outcomes, settings, seed)

    @classmethod
    def _fit_all(
        cls, features: Features, outcomes: Outcomes, settings: Sequence[KernelSettings], seed: int
    ) -> list[Kernel]:
        features, outcomes = teaching(features, outcomes)
        parts = Parts.of(np.asarray(outcomes.quality, np.float32))
        fold = folds_of(outcomes.group, FOLDS)
        alike = "stem" in features and np.array_equal(features["stem"], features["embedding"])
        tables: dict[str, tuple[Centres, Table]] = {}
        pieces: dict[str, tuple[Pieces, FloatArray | None]] = {}
        fitted = []
        for chosen in settings:
            weights, labels, posterior = chosen.weights(), None, None
            if "embedding" in weights and alike:
                weights.pop("stem", None)
            if chosen.category > 0:
                labels, posterior = _labelled(features, outcomes, chosen, seed)
            key = repr((weights, chosen.category and chosen.sharpness, chosen.exact))
            if key not in tables:
                tables.clear()  # one at a time: they are large
                points = Points.of(features, posterior, weights)
                tables[key] = table_of(points, chosen.exact, seed)
            centres, table = tables[key]
            same = key + repr(chosen.model_copy(update={"closeness": None}))
            if same not in pieces:
                apart = None
                if len(chosen.ridges) > 1:
                    apart = _apart(table, parts.rest, posterior, fold, chosen)
                pieces[same] = Pieces.fit(table, parts, posterior, chosen), apart
            own, said = pieces[same]
            alpha, rates = own.joined(_weights(said, parts, chosen))
            fitted.append(cls(weights, centres, alpha, parts.mean, rates, labels, chosen))
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


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What is added up: specialities by kind `rates` (C, E), the kernel's `rest` (m, E) for each
    ridge, and the `difficulty` (m, 1)."""

    rates: FloatArray
    rest: list[FloatArray]
    difficulty: FloatArray

    @classmethod
    def fit(
        cls, table: Table, parts: Parts, posterior: FloatArray | None, chosen: KernelSettings
    ) -> Pieces:
        rates, left = _specialities(parts.rest, posterior, chosen.prior)
        target = np.hstack([left, parts.difficulty[:, None]])  # as if of one more expert
        ridges = (*chosen.ridges, chosen.difficulty_ridge)
        *rest, hard = solved(table, target, chosen.gamma, ridges)
        return cls(rates, [alpha[:, :-1] for alpha in rest], hard[:, -1:])

    def joined(self, follow: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weights (1 + R,) of the rates and of each ridge → alpha (m, E) and rates (C, E)."""
        rest = np.einsum("r,rme->me", follow[1:], np.stack(self.rest))
        return np.asarray(rest + self.difficulty, np.float32), follow[0] * self.rates


def _apart(
    table: Table,
    rest: FloatArray,
    posterior: FloatArray | None,
    fold: IntArray,
    chosen: KernelSettings,
) -> FloatArray:
    """(1 + R, n, E) what the specialities by kind, and the kernel with each ridge, say of questions
    that they have not seen."""
    out = np.zeros((1 + len(chosen.ridges), *rest.shape), np.float32)
    exact = table.centres is table.questions
    for number in np.unique(fold):
        held = fold == number
        if held.all():
            break
        some = None if posterior is None else posterior[~held]
        rates, left = _specialities(rest[~held], some, chosen.prior)
        if posterior is not None:
            out[0, held] = posterior[held] @ rates
        to = table.questions[np.ix_(held, ~held)] if exact else table.questions[held]
        near = np.exp(-chosen.gamma * to)
        for r, alpha in enumerate(solved(table, left, chosen.gamma, chosen.ridges, ~held)):
            out[1 + r, held] = near @ alpha
    return out


def _weights(apart: FloatArray | None, parts: Parts, chosen: KernelSettings) -> FloatArray:
    """(1 + R,) how far the rates and each ridge are followed."""
    if apart is not None:
        known = ~np.isnan(parts.rest)
        target = np.where(known, parts.rest, 0)
        found = followed(apart, target, known, parts.mean, chosen.closeness)
        if found is not None:
            return found
    count = len(chosen.ridges)
    return np.array([1, *[1 / count] * count], np.float32)


def _specialities(
    rest: FloatArray, posterior: FloatArray | None, prior: float | None
) -> tuple[FloatArray, FloatArray]:
    """(C, E) mean rest in each kind, a question counting for each as likely as it is of it; and
    what they leave of it (n, E)."""
    if posterior is None or prior is None:
        kinds = 0 if posterior is None else posterior.shape[1]
        return np.zeros((kinds, rest.shape[1]), np.float32), rest
    known = ~np.isnan(rest)
    total = posterior.T @ np.where(known, rest, 0)
    rates = np.asarray(total / (posterior.T @ known + prior), np.float32)
    return rates, rest - posterior @ rates


def _labelled(
    features: Features, outcomes: Outcomes, chosen: KernelSettings, seed: int
) -> tuple[Labels, FloatArray]:
    kinds = kinds_of(features, outcomes, seed)
    labels = Labels.fit(features, kinds, chosen.sharpness)
    return labels, labels.crossfitted(
        features, kinds, outcomes.group, chosen.sharpness, CATEGORY_FOLDS
    )

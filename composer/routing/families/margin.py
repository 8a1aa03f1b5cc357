"""A linear margin for each expert over the query's vector, words and pieces of words; where experts
are intents, one for "nobody's" as well. Knows no neighbour and no category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field
from scipy.sparse import csr_matrix, hstack

from composer.routing.calibrate import margins, sigmoid
from composer.routing.families.common import FamilySettings, Float64, expert_means, teaching
from composer.routing.families.familiar import Familiar
from composer.routing.family import Kind
from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View, rows_of
from composer.types import FloatArray, Tier

VIEWS: tuple[View, ...] = ("embedding", "words", "chars")

STEEPNESS = 2.0
"""Raw predictions are sigmoid(STEEPNESS · margin): at the margins of ±1 that are fitted for, about
.9 and .1. Calibration has the last word."""

LARGEST = 0.98
"""Means are cut here before their logit is taken."""

FEWEST = 10
"""Questions that are nobody's, from which on there is something to learn of such."""

UNSEEN = -3.0
"""The margin of an intent without a query: those that have some are hardly ever so far off."""

TOLERANCE = 2e-2
"""Of the solver: finer ones are for coefficients that are to be read."""


class MarginSettings(FamilySettings):
    """`cost`: C of the support vector machine, by which outcomes on the wrong side of the margin
    count. `embedding`, `words` and `chars` are how long the rows of these views are made."""

    cost: float = Field(0.5, gt=0)
    embedding: float = Field(1.5, gt=0)
    words: float = Field(1.0, gt=0)
    chars: float = Field(1.0, gt=0)


@dataclass(frozen=True, slots=True, eq=False)
class Margin:
    """`weights` view → (v, K), `bias` (K,): one column an expert, and a last one for questions that
    are nobody's where `familiar` is not None.

    Squared hinge loss, one against all the rest. Outcomes count as right above one half; of
    experts who never or always are, the mean is all there is to say. `exclusive`: no question is
    right for two, so what decides is how far an expert is ahead of the others.
    """

    name: ClassVar[str] = "margin"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "Linear support vector machines on words and n-grams beside the query's vector: Joachims, "
        "ECML 1998; LIBLINEAR: Fan et al., JMLR 2008. Nobody's as a class of its own: Larson et "
        "al., arXiv 1909.02027, section 4"
    )
    settings: ClassVar[type[BaseModel]] = MarginSettings
    suits: ClassVar[frozenset[Kind]] = frozenset({"intents"})

    weights: Mapping[View, FloatArray]
    bias: FloatArray
    experts: int
    exclusive: bool
    familiar: Familiar | None
    chosen: MarginSettings

    @classmethod
    def grid(cls) -> Sequence[MarginSettings]:
        return [MarginSettings()]

    @classmethod
    def views(cls, settings: MarginSettings) -> frozenset[View]:
        return frozenset(VIEWS)

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: MarginSettings, seed: int
    ) -> Margin:
        features, outcomes = teaching(features, outcomes)
        x = _joined(features, settings)
        count, familiar = len(outcomes.experts), None
        if outcomes.of_intents:
            owner = np.where(outcomes.in_scope, outcomes.quality.argmax(axis=1), count)
            if 0 < (owner == count).sum() < FEWEST:
                some = owner < count
                x, owner, features = x[some], owner[some], rows_of(features, some)
            classes = int(owner.max()) + 1
            weight, bias = _one_against_rest(x, owner, max(classes, count), settings, seed)
            if classes > count:
                familiar = Familiar.fit(features["embedding"], owner, count)
        else:
            weight, bias = _each(x, np.asarray(outcomes.quality, np.float32), settings, seed)
        weights, start = {}, 0
        for view in VIEWS:
            end = start + features[view].shape[1]
            # Kept in half precision: clinc150's are 10 MB then.
            half = np.asarray(weight[start:end] * _length(settings, view), np.float16)
            weights[view], start = np.asarray(half, np.float32), end
        free = np.asarray(bias, np.float32)
        return cls(weights, free, count, outcomes.of_intents, familiar, settings)

    def predict(self, features: Features) -> FloatArray:
        return self._raw(self._margins(features))

    def predict_with_signs(self, features: Features) -> tuple[FloatArray, FloatArray | None]:
        """As `predict`, and the signs (n, J) of whether a question is anybody's; None where there
        were too few that are nobody's to learn what these say."""
        margin = self._margins(features)
        signs = None
        if self.familiar is not None:
            signs = self.familiar.signs(features["embedding"], margin)
        return self._raw(margin), signs

    def _margins(self, features: Features) -> FloatArray:
        """(n, K)"""
        total = np.repeat(self.bias[None], features["embedding"].shape[0], axis=0)
        for view, weight in self.weights.items():
            total += features[view] @ weight
        return np.asarray(total, np.float32)

    def _raw(self, margin: FloatArray) -> FloatArray:
        own = margin[:, : self.experts]
        if self.exclusive:
            own = margins(own)
        return np.asarray(sigmoid(np.float32(STEEPNESS) * own), np.float32)

    def state(self) -> State:
        arrays: dict[str, npt.NDArray[Any]] = {
            f"weights.{view}": np.asarray(weight, np.float16)
            for view, weight in self.weights.items()
        }
        values = {"experts": self.experts, "exclusive": self.exclusive}
        parts = {"margin": State(arrays | {"bias": self.bias}, values)}
        if self.familiar is not None:
            parts["familiar"] = self.familiar.state()
        return packed(parts)

    @classmethod
    def restore(cls, state: State, settings: Any) -> Margin:
        own, familiar = part_of(state, "margin"), None
        if "familiar" in state.values:
            familiar = Familiar.restore(part_of(state, "familiar"))
        weights = {v: np.asarray(own.arrays[f"weights.{v}"], np.float32) for v in VIEWS}
        experts, exclusive = int(own.values["experts"]), bool(own.values["exclusive"])
        return cls(weights, own.arrays["bias"], experts, exclusive, familiar, settings)


def _joined(features: Features, settings: MarginSettings) -> csr_matrix:
    parts = [csr_matrix(features[view]) * np.float32(_length(settings, view)) for view in VIEWS]
    return hstack(parts, format="csr", dtype=np.float32)


def _length(settings: MarginSettings, view: View) -> float:
    return float(getattr(settings, view))


def _one_against_rest(
    x: csr_matrix, owner: npt.NDArray[np.integer], classes: int, settings: MarginSettings, seed: int
) -> tuple[Float64, Float64]:
    """Rows (n, D) and their class numbers (n,), all in one call → (D, K), (K,). A class of which
    there is no row is nobody's choice."""
    weight, bias = np.zeros((x.shape[1], classes)), np.full(classes, UNSEEN)
    found = np.unique(owner)
    if len(found) == 1:
        bias[found] = 1.0
        return weight, bias
    fit = _machine(settings, seed).fit(x, owner)
    if len(found) == 2:  # sklearn keeps one column then
        weight[:, found] = np.vstack([-fit.coef_, fit.coef_]).T
        bias[found] = np.concatenate([-fit.intercept_, fit.intercept_])
    else:
        weight[:, found], bias[found] = fit.coef_.T, fit.intercept_
    return weight, bias


def _each(
    x: csr_matrix, quality: FloatArray, settings: MarginSettings, seed: int
) -> tuple[Float64, Float64]:
    """Outcomes (n, E), NaN where missing → (D, E), (E,)."""
    count = quality.shape[1]
    mean = np.clip(expert_means(quality).astype(np.float64), 1 - LARGEST, LARGEST)
    weight, bias = np.zeros((x.shape[1], count)), np.log(mean / (1 - mean)) / STEEPNESS
    known, right = ~np.isnan(quality), quality > 0.5
    for expert in range(count):
        asked = known[:, expert]
        own = right[asked, expert]
        if own.all() or not own.any():
            continue
        fit = _machine(settings, seed).fit(x if asked.all() else x[asked], own)
        weight[:, expert], bias[expert] = fit.coef_[0], float(fit.intercept_[0])
    return weight, bias


def _machine(settings: MarginSettings, seed: int) -> Any:
    from sklearn.svm import LinearSVC  # only fitting needs it

    return LinearSVC(C=settings.cost, tol=TOLERANCE, random_state=seed)

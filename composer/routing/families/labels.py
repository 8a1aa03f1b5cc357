"""What kind of question a query is: a classifier over the outcomes' own categories. Knows no
expert's score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack, issparse

from composer.routing.families.clusters import clustered
from composer.routing.families.common import folds_of, softmax
from composer.routing.families.sharing import digest, shared
from composer.routing.outcomes import IntArray, Outcomes
from composer.routing.state import State
from composer.routing.views import Features, View, count_of, rows_of
from composer.types import FloatArray

T = TypeVar("T")

RARE = 10
"""Categories with fewer questions are one: too few to learn what they look like."""

OTHER = "other"
CLUSTERS = 16
"""How many kinds are made up where nobody named any."""

TOLERANCE = 0.014
"""The fit stops where no slope of the mean loss is steeper than this divided by the number of
kinds: the slopes of a kind are as small as its share of the questions. (With 1e-3 throughout, that
of 14 kinds, clinc150's 151 stopped near the start: 94.7 % in scope on dev, and 96.0 with this.)"""

VIEWS: tuple[View, ...] = ("embedding", "stem", "words", "format")


def kinds_of(features: Features, outcomes: Outcomes, seed: int) -> tuple[str, ...]:
    """(n,) the category of each question; where the outcomes name fewer than two, its benchmark;
    where they name none of these either, its cluster. "" where this question has none."""
    for named in (outcomes.category, outcomes.benchmark):
        if len(set(named) - {""}) > 1:
            names, count = np.unique(named, return_counts=True)
            rare = set(names[count < RARE].tolist()) - {""}
            if len(set(named) - rare - {""}) > 1:
                return tuple(OTHER if name in rare else name for name in named)
    owner, _ = clustered(features["embedding"], CLUSTERS, seed)
    return tuple(f"cluster {cluster}" for cluster in owner)


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Multinomial logistic regression on all views. `names` (C,), `weight` (D, C), `bias` (C,).

    `sharpness` is its inverse penalty (C of sklearn).
    """

    names: tuple[str, ...]
    weight: FloatArray
    bias: FloatArray

    @classmethod
    def fit(cls, features: Features, kinds: Sequence[str], sharpness: float) -> Labels:
        """Questions of kind "" are left out. Raises ValueError where that leaves none."""
        return _once(features, kinds, (sharpness,), lambda: cls._fit(features, kinds, sharpness))

    @classmethod
    def _fit(cls, features: Features, kinds: Sequence[str], sharpness: float) -> Labels:
        from sklearn.linear_model import LogisticRegression

        kind = np.array(kinds)
        named = kind != ""
        if not named.any():
            raise ValueError("no question has a category to learn; name some")
        x = _design(rows_of(features, named) if not named.all() else features)
        names = np.unique(kind[named])
        if len(names) == 1:
            empty = np.zeros((x.shape[1], 1), np.float32)
            return cls((str(names[0]),), empty, np.zeros(1, np.float32))
        tolerance = min(1e-3, TOLERANCE / len(names))
        fit = LogisticRegression(C=sharpness, max_iter=100, tol=tolerance).fit(x, kind[named])
        weight, bias = fit.coef_.T, fit.intercept_
        if len(names) == 2:  # sklearn keeps one column then
            weight, bias = np.hstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return cls(
            tuple(str(name) for name in fit.classes_),
            np.ascontiguousarray(weight, np.float32),
            np.asarray(bias, np.float32),
        )

    def posterior(self, features: Features) -> FloatArray:
        """(n, C) the probability of each kind."""
        logits = np.repeat(self.bias[None], count_of(features), axis=0)
        start = 0
        for part in _parts(features):
            logits += part @ self.weight[start : start + part.shape[1]]
            start += part.shape[1]
        return softmax(logits)

    def crossfitted(
        self,
        features: Features,
        kinds: Sequence[str],
        group: IntArray,
        sharpness: float,
        folds: int,
    ) -> FloatArray:
        """(n, C) what a classifier that has not seen a question's group says of it. On the rows it
        was fitted on a classifier is surer than on any others, so these are the ones to learn
        from."""
        fold = folds_of(group, folds)

        def made() -> FloatArray:
            out = np.zeros((count_of(features), len(self.names)), np.float32)
            for number in np.unique(fold):
                held = fold == number
                seen = [kind for kind, away in zip(kinds, held, strict=True) if not away]
                if not any(seen):
                    out[held] = 1 / len(self.names)
                    continue
                part = Labels._fit(rows_of(features, ~held), seen, sharpness)
                columns = [self.names.index(name) for name in part.names]
                out[np.ix_(held, columns)] = part.posterior(rows_of(features, held))
            return out

        return _once(features, kinds, (sharpness, fold), made)

    def state(self) -> State:
        return State({"weight": self.weight, "bias": self.bias}, {"names": list(self.names)})

    @classmethod
    def restore(cls, state: State) -> Labels:
        a = state.arrays
        return cls(tuple(state.values["names"]), a["weight"], a["bias"])


def _once(features: Features, kinds: Sequence[str], of: Sequence[Any], make: Callable[[], T]) -> T:
    """As `shared`, of what is made of these questions and of `of`."""
    seen = {view: features[view] for view in VIEWS if view in features}
    return shared(lambda: ("labels", digest(seen), digest(kinds, list(of))), make)


def _parts(features: Features) -> list[Any]:
    return [features[view] for view in VIEWS if view in features]


def _design(features: Features) -> npt.NDArray[Any] | csr_matrix:
    parts = _parts(features)
    if not any(issparse(part) for part in parts):
        return np.hstack(parts)
    return hstack([csr_matrix(part) for part in parts], format="csr", dtype=np.float32)

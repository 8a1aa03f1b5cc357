"""What an expert's answer to a query is expected to cost, seen from the query alone: how long it
will be is not known before it is written. Knows no family and no price list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.families.common import dense
from composer.routing.outcomes import Outcomes
from composer.routing.state import State
from composer.routing.views import Features, View
from composer.types import FloatArray

VIEWS: tuple[View, ...] = ("embedding", "format")

RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

RANGE = (0.1, 10.0)
"""A prediction stays within these multiples of the expert's mean: a straight line may leave the
sensible for a query unlike any seen, and a cost below 0 would be paid to be chosen."""


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """Ridge regression of cost / mean cost, all experts at once: `mean` (E,) US dollars a call,
    `centre` (D,), `weights` (D, E). The squared error is of the ratio, so that dear experts do not
    decide alone what is fitted, and it is of the cost and not of its logarithm, so that the
    expectation is the thing predicted."""

    mean: FloatArray
    centre: FloatArray
    weights: FloatArray

    @classmethod
    def fit(cls, features: Features, outcomes: Outcomes) -> CostModel:
        """One ridge for all experts, by generalised cross-validation (Golub, Heath & Wahba 1979).
        Missing costs count as their expert's mean. Raises ValueError where an expert has none."""
        known = ~np.isnan(outcomes.cost)
        if silent := [e for e, k in zip(outcomes.experts, known.T, strict=True) if not k.any()]:
            raise ValueError(
                f"expert {silent[0]!r} has no cost; give prices for all experts, or for none"
            )
        mean = np.asarray(np.nanmean(outcomes.cost, axis=0, dtype=np.float64), np.float32)
        base = np.where(mean > 0, mean, 1)
        off = np.where(known, (outcomes.cost - mean) / base, 0).astype(np.float64)  # (n, E)
        x = dense(features, VIEWS).astype(np.float64)
        centre = x.mean(axis=0)
        x -= centre
        values, vectors = np.linalg.eigh(x.T @ x)
        values = np.maximum(values, 0)
        turned = vectors.T @ (x.T @ off)  # (D, E)
        weights = vectors @ (turned / (values + _best_ridge(values, turned, off))[:, None])
        return cls(mean, centre.astype(np.float32), weights.astype(np.float32))

    def predict(self, features: Features) -> FloatArray:
        """(n, E) expected US dollars of a call, within `RANGE` of each expert's mean."""
        ratio = 1 + (dense(features, VIEWS) - self.centre) @ self.weights
        return np.asarray(self.mean * np.clip(ratio, *RANGE), np.float32)

    def state(self) -> State:
        return State({"mean": self.mean, "centre": self.centre, "weights": self.weights}, {})

    @classmethod
    def restore(cls, state: State) -> CostModel:
        return cls(*(state.arrays[name] for name in ("mean", "centre", "weights")))


def _best_ridge(
    values: npt.NDArray[np.float64], turned: npt.NDArray[np.float64], off: npt.NDArray[np.float64]
) -> float:
    """The ridge with the least generalised cross-validation score, summed over the experts. With
    an intercept, which takes one degree of freedom."""
    n, total = len(off), float((off**2).sum())
    scores = []
    for ridge in RIDGES:
        shrunk = turned / (values + ridge)[:, None]
        fitted = 2 * (turned * shrunk).sum() - (values[:, None] * shrunk**2).sum()
        freedom = float((values / (values + ridge)).sum()) + 1
        scores.append((total - float(fitted)) / max(n - freedom, 1e-9) ** 2)
    return RIDGES[int(np.argmin(scores))]

"""The probability that a question is anybody's, from the signs that a family saw of it. Knows no
family and no expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.calibrate import sigmoid
from composer.routing.state import State
from composer.types import FloatArray

SHARE = 0.2
"""Of requests that are nobody's, for which quality is calibrated, as it is for retrieval. Outcomes
do not tell: whoever collects them takes as many such questions as come to mind (clinc150 has 100
among 15,100 to learn from, and 1,000 among 5,500 to be tested on)."""

STRENGTH = 0.03
"""Inverse penalty of the standardised weights. Questions that were collected as nobody's flatter
whatever leans on them, so a few signs pulling together are trusted, and no single one far."""


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """Logistic regression: logit P = `bias` + signs · `weight` (J,). Fitted to signs of questions
    that the family had not seen."""

    weight: FloatArray
    bias: float

    @classmethod
    def fit(cls, signs: FloatArray, in_scope: npt.NDArray[np.bool_], share: float = SHARE) -> Scope:
        """`signs` (n, J); the questions that are nobody's, and the others, weigh as their `share`.
        Raises ValueError where either are missing."""
        from sklearn.linear_model import LogisticRegression

        inside = int(in_scope.sum())
        if not 0 < inside < len(in_scope):
            raise ValueError("all questions are in scope, or none is; give some of both kinds")
        centre = signs.mean(axis=0, dtype=np.float64)
        scale = signs.std(axis=0, dtype=np.float64) + 1e-6
        each = np.where(in_scope, (1 - share) / inside, share / (len(in_scope) - inside))
        fit = LogisticRegression(C=STRENGTH, max_iter=500).fit(
            (signs - centre) / scale, in_scope, sample_weight=each * len(in_scope)
        )
        weight = fit.coef_[0] / scale
        bias = float(fit.intercept_[0] - weight @ centre)
        return cls(np.asarray(weight, np.float32), float(np.float32(bias)))

    def probability(self, signs: FloatArray) -> FloatArray:
        """(n, J) → (n,)"""
        return np.asarray(sigmoid(signs @ self.weight + np.float32(self.bias)), np.float32)

    def state(self) -> State:
        return State({"weight": self.weight}, {"bias": self.bias})

    @classmethod
    def restore(cls, state: State) -> Scope:
        return cls(state.arrays["weight"], state.values["bias"])

"""A family's raw predictions to calibrated quality and its uncertainty, from predictions that were
cross-fitted. Knows no family and no query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.calibrate import Logistic, Prior, logit, sigmoid
from composer.routing.outcomes import Outcomes
from composer.routing.scope import Scope
from composer.routing.state import State
from composer.types import FloatArray

Float64 = npt.NDArray[np.float64]

PERFECT = Prior(mean=(0.0, 1.0), sd=(2.0, 1.0))
"""Of all experts together: a raw prediction that already is a probability, roughly."""

SPREAD = (0.5, 0.25)
"""How far an expert's own (intercept, slope) may lie from that of all (standard deviations): enough
to mend a family that is off for one expert, little enough that thirty outcomes leave the order of
experts alone."""


@dataclass(frozen=True, slots=True, eq=False)
class OutcomeCalibration:
    """Platt scaling (1999) per expert: logit P = b₀ + b₁ · logit(raw), b₁ ≥ 0, whose normal prior
    is the fit over all experts. `b` (E, 2); `covariance` (E, 2, 2) is that of b (Laplace).

    With a `scope` all this is of questions that are somebody's, and quality is P(it is anybody's) ·
    P(this expert is right of it): however far ahead of the others, an expert that does not fit a
    question is not right.
    """

    b: FloatArray
    covariance: FloatArray
    scope: Scope | None = None

    @classmethod
    def fit(
        cls,
        raw: FloatArray,
        outcomes: Outcomes,
        *,
        shared: bool = False,
        signs: FloatArray | None = None,
    ) -> OutcomeCalibration:
        """`raw` (n, E): predictions of questions that their maker had not seen; rows of NaN, and
        missing outcomes, are left out. Outcomes between 0 and 1 count in proportion. `shared`: one
        map for all experts, which leaves their order alone; how unsure it is of each is still that
        of its own. `signs` (n, J): what tells whether a question is anybody's, where the family
        has such; they are used where some questions are nobody's. Raises ValueError where nothing
        is left."""
        if raw.shape != outcomes.quality.shape:
            raise ValueError(
                f"predictions of shape {raw.shape} for outcomes of shape "
                f"{outcomes.quality.shape}; predict these questions for these experts"
            )
        known, scope = outcomes.known & ~np.isnan(raw), None
        asked = known.any(axis=1)
        if signs is not None and not outcomes.in_scope[asked].all():
            scope = Scope.fit(signs[asked], outcomes.in_scope[asked])
            known &= outcomes.in_scope[:, None]
        if not known.any():
            raise ValueError("there is no outcome with a prediction to calibrate on; give some")
        x = logit(raw)
        pooled = _fitted(x[known], outcomes.quality[known], PERFECT)
        prior = Prior(mean=(float(pooled.b[0]), float(pooled.b[1])), sd=SPREAD)
        own = [
            _fitted(x[asked, e], outcomes.quality[asked, e], prior)
            for e, asked in enumerate(known.T)
        ]
        return cls(
            np.stack([np.asarray((pooled if shared else fit).b, np.float32) for fit in own]),
            np.stack([np.asarray(fit.covariance, np.float32) for fit in own]),
            scope,
        )

    def quality(
        self, raw: FloatArray, signs: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """(n, E), and (n, J) where there is a scope → calibrated quality, and its standard
        deviation from not knowing the experts' regression better (delta method), both (n, E)."""
        x = logit(raw).astype(np.float32)
        b, c = self.b, self.covariance
        quality = sigmoid(b[:, 0] + b[:, 1] * x)
        variance = c[:, 0, 0] + 2 * c[:, 0, 1] * x + c[:, 1, 1] * x**2
        deviation = quality * (1 - quality) * np.sqrt(np.maximum(variance, 0))
        if self.scope is not None:
            assert signs is not None  # the family that it was fitted to tells them
            inside = self.scope.probability(signs)[:, None]
            quality, deviation = inside * quality, inside * deviation
        return np.asarray(quality, np.float32), np.asarray(deviation, np.float32)

    def state(self) -> State:
        own = {"b": self.b, "covariance": self.covariance}
        if self.scope is None:
            return State(own, {})
        scope = self.scope.state()
        inner = {f"scope.{name}": array for name, array in scope.arrays.items()}
        return State(own | inner, {"scope": dict(scope.values)})

    @classmethod
    def restore(cls, state: State) -> OutcomeCalibration:
        start, scope = "scope.", None
        if "scope" in state.values:
            inner = {
                name.removeprefix(start): array
                for name, array in state.arrays.items()
                if name.startswith(start)
            }
            scope = Scope.restore(State(inner, state.values["scope"]))
        return cls(state.arrays["b"], state.arrays["covariance"], scope)


def _fitted(x: Float64, y: npt.NDArray[np.floating], prior: Prior) -> Logistic:
    return Logistic.fit(x, np.asarray(y, np.float64), np.ones(len(x)), prior)

"""What is learnt from outcomes while serving: a correction of a base router's quality, per expert
and query. Numbers only: knows no router, store, clock or draw.

Both kinds start as the base router and follow what is observed, the newest most, so that an expert
that changes is noticed. They are never changed in place: `learned` returns the next one, so that
whoever scores meanwhile needs no lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from composer.routing.calibrate import logit, sigmoid
from composer.routing.state import State
from composer.types import FloatArray

Judged = tuple[FloatArray, FloatArray | None]
"""Quality and its standard deviation, both (E,)."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What became of one query: its context (m,), the base router's quality (E,), and the outcome
    (E,) in [0, 1], both NaN where there is none. An outcome without a base is left out."""

    context: FloatArray
    base: FloatArray
    outcome: FloatArray

    @property
    def known(self) -> npt.NDArray[np.intp]:
        return np.flatnonzero(~np.isnan(self.outcome) & ~np.isnan(self.base))


class Learner(Protocol):
    """`seen` counts the outcomes learnt from."""

    @property
    def experts(self) -> tuple[str, ...]: ...

    @property
    def seen(self) -> int: ...

    def quality(self, context: FloatArray, base: FloatArray) -> Judged:
        """(m,) and (E,) → quality in [0, 1] and its standard deviation, both (E,); the latter is
        None where this learner has none of its own."""
        ...

    def learned(self, observed: Sequence[Observed]) -> Self:
        """The learner after these, in their order."""
        ...

    def state(self) -> State: ...


@runtime_checkable
class LearningRouter(Protocol):
    """A router that follows outcomes; `routing/online.py` says what each of these is."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def learner(self) -> Learner: ...

    def observed(self, learning: Mapping[str, Any], outcomes: Mapping[str, float]) -> Observed: ...

    def after(self, observed: Sequence[Observed]) -> Learner: ...

    def use(self, learner: Any) -> None: ...

    def packed(self, learner: Any) -> bytes: ...

    def unpacked(self, data: bytes) -> Learner: ...


@dataclass(frozen=True, slots=True, eq=False)
class BanditLearner:
    """Quality is base + w·x per expert, w by ridge regression of outcome − base on the context with
    forgetting: Bayesian linear regression whose past counts less and less (the discounted linear
    bandit of Russac et al. 2019, arXiv:1909.09146; its posterior is sampled as by Agrawal & Goyal
    2013). Every outcome ages all experts' pasts, so one not asked for long becomes uncertain, and
    is tried again.

    `gram` (E, m, m) and `moment` (E, m) are discounted sums of x xᵀ and x·(outcome − base), of
    `noise` (an outcome's standard deviation; 0.5 bounds that of any in [0, 1]); `prior` is w's
    standard deviation before any outcome; `keep` is what a past outcome counts after one more.
    """

    experts: tuple[str, ...]
    gram: Float64
    moment: Float64
    covariance: Float64
    keep: float
    noise: float
    prior: float
    seen: int = 0

    @classmethod
    def new(
        cls, experts: Sequence[str], m: int, *, half_life: float, noise: float, prior: float
    ) -> BanditLearner:
        """`half_life` in outcomes, of all experts together."""
        gram = np.zeros((len(experts), m, m))
        keep = 0.5 ** (1 / half_life)
        covariance = _covariance(gram, noise, prior)
        moment = np.zeros((len(experts), m))
        return cls(tuple(experts), gram, moment, covariance, keep, noise, prior)

    def quality(self, context: FloatArray, base: FloatArray) -> Judged:
        x = context.astype(np.float64)
        spread = self.covariance @ x  # (E, m)
        mean = np.einsum("em,em->e", spread, self.moment) / self.noise**2
        deviation = np.sqrt(spread @ x)
        return (
            np.asarray(np.clip(base + mean, 0, 1), np.float32),
            np.asarray(deviation, np.float32),
        )

    def learned(self, observed: Sequence[Observed]) -> BanditLearner:
        gram, moment, seen = self.gram.copy(), self.moment.copy(), self.seen
        for one in observed:
            x = one.context.astype(np.float64)
            for e in one.known:
                gram *= self.keep
                moment *= self.keep
                gram[e] += np.outer(x, x)
                moment[e] += x * (float(one.outcome[e]) - float(one.base[e]))
                seen += 1
        covariance = _covariance(gram, self.noise, self.prior)
        return replace(self, gram=gram, moment=moment, covariance=covariance, seen=seen)

    def state(self) -> State:
        values = {"experts": list(self.experts), "seen": self.seen}
        return State({"gram": self.gram, "moment": self.moment}, values)

    def restored(self, state: State) -> BanditLearner:
        """This learner with what the state knows of its experts; those it does not know stay as
        they are. Raises ValueError for contexts of another width."""
        gram, moment = self.gram.copy(), self.moment.copy()
        for here, there in _shared(self.experts, state, moment.shape[1], "moment"):
            gram[here], moment[here] = state.arrays["gram"][there], state.arrays["moment"][there]
        covariance = _covariance(gram, self.noise, self.prior)
        seen = int(state.values["seen"])
        return replace(self, gram=gram, moment=moment, covariance=covariance, seen=seen)


@dataclass(frozen=True, slots=True, eq=False)
class FullLearner:
    """Which experts were right is known for all of them, or for many: a logistic correction per
    expert, logit quality = logit base + w·x, by gradient steps on the multi-hot binary
    cross-entropy of each query (DriftMoE's update of its router, arXiv:2507.18464, section 3).

    `w` (E, m). The constant `rate` is what follows drift; `decay` draws w back to the base.
    """

    experts: tuple[str, ...]
    w: Float64
    rate: float
    decay: float
    seen: int = 0

    @classmethod
    def new(cls, experts: Sequence[str], m: int, *, rate: float, decay: float) -> FullLearner:
        return cls(tuple(experts), np.zeros((len(experts), m)), rate, decay)

    def quality(self, context: FloatArray, base: FloatArray) -> Judged:
        z = logit(base) + self.w @ context.astype(np.float64)
        return np.asarray(sigmoid(z), np.float32), None

    def learned(self, observed: Sequence[Observed]) -> FullLearner:
        w, seen = self.w.copy(), self.seen
        for one in observed:
            known, x = one.known, one.context.astype(np.float64)
            z = logit(one.base[known]) + w[known] @ x
            error = one.outcome[known].astype(np.float64) - sigmoid(z)  # −gradient in z
            w[known] = (1 - self.rate * self.decay) * w[known] + self.rate * error[:, None] * x
            seen += len(known)
        return replace(self, w=w, seen=seen)

    def state(self) -> State:
        return State({"w": self.w}, {"experts": list(self.experts), "seen": self.seen})

    def restored(self, state: State) -> FullLearner:
        """As `BanditLearner.restored`."""
        w = self.w.copy()
        for here, there in _shared(self.experts, state, w.shape[1], "w"):
            w[here] = state.arrays["w"][there]
        return replace(self, w=w, seen=int(state.values["seen"]))


def _shared(experts: tuple[str, ...], state: State, m: int, array: str) -> list[tuple[int, int]]:
    """Where the experts that both know stand here and there."""
    if state.arrays[array].shape[-1] != m:
        raise ValueError(
            f"the state has contexts of {state.arrays[array].shape[-1]} numbers and this router "
            f"of {m}; start anew"
        )
    place = {expert: row for row, expert in enumerate(state.values["experts"])}
    return [(row, place[expert]) for row, expert in enumerate(experts) if expert in place]


def _covariance(gram: Float64, noise: float, prior: float) -> Float64:
    precision = gram / noise**2 + np.eye(gram.shape[-1]) / prior**2
    return np.asarray(np.linalg.inv(precision), np.float64)

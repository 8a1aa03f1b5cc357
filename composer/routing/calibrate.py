"""Similarities to probabilities: P(this expert is right), from a registry's own held-out rows.
Knows nothing of how the similarities came about.

quality = P(some expert fits | the best similarity) · P(it is this one | its margin), two logistic
regressions. A product, not one regression on both: a clear margin must not make up for a
similarity so low that the query fits nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.types import BoolArray, FloatArray

Float64 = npt.NDArray[np.float64]

SIBLINGS = 30
"""One in so many experts is taken away with a query's own when it plays the unseen one: experts
come in families, and a query that fits nobody lies outside its family, too. With the own ones
alone gone, what is left of clinc150 looks nearer than its out-of-scope queries really are (median
similarity 0.50, really 0.30; with one in thirty gone 0.31)."""

EDGE = 0.01
"""Probabilities are cut this far from 0 and 1 before their logit is taken."""

CANDIDATES = 3
"""Experts of a query that the second regression looks at: those that a plan could hold."""


@dataclass(frozen=True, slots=True)
class Prior:
    """Normal, over (intercept, slope). Means and widths are what unpenalised fits find on samples
    of clinc150's and banking77's training rows, eight intents of forty rows at a time. A registry
    with hardly any rows is given the means; with a few hundred its own rows decide."""

    mean: tuple[float, float]
    sd: tuple[float, float]


SEEN = Prior(mean=(-11.0, 23.0), sd=(4.0, 8.0))
RIGHT = Prior(mean=(-0.2, 28.0), sd=(1.0, 10.0))


@dataclass(frozen=True, slots=True)
class Evidence:
    """Held-out queries: the best similarity as they are (q,) and as unseen ones (u,), and of the
    candidate experts of each the margin (q, c) and whether right (q, c)."""

    seen: FloatArray
    unseen: FloatArray
    margin: FloatArray
    right: BoolArray


def margins(similarity: FloatArray) -> FloatArray:
    """(q, E) → (q, E): how far each expert is ahead of the best of the others, below 0 for all
    but the best. +∞ where there is no other."""
    if similarity.shape[1] < 2:
        return np.full_like(similarity, np.inf)
    best_two = -np.partition(-similarity, 1, axis=1)[:, :2]  # (q, 2)
    out = similarity - best_two[:, :1]
    best = similarity.argmax(axis=1)
    rows = np.arange(len(similarity))
    out[rows, best] = similarity[rows, best] - best_two[:, 1]
    return np.asarray(out, np.float32)


def evidence(similarity: FloatArray, right: BoolArray) -> Evidence:
    """From held-out queries: similarity (q, E), and which experts own the query's text (q, E).

    Each query serves twice: as it is, and as one that fits nobody, its own experts and their
    nearest siblings taken away. Where that leaves nobody it serves once.
    """
    n_experts = similarity.shape[1]
    columns = np.argpartition(-similarity, min(CANDIDATES, n_experts) - 1, axis=1)[:, :CANDIDATES]
    others = np.where(right, -np.inf, similarity)
    if siblings := n_experts // SIBLINGS:
        nearest = np.argpartition(-others, siblings - 1, axis=1)[:, :siblings]
        np.put_along_axis(others, nearest, -np.inf, axis=1)
    unseen = others.max(axis=1)
    return Evidence(
        seen=similarity.max(axis=1),
        unseen=unseen[np.isfinite(unseen)],
        margin=np.take_along_axis(margins(similarity), columns, axis=1),
        right=np.take_along_axis(right, columns, axis=1),
    )


@dataclass(frozen=True, slots=True)
class Logistic:
    """logit P = b₀ + b₁ x with b₁ ≥ 0; `covariance` (2, 2) is that of b (Laplace)."""

    b: Float64
    covariance: Float64

    @classmethod
    def fit(cls, x: Float64, y: Float64, weight: Float64, prior: Prior) -> Logistic:
        """(p,) inputs, outcomes 0 or 1, and weights. Maximum a posteriori."""
        from scipy.optimize import minimize

        mean, precision = np.array(prior.mean), 1 / np.array(prior.sd) ** 2
        features = np.stack([np.ones_like(x), x], axis=1)  # (p, 2)

        def loss(b: Float64) -> tuple[float, Float64]:
            logit = features @ b
            nll = weight @ (np.logaddexp(0, logit) - y * logit)
            off = b - mean
            slope = features.T @ (weight * (sigmoid(logit) - y)) + precision * off
            return float(nll + (precision * off**2).sum() / 2), slope

        bounds = [(None, None), (0, None)]
        b: Float64 = minimize(loss, mean, jac=True, method="L-BFGS-B", bounds=bounds).x
        p = sigmoid(features @ b)
        hessian = (features * (weight * p * (1 - p))[:, None]).T @ features + np.diag(precision)
        return cls(b, np.linalg.inv(hessian))

    def __call__(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Probability, and variance of its logit; both of x's shape. x may be infinite."""
        b, c = self.b.astype(np.float32), self.covariance.astype(np.float32)
        x = np.clip(x, -10, 10)
        variance = c[0, 0] + 2 * c[0, 1] * x + c[1, 1] * x**2
        p = np.asarray(sigmoid(b[0] + b[1] * x), np.float32)
        return p, np.asarray(np.maximum(variance, 0), np.float32)


@dataclass(frozen=True, slots=True)
class Calibration:
    """`seen` reads a query's best similarity, `right` an expert's margin."""

    seen: Logistic
    right: Logistic

    @classmethod
    def fit(cls, evidence: Sequence[Evidence], *, unseen_share: float) -> Calibration:
        """No evidence, say of one expert, gives the prior."""
        seen = _joined(e.seen for e in evidence)
        unseen = _joined(e.unseen for e in evidence)
        if not len(unseen) or not len(seen):
            seen = unseen = np.empty(0)
        # Each side weighs its share, and both together as much as there are queries.
        weight = np.concatenate(
            [
                np.full(len(seen), 1 - unseen_share),
                np.full(len(unseen), unseen_share * len(seen) / max(len(unseen), 1)),
            ]
        )
        margin = _joined(e.margin.ravel() for e in evidence)
        right = _joined(e.right.ravel() for e in evidence)
        finite = np.isfinite(margin)
        return cls(
            seen=Logistic.fit(
                np.concatenate([seen, unseen]),
                np.concatenate([np.ones(len(seen)), np.zeros(len(unseen))]),
                weight,
                SEEN,
            ),
            right=Logistic.fit(
                margin[finite], right[finite], np.full(int(finite.sum()), 1 / CANDIDATES), RIGHT
            ),
        )

    def quality(self, similarity: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(q, E) → the probability that each expert is right, and its standard deviation from
        not knowing the regressions better (delta method), both (q, E)."""
        p_seen, v_seen = self.seen(similarity.max(axis=1, keepdims=True))  # (q, 1)
        p_right, v_right = self.right(margins(similarity))  # (q, E)
        quality = p_seen * p_right
        variance = (1 - p_seen) ** 2 * v_seen + (1 - p_right) ** 2 * v_right
        return quality, np.asarray(quality * np.sqrt(variance), np.float32)


def by_rank(quality: FloatArray, order: npt.NDArray[np.floating]) -> FloatArray:
    """(n, E) qualities handed out anew by rank: whoever is r-th highest in `order` (n, E) gets the
    r-th highest quality of its row. For methods that rank experts and say no probability: the level
    is that of `quality`, the order theirs. Of equals in `order` the earlier stands higher."""
    ranks = np.argsort(-order, axis=1, kind="stable")
    best = -np.sort(-quality, axis=1)
    out = np.empty_like(quality)
    np.put_along_axis(out, ranks, best, axis=1)
    return out


def _joined(parts: Any) -> Float64:
    listed = [np.asarray(part, np.float64) for part in parts]
    return np.concatenate(listed) if listed else np.empty(0)


def sigmoid(x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    half: npt.NDArray[np.floating] = 0.5 * (1 + np.tanh(0.5 * x))  # never overflows
    return half


def logit(p: npt.NDArray[np.floating]) -> Float64:
    """The inverse of `sigmoid`, of p within `EDGE` of neither 0 nor 1."""
    cut = np.clip(np.asarray(p, np.float64), EDGE, 1 - EDGE)
    return np.asarray(np.log(cut / (1 - cut)), np.float64)

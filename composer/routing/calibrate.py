"""Similarities to probabilities: P(this expert is right), from a registry's own held-out rows.
Knows nothing of how the similarities came about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.types import BoolArray, FloatArray

Float64 = npt.NDArray[np.float64]

CANDIDATES = 3
"""Experts of a query that the fit looks at: those that a plan could hold."""

PRIOR_MEAN: tuple[float, float, float] = (-8.0, 12.0, 12.0)
PRIOR_SD: tuple[float, float, float] = (3.0, 6.0, 6.0)
"""Of intercept, similarity and margin. The mean is what the fit finds on clinc150's and
banking77's training rows, eight intents of forty rows at a time; the width is what it varied by.
A registry with hardly any rows is given these; with a few hundred its own rows decide."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Candidate experts of held-out queries: (p,) similarity, margin, whether right, weight."""

    similarity: Float64
    margin: Float64
    right: BoolArray
    weight: Float64


def margins(similarity: FloatArray) -> FloatArray:
    """(q, E) → (q, E): how far each expert is ahead of the best of the others (below 0 for all
    but the best). 0 where there is no other."""
    if similarity.shape[1] < 2:
        return np.zeros_like(similarity)
    best_two = -np.partition(-similarity, 1, axis=1)[:, :2]  # (q, 2)
    is_best = np.arange(similarity.shape[1])[None, :] == similarity.argmax(axis=1)[:, None]
    return np.asarray(similarity - np.where(is_best, best_two[:, 1:], best_two[:, :1]), np.float32)


def evidence(similarity: FloatArray, right: BoolArray, *, unseen_share: float) -> Evidence:
    """From held-out queries: similarity (q, E), and which experts own the query's text (q, E).

    Each query counts twice. As it is: the best few experts, right or wrong. And as a query that
    fits nobody: with its own experts taken away the best of the rest are all wrong, however near
    they look. The second way weighs `unseen_share` of the whole.
    """
    parts = [_best_few(similarity, right, 1 - unseen_share)]
    others = np.where(right, -np.inf, similarity)
    left = (~right).sum(axis=1) > 0
    if left.any() and unseen_share > 0:
        parts.append(_best_few(others[left], np.zeros_like(right[left]), unseen_share))
    joined = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    found, margin, is_right, weight = joined
    return Evidence(found, margin, is_right.astype(np.bool_), weight)


def _best_few(
    similarity: FloatArray, right: BoolArray, weight: float
) -> tuple[Float64, Float64, BoolArray, Float64]:
    k = min(CANDIDATES, similarity.shape[1])
    columns = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # (q, k)
    found = np.take_along_axis(similarity, columns, axis=1)
    # −inf marks an expert taken away; with one other left its margin would be infinite.
    finite = np.where(np.isfinite(similarity), similarity, -1.0).astype(np.float32)
    margin = np.take_along_axis(margins(finite), columns, axis=1)
    kept = np.isfinite(found)
    each = np.broadcast_to(weight / np.maximum(kept.sum(axis=1, keepdims=True), 1), found.shape)
    return (
        found[kept].astype(np.float64),
        margin[kept].astype(np.float64),
        np.take_along_axis(right, columns, axis=1)[kept],
        each[kept],
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """logit P(right) = b · (1, similarity, margin), by penalised logistic regression; both slopes
    are at least 0, so quality never falls when an expert's similarity rises. `covariance` (3, 3)
    is that of b (Laplace's approximation)."""

    b: Float64
    covariance: Float64

    @classmethod
    def prior(cls) -> Calibration:
        """For a registry without any evidence, say of one expert."""
        return cls(np.array(PRIOR_MEAN), np.diag(np.array(PRIOR_SD) ** 2))

    @classmethod
    def fit(cls, evidence: Iterable[Evidence]) -> Calibration:
        """Maximum a posteriori under the prior above. No evidence gives the prior itself."""
        from scipy.optimize import minimize

        parts = list(evidence)
        if not parts:
            return cls.prior()
        x = np.concatenate([_features(part.similarity, part.margin) for part in parts])  # (p, 3)
        y = np.concatenate([part.right for part in parts]).astype(np.float64)
        weight = np.concatenate([part.weight for part in parts])
        mean, precision = np.array(PRIOR_MEAN), 1 / np.array(PRIOR_SD) ** 2

        def loss(b: Float64) -> tuple[float, Float64]:
            logit = x @ b
            nll = weight @ (np.logaddexp(0, logit) - y * logit)
            slope = x.T @ (weight * (_sigmoid(logit) - y))
            off = b - mean
            return float(nll + (precision * off**2).sum() / 2), slope + precision * off

        bounds = [(None, None), (0, None), (0, None)]
        b = minimize(loss, mean, jac=True, method="L-BFGS-B", bounds=bounds).x
        p = _sigmoid(x @ b)
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + np.diag(precision)
        return cls(b, np.linalg.inv(hessian))

    def quality(self, similarity: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(q, E) → the probability that each expert is right, and its standard deviation from
        not knowing b better (delta method), both (q, E)."""
        margin = margins(similarity)
        b, c = self.b.astype(np.float32), self.covariance.astype(np.float32)
        quality = _sigmoid(b[0] + b[1] * similarity + b[2] * margin)
        variance = (  # xᵀ C x of the logit, written out: E may be 10,000
            c[0, 0]
            + c[1, 1] * similarity**2
            + c[2, 2] * margin**2
            + 2 * (c[0, 1] * similarity + c[0, 2] * margin + c[1, 2] * similarity * margin)
        )
        deviation = quality * (1 - quality) * np.sqrt(np.maximum(variance, 0))
        return np.asarray(quality, np.float32), np.asarray(deviation, np.float32)


def _features(similarity: Float64, margin: Float64) -> Float64:
    return np.stack([np.ones_like(similarity), similarity, margin], axis=1)


def _sigmoid(x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    half: npt.NDArray[np.floating] = 0.5 * (1 + np.tanh(0.5 * x))  # never overflows
    return half

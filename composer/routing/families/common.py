"""What families share: which rows can teach, an expert's mean, a question's difficulty, how far
several opinions are to be followed. Knows no family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from composer.routing.outcomes import IntArray, Outcomes
from composer.routing.views import Features, View, count_of, rows_of
from composer.types import FloatArray

Float64 = npt.NDArray[np.float64]

CHUNK = 1024
"""Queries that are compared with all rows at a time, so that no table grows with both."""


class FamilySettings(BaseModel):
    """Base of every family's settings: frozen, and a name that there is not is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def teaching(features: Features, outcomes: Outcomes) -> tuple[Features, Outcomes]:
    """Only the questions with an outcome. Raises ValueError where there is nothing to fit on."""
    if not outcomes.experts:
        raise ValueError("the outcomes have no expert; give at least one")
    if count_of(features) != len(outcomes):
        raise ValueError(
            f"{count_of(features)} rows of features for {len(outcomes)} questions; "
            "make the features of these questions"
        )
    known = np.asarray(outcomes.known)
    if silent := [e for e, k in zip(outcomes.experts, known.T, strict=True) if not k.any()]:
        raise ValueError(
            f"expert {silent[0]!r} has no outcome among these {len(outcomes)} questions; "
            "collect some, or leave it out of the pool"
        )
    taught = np.asarray(known.any(axis=1))
    if taught.all():
        return features, outcomes
    return rows_of(features, taught), outcomes.rows(taught)


def expert_means(quality: FloatArray) -> FloatArray:
    """(n, E) outcomes, NaN where missing → (E,) each expert's mean."""
    return np.asarray(np.nanmean(quality, axis=0, dtype=np.float64), np.float32)


@dataclass(frozen=True, slots=True)
class Parts:
    """quality = mean + difficulty + rest: (E,), (n,) and (n, E), of which the rest is NaN where the
    outcome is missing. The difficulty is what all experts found of a question, drawn to 0 as if
    by one more expert who found it ordinary, so that one outcome is not a verdict."""

    mean: FloatArray
    difficulty: FloatArray
    rest: FloatArray

    @classmethod
    def of(cls, quality: FloatArray) -> Parts:
        mean = expert_means(quality)
        off = quality - mean
        known = ~np.isnan(off)
        difficulty = np.where(known, off, 0).sum(axis=1) / (known.sum(axis=1) + 1)
        rest = np.asarray(off - difficulty[:, None], np.float32)
        return cls(mean, np.asarray(difficulty, np.float32), rest)


def filled(quality: FloatArray) -> FloatArray:
    """(n, E) with each missing outcome guessed: its expert's mean and its question's difficulty."""
    parts = Parts.of(quality)
    guess = np.clip(parts.mean + parts.difficulty[:, None], 0, 1)
    return np.asarray(np.where(np.isnan(quality), guess, quality), np.float32)


def about_row(
    values: npt.NDArray[np.floating], known: npt.NDArray[np.bool_], weight: Float64
) -> Float64:
    """(…, n, E) less each question's mean over the experts it was asked of, these weighed by
    `weight` (E,); 0 elsewhere."""
    shown = np.where(known, weight, 0)
    total = np.maximum(shown.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    mean = (np.where(known, values, 0) * shown).sum(axis=-1, keepdims=True) / total
    return np.where(known, values - mean, 0)


def followed(
    said: FloatArray,
    target: FloatArray,
    known: npt.NDArray[np.bool_],
    mean: FloatArray,
    closeness: float | None,
) -> FloatArray | None:
    """How far each of M opinions `said` (M, n, E) on how experts differ is to be followed, (M,):
    non-negative least squares (Breiman's stacking) on outcomes that their makers had not seen,
    `target` (n, E). None where no question has two known outcomes, so that nothing is told.

    An expert of mean quality `mean` counts as exp((mean − highest mean) / `closeness`), all the
    same at None. Decisions fall between the best few, who differ less than the others do: with
    all alike, what tells the weak from the strong is believed of the strong, too.
    """
    known = known & (known.sum(axis=1, keepdims=True) > 1)
    if not known.any():
        return None
    weight = np.ones(len(mean), np.float64)
    if closeness is not None:
        weight = np.exp((mean.astype(np.float64) - float(mean.max())) / closeness)
    root = np.sqrt(weight)
    x = (about_row(said, known, weight) * root)[:, known]
    y = (about_row(target, known, weight) * root)[known]
    return np.asarray(non_negative(x, y), np.float32)


def non_negative(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Float64:
    """(M, p), (p,) → (M,) weights of at least 0 with the least squared error, by way of the (M, M)
    normal equations. A hair of ridge parts opinions that are the same."""
    from scipy.optimize import nnls

    x = np.asarray(x, np.float64)
    gram = x @ x.T
    if not gram.any():
        return np.zeros(len(x))
    gram[np.diag_indices_from(gram)] += 1e-6 * float(np.trace(gram))
    root = np.linalg.cholesky(gram)
    weights: Float64 = nnls(root.T, np.linalg.solve(root, x @ y))[0]
    return weights


def dense(features: Features, views: Sequence[View]) -> FloatArray:
    """(n, D) the dense views side by side."""
    return np.ascontiguousarray(np.hstack([features[view] for view in views]), np.float32)


def chunks(n: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]


def folds_of(group: IntArray, folds: int) -> IntArray:
    """(n,) fold numbers; a group is never parted. By a fixed shuffle, the same in every run."""
    _, numbers = np.unique(group, return_inverse=True)
    shuffled = np.random.default_rng(0).permutation(int(numbers.max()) + 1)
    return np.asarray(shuffled[numbers] % folds, np.int64)


def softmax(logits: npt.NDArray[Any]) -> FloatArray:
    """Over the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True), np.float32)

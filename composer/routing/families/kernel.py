"""Kernel ridge regression of every expert's outcomes at once, over several views of the query and
the kind of question it seems to be. Knows no family but the classifier of kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, model_validator
from scipy.sparse import csr_matrix, issparse

from composer.routing.families.common import FamilySettings, Parts, chunks, teaching
from composer.routing.families.labels import VIEWS, Labels, kinds_of
from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View, count_of
from composer.types import FloatArray, Tier

EXACT_ROWS = 8_000
"""Labelled questions up to which every one is a centre: the table of all pairs is then at most
256 MB, and solving it needs that twice."""

LANDMARKS = 4_000
"""Centres of the Nyström approximation where there are more."""

CATEGORY_FOLDS = 4
ROUNDS = 30
"""Missing outcomes are filled in this often at most, or until no prediction moves by SETTLED."""

SETTLED = 1e-4
JITTER = 1e-4

Sides = Mapping[str, Any]
"""View → (n, …) rows, beside the views of the features `category`: √posterior, unit rows."""


class KernelSettings(FamilySettings):
    """k(x, z) = exp(−`gamma` · Σ_v w_v ‖x_v − z_v‖² / Σ_v w_v) with the weights of the views below;
    0 leaves a view out. `ridge` draws what tells experts apart towards their means,
    `difficulty_ridge` what is common to all of them to 0. They are two because the difficulty
    of a question is far better seen than who masters it: on zeroeval the squared error is lowest
    with 1, the choice best with 10 to 30. `sharpness` is the inverse penalty of the classifier of
    kinds."""

    ridge: float = Field(10.0, gt=0)
    difficulty_ridge: float = Field(1.0, gt=0)
    gamma: float = Field(1.5, gt=0)
    embedding: float = Field(1.0, ge=0)
    stem: float = Field(0.5, ge=0)
    words: float = Field(0.5, ge=0)
    format: float = Field(0.5, ge=0)
    category: float = Field(0.5, ge=0)
    sharpness: float = Field(8.0, gt=0)

    @model_validator(mode="after")
    def _some(self) -> KernelSettings:
        if not self.weights():
            raise ValueError("every view has weight 0; give at least one a weight")
        return self

    def weights(self) -> dict[str, float]:
        """Of the views that count, by name."""
        of = {view: float(getattr(self, view)) for view in (*VIEWS, "category")}
        return {view: weight for view, weight in of.items() if weight > 0}


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """`centres`: the labelled questions' views, without `stem` where no question had options.
    `alpha` (m, E), `mean` (E,); `labels` is None where the category has no weight.

    Missing outcomes are filled in with the fit's own predictions until these settle, beginning
    with the expert's mean and the question's difficulty: a minimiser of the squared error over
    the known outcomes alone, by majorisation. Its limit: where most are missing it takes more
    rounds than are made, and predictions stay nearer to the experts' means than they should.
    """

    name: ClassVar[str] = "kernel"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "Kernel ridge regression: Saunders et al., ICML 1998; above 8,000 rows Nyström: Williams & "
        "Seeger, NIPS 2000. The views and the predicted category are ours"
    )
    settings: ClassVar[type[BaseModel]] = KernelSettings

    centres: Sides
    alpha: FloatArray
    mean: FloatArray
    labels: Labels | None
    chosen: KernelSettings

    @classmethod
    def grid(cls) -> Sequence[KernelSettings]:
        return [KernelSettings(ridge=r, gamma=g) for g in (1.5, 0.75) for r in (10.0, 3.0, 30.0)]

    @classmethod
    def views(cls, settings: KernelSettings) -> frozenset[View]:
        if settings.category > 0:
            return frozenset(VIEWS)
        return frozenset(view for view in VIEWS if view in settings.weights())

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
        features, outcomes = teaching(features, outcomes)
        parts = Parts.of(np.asarray(outcomes.quality, np.float32))
        # The difficulty is fitted as one more expert, and added to all of them afterwards.
        target = np.hstack([parts.rest, parts.difficulty[:, None]])  # (n, E + 1)
        alike = "stem" in features and np.array_equal(features["stem"], features["embedding"])
        labelled: dict[float, tuple[Labels, FloatArray]] = {}
        tables: dict[str, tuple[Sides, _Table]] = {}
        solved: dict[tuple[float, float], FloatArray] = {}
        fitted = []
        for chosen in settings:
            weights, labels, posterior = chosen.weights(), None, None
            if "embedding" in weights and alike:
                weights.pop("stem", None)
            if chosen.category > 0:
                if chosen.sharpness not in labelled:
                    labelled[chosen.sharpness] = _labelled(features, outcomes, chosen, seed)
                labels, posterior = labelled[chosen.sharpness]
            key = repr((weights, chosen.category and chosen.sharpness))
            if key not in tables:
                tables.clear()  # one at a time: they are large
                solved.clear()
                tables[key] = _table(_sides(features, posterior, weights), weights, seed)
            centres, table = tables[key]
            for ridge in (chosen.ridge, chosen.difficulty_ridge):
                if (chosen.gamma, ridge) not in solved:
                    solved[chosen.gamma, ridge] = _solved(table, target, chosen.gamma, ridge)
            rest = solved[chosen.gamma, chosen.ridge][:, :-1]
            difficulty = solved[chosen.gamma, chosen.difficulty_ridge][:, -1:]
            fitted.append(cls(centres, rest + difficulty, parts.mean, labels, chosen))
        return fitted

    def predict(self, features: Features) -> FloatArray:
        weights = {v: w for v, w in self.chosen.weights().items() if v in self.centres}
        posterior = None if self.labels is None else self.labels.posterior(features)
        sides = _sides(features, posterior, weights)
        out = np.empty((count_of(features), len(self.mean)), np.float32)
        for part in chunks(len(out)):
            rows = {view: values[part] for view, values in sides.items()}
            near = np.exp(-self.chosen.gamma * _distances(rows, self.centres, weights))
            out[part] = near @ self.alpha + self.mean
        return out

    def state(self) -> State:
        arrays: dict[str, npt.NDArray[Any]] = {"alpha": self.alpha, "mean": self.mean}
        values: dict[str, Any] = {}
        for view, rows in self.centres.items():
            if issparse(rows):
                values[view] = int(rows.shape[1])
                arrays |= {f"{view}.{a}": getattr(rows, a) for a in ("data", "indices", "indptr")}
            else:
                arrays[view] = rows
        parts = {"kernel": State(arrays, values)}
        if self.labels is not None:
            parts["labels"] = self.labels.state()
        return packed(parts)

    @classmethod
    def restore(cls, state: State, settings: Any) -> Kernel:
        own = part_of(state, "kernel")
        arrays = dict(own.arrays)
        alpha, mean = arrays.pop("alpha"), arrays.pop("mean")
        centres: dict[str, Any] = {view: a for view, a in arrays.items() if "." not in view}
        for view, width in own.values.items():
            parts = tuple(arrays[f"{view}.{a}"] for a in ("data", "indices", "indptr"))
            centres[view] = csr_matrix(parts, shape=(len(alpha), width))
        labels = Labels.restore(part_of(state, "labels")) if "labels" in state.values else None
        return cls(centres, alpha, mean, labels, settings)


def _labelled(
    features: Features, outcomes: Outcomes, chosen: KernelSettings, seed: int
) -> tuple[Labels, FloatArray]:
    kinds = kinds_of(features, outcomes, seed)
    labels = Labels.fit(features, kinds, chosen.sharpness)
    return labels, labels.crossfitted(
        features, kinds, outcomes.group, chosen.sharpness, CATEGORY_FOLDS
    )


def _sides(features: Features, posterior: FloatArray | None, weights: Mapping[str, float]) -> Sides:
    sides: dict[str, Any] = {view: features[view] for view in VIEWS if view in weights}
    if posterior is not None:
        sides["category"] = np.sqrt(posterior)
    return sides


def _distances(rows: Sides, centres: Sides, weights: Mapping[str, float]) -> FloatArray:
    """(c, m) Σ_v w_v ‖x_v − z_v‖² / Σ_v w_v."""
    total = sum(weights.values())
    out: FloatArray | None = None
    for view, weight in weights.items():
        x, z = rows[view], centres[view]
        inner = x @ z.T
        if issparse(inner):
            inner = inner.toarray()
        own = _squares(x)[:, None] + _squares(z)
        d = np.asarray(np.maximum(own - 2 * inner, 0) * np.float32(weight / total), np.float32)
        out = d if out is None else out + d
    assert out is not None
    return out


def _squares(rows: Any) -> FloatArray:
    """(n,) squared lengths."""
    if issparse(rows):
        return np.asarray(rows.multiply(rows).sum(axis=1), np.float32).ravel()
    return np.asarray(np.einsum("nd,nd->n", rows, rows), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Distances of the n labelled questions to the m centres (n, m), and of the centres to one
    another (m, m): the same table where every question is a centre."""

    questions: FloatArray
    centres: FloatArray


def _table(sides: Sides, weights: Mapping[str, float], seed: int) -> tuple[Sides, _Table]:
    n = count_of(sides)  # type: ignore[arg-type]
    if n <= EXACT_ROWS:
        whole = _all_distances(sides, sides, weights)
        return sides, _Table(whole, whole)
    kept = np.sort(np.random.default_rng(seed).choice(n, min(LANDMARKS, n), replace=False))
    centres = {view: values[kept] for view, values in sides.items()}
    to = _all_distances(sides, centres, weights)
    return centres, _Table(to, to[kept])


def _all_distances(rows: Sides, centres: Sides, weights: Mapping[str, float]) -> FloatArray:
    n, m = count_of(rows), count_of(centres)  # type: ignore[arg-type]
    out = np.empty((n, m), np.float32)
    for part in chunks(n):
        out[part] = _distances({v: values[part] for v, values in rows.items()}, centres, weights)
    return out


def _solved(table: _Table, target: FloatArray, gamma: float, ridge: float) -> FloatArray:
    """(n, T) targets, NaN where missing → (m, T). One Cholesky factor serves all columns."""
    from scipy.linalg import cho_solve, cholesky, solve_triangular

    missing = np.isnan(target)
    full = np.where(missing, 0, target).astype(np.float32)
    exact = table.centres is table.questions
    kernel = np.exp(-gamma * table.questions)  # (n, m)
    if exact:
        kernel[np.diag_indices_from(kernel)] += ridge
        factor = cholesky(kernel, lower=True, overwrite_a=True, check_finite=False)
    else:
        inner = np.exp(-gamma * table.centres)
        inner[np.diag_indices_from(inner)] += JITTER
        root = cholesky(inner, lower=True, overwrite_a=True, check_finite=False)  # (m, m)
        primal = solve_triangular(root, kernel.T, lower=True, check_finite=False)  # (m, n)
        gram = primal @ primal.T
        gram[np.diag_indices_from(gram)] += ridge
        factor = cholesky(gram, lower=True, overwrite_a=True, check_finite=False)

    def solve(y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weights, and the fit at the labelled questions."""
        if exact:
            alpha = cho_solve((factor, True), y, check_finite=False)
            return alpha, y - np.float32(ridge) * alpha
        beta = cho_solve((factor, True), primal @ y, check_finite=False)
        alpha = solve_triangular(root, beta, lower=True, trans="T", check_finite=False)
        return alpha, primal.T @ beta

    alpha, fit = solve(full)
    for _ in range(ROUNDS if missing.any() else 0):
        moved = float(np.abs(full[missing] - fit[missing]).max())
        full = np.where(missing, fit, full)
        alpha, fit = solve(full)
        if moved < SETTLED:
            break
    return np.asarray(alpha, np.float32)

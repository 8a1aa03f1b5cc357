"""Queries as points, the squared distances between them, and kernel ridge on these. Knows no
expert: targets are columns of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack

from composer.routing.families.common import chunks
from composer.routing.state import State
from composer.routing.views import LEXICAL, Features, count_of
from composer.types import FloatArray

LANDMARKS = 2_000
"""Centres of the Nyström approximation where there are more: on mmlu_pro's 5,700 questions 1,500
decide as well as all, and a query meets a quarter as many."""

ROUNDS = 30
"""Missing outcomes are filled in this often at most, or until no prediction moves by SETTLED."""

SETTLED = 1e-4
JITTER = 1e-4

Solve = Callable[[FloatArray], tuple[FloatArray, FloatArray]]
"""Targets (n, T) → weights of the centres (m, T), and the fit at the labelled questions (n, T)."""

SPARSE = ("data", "indices", "indptr")
"""The arrays of a CSR matrix."""


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Queries where squared distances are Σ_v w_v ‖x_v − z_v‖² / Σ_v w_v: `dense` (n, D) the dense
    views scaled by the roots of their shares, `words` (n, v) CSR the lexical ones, or None;
    `length` (n,) squared."""

    dense: FloatArray
    words: csr_matrix | None
    length: FloatArray

    @classmethod
    def of(
        cls, features: Features, posterior: FloatArray | None, weights: Mapping[str, float]
    ) -> Points:
        total = sum(weights.values())
        sides: dict[str, Any] = {str(view): values for view, values in features.items()}
        if posterior is not None:
            sides["category"] = np.sqrt(posterior)
        root = {view: np.float32(np.sqrt(weight / total)) for view, weight in weights.items()}
        n = count_of(features)
        parts = [sides[view] * root[view] for view in weights if view not in LEXICAL]
        joined = np.ascontiguousarray(np.hstack([np.zeros((n, 0), np.float32), *parts]), np.float32)
        length = np.einsum("nd,nd->n", joined, joined)
        terms = [sides[view] * root[view] for view in weights if view in LEXICAL]
        words = csr_matrix(hstack(terms, format="csr")) if terms else None
        if words is not None:
            length = length + np.asarray(words.multiply(words).sum(axis=1)).ravel()
        return cls(joined, words, np.asarray(length, np.float32))

    def rows(self, chosen: Any) -> Points:
        words = None if self.words is None else self.words[chosen]
        return Points(self.dense[chosen], words, self.length[chosen])

    def distances(self, centres: Centres) -> FloatArray:
        """(n, m) squared."""
        out = np.empty((len(self.length), len(centres.length)), np.float32)
        for part in chunks(len(out)):
            inner = self.dense[part] @ centres.dense.T
            if self.words is not None and centres.words is not None:
                inner += (self.words[part] @ centres.words).toarray()
            own = self.length[part, None] + centres.length
            out[part] = np.maximum(own - 2 * inner, 0)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Centres:
    """The labelled questions as `Points`, with `words` (v, m) the other way round: that is how one
    query meets all of them fast."""

    dense: FloatArray
    words: csr_matrix | None
    length: FloatArray

    @classmethod
    def of(cls, points: Points) -> Centres:
        words = None if points.words is None else csr_matrix(points.words.T)
        return cls(points.dense, words, points.length)

    def state(self) -> State:
        arrays: dict[str, npt.NDArray[Any]] = {"dense": self.dense, "length": self.length}
        if self.words is None:
            return State(arrays, {"words": None})
        arrays |= {f"words.{name}": getattr(self.words, name) for name in SPARSE}
        return State(arrays, {"words": list(map(int, self.words.shape))})

    @classmethod
    def restore(cls, state: State) -> Centres:
        a, words = state.arrays, None
        if state.values["words"] is not None:
            parts = tuple(a[f"words.{name}"] for name in SPARSE)
            words = csr_matrix(parts, shape=tuple(state.values["words"]))
        return cls(a["dense"], words, a["length"])


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Squared distances of the n labelled questions to the m centres (n, m), and of the centres to
    one another (m, m): the same table where every question is a centre."""

    questions: FloatArray
    centres: FloatArray

    def rows(self, chosen: npt.NDArray[np.bool_]) -> Table:
        """Of some of the questions; where every question is a centre, so are these."""
        if self.centres is self.questions:
            some = self.questions[np.ix_(chosen, chosen)]
            return Table(some, some)
        return Table(self.questions[chosen], self.centres)


def table_of(points: Points, exact: int, seed: int) -> tuple[Centres, Table]:
    """Every question is a centre up to `exact` of them, else LANDMARKS are."""
    n = len(points.length)
    if n <= exact:
        centres = Centres.of(points)
        whole = points.distances(centres)
        return centres, Table(whole, whole)
    kept = np.sort(np.random.default_rng(seed).choice(n, min(LANDMARKS, n), replace=False))
    centres = Centres.of(points.rows(kept))
    to = points.distances(centres)
    return centres, Table(to, to[kept])


def solved(
    table: Table, target: FloatArray, gamma: float, ridges: Sequence[float]
) -> list[FloatArray]:
    """(n, T) targets, NaN where missing → (m, T) for each ridge. One Cholesky factor serves all
    columns."""
    from scipy.linalg import cho_solve, cholesky, solve_triangular

    if table.centres is table.questions:
        kernel = np.exp(-gamma * table.questions)
        found = {ridge: _filled_in(_exact(kernel, ridge), target) for ridge in set(ridges)}
        return [found[ridge] for ridge in ridges]
    inner = np.exp(-gamma * table.centres)
    inner[np.diag_indices_from(inner)] += JITTER
    root = cholesky(inner, lower=True, overwrite_a=True, check_finite=False)  # (m, m)
    outer = np.exp(-gamma * table.questions)  # (n, m)
    primal = solve_triangular(root, outer.T, lower=True, check_finite=False)  # (m, n)
    gram = primal @ primal.T

    def landmarks(ridge: float) -> Solve:
        full = gram.copy()
        full[np.diag_indices_from(full)] += ridge
        factor = cholesky(full, lower=True, overwrite_a=True, check_finite=False)

        def solve(y: FloatArray) -> tuple[FloatArray, FloatArray]:
            beta = cho_solve((factor, True), primal @ y, check_finite=False)
            alpha = solve_triangular(root, beta, lower=True, trans="T", check_finite=False)
            return alpha, primal.T @ beta

        return solve

    return [_filled_in(landmarks(ridge), target) for ridge in ridges]


def _exact(kernel: FloatArray, ridge: float) -> Solve:
    from scipy.linalg import cho_solve, cholesky

    full = kernel.copy()
    full[np.diag_indices_from(full)] += ridge
    factor = cholesky(full, lower=True, overwrite_a=True, check_finite=False)

    def solve(y: FloatArray) -> tuple[FloatArray, FloatArray]:
        alpha = cho_solve((factor, True), y, check_finite=False)
        return alpha, y - np.float32(ridge) * alpha

    return solve


def _filled_in(solve: Solve, target: FloatArray) -> FloatArray:
    missing = np.isnan(target)
    full = np.where(missing, 0, target).astype(np.float32)
    alpha, fit = solve(full)
    for _ in range(ROUNDS if missing.any() else 0):
        moved = float(np.abs(full[missing] - fit[missing]).max())
        full = np.where(missing, fit, full)
        alpha, fit = solve(full)
        if moved < SETTLED:
            break
    return np.asarray(alpha, np.float32)

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
from composer.routing.families.sharing import digest, shared
from composer.routing.state import State
from composer.routing.views import LEXICAL, Features, count_of
from composer.types import FloatArray

LANDMARKS = 2_000
"""Centres of the Nyström approximation where there are more: on mmlu_pro's 5,700 questions 1,500
decide as well as all, and a query meets a quarter as many."""

KEPT_ROWS = 4_000
"""Questions that are all centres whose table several fits share: 64 MB."""

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
    one another (m, m): the same table where every question is a centre. `key` tells equal tables
    within `sharing`."""

    questions: FloatArray
    centres: FloatArray
    key: bytes


def table_of(points: Points, exact: int, seed: int) -> tuple[Centres, Table]:
    """Every question is a centre up to `exact` of them, else LANDMARKS are. Within `sharing` equal
    points have one table, unless it is a large one."""
    key = digest(points.dense, points.words, points.length, exact, seed)
    if KEPT_ROWS < len(points.length) <= exact:
        return _table_of(points, exact, seed, key)
    return shared(lambda: ("table", key), lambda: _table_of(points, exact, seed, key))


def _table_of(points: Points, exact: int, seed: int, key: bytes) -> tuple[Centres, Table]:
    n = len(points.length)
    if n <= exact:
        centres = Centres.of(points)
        whole = points.distances(centres)
        return centres, Table(whole, whole, key)
    kept = np.sort(np.random.default_rng(seed).choice(n, min(LANDMARKS, n), replace=False))
    centres = Centres.of(points.rows(kept))
    to = points.distances(centres)
    return centres, Table(to, to[kept], key)


def solved(
    table: Table,
    target: FloatArray,
    gamma: float,
    ridges: Sequence[float],
    seen: npt.NDArray[np.bool_] | None = None,
) -> list[FloatArray]:
    """(n, T) targets, NaN where missing → (m, T) for each ridge. One Cholesky factor serves all
    columns. `seen` (N,): only these n of the table's questions teach; where every question is a
    centre, only they are."""
    if table.centres is table.questions:
        distances = table.questions if seen is None else table.questions[np.ix_(seen, seen)]
        kernel = np.exp(-gamma * distances)
        found = {ridge: _filled_in(_exact(kernel, ridge), target) for ridge in set(ridges)}
        return [found[ridge] for ridge in ridges]
    landmarks = shared(
        lambda: ("landmarks", table.key, gamma), lambda: Landmarks.of(table, gamma)
    ).rows(seen)
    return [_filled_in(landmarks.solver(ridge), target) for ridge in ridges]


@dataclass(frozen=True, slots=True, eq=False)
class Landmarks:
    """The Nyström approximation: `root` (m, m) with root · rootᵀ the centres' kernel, `primal`
    (m, n) the questions as points of a linear space, `gram` (m, m) the products of its axes."""

    root: FloatArray
    primal: FloatArray
    gram: FloatArray

    @classmethod
    def of(cls, table: Table, gamma: float) -> Landmarks:
        from scipy.linalg import cholesky, solve_triangular

        inner = np.exp(-gamma * table.centres)
        inner[np.diag_indices_from(inner)] += JITTER
        root = cholesky(inner, lower=True, overwrite_a=True, check_finite=False)
        outer = np.exp(-gamma * table.questions)  # (n, m)
        primal = solve_triangular(root, outer.T, lower=True, check_finite=False)
        return cls(root, primal, primal @ primal.T)

    def rows(self, seen: npt.NDArray[np.bool_] | None) -> Landmarks:
        """Of some of the questions. The few that are not among them are taken off the products."""
        if seen is None:
            return self
        away = self.primal[:, ~seen]
        return Landmarks(self.root, self.primal[:, seen], self.gram - away @ away.T)

    def solver(self, ridge: float) -> Solve:
        from scipy.linalg import cho_solve, cholesky, solve_triangular

        full = self.gram.copy()
        full[np.diag_indices_from(full)] += ridge
        factor = cholesky(full, lower=True, overwrite_a=True, check_finite=False)

        def solve(y: FloatArray) -> tuple[FloatArray, FloatArray]:
            beta = cho_solve((factor, True), self.primal @ y, check_finite=False)
            alpha = solve_triangular(self.root, beta, lower=True, trans="T", check_finite=False)
            return alpha, self.primal.T @ beta

        return solve


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

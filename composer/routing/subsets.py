"""Exact choices over kinds of question: which expert serves which kind within a budget, and which
experts to keep at all under limits of memory and latency. Knows no query and no router."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import IntArray

ENUMERATED = 12
"""Experts up to which every subset is looked at."""

Table = npt.NDArray[np.floating]


def budgeted_map(count: Table, quality: Table, cost: Table, budget: float) -> IntArray:
    """(C,) the expert of each kind: the greatest Σ_c count_c · quality[c, m_c] whose mean cost
    Σ_c count_c · cost[c, m_c] / Σ count is at most `budget`.

    `count` (C,) questions of each kind, `quality` and `cost` (C, E); a NaN in either is a pair
    that cannot be chosen. The multiple-choice knapsack of Composition of Experts (arXiv
    2412.01868), solved to optimality as a mixed-integer programme. Raises ValueError where even the
    cheapest map is over the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, eye, kron

    kinds, experts = quality.shape
    share = np.asarray(count, np.float64) / float(np.sum(count))
    barred = np.isnan(quality) | np.isnan(cost)
    if barred.all(axis=1).any():
        raise ValueError("a kind of question has no expert with a quality and a cost; give one")
    spend = share[:, None] * np.where(barred, 0, cost)  # (C, E)
    least = float((share * np.where(barred, np.inf, cost).min(axis=1)).sum())
    if least > budget:
        raise ValueError(
            f"the cheapest experts cost {least:.6g} on average, over the budget of {budget:.6g}; "
            "raise the budget or add a cheaper expert"
        )
    scale = max(float(spend.max()), 1e-300)  # costs are tiny fractions of a dollar: to about 1
    solution = milp(
        -(share[:, None] * np.where(barred, 0, quality)).ravel(),
        integrality=np.ones(kinds * experts),
        bounds=Bounds(0, np.where(barred, 0, 1).ravel()),
        constraints=[
            LinearConstraint(kron(eye(kinds), np.ones((1, experts)), format="csr"), 1, 1),
            LinearConstraint(csr_matrix(spend.ravel() / scale), -np.inf, budget / scale),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise ValueError(f"no map was found within the budget: {solution.message}")
    return np.asarray(solution.x.reshape(kinds, experts).argmax(axis=1), np.int64)


@dataclass(frozen=True, slots=True)
class Subset:
    """`experts` in order; `value` is the mean quality with the best of them for each kind, and
    no subset within the limits is better than `bound`: equal to it where the search is exact."""

    experts: tuple[int, ...]
    value: float
    bound: float


def best_subset(
    count: Table,
    quality: Table,
    memory: Table,
    memory_limit: float,
    latency: Table | None = None,
    latency_limit: float = np.inf,
) -> Subset:
    """The experts to keep: the greatest Σ_c count_c · max_{m ∈ S} quality[c, m] / Σ count with
    Σ_{m ∈ S} memory_m ≤ `memory_limit`, of experts whose latency (E,) is within its limit.

    `count` (C,) and `quality` (C, E), NaN counting as 0. MoE² (arXiv 2501.09410): gates fitted on
    all experts stay right on a subset, so only the subset is searched. Exact for at most
    ENUMERATED candidates. For more, the better of greedy by gain and by gain per memory, which is
    at least (1 − 1/e)/2 of the best, and the bound that Leskovec et al. (KDD 2007, section 3.2)
    read off a submodular function's remaining gains. Raises ValueError where no expert fits.
    """
    worth = np.nan_to_num(np.asarray(quality, np.float64)) * (count / np.sum(count))[:, None]
    fits = np.asarray(memory) <= memory_limit
    if latency is not None:
        fits &= np.asarray(latency) <= latency_limit
    candidates = np.flatnonzero(fits)
    if not len(candidates):
        raise ValueError("no expert is within the limits on its own; raise them")
    size = np.asarray(memory, np.float64)[candidates]
    search = _enumerated if len(candidates) <= ENUMERATED else _greedy
    chosen, value, bound = search(worth[:, candidates], size, memory_limit)
    return Subset(tuple(sorted(int(candidates[m]) for m in chosen)), value, bound)


def _enumerated(worth: Table, size: Table, limit: float) -> tuple[list[int], float, float]:
    """Every subset within the limit, deepest first: a subset's value is kept on the way down."""
    best: tuple[float, list[int]] = (-1.0, [])
    stack: list[tuple[int, list[int], float, Table]] = [(0, [], 0.0, np.zeros(len(worth)))]
    while stack:
        start, chosen, used, reached = stack.pop()
        value = float(reached.sum())
        if chosen and value > best[0]:
            best = (value, chosen)
        for m in range(start, worth.shape[1]):
            if used + size[m] <= limit:
                top = np.maximum(reached, worth[:, m])
                stack.append((m + 1, [*chosen, m], used + float(size[m]), top))
    return best[1], best[0], best[0]


def _greedy(worth: Table, size: Table, limit: float) -> tuple[list[int], float, float]:
    found: list[tuple[float, list[int]]] = []
    bound = float(worth.max(axis=1).sum())
    for price in (np.ones_like(size), np.maximum(size, 1e-12)):
        chosen: list[int] = []
        reached, used = np.zeros(len(worth)), 0.0
        while True:
            gain = np.maximum(worth - reached[:, None], 0).sum(axis=0)  # (E,)
            bound = min(bound, float(reached.sum()) + _fractional(gain, size, limit))
            gain[(used + size > limit) | np.isin(np.arange(len(size)), chosen)] = 0
            m = int((gain / price).argmax())
            if gain[m] <= 0:
                break
            chosen.append(m)
            used += float(size[m])
            reached = np.maximum(reached, worth[:, m])
        found.append((float(reached.sum()), chosen))
    value, chosen = max(found, key=lambda pair: pair[0])
    return chosen or [int(worth.sum(axis=0).argmax())], value, max(bound, value)


def _fractional(gain: Table, size: Table, limit: float) -> float:
    """The most that gains of these sizes add up to within the limit, parts of them allowed."""
    order = np.argsort(-gain / np.maximum(size, 1e-12))
    before = np.concatenate([[0.0], np.cumsum(size[order])[:-1]])
    part = np.clip((limit - before) / np.maximum(size[order], 1e-12), 0, 1)
    return float((gain[order] * part).sum())

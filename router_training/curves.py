"""Quality against cost: operating points, budgets, AIQ, and RouteLLM's measures of a pair.
Knows no router: only what its choices earned and cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import Outcomes

Float64 = npt.NDArray[np.float64]

BUDGETS = (0.05, 0.10, 0.25, 0.50)
"""Shares of the best single expert's mean cost that `budget_acc` is told at."""


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Operating points of one method: mean `cost` in US dollars a question and mean `quality`,
    both (p,), by rising cost; of equal cost the best."""

    cost: Float64
    quality: Float64

    @classmethod
    def of(cls, cost: npt.NDArray[np.floating], quality: npt.NDArray[np.floating]) -> Points:
        """In any order. Raises ValueError for none, or for values that are not finite."""
        costs, qualities = np.asarray(cost, np.float64), np.asarray(quality, np.float64)
        if not len(costs) or not (np.isfinite(costs).all() and np.isfinite(qualities).all()):
            raise ValueError("operating points need a known cost and quality; leave others out")
        order = np.lexsort((-qualities, costs))
        unlike = np.diff(costs[order], prepend=-np.inf) > 0
        return cls(costs[order][unlike], qualities[order][unlike])

    def hull(self) -> Points:
        """The non-decreasing concave upper hull: the best that mixing points at random reaches,
        seen from behind. RouterBench (arXiv 2403.12031), section 3."""
        kept: list[int] = []
        for i in range(len(self.cost)):
            if kept and self.quality[i] <= self.quality[kept[-1]]:
                continue  # dearer and no better
            while len(kept) > 1 and self._below(kept[-2], kept[-1], i):
                kept.pop()
            kept.append(i)
        return Points(self.cost[kept], self.quality[kept])

    def _below(self, a: int, b: int, c: int) -> bool:
        """Whether b is on or below the line from a to c."""
        across = (self.cost[b] - self.cost[a]) * (self.quality[c] - self.quality[a])
        return bool((self.quality[b] - self.quality[a]) * (self.cost[c] - self.cost[a]) <= across)

    def mixed(self, budget: float) -> tuple[int, int, float] | None:
        """Two neighbouring points and the second's share, so that the mean spend of drawing one of
        them for each question is `budget`, or that of the dearest point if it is less. None where
        even the cheapest point costs more."""
        if budget < self.cost[0]:
            return None
        upper = int(np.searchsorted(self.cost, budget))
        if upper == len(self.cost):
            return upper - 1, upper - 1, 0.0
        if self.cost[upper] == budget:
            return upper, upper, 0.0
        step = self.cost[upper] - self.cost[upper - 1]
        return upper - 1, upper, float((budget - self.cost[upper - 1]) / step)

    def within(self, budget: float) -> float | None:
        """Mean quality at a mean spend of at most `budget`, by `mixed`; None below the cheapest."""
        at = self.mixed(budget)
        if at is None:
            return None
        low, high, share = at
        return float((1 - share) * self.quality[low] + share * self.quality[high])


def aiq(points: Points, c_max: float) -> float | None:
    """Average improvement in quality (RouterBench, section 3): the area below the hull, extended
    flat to `c_max` and with none left of the cheapest point, divided by `c_max`. `c_max` is the
    dearest expert's mean cost; None where that is nothing."""
    if not c_max > 0:
        return None
    hull = points.hull()
    if hull.cost[0] >= c_max:
        return 0.0
    inner = hull.cost < c_max
    cost = np.append(hull.cost[inner], c_max)
    quality = np.append(hull.quality[inner], np.interp(c_max, hull.cost, hull.quality))
    return float(np.trapezoid(quality, cost) / c_max)


def budget_acc(points: Points, best_single_cost: float) -> dict[str, float | None]:
    """Mean quality within each share of the best single expert's mean cost."""
    return {f"{share:.2f}": points.within(share * best_single_cost) for share in BUDGETS}


def operating_points(
    predicted: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating],
    outcomes: Outcomes,
    *,
    steps: int = 200,
) -> tuple[Points, npt.NDArray[np.intp]] | None:
    """What choosing by `predicted − weight · expected_cost`, both (n, E), earned and cost as the
    weight goes from none (quality alone) to endless (cost alone), and who was chosen (p, n), point
    by point. Only experts with a known outcome are chosen. None where a cost that was incurred is
    not known, an expected one is missing, or a question has no known outcome.
    """
    known = outcomes.known
    if not outcomes.priced or not known.any(axis=1).all():
        return None
    quality, cost = predicted.astype(np.float64), expected_cost.astype(np.float64)
    if not np.isfinite(cost[known]).all():
        return None
    scale = float(cost[known].mean()) or 1.0
    value = np.where(known, quality, -np.inf)
    chosen = [value.argmax(axis=1)]
    for weight in np.geomspace(1e-4, 1e4, steps) / scale:
        chosen.append((value - weight * np.where(known, cost, 0.0)).argmax(axis=1))
    chosen.append(np.where(known, cost, np.inf).argmin(axis=1))
    distinct = np.unique(np.stack(chosen), axis=0)  # (p, n)
    rows = np.arange(len(outcomes))
    earned = outcomes.quality[rows, distinct].mean(axis=1, dtype=np.float64)
    spent = outcomes.cost[rows, distinct].mean(axis=1, dtype=np.float64)
    order = np.lexsort((-earned, spent))
    unlike = np.diff(spent[order], prepend=-np.inf) > 0
    order = order[unlike]
    return Points(spent[order], earned[order]), distinct[order]


@dataclass(frozen=True, slots=True)
class Pair:
    """How well one chooses between a weak and a strong model, in calls to the strong one.

    `apgr` averages the performance gap recovered over the share of strong calls; `cpt50` and
    `cpt80` are the least shares at which 50 and 80 % of the gap are recovered. `share` and
    `recovered` are the points they are read from. RouteLLM (arXiv 2406.18665), section 3.
    """

    apgr: float
    cpt50: float | None
    cpt80: float | None
    share: tuple[float, ...]
    recovered: tuple[float, ...]


def pair(
    need: npt.NDArray[np.floating],
    weak: npt.NDArray[np.floating],
    strong: npt.NDArray[np.floating],
    *,
    bins: int = 10,
) -> Pair | None:
    """`need` (n,) is higher where the strong model should rather be asked; `weak` and `strong` (n,)
    are the two models' scores. Thresholds stand at the `bins` quantiles of `need`, as in RouteLLM's
    own evaluation; ties are routed together, and between two thresholds the curve is a straight
    line (trapezoid). None where the strong model is no better, or a value is missing."""
    need, weak, strong = (np.asarray(v, np.float64) for v in (need, weak, strong))
    if not len(need) or not all(np.isfinite(v).all() for v in (need, weak, strong)):
        return None
    gap = float(strong.mean() - weak.mean())
    if gap <= 0:
        return None
    thresholds = np.unique(np.quantile(need, np.linspace(0, 1, bins + 1)[:-1]))[::-1]
    calls = need >= thresholds[:, None]  # (t, n), nested; the last is everybody
    share = np.concatenate([[0.0], calls.mean(axis=1)])
    recovered = np.concatenate([[0.0], (calls * (strong - weak)).mean(axis=1) / gap])
    return Pair(
        apgr=float(np.trapezoid(recovered, share)),
        cpt50=_reached(0.5, share, recovered),
        cpt80=_reached(0.8, share, recovered),
        share=tuple(share.tolist()),
        recovered=tuple(recovered.tolist()),
    )


def _reached(level: float, share: Float64, recovered: Float64) -> float | None:
    """The least share at which the straight lines between the points reach `level`."""
    over = np.flatnonzero(recovered >= level)
    if not len(over):
        return None
    i = int(over[0])
    if i == 0:
        return float(share[0])
    step = (level - recovered[i - 1]) / (recovered[i] - recovered[i - 1])
    return float(share[i - 1] + step * (share[i] - share[i - 1]))

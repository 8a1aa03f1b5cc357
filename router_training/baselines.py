"""What every router is held against: random, best single, best by known category, random mixes of
single models within budgets, and the oracle. None of them reads a question's text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.family import decided
from composer.routing.outcomes import Outcomes
from router_training.curves import Points
from router_training.measures import base_rates, earned

Float64 = npt.NDArray[np.float64]
Chosen = npt.NDArray[np.intp]


def best_single(train: Outcomes) -> int:
    """The expert with the highest mean quality on what is fitted on; of equals the cheapest, then
    the first. Experts that were not asked the same questions are compared by their own means."""
    quality, cost = base_rates(train), mean_costs(train)
    best = np.nanmax(quality)
    equal = np.flatnonzero(quality == best)
    return int(equal[np.argmin(np.where(np.isnan(cost[equal]), np.inf, cost[equal]))])


def single(outcomes: Outcomes, expert: int) -> tuple[Float64, Float64]:
    """Quality and cost (n,) of asking always the same; NaN where that is not known."""
    return (
        outcomes.quality[:, expert].astype(np.float64),
        outcomes.cost[:, expert].astype(np.float64),
    )


def random_choice(outcomes: Outcomes) -> tuple[Float64, Float64]:
    """Expected quality and cost (n,) of drawing one of the experts with a known outcome, all alike;
    NaN where there is none."""
    known = outcomes.known
    share = known / np.maximum(known.sum(axis=1, keepdims=True), 1)
    nobody = ~known.any(axis=1)
    quality = (share * np.where(known, outcomes.quality, 0.0)).sum(axis=1)
    cost = (share * np.where(known, outcomes.cost, 0.0)).sum(axis=1)
    return np.where(nobody, np.nan, quality), np.where(nobody, np.nan, cost)


@dataclass(frozen=True, slots=True, eq=False)
class CategoryBest:
    """The best expert by data set and category, told which these are: `quality` (C, E) are means on
    what was fitted on, and a category that was not there has the means over all. No smoothing, as
    in the figures it is compared with."""

    row_of: dict[tuple[str, str], int]
    quality: Float64
    overall: Float64

    @classmethod
    def fit(cls, train: Outcomes) -> CategoryBest:
        overall = base_rates(train)
        keys = list(zip(train.benchmark, train.category, strict=True))
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        number = np.array([row_of[key] for key in keys])
        rates = np.stack([base_rates(train.rows(number == row)) for row in range(len(row_of))])
        return cls(row_of, np.where(np.isnan(rates), overall, rates), overall)

    def choose(self, outcomes: Outcomes) -> Chosen:
        """(n,) the best expert of those with a known outcome; of equals the best over all."""
        keys = zip(outcomes.benchmark, outcomes.category, strict=True)
        rows = [self.row_of.get(key) for key in keys]
        if not rows:
            return np.empty(0, np.intp)
        rates = np.stack([self.overall if row is None else self.quality[row] for row in rows])
        # A tie-break far below any difference between two means of scores.
        rates = np.nan_to_num(rates + 1e-9 * self.overall, nan=-1.0)
        return np.asarray(decided(rates, outcomes.known), np.intp)


def oracle(outcomes: Outcomes) -> Chosen:
    """(n,) who scored best on the question; of equals the cheapest, then the first."""
    quality = np.where(outcomes.known, outcomes.quality, -np.inf)
    best = quality == quality.max(axis=1, keepdims=True)
    cost = np.where(best & ~np.isnan(outcomes.cost), outcomes.cost, np.inf)
    # Of the best, those without a price come last.
    chosen = np.where(np.isfinite(cost).any(axis=1), cost.argmin(axis=1), best.argmax(axis=1))
    return np.asarray(chosen, np.intp)


def oracle_shares(outcomes: Outcomes) -> Float64:
    """(E,) how often each is whom the oracle takes. Of equally good ones the cheapest; those that
    costs do not tell apart share the question, so that no column's place counts."""
    quality = np.where(outcomes.known, outcomes.quality, -np.inf)
    best = quality == quality.max(axis=1, keepdims=True)
    cost = np.where(best & ~np.isnan(outcomes.cost), outcomes.cost, np.inf)
    cheapest = best & (cost == cost.min(axis=1, keepdims=True))
    return np.asarray((cheapest / cheapest.sum(axis=1, keepdims=True)).mean(axis=0), np.float64)


def mean_costs(outcomes: Outcomes) -> Float64:
    """(E,) US dollars a question; NaN where one that was answered has no cost."""
    known = outcomes.known
    total = np.where(known, outcomes.cost, 0.0).sum(axis=0, dtype=np.float64)
    counted = known.sum(axis=0)
    return np.where(counted > 0, total / np.maximum(counted, 1), np.nan)


def random_mix(outcomes: Outcomes) -> Points | None:
    """Drawing single experts at random within a budget, question by question: the hull of their
    points, which no expert inside it can help to reach. `within(budget)` is the honest bar for a
    router. None unless every outcome and cost is known."""
    if not outcomes.priced or not outcomes.known.all():
        return None
    return Points.of(mean_costs(outcomes), base_rates(outcomes)).hull()


def chosen_by(outcomes: Outcomes, chosen: Chosen) -> tuple[Float64, Float64]:
    """Quality and cost (n,) of a choice (n,)."""
    return earned(outcomes.quality, chosen), earned(outcomes.cost, chosen)


def dearest_cost(outcomes: Outcomes) -> float | None:
    """The dearest expert's mean cost, US dollars a question: c_max of AIQ."""
    cost = mean_costs(outcomes)
    return None if np.isnan(cost).any() else float(cost.max())

"""All measures of one router, or of the baselines, on one pool, in the words of `evaluate --json`.
Knows no router: only its choices, predictions and expected costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.family import decided
from composer.routing.outcomes import Outcomes
from router_training import baselines as base
from router_training import measures
from router_training.curves import aiq, budget_acc, operating_points, pair
from router_training.intervals import paired
from router_training.rejection import scope_card

COVERAGE = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Yardstick:
    """What was learnt of a pool without a router, from the questions routers are fitted on.
    `best` is the best single expert's column, `rates` (E,) the experts' mean qualities."""

    experts: tuple[str, ...]
    best: int
    rates: npt.NDArray[np.float64]
    category: base.CategoryBest

    @classmethod
    def fit(cls, train: Outcomes) -> Yardstick:
        return cls(
            experts=train.experts,
            best=base.best_single(train),
            rates=measures.base_rates(train),
            category=base.CategoryBest.fit(train),
        )


def scorecard(
    outcomes: Outcomes,
    yardstick: Yardstick,
    predicted: npt.NDArray[np.floating],
    *,
    expected_cost: npt.NDArray[np.floating] | None = None,
    threshold: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`predicted` (n, E) is calibrated quality; the best of it is chosen, of the experts with a
    known outcome. `expected_cost` (n, E), US dollars, is what a router thinks an answer will cost;
    without it there are no budgets. Below `threshold` a question counts as turned away in `scope`
    (see `scope_card`), and nowhere else. What is said of decisions is said of the `decidable`
    questions alone; Brier score and ECE are of all known outcomes.

    Plain values for JSON. None: a score, length or price is missing, no question is decidable, or
    the measure means nothing here (`apgr` and `cpt` are of pools of two).
    """
    rows = _decidable(outcomes, yardstick)
    calibration = {
        "brier": measures.brier(predicted, outcomes),
        "brier_base_rate": measures.brier(yardstick.rates, outcomes),
        "ece": measures.ece(predicted, outcomes),
    }
    outcomes, predicted = outcomes.rows(rows), predicted[rows]
    chosen = decided(predicted.astype(np.float32), outcomes.known)
    quality, cost = base.chosen_by(outcomes, chosen)
    confidence = measures.earned(predicted, chosen)
    best_cost = base.single(outcomes, yardstick.best)[1]
    curve = None
    if expected_cost is not None:
        curve = operating_points(predicted, expected_cost[rows], outcomes)
    c_max, best_mean_cost = base.dearest_cost(outcomes), measures.mean(best_cost)
    points = None if curve is None else curve[0]
    two = None
    if len(outcomes.experts) == 2 and outcomes.known.all():
        strong = yardstick.best
        need = predicted[:, strong] - predicted[:, 1 - strong]
        two = pair(need, outcomes.quality[:, 1 - strong], outcomes.quality[:, strong])
    return {
        **_of_choices(outcomes, yardstick, quality, cost, seed),
        "aiq": None if points is None or c_max is None else aiq(points, c_max),
        "budget_acc": None
        if points is None or best_mean_cost is None
        else budget_acc(points, best_mean_cost),
        "apgr": None if two is None else two.apgr,
        "cpt50": None if two is None else two.cpt50,
        "cpt80": None if two is None else two.cpt80,
        **calibration,
        "acc_at_80_coverage": measures.selective(quality, confidence, COVERAGE),
        "scope": scope_card(outcomes, confidence, chosen, threshold, seed=seed),
    }


def baseline_cards(outcomes: Outcomes, yardstick: Yardstick, *, seed: int = 0) -> dict[str, Any]:
    """`random`, `best_single`, `category_best`, `random_mix` (within budgets) and `oracle`, on the
    `decidable` questions."""
    outcomes = outcomes.rows(_decidable(outcomes, yardstick))
    best = base.single(outcomes, yardstick.best)
    ways = {
        "random": base.random_choice(outcomes),
        "best_single": best,
        "category_best": base.chosen_by(outcomes, yardstick.category.choose(outcomes)),
        "oracle": base.chosen_by(outcomes, base.oracle(outcomes)),
    }
    cards: dict[str, Any] = {
        name: _of_choices(outcomes, yardstick, quality, cost, seed)
        for name, (quality, cost) in ways.items()
    }
    cards["best_single"]["expert"] = yardstick.experts[yardstick.best]
    mix, c_max = base.random_mix(outcomes), base.dearest_cost(outcomes)
    best_cost = measures.mean(best[1])
    if mix is None or c_max is None or best_cost is None:
        cards["random_mix"] = None
    else:
        cards["random_mix"] = {
            "avg_acc": mix.within(best_cost),
            "aiq": aiq(mix, c_max),
            "budget_acc": budget_acc(mix, best_cost),
        }
    return cards


def _of_choices(
    outcomes: Outcomes,
    yardstick: Yardstick,
    quality: npt.NDArray[np.float64],
    cost: npt.NDArray[np.float64],
    seed: int,
) -> dict[str, Any]:
    """What follows from the quality earned and the cost incurred, (n,) each."""
    single = base.single(outcomes, yardstick.best)[0]
    accuracy, best = measures.avg_acc(quality), measures.avg_acc(single)
    oracle = measures.avg_acc(base.chosen_by(outcomes, base.oracle(outcomes))[0])
    spent = measures.mean(cost)
    around = paired(quality, outcomes.group, seed=seed)
    gain = paired(quality - single, outcomes.group, seed=seed)
    by_name: Mapping[str, float | None] = measures.per_benchmark(quality, outcomes.benchmark)
    return {
        "avg_acc": accuracy,
        "ci95": None if around is None else [around.low, around.high],
        "per_benchmark": dict(by_name),
        "mean_of_benchmarks": measures.mean_of_benchmarks(quality, outcomes.benchmark),
        "mean_cost": spent,
        "gain_over_best_single": None if gain is None else gain.mean,
        "gain_ci95": None if gain is None else [gain.low, gain.high],
        "gain_at_best": measures.gain_at_best(accuracy, best),
        "gap_at_oracle": measures.gap_at_oracle(accuracy, oracle),
        "gap_closed": measures.gap_closed(accuracy, best, oracle),
        "arena_score": measures.arena_score(accuracy, spent),
    }


def _decidable(outcomes: Outcomes, yardstick: Yardstick) -> npt.NDArray[np.bool_]:
    """(n,) questions that say something of a decision. Raises ValueError for other experts than the
    yardstick's, or where no question has a known outcome."""
    if outcomes.experts != yardstick.experts:
        raise ValueError("the experts differ from those fitted on; select the same, in their order")
    if not outcomes.known.any():
        raise ValueError("no question has a known outcome; name other data")
    return outcomes.decidable

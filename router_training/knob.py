"""The knob that an artefact ships: what each price on cost reaches on questions that nobody had
seen, and whether other questions keep that promise. Knows no router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.curve import Curve, Point
from composer.routing.outcomes import Outcomes
from router_training.baselines import mean_costs
from router_training.intervals import Interval, side_by_side
from router_training.measures import base_rates, earned

STEPS = 60
WEIGHTS = (1e-3, 1e3)
"""The grid's ends, in mean qualities per mean cost: below the first nobody is passed over for
their price, above the last the cheapest always answers."""

RESAMPLES = 2000

ASKED = (0.8, 0.9, 0.95, 1.0)
"""Shares of the best single expert's quality at which the promise is checked."""


@dataclass(frozen=True, slots=True)
class AtBest:
    """What the best single expert's quality costs other questions than those that the `weight` on
    cost was chosen on: `share` of what that expert costs there, and what the decisions earn `over`
    it there."""

    weight: float
    share: Interval
    over: Interval


def curve_of(
    quality: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating] | None,
    outcomes: Outcomes,
    best: int,
    *,
    seed: int = 0,
) -> Curve | None:
    """The curve of cross-fitted calibrated `quality` and `expected_cost` (n, E), of which the
    decisions are made, and the outcomes they had. `best` is the best single expert's column.
    Weights that decide the same are one point. Only of `decidable` questions; None where there is
    none, where an outcome has no cost, or where the best single expert was never right: there are
    no shares of nothing."""
    if expected_cost is None or not outcomes.priced:
        return None
    rows = outcomes.decidable
    outcomes, quality, expected_cost = outcomes.rows(rows), quality[rows], expected_cost[rows]
    best_single = float(base_rates(outcomes)[best])
    if not best_single > 0:  # or NaN, of an expert without an outcome
        return None
    scale = float(expected_cost[outcomes.known].mean(dtype=np.float64))
    grid = [0.0, *(np.geomspace(*WEIGHTS, STEPS) / scale)] if scale > 0 else [0.0]
    weights: list[float] = []
    chosen: list[npt.NDArray[np.intp]] = []
    for weight in grid:
        now = decided_at(weight, quality, expected_cost, outcomes)
        if not chosen or (now != chosen[-1]).any():
            weights.append(float(weight))
            chosen.append(now)
    reached = np.stack([earned(outcomes.quality, now) for now in chosen], axis=1)  # (n, p)
    spent = np.stack([earned(outcomes.cost, now) for now in chosen], axis=1)
    around = side_by_side(
        np.hstack([reached, spent]), outcomes.group, seed=seed, resamples=RESAMPLES
    )
    points = tuple(
        Point(
            weight=weight,
            quality=q.mean,
            low=q.low,
            high=q.high,
            cost=c.mean,
            cost_low=c.low,
            cost_high=c.high,
        )
        for weight, q, c in zip(
            weights, around[: len(weights)], around[len(weights) :], strict=True
        )
    )
    return Curve(
        best_single=best_single,
        best_single_cost=float(mean_costs(outcomes)[best]),
        points=points,
    )


def decided_at(
    weight: float,
    quality: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating],
    outcomes: Outcomes,
) -> npt.NDArray[np.intp]:
    """(n,) the expert with the highest `quality − weight · cost` of those with an outcome."""
    value = quality.astype(np.float64) - weight * expected_cost.astype(np.float64)
    return np.asarray(np.where(outcomes.known, value, -np.inf).argmax(axis=1), np.intp)


def kept_promises(
    curve: Curve,
    quality: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating],
    outcomes: Outcomes,
    best: int,
    *,
    seed: int = 0,
) -> list[dict[str, Any]] | None:
    """What the curve's weights reach on other questions, for each share ASKED of the best single
    expert's quality on the curve's own: that mean quality is what is promised, with the bounds that
    the curve gives, and `within_interval` says whether what was achieved lies between them. They
    know nothing of how easy other questions are, so `achieved_share` tells the same as a share of
    what the best single expert reaches there. Questions without an outcome of it, or of anybody
    else, are left out. None without any other, or without their costs."""
    rows = np.asarray(outcomes.known[:, best] & outcomes.decidable, np.bool_)
    outcomes, quality, expected_cost = outcomes.rows(rows), quality[rows], expected_cost[rows]
    if not len(outcomes) or not outcomes.priced:
        return None
    single = float(base_rates(outcomes)[best])
    if single <= 0:
        return None
    told = []
    for share in ASKED:
        weight, point = curve.weight_for_quality(share)
        chosen = decided_at(weight, quality, expected_cost, outcomes)
        both = np.stack([earned(outcomes.quality, chosen), earned(outcomes.cost, chosen)], axis=1)
        reached, spent = side_by_side(both, outcomes.group, seed=seed, resamples=RESAMPLES)
        told.append(
            {
                "asked": share,
                "weight": weight,
                "promised": point.quality,
                "interval": [point.low, point.high],
                "achieved": reached.mean,
                "achieved_ci95": [reached.low, reached.high],
                "within_interval": point.low <= reached.mean <= point.high,
                "achieved_share": reached.mean / single,
                "promised_cost": point.cost,
                "achieved_cost": spent.mean,
            }
        )
    return told


def at_best_single(
    curve: Curve,
    quality: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating],
    outcomes: Outcomes,
    best: int,
    *,
    seed: int = 0,
) -> AtBest | None:
    """The greatest weight with which the curve, on its own questions, is as good as the best single
    expert, applied to others. The weight with which these themselves are just as good would be
    chosen with hindsight: the luckiest of some 200. None where the curve is nowhere as good, or on
    these questions an outcome of that expert or a cost is missing."""
    weight, point = curve.weight_for_quality(1.0)
    rows = np.asarray(outcomes.known[:, best] & outcomes.decidable, np.bool_)
    outcomes, quality, expected_cost = outcomes.rows(rows), quality[rows], expected_cost[rows]
    reached = point.quality >= curve.best_single * (1 - 1e-9)  # up to rounding
    single_cost = float(mean_costs(outcomes)[best])
    if not reached or not rows.any() or not outcomes.priced or not single_cost > 0:
        return None
    chosen = decided_at(weight, quality, expected_cost, outcomes)
    spent = earned(outcomes.cost, chosen) / single_cost
    over = earned(outcomes.quality, chosen) - outcomes.quality[:, best].astype(np.float64)
    share, gain = side_by_side(
        np.stack([spent, over], axis=1), outcomes.group, seed=seed, resamples=RESAMPLES
    )
    return AtBest(weight, share, gain)

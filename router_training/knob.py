"""The knob that an artefact ships: what each price on cost reaches on questions that nobody had
seen, and whether other questions keep that promise. Knows no router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.curve import Curve, Point
from composer.routing.outcomes import Outcomes
from router_training.baselines import mean_costs
from router_training.intervals import Interval, shares, side_by_side
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
    Weights that decide the same are one point; what a single expert beats in quality and cost gives
    way to it (`enveloped`). Only of `decidable` questions; None where there is none, where an
    outcome has no cost, or where the best single expert was never right: there are no shares of
    nothing."""
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
    # Whoever lacks an outcome cannot be compared on the same questions.
    alone = np.flatnonzero(outcomes.known.all(axis=0))
    everywhere = [np.full(len(outcomes), expert) for expert in alone]
    measured = _measured([*chosen, *everywhere], outcomes, best, seed)
    settings = [
        point.model_copy(update={"weight": weight})
        for weight, point in zip(weights, measured, strict=False)
    ]
    singles = [
        point.model_copy(update={"expert": outcomes.experts[expert]})
        for expert, point in zip(alone, measured[len(settings) :], strict=True)
    ]
    return Curve(
        best_single=best_single,
        best_single_cost=float(mean_costs(outcomes)[best]),
        points=tuple(enveloped(settings, singles)),
    )


def enveloped(settings: Sequence[Point], singles: Sequence[Point]) -> list[Point]:
    """The settings, by rising weight, but for those that a single expert beats: no dearer and no
    worse, and one of the two better. Singles that nothing beats stand among them by their cost,
    each with the weight of the setting before it, for when that expert may not answer.

    Settings are measured cross-fitted; who the best of E experts is was seen, so a single's mean is
    that much flattered, as `best_single` itself is: with E = 10 about equal experts by some 1.5
    standard errors, so it is on small data that one may stand here by luck. What is lost then is
    less than that, and cost is known far better than quality. Settings are not held against each
    other: of 60, a lucky one would be taken.
    """
    kept = [i for i, one in enumerate(settings) if not any(_beats(s, one) for s in singles)]
    front: list[Point] = []  # by rising cost, so whoever beats a single stands before it
    for single in sorted(singles, key=lambda s: (s.cost, -s.quality)):
        if not any(_no_worse(other, single) for other in (*settings, *front)):
            front.append(single)
    points: list[Point] = []
    for i, number in enumerate(kept):
        one = settings[number]
        while front and front[-1].cost > one.cost:
            # A greater weight need not cost less, so some beyond this setting's may cost more.
            points.append(_at_weight(front.pop(), points, settings[: number + 1]))
        follows = i + 1 == len(kept) or kept[i + 1] == number + 1
        points.append(one if follows else one.model_copy(update={"gap": True}))
    while front:
        points.append(_at_weight(front.pop(), points, settings))
    return points


def _at_weight(single: Point, before: Sequence[Point], settings: Sequence[Point]) -> Point:
    """With the greatest weight that costs as much or more, kept rising."""
    dearer = [one.weight for one in settings if one.cost >= single.cost]
    least = before[-1].weight if before else settings[0].weight
    return single.model_copy(update={"weight": max([least, *dearer[-1:]])})


def _no_worse(one: Point, other: Point) -> bool:
    return one.cost <= other.cost and one.quality >= other.quality


def _beats(one: Point, other: Point) -> bool:
    return _no_worse(one, other) and not _no_worse(other, one)


def _measured(
    chosen: Sequence[npt.NDArray[np.integer]], outcomes: Outcomes, best: int, seed: int
) -> list[Point]:
    """Points, yet without a weight, of experts chosen for each question (n,), drawn together."""
    reached = np.stack([earned(outcomes.quality, now) for now in chosen], axis=1)  # (n, p)
    spent = np.stack([earned(outcomes.cost, now) for now in chosen], axis=1)
    around = side_by_side(
        np.hstack([reached, spent]), outcomes.group, seed=seed, resamples=RESAMPLES
    )
    return [
        Point(
            weight=0.0,
            quality=q.mean,
            low=q.low,
            high=q.high,
            cost=c.mean,
            cost_low=c.low,
            cost_high=c.high,
            share=(s.low, s.high),
        )
        for q, c, s in zip(
            around[: len(chosen)],
            around[len(chosen) :],
            _shares(reached, outcomes, best, seed),
            strict=True,
        )
    ]


def _shares(
    reached: npt.NDArray[np.floating], outcomes: Outcomes, best: int, seed: int
) -> list[Interval]:
    """Of (n, p): means over that of the best single expert, where its outcome is known."""
    rows = outcomes.known[:, best]
    base, group = outcomes.quality[rows, best], outcomes.group
    return shares(reached, group, base, group[rows], seed=seed, resamples=RESAMPLES)


def decided_at(
    weight: float,
    quality: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating],
    outcomes: Outcomes,
) -> npt.NDArray[np.intp]:
    """(n,) the expert with the highest `quality − weight · cost` of those with an outcome."""
    value = quality.astype(np.float64) - weight * expected_cost.astype(np.float64)
    return np.asarray(np.where(outcomes.known, value, -np.inf).argmax(axis=1), np.intp)


@dataclass(frozen=True, slots=True, eq=False)
class CurveTrial:
    """A curve on other questions than its own. `quality` and `expected_cost` (n, E) are what the
    router says of them, calibrated and in US dollars a call, `outcomes` what came of them; `best`
    is the column of the best single expert where the curve was made."""

    curve: Curve
    quality: npt.NDArray[np.floating]
    expected_cost: npt.NDArray[np.floating]
    outcomes: Outcomes
    best: int
    seed: int = 0

    def kept_promises(self) -> list[dict[str, Any]] | None:
        """What the curve's settings reach here, for each share ASKED of the best single expert's
        quality.

        `promised`, with the `interval` that the curve gives it, and `achieved`, with
        `achieved_ci95`, are such shares, each of what that expert reaches on the same questions
        (drawn together): other questions may be harder for everybody, and the curve knows nothing
        of that. `within_interval` says whether what was achieved lies in the curve's interval. The
        means themselves stand beside them (`…_quality`), and costs in US dollars a call. `expert`
        is who alone met the promise best, where nobody else was asked. Questions without an outcome
        of the best single expert, or of anybody else, are left out. None without any other, or
        without their costs."""
        here = self._comparable()
        outcomes = here.outcomes
        if not len(outcomes) or not outcomes.priced:
            return None
        if float(base_rates(outcomes)[here.best]) <= 0:
            return None
        told = []
        for share in ASKED:
            point = here.curve.at_quality(share)
            chosen = here._decided_by(point)
            both = np.stack(
                [earned(outcomes.quality, chosen), earned(outcomes.cost, chosen)], axis=1
            )
            reached, spent = side_by_side(both, outcomes.group, seed=here.seed, resamples=RESAMPLES)
            [achieved] = _shares(both[:, :1], outcomes, here.best, here.seed)
            promised, low, high = here.curve.share(point)
            told.append(
                {
                    "asked": share,
                    "weight": point.weight,
                    "expert": point.expert,
                    "promised": promised,
                    "interval": [low, high],
                    "achieved": achieved.mean,
                    "achieved_ci95": [achieved.low, achieved.high],
                    "within_interval": low <= achieved.mean <= high,
                    "promised_quality": point.quality,
                    "achieved_quality": reached.mean,
                    "achieved_quality_ci95": [reached.low, reached.high],
                    "promised_cost": point.cost,
                    "achieved_cost": spent.mean,
                }
            )
        return told

    def at_best_single(self) -> AtBest | None:
        """The cheapest setting that the curve, on its own questions, has as good as the best single
        expert (at worst that expert itself), applied to these. The weight with which these
        themselves are just as good would be chosen with hindsight: the luckiest of some 200. None
        where the curve is nowhere as good, or on these questions an outcome of that expert or a
        cost is missing."""
        point = self.curve.at_quality(1.0)
        here = self._comparable()
        outcomes = here.outcomes
        reached = point.quality >= here.curve.best_single * (1 - 1e-9)  # up to rounding
        single_cost = float(mean_costs(outcomes)[here.best])
        if not reached or not len(outcomes) or not outcomes.priced or not single_cost > 0:
            return None
        chosen = here._decided_by(point)
        spent = earned(outcomes.cost, chosen) / single_cost
        over = earned(outcomes.quality, chosen) - outcomes.quality[:, here.best].astype(np.float64)
        share, gain = side_by_side(
            np.stack([spent, over], axis=1), outcomes.group, seed=here.seed, resamples=RESAMPLES
        )
        return AtBest(point.weight, share, gain)

    def _comparable(self) -> CurveTrial:
        """On the questions with a choice and an outcome of the best single expert."""
        rows = np.asarray(self.outcomes.known[:, self.best] & self.outcomes.decidable, np.bool_)
        return replace(
            self,
            quality=self.quality[rows],
            expected_cost=self.expected_cost[rows],
            outcomes=self.outcomes.rows(rows),
        )

    def _decided_by(self, point: Point) -> npt.NDArray[np.intp]:
        """(n,) the point's expert, or who its weight decides for where that one has no outcome."""
        chosen = decided_at(point.weight, self.quality, self.expected_cost, self.outcomes)
        if point.expert is None:
            return chosen
        expert = self.outcomes.experts.index(point.expert)
        return np.asarray(np.where(self.outcomes.known[:, expert], expert, chosen), np.intp)

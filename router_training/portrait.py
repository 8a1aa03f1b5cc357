"""What a report draws of a router and of what it is held against: curves, bars and shares, with
their intervals. Knows no picture, and no router: only its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.family import decided
from composer.routing.outcomes import Outcomes
from router_training import baselines as base
from router_training.curves import Points, operating_points
from router_training.intervals import Interval, paired, side_by_side
from router_training.measures import Reliability, earned, mean, reliability
from router_training.scorecard import Yardstick

STEPS = 24
"""Spends at which a curve is told, evenly between its two ends (on a log scale)."""

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Level:
    """A mean spend, US dollars a question, and the mean quality reached with it."""

    cost: float
    quality: Interval


@dataclass(frozen=True, slots=True)
class Spot:
    """A way of answering that has no knob, or one expert."""

    name: str
    cost: float | None
    quality: Interval


@dataclass(frozen=True, slots=True)
class Portrait:
    """Of one router on one table. `curve` is None where costs are missing. `parts` are mean
    qualities by benchmark or category (`Backdrop.parts_are`), `shares` the shares of questions by
    expert, `calibration` the bins of ECE, None where a prediction is missing."""

    curve: tuple[Level, ...] | None
    at_quality: Spot
    parts: Mapping[str, Interval]
    shares: Mapping[str, float]
    calibration: Reliability | None


@dataclass(frozen=True, slots=True)
class Backdrop:
    """What all routers on one table are held against. `best_single` is None where nothing is known
    of it here; `no_costs` says why there are no curves. `mix`, random mixes of single experts, is
    None where outcomes or costs are missing."""

    questions: int
    experts: tuple[Spot, ...]
    best_single: Spot | None
    oracle: Spot
    random: Spot
    mix: tuple[Level, ...] | None
    no_costs: str | None
    parts_are: str
    parts: Mapping[str, Mapping[str, Interval]]
    shares: Mapping[str, float]


def portrait_of(
    outcomes: Outcomes,
    predicted: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating] | None,
    *,
    seed: int = 0,
) -> Portrait:
    """`predicted` (n, E) is calibrated quality, `expected_cost` (n, E) US dollars. Of decisions the
    `decidable` questions tell, of which there is one."""
    calibration = reliability(predicted, outcomes)
    rows = outcomes.decidable
    outcomes, predicted = outcomes.rows(rows), predicted[rows]
    expected_cost = None if expected_cost is None else expected_cost[rows]
    chosen = decided(predicted.astype(np.float32), outcomes.known)
    quality, cost = base.chosen_by(outcomes, chosen)
    counts = np.bincount(chosen, minlength=len(outcomes.experts)) / len(outcomes)
    return Portrait(
        curve=None
        if expected_cost is None
        else _curve(outcomes, predicted, expected_cost, seed=seed),
        at_quality=_spot("", quality, cost, outcomes, seed),
        parts=_by_part(quality, outcomes, _parts_are(outcomes), seed),
        shares=dict(zip(outcomes.experts, counts.tolist(), strict=True)),
        calibration=calibration,
    )


def backdrop_of(outcomes: Outcomes, yardstick: Yardstick, *, seed: int = 0) -> Backdrop:
    """Of the `decidable` questions. An expert is told by those that it has an outcome of."""
    outcomes = outcomes.rows(outcomes.decidable)
    oracle_choice = base.oracle(outcomes)
    best = base.single(outcomes, yardstick.best)
    oracle = base.chosen_by(outcomes, oracle_choice)
    experts = []
    for column, name in enumerate(outcomes.experts):
        quality, cost = base.single(outcomes, column)
        asked = ~np.isnan(quality)
        if asked.any():
            experts.append(_spot(name, quality[asked], cost[asked], outcomes.rows(asked), seed))
    rows = ~np.isnan(best[0])
    kind = _parts_are(outcomes)
    parts = {"oracle": _by_part(oracle[0], outcomes, kind, seed)}
    single = None
    if rows.any():
        of_it = outcomes.rows(rows)
        name = yardstick.experts[yardstick.best]
        single = _spot(name, best[0][rows], best[1][rows], of_it, seed)
        parts = {"best single": _by_part(best[0][rows], of_it, kind, seed), **parts}
    counts = base.oracle_shares(outcomes)
    return Backdrop(
        questions=len(outcomes),
        experts=tuple(experts),
        best_single=single,
        oracle=_spot("oracle", *oracle, outcomes, seed),
        random=_spot("random", *base.random_choice(outcomes), outcomes, seed),
        mix=_mix(outcomes, seed),
        no_costs=None if outcomes.priced else _why_no_costs(outcomes),
        parts_are=kind,
        parts=parts,
        shares=dict(zip(outcomes.experts, counts.tolist(), strict=True)),
    )


def _curve(
    outcomes: Outcomes,
    predicted: npt.NDArray[np.floating],
    expected_cost: npt.NDArray[np.floating],
    *,
    seed: int,
) -> tuple[Level, ...] | None:
    found = operating_points(predicted, expected_cost, outcomes)
    if found is None:
        return None
    points, chosen = found
    # No more than is reached: past the best point a higher spend buys nothing.
    last = int(points.quality.argmax())
    points = Points(points.cost[: last + 1], points.quality[: last + 1])
    reached = np.stack([earned(outcomes.quality, row) for row in chosen[: last + 1]], axis=1)
    return _levels(points, reached, outcomes, seed)


def _mix(outcomes: Outcomes, seed: int) -> tuple[Level, ...] | None:
    points = base.random_mix(outcomes)
    if points is None:
        return None
    costs = base.mean_costs(outcomes)
    quality = outcomes.quality.mean(axis=0, dtype=np.float64)
    columns = [
        int(np.flatnonzero((costs == c) & (quality == q))[0])
        for c, q in zip(points.cost, points.quality, strict=True)
    ]
    return _levels(points, outcomes.quality[:, columns].astype(np.float64), outcomes, seed)


def _levels(
    points: Points, reached: npt.NDArray[np.float64], outcomes: Outcomes, seed: int
) -> tuple[Level, ...]:
    """`reached` (n, p) is what each question earned at each point; between two of them, one is
    drawn at random for each question."""
    low, high = float(points.cost[0]), float(points.cost[-1])
    spends = np.geomspace(low, high, STEPS) if low > 0 else np.linspace(low, high, STEPS)
    spends = np.unique(np.clip(spends, low, high))
    columns = []
    for spend in spends:
        at = points.mixed(float(spend))
        assert at is not None  # no spend is below the cheapest point
        below, above, share = at
        columns.append((1 - share) * reached[:, below] + share * reached[:, above])
    around = side_by_side(np.stack(columns, axis=1), outcomes.group, seed=seed, resamples=RESAMPLES)
    return tuple(Level(float(c), q) for c, q in zip(spends, around, strict=True))


def _spot(
    name: str,
    quality: npt.NDArray[np.floating],
    cost: npt.NDArray[np.floating],
    outcomes: Outcomes,
    seed: int,
) -> Spot:
    around = paired(quality, outcomes.group, seed=seed, resamples=RESAMPLES)
    assert around is not None  # every question has an outcome
    return Spot(name, mean(cost), around)


def _parts_are(outcomes: Outcomes) -> str:
    """Benchmarks, or where there is but one of them, its categories."""
    alone = len(set(outcomes.benchmark)) == 1 < len(set(outcomes.category))
    return "category" if alone else "benchmark"


def _by_part(
    quality: npt.NDArray[np.floating], outcomes: Outcomes, kind: str, seed: int
) -> dict[str, Interval]:
    names = np.asarray(outcomes.category if kind == "category" else outcomes.benchmark)
    found = {}
    for name in np.unique(names):
        rows = names == name
        around = paired(quality[rows], outcomes.group[rows], seed=seed, resamples=RESAMPLES)
        if around is not None:
            found[str(name)] = around
    return found


def _why_no_costs(outcomes: Outcomes) -> str:
    lacking = np.isnan(outcomes.cost) & outcomes.known
    some = [e for e, column in zip(outcomes.experts, lacking.T, strict=True) if column.any()]
    if len(some) == len(outcomes.experts):
        return "the data has no costs (`cost|EXPERT`, or lengths and list prices)"
    return f"costs are missing of {len(some)} of {len(outcomes.experts)} experts: {', '.join(some)}"

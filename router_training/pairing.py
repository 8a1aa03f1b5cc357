"""RouteLLM's measures of a pool of two, benchmark by benchmark, with bootstrap intervals.
Knows no router."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from composer.routing.outcomes import Outcomes
from composer.types import FloatArray
from router_training.curves import Pair, pair
from router_training.intervals import Interval

RESAMPLES = 500


@dataclass(frozen=True, slots=True)
class PairMeasures:
    """Of one benchmark. `cpt50` and `cpt80` are shares of calls to the stronger expert, None
    where the level is never reached. A resample that never reaches it counts as all calls."""

    questions: int
    apgr: Interval
    cpt50: Interval | None
    cpt80: Interval | None


def pair_measures(
    quality: FloatArray, outcomes: Outcomes, strong: int, *, seed: int = 0
) -> dict[str, PairMeasures]:
    """By benchmark; those where the stronger expert is not better have none. Empty for a pool of
    any other size, or where an outcome is missing."""
    if len(outcomes.experts) != 2 or not outcomes.known.all():
        return {}
    need = quality[:, strong].astype(np.float64) - quality[:, 1 - strong]
    of = np.asarray(outcomes.benchmark)
    rng = np.random.default_rng(seed)
    told = {}
    for benchmark in np.unique(of).tolist():
        here = np.flatnonzero(of == benchmark)
        weakly, strongly = (outcomes.quality[here, e] for e in (1 - strong, strong))
        whole = pair(need[here], weakly, strongly)
        if whole is None:
            continue
        # Rows of one group are one question, so whole groups are drawn.
        _, number = np.unique(outcomes.group[here], return_inverse=True)
        groups = int(number.max()) + 1
        drawn = []
        for _ in range(RESAMPLES):
            times = np.bincount(rng.integers(groups, size=groups), minlength=groups)
            some = np.repeat(np.arange(len(here)), times[number])
            again = pair(need[here][some], weakly[some], strongly[some])
            if again is not None:
                drawn.append(_plain(again))
        low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
        of_each = [whole.apgr, whole.cpt50, whole.cpt80]
        around = [
            None if mean is None else Interval(mean, float(a), float(b))
            for mean, a, b in zip(of_each, low, high, strict=True)
        ]
        assert around[0] is not None
        told[benchmark] = PairMeasures(len(here), around[0], around[1], around[2])
    return told


def _plain(two: Pair) -> tuple[float, float, float]:
    cpt50, cpt80 = (1.0 if c is None else c for c in (two.cpt50, two.cpt80))
    return two.apgr, cpt50, cpt80

"""Turning away what is nobody's: the threshold on confidence, and what it does. Knows no router."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import Outcomes
from composer.routing.scope import SHARE
from router_training.intervals import paired
from router_training.measures import auroc, earned

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating]


def rejectable(outcomes: Outcomes) -> bool:
    """Whether there is something to turn away: intents, and questions that are nobody's."""
    return outcomes.of_intents and not bool(outcomes.in_scope.all())


def threshold_of(confidence: Floats, right: Bools, in_scope: Bools, share: float = SHARE) -> float:
    """The confidence below which turning away makes most requests end well, were `share` of them
    nobody's: (n,) confidence in the best expert, whether it is right, and whether anybody is. In
    the middle between the two nearest values seen. Both kinds of question are there."""
    order = np.argsort(confidence, kind="stable")
    sure, good, inside = confidence[order], right[order], in_scope[order]
    gained = np.where(inside, 0.0, share / (~inside).sum())  # by turning this one away
    lost = np.where(inside & good, (1 - share) / inside.sum(), 0.0)
    value = np.concatenate([[0.0], np.cumsum(gained - lost)])  # of the first i
    edge = np.concatenate([[True], np.diff(sure) > 0, [sure[-1] < 1]])  # equals go together
    best = int(np.where(edge, value, -np.inf).argmax())
    if best == 0:
        return 0.0
    above = float(sure[best]) if best < len(sure) else 1.0
    return (float(sure[best - 1]) + above) / 2


def auroc_interval(
    confidence: Floats,
    in_scope: Bools,
    group: npt.NDArray[np.integer],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> list[float]:
    """The 95 % bootstrap interval of the AUROC: of either kind of question, for itself, whole
    groups (n,) are drawn. Both kinds are there."""
    rng = np.random.default_rng(seed)
    ours, theirs = confidence[in_scope], confidence[~in_scope]
    order = np.argsort(theirs, kind="stable")
    below, beside = (np.searchsorted(theirs[order], ours, side) for side in ("left", "right"))
    of_ours, of_theirs = (
        np.unique(group[kind], return_inverse=True)[1] for kind in (in_scope, ~in_scope)
    )
    of_theirs = of_theirs[order]
    drawn = np.empty(resamples)
    for draw in range(resamples):
        # (n,) how often each question is drawn, with its group.
        times, others = (_drawn(rng, number) for number in (of_ours, of_theirs))
        upto = np.concatenate([[0], np.cumsum(others)])
        won = times @ (upto[below] + upto[beside]) / 2
        drawn[draw] = won / (times.sum() * others.sum())
    return [float(edge) for edge in np.quantile(drawn, [0.025, 0.975])]


def _drawn(rng: np.random.Generator, number: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    groups = int(number.max()) + 1
    times = np.bincount(rng.integers(groups, size=groups), minlength=groups)
    return np.asarray(times[number], np.int64)


def scope_card(
    outcomes: Outcomes,
    confidence: Floats,
    chosen: npt.NDArray[np.integer],
    threshold: float | None,
    *,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Of (n,) experts chosen with this confidence: `in_scope_acc` without turning anything away,
    `auroc` of the confidence for being somebody's, and at the threshold `overall_acc` (an expert
    that is right, or nobody for what is nobody's), `in_scope_kept_acc` and `out_of_scope_found`;
    with 95 % intervals over questions, whole groups drawn. None where nothing is to be turned away;
    without a threshold what needs one is None. Plain values."""
    if not rejectable(outcomes):
        return None
    inside = outcomes.in_scope
    right = earned(outcomes.quality, chosen) == 1
    in_scope = paired(right[inside].astype(float), outcomes.group[inside], seed=seed)
    card: dict[str, Any] = {
        "in_scope_acc": float(right[inside].mean()),
        "in_scope_ci95": None if in_scope is None else [in_scope.low, in_scope.high],
        "auroc": auroc(confidence, inside),
        "auroc_ci95": auroc_interval(confidence, inside, outcomes.group, seed=seed),
        "threshold": threshold,
        "overall_acc": None,
        "overall_ci95": None,
        "in_scope_kept_acc": None,
        "out_of_scope_found": None,
    }
    if threshold is None:
        return card
    kept = confidence >= threshold
    well = np.where(inside, right & kept, ~kept)
    overall = paired(well.astype(float), outcomes.group, seed=seed)
    return card | {
        "overall_acc": float(well.mean()),
        "overall_ci95": None if overall is None else [overall.low, overall.high],
        "in_scope_kept_acc": float(well[inside].mean()),
        "out_of_scope_found": float(well[~inside].mean()),
    }

"""Who answers where a policy explores: a draw whose probabilities are known and logged, so that
other policies can be judged by what came of it (`offpolicy.py`). Scores nothing."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from composer.routing.aims import BY_SCORE, Aim
from composer.routing.base import Exploration, Scores
from composer.types import Choice, Plan, Policy

Float64 = npt.NDArray[np.float64]

CONTENDERS = 32
"""Experts, by value + 2 standard deviations, that may be drawn as the best. The floor is all's."""

POINTS = 32
"""Of the quadrature: where the spreads differ tenfold the probabilities are right to about 0.01.
What is logged is exact all the same, because the draw is made from these very numbers."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(POINTS)


def draw_of(request: str) -> float:
    """A number in [0, 1) that stands for a request's id: the same request is decided the same."""
    return int.from_bytes(hashlib.sha256(request.encode()).digest()[:6]) / 2**48


def explored(plan: Plan, scores: Scores, aim: Aim, policy: Policy, draw: float | None) -> Plan:
    """The plan, or another expert in its place, with the propensity of what was chosen among the
    reasons. `draw` in [0, 1); None: this request is not to be explored on.

    Only plans of one expert that was chosen by its score are explored: a default, null or stronger
    expert was named by a rule. An expert below `min_quality` is never drawn. One that was preferred
    because its weights are loaded gives way only to the floor's share.
    """
    exploration = scores.exploration
    if exploration is None:
        return plan
    if exploration.chances is not None:
        return plan if draw is None else _drawn(plan, scores, exploration, policy, draw)
    noted = replace(plan, learning={**plan.learning, **exploration.learning})
    greedy = plan.best
    rule = plan.reasons.get("rule")
    by_score = rule in BY_SCORE | {"resident_within_tolerance"} and "unsure" not in plan.reasons
    if draw is None or not by_score or len(plan.choices) > 1:
        return _told(noted, greedy, 1.0)
    quality = scores.quality.astype(np.float64)
    allowed = np.flatnonzero(quality >= policy.min_quality)  # NaN is not
    best = scores.experts.index(greedy)
    if best not in allowed:
        return _told(noted, greedy, 1.0)
    value = quality - aim.weight * np.asarray(aim.cost, np.float64)
    spread = None
    if exploration.thompson > 0 and rule in BY_SCORE:
        spread = exploration.thompson * scores.uncertainty[allowed]
    chances = propensities(
        value[allowed], spread, int(np.flatnonzero(allowed == best)[0]), exploration.floor
    )
    column = int(np.searchsorted(np.cumsum(chances), draw * chances.sum(), side="right"))
    column = min(column, len(allowed) - 1)
    drawn = int(allowed[column])
    expert = scores.experts[drawn]
    if expert == greedy:
        return _told(noted, greedy, float(chances[column]))
    why = {expert: dict(scores.reasons[expert])} if expert in scores.reasons else {}
    unsure = policy.unsure
    noted = replace(
        noted,
        choices=(Choice(expert, 1.0, float(quality[drawn])),),
        calls=(expert,),
        scores={**plan.scores, expert: round(float(quality[drawn]), 4)},
        reasons={**plan.reasons, "evidence": why},
        confident=None if unsure is None else bool(quality[drawn] >= unsure.below),
    )
    return _told(noted, greedy, float(chances[column]), rule="explored")


def _drawn(
    plan: Plan, scores: Scores, exploration: Exploration, policy: Policy, draw: float
) -> Plan:
    """As many experts as the plan has, or as many as have a chance, drawn by the router's chances
    among those that the policy allows. Weights are shares of the draws, with replacement, else
    qualities. Best first, as in any plan. One that a rule named stays."""
    by_score = plan.reasons.get("rule") in BY_SCORE and "unsure" not in plan.reasons
    quality = scores.quality.astype(np.float64)
    assert exploration.chances is not None
    # NaN, who is not eligible, is not at least anything.
    chance = np.where(quality >= policy.min_quality, exploration.chances, 0).astype(np.float64)
    if not by_score or not chance.any():
        return plan
    chance /= chance.sum()
    rng = np.random.default_rng(int(draw * 2**48))
    k = len(plan.choices)
    if not exploration.replacement:
        k = min(k, int(np.count_nonzero(chance)))
    columns = rng.choice(len(chance), k, replace=exploration.replacement, p=chance)
    experts, times = np.unique(columns, return_counts=True)
    weight = times.astype(np.float64) if exploration.replacement else quality[experts]
    weight = weight / weight.sum() if weight.sum() > 0 else np.full(len(experts), 1 / len(experts))
    order = np.argsort(-quality[experts], kind="stable")
    ids = [scores.experts[e] for e in experts[order]]
    floor = policy.unsure
    return replace(
        plan,
        choices=tuple(
            Choice(e, float(w), float(q))
            for e, w, q in zip(ids, weight[order], quality[experts[order]], strict=True)
        ),
        calls=tuple(ids),
        scores={**plan.scores, **{scores.experts[e]: round(float(quality[e]), 4) for e in experts}},
        reasons={
            **plan.reasons,
            "rule": "drawn",
            "drawn": {scores.experts[e]: round(float(chance[e]), 4) for e in experts[order]},
            "evidence": {e: dict(scores.reasons[e]) for e in ids if e in scores.reasons},
        },
        confident=None if floor is None else bool(quality[experts].max() >= floor.below),
    )


def propensities(
    value: npt.NDArray[Any], spread: npt.NDArray[Any] | None, greedy: int, floor: float
) -> Float64:
    """(n,) the chance of each expert: `floor` spread evenly; the rest by Thompson sampling of
    independent normal values (n,) of that `spread`, or all to `greedy` where there is none."""
    n = len(value)
    if spread is None:
        chances = np.zeros(n)
        chances[greedy] = 1.0
    else:
        chances = thompson(np.asarray(value, np.float64), np.asarray(spread, np.float64))
    return np.asarray(floor / n + (1 - floor) * chances, np.float64)


def thompson(value: Float64, spread: Float64) -> Float64:
    """(n,) the probability that each of independent normals is the largest: an expectation over
    its own value of the others' distribution functions, by Gauss–Hermite quadrature."""
    chances = np.zeros(len(value))
    who = np.argsort(-(value + 2 * spread), kind="stable")[:CONTENDERS]
    mean, deviation = value[who], np.maximum(spread[who], 1e-6)
    own = mean[:, None] + deviation[:, None] * _NODES  # (k, points)
    below = ndtr((own[:, :, None] - mean) / deviation)  # (k, points, k)
    k = len(who)
    below[np.arange(k), :, np.arange(k)] = 1.0
    largest = below.prod(axis=2) @ _WEIGHTS  # (k,)
    chances[who] = largest / largest.sum()
    return chances


def _told(plan: Plan, greedy: str, propensity: float, *, rule: str | None = None) -> Plan:
    told = {"greedy": greedy, "propensity": propensity}
    reasons = {**plan.reasons, "exploration": told}
    return replace(plan, reasons=reasons if rule is None else {**reasons, "rule": rule})

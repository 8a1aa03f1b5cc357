"""The one place that turns scores and costs into a plan. Pure: no model, clock or network."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.base import Scores
from composer.types import BoolArray, Choice, FloatArray, Plan, Policy

SHOWN_SCORES = 8
"""How many experts' scores a plan carries: enough to explain, few enough to log."""


def choose(
    scores: Scores, cost: FloatArray, policy: Policy, resident: BoolArray | None = None
) -> Plan:
    """The policy's plan for these scores.

    Experts are ordered by `quality − cost_weight · cost` (cost (E,), US dollars per million
    output tokens, in the order of `scores.experts`); ties go to the earlier expert. When the
    best quality is below the policy's threshold, the plan is its default expert alone, where that
    is eligible. Weights are the chosen experts' qualities, normalised.

    `resident` (E,) says whose weights are loaded; None: nobody is preferred for it. Residents that
    reach the threshold are chosen as if they were better by the policy's `tolerance`. So whoever
    takes the place of a better expert is worse by at most that, and no further resident could take
    one. The reasons then name those who gave way, and by how much the plan is worse (`gave_up`: of
    the ordering's value, the mean over its experts).
    """
    eligible = ~np.isnan(scores.quality)
    utility = np.where(eligible, scores.quality - policy.cost_weight * cost, -np.inf)
    order = np.argsort(-utility, kind="stable")[: max(policy.k, SHOWN_SCORES)]
    order = order[eligible[order]]
    shown = {scores.experts[i]: round(float(scores.quality[i]), 4) for i in order[:SHOWN_SCORES]}

    best = float(np.nanmax(scores.quality))
    default = policy.default_expert
    if default is not None and best < policy.threshold and _may_answer(default, scores):
        return Plan(
            policy=policy.id,
            strategy=policy.strategy.name,
            choices=(Choice(default, 1.0),),
            calls=(default,),
            scores=shown,
            reasons={"rule": "below_threshold", "best": best, "threshold": policy.threshold},
        )

    chosen = order[: policy.k]
    reasons: dict[str, Any] = {"rule": "best_score"}
    if resident is not None and policy.tolerance > 0:
        trusted = resident & (scores.quality >= policy.threshold)
        near = _with_residents(utility, trusted, policy.tolerance, len(chosen))
        if gone := [scores.experts[i] for i in chosen if i not in near]:
            gave_up = float(utility[chosen].mean() - utility[near].mean())
            reasons = {
                "rule": "resident_within_tolerance",
                "instead_of": gone,
                "gave_up": round(gave_up, 6),
            }
            chosen = near
            shown |= {scores.experts[i]: round(float(scores.quality[i]), 4) for i in chosen}

    quality = scores.quality[chosen].astype(np.float64)  # (k,)
    total = float(quality.sum())
    weights = quality / total if total > 0 else np.full(len(chosen), 1 / len(chosen))
    experts = tuple(scores.experts[i] for i in chosen)
    evidence = {e: dict(scores.reasons[e]) for e in experts if e in scores.reasons}
    return Plan(
        policy=policy.id,
        strategy=policy.strategy.name,
        choices=tuple(Choice(e, float(w)) for e, w in zip(experts, weights, strict=True)),
        calls=experts,
        scores=shown,
        reasons={**reasons, "evidence": evidence},
    )


def _with_residents(
    utility: FloatArray, resident: BoolArray, tolerance: float, k: int
) -> npt.NDArray[np.intp]:
    """(k,) the best by utility (E,), best first, where residents count for `tolerance` more."""
    value = utility.astype(np.float64)
    preferred = np.lexsort((~resident, -(value + tolerance * resident)))[:k]
    preferred.sort()  # ties go to the earlier expert here too
    return preferred[np.argsort(-value[preferred], kind="stable")]


def _may_answer(expert: str, scores: Scores) -> bool:
    return expert in scores.experts and not np.isnan(scores.quality[scores.experts.index(expert)])

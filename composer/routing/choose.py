"""The one place that turns scores and costs into a plan. Pure: no model, clock or network."""

from __future__ import annotations

import numpy as np

from composer.routing.base import Scores
from composer.types import Choice, FloatArray, Plan, Policy

SHOWN_SCORES = 8
"""How many experts' scores a plan carries: enough to explain, few enough to log."""


def choose(scores: Scores, cost: FloatArray, policy: Policy) -> Plan:
    """The policy's plan for these scores.

    Experts are ordered by `quality − cost_weight · cost` (cost (E,), US dollars per million
    output tokens, in the order of `scores.experts`); ties go to the earlier expert. When the
    best quality is below the policy's threshold, the plan is its default expert alone, where that
    is eligible. Weights are the chosen experts' qualities, normalised.
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
        reasons={"rule": "best_score", "evidence": evidence},
    )


def _may_answer(expert: str, scores: Scores) -> bool:
    return expert in scores.experts and not np.isnan(scores.quality[scores.experts.index(expert)])

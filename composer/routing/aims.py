"""What cost is to count for in one decision: λ and the costs it weighs. Chooses nobody.

Three ways to say it, and a request's own word goes before its policy's: a weight on the experts'
prices, a share of the best single expert's quality to be reached at least cost, or a spend a
request on average. The last two are read off the router's curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from composer.errors import Unsupported
from composer.routing.base import Scores
from composer.routing.curve import Curve, Point
from composer.types import FloatArray, Policy, empty


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """Experts are ordered by `quality − weight · cost`; cost (E,) is in whatever unit `weight` is
    a price of: US dollars a call, or US dollars per million output tokens."""

    weight: float
    cost: FloatArray
    reasons: Mapping[str, Any] = field(default_factory=empty)


def aim_of(
    policy: Policy,
    price: FloatArray,
    scores: Scores,
    curve: Curve | None,
    *,
    quality: float | None = None,
    max_cost: float | None = None,
) -> Aim:
    """`price` (E,) is US dollars per million output tokens; `quality` and `max_cost` are the
    request's own wishes, at most one of them. Raises Unsupported for an aim that this router cannot
    be held to."""
    if quality is None and max_cost is None:
        quality, max_cost = policy.quality, policy.max_cost
        param = None
    else:
        param = f"composer.{'quality' if quality is not None else 'max_cost'}"
    if quality is None and max_cost is None:
        return Aim(policy.cost_weight, price)
    if curve is None or scores.cost is None:
        wish = "quality" if quality is not None else "max_cost"
        raise Unsupported(
            f"{wish} needs a router trained on outcomes with their costs, for all experts of "
            f"{policy.id!r}; leave it out, or train one with `router-training train` and name its "
            "artefact in the policy",
            param=param,
        )
    if quality is not None:
        weight, point = curve.weight_for_quality(quality)
        asked: dict[str, Any] = {"quality": quality}
        reached = point.quality >= quality * curve.best_single - 1e-9
    else:
        assert max_cost is not None
        weight, point = curve.weight_for_cost(max_cost)
        asked = {"max_cost": max_cost}
        reached = point.cost <= max_cost * (1 + 1e-9)
    return Aim(weight, scores.cost, {"aim": {**asked, **_expected(point, curve, reached)}})


def _expected(point: Point, curve: Curve, reached: bool) -> dict[str, Any]:
    """What the curve promises on average, as shares of the best single expert's quality."""
    best = curve.best_single
    told: dict[str, Any] = {
        "expected_quality": round(point.quality / best, 4),
        "interval": [round(point.low / best, 4), round(point.high / best, 4)],
        "expected_cost": point.cost,
    }
    return told if reached else {**told, "out_of_reach": True}

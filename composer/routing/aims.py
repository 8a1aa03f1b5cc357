"""What cost is to count for in one decision: λ and the costs it weighs, or the expert that an aim
is best met by. Chooses nobody.

Three ways to say it, and a request's own word goes before its policy's: a weight on the experts'
prices, a share of the best single expert's quality to be reached at least cost, or a spend a
request on average. The last two are read off the router's curve.

The curve is of one call a request. Where a plan may have up to K, a spend M is read off at M / K,
where a call costs c on average, and the plan's further calls are those that fit into M − c: so the
mean of their sum is at most M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from composer.errors import Unsupported
from composer.routing.base import Scores
from composer.routing.curve import Curve
from composer.types import FloatArray, Policy, empty

BEST_SCORE = "best_score"
AIM_QUALITY = "aim_quality"
AIM_MAX_COST = "aim_max_cost"
BY_SCORE = frozenset({BEST_SCORE, AIM_QUALITY, AIM_MAX_COST})
"""Rules of a plan by which nobody was chosen but for quality and cost."""


CHEAPEST = 1e12
"""In quality per US dollar: above what any quality is worth, so that the cheapest answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """Experts are ordered by `quality − weight · cost`; cost (E,) is in whatever unit `weight` is
    a price of: US dollars a call, or US dollars per million output tokens. `expert` goes before
    them all. `room` is what calls beyond the first may cost together, in the same unit. `rule` is
    the plan's where no other one applies."""

    weight: float
    cost: FloatArray
    reasons: Mapping[str, Any] = field(default_factory=empty)
    expert: str | None = None
    room: float = math.inf
    rule: str = BEST_SCORE

    def told(self, experts: Sequence[str], calls: Sequence[str], least: int) -> Mapping[str, Any]:
        """The reasons, with the expected US dollars of a plan's `calls` together: of the first
        `least` of them, and of all. `experts` (E,) are those of `cost`."""
        if "aim" not in self.reasons:
            return self.reasons
        column = {expert: i for i, expert in enumerate(experts)}
        each = [float(self.cost[column[expert]]) for expert in calls]
        spent = [sum(each[:least]), sum(each)]
        return {**self.reasons, "aim": {**self.reasons["aim"], "expected_cost": spent}}


def aim_of(
    policy: Policy,
    price: FloatArray,
    scores: Scores,
    curve: Curve | None,
    *,
    quality: float | None = None,
    max_cost: float | None = None,
    calls: int = 1,
) -> Aim:
    """`price` (E,) is US dollars per million output tokens; `quality` and `max_cost` are the
    request's own wishes, at most one of them; `calls` is how many a plan may have at most. Raises
    Unsupported for an aim that this router cannot be held to, and for a quality of the request's
    that it does not reach."""
    param = None
    if quality is None and max_cost is None:
        quality, max_cost = policy.quality, policy.max_cost
    else:
        param = f"composer.{'quality' if quality is not None else 'max_cost'}"
    if quality is None and max_cost is None:
        return Aim(policy.cost_weight, price)
    if curve is None or scores.cost is None:
        wish = "quality" if quality is not None else "max_cost"
        raise Unsupported(
            f"{wish} needs a router trained on outcomes with their costs, for all experts of "
            f"{policy.id!r}, that decides by its scores; leave it out, or train one with "
            "`router-training train` and name its artefact in the policy",
            param=param,
        )
    if quality is not None:
        if param is not None and (refused := beyond(curve, quality)) is not None:
            raise Unsupported(refused, param=param)
        point = curve.at_quality(quality)
        asked, rule, room = {"quality": quality}, AIM_QUALITY, math.inf
        reached = point.quality >= quality * curve.best_single - 1e-9
    else:
        assert max_cost is not None
        point = curve.at_cost(max_cost / calls)
        asked, rule, room = {"max_cost": max_cost}, AIM_MAX_COST, max(0.0, max_cost - point.cost)
        reached = point.cost <= max_cost * (1 + 1e-9)
        if max_cost / calls <= curve.points[-1].cost * (1 + 1e-9) and point.expert is None:
            # The curve's last weight is finite, and a surer prediction than it was made of outbids
            # it; a spend that leaves no choice gets none.
            point = point.model_copy(update={"weight": max(point.weight, CHEAPEST)})
    share, low, high = curve.share(point)
    told: dict[str, Any] = {
        **asked,
        "expected_quality": round(share, 4),
        "interval": [round(low, 4), round(high, 4)],
        "call_cost": point.cost,
    }
    if point.expert is not None:
        told["expert"] = point.expert
    if not reached:
        told["out_of_reach"] = True
    return Aim(point.weight, scores.cost, {"aim": told}, point.expert, room, rule)


def beyond(curve: Curve, quality: float) -> str | None:
    """Why a quality cannot be asked for ("what is wrong; the remedy"), None where it can. A share
    above 1 is more than the best single expert reaches: as far as the curve goes it means
    something. 1 always does, whatever the curve has."""
    most = max(1.0, curve.most)
    if quality <= most + 1e-9:
        return None
    floored = math.floor(most * 1000 + 1e-6) / 1000
    return (
        f"quality {quality:g} is out of reach: the highest that this router's curve has is "
        f"{floored:g} of the best single expert's mean quality; ask for at most that"
    )

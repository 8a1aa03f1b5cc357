"""How good and how dear a router's answers are at each price on cost: what turns "0.9 of the best
expert's quality" or "this much a request" into the chooser's λ. Knows no router."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Point(BaseModel):
    """What choosing by `quality − weight · cost` reaches on the artefact's data, cross-fitted.

    `weight` is in quality per US dollar, `cost` in US dollars a request; `low` and `high` bound the
    mean quality with 95 % confidence (bootstrap over questions), `cost_low` and `cost_high` the
    cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float
    quality: float
    low: float
    high: float
    cost: float
    cost_low: float
    cost_high: float


class Curve(BaseModel):
    """Points by rising weight, so by falling cost. `best_single` and `best_single_cost` are mean
    quality and cost of the best single expert on the same questions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    best_single: float = Field(gt=0)
    best_single_cost: float
    points: tuple[Point, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Curve:
        weights = [point.weight for point in self.points]
        if not weights or any(b <= a for a, b in pairwise(weights)):
            raise ValueError("a curve needs points of rising weight")
        return self

    def weight_for_quality(self, share: float) -> tuple[float, Point]:
        """The greatest weight that still reaches `share` of the best single expert's quality, and
        the point it is read from: least cost for that quality. Past what is reachable: the best
        point there is."""
        wanted = share * self.best_single
        # From the dear end on, as long as quality holds: a later lucky rise is not trusted.
        best = max(range(len(self.points)), key=lambda i: (self.points[i].quality, -i))
        chosen = best
        for i in range(best, len(self.points)):
            if self.points[i].quality < wanted:
                break
            chosen = i
        return self._between(chosen, wanted, "quality")

    def weight_for_cost(self, dollars: float) -> tuple[float, Point]:
        """The least weight at which a request costs at most `dollars` on average. Below the
        cheapest: the cheapest point there is."""
        for i, point in enumerate(self.points):
            if point.cost <= dollars:
                return self._between(i - 1, dollars, "cost") if i else (point.weight, point)
        last = self.points[-1]
        return last.weight, last

    def _between(self, i: int, wanted: float, field: str) -> tuple[float, Point]:
        """Between point i, which is on the dear side of `wanted`, and the next: linear in the
        measure, geometric in the weight where it can be."""
        here = self.points[i]
        if i + 1 >= len(self.points):
            return here.weight, here
        there = self.points[i + 1]
        a, b = getattr(here, field), getattr(there, field)
        if a <= wanted or a <= b:
            return here.weight, here
        t = float(np.clip((a - wanted) / (a - b), 0.0, 1.0))
        if here.weight > 0:
            weight = here.weight * (there.weight / here.weight) ** t
        else:
            weight = here.weight + t * (there.weight - here.weight)
        mixed = {
            name: (1 - t) * getattr(here, name) + t * getattr(there, name)
            for name in ("quality", "low", "high", "cost", "cost_low", "cost_high")
        }
        return weight, Point(weight=weight, **mixed)

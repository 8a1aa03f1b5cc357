"""How good and how dear a router's answers are at each price on cost: what turns "0.9 of the best
expert's quality" or "this much a request" into the chooser's λ. Knows no router."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Point(BaseModel):
    """What choosing by `quality − weight · cost` reaches on the artefact's data, cross-fitted; or,
    with `expert`, what that expert alone does, which there no weight beats in both.

    `weight` is in quality per US dollar, `cost` in US dollars of one call; `low` and `high` bound
    the mean quality with 95 % confidence (bootstrap over questions), `cost_low` and `cost_high` the
    cost, `share` the quality as a share of the best single expert's on the same draws (None in
    artefacts from before it was kept). Where `expert` may not answer, the weight decides. `gap`:
    weights between this point's and the next one's were passed over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float
    quality: float
    low: float
    high: float
    cost: float
    cost_low: float
    cost_high: float
    share: tuple[float, float] | None = None
    expert: str | None = None
    gap: bool = False


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
        settings = [point.weight for point in self.points if point.expert is None]
        if (
            not weights
            or any(b < a for a, b in pairwise(weights))
            or any(b <= a for a, b in pairwise(settings))
        ):
            raise ValueError("a curve needs points of rising weight")
        return self

    @property
    def most(self) -> float:
        """The highest share of the best single expert's quality that it reaches."""
        return max(point.quality for point in self.points) / self.best_single

    def share(self, point: Point) -> tuple[float, float, float]:
        """A point's quality as a share of the best single expert's, and its bounds."""
        best = self.best_single
        low, high = point.share or (point.low / best, point.high / best)
        return point.quality / best, low, high

    def at_quality(self, share: float) -> Point:
        """What still reaches `share` of the best single expert's quality at least cost. Past what
        is reachable: the best point there is."""
        wanted = share * self.best_single
        # From the dear end on, as long as quality holds: a later lucky rise is not trusted.
        best = max(range(len(self.points)), key=lambda i: (self.points[i].quality, -i))
        chosen = best
        for i in range(best, len(self.points)):
            if self.points[i].quality < wanted:
                break
            chosen = i
        return self._between(chosen, wanted, "quality") or self.points[chosen]

    def at_cost(self, dollars: float) -> Point:
        """The least weight at which a call costs at most `dollars` on average. Below the cheapest:
        the cheapest point there is."""
        for i, point in enumerate(self.points):
            if point.cost <= dollars:
                return (self._between(i - 1, dollars, "cost") if i else None) or point
        return self.points[-1]

    def _between(self, i: int, wanted: float, field: str) -> Point | None:
        """Between point i, which is on the dear side of `wanted`, and the next: linear in the
        measure, geometric in the weight where it can be. None where nothing is known of the weights
        between them: next to an expert, over a gap, behind the last point; and where the measure
        does not fall."""
        if i + 1 >= len(self.points):
            return None
        here, there = self.points[i], self.points[i + 1]
        if here.gap or here.expert is not None or there.expert is not None:
            return None
        a, b = getattr(here, field), getattr(there, field)
        if a <= wanted or a <= b:
            return None if field == "cost" else here
        t = float(np.clip((a - wanted) / (a - b), 0.0, 1.0))
        if here.weight > 0:
            weight = here.weight * (there.weight / here.weight) ** t
        else:
            weight = here.weight + t * (there.weight - here.weight)
        mixed = {
            name: (1 - t) * getattr(here, name) + t * getattr(there, name)
            for name in ("quality", "low", "high", "cost", "cost_low", "cost_high")
        }
        share = None
        if here.share is not None and there.share is not None:
            low, high = ((1 - t) * x + t * y for x, y in zip(here.share, there.share, strict=True))
            share = low, high
        return Point(weight=weight, share=share, **mixed)

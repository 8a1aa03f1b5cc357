"""Expected quality from what each expert scored on the nearest labelled questions. Knows nothing of
experts' own texts; that is `routing/neighbours.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from composer.routing.families.common import (
    FamilySettings,
    chunks,
    expert_means,
    softmax,
    teaching,
)
from composer.routing.family import Kind
from composer.routing.outcomes import Outcomes
from composer.routing.state import State
from composer.routing.views import Features, View, count_of
from composer.types import FloatArray, Tier


class NeighboursSettings(FamilySettings):
    """`k` nearest questions count. Each weighs exp((cos − highest cos) / `temperature`), or all
    the same at None. `prior` is the weight of the expert's mean beside them: 0 is the
    published method, more draws experts towards their means."""

    k: int = Field(40, ge=1)
    temperature: float | None = Field(0.1, gt=0)
    prior: float = Field(0.0, ge=0)
    view: Literal["embedding", "stem"] = "embedding"


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """`rows` (m, d) unit vectors of the labelled questions, `quality` (m, E) their outcomes with
    NaN where missing, `mean` (E,)."""

    name: ClassVar[str] = "neighbours"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Rethinking Predictive Modeling for LLM Routing, arXiv 2505.12601"
    settings: ClassVar[type[BaseModel]] = NeighboursSettings
    suits: ClassVar[frozenset[Kind]] = frozenset({"outcomes", "intents"})

    rows: FloatArray
    quality: FloatArray
    mean: FloatArray
    chosen: NeighboursSettings

    @classmethod
    def grid(cls) -> Sequence[NeighboursSettings]:
        tried = (
            (40, 0),
            (10, 0),
            (20, 0),
            (80, 0),
            (160, 0),
            (20, 5),
            (40, 5),
            (80, 10),
            (160, 20),
        )
        return [NeighboursSettings(k=k, prior=prior) for k, prior in tried]

    @classmethod
    def grid_of_intents(cls, outcomes: Outcomes) -> Sequence[NeighboursSettings]:
        """Few neighbours, the nearest of whom count most: most questions are another's."""
        return [NeighboursSettings(k=k, temperature=0.05) for k in (20, 10, 40)]

    @classmethod
    def views(cls, settings: NeighboursSettings) -> frozenset[View]:
        return frozenset({settings.view})

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: NeighboursSettings, seed: int
    ) -> Neighbours:
        features, outcomes = teaching(features, outcomes)
        quality = np.asarray(outcomes.quality, np.float32)
        rows = np.ascontiguousarray(features[settings.view], np.float32)
        return cls(rows, quality, expert_means(quality), settings)

    def predict(self, features: Features) -> FloatArray:
        k, n = min(self.chosen.k, len(self.rows)), count_of(features)
        known = ~np.isnan(self.quality)  # (m, E)
        score = np.where(known, self.quality, 0)
        out = np.empty((n, len(self.mean)), np.float32)
        for part in chunks(n):
            cosine = features[self.chosen.view][part] @ self.rows.T  # (c, m)
            near = np.argpartition(-cosine, k - 1, axis=1)[:, :k]  # (c, k)
            weight = np.ones(near.shape, np.float32)
            if self.chosen.temperature is not None:
                cosine = np.take_along_axis(cosine, near, axis=1)
                weight = k * softmax(cosine / self.chosen.temperature)
            # An expert none of the k was asked of is given its mean.
            total = np.einsum("ck,cke->ce", weight, known[near].astype(np.float32))
            found = np.einsum("ck,cke->ce", weight, score[near])
            prior = np.where(total > 0, self.chosen.prior, 1)
            out[part] = (found + prior * self.mean) / (total + prior)
        return out

    def state(self) -> State:
        return State({"rows": self.rows, "quality": self.quality, "mean": self.mean}, {})

    @classmethod
    def restore(cls, state: State, settings: Any) -> Neighbours:
        a = state.arrays
        return cls(a["rows"], a["quality"], a["mean"], settings)

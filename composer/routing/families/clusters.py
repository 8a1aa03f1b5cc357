"""Expected quality from each expert's smoothed success rate in the clusters of questions nearest to
the query. Knows no label of a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from composer.routing.families.common import FamilySettings, expert_means, softmax, teaching
from composer.routing.families.sharing import digest, shared
from composer.routing.outcomes import Outcomes
from composer.routing.state import State
from composer.routing.views import Features, View
from composer.types import FloatArray, Tier


class ClustersSettings(FamilySettings):
    """`k` clusters, of which the `nearest` to a query count with softmax(−`beta` · (1 − cos)).
    A cluster's rates are drawn to each expert's mean as by `prior` more questions: the published
    code does not smooth (0), and small clusters then win by luck."""

    k: int = Field(64, ge=1)
    nearest: int = Field(4, ge=1)
    beta: float = Field(9.0, gt=0)
    prior: float = Field(20.0, ge=0)
    view: Literal["embedding", "stem"] = "embedding"


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """`centres` (K, d) unit rows, `rates` (K, E)."""

    name: ClassVar[str] = "clusters"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "The Avengers: A Simple Recipe (without its votes), arXiv 2505.19797"
    settings: ClassVar[type[BaseModel]] = ClustersSettings

    centres: FloatArray
    rates: FloatArray
    chosen: ClustersSettings

    @classmethod
    def grid(cls) -> Sequence[ClustersSettings]:
        return [
            ClustersSettings(k=k, prior=prior) for k in (64, 16, 32, 128) for prior in (20.0, 5.0)
        ]

    @classmethod
    def views(cls, settings: ClustersSettings) -> frozenset[View]:
        return frozenset({settings.view})

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: ClustersSettings, seed: int
    ) -> Clusters:
        features, outcomes = teaching(features, outcomes)
        quality = np.asarray(outcomes.quality, np.float32)
        owner, centres = clustered(features[settings.view], settings.k, seed)
        rates = smoothed_rates(owner, len(centres), quality, settings.prior)
        return cls(centres, rates, settings)

    def predict(self, features: Features) -> FloatArray:
        distance = 1 - features[self.chosen.view] @ self.centres.T  # (n, K)
        kept = min(self.chosen.nearest, len(self.centres))
        bound = np.partition(distance, kept - 1, axis=1)[:, kept - 1 : kept]
        logits = np.where(distance <= bound, -self.chosen.beta * distance, -np.inf)
        return np.asarray(softmax(logits) @ self.rates, np.float32)

    def state(self) -> State:
        return State({"centres": self.centres, "rates": self.rates}, {})

    @classmethod
    def restore(cls, state: State, settings: Any) -> Clusters:
        return cls(state.arrays["centres"], state.arrays["rates"], settings)


def clustered(rows: FloatArray, k: int, seed: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """(n, d) unit rows → (n,) the cluster of each and (K, d) unit centres: k-means, with no more
    clusters than there are different rows."""
    return shared(lambda: ("clustered", digest(rows), k, seed), lambda: _clustered(rows, k, seed))


def _clustered(rows: FloatArray, k: int, seed: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
    from sklearn.cluster import KMeans

    different = len(np.unique(rows, axis=0)) if len(rows) <= 10 * k else len(rows)
    fit = KMeans(min(k, different), n_init=1, random_state=seed).fit(rows)
    length = np.linalg.norm(fit.cluster_centers_, axis=1, keepdims=True)
    centres = fit.cluster_centers_ / np.maximum(length, 1e-12)
    return np.asarray(fit.labels_, np.int64), np.asarray(centres, np.float32)


def smoothed_rates(
    owner: npt.NDArray[np.int64], groups: int, quality: FloatArray, prior: float
) -> FloatArray:
    """(n,) the group of each question and its outcomes (n, E) → (groups, E): the mean of a Beta
    posterior whose prior is each expert's mean, worth `prior` questions. Where nothing was
    asked and the prior weighs nothing, the expert's mean."""
    known = ~np.isnan(quality)
    count, total = np.zeros((2, groups, quality.shape[1]))
    np.add.at(count, owner, known)
    np.add.at(total, owner, np.where(known, quality, 0))
    weight = np.where(count > 0, prior, 1)
    return np.asarray((total + weight * expert_means(quality)) / (count + weight), np.float32)

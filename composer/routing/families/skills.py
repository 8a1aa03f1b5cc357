"""What each expert can do, skill by skill: a profile from outcomes, read at the skills a query asks
for. Infers skills from embeddings and knows no LLM; whoever has inferred them otherwise asks
`predict_skills`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from composer.routing.calibrate import by_rank
from composer.routing.families.clusters import clustered
from composer.routing.families.common import (
    FamilySettings,
    Float64,
    expert_means,
    softmax,
    teaching,
)
from composer.routing.outcomes import Outcomes
from composer.routing.state import State
from composer.routing.views import Features, View
from composer.types import BoolArray, FloatArray, Tier

ANY = "any"
"""The one skill of questions among which none is asked for often enough."""

MADE_UP = rf"{ANY}|cluster \d+"

CLUSTERS = 16
"""How many skills are made up where nobody named any."""

RECRUITED = 3
"""Experts assigned to a question where it is counted who is assigned seldom: the paper's k."""


class SkillsSettings(FamilySettings):
    """`nearest`: skills that a query is taken to ask for; `sharpness`: they count as
    exp(sharpness · cosine), None: all the same, as published. `prior`: questions that an expert's
    mean is worth beside its profile. `overall`: the order is that of L·G, as published, else that
    of L. `trim`: share of assignments below which an expert stands behind the others. `least`:
    questions that a skill needs. `view`: the embedding that skills are inferred from."""

    nearest: int = Field(3, ge=1)
    sharpness: float | None = Field(20.0, ge=0)
    prior: float = Field(20.0, ge=0)
    overall: bool = False
    trim: float = Field(0.05, ge=0, lt=1)
    least: int = Field(5, ge=1)
    view: Literal["embedding", "stem"] = "embedding"


@dataclass(frozen=True, slots=True, eq=False)
class Skills:
    """`profile` (E, K) is P_m[k]: the sum of 2·outcome − 1 (+1 right, −1 wrong) over the questions
    that ask for skill k; `count` (E, K) how many these are; `centres` (K, d) their mean direction,
    0 where it has none. `mean` (E,) is each expert's mean outcome, `kept` (E,) who is not trimmed.

    A query asks for skills with weights w (K,). Then L_m = Σ_k w_k P_m[k] is what an expert has
    shown at them, and l_m = (L_m + prior·(2·mean_m − 1)) / (Σ_k w_k count_m[k] + prior) the same a
    question, so that (1 + l_m)/2 is an expected quality. Where all experts have answered all
    questions and `prior` is 0, it orders them as L does. With `overall` the order is that of
    L·G, G_m = S_m²/Σ S² with S_m = Σ_k P_m[k], shifted to be 1 at least; experts with l_m ≤ 0 come
    behind, and where that is everybody the order is S's. Qualities are those of l in any case,
    handed out in this order: what an expert is chosen for and what is promised of it are apart.
    """

    name: ClassVar[str] = "skills"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Symbolic Mixture-of-Experts, arXiv 2503.05641; profiles smoothed by us"
    settings: ClassVar[type[BaseModel]] = SkillsSettings

    names: tuple[str, ...]
    centres: FloatArray
    profile: FloatArray
    count: FloatArray
    mean: FloatArray
    kept: BoolArray
    chosen: SkillsSettings

    @classmethod
    def grid(cls) -> Sequence[SkillsSettings]:
        ours = SkillsSettings()
        published = SkillsSettings(sharpness=None, prior=0.0, overall=True)
        return [
            ours,
            *(ours.model_copy(update=one) for one in ({"prior": 60.0}, {"nearest": 1})),
            ours.model_copy(update={"trim": 0.0}),
            ours.model_copy(update={"overall": True}),
            published,
            published.model_copy(update={"nearest": 1}),
        ]

    @classmethod
    def views(cls, settings: SkillsSettings) -> frozenset[View]:
        return frozenset({settings.view})

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: SkillsSettings, seed: int
    ) -> Skills:
        features, outcomes = teaching(features, outcomes)
        rows = np.asarray(features[settings.view], np.float32)
        names, asks = skills_of(rows, outcomes, settings.least, seed)
        profile, count = profile_of(np.asarray(outcomes.quality, np.float32), asks)
        sums = asks.T.astype(np.float32) @ rows  # (K, d)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        fitted = cls(
            names=names,
            centres=np.asarray(sums / np.maximum(length, 1e-12), np.float32),
            profile=profile,
            count=count,
            mean=expert_means(np.asarray(outcomes.quality, np.float32)),
            kept=np.ones(len(outcomes.experts), np.bool_),
            chosen=settings,
        )
        kept = assigned_often(fitted.predict(features), settings.trim)
        return cls(names, fitted.centres, fitted.profile, fitted.count, fitted.mean, kept, settings)

    @staticmethod
    def named(names: Sequence[str]) -> bool:
        return any(not re.fullmatch(MADE_UP, name) for name in names)

    def predict(self, features: Features) -> FloatArray:
        return self.predict_skills(self.weights(features))

    def weights(self, features: Features) -> FloatArray:
        """(n, K) how much each query asks for each skill, by the nearest centres."""
        cosine = np.asarray(features[self.chosen.view] @ self.centres.T, np.float32)
        return nearest_weights(cosine, self.chosen)

    def weights_of(self, skills: Sequence[int]) -> FloatArray:
        """(1, K) of a query of which somebody else says what it asks for: all count the same."""
        weight = np.zeros((1, len(self.names)), np.float32)
        weight[0, list(skills)] = 1 if self.chosen.sharpness is None else 1 / len(skills)
        return weight

    def predict_skills(self, weight: FloatArray) -> FloatArray:
        """(n, K) weights in the order of `names` → (n, E)."""
        local, order = self._ordered(weight)
        # Trimmed ones behind all others, in their own order.
        span = np.ptp(order, axis=1, keepdims=True) + 1
        order = np.where(self.kept, order, order - span)
        return by_rank(np.asarray((1 + local) / 2, np.float32), order)

    def chances(self, weight: FloatArray) -> FloatArray:
        """(n, K) weights → (n, E) the probability with which each expert is drawn: in proportion to
        L·G (L without `overall`) among those of a positive score that are not trimmed; where there
        is none, the best overall of the latter for certain."""
        local, order = self._ordered(weight)
        share = np.where(self.kept & (local > 0), order, 0)
        best = np.zeros_like(share)
        masked = np.where(self.kept, order, -np.inf)
        np.put_along_axis(best, masked.argmax(axis=1)[:, None], 1.0, axis=1)
        share = np.where(share.any(axis=1, keepdims=True), share, best)
        return np.asarray(share / share.sum(axis=1, keepdims=True), np.float32)

    def _ordered(self, weight: FloatArray) -> tuple[Float64, Float64]:
        """l (n, E), and what experts are ordered by before any is trimmed (n, E)."""
        prior = self.chosen.prior
        shown = weight @ self.profile.T + prior * (2 * self.mean - 1)  # (n, E)
        asked = weight @ self.count.T + prior
        # Who was never asked for such a skill, and has no prior, is expected to be as ever.
        local = np.where(asked > 0, shown / np.maximum(asked, 1e-12), 2 * self.mean - 1)
        overall = shifted(self.profile.sum(axis=1, dtype=np.float64))  # (E,)
        order = local
        if self.chosen.overall:
            order = np.where(local > 0, local * overall_scores(overall), local)
        nobody = ~(local > 0).any(axis=1, keepdims=True)
        return np.asarray(local, np.float64), np.where(nobody, overall, order)

    def state(self) -> State:
        arrays: dict[str, npt.NDArray[Any]] = {
            "centres": self.centres,
            "profile": self.profile,
            "count": self.count,
            "mean": self.mean,
            "kept": self.kept.astype(np.uint8),
        }
        return State(arrays, {"names": list(self.names)})

    @classmethod
    def restore(cls, state: State, settings: Any) -> Skills:
        a = state.arrays
        return cls(
            tuple(state.values["names"]),
            a["centres"],
            a["profile"],
            a["count"],
            a["mean"],
            a["kept"].astype(np.bool_),
            settings,
        )


def skills_of(
    rows: FloatArray, outcomes: Outcomes, least: int, seed: int
) -> tuple[tuple[str, ...], BoolArray]:
    """The names (K,) of the skills that `least` questions ask for, and which of them each question
    does (n, K): those it was annotated with, else its category and its benchmark, as far as these
    tell questions apart. Where nothing does, clusters of rows (n, d)."""
    asked: list[frozenset[str]]
    if outcomes.skills:
        asked = [frozenset(own) for own in outcomes.skills]
    else:
        named = [of for of in (outcomes.category, outcomes.benchmark) if len(set(of) - {""}) > 1]
        asked = [frozenset(own) - {""} for own in zip(*named, strict=True)]
        if not named:
            owner, _ = clustered(rows, CLUSTERS, seed)
            asked = [frozenset({f"cluster {cluster}"}) for cluster in owner]
    names = sorted(frozenset().union(*asked))
    asks = np.array([[name in own for name in names] for own in asked], np.bool_)
    asks = asks.reshape(len(asked), len(names))
    often = asks.sum(axis=0) >= least
    if not often.any():
        return (ANY,), np.ones((len(asked), 1), np.bool_)
    return tuple(np.array(names)[often].tolist()), asks[:, often]


def profile_of(quality: FloatArray, asks: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Outcomes (n, E), NaN where missing, and the skills of each question (n, K) → P_m[k]
    and the number of outcomes that it is of, (E, K) each."""
    known = ~np.isnan(quality)
    signed = np.where(known, 2 * np.nan_to_num(quality) - 1, 0)  # (n, E)
    profile = np.asarray(signed.T.astype(np.float64) @ asks, np.float32)
    return profile, np.asarray(known.T.astype(np.float64) @ asks, np.float32)


def nearest_weights(cosine: FloatArray, settings: SkillsSettings) -> FloatArray:
    """(n, K) similarities → (n, K) how much each skill counts, over its `nearest` ones, 0 for the
    others: 1 for each as published, or in all 1 by a softmax."""
    kept = min(settings.nearest, cosine.shape[1])
    bound = np.partition(cosine, -kept, axis=1)[:, -kept][:, None]
    near = cosine >= bound
    if settings.sharpness is None:
        return np.asarray(near, np.float32)
    return softmax(np.where(near, settings.sharpness * cosine, -np.inf))


def shifted(total: Float64) -> Float64:
    """(E,) sums of profiles, all raised alike where one of them is below 1."""
    return total + max(0.0, 1.0 - float(total.min()))


def overall_scores(total: Float64) -> Float64:
    """G_m = S_m²/Σ S² of S (E,)."""
    return np.asarray(total**2 / (total**2).sum(), np.float64)


def assigned_often(quality: FloatArray, trim: float) -> BoolArray:
    """(E,) who gets at least a share `trim` of the assignments, `RECRUITED` for each question of
    (n, E). In a pool so large that this is nobody, all."""
    k = min(RECRUITED, quality.shape[1])
    first = np.argsort(-quality, axis=1, kind="stable")[:, :k]
    share = np.bincount(first.ravel(), minlength=quality.shape[1]) / first.size
    often = share >= trim
    return often if often.any() else np.ones_like(often)

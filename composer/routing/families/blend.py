"""Several families stacked: how far each is to be followed, learnt from predictions of questions
that it had not seen. Knows members by the mapping FAMILIES alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field, field_validator

from composer.routing.families.common import (
    FamilySettings,
    expert_means,
    folds_of,
    followed,
    non_negative,
    teaching,
)
from composer.routing.family import Family
from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View, rows_of
from composer.types import FloatArray, Tier


class Member(FamilySettings):
    """A family by name, and its settings: those left out are its defaults."""

    family: str
    settings: Mapping[str, Any] = Field(default_factory=dict)


class BlendSettings(FamilySettings):
    """`closeness`: how near to the best an expert has to be to count where it is learnt whom to
    ask (see `followed`); None: all count the same, which is right where budgets send most
    questions to cheaper ones."""

    members: tuple[Member, ...] = (
        Member(family="kernel"),
        Member(family="category"),
        Member(family="clusters"),
    )
    folds: int = Field(5, ge=2)
    closeness: float | None = Field(0.02, gt=0)

    @field_validator("members")
    @classmethod
    def _some(cls, members: tuple[Member, ...]) -> tuple[Member, ...]:
        if not members:
            raise ValueError("a blend has no member; name at least one family")
        if any(member.family == Blend.name for member in members):
            raise ValueError("a blend cannot be a member of a blend; name the families themselves")
        return members


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """Breiman's stacked regressions: non-negative least squares on out-of-fold predictions.

    What a member says is parted in two, each with weights of its own: `level` (M,) for how easy
    the question is for all experts, and `choice` (M,) for how each differs from the others. The
    first decides how much is promised, the second who is asked. Both are deviations from the
    experts' means (E,), so weights that add up to less than 1 draw experts to these.
    """

    name: ClassVar[str] = "blend"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Breiman, Stacked Regressions, Machine Learning 24, 1996"
    settings: ClassVar[type[BaseModel]] = BlendSettings

    members: tuple[Family, ...]
    level: FloatArray
    choice: FloatArray
    mean: FloatArray
    chosen: BlendSettings

    @classmethod
    def grid(cls) -> Sequence[BlendSettings]:
        return [BlendSettings(closeness=closeness) for closeness in (0.02, 0.05, None)]

    @classmethod
    def views(cls, settings: BlendSettings) -> frozenset[View]:
        views: frozenset[View] = frozenset()
        for kind, own in _kinds(settings):
            views |= kind.views(own)
        return views

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: BlendSettings, seed: int
    ) -> Blend:
        """Fits every member once for each fold and once on everything."""
        features, outcomes = teaching(features, outcomes)
        fold = folds_of(outcomes.group, settings.folds)
        if len(np.unique(fold)) < 2:
            raise ValueError("a blend needs at least two different questions; give more outcomes")
        kinds = _kinds(settings)
        apart = np.full((len(kinds), *outcomes.quality.shape), np.nan, np.float32)
        for number in np.unique(fold):
            held = fold == number
            seen = outcomes.rows(~held)
            # An expert may have all its outcomes in this fold.
            asked = np.flatnonzero(np.asarray(seen.known).any(axis=0))
            some = seen.of([seen.experts[e] for e in asked])
            part, rest = rows_of(features, ~held), rows_of(features, held)
            for m, (kind, own) in enumerate(kinds):
                fitted = kind.fit(part, some, own, seed)
                apart[m][np.ix_(np.flatnonzero(held), asked)] = fitted.predict(rest)
        members = [kind.fit(features, outcomes, own, seed) for kind, own in kinds]
        return cls.of(members, apart, outcomes, settings)

    @classmethod
    def of(
        cls,
        members: Sequence[Family],
        apart: FloatArray,
        outcomes: Outcomes,
        settings: BlendSettings,
    ) -> Blend:
        """From members fitted on all outcomes, and their predictions (M, n, E) of the same
        questions from fits that had not seen them; NaN where there is none."""
        mean = expert_means(np.asarray(outcomes.quality, np.float32))
        known = outcomes.known & ~np.isnan(apart).any(axis=0)  # (n, E)
        if not known.any():
            raise ValueError("no outcome has a prediction to stack on; give more questions")
        level, off = _parted(np.where(np.isnan(apart), mean, apart), mean)
        target = np.where(known, outcomes.quality - mean, 0).astype(np.float32)
        follow = non_negative(np.broadcast_to(level, off.shape)[:, known], target[known])
        choice = followed(off, target, known, mean, settings.closeness)
        if choice is None:
            choice = np.full(len(apart), 1 / len(apart), np.float32)
        return cls(tuple(members), np.asarray(follow, np.float32), choice, mean, settings)

    def predict(self, features: Features) -> FloatArray:
        return self.weighed(np.stack([member.predict(features) for member in self.members]))

    def weighed(self, said: FloatArray) -> FloatArray:
        """What the members say (M, n, E) → (n, E)."""
        level, rest = _parted(said, self.mean)
        common = np.einsum("m,mne->ne", self.level, level)  # (n, 1)
        own = np.einsum("m,mne->ne", self.choice, rest)
        return np.asarray(self.mean + common + own, np.float32)

    def state(self) -> State:
        own = State({"level": self.level, "choice": self.choice, "mean": self.mean}, {})
        parts = {f"member{m}": member.state() for m, member in enumerate(self.members)}
        return packed({"blend": own, **parts})

    @classmethod
    def restore(cls, state: State, settings: Any) -> Blend:
        members = tuple(
            kind.restore(part_of(state, f"member{m}"), own)
            for m, (kind, own) in enumerate(_kinds(settings))
        )
        a = part_of(state, "blend").arrays
        return cls(members, a["level"], a["choice"], a["mean"], settings)


def _kinds(settings: BlendSettings) -> list[tuple[type[Family], Any]]:
    """Each member's class and settings. Raises ValueError for one that there is not."""
    from composer.routing.families import FAMILIES  # which names this class, too

    kinds = []
    for member in settings.members:
        if member.family not in FAMILIES:
            known = ", ".join(sorted(set(FAMILIES) - {Blend.name}))
            raise ValueError(f"there is no family {member.family!r} to blend; choose from {known}")
        kind = FAMILIES[member.family]
        kinds.append((kind, kind.settings.model_validate(member.settings)))
    return kinds


def _parted(said: FloatArray, mean: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(M, n, E) → what a member says of all experts (M, n, 1), and how each differs (M, n, E)."""
    off = said - mean
    level = off.mean(axis=2, keepdims=True)
    return level, off - level

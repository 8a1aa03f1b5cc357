"""Several families stacked: how far each is to be followed, learnt from predictions of questions
that it had not seen. Knows members by the mapping FAMILIES alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, field_validator

from composer.routing.families.common import FamilySettings, expert_means, folds_of, teaching
from composer.routing.family import Family
from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.routing.views import Features, View, rows_of
from composer.types import FloatArray, Tier

Float64 = npt.NDArray[np.float64]


class Member(FamilySettings):
    """A family by name, and its settings: those left out are its defaults."""

    family: str
    settings: Mapping[str, Any] = Field(default_factory=dict)


class BlendSettings(FamilySettings):
    """`per_expert` None: each expert has weights of its own only where cross-validation finds the
    squared error lower with them."""

    members: tuple[Member, ...] = (
        Member(family="kernel"),
        Member(family="category"),
        Member(family="predictor"),
        Member(family="neighbours", settings={"prior": 5.0}),
    )
    folds: int = Field(5, ge=2)
    per_expert: bool | None = None

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
    the question is for all experts, and `choice` (M, E) for how each differs from the others, the
    same for all experts unless `per_expert`. The first decides how much is promised, the second
    who is asked. Both are deviations from the experts' means (E,), so weights that add up to less
    than 1 draw experts to these.
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
        return [BlendSettings()]

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
        target = np.where(known, outcomes.quality - mean, 0).astype(np.float64)
        follow = _non_negative(np.broadcast_to(level, off.shape)[:, known], target[known])
        own = settings.per_expert
        rest, target = _about_row(off, known), _about_row(target, known)
        if own is None:
            own = _own_weights_help(rest, target, known, outcomes, settings.folds)
        choice = _choice(rest, target, known, own)
        return cls(
            tuple(members),
            np.asarray(follow, np.float32),
            choice.astype(np.float32),
            mean,
            settings,
        )

    def predict(self, features: Features) -> FloatArray:
        return self.weighed(np.stack([member.predict(features) for member in self.members]))

    def weighed(self, said: FloatArray) -> FloatArray:
        """What the members say (M, n, E) → (n, E)."""
        level, rest = _parted(said, self.mean)
        common = np.einsum("m,mne->ne", self.level, level)  # (n, 1)
        own = np.einsum("me,mne->ne", self.choice, rest)
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


def _about_row(values: npt.NDArray[np.floating], known: npt.NDArray[np.bool_]) -> Float64:
    """(…, n, E) less each question's mean over the experts it was asked of; 0 elsewhere."""
    values = np.where(known, values, 0)
    mean = values.sum(axis=-1, keepdims=True) / np.maximum(known.sum(axis=-1, keepdims=True), 1)
    return np.where(known, values - mean, 0)


def _non_negative(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Float64:
    """(M, p), (p,) → (M,) weights of at least 0 with the least squared error, by way of the (M, M)
    normal equations. A hair of ridge parts members that say the same."""
    from scipy.optimize import nnls

    x = np.asarray(x, np.float64)
    gram = x @ x.T
    gram[np.diag_indices_from(gram)] += 1e-6 * max(float(np.trace(gram)), 1e-6)
    root = np.linalg.cholesky(gram)
    weights: Float64 = nnls(root.T, np.linalg.solve(root, x @ y))[0]
    return weights


def _choice(rest: Float64, target: Float64, known: npt.NDArray[np.bool_], own: bool) -> Float64:
    """(M, n, E), (n, E) → (M, E)."""
    if not own:
        shared = _non_negative(rest[:, known], target[known])
        return np.repeat(shared[:, None], rest.shape[2], axis=1)
    columns = [
        _non_negative(rest[:, asked, e], target[asked, e]) for e, asked in enumerate(known.T)
    ]
    return np.stack(columns, axis=1)


def _own_weights_help(
    rest: Float64,
    target: Float64,
    known: npt.NDArray[np.bool_],
    outcomes: Outcomes,
    folds: int,
) -> bool:
    """Whether weights per expert lower the squared error of held-out questions by more than its
    standard error: there are E times as many of them."""
    fold = folds_of(outcomes.group, folds)
    gain = np.zeros(len(outcomes))
    for number in np.unique(fold):
        held = fold == number
        errors = []
        for own in (False, True):
            weights = _choice(rest[:, ~held], target[~held], known[~held], own)
            off = target[held] - np.einsum("me,mne->ne", weights, rest[:, held])
            errors.append((off**2 * known[held]).sum(axis=1))
        gain[held] = errors[0] - errors[1]
    return bool(gain.mean() > gain.std() / np.sqrt(len(gain)))

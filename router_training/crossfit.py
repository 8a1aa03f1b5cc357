"""Predictions of questions that their maker has not seen, and the choice of settings by them.
Knows families by the mapping FAMILIES alone; what is shipped is made in `train.py`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from composer.routing.families import FAMILIES
from composer.routing.families.blend import Blend, BlendSettings, Member
from composer.routing.family import Family, Predicted, predicted
from composer.routing.outcome_calibration import OutcomeCalibration
from composer.routing.outcomes import IntArray, Outcomes
from composer.routing.reading import read
from composer.routing.views import Features, rows_of
from composer.types import FloatArray
from router_training.criterion import Criterion
from router_training.errors import TrainingError
from router_training.groups import groups_of
from router_training.progress import Progress, silent
from router_training.split import folds, parts
from router_training.suited import grid_of

FOLDS = 5

Float64 = npt.NDArray[np.float64]
SettingsT = TypeVar("SettingsT", bound=BaseModel)


def by_stem(outcomes: Outcomes) -> Outcomes:
    """With questions that differ in nothing but their answer options in one group, too: whoever
    has seen one of them knows the other."""
    stems = [read(text).stem for text in outcomes.text]
    return replace(outcomes, group=groups_of(stems, [str(group) for group in outcomes.group]))


@dataclass(frozen=True, slots=True)
class Trial:
    """One of the settings tried: the mean it reached, and how far it is behind the best of them,
    with the standard error of that difference (paired, groups as one)."""

    settings: BaseModel
    value: float
    behind: float
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A family with the settings chosen for it. `raw` (n, E) are its out-of-fold predictions,
    `quality` the same calibrated on the other folds, `values` (n,) what these decide, NaN where a
    question is not `decidable`; `signs` (n, J), where the family has such, of whether a question is
    anybody's. No `trials` where no question is: then the settings are the default."""

    family: str
    settings: BaseModel
    raw: FloatArray
    quality: FloatArray
    values: Float64
    trials: tuple[Trial, ...]
    members: tuple[Chosen, ...] = ()
    signs: FloatArray | None = None


class CrossFit:
    """One pool's questions in folds, the same for every family. Only `choose` and `fit` cost time,
    and each does its work once.

    Figures of the settings chosen are those they were chosen by, so a little too good: by less than
    the standard error that the rule of `choose` leaves to the default.
    """

    def __init__(
        self,
        features: Features,
        outcomes: Outcomes,
        *,
        criterion: Criterion,
        fold: IntArray,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        """`fold` (n,) as `folds_by_stem` makes it. Every question has a known outcome."""
        self.features, self.outcomes, self.fold = features, outcomes, fold
        self._criterion, self._seed, self._progress = criterion, seed, progress
        self._apart: dict[tuple[str, str], Predicted] = {}
        self._chosen: dict[str, Chosen] = {}
        self._fitted: dict[str, Family] = {}

    def by(self, criterion: Criterion) -> CrossFit:
        """The same questions, with the same fits, chosen by something else."""
        other = copy(self)
        other._criterion, other._chosen = criterion, {}
        return other

    def choose(self, family: str) -> Chosen:
        """The first settings of the family's grid, which begins with its default, that are behind
        the best ones by no more than one standard error (Breiman et al. 1984, section 3.4.3: the
        best of a grid is often so by luck). The default where no question is `decidable`. Raises
        TrainingError."""
        if family not in self._chosen:
            kind = kind_of(family)
            if kind is Blend:
                self._chosen[family] = self._stacked()
            else:
                grid = self._told_apart(grid_of(kind, self.outcomes))
                self._chosen[family] = self._best(family, grid, self._predicted(kind, grid))
        return self._chosen[family]

    def choose_uncalibrated(self, family: str, grid: Sequence[BaseModel]) -> Chosen:
        """The best settings of a grid of one's own, decisions made by the family's own predictions:
        how methods are judged that were published so."""
        said = self._predicted(kind_of(family), grid)
        return self._best(family, grid, said, calibrated=False, tolerant=False)

    def _told_apart(self, grid: Sequence[SettingsT]) -> list[SettingsT]:
        """The settings worth trying: the default alone where no decision can be judged."""
        return list(grid if self.outcomes.decidable.any() else grid[:1])

    def _predicted(self, kind: type[Family], grid: Sequence[BaseModel]) -> list[Predicted]:
        """(S,) out-of-fold predictions with each of the settings, each made once."""
        keys = [(kind.name, repr(settings)) for settings in grid]
        new = [s for key, s in zip(keys, grid, strict=True) if key not in self._apart]
        if new:
            said = out_of_fold(
                kind, new, self.features, self.outcomes, self.fold, self._seed, self._progress
            )
            for settings, one in zip(new, said, strict=True):
                self._apart[kind.name, repr(settings)] = one
        return [self._apart[key] for key in keys]

    def fit(self, chosen: Chosen) -> Family:
        """The same on all questions."""
        key = f"{chosen.family} {chosen.settings!r}"
        if key not in self._fitted:
            if chosen.members:
                members = [self.fit(member) for member in chosen.members]
                apart = np.stack([member.raw for member in chosen.members])
                settings = cast(BlendSettings, chosen.settings)
                fitted: Family = Blend.of(members, apart, self.outcomes, settings)
            else:
                kind = kind_of(chosen.family)
                self._progress(f"{chosen.family}: all questions", 0, 1)
                fitted = fit_all(kind, self.features, self.outcomes, [chosen.settings], self._seed)[
                    0
                ]
                self._progress(f"{chosen.family}: all questions", 1, 1)
            self._fitted[key] = fitted
        return self._fitted[key]

    def _best(
        self,
        family: str,
        grid: Sequence[BaseModel],
        apart: Sequence[Predicted],
        *,
        calibrated: bool = True,
        tolerant: bool = True,
    ) -> Chosen:
        """`apart` (S,): what was said with each of the settings of the grid."""
        rows = self.outcomes.decidable
        quality = [one.quality for one in apart]
        if calibrated:
            quality = [calibrated_apart(one, self.outcomes, self.fold) for one in apart]
        values = np.stack([self._criterion.values(q, self.outcomes) for q in quality])  # (S, n)
        number, trials = 0, []
        if rows.any():
            told = values[:, rows]
            best = int(told.mean(axis=1).argmax())
            for settings, own in zip(grid, told, strict=True):
                behind = told[best] - own
                error = standard_error(behind, self.outcomes.group[rows])
                trials.append(Trial(settings, float(own.mean()), float(behind.mean()), error))
            # The best one is behind itself by 0 ± 0, so there always is one.
            near = next(i for i, t in enumerate(trials) if t.behind <= t.error)
            number = near if tolerant else best
        return Chosen(
            family,
            grid[number],
            apart[number].quality,
            quality[number],
            values[number],
            tuple(trials),
            signs=apart[number].signs,
        )

    def _stacked(self) -> Chosen:
        """A blend of families with the settings chosen for each. What is said of a fold is weighed
        by weights from the other folds; the members' predictions there come from fits that had
        seen this fold, which only these few weights can pass on. Fitting every member anew within
        every fold takes six times as long: on mix10's training part that gave 75.2 % and a Brier
        score of .1519, this 75.8 and .1522."""
        grid: list[BlendSettings] = []
        blended: list[Predicted] = []
        members: list[tuple[Chosen, ...]] = []
        for tried in self._told_apart(Blend.grid()):
            own = tuple(self.choose(m.family) for m in tried.members)
            named = tuple(
                Member(family=m.family, settings=m.settings.model_dump(mode="json")) for m in own
            )
            settings = tried.model_copy(update={"members": named})
            apart = np.stack([member.raw for member in own])  # (M, n, E)
            said = np.empty(apart.shape[1:], np.float32)
            for seen, held in parts(self.fold):
                weights = Blend.of([], apart[:, seen], self.outcomes.rows(seen), settings)
                said[held] = weights.weighed(apart[:, held])
            grid.append(settings)
            blended.append(Predicted(said, None))
            members.append(own)
        best = self._best(Blend.name, grid, blended)
        return replace(best, members=members[grid.index(cast(BlendSettings, best.settings))])


def folds_by_stem(outcomes: Outcomes, seed: int, k: int = FOLDS) -> IntArray:
    """(n,) folds of questions that `by_stem` has grouped: fewer than k where there are fewer
    groups. Raises TrainingError for fewer than two."""
    groups = len(np.unique(outcomes.group))
    if groups < 2:
        raise TrainingError(
            f"{groups} different questions cannot be cross-validated; give more outcomes"
        )
    return folds(outcomes, min(k, groups), seed)


def kind_of(family: str) -> type[Family]:
    """Raises TrainingError for a family that there is not."""
    if family not in FAMILIES:
        raise TrainingError(f"there is no router {family!r}; choose from {', '.join(FAMILIES)}")
    return FAMILIES[family]


def fit_all(
    kind: type[Family],
    features: Features,
    outcomes: Outcomes,
    settings: Sequence[BaseModel],
    seed: int,
) -> list[Family]:
    """One fit for each of the settings. Raises TrainingError for what the family refuses."""
    together: Any = getattr(kind, "fit_all", None)
    try:
        if together is not None:
            return list(together(features, outcomes, settings, seed))
        return [kind.fit(features, outcomes, one, seed) for one in settings]
    except ValueError as error:
        raise TrainingError(f"{kind.name}: {error}") from error


def out_of_fold(
    kind: type[Family],
    grid: Sequence[BaseModel],
    features: Features,
    outcomes: Outcomes,
    fold: IntArray,
    seed: int,
    progress: Progress = silent,
) -> list[Predicted]:
    """(S,) for S settings: what is said of each question by a fit on the other folds. An expert
    that was asked nothing there is given the mean of the others."""
    out = np.empty((len(grid), *outcomes.quality.shape), np.float32)
    signs: list[FloatArray | None] = [None] * len(grid)
    label, step = f"{kind.name}: {len(grid)} settings", 0
    batches = [list(grid)] if hasattr(kind, "fit_all") else [[one] for one in grid]
    total = len(np.unique(fold)) * len(batches)
    progress(label, 0, total)
    for seen, held in parts(fold):
        some = outcomes.rows(seen)
        asked = np.flatnonzero(some.known.any(axis=0))
        some = some.of([some.experts[e] for e in asked])
        part, rest = rows_of(features, seen), rows_of(features, held)
        out[:, held] = np.nanmean(some.quality, dtype=np.float64)
        done = 0
        for batch in batches:
            for fitted in fit_all(kind, part, some, batch, seed):
                said = predicted(fitted, rest)
                out[done][np.ix_(held, asked)] = said.quality
                if said.signs is not None:
                    own = signs[done]
                    if own is None:
                        own = np.full((len(outcomes), said.signs.shape[1]), np.nan, np.float32)
                    own[held], signs[done] = said.signs, own
                done += 1
            step += 1
            progress(label, step, total)
    # A fold with too few questions that are nobody's has no signs, and so has none of them.
    whole = [None if own is None or np.isnan(own).any() else own for own in signs]
    return [Predicted(*both) for both in zip(out, whole, strict=True)]


def calibration_of(
    raw: FloatArray, outcomes: Outcomes, signs: FloatArray | None = None
) -> OutcomeCalibration:
    """One map for all experts, from out-of-fold predictions: it leaves decisions alone. With a map
    for each expert the kernel decides worse on the training parts of zeroeval without o1-mini (83.8
    against 85.6 %), of its small pool (58.7, 59.1) and slightly better on mix10 (76.1, 75.8), and
    no Brier score is lower: families start from each expert's mean, and what is left to mend is
    mostly noise."""
    return OutcomeCalibration.fit(raw, outcomes, shared=True, signs=signs)


def calibrated_apart(said: Predicted, outcomes: Outcomes, fold: IntArray) -> FloatArray:
    """(n, E) each fold calibrated on the others."""
    out = np.empty_like(said.quality)
    for seen, held in parts(fold):
        own, other = (None if said.signs is None else said.signs[rows] for rows in (seen, held))
        fitted = calibration_of(said.quality[seen], outcomes.rows(seen), own)
        out[held] = fitted.quality(said.quality[held], other)[0]
    return out


def standard_error(values: npt.NDArray[np.floating], group: IntArray) -> float:
    """Of the mean of (n,) values that are independent between groups only."""
    _, number = np.unique(group, return_inverse=True)
    off = np.bincount(number, values - values.mean())
    return float(np.sqrt((off**2).sum()) / len(values))

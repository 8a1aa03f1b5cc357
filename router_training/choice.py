"""Which of several families is chosen, by what each earns on questions that it has not seen.
Knows no family: only what each decided and predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import IntArray, Outcomes
from router_training.crossfit import Chosen, standard_error
from router_training.measures import brier
from router_training.split import parts

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One family: the mean it earns, how far it is behind the highest, `decidable` question by
    question, with the standard error of the mean of that, and its Brier score."""

    family: str
    value: float
    behind: Float64
    error: float
    brier: float

    @property
    def near(self) -> bool:
        """To the highest: behind by no more than one standard error."""
        return float(self.behind.mean()) <= self.error


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """`rows` by falling mean. `best` is that of the `near` ones with the lowest Brier score."""

    rows: tuple[Row, ...]
    best: str
    near: int


def ranking(
    every: Sequence[Chosen], outcomes: Outcomes, rows: npt.NDArray[np.intp] | None = None
) -> Ranking:
    """By all questions, or some of them: means by those that are `decidable`, of which there is
    one, Brier scores by all. On the training parts of the shared tables it matters
    little: with the family chosen on the other folds the mean over nine pools is 73.98, that of
    the blend alone 74.05, of the highest mean taken as it is 73.86."""
    rows = np.arange(len(outcomes)) if rows is None else rows
    seen = outcomes.rows(rows)
    told_by = rows[outcomes.decidable[rows]]
    group = outcomes.group[told_by]
    values = [chosen.values[told_by] for chosen in every]
    top = max(values, key=lambda own: float(own.mean()))
    told = []
    for chosen, own in zip(every, values, strict=True):
        score = brier(chosen.quality[rows], seen)
        assert score is not None  # out-of-fold predictions are complete
        behind = top - own
        error = standard_error(behind, group)
        told.append(Row(chosen.family, float(own.mean()), behind, error, score))
    near = [row for row in told if row.near]
    winner = min(near, key=lambda row: row.brier)
    falling = sorted(told, key=lambda row: -row.value)
    return Ranking(tuple(falling), winner.family, len(near))


def earned_apart(every: Sequence[Chosen], outcomes: Outcomes, fold: IntArray) -> Float64:
    """(n,) what the family earns on each fold that is chosen on the others; the first of them where
    no question of those is `decidable`."""
    out = np.empty(len(outcomes))
    of = {chosen.family: chosen.values for chosen in every}
    for seen, held in parts(fold):
        told = bool(outcomes.decidable[seen].any())
        best = ranking(every, outcomes, seen).best if told else every[0].family
        out[held] = of[best][held]
    return out

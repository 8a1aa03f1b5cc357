"""Labelled outcomes as arrays: what each expert scored on each question, and what it cost.
Knows no file format and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from composer.types import FloatArray

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Rows are questions, columns are experts.

    `quality` (n, E) lies in [0, 1], NaN where the expert was not asked; `cost` (n, E) is in US
    dollars a call, NaN where no price is known. `category` and `benchmark` (n,) are "" where
    nobody named one. Rows with the same `group` (n,) are one question asked twice: they are never
    parted between what is fitted on and what is judged on. `skills` (n,) are those that each
    question asks for, () where no question was annotated.
    """

    experts: tuple[str, ...]
    text: tuple[str, ...]
    quality: FloatArray
    cost: FloatArray
    category: tuple[str, ...]
    benchmark: tuple[str, ...]
    group: IntArray
    skills: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.text)

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """(n, E) where there is an outcome."""
        return ~np.isnan(self.quality)

    @property
    def decidable(self) -> npt.NDArray[np.bool_]:
        """(n,) where two experts or more have an outcome. A question with fewer says nothing of a
        decision: every choice among the known would earn the same."""
        return np.asarray(self.known.sum(axis=1) >= 2, np.bool_)

    @property
    def priced(self) -> bool:
        """Whether every known outcome has its cost, so that budgets mean something."""
        return bool(self.known.any()) and not bool(np.isnan(self.cost[self.known]).any())

    @property
    def of_intents(self) -> bool:
        """Whether every question is one expert's alone or nobody's, as where experts are intents:
        all outcomes are known and 0 or 1, at most one of a question is 1, and most have one."""
        right = self.quality == 1
        if not bool((right | (self.quality == 0)).all()):
            return False
        owners = right.sum(axis=1)
        return bool(owners.max(initial=0) == 1 and owners.mean() > 0.5 and len(self.experts) > 1)

    @property
    def in_scope(self) -> npt.NDArray[np.bool_]:
        """(n,) whether somebody was right."""
        return np.asarray((np.nan_to_num(self.quality) > 0).any(axis=1), np.bool_)

    def rows(self, chosen: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Outcomes:
        """Some of the questions, by number or mask."""
        numbers = np.arange(len(self))[chosen]
        return replace(
            self,
            text=tuple(self.text[i] for i in numbers),
            quality=self.quality[numbers],
            cost=self.cost[numbers],
            category=tuple(self.category[i] for i in numbers),
            benchmark=tuple(self.benchmark[i] for i in numbers),
            group=self.group[numbers],
            skills=tuple(self.skills[i] for i in numbers) if self.skills else (),
        )

    def of(self, experts: Sequence[str]) -> Outcomes:
        """Some of the experts, in the order given. Raises KeyError for one that is not there."""
        place = {expert: column for column, expert in enumerate(self.experts)}
        columns = [place[expert] for expert in experts]
        return replace(
            self,
            experts=tuple(experts),
            quality=self.quality[:, columns],
            cost=self.cost[:, columns],
        )

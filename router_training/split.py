"""Questions into folds, for cross-validation: whole groups, every kind of question in each fold.
Knows no router."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import IntArray, Outcomes


def folds(
    outcomes: Outcomes, k: int, seed: int, strata: Sequence[Hashable] | None = None
) -> IntArray:
    """(n,) the fold, 0 to k − 1, of each question.

    A group is never parted. Of the questions of one stratum, by default those of one benchmark and
    category, every fold gets the same number to within one where groups are single questions; a
    larger group counts for the stratum of its first question and goes where the fewest of that
    stratum are. The same for the same seed. Raises ValueError for fewer groups than folds.
    """
    if k < 2:
        raise ValueError(f"{k} folds are none; use 2 or more")
    if strata is None:
        strata = list(zip(outcomes.benchmark, outcomes.category, strict=True))
    _, first, group, size = np.unique(
        outcomes.group, return_index=True, return_inverse=True, return_counts=True
    )
    if len(first) < k:
        raise ValueError(
            f"{len(first)} different questions cannot be parted into {k} folds; use fewer folds"
        )
    rng = np.random.default_rng(seed)
    number = {stratum: i for i, stratum in enumerate(dict.fromkeys(strata))}
    stratum_of = np.array([number[strata[row]] for row in first])
    # Stratum by stratum, in it the large groups first, else at random.
    order = np.lexsort((rng.permutation(len(first)), -size, stratum_of))
    held = np.zeros((len(number), k), np.int64)
    total = np.zeros(k, np.int64)
    fold_of = np.empty(len(first), np.int64)
    for g in order:
        here = held[stratum_of[g]]
        fold = int(np.lexsort((total, here))[0])
        fold_of[g] = fold
        here[fold] += size[g]
        total[fold] += size[g]
    return np.asarray(rng.permutation(k)[fold_of[group]], np.int64)


def parts(fold: IntArray) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """For each fold: the rows to fit on, and those to judge on."""
    return [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in np.unique(fold)]

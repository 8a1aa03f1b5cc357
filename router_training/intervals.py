"""How sure a mean or a difference of means is: the bootstrap over questions. Knows no router.

Rows of one group are one question asked twice, so whole groups are drawn. What is drawn is how
often each distinct value of a group comes up, which is the same thing and needs no loop over
questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

RESAMPLES = 5000
_CELLS = 4_000_000  # of the counts drawn at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the bounds that the bootstrap puts around it (percentiles)."""

    mean: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """What one method has over another on one pool, question by question. Pools of the same
    `table` share its questions, told by `group` (n,), and are drawn together."""

    pool: str
    table: str
    values: npt.NDArray[np.floating]
    group: npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`overall` is the mean of the pools' mean differences."""

    overall: Interval
    pools: Mapping[str, Interval]

    @property
    def better(self) -> bool:
        """Better over all pools, and on none significantly worse."""
        return self.overall.above_zero and not any(p.below_zero for p in self.pools.values())


def paired(
    values: npt.NDArray[np.floating],
    group: npt.NDArray[np.integer],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """The mean of `values` (n,), say differences between two methods on the same questions, and its
    interval. None where a value is missing (NaN), or there is none."""
    if not len(values) or not np.isfinite(values).all():
        return None
    drawn = _drawn([Difference("", "", values, group)], seed, resamples)[:, 0]
    return _interval(float(np.mean(values, dtype=np.float64)), drawn, level)


def side_by_side(
    columns: npt.NDArray[np.floating],
    group: npt.NDArray[np.integer],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> list[Interval]:
    """`paired` of each of the columns (n, P), which share their questions: drawn once for all.
    Raises ValueError for a missing value (NaN), or no question."""
    if not len(columns) or not np.isfinite(columns).all():
        raise ValueError("intervals need every value; leave questions out whose values are missing")
    pools = [Difference(str(p), "", column, group) for p, column in enumerate(columns.T)]
    means = columns.mean(axis=0, dtype=np.float64)
    drawn = _drawn(pools, seed, resamples)
    return [_interval(float(m), own, level) for m, own in zip(means, drawn.T, strict=True)]


def shares(
    columns: npt.NDArray[np.floating],
    group: npt.NDArray[np.integer],
    base: npt.NDArray[np.floating],
    base_group: npt.NDArray[np.integer],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> list[Interval]:
    """The mean of each of the columns (n, P) over the mean of `base` (m,), whose questions are
    theirs or some of them and are drawn with them; how easy those drawn happen to be is then on
    both sides. Draws in which the base was never right count for nothing. Raises ValueError for a
    missing value (NaN), no question, or a base that was never right."""
    if not len(columns) or not np.isfinite(columns).all() or not np.isfinite(base).all():
        raise ValueError("intervals need every value; leave questions out whose values are missing")
    if not len(base) or not np.mean(base) > 0:
        raise ValueError("there are no shares of nothing; name a base that was right once")
    pools = [Difference(str(p), "", column, group) for p, column in enumerate(columns.T)]
    drawn = _drawn([*pools, Difference("base", "", base, base_group)], seed, resamples)
    drawn = drawn[drawn[:, -1] > 0]
    ratio = drawn[:, :-1] / drawn[:, -1:]
    means = columns.mean(axis=0, dtype=np.float64) / np.mean(base, dtype=np.float64)
    return [_interval(float(m), own, level) for m, own in zip(means, ratio.T, strict=True)]


def verdict(
    differences: Sequence[Difference],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Verdict:
    """Whether one method beats another over several pools, each pool counting the same. Raises
    ValueError for a missing value (NaN), an empty pool, or none."""
    for difference in differences:
        if not len(difference.values) or not np.isfinite(difference.values).all():
            raise ValueError(
                f"the pool {difference.pool!r} lacks differences; compare where both are known"
            )
    if not differences:
        raise ValueError("there is no pool to compare on; name one")
    ordered = sorted(differences, key=lambda d: d.table)
    of_table = [list(same) for _, same in groupby(ordered, key=lambda d: d.table)]
    drawn = np.concatenate(
        [_drawn(pools, seed + i, resamples) for i, pools in enumerate(of_table)], axis=1
    )
    means = [float(np.mean(d.values, dtype=np.float64)) for d in ordered]
    each = {
        d.pool: _interval(mean, column, level)
        for d, mean, column in zip(ordered, means, drawn.T, strict=True)
    }
    overall = _interval(float(np.mean(means)), drawn.mean(axis=1), level)
    return Verdict(overall, {d.pool: each[d.pool] for d in differences})


def _drawn(pools: Sequence[Difference], seed: int, resamples: int) -> Float64:
    """(resamples, P) means of pools that share their questions, groups drawn with replacement."""
    groups = np.unique(np.concatenate([pool.group for pool in pools]))
    sums = np.zeros((len(groups), 2 * len(pools)))  # of values, and of rows
    for p, pool in enumerate(pools):
        at = np.searchsorted(groups, pool.group)
        sums[:, 2 * p] = np.bincount(at, pool.values, len(groups))
        sums[:, 2 * p + 1] = np.bincount(at, minlength=len(groups))
    # In the order of appearance, so that turning all signs turns the interval and no more.
    _, first, counts = np.unique(sums, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    distinct, counts = sums[first[order]], counts[order]
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(distinct))
    total = np.concatenate(
        [
            rng.multinomial(len(groups), counts / len(groups), size=min(rows, resamples - begin))
            @ distinct
            for begin in range(0, resamples, rows)
        ]
    )
    n = total[:, 1::2]
    # A pool of few of its table's questions may not be drawn at all: it then says nothing.
    means = np.divide(total[:, ::2], n, out=np.zeros_like(n), where=n > 0)
    return np.asarray(means, np.float64)


def _interval(mean: float, drawn: Float64, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))

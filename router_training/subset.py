"""Which experts to keep under measured limits of memory, latency and cost, by how good they are at
each kind of question. Knows no router; the exact choices are `composer/routing/subsets.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import Outcomes
from composer.routing.subsets import ENUMERATED, best_subset, budgeted_map
from router_training.cells import columns_of, numbers, texts
from router_training.errors import DataError, Problems, TrainingError
from router_training.measures import base_rates
from router_training.tables import read_table

Float64 = npt.NDArray[np.float64]

PRIOR = 10.0
"""Questions that an expert's mean is worth beside those of a kind, as in the family `category`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit. `memory_gb` is of all kept together, `latency_ms` of each, `cost` US dollars
    a question on average."""

    memory_gb: float | None = None
    latency_ms: float | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """`value` is the mean quality with the best of `experts` for each kind of question, or with
    `of`, the expert of each kind, within the cost; `best` is that of the best subset within the
    limits where all were looked at (`exact`), else a bound of it. `everybody` is the mean quality
    with all experts, `cost` US dollars a question, None where it is not known."""

    experts: tuple[str, ...]
    of: Mapping[str, str]
    value: float
    best: float
    exact: bool
    everybody: float
    memory_gb: float | None
    cost: float | None


def keep_within(
    outcomes: Outcomes, limits: Limits, measured: Mapping[str, tuple[float, float]]
) -> Kept:
    """The subset of the experts that is worth most on questions like these, each going to the best
    of them for its kind (benchmark and category). `measured` has each expert's memory in GB and
    latency in ms, NaN where unknown. Raises TrainingError where a limit needs what is not measured,
    or nobody is within the limits."""
    for wanted, place, name in (
        (limits.memory_gb, 0, "memory_gb"),
        (limits.latency_ms, 1, "latency_ms"),
    ):
        lacking = [
            e for e in outcomes.experts if np.isnan(measured.get(e, (np.nan, np.nan))[place])
        ]
        if wanted is not None and lacking:
            raise TrainingError(
                f"the limit needs {name} of every expert, and {lacking[0]!r} has none; measure it, "
                "or leave the expert out"
            )
    if limits.cost is not None and not outcomes.priced:
        raise TrainingError("a limit of cost needs the cost of every outcome; give prices")
    if limits.cost is not None and limits.memory_gb is not None:
        raise TrainingError(
            "limits of memory and of cost are not kept together; give one of them, and the other "
            "to what that keeps"
        )
    kinds, count, quality, cost = by_kind(outcomes)
    memory = _measured(outcomes, measured, 0, limits.memory_gb)
    latency = _measured(outcomes, measured, 1, limits.latency_ms)
    room = np.inf if limits.memory_gb is None else limits.memory_gb
    slow = np.inf if limits.latency_ms is None else limits.latency_ms
    share = count / count.sum()
    try:
        if limits.cost is None:
            found = best_subset(count, quality, memory, room, latency, slow)
            own, best = list(found.experts), found.bound
            chosen = quality[:, own].argmax(axis=1)
            exact = int(((memory <= room) & (latency <= slow)).sum()) <= ENUMERATED
        else:
            own = [int(e) for e in np.flatnonzero(latency <= slow)]
            chosen = budgeted_map(count, quality[:, own], cost[:, own], limits.cost)
            own = [own[e] for e in sorted(set(chosen.tolist()))]  # who is never asked is not kept
            chosen = np.searchsorted(np.unique(chosen), chosen)
            best, exact = np.nan, True
    except ValueError as error:
        raise TrainingError(str(error)) from error
    columns = np.array(own)[chosen]
    value = float((share * quality[np.arange(len(count)), columns]).sum())
    spent = float((share * cost[np.arange(len(count)), columns]).sum())
    return Kept(
        experts=tuple(outcomes.experts[e] for e in own),
        of={kind: outcomes.experts[e] for kind, e in zip(kinds, columns, strict=True)},
        value=value,
        best=value if np.isnan(best) else best,
        exact=exact,
        everybody=float((share * np.nanmax(quality, axis=1)).sum()),
        memory_gb=None if limits.memory_gb is None else float(memory[own].sum()),
        cost=None if np.isnan(spent) else spent,
    )


def _measured(
    outcomes: Outcomes,
    measured: Mapping[str, tuple[float, float]],
    place: int,
    limit: float | None,
) -> Float64:
    """(E,) of one measure, 0 where nothing limits it."""
    if limit is None:
        return np.zeros(len(outcomes.experts))
    return np.array([measured[expert][place] for expert in outcomes.experts])


def by_kind(
    outcomes: Outcomes, prior: float = PRIOR
) -> tuple[tuple[str, ...], Float64, Float64, Float64]:
    """The kinds (C,) of question, how many there are of each, and the experts' smoothed quality
    and mean cost (C, E) there, NaN where nothing is known."""
    names = [
        "/".join(part for part in pair if part) or "all"
        for pair in zip(outcomes.benchmark, outcomes.category, strict=True)
    ]
    kinds, owner = np.unique(names, return_inverse=True)
    known = outcomes.known
    overall = base_rates(outcomes)
    quality, cost = [], []
    for kind in range(len(kinds)):
        own = owner == kind
        total = np.where(known[own], outcomes.quality[own], 0).sum(axis=0, dtype=np.float64)
        quality.append((total + prior * overall) / (known[own].sum(axis=0) + prior))
        asked = known[own].sum(axis=0)
        spent = np.where(known[own], outcomes.cost[own], 0).sum(axis=0, dtype=np.float64)
        cost.append(np.where(asked > 0, spent / np.maximum(asked, 1), np.nan))
    count = np.bincount(owner).astype(np.float64)
    return tuple(str(kind) for kind in kinds), count, np.array(quality), np.array(cost)


def brute_force(
    count: Float64, quality: Float64, memory: Float64, room: float
) -> tuple[tuple[int, ...], float]:
    """Every subset within the room: what `best_subset` is held against. For tests and benchmarks:
    it takes 2^E steps."""
    best: tuple[tuple[int, ...], float] = ((), -1.0)
    for size in range(1, quality.shape[1] + 1):
        for some in combinations(range(quality.shape[1]), size):
            if memory[list(some)].sum() <= room:
                value = float((count * quality[:, some].max(axis=1)).sum() / count.sum())
                if value > best[1]:
                    best = (some, value)
    return best


def read_measured(path: Path, experts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """A table with the columns `expert` and `memory_gb`, `latency_ms` or both, as measured. Raises
    DataError."""
    table = read_table(path)
    problems = Problems(str(path))
    if "expert" not in table.columns or not {"memory_gb", "latency_ms"} & set(table.columns):
        raise DataError.of(
            str(path),
            "there are no columns expert and memory_gb or latency_ms",
            f"Write one row an expert. {columns_of(table)}",
        )
    names = texts(table, "expert", problems, required=True)
    remedy = "Write a number of 0 or more, or nothing."
    memory, latency = (
        numbers(table, column, problems, remedy=remedy)
        if column in table.columns
        else np.full(len(names), np.nan)
        for column in ("memory_gb", "latency_ms")
    )
    problems.settle()
    return {
        name: (float(memory[i]), float(latency[i]))
        for i, name in enumerate(names)
        if name in experts
    }

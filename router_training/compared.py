"""What a comparison of routers on pools found, and the verdicts over several pools. Knows no router
and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from router_training.evaluate import Latency
from router_training.intervals import Difference, Interval, Verdict, paired, verdict
from router_training.knob import AtBest
from router_training.overlap import Overlap
from router_training.pairing import PairMeasures
from router_training.published import BAR

Values = Annotated[
    npt.NDArray[np.float64],
    PlainValidator(lambda values: np.asarray(values, np.float64)),
    PlainSerializer(lambda values: values.tolist()),
]
Groups = Annotated[
    npt.NDArray[np.int64],
    PlainValidator(lambda values: np.asarray(values, np.int64)),
    PlainSerializer(lambda values: values.tolist()),
]


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One family, or published method, on one pool. `card` is the scorecard on the judged
    questions, `values` (n,) what its decisions earned there, or where there are two experts without
    prices the mean over all shares of calls; `apart` (N,) is the same on the questions fitted on,
    cross-fitted, and `cv` its mean. `raw` is the accuracy before calibration; `cross_fitted` the
    scorecard on the questions fitted on, of families alone."""

    name: str
    settings: Mapping[str, Any]
    cv: float
    card: Mapping[str, Any]
    values: Values
    apart: Values
    raw: float
    pairs: Mapping[str, PairMeasures]
    cross_fitted: Mapping[str, Any] | None
    latency: Latency | None


@dataclass(frozen=True, slots=True, eq=False)
class Thrifty:
    """A method on a priced pool, its settings chosen by the mean quality within SHARES. `values`
    (n,) is that mean on the judged questions, `budgets` the quality within each share, and
    `at_best` what the best single expert's quality costs, None where it is not reached on the
    questions fitted on."""

    name: str
    settings: Mapping[str, Any]
    cv: float
    values: Values
    budgets: Mapping[str, float | None]
    aiq: float | None
    at_best: AtBest | None


@dataclass(frozen=True, slots=True, eq=False)
class Within:
    """What a priced pool's budgets say: `best` is what cross-validation chose for them, and
    `promises` what its knob promised and kept."""

    methods: tuple[Thrifty, ...]
    best: str
    why: str
    mix: Mapping[str, float | None] | None
    promises: Sequence[Mapping[str, Any]] | None

    def of(self, name: str) -> Thrifty:
        """Raises KeyError for a method that was not compared."""
        return {method.name: method for method in self.methods}[name]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """`table` and `name` say which pool; `overlap` how many of the questions to judge on are among
    those fitted on, too; `best` is the family that cross-validation chose, and `why`. `group` (n,)
    are the judged questions', `trained` (N,) those fitted on, both shared by all pools of a table;
    `apart` (N,) is what the family earns there that is chosen by the other folds. `within` is None
    without prices, and where no budget can be kept, as the best single expert is the cheapest."""

    table: str
    name: str
    experts: tuple[str, ...]
    overlap: Overlap
    trained: Groups
    apart: Values
    group: Groups
    methods: tuple[Method, ...]
    best: str
    why: str
    baselines: Mapping[str, Any]
    within: Within | None

    def of(self, name: str) -> Method:
        """Raises KeyError for a method that was not compared."""
        return {method.name: method for method in self.methods}[name]

    def ahead(self, name: str, of: str = BAR) -> Interval | None:
        """What a method earns more than another, question by question."""
        return paired(self.of(name).values - self.of(of).values, self.group)


COMPARISONS = TypeAdapter(list[Comparison])
"""Reads and writes them as JSON, for pools that are compared apart."""


def over_pools(comparisons: Sequence[Comparison], name: str | None, of: str = BAR) -> Verdict:
    """A method against another over all pools; `name` None is whichever cross-validation chose on
    each. Raises ValueError for no pool, KeyError for a method that was not compared."""
    return verdict(
        [
            Difference(
                pool=f"{c.table}/{c.name}",
                table=c.table,
                values=c.of(name or c.best).values - c.of(of).values,
                group=c.group,
            )
            for c in comparisons
        ]
    )


def over_training(comparisons: Sequence[Comparison], of: str) -> Verdict:
    """What cross-validation chose against a method, over all pools, on the questions fitted on: on
    each fold as fitted, and chosen, on the others."""
    return verdict(
        [
            Difference(
                pool=f"{c.table}/{c.name}",
                table=c.table,
                values=c.apart - c.of(of).apart,
                group=c.trained,
            )
            for c in comparisons
        ]
    )


def over_budgets(comparisons: Sequence[Comparison], name: str | None, of: str = BAR) -> Verdict:
    """The same within budgets, over the priced pools. Raises ValueError where there is none."""
    return verdict(
        [
            Difference(
                pool=f"{c.table}/{c.name}",
                table=c.table,
                values=c.within.of(name or c.within.best).values - c.within.of(of).values,
                group=c.group,
            )
            for c in comparisons
            if c.within is not None
        ]
    )

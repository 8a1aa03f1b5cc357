"""All families and the published methods on one pool: settings chosen on train, fitted once, judged
once. Writes no file; `comparison.py` writes the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from composer.routing.artefact import EmbedderStamp
from composer.routing.families import FAMILIES
from composer.routing.family import decided, predicted
from composer.routing.model import LearnedModel, Scored
from composer.routing.outcomes import Outcomes
from composer.routing.views import Encode, Features
from composer.types import FloatArray
from router_training.baselines import mean_costs, random_mix
from router_training.criterion import Criterion, need_decisions
from router_training.crossfit import Chosen
from router_training.curves import BUDGETS, Points, aiq, operating_points
from router_training.errors import NoBudget
from router_training.evaluate import Latency, timed_in_turn
from router_training.intervals import Difference, Interval, Verdict, paired, verdict
from router_training.measures import earned
from router_training.pairing import PairMeasures, pair_measures
from router_training.progress import Progress, silent
from router_training.published import BAR, PUBLISHED
from router_training.scorecard import Yardstick, baseline_cards
from router_training.suited import suited
from router_training.train import Workshop, same_experts

SHARES = (*BUDGETS, 1.0)
"""Of the best single expert's mean cost: the budgets that methods are judged within."""

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
    `cost_at_best` the least share at which the best single expert's mean quality is reached."""

    name: str
    settings: Mapping[str, Any]
    cv: float
    values: Values
    budgets: Mapping[str, float | None]
    aiq: float | None
    cost_at_best: float | None


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
    """`table` and `name` say which pool; `best` is the family that cross-validation chose, and
    `why`. `group` (n,) are the judged questions', `trained` (N,) those fitted on, both shared by
    all pools of a table; `apart` (N,) is what the family earns there that is chosen by the other
    folds. `within` is None without prices, and where no budget can be kept, as the best single
    expert is the cheapest."""

    table: str
    name: str
    experts: tuple[str, ...]
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


def compare(
    table: str,
    name: str,
    train: Outcomes,
    dev: Outcomes,
    encode: Encode,
    embedder: EmbedderStamp,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    published: Sequence[str] = tuple(PUBLISHED),
    encode_anew: Encode | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Questions of `dev` without an outcome are left out (with fewer than two, of all that is said
    of decisions), and so are families that are not for this kind of table, and what is published of
    such. The published BAR is always compared. With `encode_anew`, which embeds without
    remembering, the time of each family's decisions is measured, too. Raises TrainingError."""
    need_decisions(train, "the questions fitted on")
    families, _ = suited(train, families)
    published = list(dict.fromkeys([*published, BAR]))
    fit, _ = suited(train, [PUBLISHED[method].family for method in published])
    published = [method for method in published if PUBLISHED[method].family in fit]
    dev = same_experts(dev, train.experts)
    need_decisions(dev, "the questions to judge on")
    dev = dev.rows(np.asarray(dev.known.any(axis=1), np.bool_))
    wanted = list(dict.fromkeys([*families, *(PUBLISHED[p].family for p in published)]))
    workshop = Workshop(train, wanted, encode, seed=seed, progress=progress)
    features = workshop.views.transform(dev.text, encode)
    judge = Judge(workshop, dev, features, embedder)
    methods = judge.families(families, encode_anew)
    methods += [judge.published(method) for method in published]
    best, choice = workshop.best(families)
    told_by = workshop.outcomes.decidable
    return Comparison(
        table=table,
        name=name,
        experts=train.experts,
        trained=workshop.outcomes.group[told_by],
        apart=workshop.best_apart(families)[told_by],
        group=dev.group[dev.decidable],
        methods=tuple(methods),
        best=best.family,
        why=choice["why"],
        baselines=baseline_cards(dev, workshop.yardstick, seed=seed),
        within=judge.within(families, published),
    )


class Judge:
    """One pool's methods on the judged questions. `cost` (n, E) is what answers are expected to
    cost, None without prices."""

    def __init__(
        self,
        workshop: Workshop,
        dev: Outcomes,
        features: Features,
        embedder: EmbedderStamp,
    ) -> None:
        self._workshop, self._dev, self._features = workshop, dev, features
        self._rows = dev.decidable
        self._decided = dev.rows(self._rows)
        self._embedder = embedder
        self._yardstick: Yardstick = workshop.yardstick
        priced = workshop.costs is not None and dev.priced
        self.cost = workshop.costs.predict(features) if workshop.costs and priced else None

    def families(self, families: Sequence[str], encode_anew: Encode | None) -> list[Method]:
        """As they would be served: calibrated."""
        models = [
            self._workshop.model(self._workshop.choose(family), self._embedder)
            for family in families
        ]
        latencies: list[Latency | None] = [None] * len(models)
        if encode_anew is not None:
            latencies[:] = timed_in_turn(models, self._dev.text, encode_anew)
        return [self._family(*both) for both in zip(models, latencies, strict=True)]

    def _family(self, model: LearnedModel, latency: Latency | None) -> Method:
        raw, quality, uncertainty = self._said(model)
        told = self._workshop.card(model, self._dev, Scored(quality, uncertainty, self.cost))
        name, own = model.manifest.family, model.manifest.metrics["cross_fitted"]
        chosen = self._workshop.choose(name)
        return self._method(name, chosen, raw, quality, told["dev"], own, latency)

    def published(self, name: str) -> Method:
        """As it was published: by its own predictions."""
        method = PUBLISHED[name]
        chosen = self._workshop.choose_uncalibrated(method.family, method.grid)
        raw = self._workshop.fit(chosen).predict(self._features)
        card = self._workshop.judge(raw, self.cost, self._dev)
        return self._method(name, chosen, raw, raw, card, None, None)

    def within(self, families: Sequence[str], published: Sequence[str]) -> Within | None:
        """None for a pool without prices, or where no budget can be kept."""
        if self.cost is None:
            return None
        try:
            return self._within(families, published)
        except NoBudget:
            return None

    def _within(self, families: Sequence[str], published: Sequence[str]) -> Within:
        """Raises NoBudget."""
        thrift = self._workshop.within(SHARES)
        methods = []
        for family in families:
            model = thrift.model(chosen := thrift.choose(family), self._embedder)
            methods.append(self._thrifty(family, chosen, self._said(model)[1]))
        for name in published:
            method = PUBLISHED[name]
            chosen = thrift.choose_uncalibrated(method.family, method.grid)
            raw = thrift.fit(chosen).predict(self._features)
            methods.append(self._thrifty(name, chosen, raw))
        best, choice = thrift.best(families)
        model = thrift.model(best, self._embedder)
        _, quality, uncertainty = self._said(model)
        told = thrift.card(model, self._dev, Scored(quality, uncertainty, self.cost))
        mix = random_mix(self._decided)
        return Within(
            methods=tuple(methods),
            best=best.family,
            why=choice["why"],
            mix=None if mix is None else self._within_each(mix.within),
            promises=told["dev_promises"],
        )

    def _said(self, model: LearnedModel) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of the judged questions: raw, calibrated, and how sure, (n, E) each."""
        said = predicted(model.family, self._features)
        return said.quality, *model.calibration.quality(said.quality, said.signs)

    def _method(
        self,
        name: str,
        chosen: Chosen,
        raw: FloatArray,
        quality: FloatArray,
        card: Mapping[str, Any],
        cross_fitted: Mapping[str, Any] | None,
        latency: Latency | None,
    ) -> Method:
        dev, strong = self._dev, self._yardstick.best
        rows, told_by = self._rows, self._workshop.outcomes.decidable
        of_pair = self._workshop.criterion.strong is not None and dev.known.all()
        criterion = Criterion(strong=strong) if of_pair else Criterion()
        return Method(
            name=name,
            settings=chosen.settings.model_dump(mode="json"),
            cv=float(np.nanmean(chosen.values)),
            card=card,
            values=criterion.values(quality, dev)[rows],
            apart=chosen.values[told_by],
            raw=float(earned(dev.quality, decided(raw, dev.known))[rows].mean()),
            pairs=pair_measures(quality, dev, strong, seed=self._workshop.seed),
            cross_fitted=cross_fitted,
            latency=latency,
        )

    def _thrifty(self, name: str, chosen: Chosen, quality: FloatArray) -> Thrifty:
        assert self.cost is not None
        dev, best = self._decided, self._yardstick.best
        quality, cost = quality[self._rows], self.cost[self._rows]
        costs = mean_costs(dev)
        dollars = tuple(share * float(costs[best]) for share in SHARES)
        found = operating_points(quality, cost, dev)
        assert found is not None  # the pool is priced, or there would be no expected cost
        points = found[0]
        return Thrifty(
            name=name,
            settings=chosen.settings.model_dump(mode="json"),
            cv=float(np.nanmean(chosen.values)),
            values=Criterion(dollars, cost).values(quality, dev),
            budgets=self._within_each(points.within),
            aiq=aiq(points, float(costs.max())),
            cost_at_best=self._cost_at_best(points),
        )

    def _within_each(self, within: Callable[[float], float | None]) -> dict[str, float | None]:
        single = float(mean_costs(self._decided)[self._yardstick.best])
        return {f"{share:.2f}": within(share * single) for share in SHARES}

    def _cost_at_best(self, points: Points) -> float | None:
        best = self._yardstick.best
        target = float(np.nanmean(self._decided.quality[:, best], dtype=np.float64))
        good = points.cost[points.quality >= target]
        return float(good[0] / mean_costs(self._decided)[best]) if len(good) else None


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

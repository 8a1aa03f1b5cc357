"""All families and the published methods on one pool: settings chosen on train, fitted once, judged
once. Writes no file; `comparison.py` writes the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from composer.routing.artefact import EmbedderStamp
from composer.routing.curve import Curve
from composer.routing.families import FAMILIES
from composer.routing.family import decided, predicted
from composer.routing.model import LearnedModel, Scored
from composer.routing.outcomes import Outcomes
from composer.routing.trained import TrainedQueries
from composer.routing.views import Encode, Features
from composer.types import FloatArray
from router_training.baselines import mean_costs, random_mix
from router_training.compared import Comparison, Method, Thrifty, Within
from router_training.criterion import Criterion, need_decisions
from router_training.crossfit import Chosen
from router_training.curves import BUDGETS, aiq, operating_points
from router_training.errors import NoBudget
from router_training.evaluate import Latency, timed_in_turn
from router_training.knob import CurveTrial, curve_of
from router_training.measures import earned
from router_training.overlap import parted
from router_training.pairing import pair_measures
from router_training.progress import Progress, silent
from router_training.published import BAR, PUBLISHED
from router_training.scorecard import Yardstick, baseline_cards
from router_training.suited import suited
from router_training.train import Workshop, same_experts

SHARES = (*BUDGETS, 1.0)
"""Of the best single expert's mean cost: the budgets that methods are judged within."""


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
    without_trained: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Questions of `dev` without an outcome are left out (with fewer than two, of all that is said
    of decisions), and so are families that are not for this kind of table, and what is published of
    such. The published BAR is always compared. With `encode_anew`, which embeds without
    remembering, the time of each family's decisions is measured, too. `without_trained` leaves out
    questions of `dev` that are in `train` as well. Raises TrainingError."""
    need_decisions(train, "the questions fitted on")
    families, _ = suited(train, families)
    published = list(dict.fromkeys([*published, BAR]))
    fit, _ = suited(train, [PUBLISHED[method].family for method in published])
    published = [method for method in published if PUBLISHED[method].family in fit]
    dev = same_experts(dev, train.experts)
    dev = dev.rows(np.asarray(dev.known.any(axis=1), np.bool_))
    dev, [overlap] = parted(dev, [TrainedQueries.of(train.text)], without=without_trained)
    need_decisions(dev, "the questions to judge on")
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
        overlap=overlap,
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
            curve = model.manifest.curve
            methods.append(self._thrifty(family, chosen, self._said(model)[1], curve))
        for name in published:
            method = PUBLISHED[name]
            chosen = thrift.choose_uncalibrated(method.family, method.grid)
            raw = thrift.fit(chosen).predict(self._features)
            curve = curve_of(
                chosen.quality,
                thrift.expected_cost,
                thrift.outcomes,
                self._yardstick.best,
                seed=thrift.seed,
            )
            methods.append(self._thrifty(name, chosen, raw, curve))
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

    def _thrifty(
        self, name: str, chosen: Chosen, quality: FloatArray, curve: Curve | None
    ) -> Thrifty:
        """`curve` is that of its cross-fitted decisions on the questions fitted on."""
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
            at_best=None
            if curve is None
            else CurveTrial(curve, quality, cost, dev, best, self._workshop.seed).at_best_single(),
        )

    def _within_each(self, within: Callable[[float], float | None]) -> dict[str, float | None]:
        single = float(mean_costs(self._decided)[self._yardstick.best])
        return {f"{share:.2f}": within(share * single) for share in SHARES}

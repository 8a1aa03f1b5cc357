"""All families on one pool: settings chosen on train, fitted once, judged on dev once. Writes no
file; `comparison.py` writes the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.artefact import EmbedderStamp
from composer.routing.families import FAMILIES
from composer.routing.family import decided, predicted
from composer.routing.model import Scored
from composer.routing.outcomes import Outcomes
from composer.routing.views import Encode
from composer.types import FloatArray
from router_training.baselines import mean_costs, random_mix
from router_training.crossfit import Chosen
from router_training.curves import BUDGETS, Points, operating_points, pair
from router_training.intervals import Difference, Interval, Verdict, paired, verdict
from router_training.measures import earned
from router_training.progress import Progress, silent
from router_training.scorecard import Yardstick, baseline_cards
from router_training.suited import suited
from router_training.train import Workshop, same_experts

BAR = "tuned kNN"
"""The published k nearest neighbours, which decides by the plain mean of their outcomes: settings
chosen and decisions made without calibration. What every family is compared with."""

SHARES = (*BUDGETS, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One family on one pool. `cv` is the cross-fitted mean on train, `card` the scorecard on dev,
    `values` (n,) what its decisions earned there, `raw` what they earned before calibration."""

    name: str
    settings: Mapping[str, Any]
    cv: float
    card: Mapping[str, Any]
    values: npt.NDArray[np.float64]
    raw: float
    budgets: Mapping[str, float | None] | None
    cost_at_best: float | None
    pairs: Mapping[str, Mapping[str, float | None]]
    promises: Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """`table` and `name` say which pool; `best` is the method that cross-validation chose, and
    `why`. `group` (n,) are the judged questions', shared by all pools of a table."""

    table: str
    name: str
    experts: tuple[str, ...]
    trained: int
    group: npt.NDArray[np.int64]
    methods: tuple[Method, ...]
    best: str
    why: str
    baselines: Mapping[str, Any]
    mix: Mapping[str, float | None] | None

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
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Questions of `dev` without an outcome are left out, and so are families that are not for this
    kind of table. Raises TrainingError."""
    families, _ = suited(train, families)
    dev = same_experts(dev, train.experts)
    dev = dev.rows(np.asarray(dev.known.any(axis=1), np.bool_))
    wanted = list(dict.fromkeys(["neighbours", *families]))
    workshop = Workshop(train, wanted, encode, seed=seed, progress=progress)
    features = workshop.views.transform(dev.text, encode)
    cost = None if workshop.costs is None else workshop.costs.predict(features)
    methods = []
    for family in families:
        model = workshop.model(workshop.choose(family), embedder)
        said = predicted(model.family, features)
        quality, uncertainty = model.calibration.quality(said.quality, said.signs)
        told = workshop.card(model, dev, Scored(quality, uncertainty, cost))
        chosen = workshop.choose(family)
        methods.append(
            _method(family, chosen, said.quality, quality, cost, dev, workshop.yardstick, told)
        )
    bar = workshop.choose("neighbours", calibrated=False)
    raw = workshop.fit(bar).predict(features)
    told = {"dev": workshop.judge(raw, cost, dev), "dev_promises": None}
    methods.append(_method(BAR, bar, raw, raw, cost, dev, workshop.yardstick, told))
    best, choice = workshop.best(list(families))
    return Comparison(
        table=table,
        name=name,
        experts=train.experts,
        trained=len(workshop.outcomes),
        group=dev.group,
        methods=tuple(methods),
        best=best.family,
        why=choice["why"],
        baselines=baseline_cards(dev, workshop.yardstick, seed=seed),
        mix=_budgets(random_mix(dev), dev, workshop.yardstick),
    )


def _method(
    name: str,
    chosen: Chosen,
    raw: FloatArray,
    quality: FloatArray,
    cost: FloatArray | None,
    dev: Outcomes,
    yardstick: Yardstick,
    told: Mapping[str, Any],
) -> Method:
    found = None if cost is None else operating_points(quality, cost, dev)
    points = None if found is None else found[0]
    return Method(
        name=name,
        settings=chosen.settings.model_dump(mode="json"),
        cv=float(chosen.values.mean()),
        card=told["dev"],
        values=earned(dev.quality, decided(quality, dev.known)),
        raw=float(earned(dev.quality, decided(raw, dev.known)).mean()),
        budgets=_budgets(points, dev, yardstick),
        cost_at_best=_cost_at_best(points, dev, yardstick),
        pairs=_pairs(quality, dev, yardstick),
        promises=told["dev_promises"],
    )


def _budgets(
    points: Points | None, dev: Outcomes, yardstick: Yardstick
) -> dict[str, float | None] | None:
    """Mean quality within shares of the best single expert's mean cost."""
    if points is None:
        return None
    single = float(mean_costs(dev)[yardstick.best])
    return {f"{share:.2f}": points.within(share * single) for share in SHARES}


def _cost_at_best(points: Points | None, dev: Outcomes, yardstick: Yardstick) -> float | None:
    """The least spend at which the best single expert's mean quality is reached, as a share of its
    mean cost; None where it never is."""
    if points is None:
        return None
    target = float(np.nanmean(dev.quality[:, yardstick.best], dtype=np.float64))
    good = points.cost[points.quality >= target]
    return float(good[0] / mean_costs(dev)[yardstick.best]) if len(good) else None


def _pairs(
    quality: FloatArray, dev: Outcomes, yardstick: Yardstick
) -> dict[str, dict[str, float | None]]:
    """RouteLLM's measures for a pool of two, benchmark by benchmark; empty for any other."""
    if len(dev.experts) != 2 or not dev.known.all():
        return {}
    strong = yardstick.best
    need = quality[:, strong] - quality[:, 1 - strong]
    of = np.asarray(dev.benchmark)
    told: dict[str, dict[str, float | None]] = {}
    for benchmark in np.unique(of).tolist():
        here = of == benchmark
        two = pair(need[here], dev.quality[here, 1 - strong], dev.quality[here, strong])
        if two is not None:
            told[benchmark] = {"apgr": two.apgr, "cpt50": two.cpt50, "cpt80": two.cpt80}
    return told


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

"""Outcomes in, a router that the service can load out. Knows families through `crossfit.py` alone,
and no file format."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from composer.routing.artefact import DataStamp, EmbedderStamp, ExpertStamp, Manifest
from composer.routing.costs import VIEWS as COST_VIEWS
from composer.routing.costs import CostModel
from composer.routing.families import FAMILIES
from composer.routing.families.sharing import digest, shared
from composer.routing.family import Family, decided
from composer.routing.joining import JoinPrior, Newcomers
from composer.routing.model import LearnedModel, Scored
from composer.routing.outcomes import Outcomes
from composer.routing.trained import TrainedQueries
from composer.routing.views import Encode, Features, View, Views, rows_of
from composer.types import FloatArray
from router_training.baselines import mean_costs
from router_training.cells import listed
from router_training.choice import earned_apart, ranking
from router_training.criterion import Criterion, need_decisions, need_prices
from router_training.crossfit import (
    Chosen,
    CrossFit,
    by_stem,
    calibration_of,
    folds_by_stem,
    kind_of,
)
from router_training.errors import TrainingError
from router_training.intervals import paired
from router_training.knob import CurveTrial, curve_of
from router_training.measures import earned
from router_training.progress import Progress, silent
from router_training.rejection import rejectable, threshold_of
from router_training.scorecard import Yardstick, scorecard
from router_training.split import parts
from router_training.suited import grid_of, suited
from router_training.yardsticks import yardstick_values

BEST = "best"

UNDECIDED = (
    "no question has known outcomes of two experts, so no decision can be judged: settings are the "
    "family's defaults, and there is no curve"
)


def train(
    outcomes: Outcomes,
    router: str,
    encode: Encode,
    embedder: EmbedderStamp,
    *,
    dev: Outcomes | None = None,
    source: str = "",
    budgets: Sequence[float] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> LearnedModel:
    """A family by name, or `best`: the one whose cross-fitted decisions earn most, or as much as
    can be told, with the lowest Brier score.

    `dev` is judged on once and decides nothing. `budgets` are shares of the best single expert's
    mean cost: settings and family are then chosen by the mean quality within them, not by the best
    quality there is. The manifest's metrics tell what was chosen and why, and what it reached.
    Questions with fewer than two known outcomes are fitted on and decide nothing; where there are
    no others a family has its default settings and no curve, and `best` and budgets are refused.
    Raises TrainingError.
    """
    if router == BEST:
        need_decisions(outcomes, f"the router {BEST!r}")
    if budgets:
        need_prices(outcomes, source)
    families, left = suited(outcomes, list(FAMILIES)) if router == BEST else ([router], {})
    workshop = Workshop(outcomes, families, encode, budgets=budgets, seed=seed, progress=progress)
    chosen, choice = workshop.best(families) if router == BEST else (workshop.choose(router), None)
    if choice is not None:
        choice = {**choice, "left_out": left}
    model = workshop.model(chosen, embedder, source=source, choice=choice)
    if dev is not None:
        judged = workshop.judged(model, same_experts(dev, outcomes.experts), encode)
        metrics = {**model.manifest.metrics, **judged}
        model.manifest = model.manifest.model_copy(update={"metrics": metrics})
    return model


class Workshop:
    """One pool's questions made ready once for all families: views, folds, expected costs.

    Views are fitted on all questions and not anew in each fold: they see no outcome, so all that a
    held-out question gives away is which words there are.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        families: Sequence[str],
        encode: Encode,
        *,
        budgets: Sequence[float] = (),
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        kinds = [kind_of(family) for family in families]
        self.outcomes = by_stem(_usable(outcomes))
        self.seed = seed
        self.yardstick = Yardstick.fit(self.outcomes)
        names: set[View] = {"embedding"}  # by which experts join
        names |= set(COST_VIEWS) if self.outcomes.priced else set()
        for kind in kinds:
            grid = grid_of(kind, self.outcomes)
            names |= {view for settings in grid for view in kind.views(settings)}
        self.views, self.features = shared(
            lambda: ("views", digest(self.outcomes.text, sorted(names))),
            lambda: _seen(self.outcomes.text, names, encode),
        )
        self.fold = folds_by_stem(self.outcomes, seed)
        self.costs, self.expected_cost = self._costs(progress)
        self.criterion = self._criterion(budgets)
        self._crossfit = CrossFit(
            self.features,
            self.outcomes,
            criterion=self.criterion,
            fold=self.fold,
            seed=seed,
            progress=progress,
        )

    def _criterion(self, budgets: Sequence[float]) -> Criterion:
        self.budgets = tuple(budgets)
        if budgets:
            need_prices(self.outcomes)
            need_decisions(self.outcomes, "budgets")
            single = float(mean_costs(self.outcomes)[self.yardstick.best])
            return Criterion(tuple(share * single for share in budgets), self.expected_cost)
        if len(self.outcomes.experts) == 2 and self.costs is None and self.outcomes.known.all():
            # Of a weak and a strong expert the strong one is nearly always the better guess: what
            # a router of the two is for is to need it seldom.
            return Criterion(strong=self.yardstick.best)
        return Criterion()

    def within(self, budgets: Sequence[float]) -> Workshop:
        """The same questions with the same fits, chosen from by mean quality within budgets.
        Raises TrainingError without prices."""
        other = copy(self)
        other.criterion = other._criterion(budgets)
        other._crossfit = self._crossfit.by(other.criterion)
        return other

    def _costs(self, progress: Progress) -> tuple[CostModel | None, FloatArray | None]:
        """The cost model of all questions, and what its like says of questions it had not seen."""
        if not self.outcomes.priced:
            return None, None
        out = np.empty_like(self.outcomes.quality)
        folds = parts(self.fold)
        for number, (seen, held) in enumerate(folds):
            progress("expected costs", number, len(folds))
            some = self.outcomes.rows(seen)
            asked = np.flatnonzero((~np.isnan(some.cost)).any(axis=0))
            fitted = CostModel.fit(
                rows_of(self.features, seen), some.of([some.experts[e] for e in asked])
            )
            # Who is asked in one fold alone has no cost elsewhere: there it is that of the others.
            out[held] = np.nanmean(some.cost, dtype=np.float64)
            out[np.ix_(held, asked)] = fitted.predict(rows_of(self.features, held))
        progress("expected costs", len(folds), len(folds))
        return CostModel.fit(self.features, self.outcomes), out

    def choose(self, family: str) -> Chosen:
        """As `CrossFit.choose`."""
        return self._crossfit.choose(family)

    def choose_uncalibrated(self, family: str, grid: Sequence[BaseModel]) -> Chosen:
        """As `CrossFit.choose_uncalibrated`."""
        return self._crossfit.choose_uncalibrated(family, grid)

    def fit(self, chosen: Chosen) -> Family:
        """On all questions."""
        return self._crossfit.fit(chosen)

    def best(self, families: Sequence[str]) -> tuple[Chosen, dict[str, Any]]:
        """Of the families that are behind the highest cross-fitted mean by no more than one
        standard error, that with the lowest Brier score: who decides as well, as far as can be
        told, and knows better how well it does. Also what each reached, and why it is this one, in
        plain values. Some question is `decidable`."""
        every = [self.choose(family) for family in families]
        ranked = ranking(every, self.outcomes)
        group = self.outcomes.group[self.outcomes.decidable]
        rows: dict[str, dict[str, Any]] = {}
        for row in ranked.rows:
            around = paired(row.behind, group, seed=self.seed)
            assert around is not None  # whoever asks for the best has decidable questions
            rows[row.family] = {
                "value": row.value,
                "behind": around.mean,
                "ci95": [around.low, around.high],
                "standard_error": row.error,
                "brier": row.brier,
            }
        why = self._why(ranked.best, ranked.rows[0].family, rows, ranked.near)
        return self.choose(ranked.best), {"families": rows, "why": why}

    def best_apart(self, families: Sequence[str]) -> npt.NDArray[np.float64]:
        """(n,) what the family earns that `best` chooses on the other folds."""
        return earned_apart([self.choose(f) for f in families], self.outcomes, self.fold)

    def _why(self, winner: str, top: str, rows: Mapping[str, Mapping[str, Any]], near: int) -> str:
        by = self.criterion.words
        row = rows[winner]
        if near == 1:
            return f"{winner}: the highest cross-fitted {by} ({100 * row['value']:.2f})"
        place = f"{100 * row['behind']:.2f} ± {100 * row['standard_error']:.2f} behind {top}"
        return (
            f"{winner}: the lowest Brier score ({row['brier']:.4f}) of the {near} families within "
            f"one standard error of the highest cross-fitted {by}: {100 * row['value']:.2f}, "
            f"{'the highest itself' if winner == top else place}"
        )

    def model(
        self,
        chosen: Chosen,
        embedder: EmbedderStamp,
        *,
        source: str = "",
        choice: Mapping[str, Any] | None = None,
    ) -> LearnedModel:
        """Fitted on all questions. Calibration and curve are of the out-of-fold predictions."""
        family = self.fit(chosen)
        outcomes = self.outcomes
        names = set(type(family).views(chosen.settings))
        if self.costs is not None:
            names |= set(COST_VIEWS)
        prior = JoinPrior.fit(chosen.quality, outcomes, self.features["embedding"], seed=self.seed)
        manifest = Manifest(
            family=chosen.family,
            settings=chosen.settings.model_dump(mode="json"),
            embedder=embedder,
            experts=_stamps(outcomes, self.yardstick),
            data=DataStamp(source=source, digest=digest_of(outcomes), questions=len(outcomes)),
            curve=curve_of(
                chosen.quality, self.expected_cost, outcomes, self.yardstick.best, seed=self.seed
            ),
            metrics=self._metrics(chosen, choice),
        )
        return LearnedModel(
            manifest,
            self.views.only(names),
            family,
            calibration_of(chosen.raw, outcomes, chosen.signs),
            self.costs,
            Newcomers(prior, {}),
            TrainedQueries.of(outcomes.text),
        )

    def _metrics(self, chosen: Chosen, choice: Mapping[str, Any] | None) -> dict[str, Any]:
        threshold = self._threshold(chosen)
        card = scorecard(
            self.outcomes,
            self.yardstick,
            chosen.quality,
            expected_cost=self.expected_cost,
            threshold=threshold,
            seed=self.seed,
        )
        tried = [
            {
                "settings": trial.settings.model_dump(mode="json"),
                "value": trial.value,
                "behind_best": trial.behind,
                "standard_error": trial.error,
            }
            for trial in chosen.trials
        ]
        metrics: dict[str, Any] = {
            "seed": self.seed,
            "budgets": list(self.budgets),
            "cross_fitted": card,
            "threshold": threshold,
            "settings_tried": tried,
            "yardstick": yardstick_values(self.yardstick),
        }
        if not self.outcomes.decidable.any():
            metrics["note"] = UNDECIDED
        return metrics if choice is None else {**metrics, "choice": dict(choice)}

    def _threshold(self, chosen: Chosen) -> float | None:
        """On the best quality, below which a request is better turned away; None where the outcomes
        have nothing to turn away."""
        outcomes = self.outcomes
        if not rejectable(outcomes):
            return None
        best = decided(chosen.quality, outcomes.known)
        right = earned(outcomes.quality, best) == 1
        return threshold_of(earned(chosen.quality, best), right, outcomes.in_scope)

    def judged(self, model: LearnedModel, dev: Outcomes, encode: Encode) -> dict[str, Any]:
        """What a model reaches on questions that decided nothing. Raises TrainingError."""
        features = model.views.transform(dev.text, encode)
        return self.card(model, dev, model.score_features(features))

    def card(self, model: LearnedModel, dev: Outcomes, scored: Scored) -> dict[str, Any]:
        """The same from what it said of them."""
        threshold = model.manifest.metrics["threshold"]
        card = self.judge(scored.quality, scored.cost, dev, threshold=threshold)
        curve, promises = model.manifest.curve, None
        if curve is not None and scored.cost is not None:
            promises = CurveTrial(
                curve, scored.quality, scored.cost, dev, self.yardstick.best, self.seed
            ).kept_promises()
        return {"dev": card, "dev_promises": promises}

    def judge(
        self,
        quality: FloatArray,
        expected_cost: FloatArray | None,
        dev: Outcomes,
        *,
        threshold: float | None = None,
    ) -> dict[str, Any]:
        """The scorecard of decisions by `quality` (n, E). Raises TrainingError."""
        try:
            return scorecard(
                dev,
                self.yardstick,
                quality,
                expected_cost=expected_cost,
                threshold=threshold,
                seed=self.seed,
            )
        except ValueError as error:
            raise TrainingError(f"the questions to judge on: {error}") from error


def _seen(texts: Sequence[str], names: Collection[View], encode: Encode) -> tuple[Views, Features]:
    views = Views.fit(texts, names)
    return views, views.transform(texts, encode)


def same_experts(dev: Outcomes, experts: Sequence[str]) -> Outcomes:
    """Those trained on, in their order. Raises TrainingError where one is not there."""
    if unknown := [expert for expert in experts if expert not in dev.experts]:
        raise TrainingError(
            f"the questions to judge on have no outcomes of {listed(unknown)}; name others, or "
            "leave these experts out of the pool"
        )
    return dev.of(experts)


def digest_of(outcomes: Outcomes) -> str:
    """SHA-256 of experts, texts and outcomes in order."""
    digest = hashlib.sha256()
    for text in (*outcomes.experts, "", *outcomes.text):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    for array in (outcomes.quality, outcomes.cost):
        digest.update(np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()


def _usable(outcomes: Outcomes) -> Outcomes:
    """Only the questions with an outcome. Raises TrainingError where an expert has none."""
    known = outcomes.known
    if silent_ones := [
        expert for expert, k in zip(outcomes.experts, known.T, strict=True) if not k.any()
    ]:
        raise TrainingError(
            f"no outcome is known of {listed(silent_ones)}; collect some, or leave them out of "
            "the pool"
        )
    if len(outcomes.experts) < 2:
        raise TrainingError(
            f"there is {len(outcomes.experts)} expert and nothing to choose from; name two or more"
        )
    return outcomes.rows(np.asarray(known.any(axis=1), np.bool_))


def _stamps(outcomes: Outcomes, yardstick: Yardstick) -> tuple[ExpertStamp, ...]:
    costs = mean_costs(outcomes)
    return tuple(
        ExpertStamp(id=expert, quality=float(rate), cost=None if np.isnan(cost) else float(cost))
        for expert, rate, cost in zip(outcomes.experts, yardstick.rates, costs, strict=True)
    )

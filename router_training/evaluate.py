"""Artefacts judged on outcomes, beside the baselines. Fits nothing, and knows no family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from composer.routing.artefact import ArtefactError
from composer.routing.model import LearnedModel
from composer.routing.outcomes import Outcomes
from composer.routing.views import Encode
from composer.types import FloatArray
from router_training.cells import listed
from router_training.curves import BUDGETS
from router_training.errors import TrainingError
from router_training.knob import CurveTrial
from router_training.loading import load_router
from router_training.overlap import Overlap, parted
from router_training.progress import Progress, silent
from router_training.scorecard import Yardstick, baseline_cards, scorecard
from router_training.vectors import Model
from router_training.yardsticks import yardstick_of

MEASURES = (
    "avg_acc",
    "per_benchmark",
    "mean_cost",
    "gain_at_best",
    "gap_closed",
    "aiq",
    "apgr",
    "cpt50",
    "cpt80",
    "brier",
    "brier_base_rate",
    "ece",
    "budget_acc",
)

SCOPE = "scope"
"""Where the table has questions that are nobody's, and only there."""

KNOB = "knob"
"""Where the artefact has a curve and the table prices, and only there."""

TIMED = 100
"""Decisions that the median time is taken of, after UNTIMED others."""

UNTIMED = 5


@dataclass(frozen=True, slots=True)
class Latency:
    """Median milliseconds of one decision on one core: with embedding the query, and the rest
    alone."""

    decision_ms: float
    without_embedding_ms: float


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One artefact: `card` as `scorecard` makes it of `predicted` quality and `expected_cost` on
    the evaluation's outcomes, (n, E) each; in US dollars, None where it knows no price. `overlap`
    tells how many of the questions it was trained on, `knob` what its curve promised and kept on
    these, as `CurveTrial.kept_promises` has it."""

    name: str
    router: str
    card: Mapping[str, Any]
    latency: Latency
    overlap: Overlap
    predicted: FloatArray
    expected_cost: FloatArray | None
    knob: Sequence[Mapping[str, Any]] | None = None

    def as_json(self) -> dict[str, Any]:
        measured = {name: self.card[name] for name in MEASURES}
        if self.card[SCOPE] is not None:
            measured[SCOPE] = self.card[SCOPE]
        if self.knob is not None:
            measured[KNOB] = list(self.knob)
        if measured["budget_acc"] is None:
            measured["budget_acc"] = {f"{share:.2f}": None for share in BUDGETS}
        return {
            "name": self.name,
            "router": self.router,
            **measured,
            "decision_ms_p50": self.latency.decision_ms,
            "ci95": self.card["ci95"],
            "trained_on": self.overlap.as_json(),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """`outcomes` are those judged on, `yardstick` what they are held against."""

    artefacts: tuple[Judged, ...]
    baselines: Mapping[str, Any]
    outcomes: Outcomes
    yardstick: Yardstick

    def as_json(self) -> dict[str, Any]:
        """`evaluate --json`: a measure that needs a score, a length or a price that is missing is
        None. Baselines have the same measures as far as they mean something there."""
        return {
            "artefacts": [judged.as_json() for judged in self.artefacts],
            "baselines": dict(self.baselines),
        }


def evaluate(
    folders: Sequence[Path],
    outcomes: Outcomes,
    embedder: Model,
    *,
    encode_anew: Encode | None = None,
    without_trained: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """All artefacts on the same questions and experts. Best single expert, base rates and the best
    by category are those of the first artefact's training data, which it carries.

    `encode_anew` embeds without remembering, for the time that a decision takes; without it
    `embedder` is timed. Raises ArtefactError for an artefact that cannot be used or does not fit:
    the data has to have outcomes of all its experts, and the artefacts the same experts. Questions
    with one known outcome say how well quality was foretold, and nothing of decisions.
    `without_trained` leaves out the questions that one of the artefacts was trained on.
    """
    if not folders:
        raise TrainingError("there is no artefact to evaluate; name at least one folder")
    models = []
    for folder in folders:
        model = load_router(folder, embedder).model
        _check_experts(model, folder, outcomes.experts, "the data has no outcomes of them")
        models.append(model)
    first = models[0].experts
    for model, folder in zip(models, folders, strict=True):
        _check_experts(model, folder, first, f"{folders[0]} does not know them")
        if len(model.experts) < len(first):
            raise ArtefactError(
                f"{folder} knows nothing of "
                f"{listed([e for e in first if e not in model.experts])}, which {folders[0]} "
                "chooses from; evaluate the two apart, or train them on the same experts"
            )
    outcomes = outcomes.of(first)
    rows = np.asarray(outcomes.known.any(axis=1), np.bool_)
    if not rows.any():
        raise TrainingError("no question has a known outcome of these experts; name other data")
    outcomes, overlaps = parted(
        outcomes.rows(rows), [model.trained for model in models], without=without_trained
    )
    yardstick = yardstick_of(models[0].manifest, first)
    judged = []
    for number, (model, folder) in enumerate(zip(models, folders, strict=True)):
        progress("evaluating", number, len(models))
        columns = [model.experts.index(expert) for expert in first]
        scored = model.score(outcomes.text, embedder.encode)
        quality = scored.quality[:, columns]
        cost = None if scored.cost is None else scored.cost[:, columns]
        if cost is not None and np.isnan(cost).any():
            cost = None  # an expert joined without a price
        card = scorecard(
            outcomes,
            yardstick,
            quality,
            expected_cost=cost,
            threshold=model.manifest.metrics.get("threshold"),
            seed=seed,
        )
        latency = timed(model, outcomes.text, encode_anew or embedder.encode)
        name = folder.resolve().name
        knob = _knob(model, first, quality, cost, outcomes, seed)
        family, overlap = model.manifest.family, overlaps[number]
        judged.append(Judged(name, family, card, latency, overlap, quality, cost, knob))
    progress("evaluating", len(models), len(models))
    baselines = baseline_cards(outcomes, yardstick, seed=seed)
    return Evaluation(tuple(judged), baselines, outcomes, yardstick)


def _knob(
    model: LearnedModel,
    experts: Sequence[str],
    quality: FloatArray,
    cost: FloatArray | None,
    outcomes: Outcomes,
    seed: int,
) -> Sequence[Mapping[str, Any]] | None:
    """None without a curve or prices, or where an expert joined: the curve knows nothing of it."""
    curve = model.manifest.curve
    if curve is None or cost is None or model.manifest.joined:
        return None
    best = yardstick_of(model.manifest, experts).best
    return CurveTrial(curve, quality, cost, outcomes, best, seed).kept_promises()


def timed(model: LearnedModel, texts: Sequence[str], encode: Encode) -> Latency:
    """One text at a time, as requests come, on one thread. The texts are spread over all given."""
    return timed_in_turn([model], texts, encode)[0]


def timed_in_turn(
    models: Sequence[LearnedModel], texts: Sequence[str], encode: Encode
) -> list[Latency]:
    """`timed` of each, all of them on one text before the next: whatever else a machine does
    meanwhile falls on all alike."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    number = min(len(texts), TIMED + UNTIMED)
    some = [texts[i] for i in np.linspace(0, len(texts) - 1, number).astype(int)]
    times = np.empty((2, len(some), len(models)))  # whole, and without embedding
    inside = 0.0

    def measured(wanted: Sequence[str]) -> FloatArray:
        nonlocal inside
        begun = perf_counter()
        rows = encode(wanted)
        inside += perf_counter() - begun
        return rows

    with threadpool_limits(1):
        for row, text in enumerate(some):
            for column, model in enumerate(models):
                inside = 0.0
                begun = perf_counter()
                model.score([text], measured).quality[0].argmax()
                whole = perf_counter() - begun
                times[:, row, column] = whole, whole - inside
    skipped = UNTIMED if len(some) > UNTIMED else 0
    wholes, rests = 1000 * np.median(times[:, skipped:], axis=1)
    return [Latency(float(w), float(r)) for w, r in zip(wholes, rests, strict=True)]


def _check_experts(model: LearnedModel, folder: Path, known: Sequence[str], why: str) -> None:
    if unknown := [expert for expert in model.experts if expert not in known]:
        raise ArtefactError(
            f"{folder} chooses from {listed(unknown)}, too, and {why}; name data and artefacts of "
            "the same experts"
        )

"""The head of a vote from recorded answers: how far groups of equal answers are to be believed, and
when asking on is worth nothing. Knows routers through `crossfit.py` alone; what a head computes is
`composer/strategies/voting/head.py`, which serves it, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.artefact import Manifest
from composer.routing.families import FAMILIES
from composer.routing.families.skills import Skills
from composer.routing.outcomes import IntArray, Outcomes
from composer.routing.views import Encode, Views
from composer.strategies.extract import Extractor, make_extractor
from composer.strategies.voting.head import DOUBTS, STATE, Groups, Head, log_odds_of, state_of
from composer.strategies.voting.learnt import HeadFile, Stop
from composer.types import FloatArray
from router_training.cells import listed
from router_training.crossfit import by_stem, calibrated_apart, folds_by_stem, out_of_fold
from router_training.data import Answers, Dataset
from router_training.errors import TrainingError
from router_training.progress import Progress, silent
from router_training.split import parts
from router_training.train import digest_of

Float64 = npt.NDArray[np.float64]

MOST = 5
"""Experts asked at most."""

RIDGE = 1.0
LATE = 3.0
"""How much more the last number of calls weighs than the first: it decides most answers."""
LEAST_FOLLOW = 0.02
"""Where agreement says it all, who is better still breaks ties, and never the other way round."""
GAIN_RIDGE = 30.0
FOLDS = 5
STEPS = 0.25
"""Between the mean numbers of calls whose bounds are kept."""

RIGHT = 0.5
"""An answer scored above this counts as right where heads are fitted; accuracies are of scores."""


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """Questions as a vote sees them, the K best experts by expected quality in order: `answers`
    (n, K) numbers equal where answers are, −1 for none; `log_odds` (n, K) cut; `score` (n, K) of
    their answers; `group` (n,) equal where rows are one question."""

    answers: IntArray
    log_odds: Float64
    score: FloatArray
    group: IntArray

    @classmethod
    def of(
        cls, numbers: IntArray, quality: FloatArray, outcomes: Outcomes, most: int = MOST
    ) -> Heard:
        """`numbers` (n, E) of answers (`numbered`), `quality` (n, E) expected of experts that had
        not seen the question."""
        order = np.argsort(-quality, axis=1, kind="stable")[:, :most]
        expected = np.take_along_axis(quality, order, axis=1)
        score = np.nan_to_num(np.take_along_axis(outcomes.quality, order, axis=1))
        answers = np.take_along_axis(numbers, order, axis=1)
        return cls(answers, log_odds_of(expected), score, outcomes.group)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def most(self) -> int:
        return int(self.answers.shape[1])

    def rows(self, chosen: npt.NDArray[Any]) -> Heard:
        own = (a[chosen] for a in (self.answers, self.log_odds, self.score, self.group))
        return Heard(*own)

    def after(self, k: int) -> Groups:
        """Once the k best have answered."""
        return Groups.of(self.answers[:, :k], self.log_odds[:, :k])

    def ahead(self, k: int) -> Float64:
        """(n,) log-odds of who would be asked next, 0 where nobody is left."""
        return self.log_odds[:, k] if k < self.most else np.zeros(len(self))


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What a head says of questions after 1 … K calls: `score` (n, K) of the answer it would give,
    `probability` (n, K) that it is right, `state` (n, K, 8), and `settled` (n,): after how many
    calls no further one can change the answer."""

    score: Float64
    probability: Float64
    state: Float64
    settled: IntArray

    @classmethod
    def nothing(cls, n: int, most: int) -> Told:
        """To be filled in."""
        state, settled = np.zeros((n, most, STATE)), np.full(n, most, np.int64)
        return cls(np.zeros((n, most)), np.zeros((n, most)), state, settled)


def numbered(answers: Answers, extract: Extractor) -> IntArray:
    """(n, E) numbers, equal in a row where the extracted forms are; −1 for no answer."""
    out = np.full(answers.given.shape, -1, np.int64)
    for row, cells in enumerate(answers.given):
        seen: dict[str, int] = {}
        for e, cell in enumerate(cells):
            key = None if cell is None else extract(cell)
            if key is not None:
                out[row, e] = seen.setdefault(key, len(seen))
    return out


def fit_head(heard: Heard) -> Head:
    """By maximum penalised likelihood over all numbers of calls at once; where several groups are
    right, any of them will do. `gain` is that of the same questions. Raises TrainingError."""
    head = _fit_posterior(heard)
    told = tell(head, heard)
    return replace(head, gain=_fit_gain(told.state, told.score))


def tell(head: Head, heard: Heard) -> Told:
    """A question that nobody answered is given the best expert's silence."""
    n, most = heard.answers.shape
    rows = np.arange(n)
    told = Told.nothing(n, most)
    worth = head.worth(heard.log_odds)
    for k in range(1, most + 1):
        groups = heard.after(k)
        p, _ = head.posterior(groups)
        leader = p.argmax(axis=1)
        told.score[:, k - 1] = heard.score[rows, leader]
        told.probability[:, k - 1] = p[rows, leader]
        told.state[:, k - 1] = state_of(head, groups, heard.ahead(k))
        stands = (told.settled == most) & head.settled(groups, worth[:, k:])
        told.settled[stands] = k
    return told


def crossfitted(heard: Heard, seed: int = 0) -> tuple[Told, Float64]:
    """What heads fitted on other questions say of each, and (n, K − 1) the gain they expect."""
    fold = _folds(heard.group, seed)
    n, most = heard.answers.shape
    told = Told.nothing(n, most)
    gain = np.zeros((n, most - 1))
    for seen, held in parts(fold):
        head = fit_head(heard.rows(seen))
        own = tell(head, heard.rows(held))
        told.score[held], told.probability[held] = own.score, own.probability
        told.state[held], told.settled[held] = own.state, own.settled
        gain[held] = expected_gain(head, own)
    return told, gain


def expected_gain(head: Head, told: Told) -> Float64:
    """(n, K − 1) of asking on after each number of calls."""
    return np.asarray(
        (told.state[:, :-1] * head.gain[:, :-1]).sum(axis=2) + head.gain[:, -1], np.float64
    )


def calls_at(told: Told, gain: Float64, bound: float, first: int) -> IntArray:
    """(n,) calls spent: the first `first` at once, then one by one while another can change the
    answer and the expected gain (n, K − 1) is not below the bound."""
    stops = gain[:, first - 1 :] < bound
    last = gain.shape[1] + 1 - first
    calls = np.where(stops.any(axis=1), stops.argmax(axis=1), last) + first
    return np.asarray(np.minimum(calls, np.maximum(told.settled, first)), np.int64)


def bound_of(told: Told, gain: Float64, first: int, calls: float) -> float:
    """The least bound that leads to no more than so many calls on average."""
    tried = np.unique(np.quantile(gain[:, first - 1 :], np.linspace(0, 1, 400)))
    for bound in tried:
        if calls_at(told, gain, float(bound), first).mean() <= calls:
            return float(bound)
    return float(np.nextafter(tried[-1], np.inf))


def curve(told: Told, gain: Float64, first: int) -> tuple[Stop, ...]:
    """From as few calls as can be to nearly all."""
    most = told.score.shape[1]
    rows = np.arange(len(gain))
    stops: list[Stop] = []
    for target in np.arange(first, most + STEPS / 2, STEPS):
        bound = bound_of(told, gain, first, float(target))
        calls = calls_at(told, gain, bound, first)
        reached = float(calls.mean())
        if stops and reached <= stops[-1].calls:
            continue
        accuracy = float(told.score[rows, calls - 1].mean())
        stops.append(Stop(calls=reached, bound=bound, accuracy=accuracy))
    return tuple(stops)


def head_file(
    heard: Heard,
    *,
    experts: Sequence[str],
    extractor: str,
    pattern: str | None = None,
    source: dict[str, Any] | None = None,
    seed: int = 0,
) -> HeadFile:
    """The head fitted on all, with curves and figures of the cross-fitted ones."""
    told, gain = crossfitted(heard, seed)
    return HeadFile.of(
        fit_head(heard),
        experts=tuple(experts),
        extractor=extractor,
        pattern=pattern,
        curves={first: curve(told, gain, first) for first in range(1, heard.most)},
        source=source or {},
        metrics={
            "questions": len(heard),
            "by_calls": told.score.mean(axis=0).tolist(),
            "brier": float(((told.probability[:, -1] - told.score[:, -1]) ** 2).mean()),
        },
    )


def votes(
    data: Dataset,
    manifest: Manifest,
    encode: Encode,
    *,
    extractor: str,
    pattern: str | None = None,
    most: int = MOST,
    seed: int = 0,
    progress: Progress = silent,
) -> HeadFile:
    """A head for the votes of an artefact's experts, fitted on what its family with its settings
    says of questions that it had not seen. Raises TrainingError."""
    names = [expert.id for expert in manifest.experts]
    if unknown := [name for name in names if name not in data.outcomes.experts]:
        raise TrainingError(
            f"the data has no outcomes of the artefact's expert {unknown[0]!r}; give the data it "
            "was trained on"
        )
    data = data.of(names)
    _check_skills(data.outcomes, manifest)
    if data.answers is None:
        raise TrainingError(
            "the data has no answers, only scores; votes need columns `answer|EXPERT`"
        )
    if not 2 <= most <= len(names):
        raise TrainingError(
            f"{most} experts of {len(names)} cannot be asked; choose from 2 to {len(names)}"
        )
    known = np.asarray(data.outcomes.known.all(axis=1), np.bool_)
    if not known.any():
        raise TrainingError("no question has an outcome of every expert; give more outcomes")
    data = data.rows(known)
    outcomes = by_stem(data.outcomes)
    quality = crossfitted_quality(outcomes, manifest, encode, seed, progress)
    assert data.answers is not None
    numbers = numbered(data.answers, make_extractor(extractor, pattern))
    return head_file(
        Heard.of(numbers, quality, outcomes, most),
        experts=names,
        extractor=extractor,
        pattern=pattern,
        source={
            "family": manifest.family,
            "router_data": manifest.data.digest,
            "data": digest_of(outcomes),
        },
        seed=seed,
    )


def _check_skills(outcomes: Outcomes, manifest: Manifest) -> None:
    """Raises TrainingError where these questions do not ask for the skills of an artefact of the
    family `skills`: the head would be fitted on another router's scores."""
    own = manifest.values.get("family", {}).get("names", ()) if manifest.family == "skills" else ()
    if not Skills.named(own):
        return
    every = outcomes.skills or zip(outcomes.category, outcomes.benchmark, strict=True)
    there = {skill for asked in every for skill in asked}
    if lacking := [name for name in own if name not in there]:
        given = "give the profile that it was trained with (--skills)"
        if outcomes.skills:
            given += ", or leave --skills out if that was none"
        raise TrainingError(
            f"the artefact reads skills that no question of these data asks for "
            f"({listed(lacking)}); {given}"
        )


def crossfitted_quality(
    outcomes: Outcomes, manifest: Manifest, encode: Encode, seed: int, progress: Progress
) -> FloatArray:
    """(n, E) calibrated, each fold from fits on the others. Raises TrainingError."""
    kind = FAMILIES.get(manifest.family)
    if kind is None:
        raise TrainingError(
            f"the artefact's family {manifest.family!r} is not known here; update this program"
        )
    settings = kind.settings.model_validate(manifest.settings)
    features = Views.fit(outcomes.text, kind.views(settings)).transform(outcomes.text, encode)
    fold = folds_by_stem(outcomes, seed)
    raw = out_of_fold(kind, [settings], features, outcomes, fold, seed, progress)[0]
    return calibrated_apart(raw, outcomes, fold)


def _fit_posterior(heard: Heard) -> Head:
    from scipy.optimize import minimize

    design = [_design(heard, k) for k in range(1, heard.most + 1)]
    x, begins, doubts, right, weight = (
        np.concatenate([part[i] for part in design]) for i in range(5)
    )
    total = right.sum(axis=1)
    target = right / np.maximum(total, 1)[:, None]
    nobody = (total == 0).astype(np.float64)
    width = x.shape[2]

    def loss(w: Float64) -> tuple[float, Float64]:
        scores = np.where(begins, x @ w[:width], -np.inf)
        none = doubts @ w[width:]
        top = np.maximum(scores.max(axis=1), none)
        odds, left = np.exp(scores - top[:, None]), np.exp(none - top)
        z = odds.sum(axis=1) + left
        said = (target * np.where(begins, scores, 0)).sum(axis=1) + nobody * none
        off = weight[:, None] * (odds / z[:, None] - target)
        slope = np.concatenate(
            [np.einsum("nk,nkd->d", off, x), doubts.T @ (weight * (left / z - nobody))]
        )
        value = (weight * (np.log(z) + top - said)).sum() + RIDGE / 2 * (w @ w)
        return float(value), slope + RIDGE * w

    start = np.zeros(width + DOUBTS)
    start[0] = LEAST_FOLLOW
    bounds = [(LEAST_FOLLOW, None), *[(None, None)] * (len(start) - 1)]
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500}
    )
    if not np.isfinite(found.x).all():
        raise TrainingError("the head could not be fitted: the answers' scores are not numbers")
    w = np.asarray(found.x, np.float64)
    gain = np.zeros((heard.most - 1, STATE + 1))
    return Head(float(w[0]), float(w[1]), w[2:width], w[width:], gain)


def _design(
    heard: Heard, k: int
) -> tuple[Float64, npt.NDArray[np.bool_], Float64, Float64, Float64]:
    """After k calls: of each place (n, K, 2 + K − 1), whether a group begins there and whether it
    is right (n, K), the doubts (n, 6), and the rows' weight (n,)."""
    n, most = heard.answers.shape
    groups = heard.after(k)
    x = np.zeros((n, most, most + 1))
    x[:, :k, 0] = groups.total
    x[:, 0, 1] = groups.begins[:, 0]
    x[:, :k, 2:] = groups.size[:, :, None] == np.arange(2, most + 1)
    begins, right = np.zeros((n, most), np.bool_), np.zeros((n, most))
    begins[:, :k] = groups.begins
    right[:, :k] = (heard.score[:, :k] > RIGHT) & groups.begins
    weight = (1 + (LATE - 1) * (k - 1) / max(1, most - 1)) / most
    return x, begins, groups.doubts(), right, np.full(n, weight)


def _fit_gain(state: Float64, score: Float64) -> Float64:
    """(K − 1, 9) ridge regressions of (score after K calls − score now) on standardised φ."""
    rows = []
    for k in range(score.shape[1] - 1):
        x, y = state[:, k], score[:, -1] - score[:, k]
        mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-3
        z = (x - mean) / deviation
        w = np.linalg.solve(z.T @ z + GAIN_RIDGE * np.eye(STATE), z.T @ (y - y.mean())) / deviation
        rows.append(np.append(w, y.mean() - mean @ w))
    return np.stack(rows)


def _folds(group: IntArray, seed: int) -> IntArray:
    """(n,) whole groups at random. Raises TrainingError for fewer than two."""
    _, number = np.unique(group, return_inverse=True)
    count = int(number.max()) + 1
    if count < 2:
        raise TrainingError("one question cannot be cross-validated; give more outcomes")
    return np.asarray(np.random.default_rng(seed).permutation(count)[number] % FOLDS, np.int64)

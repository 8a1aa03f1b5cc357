"""Which few of many experts are worth registering for a task, from K examples with as few
evaluations as that takes. Knows no file and no service: `evaluate` asks.

Successive elimination by rounds of examples that double (as in successive halving: Karnin, Koren &
Somekh, ICML 2013), who stays decided by a posterior in place of a fixed half: score = an expert's
mean + the example's difficulty + noise, all normal, their widths estimated from the scores so far.
As all who are left answer the same examples, difficulty cancels between them. Similarity of an
expert's description to the examples, where given, is one more regressor of its mean, whose slope
the scores have to show.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.types import FloatArray
from router_training.errors import TrainingError
from router_training.progress import Progress, silent

Evaluate = Callable[[str, Sequence[int]], Awaitable[Sequence[float | None]]]
"""An expert's scores, 0 to 1, on some of the examples by number; None where it has none."""

Float64 = npt.NDArray[np.float64]

FIRST, FIRST_DESCRIBED = 4, 2
"""Examples that every candidate is tried on, without and with descriptions."""

DRAWS = 4000

PRIOR_VARIANCE, PRIOR_WORTH = 0.15, 4.0
"""Of a score about its expectation, before any is seen, and the scores that this is worth."""

SPREAD, SLOPE = 0.15, 0.5
"""Standard deviation of the experts' means before any score, and of what one standard deviation of
similarity adds to them."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one candidate: `expected` score on the task, between `low` and `high` with 95 %, from
    `evaluations`; `likely` is the probability that it is among the best."""

    expert: str
    expected: float
    low: float
    high: float
    likely: float
    evaluations: int
    scores: int
    """Of the evaluations, those that gave a score. Without any nothing is known of a candidate: the
    expectation is the prior's, and it is not kept."""


@dataclass(frozen=True, slots=True)
class Selection:
    """`standings` are the best first, the first `keep` of them kept, but for those without a score,
    who stand last. `confidence` is the probability that the kept are the best of those with a
    score, `regret` how much better in the mean the best are expected to be. `exhaustive`
    evaluations would have tried all candidates on all examples."""

    standings: tuple[Standing, ...]
    keep: int
    evaluations: int
    exhaustive: int
    confidence: float
    regret: float

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(one.expert for one in self.standings[: self.keep] if one.scores)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Those without a score."""
        return tuple(one.expert for one in self.standings if not one.scores)


async def select(
    candidates: Sequence[str],
    examples: int,
    evaluate: Evaluate,
    *,
    keep: int = 1,
    confidence: float = 0.9,
    tolerance: float = 0.005,
    similarity: FloatArray | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Selection:
    """The `keep` best of the candidates (E,) by their mean over examples like these.

    A candidate is tried no further once those dropped hold one of the best with a probability of at
    most 1 − `confidence` together; it ends when the kept are the best with `confidence`, when the
    best are expected to be better by less than `tolerance`, or when the examples are used up.
    A candidate that has given no score counts in none of these, and is tried as long as the others
    are. `similarity` (E,) is that of the descriptions. Raises TrainingError for no choice, no
    example or no score, and what `evaluate` raises.
    """
    if not 1 <= keep < len(candidates):
        raise TrainingError(
            f"{keep} of {len(candidates)} candidates leaves nothing to select; keep fewer, or name "
            "more candidates"
        )
    if examples < 1:
        raise TrainingError("there is no example of the task; give some")
    rng = np.random.default_rng(seed)
    scores = np.full((len(candidates), examples), np.nan)
    asked = np.zeros(len(candidates), np.int64)
    alive = np.ones(len(candidates), np.bool_)
    order = rng.permutation(examples)
    done, until = 0, FIRST if similarity is None else FIRST_DESCRIBED
    while True:
        rows = order[done : min(until, examples)]
        for e in np.flatnonzero(alive):
            progress("evaluating", int(asked.sum()), len(candidates) * examples)
            said = await evaluate(candidates[int(e)], [int(row) for row in rows])
            scores[e, rows] = [np.nan if score is None else score for score in said]
            asked[e] += len(rows)
        done += len(rows)
        mean, covariance = posterior(scores, similarity)
        drawn = rng.multivariate_normal(mean, covariance, DRAWS, check_valid="ignore")  # (D, E)
        heard = ~np.isnan(scores).all(axis=1)
        likely = np.zeros(len(candidates))
        choice = int(heard.sum()) > keep
        if choice:
            likely[heard], sure, regret = _judged(drawn[:, heard], mean[heard], keep)
        else:
            likely[heard], sure, regret = 1.0, 1.0, 0.0
        if done == examples or (choice and (sure >= confidence or regret <= tolerance)):
            break
        if choice:
            alive = _alive(likely, alive & heard, keep, confidence) | ~heard
        until *= 2
    if not heard.any():
        raise TrainingError("not one candidate has a score on these examples; give others")
    progress("evaluating", int(asked.sum()), int(asked.sum()))
    spread = 1.96 * np.sqrt(np.diag(covariance))
    ranked = np.lexsort((-mean, ~heard))
    standings = tuple(
        Standing(
            candidates[int(e)],
            float(np.clip(mean[e], 0, 1)),
            float(np.clip(mean[e] - spread[e], 0, 1)),
            float(np.clip(mean[e] + spread[e], 0, 1)),
            float(likely[e]),
            int(asked[e]),
            int((~np.isnan(scores[e])).sum()),
        )
        for e in ranked
    )
    return Selection(
        standings, keep, int(asked.sum()), len(candidates) * examples, sure, max(regret, 0.0)
    )


def drawn_rows(labels: Sequence[str], count: int | None, seed: int) -> list[int]:
    """`count` of the rows at random, in their order: of each label its share, to within one; None
    or more than there are: all."""
    n = len(labels)
    if count is None or count >= n:
        return list(range(n))
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    _, stratum = np.unique(np.asarray(labels), return_inverse=True)
    place = np.empty(n)
    for number in range(int(stratum.max()) + 1):
        own = order[stratum[order] == number]
        # Evenly over (0, 1) from a random start: those below any bound are the label's share.
        place[own] = (np.arange(len(own)) + rng.random()) / len(own)
    return sorted(np.argsort(place, kind="stable")[:count].tolist())


def posterior(scores: Float64, similarity: FloatArray | None = None) -> tuple[Float64, Float64]:
    """(E, K) scores, NaN where nobody was asked → mean (E,) and covariance (E, E) of the experts'
    means over such examples."""
    known = ~np.isnan(scores)
    n_experts = len(scores)
    noise, difficulty, spread = _widths(scores, known)
    prior = spread * np.eye(n_experts) + 1.0  # a common level, hardly known before
    if similarity is not None and np.ptp(similarity) > 0:
        z = (similarity - similarity.mean()) / similarity.std()
        prior += SLOPE**2 * np.outer(z, z)
    precision = np.linalg.inv(prior)
    moment = precision @ np.full(n_experts, 0.5)
    patterns, which = np.unique(known, axis=1, return_inverse=True)
    for number, asked in enumerate(patterns.T):
        if not asked.any():
            continue
        own = which.ravel() == number
        total = np.where(asked, np.nan_to_num(scores[:, own]).sum(axis=1), 0.0)
        # The example's difficulty is summed out (Sherman & Morrison).
        common = difficulty / (noise + difficulty * asked.sum())
        weight = (np.diag(asked * 1.0) - common * np.outer(asked, asked)) / noise
        precision = precision + own.sum() * weight
        moment = moment + weight @ total
    covariance = np.linalg.inv(precision)
    return covariance @ moment, (covariance + covariance.T) / 2


def _widths(scores: Float64, known: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Variances of noise, of the examples' difficulty and of the experts' means, by moments of the
    additive fit, drawn to the prior's."""
    if not known.any():
        return PRIOR_VARIANCE, 1e-4, SPREAD**2
    filled = np.where(known, scores, 0.0)
    expert, example = np.zeros(len(scores)), np.zeros(scores.shape[1])
    per_expert, per_example = known.sum(axis=1), known.sum(axis=0)
    for _ in range(10):
        rest = np.where(known, filled - example, 0).sum(axis=1)
        expert = rest / np.maximum(per_expert, 1)
        rest = np.where(known, filled - expert[:, None], 0).sum(axis=0)
        example = rest / np.maximum(per_example, 1)
    left = np.where(known, filled - expert[:, None] - example, 0)
    freedom = max(int(known.sum()) - int((per_expert > 0).sum()) - int((per_example > 0).sum()), 0)
    noise = float((left**2).sum() + PRIOR_VARIANCE * PRIOR_WORTH) / (freedom + PRIOR_WORTH)
    used = per_example > 0
    difficulty = float(np.var(example[used])) - noise / max(float(per_example[used].mean()), 1.0)
    tried = per_expert > 0
    between = float(np.var(expert[tried])) - noise / max(float(per_expert[tried].mean()), 1.0)
    count = int(tried.sum())
    spread = (max(between, 0.0) * count + SPREAD**2 * PRIOR_WORTH) / (count + PRIOR_WORTH)
    return noise, max(difficulty, 1e-4), spread


def _judged(drawn: Float64, mean: Float64, keep: int) -> tuple[Float64, float, float]:
    """(D, E) draws of the experts' means → the probability (E,) that each is among the `keep`
    best, that those with the best expectation are just these, and how much better in the mean the
    best are."""
    kept = np.argsort(-mean, kind="stable")[:keep]
    top = np.argpartition(-drawn, keep - 1, axis=1)[:, :keep]  # (D, keep)
    likely = np.bincount(top.ravel(), minlength=drawn.shape[1]) / len(drawn)
    sure = float(np.isin(top, kept).all(axis=1).mean())
    best = np.take_along_axis(drawn, top, axis=1).mean(axis=1)
    return likely, sure, float((best - drawn[:, kept].mean(axis=1)).mean())


def _alive(
    likely: Float64, alive: npt.NDArray[np.bool_], keep: int, confidence: float
) -> npt.NDArray[np.bool_]:
    """(E,) who is tried further: the least likely are left out as long as one of the best is among
    all left out with a probability of at most 1 − confidence."""
    left = alive.copy()
    risk = float(likely[~alive].sum())
    for e in np.argsort(likely, kind="stable"):
        if not alive[e]:
            continue
        risk += float(likely[e])
        if risk > 1 - confidence or left.sum() <= keep + 1:
            break
        left[e] = False
    return left

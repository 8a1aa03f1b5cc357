"""What a router's choices and predictions are worth: accuracy, calibration, abstention.
Knows no router. A measure that needs a score, a length or a price that is missing is None."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import Outcomes

Float64 = npt.NDArray[np.float64]

ECE_BINS = 15

ARENA_C_MAX, ARENA_C_MIN, ARENA_BETA = 200.0, 0.0044, 0.1
"""US dollars per 1,000 queries, and the weight of cost (RouterArena, arXiv 2510.00202)."""


# --- accuracy ----------------------------------------------------------------------------


def earned(values: npt.NDArray[np.floating], chosen: npt.NDArray[np.integer]) -> Float64:
    """Of `values` (n, E), qualities or costs, that of the expert chosen for each question, (n,)."""
    return np.asarray(values[np.arange(len(values)), chosen], np.float64)


def mean(values: npt.NDArray[np.floating]) -> float | None:
    """None where a value is missing, or there is none."""
    if not len(values) or np.isnan(values).any():
        return None
    return float(np.mean(values, dtype=np.float64))


def avg_acc(quality: npt.NDArray[np.floating]) -> float | None:
    """The headline: the plain mean over questions (n,), so that a large data set weighs more."""
    return mean(quality)


def per_benchmark(
    quality: npt.NDArray[np.floating], benchmark: Sequence[str]
) -> dict[str, float | None]:
    """The mean over each data set's questions, by name."""
    names = np.asarray(benchmark)
    return {str(name): mean(quality[names == name]) for name in np.unique(names)}


def mean_of_benchmarks(quality: npt.NDArray[np.floating], benchmark: Sequence[str]) -> float | None:
    """AvgAcc of the routing papers: the mean of the data sets' means, each weighing the same."""
    return mean(
        np.array([np.nan if m is None else m for m in per_benchmark(quality, benchmark).values()])
    )


def gain_at_best(accuracy: float | None, best_single: float | None) -> float | None:
    """Gain@B: relative gain over the best single expert."""
    if accuracy is None or not best_single:
        return None
    return (accuracy - best_single) / best_single


def gap_at_oracle(accuracy: float | None, oracle: float | None) -> float | None:
    """Gap@O: relative shortfall from the oracle."""
    if accuracy is None or not oracle:
        return None
    return (oracle - accuracy) / oracle


def gap_closed(
    accuracy: float | None, best_single: float | None, oracle: float | None
) -> float | None:
    """Of the way from the best single expert to the oracle; negative for a router worse than the
    former. None where there is no way to go."""
    if accuracy is None or best_single is None or oracle is None or oracle <= best_single:
        return None
    return (accuracy - best_single) / (oracle - best_single)


def arena_score(accuracy: float | None, mean_cost: float | None) -> float | None:
    """RouterArena's score: a weighted harmonic mean of accuracy and of cheapness on a log scale,
    `mean_cost` in US dollars a question, held within the scale's ends."""
    if accuracy is None or mean_cost is None:
        return None
    cost = min(max(1000 * mean_cost, ARENA_C_MIN), ARENA_C_MAX)
    cheap = math.log2(ARENA_C_MAX / cost) / math.log2(ARENA_C_MAX / ARENA_C_MIN)
    below = ARENA_BETA * accuracy + cheap
    return (1 + ARENA_BETA) * accuracy * cheap / below if below > 0 else 0.0


# --- calibration -------------------------------------------------------------------------


def brier(predicted: npt.NDArray[np.floating], outcomes: Outcomes) -> float | None:
    """Mean squared error of predicted quality, (n, E) or (E,), over all known outcomes. None where
    a prediction of one is missing."""
    p, quality = _known_pairs(predicted, outcomes)
    return mean((p - quality) ** 2)


def base_rates(outcomes: Outcomes) -> Float64:
    """(E,) each expert's mean quality, over its known outcomes; NaN without any. What a Brier score
    is held against: take them from the questions that were fitted on."""
    known = outcomes.known
    total = np.where(known, outcomes.quality, 0.0).sum(axis=0, dtype=np.float64)
    counted = known.sum(axis=0)
    return np.where(counted > 0, total / np.maximum(counted, 1), np.nan)


def ece(
    predicted: npt.NDArray[np.floating], outcomes: Outcomes, bins: int = ECE_BINS
) -> float | None:
    """Expected calibration error (Guo et al. 2017, section 2): all known (question, expert) pairs
    in `bins` bins of equal width over [0, 1], lower edges included; the mean distance between a
    bin's mean prediction and its mean outcome, weighted by its pairs."""
    reliable = reliability(predicted, outcomes, bins)
    if reliable is None:
        return None
    share = reliable.pairs / reliable.pairs.sum()
    return float((share * np.abs(reliable.predicted - reliable.quality)).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Of each bin that is not empty: its pairs, mean prediction and mean outcome, all (b,)."""

    pairs: Float64
    predicted: Float64
    quality: Float64


def reliability(
    predicted: npt.NDArray[np.floating], outcomes: Outcomes, bins: int = ECE_BINS
) -> Reliability | None:
    """The bins that `ece` is read from. None where a prediction is missing."""
    p, quality = _known_pairs(predicted, outcomes)
    if not len(p) or np.isnan(p).any():
        return None
    bin_of = np.clip((p * bins).astype(np.int64), 0, bins - 1)
    pairs = np.bincount(bin_of, minlength=bins).astype(np.float64)
    full = pairs > 0
    means = [np.bincount(bin_of, v, bins)[full] / pairs[full] for v in (p, quality)]
    return Reliability(pairs[full], means[0], means[1])


def _known_pairs(
    predicted: npt.NDArray[np.floating], outcomes: Outcomes
) -> tuple[Float64, Float64]:
    known = outcomes.known
    everywhere = np.broadcast_to(predicted, known.shape)
    return everywhere[known].astype(np.float64), outcomes.quality[known].astype(np.float64)


# --- abstention --------------------------------------------------------------------------


def selective(
    quality: npt.NDArray[np.floating], confidence: npt.NDArray[np.floating], coverage: float
) -> float | None:
    """Mean quality of the `coverage` share of questions with the highest confidence, both (n,): at
    least that share is answered. Of questions equally sure at the edge, as many as needed are drawn
    at random, in expectation. None where a value is missing."""
    if not len(quality) or np.isnan(quality).any() or np.isnan(confidence).any():
        return None
    wanted = max(1, math.ceil(coverage * len(quality) - 1e-9))
    edge = -np.partition(-confidence, wanted - 1)[wanted - 1]
    sure, even = confidence > edge, confidence == edge
    left = wanted - int(sure.sum())
    total = float(quality[sure].sum(dtype=np.float64))
    total += left * float(np.mean(quality[even], dtype=np.float64))
    return total / wanted


def auroc(score: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> float | None:
    """The probability that a positive scores above a negative, ties half: say confidence against
    being in scope. None where one side is empty."""
    from scipy.stats import rankdata

    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative or np.isnan(score).any():
        return None
    ranks = rankdata(score)
    above = float(ranks[positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)

"""What another policy would have earned on the requests of this one, from logged decisions with
their propensities. Pure numbers: knows no store and no router.

Rows are requests with a known reward, columns experts. `Log` is what was done; a target policy is
(n, E) the probabilities with which it would choose. Sources: Dudík, Langford & Li 2011
(arXiv:1103.4601) for the doubly robust estimate; Swaminathan & Joachims 2015 for the
self-normalised one; Kish's effective sample size; the bound for every look is of `anytime.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.anytime import lower_bound

Float64 = npt.NDArray[np.float64]

CAPS = (0.25, 1.0)
"""Of expected rewards, in versions of the terms for the bound at every look: a lower one allows
greater bets, a higher one varies less."""

CHUNK = 256
"""Bootstrap draws made at a time, so that memory does not grow with their number."""


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """`action` (n,) is the column of the expert that answered, `propensity` (n,) the probability
    with which it was chosen, `reward` (n,) in [0, 1]. Raises ValueError for anything else."""

    action: npt.NDArray[np.intp]
    propensity: Float64
    reward: Float64

    def __post_init__(self) -> None:
        if not len(self.action) == len(self.propensity) == len(self.reward):
            raise ValueError("action, propensity and reward differ in length; give one each a row")
        if not bool(np.all((self.propensity > 0) & (self.propensity <= 1))):
            raise ValueError("a propensity lies outside (0, 1]; log the probability of the choice")
        if not bool(np.all((self.reward >= 0) & (self.reward <= 1))):
            raise ValueError("a reward lies outside [0, 1]; scale it")

    def __len__(self) -> int:
        return len(self.action)


def weights(log: Log, target: Float64) -> Float64:
    """(n,) how much likelier the target makes what was done."""
    return np.asarray(target[np.arange(len(log)), log.action] / log.propensity, np.float64)


def ips(log: Log, target: Float64) -> float:
    """Inverse propensity score: unbiased wherever the log gives a chance to all that the target
    would choose; its variance grows with the weights."""
    return float(np.mean(weights(log, target) * log.reward))


def snips(log: Log, target: Float64) -> float:
    """Self-normalised: a little biased, steadier. NaN where the two never agree."""
    w = weights(log, target)
    return float(w @ log.reward / w.sum()) if w.any() else float("nan")


def doubly_robust_terms(log: Log, target: Float64, model: Float64) -> Float64:
    """(n,) whose mean is the doubly robust estimate: what `model` (n, E) expects of the target,
    and its error on what was done, weighted. Unbiased for any model made without these rewards,
    where propensities are right; the better the model, the smaller the variance."""
    rows = np.arange(len(log))
    expected = (target * model).sum(axis=1)
    return np.asarray(
        expected + weights(log, target) * (log.reward - model[rows, log.action]), np.float64
    )


def effective_size(weight: Float64) -> float:
    """Kish: how many equally weighted rows would tell as much."""
    square = float(weight @ weight)
    return float(weight.sum()) ** 2 / square if square else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """New against old on the same log. `difference` is new − old by the doubly robust estimate and
    [`low`, `high`] its 95 % interval. `effective` is the smaller of the two effective sample sizes;
    `unsupported` the share of requests on which the log gave the new policy's choice no chance:
    there the new policy is taken to earn nothing, the worst there is, so that an interval above 0
    needs no belief about what was never tried. With a few dozen tries the interval reaches too
    little far up (it held the truth in 84 % at an effective size of 21, in 94 % at 67), but not
    down: `low` lay above the truth in 2 to 4 % of the logs, as it should.

    That is so for one look. Whoever looks again and again until it is better errs far more often;
    `always_low` lies below the difference at all looks at once with 95 %, and needs some times the
    requests (`anytime.py`)."""

    requests: int
    new: float
    old: float
    new_ips: float
    new_snips: float
    difference: float
    low: float
    high: float
    effective: float
    unsupported: float
    always_low: float = -1.0

    @property
    def better(self) -> bool:
        """With 95 % confidence, at one look."""
        return self.requests > 0 and self.low > 0

    @property
    def always_better(self) -> bool:
        """With 95 % confidence, however often one has looked."""
        return self.requests > 0 and self.always_low > 0


def compare(
    log: Log,
    new: Float64,
    old: Float64,
    model: Float64,
    tried: npt.NDArray[np.bool_] | None = None,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Comparison:
    """Rows in the order of their time; `new`, `old` (n, E) choice probabilities; `model` (n, E)
    expected rewards, finite, made without the rewards of the same and later rows. `tried` (n, E)
    says which experts had a chance in the log; None: all. The interval is the percentile bootstrap
    by request, paired. Raises ValueError for an empty log."""
    n = len(log)
    if n == 0:
        raise ValueError("there is no judged decision to compare on; collect feedback first")
    terms_new = doubly_robust_terms(log, new, model)
    terms_old = doubly_robust_terms(log, old, model)
    chance = np.ones(new.shape, np.bool_) if tried is None else tried
    unsupported = np.any((new > 0) & ~chance, axis=1)
    terms_new = np.where(unsupported, 0.0, terms_new)
    low, high = interval(terms_new - terms_old, draws=draws, seed=seed)
    return Comparison(
        requests=n,
        new=float(terms_new.mean()),
        old=float(terms_old.mean()),
        new_ips=ips(log, new),
        new_snips=snips(log, new),
        difference=float((terms_new - terms_old).mean()),
        low=low,
        high=high,
        effective=min(effective_size(weights(log, new)), effective_size(weights(log, old))),
        unsupported=float(unsupported.mean()),
        always_low=lower_bound(_versions(log, new, old, model, unsupported)),
    )


def _versions(
    log: Log, new: Float64, old: Float64, model: Float64, unsupported: npt.NDArray[np.bool_]
) -> list[tuple[Float64, float]]:
    """Of the terms of the difference (n,), each with how far below 0 a term can be: what the model
    expects of the new policy is cut at `CAPS`, for a term is lowest where much was expected of what
    then earned nothing. A cut model is another model: the mean is the same.

    The greatest weights are those of the log's least propensities, rounded up to powers of two:
    how much is explored fixes them before any reward, and this reads no more than their magnitude.
    """
    model = np.clip(model, 0.0, 1.0)
    rows = np.arange(len(log))
    greatest = _power_above(1 / log.propensity)
    held = _power_above(weights(log, old)[old[rows, log.action] > 0])
    drawn = 0.0 if bool(np.all((old == 0) | (old == 1))) else 1.0
    same = np.all(new == old, axis=1)
    base = doubly_robust_terms(log, old, model)
    found = []
    for cap in (1 / greatest, *CAPS):
        terms = doubly_robust_terms(log, new, np.minimum(model, cap))
        terms = np.where(unsupported, 0.0, terms) - base
        found.append((np.where(same, 0.0, terms), greatest * cap + held + drawn))
    return found


def _power_above(values: Float64) -> float:
    return float(2 ** np.ceil(np.log2(values.max(initial=1.0))))


def interval(terms: Float64, *, draws: int = 4000, seed: int = 0) -> tuple[float, float]:
    """95 % of the mean of (n,) terms, by the percentile bootstrap."""
    rng, n = np.random.default_rng(seed), len(terms)
    means = []
    for start in range(0, draws, CHUNK):
        rows = rng.integers(0, n, size=(min(CHUNK, draws - start), n))
        means.append(terms[rows].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)

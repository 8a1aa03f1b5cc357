"""A vote's learnt part: how likely each answer is to be right once some experts have given theirs,
and what asking on is worth. Plain array functions, shared by training and serving; knows an expert
only through its expected quality, an answer only through who else gave it, and no file.

After k calls, with groups g of experts whose answers are equal and ℓ_e the log-odds of expert e's
expected quality, cut at ±3:

    score(g)    = follow · Σ_{e ∈ g} ℓ_e + agreement[|g|] + best · [the plan's best expert is in g]
    score(none) = none · (1, k/3, 1/k, log #groups, #abstained, mean ℓ)
    P           = softmax over the groups and "none of them is right"

a conditional logit (McFadden, 1974) of 2 + (K − 1) + 6 parameters, the same for all k ≤ K. What the
answer would gain by asking all K, in probability of being right, is a linear function of

    φ = (p₁, p₂, p_none, p₁², p₁ p₂, [all agree], ℓ_next, ℓ_next p₁)

for each k, where p₁ and p₂ are the two likeliest groups and `next` is who would be asked next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.types import FloatArray

Float64 = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CUT = 3.0
"""Log-odds are cut here: beyond .95 or below .05 a router's word is not that good."""

TIE = 1e-9
"""Scores nearer than this may be ordered by how they were added up: nothing is settled then."""

DOUBTS = 6
STATE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """`agreement` (K − 1,) is of groups of 2, 3 … K, `none` (6,), `gain` (K − 1, 9) one row for
    each number of calls 1 … K − 1: weights of φ, then the intercept."""

    follow: float
    best: float
    agreement: Float64
    none: Float64
    gain: Float64

    @property
    def most(self) -> int:
        """K: how many experts are asked at most."""
        return len(self.agreement) + 1

    def scores(self, groups: Groups) -> Float64:
        """(n, k) of the group that each place begins, −∞ at other places."""
        value = self._followed(groups) + self._by_size[groups.size]
        return np.where(groups.begins, value, -np.inf)

    def worth(self, log_odds: Float64) -> Float64:
        """(n, K) what each expert adds to its group's score, but for the agreement; best first."""
        value = self.follow * np.clip(log_odds, -CUT, CUT)
        value[:, 0] += self.best
        return np.asarray(value)

    def settled(self, groups: Groups, open_worth: Float64) -> npt.NDArray[np.bool_]:
        """(n,) whether the likeliest group stays so whatever the experts not heard say, who are
        `worth` (n, m), or if they say nothing. Exact: of those that join the leader, and those that
        join a rival or begin one, only how many there are and the extremes of their worth matter.
        """
        n, m = open_worth.shape
        low = np.zeros((n, m + 1))
        low[:, 1:] = np.cumsum(np.sort(open_worth, axis=1), axis=1)
        high = np.zeros((n, m + 1))
        high[:, 1:] = np.cumsum(-np.sort(-open_worth, axis=1), axis=1)
        followed, by_size, rows = self._followed(groups), self._by_size, np.arange(n)
        leader = self.scores(groups).argmax(axis=1)
        rival = groups.begins & (np.arange(groups.place.shape[1]) != leader[:, None])
        may_change = ~groups.begins.any(axis=1)
        for i in range(m + 1):
            least = followed[rows, leader] + low[:, i] + by_size[groups.size[rows, leader] + i]
            for j in range(m - i + 1):
                size = np.where(rival, groups.size, 0) + j
                reach = np.where(rival, followed + high[:, j, None] + by_size[size], -np.inf)
                most = reach.max(axis=1)
                if j:
                    most = np.maximum(most, high[:, j] + by_size[j])
                may_change |= most > least - TIE
        return np.asarray(~may_change, np.bool_)

    @property
    def _by_size(self) -> Float64:
        return np.concatenate([[0.0, 0.0], self.agreement])

    def _followed(self, groups: Groups) -> Float64:
        value = self.follow * groups.total
        value[:, 0] += self.best
        return np.asarray(value)

    def posterior(self, groups: Groups) -> tuple[Float64, Float64]:
        """(n, k) the probability of the group that each place begins, 0 at other places, and (n,)
        that of none: they sum to 1."""
        scores = self.scores(groups)
        none = (groups.doubts() * self.none).sum(axis=1)
        top = np.maximum(scores.max(axis=1), none)
        odds = np.exp(scores - top[:, None])
        left = np.exp(none - top)
        total = odds.sum(axis=1) + left
        return odds / total[:, None], left / total

    def expected_gain(self, groups: Groups, ahead: Float64) -> Float64:
        """(n,) of asking on after k < K calls; `ahead` (n,) log-odds of who would be next."""
        row = self.gain[groups.place.shape[1] - 1]
        return np.asarray((state_of(self, groups, ahead) * row[:-1]).sum(axis=1) + row[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Answers by the place of who gave them first: `place` (n, k), −1 where an expert abstained.
    `total` and `size` (n, k) are the sum of log-odds and the number of each place's group, 0
    where it begins none; `log_odds` (n, k) is cut."""

    place: IntArray
    log_odds: Float64
    total: Float64
    size: IntArray

    @classmethod
    def of(cls, answers: IntArray, log_odds: Float64) -> Groups:
        """`answers` (n, k) numbers that are equal where answers are, negative for none, and
        `log_odds` (n, k) of the experts, cut here: the plan's first k, best first."""
        log_odds = np.clip(log_odds, -CUT, CUT)
        said = answers >= 0
        same = (answers[:, :, None] == answers[:, None, :]) & said[:, :, None]  # (n, k, k)
        place = np.where(said, same.argmax(axis=2), -1)
        member = same & (place == np.arange(answers.shape[1]))[:, :, None]
        total = np.where(member, log_odds[:, None, :], 0.0).sum(axis=2)
        return cls(place, log_odds, total, member.sum(axis=2))

    @property
    def begins(self) -> npt.NDArray[np.bool_]:
        """(n, k) whether a group begins at the place."""
        return self.size > 0

    def doubts(self) -> Float64:
        """(n, 6) what "none of them is right" is judged by."""
        n, k = self.place.shape
        different = np.maximum(self.begins.sum(axis=1), 1)
        return np.stack(
            [
                np.ones(n),
                np.full(n, k / 3),
                np.full(n, 1 / k),
                np.log(different),
                (self.place < 0).sum(axis=1),
                self.log_odds.mean(axis=1),
            ],
            axis=1,
        )


def log_odds_of(quality: FloatArray | Float64) -> Float64:
    """Of expected qualities of any shape, cut."""
    edge = 1 / (1 + np.exp(CUT))
    q = np.clip(np.asarray(quality, np.float64), edge, 1 - edge)
    return np.asarray(np.log(q) - np.log1p(-q))


def state_of(head: Head, groups: Groups, ahead: Float64) -> Float64:
    """φ (n, 8)."""
    p, none = head.posterior(groups)
    n, k = p.shape
    leader = p.argmax(axis=1)
    first = p[np.arange(n), leader]
    second = np.partition(p, -2, axis=1)[:, -2] if k > 1 else np.zeros(n)
    agreed = groups.size[np.arange(n), leader] == k
    return np.stack(
        [first, second, none, first**2, first * second, agreed, ahead, ahead * first], axis=1
    )

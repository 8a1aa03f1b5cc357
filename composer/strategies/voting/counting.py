"""How answers are counted, and when no further one can change the outcome. Pure: knows no expert,
call or clock, only ranks: an expert's place in the plan, best first.

`keys` maps the ranks that were heard to their extracted answer, None: the expert abstained.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from composer.types import Choice

Keys = Mapping[int, str | None]

LEAST_WEIGHT = 0.01
"""Of an expert that is no better than a guess: its answer is still one."""

EDGE = 0.001
"""Qualities are cut this far from 0 and 1 before their logit is taken."""


class Rule(Protocol):
    """One way of counting, for the experts of one plan."""

    def winner(self, keys: Keys) -> int:
        """Of the ranks that answered (at least one), whose answer is emitted."""
        ...

    def settled(self, keys: Keys, open_ranks: Collection[int]) -> bool:
        """Whether the winning answer is the same whatever the experts in `open_ranks` will say,
        or if they say nothing. Exact."""
        ...

    def enough(self, keys: Keys, ahead: Sequence[int]) -> str | None:
        """Why those `ahead` (best first, not asked yet) are not worth asking; None: they are."""
        ...

    def probability(self, keys: Keys) -> float | None:
        """That the winning answer is right; None where nothing is known of it."""
        ...


class Weights:
    """Each expert's vote counts by its weight (0 or more), best-scored expert first.

    With `options` weights are log-odds (see `log_odds`), and the answer has a probability: experts
    are taken to be right independently of each other, and wrong answers to spread evenly over the
    other options; those nobody gave may be right, too. `confidence` is the probability from which
    on nobody more is asked.
    """

    def __init__(
        self, weights: Sequence[float], *, options: int | None = None, confidence: float = 1.0
    ) -> None:
        self._weights = weights
        self._options = options
        self._confidence = confidence

    def winner(self, keys: Keys) -> int:
        return winner(self._weights, keys)

    def settled(self, keys: Keys, open_ranks: Collection[int]) -> bool:
        return settled(self._weights, keys, open_ranks)

    def enough(self, keys: Keys, ahead: Sequence[int]) -> str | None:
        probability = self.probability(keys)
        if probability is not None and probability >= self._confidence < 1:
            return "confident"
        return None

    def probability(self, keys: Keys) -> float | None:
        if self._options is None:
            return None
        groups = groups_of(keys)
        if not groups:
            return 0.0
        totals = [math.fsum(self._weights[r] for r in members) for members in groups.values()]
        top = max(totals)
        unseen = max(self._options - len(groups), 0)
        return 1 / (math.fsum(math.exp(t - top) for t in totals) + unseen * math.exp(-top))


def expected(choices: Sequence[Choice]) -> list[float]:
    """The experts' qualities; where one is not known, its weight in the plan stands for it."""
    return [c.weight if c.quality is None else c.quality for c in choices]


def log_odds(choices: Sequence[Choice], options: int) -> list[float]:
    """log(q (m − 1) / (1 − q)) for an expert of quality q and m options: the logarithm of how many
    times likelier it is to give an answer that is right than one that is wrong (Nitzan and
    Paroush, 1982, with m options).
    """
    cut = [min(max(q, EDGE), 1 - EDGE) for q in expected(choices)]
    return [max(math.log(q * (options - 1) / (1 - q)), LEAST_WEIGHT) for q in cut]


def winner(weights: Sequence[float], keys: Keys) -> int:
    """Rank of the expert whose answer is emitted: the best-ranked of the heaviest group.

    `weights[rank]` is an expert's weight; `keys` holds at least one rank. Groups of equal weight:
    the one that holds the better-ranked expert. When all abstained, the best-ranked of them.
    """
    groups = groups_of(keys)
    if not groups:
        return min(keys)
    return min(_heaviest(weights, groups))


def settled(weights: Sequence[float], keys: Keys, open_ranks: Collection[int]) -> bool:
    """Whether the winning answer is the same whatever the experts in `open_ranks` will say.

    The strongest rival is a group (or an answer not seen yet) that all of them join; `fsum`
    is correctly rounded, hence monotone, so comparing rounded sums is safe here.
    """
    groups = groups_of(keys)
    if not groups:
        return False
    leader = _heaviest(weights, groups)
    lead = math.fsum(weights[r] for r in leader)
    rivals = [members for members in groups.values() if members is not leader]
    for rival in ([*members, *open_ranks] for members in (*rivals, [])):
        if not rival:
            continue
        reach = math.fsum(weights[r] for r in rival)
        if reach > lead or (reach == lead and min(rival) < min(leader)):
            return False
    return True


def groups_of(keys: Keys) -> dict[str, list[int]]:
    """Answer → the ranks that gave it."""
    groups: dict[str, list[int]] = {}
    for rank, key in keys.items():
        if key is not None:
            groups.setdefault(key, []).append(rank)
    return groups


def _heaviest(weights: Sequence[float], groups: Mapping[str, list[int]]) -> list[int]:
    return max(groups.values(), key=lambda g: (math.fsum(weights[r] for r in g), -min(g)))

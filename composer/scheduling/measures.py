"""How well the traffic suits keeping only some models resident, whatever the scheduler does.

Pure functions of the sequence of called models; knows no time, memory or policy.

Two measures of "Not All Models Suit Expert Offloading: On Local Routing Consistency of
Mixture-of-Expert Models" (Liang et al., arXiv 2505.16056), made there for the experts that the
tokens of a text activate within one layer of a mixture-of-experts model:

- segment routing best performance (SRP): how well a fixed group of experts can cover the needs of
  a segment of tokens;
- segment cache best hit rate (SCH): the hit rate of an expert cache that uses a length of future
  information, under a cache limit.

Here a *call* takes the place of a token with its activated experts (a plan with several calls
gives several entries), the called model that of the expert, and `capacity` counts models, as if
all were of one size. Both lie in [0, 1]; near 1 at a small capacity, swaps are avoidable. SRP of
one segment as long as the traffic is what popularity alone gives; what shorter segments reach
above it is locality.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from heapq import nlargest


def segment_routing(calls: Sequence[Hashable], capacity: int, segment: int) -> float | None:
    """SRP: the share of a segment's calls that its `capacity` most called models cover, meaned
    over all segments of `segment` calls in a row (one shorter segment where there are fewer).

    None without calls. Raises ValueError for a capacity or segment below 1.
    """
    _check(capacity, segment)
    if not calls:
        return None
    length = min(segment, len(calls))
    counts = Counter(calls[:length])
    covered = _covered(counts, capacity)
    for new in range(length, len(calls)):
        gone = calls[new - length]
        counts[gone] -= 1
        if not counts[gone]:
            del counts[gone]
        counts[calls[new]] += 1
        covered += _covered(counts, capacity)
    return covered / (length * (len(calls) - length + 1))


def segment_cache(
    calls: Sequence[Hashable], capacity: int, segment: int | None = None
) -> float | None:
    """SCH: the share of calls that find their model in a cache of `capacity` models that loads
    each missing one and knows the next `segment` calls (None: all of them, Belady's optimum).

    What leaves is what is called last among what it knows of; of models not called within the
    segment, the one called longest ago. The first call of a model always misses. None without
    calls. Raises ValueError for a capacity or segment below 1.
    """
    _check(capacity, segment)
    if not calls:
        return None
    never = len(calls)
    following = [never] * len(calls)  # the place of the same model's next call
    seen: dict[Hashable, int] = {}
    for place in range(len(calls) - 1, -1, -1):
        following[place] = seen.get(calls[place], never)
        seen[calls[place]] = place
    cache: dict[Hashable, int] = {}  # the place of each one's last call
    hits = 0
    for place, model in enumerate(calls):
        if model in cache:
            hits += 1
        elif len(cache) == capacity:
            horizon = never if segment is None else place + segment

            def leaves(other: Hashable, horizon: int = horizon) -> tuple[int, int]:
                after = following[cache[other]]
                return (after if after <= horizon else never, -cache[other])

            del cache[max(cache, key=leaves)]
        cache[model] = place
    return hits / len(calls)


def _covered(counts: Counter[Hashable], capacity: int) -> int:
    return sum(nlargest(capacity, counts.values()))


def _check(capacity: int, segment: int | None) -> None:
    if capacity < 1 or (segment is not None and segment < 1):
        raise ValueError("capacity and segment count models and calls: both are at least 1")

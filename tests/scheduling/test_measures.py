"""The two routing-consistency measures, against their definitions spelled out."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.scheduling.measures import segment_cache, segment_routing

traffic = st.lists(st.sampled_from("abcde"), min_size=1, max_size=14)


def best_sets(calls: list[str], capacity: int, segment: int) -> float:
    """Every set of residents for every segment."""
    length = min(segment, len(calls))
    shares = []
    for first in range(len(calls) - length + 1):
        part = calls[first : first + length]
        sets = combinations("abcde", min(capacity, 5))
        shares.append(max(sum(call in inside for call in part) for inside in sets) / length)
    return sum(shares) / len(shares)


def best_cache(calls: list[str], capacity: int) -> float:
    """Every choice of what leaves."""

    @cache
    def hits(place: int, inside: frozenset[str]) -> int:
        if place == len(calls):
            return 0
        if calls[place] in inside:
            return 1 + hits(place + 1, inside)
        if len(inside) < capacity:
            return hits(place + 1, inside | {calls[place]})
        return max(hits(place + 1, (inside - {gone}) | {calls[place]}) for gone in inside)

    return hits(0, frozenset()) / len(calls)


@given(calls=traffic, capacity=st.integers(1, 6), segment=st.integers(1, 16))
@settings(deadline=None)
def test_routing_covers_what_the_best_set_of_each_segment_covers(calls, capacity, segment):
    found = segment_routing(calls, capacity, segment)
    assert found == pytest.approx(best_sets(calls, capacity, segment))


@given(calls=traffic, capacity=st.integers(1, 5))
@settings(deadline=None)
def test_a_cache_that_knows_everything_is_the_best_there_is(calls, capacity):
    assert segment_cache(calls, capacity) == pytest.approx(best_cache(calls, capacity))
    assert segment_cache(calls, capacity, len(calls)) == segment_cache(calls, capacity)


@given(calls=traffic, capacity=st.integers(1, 5), segment=st.integers(1, 14))
@settings(deadline=None)
def test_knowing_less_never_helps(calls, capacity, segment):
    some, everything = segment_cache(calls, capacity, segment), segment_cache(calls, capacity)
    assert some is not None
    assert everything is not None
    assert some <= everything


def test_by_hand():
    assert segment_routing("aabab", 1, 2) == pytest.approx((2 + 1 + 1 + 1) / 8)
    assert segment_routing("aabb", 1, 100) == 0.5
    assert segment_cache("abab", 1) == 0
    assert segment_cache("abab", 2) == 0.5
    # At c, b is wanted next; knowing one call, a (called longest ago) leaves, which is right.
    assert segment_cache("abcb", 2, 1) == 0.25
    # At c, knowing one call, only c's successor counts: a leaves though it is wanted before b.
    assert segment_cache("abcdab", 3, 1) == pytest.approx(1 / 6)
    assert segment_cache("abcdab", 3) == pytest.approx(2 / 6)


def test_nothing_called_is_nothing_measured():
    assert segment_routing([], 1, 1) is None
    assert segment_cache([], 1, 1) is None


@pytest.mark.parametrize(("capacity", "segment"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(capacity, segment):
    with pytest.raises(ValueError, match="at least 1"):
        segment_routing("a", capacity, segment)
    with pytest.raises(ValueError, match="at least 1"):
        segment_cache("a", capacity, segment)

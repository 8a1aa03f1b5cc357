"""The paired bootstrap: symmetric, as wide as theory says, and whole groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from router_training.intervals import Difference, paired, shares, side_by_side, verdict

Float64 = np.ndarray[tuple[int], np.dtype[np.float64]]

differences = hnp.arrays(np.float64, st.integers(1, 40), elements=st.sampled_from([-1, -0.5, 0, 1]))


@settings(deadline=None)
@given(values=differences)
def test_turning_all_signs_turns_the_interval(values: Float64) -> None:
    group = np.arange(len(values))
    a, b = paired(values, group, resamples=200), paired(-values, group, resamples=200)
    assert a is not None
    assert b is not None
    assert (b.mean, b.low, b.high) == pytest.approx((-a.mean, -a.high, -a.low), abs=1e-12)
    assert values.min() <= a.low <= a.high <= values.max()


def test_as_wide_as_the_normal_approximation() -> None:
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=2000, p=[0.1, 0.7, 0.2])
    found = paired(values, np.arange(2000))
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found.above_zero
    assert not found.below_zero


def test_copies_of_a_question_count_as_one() -> None:
    rng = np.random.default_rng(1)
    once = rng.normal(size=300)
    single = paired(once, np.arange(300))
    copied = paired(np.repeat(once, 9), np.repeat(np.arange(300), 9))
    assert single is not None
    assert copied is not None
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high), abs=0.02)


def test_few_and_many_distinct_values_are_drawn_alike() -> None:
    values = np.random.default_rng(2).choice([0.0, 1.0], size=500)
    few = paired(values, np.arange(500))
    many = paired(values + 1e-9 * np.arange(500), np.arange(500))
    assert few is not None
    assert many is not None
    assert (few.low, few.high) == pytest.approx((many.low, many.high), abs=0.005)


def test_nothing_and_the_unknown_have_no_interval() -> None:
    assert paired(np.array([]), np.array([], np.int64)) is None
    assert paired(np.array([1.0, np.nan]), np.arange(2)) is None


def pool(name: str, mean: float, *, table: str | None = None, n: int = 400) -> Difference:
    seed = sum(map(ord, table or name))
    values = np.random.default_rng(seed).normal(size=n)
    return Difference(name, table or name, values - values.mean() + mean, np.arange(n))


def test_better_needs_the_mean_above_zero_and_no_pool_below() -> None:
    assert verdict([pool("a", 0.2), pool("b", 0.2), pool("c", -0.05)], resamples=1000).better
    worse = verdict([pool("a", 0.9), pool("b", 0.9), pool("c", -0.2)], resamples=1000)
    assert worse.overall.above_zero
    assert worse.pools["c"].below_zero
    assert not worse.better
    assert not verdict([pool("a", 0.05), pool("b", -0.05)]).better
    assert list(worse.pools) == ["a", "b", "c"]
    assert worse.overall.mean == pytest.approx((0.9 + 0.9 - 0.2) / 3)


def test_pools_of_one_table_are_drawn_together() -> None:
    """The same questions twice are no more evidence than once; two tables are."""
    together = verdict([pool("a", 0.1, table="t"), pool("b", 0.1, table="t")]).overall
    alone = verdict([pool("a", 0.1, table="t")]).overall
    apart = verdict([pool("a", 0.1, table="t"), pool("b", 0.1, table="u")]).overall
    width = alone.high - alone.low
    assert together.high - together.low == pytest.approx(width, rel=1e-6)
    assert apart.high - apart.low == pytest.approx(width / np.sqrt(2), rel=0.1)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="'a' lacks differences"):
        verdict([Difference("a", "t", np.array([np.nan]), np.array([0]))])
    with pytest.raises(ValueError, match="no pool"):
        verdict([])


def test_shares_are_paired_with_their_base() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.6).astype(float)
    other = np.where(rng.random(400) < 0.1, 1 - base, base)
    group = np.arange(400)
    alike, near = shares(np.stack([base, other], axis=1), group, base, group)
    assert (alike.mean, alike.low, alike.high) == (1.0, 1.0, 1.0)
    assert near.mean == pytest.approx(other.mean() / base.mean())
    [apart] = side_by_side(other[:, None], group)
    assert near.high - near.low < (apart.high - apart.low) / base.mean()
    half = np.flatnonzero(group % 2)
    [some] = shares(other[:, None], group, base[half], group[half])
    assert some.mean == pytest.approx(other.mean() / base[half].mean())
    with pytest.raises(ValueError, match="no shares of nothing"):
        shares(other[:, None], group, base * 0, group)

"""Hulls, budgets, AIQ and the measures of a pair, against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from router_training.curves import Points, aiq, budget_acc, operating_points, pair
from tests.router_training.helpers import NAN, outcomes

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

point = st.tuples(st.integers(1, 100), st.integers(0, 100)).map(lambda p: (p[0] / 10, p[1] / 100))
some = st.lists(point, min_size=1, max_size=12)


def of(points: list[tuple[float, float]]) -> Points:
    return Points.of(np.array([p[0] for p in points]), np.array([p[1] for p in points]))


def test_hull_by_hand() -> None:
    # (2, .5) lies below the line from (1, .4) to (3, .8); (4, .7) is dearer and worse than (3, .8)
    hull = of([(4, 0.7), (1, 0.4), (2, 0.5), (3, 0.8), (1, 0.3)]).hull()
    assert hull.cost.tolist() == [1, 3]
    assert hull.quality.tolist() == [0.4, 0.8]


def test_aiq_by_hand() -> None:
    # from 1 to 3 the mean is .6, from 3 to 5 flat at .8; nothing from 0 to 1
    assert aiq(of([(1, 0.4), (3, 0.8)]), 5) == pytest.approx((2 * 0.6 + 2 * 0.8) / 5)
    # cut at c_max 2, where the line stands at .6
    assert aiq(of([(1, 0.4), (3, 0.8)]), 2) == pytest.approx(0.5 / 2)
    assert aiq(of([(3, 0.8)]), 2) == 0
    assert aiq(of([(0, 0.8)]), 0) is None
    assert aiq(of([(0, 0.8)]), 2) == pytest.approx(0.8)


def test_budget_by_hand() -> None:
    points = of([(1, 0.4), (2, 0.3), (4, 0.8)])
    assert points.within(0.99) is None
    assert points.within(1) == pytest.approx(0.4)
    assert points.within(3) == pytest.approx(0.55)  # halfway from .3 to .8: no hull
    assert points.within(9) == pytest.approx(0.8)
    assert points.mixed(2.5) == (1, 2, 0.25)
    assert budget_acc(points, 10) == {
        "0.05": None,
        "0.10": pytest.approx(0.4),
        "0.25": pytest.approx(0.425),
        "0.50": pytest.approx(0.8),
    }


@settings(deadline=None)
@given(points=some, extra=point, c_max=st.integers(1, 120).map(lambda c: c / 10))
def test_a_dominated_point_changes_no_aiq(
    points: list[tuple[float, float]], extra: tuple[float, float], c_max: float
) -> None:
    cost, quality = extra
    before = aiq(of(points), c_max)
    after = aiq(of([*points, extra]), c_max)
    assert before is not None
    assert after is not None
    assert after >= before - 1e-12
    if any(c <= cost and q >= quality for c, q in points):
        assert after == pytest.approx(before, abs=1e-12)


@settings(deadline=None)
@given(points=some)
def test_the_hull_is_concave_rising_and_above_every_point(
    points: list[tuple[float, float]],
) -> None:
    hull = of(points).hull()
    assert (np.diff(hull.cost) > 0).all()
    assert (np.diff(hull.quality) > 0).all()
    slopes = np.diff(hull.quality) / np.diff(hull.cost)
    assert (np.diff(slopes) < 1e-9).all()
    for cost, quality in points:
        above = hull.within(cost)
        assert above is not None
        assert above >= quality - 1e-9


@settings(deadline=None)
@given(points=some, budget=st.floats(0, 12))
def test_a_budget_is_kept(points: list[tuple[float, float]], budget: float) -> None:
    found = of(points)
    at = found.mixed(budget)
    if at is None:
        assert budget < found.cost[0]
        return
    low, high, share = at
    assert high - low in (0, 1)
    assert 0 <= share <= 1
    assert (1 - share) * found.cost[low] + share * found.cost[high] <= budget + 1e-9


def test_points_need_values() -> None:
    with pytest.raises(ValueError, match="known cost"):
        Points.of(np.array([1.0]), np.array([np.nan]))
    with pytest.raises(ValueError, match="known cost"):
        Points.of(np.array([]), np.array([]))


def test_operating_points_by_hand() -> None:
    data = outcomes([[0, 1], [1, 1], [0, 1]], [[1, 10], [1, 10], [1, 10]])
    predicted = np.array([[0.1, 0.9], [0.5, 0.6], [0.4, 0.7]])
    found = operating_points(predicted, np.asarray(data.cost), data)
    assert found is not None
    points, chosen = found
    # from all cheap to all dear, one question after the other by what dearer is expected to bring
    assert points.cost.tolist() == [1, 4, 7, 10]
    np.testing.assert_allclose(points.quality, [1 / 3, 2 / 3, 1, 1])
    assert chosen.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]]


def test_no_operating_points_without_prices_or_outcomes() -> None:
    predicted = np.full((2, 2), 0.5)
    cost = np.ones((2, 2))
    unpriced = outcomes([[1, 0], [0, 1]], [[1, NAN], [1, 1]])
    assert operating_points(predicted, cost, unpriced) is None
    nobody = outcomes([[1, 0], [NAN, NAN]], cost)
    assert operating_points(predicted, cost, nobody) is None
    missing = outcomes([[1, NAN], [0, 1]], [[1, NAN], [1, 1]])
    found = operating_points(predicted, cost, missing)
    assert found is not None
    assert (found[1][:, 0] == 0).all()


def test_pair_by_hand() -> None:
    # four questions, needs in order: the strong model gains 1, 1, 0, 0 of a gap of 2 in four
    found = pair(np.array([4, 3, 2, 1]), np.array([0, 0, 1, 0]), np.array([1, 1, 1, 0]), bins=4)
    assert found is not None
    assert found.share == (0, 0.25, 0.5, 0.75, 1)
    assert found.recovered == (0, 0.5, 1, 1, 1)
    assert found.apgr == pytest.approx(0.25 * (0.25 + 0.75 + 1 + 1))
    assert found.cpt50 == pytest.approx(0.25)
    assert found.cpt80 == pytest.approx(0.25 + 0.25 * 0.6)


def test_no_pair_without_a_gap() -> None:
    need = np.arange(4.0)
    same = np.array([0.0, 1, 0, 1])
    assert pair(need, same, same) is None
    assert pair(need, same, same - 0.1) is None
    assert pair(need, same, np.array([1, 1, 1, np.nan])) is None
    assert pair(np.array([]), np.array([]), np.array([])) is None


def test_equal_needs_are_routed_together() -> None:
    """Nothing is known of a router that says the same of all but a random share."""
    found = pair(np.zeros(50), np.zeros(50), np.ones(50))
    assert found is not None
    assert (found.apgr, found.cpt50, found.cpt80) == pytest.approx((0.5, 0.5, 0.8))


@settings(deadline=None, max_examples=30)
@given(scores=hnp.arrays(np.float64, (60, 2), elements=st.sampled_from([0.0, 1.0])))
def test_random_needs_have_an_apgr_of_a_half_in_expectation(scores: Array) -> None:
    scores[:40] = [0, 1]  # so that there is a gap
    rng = np.random.default_rng(0)
    found = [pair(rng.random(60), scores[:, 0], scores[:, 1]) for _ in range(400)]
    values = np.array([p.apgr for p in found if p is not None])
    assert values.mean() == pytest.approx(0.5, abs=4 * values.std() / 20 + 1e-9)


def test_perfect_needs_beat_random_and_reversed_ones_do_not() -> None:
    rng = np.random.default_rng(3)
    weak, strong = (rng.random(2000) < 0.6) * 1.0, (rng.random(2000) < 0.8) * 1.0
    best, worst = pair(strong - weak, weak, strong), pair(weak - strong, weak, strong)
    assert best is not None
    assert worst is not None
    assert best.apgr > 0.9 > 0.1 > worst.apgr
    assert max(best.recovered) > 1  # where the weak model is better, the strong one is not asked

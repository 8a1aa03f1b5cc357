"""From "this quality" or "this spend" to a weight on cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from composer.routing.curve import Curve, Point


def point(weight: float, quality: float, cost: float) -> Point:
    return Point(
        weight=weight,
        quality=quality,
        low=quality - 0.02,
        high=quality + 0.02,
        cost=cost,
        cost_low=cost * 0.9,
        cost_high=cost * 1.1,
    )


def curve(*points: Point) -> Curve:
    return Curve(best_single=0.8, best_single_cost=4.0, points=points)


FALLING = curve(point(0, 0.84, 5.0), point(1, 0.8, 3.0), point(100, 0.6, 1.0))


def test_the_least_cost_that_keeps_the_quality() -> None:
    assert FALLING.at_quality(1.0) == FALLING.points[1]
    there = FALLING.at_quality(0.875)  # 0.7: half-way, geometrically
    assert there.weight == pytest.approx(10)
    assert there.quality == pytest.approx(0.7)
    assert there.cost == pytest.approx(2.0)


def test_from_no_weight_at_all_between_is_linear() -> None:
    there = FALLING.at_quality(1.025)  # 0.82
    assert there.weight == pytest.approx(0.5)
    assert there.cost == pytest.approx(4.0)


def test_what_is_out_of_reach() -> None:
    assert FALLING.at_quality(1.2) == FALLING.points[0]
    assert FALLING.at_cost(0.5) == FALLING.points[-1]
    assert FALLING.most == pytest.approx(1.05)


def test_what_is_surpassed_at_every_weight() -> None:
    assert FALLING.at_quality(0.1) == FALLING.points[-1]
    assert FALLING.at_cost(50.0) == FALLING.points[0]


def test_a_spend_is_kept() -> None:
    there = FALLING.at_cost(2.0)
    assert there.weight == pytest.approx(10)
    assert there.cost == pytest.approx(2.0)


def test_a_better_point_at_a_higher_weight_is_taken() -> None:
    rising = curve(point(0, 0.7, 5.0), point(1, 0.8, 3.0), point(2, 0.6, 1.0))
    assert rising.at_quality(0.5 / 0.8).cost == 1.0
    assert rising.at_quality(1.0).weight == 1


def test_a_lucky_rise_behind_a_dip_is_not() -> None:
    dipped = curve(point(0, 0.8, 5.0), point(1, 0.5, 3.0), point(2, 0.75, 1.0))
    there = dipped.at_quality(0.7 / 0.8)
    assert there.quality == pytest.approx(0.7)
    assert there.weight < 1


def alone(weight: float, quality: float, cost: float) -> Point:
    return point(weight, quality, cost).model_copy(update={"expert": "e"})


@pytest.mark.parametrize("barred", [{"gap": True}, {"expert": "e"}])
def test_nothing_is_read_between_a_weight_and_what_is_none(barred: dict[str, object]) -> None:
    first, last = point(0, 0.8, 5.0).model_copy(update=barred), point(1, 0.6, 1.0)
    barrier = curve(first, last)
    assert barrier.at_quality(0.7 / 0.8) == first  # keeps more than was promised
    assert barrier.at_cost(3.0) == last  # spends less


def test_an_expert_stands_between_weights_with_one_of_theirs() -> None:
    mixed = curve(point(0, 0.84, 5.0), alone(0, 0.82, 3.0), point(2, 0.6, 1.0))
    assert mixed.at_quality(1.0).expert == "e"
    assert mixed.at_cost(4.0).expert == "e"
    assert mixed.at_quality(1.05).expert is None
    with pytest.raises(ValidationError, match="rising weight"):
        curve(point(1, 0.84, 5.0), alone(0, 0.82, 3.0))


def test_shares_have_the_bounds_that_were_drawn_together() -> None:
    narrow = point(0, 0.8, 5.0).model_copy(update={"share": (0.99, 1.01)})
    assert curve(narrow).share(narrow) == (1.0, 0.99, 1.01)
    assert curve(narrow).share(point(0, 0.8, 5.0))[1:] == pytest.approx((0.975, 1.025))
    two = curve(narrow, point(1, 0.6, 1.0).model_copy(update={"share": (0.7, 0.8)}))
    assert two.at_quality(0.7 / 0.8).share == pytest.approx((0.845, 0.905))


@pytest.mark.parametrize("weights", [(), (0, 0), (1, 0)])
def test_points_come_by_rising_weight(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="rising weight"):
        curve(*(point(weight, 0.5, 1.0) for weight in weights))


@given(
    steps=st.lists(st.tuples(st.floats(0.01, 0.2), st.floats(0.05, 1)), min_size=1, max_size=8),
    share=st.floats(0, 1.2),
    spend=st.floats(0, 9),
)
def test_a_falling_curve_holds_what_it_promises(
    steps: list[tuple[float, float]], share: float, spend: float
) -> None:
    points, quality, cost = [point(0, 0.8, 8.0)], 0.8, 8.0
    for number, (worse, cheaper) in enumerate(steps):
        quality, cost = quality - worse, cost * (1 - cheaper / 2)
        points.append(point(10.0 ** (number - 3), quality, cost))
    whole = curve(*points)
    reachable = share * 0.8 <= 0.8
    there = whole.at_quality(share)
    assert 0 <= there.weight <= points[-1].weight
    if reachable:
        assert there.quality >= share * 0.8 - 1e-9
    if there.quality > share * 0.8 + 1e-9:  # only where it could be no cheaper
        assert there == points[-1] or not reachable
    assert whole.at_cost(spend).cost <= max(spend, points[-1].cost) + 1e-9

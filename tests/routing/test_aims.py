"""Whose word counts on cost, and what it is read off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from api.composer_field import ComposerField
from composer.errors import Unsupported
from composer.routing.aims import aim_of, beyond
from composer.routing.base import Scores
from composer.types import Component, Policy
from tests.routing.test_curve import FALLING

PRICE = np.array([2.0, 1.0], np.float32)
COST = np.array([0.02, 0.01], np.float32)


def scores(*, priced: bool = True) -> Scores:
    quality = np.array([0.9, 0.8], np.float32)
    return Scores(("a", "b"), quality, quality * 0, {}, COST if priced else None)


def policy(**changes: Any) -> Policy:
    return Policy("p", Component("learned", None), Component("single", None), ("a", "b"), **changes)


def test_a_weight_is_on_prices() -> None:
    aim = aim_of(policy(cost_weight=0.3), PRICE, scores(), FALLING)
    assert (aim.weight, aim.cost is PRICE, dict(aim.reasons)) == (0.3, True, {})


def test_a_policys_share_of_quality() -> None:
    aim = aim_of(policy(quality=1.0, cost_weight=0.3), PRICE, scores(), FALLING)
    assert (aim.weight, aim.cost is COST) == (1, True)
    assert aim.reasons["aim"] == {
        "quality": 1.0,
        "expected_quality": 1.0,
        "interval": [0.975, 1.025],
        "call_cost": 3.0,
    }
    assert aim.rule == "aim_quality"


def test_the_requests_word_goes_first() -> None:
    asked = policy(quality=1.0)
    assert aim_of(asked, PRICE, scores(), FALLING, max_cost=1.5).weight < 100
    assert aim_of(asked, PRICE, scores(), FALLING, quality=0.1).weight == 100
    assert aim_of(policy(max_cost=1.0), PRICE, scores(), FALLING, quality=1.0).weight == 1


def test_what_is_out_of_reach_is_told() -> None:
    aim = aim_of(policy(), PRICE, scores(), FALLING, max_cost=0.1)
    assert aim.reasons["aim"]["out_of_reach"] is True
    # As after a promotion: the policy's own aim is no caller's to mend.
    aim = aim_of(policy(quality=1.5), PRICE, scores(), FALLING)
    assert aim.reasons["aim"]["out_of_reach"] is True


@pytest.mark.parametrize("quality", [1.06, 1.5, 2.0])
def test_a_quality_beyond_the_curve_is_refused(quality: float) -> None:
    with pytest.raises(Unsupported, match=r"curve has is 1\.05 of") as no:
        aim_of(policy(), PRICE, scores(), FALLING, quality=quality)
    assert no.value.param == "composer.quality"
    told = beyond(FALLING, quality)
    assert told is not None
    assert told.startswith(f"quality {quality:g} is out of reach")


def test_where_each_expert_knows_its_own_questions_routing_is_several_times_as_good() -> None:
    """No fixed limit stands between a caller and what the curve reaches."""
    apart = FALLING.model_copy(update={"best_single": FALLING.best_single / 3})
    assert ComposerField(quality=3.0).quality == 3.0
    assert aim_of(policy(), PRICE, scores(), apart, quality=3.0).reasons["aim"]["quality"] == 3.0
    assert beyond(apart, 3.2) is not None


def test_routing_may_be_better_than_the_best_single_expert_and_1_may_always_be_asked() -> None:
    assert aim_of(policy(), PRICE, scores(), FALLING, quality=1.05).weight == 0
    worse = FALLING.model_copy(update={"points": FALLING.points[2:]})
    assert aim_of(policy(), PRICE, scores(), worse, quality=1.0).reasons["aim"]["out_of_reach"]
    assert beyond(worse, 1.01) is not None


def test_of_several_calls_the_spend_is_that_of_all() -> None:
    aim = aim_of(policy(), PRICE, scores(), FALLING, max_cost=6.0, calls=3)
    assert aim.reasons["aim"]["call_cost"] == pytest.approx(2.0)  # a third
    assert aim.room == pytest.approx(4.0)
    assert aim.rule == "aim_max_cost"
    cheapest = aim_of(policy(), PRICE, scores(), FALLING, max_cost=1.5, calls=3)
    assert cheapest.room == pytest.approx(0.5)
    assert "out_of_reach" not in cheapest.reasons["aim"]
    told = cheapest.told(("a", "b"), ("b", "a"), 1)
    assert told["aim"]["expected_cost"] == pytest.approx([0.01, 0.03])
    plain = aim_of(policy(), PRICE, scores(), FALLING)
    assert plain.told(("a", "b"), ("b",), 1) == {}


def test_an_aim_that_one_expert_meets_best_names_it() -> None:
    alone = FALLING.points[1].model_copy(update={"expert": "b"})
    points = (FALLING.points[0], alone, FALLING.points[2])
    aim = aim_of(
        policy(quality=1.0), PRICE, scores(), FALLING.model_copy(update={"points": points})
    )
    assert (aim.expert, aim.weight) == ("b", 1)
    assert aim.reasons["aim"]["expert"] == "b"


def test_what_is_within_reach_is_not_out_of_it_by_rounding() -> None:
    for spend in np.linspace(1.0, 3.0, 1001):
        aim = aim_of(policy(), PRICE, scores(), FALLING, max_cost=float(spend))
        assert "out_of_reach" not in aim.reasons["aim"]


@pytest.mark.parametrize("wish", ["quality", "max_cost"])
def test_no_curve_no_promise(wish: str) -> None:
    for curve, found in ((None, scores()), (FALLING, scores(priced=False))):
        with pytest.raises(Unsupported, match=f"{wish} needs a router trained on outcomes") as told:
            aim_of(policy(), PRICE, found, curve, **{wish: 0.5})
        assert told.value.param == f"composer.{wish}"
        with pytest.raises(Unsupported) as told:
            aim_of(policy(**{wish: 0.5}), PRICE, found, curve)
        assert told.value.param is None


def test_a_spend_that_leaves_no_choice_gets_the_cheapest() -> None:
    """Though a surer prediction than those the curve was made of would outbid its last weight."""
    cheapest = FALLING.points[-1].cost
    for spend in (cheapest, cheapest / 100):
        aim = aim_of(policy(), PRICE, scores(), FALLING, max_cost=spend)
        sure = np.array([1.0, 0.0])
        assert np.argmax(sure - aim.weight * np.array([2e-9, 1e-9])) == 1
    more = aim_of(policy(), PRICE, scores(), FALLING, max_cost=cheapest * 1.5)
    assert more.weight <= FALLING.points[-1].weight

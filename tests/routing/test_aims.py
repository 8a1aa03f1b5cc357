"""Whose word counts on cost, and what it is read off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from composer.errors import Unsupported
from composer.routing.aims import aim_of
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
        "expected_cost": 3.0,
    }


def test_the_requests_word_goes_first() -> None:
    asked = policy(quality=1.0)
    assert aim_of(asked, PRICE, scores(), FALLING, max_cost=1.0).weight == 100
    assert aim_of(asked, PRICE, scores(), FALLING, quality=0.1).weight == 100
    assert aim_of(policy(max_cost=1.0), PRICE, scores(), FALLING, quality=1.0).weight == 1


@pytest.mark.parametrize("wish", [{"quality": 1.5}, {"max_cost": 0.1}])
def test_what_is_out_of_reach_is_told(wish: dict[str, float]) -> None:
    aim = aim_of(policy(), PRICE, scores(), FALLING, **wish)
    assert aim.reasons["aim"]["out_of_reach"] is True


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

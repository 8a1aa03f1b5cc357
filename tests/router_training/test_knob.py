"""The curve: its promises hold on questions that nobody had seen."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.routing.aims import aim_of
from composer.routing.base import Scores
from composer.routing.choose import choose, most_experts
from composer.routing.curve import Curve, Point
from composer.types import Component, Policy, Unsure
from router_training.knob import ASKED, CurveTrial, curve_of, enveloped
from router_training.promises import promise_row
from router_training.train import train
from tests.router_training.helpers import outcomes
from tests.router_training.synthetic import stamp, table
from tests.routing.helpers import WordEmbedder


def test_promises_hold_on_held_out_questions() -> None:
    encode = WordEmbedder().encode
    model = train(table(600), "category", encode, stamp())
    curve = model.manifest.curve
    assert curve is not None
    held_out = table(3000, seed=4)
    scored = model.score(held_out.text, encode)
    assert scored.cost is not None
    best = int(np.argmax([e.quality for e in model.manifest.experts]))
    kept = CurveTrial(curve, scored.quality, scored.cost, held_out, best).kept_promises()
    assert kept is not None
    for share, promise in zip(ASKED, kept, strict=True):
        assert promise["within_interval"], promise
        assert promise["promised"] >= share - 1e-6
        assert promise["promised_quality"] == pytest.approx(promise["promised"] * curve.best_single)
        low, high = promise["achieved_ci95"]
        assert low <= promise["achieved"] <= high
        assert promise["achieved_cost"] == pytest.approx(promise["promised_cost"], rel=0.25)
    costs = [promise["achieved_cost"] for promise in kept]
    assert costs == sorted(costs)
    assert costs[0] < 0.6 * curve.best_single_cost


def test_the_curve_runs_from_quality_alone_to_the_cheapest() -> None:
    rng = np.random.default_rng(0)
    cost = np.tile(np.array([[1.0, 0.1]]), (50, 1))
    both = outcomes(np.stack([np.ones(50), rng.random(50) < 0.4], axis=1), cost)
    predicted = np.stack([np.full(50, 0.9), rng.uniform(0.1, 0.8, 50)], axis=1)
    curve = curve_of(predicted, cost, both, 0)
    assert curve is not None
    first, last = curve.points[0], curve.points[-1]
    assert (first.weight, first.quality) == (0.0, 1.0)
    assert (first.cost, last.cost) == (pytest.approx(1.0), pytest.approx(0.1))
    assert (curve.best_single, curve.best_single_cost) == (1.0, pytest.approx(1.0))
    assert all(a.cost > b.cost for a, b in pairwise(curve.points))  # no point decides as another
    assert all(p.low <= p.quality <= p.high for p in curve.points)
    assert all(p.cost_low <= p.cost <= p.cost_high for p in curve.points)


def test_a_promise_is_a_share_of_what_the_best_single_expert_reaches_there() -> None:
    """Questions that are harder for everybody break none."""
    rng = np.random.default_rng(1)
    cost = np.tile(np.array([[1.0, 0.1]]), (400, 1))
    right = np.stack([rng.random(400) < 0.9, rng.random(400) < 0.6], axis=1).astype(float)
    predicted = np.stack([np.full(400, 0.9), rng.uniform(0.1, 0.8, 400)], axis=1)
    curve = curve_of(predicted, cost, outcomes(right, cost), 0)
    assert curve is not None
    harder = right * (rng.random(400) < 0.5)[:, None]
    kept = CurveTrial(curve, predicted, cost, outcomes(harder, cost), 0).kept_promises()
    assert kept is not None
    for promise in kept:
        assert promise["achieved_quality"] < 0.6 * promise["promised_quality"]
        assert promise["achieved"] == pytest.approx(promise["promised"], abs=0.1)
        whole = promise["achieved_quality"] / harder[:, 0].mean()
        assert promise["achieved"] == pytest.approx(whole)


def point(cost: float, quality: float, weight: float = 0.0, expert: str | None = None) -> Point:
    spread = {"low": quality, "high": quality, "cost_low": cost, "cost_high": cost}
    return Point(weight=weight, quality=quality, cost=cost, expert=expert, **spread)


def told(points: list[Point]) -> list[tuple[float, float | str, bool]]:
    return [(p.cost, p.weight if p.expert is None else p.expert, p.gap) for p in points]


def test_a_setting_that_a_single_expert_beats_gives_way_to_it() -> None:
    settings = [point(9, 0.8), point(6, 0.7, 1), point(4, 0.6, 2), point(1, 0.3, 3)]
    singles = [
        point(5, 0.75, expert="good"),  # beats the second
        point(7, 0.6, expert="beaten"),  # by the second
        point(1, 0.3, expert="cheapest"),  # is the last: stays a setting
        point(12, 0.9, expert="best"),  # dearer and better than all
        point(5, 0.75, expert="twin"),
    ]
    points = enveloped(settings, singles)
    assert told(points) == [
        (12, "best", False),
        (9, 0.0, True),
        (5, "good", False),
        (4, 2.0, False),
        (1, 3.0, False),
    ]
    assert [p.weight for p in points] == [0, 0, 1, 2, 3]
    assert told(enveloped(settings[1:3], [point(0, 1, expert="all")])) == [(0, "all", False)]


@given(
    settings=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    singles=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    share=st.floats(0, 1.2),
    spend=st.floats(0.5, 10),
)
def test_no_aim_is_served_by_what_a_single_expert_beats(
    settings: list[tuple[int, int]], singles: list[tuple[int, int]], share: float, spend: float
) -> None:
    ordered = sorted(settings, reverse=True)
    points = [point(c, q, float(i)) for i, (c, q) in enumerate(ordered)]
    alone = [point(c, q, expert=f"e{i}") for i, (c, q) in enumerate(singles)]
    best = max(alone, key=lambda p: p.quality)
    curve = Curve(
        best_single=best.quality,
        best_single_cost=best.cost,
        points=tuple(enveloped(points, alone)),
    )
    assert curve.most >= 1
    for served in (curve.at_quality(share), curve.at_cost(spend), *curve.points):
        if served in curve.points:  # between two of them nothing was measured
            assert not any(
                (s.cost <= served.cost and s.quality > served.quality)
                or (s.cost < served.cost and s.quality >= served.quality)
                for s in alone
            )


@given(
    settings=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    singles=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
)
def test_weights_rise_where_a_greater_one_costs_more(
    settings: list[tuple[int, int]], singles: list[tuple[int, int]]
) -> None:
    """Expected costs are no incurred ones, so these may rise with the weight, too."""
    points = [point(c, q, float(i)) for i, (c, q) in enumerate(settings)]
    alone = [point(c, q, expert=f"e{i}") for i, (c, q) in enumerate(singles)]
    found = tuple(enveloped(points, alone))
    assert Curve(best_single=1.0, best_single_cost=1.0, points=found).points == found


def test_a_router_that_is_worse_than_the_best_single_expert_leaves_it_the_aim() -> None:
    rng = np.random.default_rng(0)
    cost = np.tile(np.array([[1.0, 0.5, 0.1]]), (60, 1))
    right = np.stack([rng.random(60) < p for p in (0.6, 0.9, 0.3)], axis=1).astype(float)
    curve = curve_of(rng.random((60, 3)), cost, outcomes(right, cost), 1)
    assert curve is not None
    assert curve.at_quality(1.0).expert == "e1"
    assert curve.most == pytest.approx(1.0)
    kept = CurveTrial(curve, rng.random((60, 3)), cost, outcomes(right, cost), 1).kept_promises()
    assert kept is not None
    assert (kept[-1]["expert"], kept[-1]["achieved"]) == ("e1", pytest.approx(1.0))
    assert kept[-1]["interval"] == pytest.approx([1.0, 1.0])  # of itself


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"k": 3},
        {"unsure": Unsure(0.6, "ask_more", k=4)},
        {"unsure": Unsure(0.6, "ask_stronger")},
        {"null_expert": "e0", "null_margin": 0.3},
    ],
)
@pytest.mark.parametrize("spent", [0.2, 0.5, 1.0, 3.0])
def test_a_spend_holds_for_all_calls_of_a_plan_together(
    rules: dict[str, Any], spent: float
) -> None:
    rng = np.random.default_rng(2)
    quality = rng.random((300, 4))
    cost = rng.uniform(0.5, 1.5, (300, 4)) * np.array([2.0, 1.0, 0.4, 0.1])
    both = outcomes((rng.random((300, 4)) < quality).astype(float), cost)
    curve = curve_of(quality, cost, both, int(np.argmax(both.quality.mean(axis=0))))
    assert curve is not None
    part = Component("learned", None)
    policy = Policy("p", part, part, both.experts, **rules)
    total = 0.0
    for own, dollars in zip(quality.astype(np.float32), cost.astype(np.float32), strict=True):
        scores = Scores(both.experts, own, own * 0, {}, dollars)
        calls = most_experts(policy)
        aim = aim_of(policy, own * 0, scores, curve, max_cost=spent, calls=calls)
        plan = choose(scores, aim, policy)
        total += aim.told(both.experts, plan.calls, 1)["aim"]["expected_cost"][1]
    assert total / 300 <= spent * 1.02  # between two points the mean is nearly linear, not quite


@pytest.mark.parametrize(("achieved", "place"), [(0.9, "yes"), (0.95, "above"), (0.85, "below")])
def test_more_than_was_promised_is_told_apart_from_less(achieved: float, place: str) -> None:
    row = promise_row(
        {
            "asked": 0.9,
            "expert": "solo",
            "promised": 0.9,
            "interval": [0.88, 0.92],
            "achieved": achieved,
            "achieved_ci95": [0.8, 1.0],
            "within_interval": 0.88 <= achieved <= 0.92,
            "promised_quality": 0.72,
            "achieved_quality": 0.7,
            "promised_cost": 0.001,
            "achieved_cost": 0.0011,
        }
    )
    assert row[0] == "0.9 (solo alone)"
    assert row[1] == "0.900 (0.880 to 0.920)"
    assert row[3:] == [place, "72.0, 70.0", "0.001, 0.0011"]


def test_without_costs_there_is_none() -> None:
    free = outcomes([[1, 0], [0, 1]])
    assert curve_of(free.quality, None, free, 0) is None
    assert curve_of(free.quality, free.quality, free, 0) is None


def test_the_curve_is_of_questions_with_a_choice() -> None:
    quality, cost = np.array([[1.0, 0.0], [1.0, 1.0]] * 20), np.tile([[1.0, 0.1]], (40, 1))
    predicted = np.tile([[0.9, 0.5]], (40, 1))
    both = outcomes(quality, cost)
    once = outcomes(np.vstack([quality, [[0, np.nan]] * 30]), np.vstack([cost, cost[:30]]))
    wider = [np.vstack([a, a[:30]]) for a in (predicted, cost)]
    assert curve_of(*wider, once, 0, seed=1) == curve_of(predicted, cost, both, 0, seed=1)
    alone = once.rows(np.arange(40, 70))
    assert curve_of(wider[0][40:], wider[1][40:], alone, 0) is None
    curve = curve_of(predicted, cost, both, 0)
    assert curve is not None
    assert CurveTrial(curve, wider[0][40:], wider[1][40:], alone, 0).kept_promises() is None

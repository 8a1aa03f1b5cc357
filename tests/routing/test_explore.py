"""Exploration: probabilities that are right, a draw that follows them, requests left alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.aims import Aim
from composer.routing.base import Exploration, Scores
from composer.routing.choose import choose
from composer.routing.explore import draw_of, explored, propensities, thompson
from composer.types import Component, Plan, Policy, Unsure

QUALITY = (0.8, 0.7, 0.3, np.nan)
IDS = ("a", "b", "c", "d")
WHY = {"a": {"like": "x"}, "b": {"like": "y"}}


def policy(**changes: object) -> Policy:
    single = Component("single", None)
    return Policy(id="auto", router=single, strategy=single, experts=IDS, **changes)  # type: ignore[arg-type]


def decided(
    draw: float | None,
    *,
    rules: Policy | None = None,
    floor: float = 0.3,
    thompson: float = 0.0,
    weight: float = 0.0,
) -> Plan:
    scores = Scores(
        IDS,
        np.array(QUALITY, np.float32),
        np.full(4, 0.1, np.float32),
        WHY,
        exploration=Exploration(floor, thompson, {"context": [1.0]}),
    )
    aim = Aim(weight, np.array([1, 0, 0, 0], np.float32))
    rules = rules or policy()
    return explored(choose(scores, aim, rules), scores, aim, rules, draw)


def drawn(draw: float | None, *, k: int = 1, replacement: bool = False, **rules: object) -> Plan:
    scores = Scores(
        IDS,
        np.array(QUALITY, np.float32),
        np.full(4, 0.1, np.float32),
        WHY,
        exploration=Exploration(
            0.0, chances=np.array([0.1, 0.6, 0.1, 0.2]), replacement=replacement
        ),
    )
    aim, own = Aim(0.0, np.zeros(4, np.float32)), policy(k=k, **rules)
    return explored(choose(scores, aim, own), scores, aim, own, draw)


def test_a_router_s_own_chances_are_followed_among_the_eligible() -> None:
    plans = [drawn(draw_of(f"request {i}")) for i in range(2000)]
    counts = Counter(plan.best for plan in plans)
    assert counts["d"] == 0
    for expert, share in {"a": 1 / 8, "b": 6 / 8, "c": 1 / 8}.items():
        assert counts[expert] / 2000 == pytest.approx(share, abs=0.04)
        plan = next(plan for plan in plans if plan.best == expert)
        assert plan.reasons["rule"] == "drawn"
        assert plan.reasons["drawn"] == {expert: share}
        assert plan.choices[0].weight == 1.0
        assert plan.calls == (expert,)
        assert "exploration" not in plan.reasons


def test_several_are_drawn_each_once_or_as_often_as_they_are() -> None:
    once = [drawn((i + 0.5) / 50, k=2) for i in range(50)]
    assert {len(plan.choices) for plan in once} == {2}
    assert all(plan.scores[plan.calls[0]] >= plan.scores[plan.calls[1]] for plan in once)
    often = [drawn((i + 0.5) / 50, k=4, replacement=True) for i in range(50)]
    for plan in often:
        weights = [choice.weight for choice in plan.choices]
        assert sum(weights) == pytest.approx(1)
        # Of three draws: k is 4, and the plan has the three who are eligible.
        assert all((3 * w) == pytest.approx(round(3 * w)) for w in weights)
        # A share of the draws is no probability, and a vote by log-odds reads one.
        for choice in plan.choices:
            assert choice.quality == pytest.approx(QUALITY[IDS.index(choice.expert)])
    assert {len(plan.choices) for plan in often} >= {1, 2}


def test_nobody_is_drawn_where_nobody_may_be_or_a_rule_decided() -> None:
    assert drawn(None).best == "a"
    assert {drawn((i + 0.5) / 50, min_quality=0.75).best for i in range(50)} == {"a"}
    below = {"threshold": 0.9, "default_expert": "c"}
    assert {drawn((i + 0.5) / 50, **below).best for i in range(50)} == {"c"}
    assert drawn(0.3).calls == drawn(0.3).calls


def test_the_floor_is_spread_evenly_and_the_rest_is_the_best_ones() -> None:
    plans = [decided((i + 0.5) / 1000) for i in range(1000)]
    counts = Counter(plan.best for plan in plans)
    assert counts == {"a": 800, "b": 100, "c": 100}
    for plan in plans:
        told = plan.reasons["exploration"]
        assert told["greedy"] == "a"
        assert told["propensity"] == pytest.approx(counts[plan.best] / 1000)
        assert plan.calls == (plan.best,)
        assert plan.learning == {"context": [1.0]}
        assert plan.best in plan.scores
    assert {plan.reasons["rule"] for plan in plans if plan.best != "a"} == {"explored"}


def test_what_is_told_of_the_choice_is_told_of_the_expert_that_was_drawn() -> None:
    plans = {}
    for i in range(100):
        plan = decided((i + 0.5) / 100, rules=policy(unsure=Unsure(below=0.75)))
        plans[plan.best] = plan
        assert plan.reasons["evidence"] == ({} if plan.best == "c" else {plan.best: WHY[plan.best]})
    assert {best: plan.confident for best, plan in plans.items()} == {
        "a": True,
        "b": False,
        "c": False,
    }
    assert {decided((i + 0.5) / 100).confident for i in range(100)} == {None}


def test_a_request_not_to_be_explored_on_gets_the_best() -> None:
    for thompson_ in (0.0, 1.0):
        plan = decided(None, floor=1.0, thompson=thompson_)
        assert plan.best == "a"
        assert plan.reasons["exploration"] == {"greedy": "a", "propensity": 1.0}


@pytest.mark.parametrize(
    "rules",
    [
        policy(k=2),
        policy(threshold=0.9, default_expert="b"),
        policy(null_expert="b", null_margin=0.2),
        policy(unsure=Unsure(below=0.9)),
    ],
)
def test_what_a_rule_decided_is_not_explored(rules: Policy) -> None:
    plans = {decided(draw, rules=rules, floor=1.0).calls for draw in np.linspace(0, 0.99, 20)}
    assert len(plans) == 1


def test_nobody_below_the_floor_of_quality_is_tried() -> None:
    rules = policy(min_quality=0.5)
    counts = Counter(decided(d, rules=rules, floor=1.0).best for d in np.linspace(0, 0.999, 100))
    assert set(counts) == {"a", "b"}


def test_cost_counts_in_the_draw() -> None:
    plan = decided(0.5, weight=0.5, thompson=1.0, floor=0.0)  # a is worth 0.3 now
    assert plan.best == "b"
    assert plan.reasons["exploration"]["propensity"] > 0.9


def test_a_smaller_part_of_the_uncertainty_tries_out_less() -> None:
    best = [
        decided(0.0, floor=0.0, thompson=part).reasons["exploration"]["propensity"]
        for part in (1.0, 0.5, 0.2, 0.0)
    ]
    assert best == sorted(best)
    assert best[0] < 0.95
    assert best[-1] == 1.0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.5)), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_propensities_are_a_distribution_with_a_floor(
    experts: list[tuple[float, float]], floor: float
) -> None:
    value, spread = np.array(experts).T
    chances = propensities(value, spread, int(value.argmax()), floor)
    assert chances.sum() == pytest.approx(1)
    assert (chances >= floor / len(value) - 1e-12).all()


def test_thompson_is_the_share_of_draws_that_are_largest() -> None:
    mean = np.array([0.6, 0.55, 0.5, 0.2])
    spread = np.array([0.02, 0.1, 0.15, 0.3])
    drawn = np.random.default_rng(0).normal(mean, spread, (200_000, 4)).argmax(axis=1)
    assert thompson(mean, spread) == pytest.approx(np.bincount(drawn) / len(drawn), abs=0.01)


def test_a_requests_draw_is_its_own_and_uniform() -> None:
    draws = np.array([draw_of(f"chatcmpl-{i}") for i in range(4000)])
    assert draw_of("chatcmpl-7") == draws[7]
    assert np.histogram(draws, bins=8, range=(0, 1))[0] == pytest.approx(500, abs=100)

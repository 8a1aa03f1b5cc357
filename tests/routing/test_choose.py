"""Scores and costs to plans: order, ties, threshold, weights, and who may never be chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from composer.routing.aims import Aim
from composer.routing.base import Scores
from composer.routing.choose import SHOWN_SCORES, choose, most_experts
from composer.types import BoolArray, Component, Policy, Unsure

NAN = float("nan")


def scores(*quality: float, **reasons: Any) -> Scores:
    values = np.array(quality, np.float32)
    return Scores(
        experts=tuple(f"e{i}" for i in range(len(quality))),
        quality=values,
        uncertainty=np.zeros_like(values),
        reasons=reasons,
    )


def policy(n: int = 9, **changes: Any) -> Policy:
    router, strategy = Component("neighbours", None), Component("vote", None)
    return Policy("p", router, strategy, tuple(f"e{i}" for i in range(n)), **changes)


def free(found: Scores) -> Aim:
    return Aim(0.0, np.zeros(len(found.experts), np.float32))


def test_the_best_expert_alone_by_default() -> None:
    found = scores(0.2, 0.9, 0.4, e1={"similarity": 0.8})
    plan = choose(found, free(found), policy())
    assert (plan.policy, plan.strategy, plan.best, plan.calls) == ("p", "vote", "e1", ("e1",))
    assert plan.choices[0].weight == 1.0
    assert plan.reasons == {"rule": "best_score", "evidence": {"e1": {"similarity": 0.8}}}
    assert plan.scores == {"e1": 0.9, "e2": 0.4, "e0": 0.2}


def test_k_experts_with_their_qualities_as_weights() -> None:
    found = scores(0.2, 0.9, 0.3, NAN)
    plan = choose(found, free(found), policy(k=3))
    assert plan.calls == ("e1", "e2", "e0")
    assert [c.weight for c in plan.choices] == pytest.approx([0.9 / 1.4, 0.3 / 1.4, 0.2 / 1.4])


def test_fewer_eligible_than_k() -> None:
    found = scores(NAN, 0.5, NAN)
    assert choose(found, free(found), policy(k=5)).calls == ("e1",)


def test_experts_without_any_quality_share_equally() -> None:
    found = scores(0.0, 0.0)
    assert [c.weight for c in choose(found, free(found), policy(k=2)).choices] == [0.5, 0.5]


def test_ties_go_to_the_earlier_expert() -> None:
    found = scores(0.1, *[0.5] * 40)
    assert choose(found, free(found), policy(k=3)).calls == ("e1", "e2", "e3")


def test_cost_counts_by_its_weight() -> None:
    found = scores(0.9, 0.8)
    cost = np.array([10.0, 1.0], np.float32)
    assert choose(found, Aim(0.0, cost), policy()).best == "e0"
    assert choose(found, Aim(0.1, cost), policy()).best == "e1"


def test_below_the_threshold_the_default_expert() -> None:
    found = scores(0.4, 0.1, 0.3)
    below = policy(threshold=0.5, default_expert="e2", k=3)
    plan = choose(found, free(found), below)
    assert plan.calls == ("e2",)
    assert plan.reasons["rule"] == "below_threshold"
    assert plan.reasons["best"] == pytest.approx(0.4)
    assert choose(found, free(found), policy(threshold=0.4, default_expert="e2")).best == "e0"


def test_an_excluded_default_expert_is_not_asked() -> None:
    found = scores(0.4, NAN)
    assert choose(found, free(found), policy(threshold=0.9, default_expert="e1")).best == "e0"


def test_no_default_expert_means_no_threshold() -> None:
    found = scores(0.4, 0.1)
    assert choose(found, free(found), policy(threshold=0.9)).best == "e0"


# --- floors, top-p, the null expert, confidence -------------------------------------------


def test_the_cheapest_above_the_floor_of_quality() -> None:
    found = scores(0.9, 0.7, 0.4)
    cheap = Aim(1.0, np.array([3.0, 2.0, 1.0], np.float32))
    assert choose(found, cheap, policy()).best == "e2"
    assert choose(found, cheap, policy(min_quality=0.6)).best == "e1"


def test_where_none_reaches_the_floor_the_best_by_quality() -> None:
    found = scores(0.3, 0.4, 0.1)
    cheap = Aim(1.0, np.array([3.0, 2.0, 1.0], np.float32))
    plan = choose(found, cheap, policy(min_quality=0.6, k=2))
    assert plan.calls == ("e1",)


@pytest.mark.parametrize(
    ("p", "calls"),
    [(0.5, ("e0",)), (0.6, ("e0",)), (0.7, ("e0", "e1")), (0.9, ("e0", "e1", "e2"))],
)
def test_as_few_as_make_one_right_likely(p: float, calls: tuple[str, ...]) -> None:
    found = scores(0.6, 0.5, 0.5, 0.4)  # 0.6, 0.8, 0.9 and 0.94 with the fourth
    assert choose(found, free(found), policy(k=4, top_p=p)).calls == calls


def test_top_p_is_bounded_by_k() -> None:
    found = scores(0.1, 0.1, 0.1)
    assert len(choose(found, free(found), policy(k=2, top_p=0.99)).calls) == 2


@pytest.mark.parametrize(("margin", "best"), [(0.0, "e0"), (0.1, "e0"), (0.3, "e1")])
def test_an_easy_query_is_the_null_experts(margin: float, best: str) -> None:
    found = scores(0.9, 0.7)
    asked = policy(null_expert="e1", null_margin=margin, k=2)
    assert choose(found, free(found), asked).best == best


def test_an_excluded_null_expert_is_not_asked() -> None:
    found = scores(0.9, NAN)
    assert choose(found, free(found), policy(null_expert="e1", null_margin=1.0)).best == "e0"


@pytest.mark.parametrize(
    ("do", "calls"), [("say", ("e2",)), ("ask_more", ("e2", "e1", "e0")), ("ask_stronger", ("e0",))]
)
def test_below_the_floor_of_confidence(do: Any, calls: tuple[str, ...]) -> None:
    found = scores(0.55, 0.5, 0.4)
    cheap = Aim(1.0, np.array([3.0, 2.0, 1.0], np.float32))
    plan = choose(found, cheap, policy(unsure=Unsure(0.5, do, k=3)))
    assert plan.calls == calls
    assert plan.confident is (do != "say")
    assert plan.reasons["unsure"] == do


# --- aims -------------------------------------------------------------------------------


def spend(*cost: float, room: float, expert: str | None = None) -> Aim:
    costs = np.array(cost, np.float32)
    return Aim(0.0, costs, {"aim": {}}, expert=expert, room=room, rule="aim_max_cost")


def test_the_aims_rule_is_the_plans() -> None:
    found = scores(0.9, 0.8)
    plan = choose(found, spend(1, 1, room=0), policy())
    assert (plan.calls, plan.reasons["rule"], plan.reasons["aim"]) == (("e0",), "aim_max_cost", {})


@pytest.mark.parametrize(
    ("room", "calls"),
    [(0.0, ("e0",)), (2.0, ("e0", "e1")), (3.9, ("e0", "e1")), (4.0, ("e0", "e1", "e2"))],
)
def test_further_calls_fit_into_the_room(room: float, calls: tuple[str, ...]) -> None:
    found = scores(0.9, 0.8, 0.7)
    for asked in (policy(k=3), policy(unsure=Unsure(0.95, "ask_more", k=3))):
        plan = choose(found, spend(9, 2, 2, room=room), asked)
        assert plan.calls == calls
        over = [e for e in ("e0", "e1", "e2") if e not in calls]
        assert plan.reasons.get("over_budget", []) == over


def test_a_strategy_that_asks_one_of_them_needs_no_room() -> None:
    found = scores(0.9, 0.8, 0.7)
    plan = choose(found, spend(9, 2, 2, room=0), policy(k=3), calls=lambda n: (1, 1))
    assert plan.calls == ("e0", "e1", "e2")


@pytest.mark.parametrize(("room", "best"), [(0.5, "e1"), (1.0, "e0")])
def test_nobody_dearer_takes_the_place_of_the_first_but_where_there_is_room(
    room: float, best: str
) -> None:
    found = scores(0.5, 0.4)
    aim = replace(spend(2, 1, room=room), weight=1.0)
    assert choose(found, aim, policy(unsure=Unsure(0.45, "ask_stronger"))).best == best
    assert choose(found, aim, policy(null_expert="e0")).best == best


@pytest.mark.parametrize(("room", "calls"), [(2.0, ("e0",)), (3.0, ("e0", "e1"))])
def test_what_a_stronger_one_costs_more_is_taken_from_the_room(
    room: float, calls: tuple[str, ...]
) -> None:
    """e1 alone costs 1, so that the whole plan may cost 1 and the room: e0 and e1 cost 4."""
    found = scores(0.5, 0.4)
    aim = replace(spend(3, 1, room=room), weight=1.0)
    plan = choose(found, aim, policy(k=2, unsure=Unsure(0.6, "ask_stronger")))
    assert plan.calls == calls


def test_an_aims_expert_goes_first_where_it_may_answer() -> None:
    found = scores(0.9, 0.3, 0.7)
    aim = spend(1, 1, 1, room=9, expert="e1")
    plan = choose(found, aim, policy(k=2, tolerance=0.5, stay=0.5), loaded(0, n=3), loaded(2, n=3))
    assert plan.calls == ("e1", "e0")
    assert plan.reasons["rule"] == "aim_max_cost"
    gone = scores(0.9, NAN, 0.7)
    assert choose(gone, aim, policy(k=2)).calls == ("e0", "e2")


@pytest.mark.parametrize(
    ("rules", "most"),
    [
        ({"k": 2}, 2),
        ({"unsure": Unsure(0.5, "say")}, 1),
        ({"unsure": Unsure(0.5, "ask_more", k=4)}, 4),
        ({"unsure": Unsure(0.5, "ask_stronger")}, 2),
    ],
)
def test_how_many_experts_a_plan_may_cost(rules: dict[str, Any], most: int) -> None:
    assert most_experts(policy(**rules)) == most


def test_sure_enough() -> None:
    found = scores(0.6, 0.5)
    plan = choose(found, free(found), policy(unsure=Unsure(0.5, "ask_more")))
    assert (plan.calls, plan.confident, plan.reasons["rule"]) == (("e0",), True, "best_score")
    assert choose(found, free(found), policy()).confident is None


# --- residents within the tolerance ---------------------------------------------------


def loaded(*where: int, n: int) -> BoolArray:
    return np.isin(np.arange(n), where)


def test_a_resident_within_the_tolerance_takes_the_place_of_the_best() -> None:
    found = scores(0.2, 0.90, 0.86, 0.5, e2={"similarity": 0.8})
    tolerant = policy(tolerance=0.05)
    plan = choose(found, free(found), tolerant, loaded(0, 2, n=4))
    assert plan.calls == ("e2",)
    assert plan.choices[0].weight == 1.0
    assert plan.reasons == {
        "rule": "resident_within_tolerance",
        "instead_of": ["e1"],
        "gave_up": pytest.approx(0.04),
        "evidence": {"e2": {"similarity": 0.8}},
    }


@pytest.mark.parametrize(
    ("where", "tolerance"),
    [
        ((0, 3), 0.05),  # none is near enough
        ((1, 2), 0.05),  # the best is resident
        ((2,), 0.0),  # off by default
        ((), 0.5),  # nobody is
        ((4,), 0.9),  # not eligible
    ],
)
def test_otherwise_nothing_changes(where: tuple[int, ...], tolerance: float) -> None:
    found = scores(0.2, 0.90, 0.86, 0.5, NAN)
    tolerant = policy(tolerance=tolerance)
    assert choose(found, free(found), tolerant, loaded(*where, n=5)) == choose(
        found, free(found), policy()
    )


def test_without_knowing_who_is_resident_nobody_is_preferred() -> None:
    found = scores(0.9, 0.89)
    assert choose(found, free(found), policy(tolerance=0.5)).best == "e0"


def test_the_best_of_several_residents() -> None:
    found = scores(0.80, 0.88, 0.90, 0.88)
    assert choose(found, free(found), policy(tolerance=0.2), loaded(0, 1, 3, n=4)).best == "e1"


def test_cost_counts_in_what_is_given_up() -> None:
    found = scores(0.90, 0.89)
    cost = np.array([0.0, 1.0], np.float32)
    tolerant = policy(tolerance=0.05)
    assert choose(found, Aim(0.1, cost), tolerant, loaded(1, n=2)).best == "e0"
    assert choose(found, Aim(0.0, cost), tolerant, loaded(1, n=2)).best == "e1"


def test_of_several_experts_only_those_near_enough_give_way() -> None:
    found = scores(0.90, 0.80, 0.78, 0.60)
    plan = choose(found, free(found), policy(k=2, tolerance=0.05), loaded(2, 3, n=4))
    assert plan.calls == ("e0", "e2")
    assert plan.reasons["instead_of"] == ["e1"]
    assert plan.reasons["gave_up"] == pytest.approx(0.01)  # 0.02 at one of two places


def test_a_resident_below_the_threshold_is_not_preferred() -> None:
    found = scores(0.52, 0.48, 0.1)
    tolerant = policy(tolerance=0.2, threshold=0.5, default_expert="e2")
    assert choose(found, free(found), tolerant, loaded(1, n=3)).best == "e0"


def test_a_resident_further_down_is_shown() -> None:
    found = scores(*np.linspace(0.9, 0.8, 30))
    plan = choose(found, free(found), policy(30, tolerance=0.2), loaded(25, n=30))
    assert plan.best == "e25"
    assert list(plan.scores) == [*(f"e{i}" for i in range(SHOWN_SCORES)), "e25"]


@given(
    expert=st.lists(
        st.tuples(
            st.one_of(st.just(NAN), st.sampled_from([0.1, 0.5]), st.floats(0, 1, width=32)),
            st.floats(0, 5, width=32),
            st.booleans(),
        ),
        min_size=1,
        max_size=30,
    ),
    k=st.integers(1, 6),
    weight=st.floats(0, 1),
    tolerance=st.floats(0, 0.5),
)
def test_what_residents_may_do(
    expert: list[tuple[float, float, bool]], k: int, weight: float, tolerance: float
) -> None:
    quality, cost, resident = (np.array(column) for column in zip(*expert, strict=True))
    assume(not np.isnan(quality).all())
    found = scores(*quality)
    cost = cost.astype(np.float32)
    asked, aim = policy(len(expert), k=k, tolerance=tolerance), Aim(weight, cost)
    plain = choose(found, aim, asked)
    plan = choose(found, aim, asked, resident)
    utility = np.float64(found.quality - weight * cost)
    slack = 1e-6  # of float32

    number = [int(e[1:]) for e in plan.calls]
    before = [int(e[1:]) for e in plain.calls]
    assert len(set(number)) == len(before)
    assert not np.isnan(quality[number]).any()
    assert sorted(number, key=lambda i: (-utility[i], i)) == number  # best first all the same
    came, went = set(number) - set(before), set(before) - set(number)
    assert all(resident[i] for i in came)
    assert not any(resident[i] for i in went)
    for here in came:
        for gone in went:
            assert utility[here] >= utility[gone] - tolerance - slack
    for out in set(np.flatnonzero(resident & ~np.isnan(quality))) - set(number):
        for here in number:
            assert resident[here] or utility[out] < utility[here] - tolerance + slack
    if came:
        assert plan.reasons["rule"] == "resident_within_tolerance"
        lost = (utility[before].sum() - utility[number].sum()) / len(number)
        assert plan.reasons["gave_up"] == pytest.approx(lost, abs=1e-5)
        assert plan.reasons["gave_up"] <= tolerance + slack
    else:
        assert plan == plain
    assert sum(c.weight for c in plan.choices) == pytest.approx(1)


def test_of_many_experts_the_best_few_are_shown() -> None:
    found = scores(*[0.0] * (SHOWN_SCORES + 1))
    plan = choose(found, free(found), policy(k=SHOWN_SCORES + 1))
    assert list(plan.scores) == [f"e{i}" for i in range(SHOWN_SCORES)]


@given(
    quality=st.lists(st.one_of(st.just(NAN), st.floats(0, 1, width=32)), min_size=1, max_size=40),
    k=st.integers(1, 12),
    weight=st.floats(0, 2),
    data=st.data(),
)
def test_plans_by_definition(
    quality: list[float], k: int, weight: float, data: st.DataObject
) -> None:
    n = len(quality)
    assume(not all(np.isnan(quality)))
    cost = np.array(data.draw(st.lists(st.floats(0, 5, width=32), min_size=n, max_size=n)))
    found = scores(*quality)
    plan = choose(found, Aim(weight, cost.astype(np.float32)), policy(n, k=k))
    utility = found.quality - weight * cost.astype(np.float32)
    eligible = [i for i in range(n) if not np.isnan(quality[i])]
    expected = sorted(eligible, key=lambda i: (-utility[i], i))
    assert plan.calls == tuple(f"e{i}" for i in expected[:k])
    assert sum(c.weight for c in plan.choices) == pytest.approx(1)
    assert list(plan.scores) == [f"e{i}" for i in expected[:SHOWN_SCORES]]

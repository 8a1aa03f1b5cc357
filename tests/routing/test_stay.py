"""A session's experts are kept where the gain of leaving them is small enough, and never beyond."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from composer.routing.aims import Aim
from composer.routing.base import Scores
from composer.routing.choose import choose
from composer.types import BoolArray, Component, Plan, Policy

NAN = float("nan")


def plan(
    quality: list[float],
    last: list[int],
    *,
    resident: list[int] | None = None,
    aim: Aim | None = None,
    **policy: Any,
) -> Plan:
    """The plan over e0, e1, … where `last` answered before and `resident` are loaded (all)."""
    n = len(quality)
    values = np.array(quality, np.float32)
    ids = tuple(f"e{i}" for i in range(n))
    scores = Scores(ids, values, np.zeros(n, np.float32), {})
    made = Policy("p", Component("r", None), Component("s", None), ids, **policy)
    here = range(n) if resident is None else resident
    aim = aim or Aim(0.0, np.zeros(n, np.float32))
    return choose(scores, aim, made, mask(n, here), mask(n, last))


def mask(n: int, members: Any) -> BoolArray:
    return np.isin(np.arange(n), list(members))


def test_the_sessions_expert_is_kept_where_little_is_gained() -> None:
    kept = plan([0.80, 0.84, 0.1], [0], stay=0.05)
    assert kept.calls == ("e0",)
    assert kept.reasons["rule"] == "session_stay"
    assert kept.reasons["instead_of"] == ["e1"]
    assert kept.reasons["gave_up"] == pytest.approx(0.04, abs=1e-6)


def test_it_is_left_for_a_clearly_better_one() -> None:
    left = plan([0.80, 0.86, 0.1], [0], stay=0.05)
    assert left.calls == ("e1",)
    assert left.reasons == {"rule": "best_score", "evidence": {}}


def test_an_expert_that_is_best_anyway_is_no_stay() -> None:
    assert plan([0.9, 0.86], [0], stay=0.05).reasons["rule"] == "best_score"


def test_without_stay_a_session_counts_nothing() -> None:
    assert plan([0.80, 0.81], [0]).calls == ("e1",)


def test_an_ineligible_expert_is_not_kept() -> None:
    assert plan([NAN, 0.3, 0.2], [0], stay=1.0).calls == ("e1",)


def test_nobody_is_kept_below_a_floor() -> None:
    assert plan([0.45, 0.55], [0], stay=0.5, threshold=0.5).calls == ("e1",)
    assert plan([0.45, 0.55], [0], stay=0.5, min_quality=0.5).calls == ("e1",)


def test_all_of_a_sessions_experts_are_kept() -> None:
    kept = plan([0.70, 0.72, 0.74, 0.71], [0, 3], stay=0.05, k=2)
    assert set(kept.calls) == {"e0", "e3"}
    assert kept.calls == ("e3", "e0")  # best first, as ever


def test_cost_counts_in_what_is_gained() -> None:
    dear = Aim(1.0, np.array([0.2, 0.0], np.float32))
    assert plan([0.9, 0.6], [1], aim=dear, stay=0.15).calls == ("e1",)
    assert plan([0.9, 0.6], [1], aim=dear, stay=0.05).calls == ("e0",)


# --- with what is loaded ------------------------------------------------------------------


def test_an_expert_whose_server_is_gone_has_no_warm_prefix_to_stay_for() -> None:
    assert plan([0.80, 0.84], [0], resident=[1], stay=0.05).calls == ("e1",)
    assert plan([0.80, 0.84], [0], resident=[], stay=0.05).calls == ("e1",)


@pytest.mark.parametrize(("better", "calls"), [(0.87, ("e0",)), (0.93, ("e1",))])
def test_leaving_for_one_that_must_be_loaded_costs_a_swap_besides(
    better: float, calls: tuple[str, ...]
) -> None:
    assert plan([0.8, better], [0], resident=[0], stay=0.05, tolerance=0.05).calls == calls


def test_a_loaded_expert_takes_the_place_of_the_sessions_unloaded_one_within_tolerance() -> None:
    moved = plan([0.84, 0.80], [0], resident=[1], stay=0.05, tolerance=0.05)
    assert moved.calls == ("e1",)
    assert moved.reasons["rule"] == "resident_within_tolerance"


quality_of = st.integers(0, 100).map(lambda percent: percent / 100)
qualities = st.lists(st.one_of(quality_of, st.just(NAN)), min_size=1, max_size=8).filter(
    lambda quality: not all(np.isnan(quality))
)
grid = st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0])


@given(qualities, st.data(), grid, grid, st.integers(1, 4), quality_of)
def test_never_an_ineligible_expert_and_never_more_given_up_than_allowed(
    quality: list[float], data: Any, stay: float, tolerance: float, k: int, threshold: float
) -> None:
    n = len(quality)
    members = st.lists(st.integers(0, n - 1), unique=True)
    last, resident = data.draw(members), data.draw(members)
    found = plan(
        quality, last, resident=resident, stay=stay, tolerance=tolerance, k=k, threshold=threshold
    )
    best = plan(quality, [], resident=[], k=k, threshold=threshold)
    value = {f"e{i}": q for i, q in enumerate(quality)}
    assert len(found.calls) == len(best.calls) == min(k, int((~np.isnan(quality)).sum()))
    assert not any(np.isnan(value[e]) for e in found.calls)
    for rank, gone in enumerate(best.calls):
        assert value[gone] - value[found.calls[rank]] <= stay + tolerance + 1e-6
    gave_up = found.reasons.get("gave_up", 0.0)
    assert -1e-6 <= gave_up <= stay + tolerance + 1e-6
    if found.reasons["rule"] == "session_stay":
        assert set(found.calls) & {f"e{i}" for i in last if i in resident}
    for expert in set(found.calls) - set(best.calls):
        assert value[expert] >= threshold


@given(qualities, st.data(), grid)
def test_the_sessions_expert_is_left_only_for_one_better_by_more_than_stay(
    quality: list[float], data: Any, stay: float
) -> None:
    one = data.draw(st.integers(0, len(quality) - 1))
    assume(not np.isnan(quality[one]))
    calls = plan(quality, [one], stay=stay).calls
    gain = np.nanmax(quality) - quality[one]
    assume(abs(gain - stay) > 1e-6)  # a tie goes to the session's
    assert (calls == (f"e{one}",)) == (gain < stay)

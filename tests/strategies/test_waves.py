"""A vote that asks one expert after another: who is asked, why it stops, and what it tells."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import EngineError, Overloaded
from composer.strategies.voting.counting import Weights, log_odds
from composer.types import Choice, Plan, Usage
from tests.strategies.test_strategies import Experts, collect, plan, vote


def rated(*quality: float) -> Plan:
    """A plan of experts of these qualities."""
    choices = tuple(Choice(f"e{i}", 1 / len(quality), q) for i, q in enumerate(quality))
    return Plan("p", "vote", choices, tuple(c.expert for c in choices))


async def told(ask: Experts, of: Plan, **settings: Any) -> tuple[str, dict[str, Any]]:
    (chunk,) = await asyncio.wait_for(collect(vote(**settings), of, ask), 5)
    return chunk.text, dict(chunk.details)


async def test_the_next_is_asked_when_the_last_has_answered() -> None:
    ask = Experts({"e0": "a", "e1": "b", "e2": "b", "e3": "c"}, steps={"e0": 5, "e1": 3})
    text, details = await told(ask, plan(*[0.25] * 4), weights="majority", first=1)
    assert ask.asked == ask.closed == ["e0", "e1", "e2", "e3"]
    assert ask.later == {"e0": ["e1"], "e1": ["e2"], "e2": ["e3"], "e3": []}
    assert (text, details) == ("b", {"asked": 4, "agreed": 2, "stopped": "all_asked"})


async def test_nobody_is_asked_who_cannot_change_the_outcome() -> None:
    ask = Experts({"e0": "a", "e1": "a", "e2": "a", "e3": "b", "e4": "b"})
    text, details = await told(ask, plan(*[0.2] * 5), weights="majority", first=1)
    assert ask.asked == ["e0", "e1", "e2"]
    assert (text, details) == ("a", {"asked": 3, "agreed": 3, "stopped": "cannot_change"})


async def test_the_first_are_asked_at_once_and_the_rest_by_steps() -> None:
    ask = Experts({"e0": "a", "e1": "b", "e2": "c", "e3": "d", "e4": "d"}, steps={"e0": 3})
    task = asyncio.create_task(told(ask, plan(*[0.2] * 5), weights="majority", first=2, step=2))
    while not ask.closed:
        await asyncio.sleep(0)
    assert ask.asked == ["e0", "e1"]
    text, details = await task
    assert ask.asked == ["e0", "e1", "e2", "e3", "e4"]
    assert ask.later["e0"] == ["e2", "e3"]
    assert ask.later["e2"] == ["e4"]
    assert (text, details["asked"]) == ("d", 5)


async def test_it_stops_when_the_leader_is_likely_enough() -> None:
    ask = Experts({"e0": "a", "e1": "a", "e2": None, "e3": None, "e4": None})
    settings: dict[str, Any] = {"weights": "log_odds", "options": 10, "first": 1}
    text, details = await told(ask, rated(0.6, *[0.5] * 4), **settings, confidence=0.9)
    odds = (0.6 * 9 / 0.4) * (0.5 * 9 / 0.5)  # against each of nine other answers
    assert ask.asked == ["e0", "e1"]
    assert (text, details["stopped"]) == ("a", "confident")
    assert details["probability"] == pytest.approx(odds / (odds + 9), abs=1e-4)


async def test_whoever_fails_abstains_and_the_next_is_asked() -> None:
    ask = Experts({"e0": EngineError("broke"), "e1": "no idea", "e2": "7", "e3": "7"})
    text, details = await told(ask, plan(*[0.25] * 4), extractor="number", first=1)
    assert ask.asked == ["e0", "e1", "e2"]  # the last could but tie, and ties go to the better
    assert (text, details["agreed"]) == ("7", 1)
    assert (details["asked"], details["stopped"]) == (3, "cannot_change")
    assert details["failed"] == ["e0"]  # who gave no readable answer did answer


async def test_who_is_refused_under_load_is_named() -> None:
    full = {f"e{i}": Overloaded("full", retry_after=1) for i in (3, 1)}
    ask = Experts({"e0": "a", **full, "e2": "b"}, steps={"e1": 4})
    _, details = await told(ask, plan(*[0.25] * 4), weights="majority")
    assert details["failed"] == ["e1", "e3"]
    assert details["asked"] == 4


async def test_when_all_fail_the_best_experts_error_is_raised() -> None:
    ask = Experts({f"e{i}": EngineError(f"broke {i}") for i in range(3)})
    with pytest.raises(EngineError, match="broke 0"):
        await told(ask, rated(0.6, 0.5, 0.4), weights="log_odds", first=1, confidence=0.01)
    assert ask.asked == ["e0", "e1", "e2"]


async def test_cancelled_between_two_waves_nothing_is_left_open() -> None:
    ask = Experts({"e0": "a", "e1": None, "e2": "b"})
    task = asyncio.create_task(collect(vote(first=1), plan(0.4, 0.3, 0.3), ask))
    while "e1" not in ask.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ask.asked == ask.closed == ["e0", "e1"]


async def test_usage_is_of_all_that_answered() -> None:
    ask = Experts({"e0": "a", "e1": "b", "e2": "a"})
    (chunk,) = await collect(vote(weights="majority", first=1), plan(0.4, 0.3, 0.3), ask)
    assert chunk.usage == Usage(9, 3)


# --- what is counted --------------------------------------------------------------------

cast_votes = st.lists(
    st.tuples(st.floats(0.01, 0.99), st.sampled_from(["a", "b", "c", None])),
    min_size=1,
    max_size=6,
)


def rule(cast: Sequence[tuple[float, str | None]], options: int = 10) -> Weights:
    choices = [Choice(f"e{i}", 0.1, quality) for i, (quality, _) in enumerate(cast)]
    return Weights(log_odds(choices, options), options=options)


@given(cast_votes)
def test_probabilities_of_all_answers_sum_to_one(cast: list[tuple[float, str | None]]) -> None:
    """The winner's by the rule; that of every other answer by weighing the same votes anew."""
    own = rule(cast)
    keys = {rank: key for rank, (_, key) in enumerate(cast)}
    weights = log_odds([Choice("e", 0.1, q) for q, _ in cast], 10)
    given_ = {key for key in keys.values() if key is not None}
    odds = {
        k: math.exp(sum(w for w, (_, key) in zip(weights, cast, strict=True) if key == k))
        for k in given_
    }
    total = sum(odds.values()) + (10 - len(given_))
    found = own.probability(keys)
    assert found is not None
    if not given_:
        assert found == 0
    else:
        assert found == pytest.approx(max(odds.values()) / total)
        assert keys[own.winner(keys)] is not None
        assert odds[str(keys[own.winner(keys)])] == pytest.approx(max(odds.values()))


def test_the_closed_form_is_bayes_rule() -> None:
    """Two experts of a question with three options, every joint outcome written out."""
    q, r = 0.7, 0.5
    # Given "a" by the first and "b" by the second; a priori each of three options is right.
    right_a, right_b = q * (1 - r) / 2, (1 - q) / 2 * r
    right_c = (1 - q) / 2 * (1 - r) / 2
    own = rule([(q, "a"), (r, "b")], options=3)
    assert own.probability({0: "a", 1: "b"}) == pytest.approx(
        right_a / (right_a + right_b + right_c)
    )


def test_a_quality_that_nobody_knows_is_the_weight() -> None:
    assert log_odds([Choice("e", 0.6)], 2) == log_odds([Choice("e", 0.1, 0.6)], 2)
    assert log_odds([Choice("e", 0.1, 0.001)], 2) == [0.01]  # below chance, and still a vote

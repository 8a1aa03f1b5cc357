"""Which part of a conversation is routed, whatever the router."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.routing.base import Query, Scores
from composer.routing.conversation import GAP, READ_CHARS, joined, readings, score
from composer.types import Ask, BoolArray

EXPERTS = ("add", "reverse", "sort")
ALL = np.ones(3, np.bool_)


class Router:
    """Quality of each expert by the text read; what it read, in order."""

    asked: str | None = None

    def __init__(self, known: Mapping[str, tuple[float, float, float]]) -> None:
        self.known = known
        self.texts: list[str] = []

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        self.texts.append(query.text)
        await asyncio.sleep(0)
        quality = np.array(self.known.get(query.text, (0.02, 0.01, 0.01)), np.float32)
        quality[~eligible] = np.nan
        return Scores(EXPERTS, quality, np.zeros(3, np.float32), {})


async def read(router: Router, *turns: str, eligible: BoolArray = ALL) -> tuple[str, int]:
    """The best expert, and how many turns were read."""
    query = Query(turns[-1], turns[:-1])
    scores, n = await score(router, query, eligible)  # type: ignore[arg-type]
    return EXPERTS[int(np.nanargmax(scores.quality))], n


async def test_a_first_turn_is_scored_once_and_as_it_is() -> None:
    router = Router({"reverse fox": (0.0, 0.9, 0.0)})
    assert await read(router, "reverse fox") == ("reverse", 1)
    assert router.texts == ["reverse fox"]


async def test_a_follow_up_that_says_nothing_is_read_with_what_it_follows() -> None:
    router = Router({"reverse fox\nand hen": (0.0, 0.8, 0.1)})
    assert await read(router, "reverse fox", "and hen") == ("reverse", 2)


async def test_a_question_of_its_own_is_read_alone() -> None:
    router = Router({"add 1 and 2": (0.9, 0.0, 0.0), "reverse fox\nadd 1 and 2": (0.3, 0.5, 0.1)})
    assert await read(router, "reverse fox", "add 1 and 2") == ("add", 1)


async def test_a_change_of_subject_in_few_words_is_not_drowned_by_what_came_before() -> None:
    router = Router({"add 1, 2": (0.9, 0.0, 0.0), "reverse fox\nadd 1, 2": (0.0, 0.95, 0.0)})
    assert await read(router, "reverse fox", "add 1, 2") == ("add", 1)
    router.known = {"add 1, 2": (0.6, 0.0, 0.0), "reverse fox\nadd 1, 2": (0.0, 0.95, 0.0)}
    assert await read(router, "reverse fox", "add 1, 2") == ("reverse", 2)


async def test_what_came_just_before_goes_before_what_it_began_with() -> None:
    router = Router(
        {
            "now add 1 to 2\nand to 3": (0.8, 0.1, 0.0),
            "reverse fox\nnow add 1 to 2\nand to 3": (0.4, 0.4, 0.0),
        }
    )
    assert await read(router, "reverse fox", "now add 1 to 2", "and to 3") == ("add", 2)


async def test_the_subject_may_lie_further_back() -> None:
    router = Router({"reverse fox\nand hen\nand owl": (0.0, 0.8, 0.0)})
    assert await read(router, "reverse fox", "and hen", "and owl") == ("reverse", 3)


async def test_a_router_that_expects_each_experts_mean_of_what_says_nothing() -> None:
    """As one trained on outcomes does: its spread of means must not pass for understanding."""
    means = (0.7, 0.6, 0.5)
    router = Router({"and why": means, "prove x\nand why": (0.5, 0.85, 0.4)})
    assert await read(router, "prove x", "and why") == ("reverse", 2)


async def test_equal_readings_leave_the_last_word_alone() -> None:
    same = (0.1, 0.7, 0.1)
    router = Router({"b": same, "a\nb": same})
    assert await read(router, "a", "b") == ("reverse", 1)


async def test_only_eligible_experts_count() -> None:
    """That the last turn is clearly the excluded expert's says nothing about the others."""
    router = Router({"b": (0.9, 0.1, 0.1), "a\nb": (0.8, 0.1, 0.5)})
    assert await read(router, "a", "b", eligible=np.array([False, True, True])) == ("sort", 2)


async def test_one_expert_is_one_whatever_is_read() -> None:
    only = np.array([False, True, False])
    assert await read(Router({}), "a", "b", eligible=only) == ("reverse", 1)


def test_three_readings_at_most_and_blank_turns_are_none() -> None:
    query = Query("d", ("a", " ", "b", "c", ""))
    assert readings(query) == [("d", 1), ("c\nd", 2), ("a\nb\nc\nd", 4)]
    assert readings(Query("d", ("", "\n"))) == [("d", 1)]


def test_a_long_conversation_keeps_its_subject_and_its_last_turn() -> None:
    turns = ["the subject", *(f"turn {i} " + "x" * 200 for i in range(9)), "the last word"]
    text = joined(turns)
    lines = text.split("\n")
    assert len(text) <= READ_CHARS
    assert (lines[0], lines[-1]) == ("the subject", "the last word")
    assert [line[:6] for line in lines[1:-1]] == ["turn 5", "turn 6", "turn 7", "turn 8"]


@pytest.mark.parametrize(("first", "last"), [(5000, 5000), (5000, 10), (10, 5000), (600, 600)])
def test_long_turns_are_cut_in_their_middle(first: int, last: int) -> None:
    text = joined(["A" + "a" * first + "B", "C" + "c" * last + "D"])
    one, two = text.split("\n")
    assert READ_CHARS * 0.6 < len(text) <= READ_CHARS + 1
    assert (one[0], one[-1], two[0], two[-1]) == ("A", "B", "C", "D")
    assert (GAP in one) == (first > 500)
    assert (GAP in two) == (last > 500)


@given(st.lists(st.text(max_size=60), min_size=2, max_size=12), st.integers(20, 200))
def test_never_much_longer_than_there_is_room(turns: list[str], room: int) -> None:
    text = joined(turns, room)
    assert len(text) <= room + 1  # the line break between the two
    if len(turns[0]) + len(turns[-1]) <= room:
        assert text.startswith(turns[0])
        assert text.endswith(turns[-1])

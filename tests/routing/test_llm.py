"""Routers that ask an LLM, over scripted answers: what is asked, what is made of it, and what comes
of it where nothing usable is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from composer.errors import EngineUnavailable
from composer.routing.asking import Asking
from composer.routing.base import Demands, Query, Scores
from composer.routing.conversation import ASKED_CHARS, READ_CHARS, score
from composer.routing.llm import LlmRouter, LlmSettings
from composer.routing.neighbours import NeighboursRouter
from composer.types import Chunk, FloatArray, Message, Sampling
from tests.engines.scripted import chooses, expert_of
from tests.routing.helpers import WordEmbedder, expert

ALL = np.ones(4, np.bool_)
EXPERTS = [
    expert("cats", "my cat purrs", "cats and kittens", description="about cats"),
    expert("dogs", "my dog barks", "dogs and puppies", description="about dogs"),
    expert("ships", "a ship sails", "ships and boats", skills=("boats",)),
    expert("bread", "bake some bread", "bread and flour"),
]


class Llm:
    """Answers with `script` of the question. Records what it was asked."""

    def __init__(self, script: Callable[[str], str]) -> None:
        self.script = script
        self.questions: list[str] = []
        self.sampling: list[Sampling] = []
        self.experts: list[str] = []
        self.wait_s = 0.0
        self.closed = 0

    async def __call__(
        self,
        expert: str,
        *,
        messages: Sequence[Message] | None = None,
        sampling: Sampling | None = None,
        **more: Any,
    ) -> AsyncGenerator[Chunk, None]:
        assert messages is not None
        assert sampling is not None
        self.experts.append(expert)
        self.questions.append(str(messages[-1]["content"]))
        self.sampling.append(sampling)
        try:
            await asyncio.sleep(self.wait_s)
            for part in self.script(self.questions[-1]).split(" "):
                yield Chunk(text=f"{part} ")
            yield Chunk(finish_reason="stop")
        finally:
            self.closed += 1


def router(**settings: Any) -> LlmRouter:
    return LlmRouter.build(EXPERTS, LlmSettings(expert="wise", **settings), WordEmbedder())


def plain() -> NeighboursRouter:
    return NeighboursRouter.build(EXPERTS, LlmSettings(expert="wise").base, WordEmbedder())


def best(scores: Scores) -> str:
    return scores.experts[int(np.nanargmax(scores.quality))]


async def test_the_instruction_is_matched_in_the_query_s_place() -> None:
    llm = Llm(lambda _: '"Bake bread"\nThat is all.')
    found = await router().score(Query("the loaf thing"), ALL, llm)
    assert best(found) == "bread"
    expected = await plain().score(Query("Bake bread"), ALL)
    np.testing.assert_array_equal(found.quality, expected.quality)
    asked = found.told["asked"]
    assert (asked["expert"], asked["calls"], asked["instruction"]) == ("wise", 1, "Bake bread")
    assert asked["ms"] >= 0
    assert "failed" not in asked
    assert llm.experts == ["wise"]
    assert "<<<\nthe loaf thing\n>>>" in llm.questions[0]
    assert llm.sampling[0].temperature == 0


async def test_what_was_thought_before_is_no_instruction() -> None:
    llm = Llm(lambda _: "<think>cats? dogs?</think>\n\nBake bread")
    found = await router().score(Query("x"), ALL, llm)
    assert found.told["asked"]["instruction"] == "Bake bread"


def refuse(_: str) -> str:
    raise EngineUnavailable("the server is down")


def stumble(_: str) -> str:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("method", ["instruction", "elimination"])
@pytest.mark.parametrize(
    ("llm", "failed"),
    [
        (None, "not_asked"),
        (Llm(refuse), EngineUnavailable.code),
        (Llm(stumble), "internal_error"),
        (Llm(lambda _: " "), "empty"),
        (Llm(lambda _: "…!?"), "nonsense"),
    ],
)
async def test_without_a_usable_answer_retrieval_decides(
    method: str, llm: Llm | None, failed: str
) -> None:
    found = await router(method=method).score(Query("my cat and kittens"), ALL, llm)
    expected = await plain().score(Query("my cat and kittens"), ALL)
    np.testing.assert_array_equal(found.quality, expected.quality)
    assert found.told["asked"]["failed"] == failed
    assert "instruction" not in found.told["asked"]


async def test_an_llm_that_is_late_is_not_waited_for_but_in_a_batch() -> None:
    llm = Llm(lambda _: "Bake bread")
    llm.wait_s = 0.05
    hasty = router(timeout_s=0.001)
    found = await hasty.score(Query("my cat purrs"), ALL, llm)
    assert best(found) == "cats"
    assert found.told["asked"]["failed"] == "timeout"
    assert llm.closed == 1
    assert best(await hasty.score(Query("my cat purrs", patient=True), ALL, llm)) == "bread"


async def test_who_leaves_is_not_taken_for_a_timeout() -> None:
    llm = Llm(lambda _: "Bake bread")
    llm.wait_s = 60
    task = asyncio.create_task(router().score(Query("my cat purrs"), ALL, llm))
    while not llm.questions:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert llm.closed == 1


async def test_the_worst_goes_step_by_step_and_ranks_take_over_the_qualities() -> None:
    llm = Llm(chooses("ships", "bread"))
    found = await router(method="elimination").score(Query("my cat purrs"), ALL, llm)
    expected = await plain().score(Query("my cat purrs"), ALL)
    asked = found.told["asked"]
    # The script sends away whoever it does not want first, then the last of those it wants.
    assert asked["eliminated"] == ["cats", "dogs", "bread"]
    assert asked["calls"] == len(llm.questions) == 3
    order = ["ships", "bread", "dogs", "cats"]
    ranked = [found.quality[found.experts.index(one)] for one in order]
    np.testing.assert_array_equal(ranked, np.sort(expected.quality)[::-1])
    assert "1. cats: about cats" in llm.questions[0]
    assert "3. ships: boats" in llm.questions[0]
    assert "4. bread: bake some bread; bread and flour" in llm.questions[0]
    assert expert_of(llm.questions[1], 1) == "dogs"  # cats is gone
    assert "cats: about" not in llm.questions[1]


async def test_who_is_no_candidate_or_not_eligible_stays_where_it_was() -> None:
    llm = Llm(chooses("dogs"))
    eligible = np.array([True, True, True, False])
    asked = Query("my cat or my dog")
    found = await router(method="elimination", candidates=2).score(asked, eligible, llm)
    expected = await plain().score(asked, eligible)
    assert len(llm.questions) == 1
    assert best(found) == "dogs"
    assert found.quality[2] == expected.quality[2]
    assert np.isnan(found.quality[3])


@pytest.mark.parametrize("method", ["instruction", "elimination"])
async def test_where_one_alone_is_eligible_nothing_is_asked(method: str) -> None:
    llm = Llm(chooses("dogs"))
    found = await router(method=method).score(
        Query("my cat purrs"), np.array([True, False, False, False]), llm
    )
    assert best(found) == "cats"
    assert llm.questions == []
    assert found.told["asked"]["calls"] == 0


async def test_what_was_eliminated_before_the_llm_failed_stays_so() -> None:
    answers = iter(["1", "no idea"])
    found = await router(method="elimination").score(
        Query("my dog and my cat"), ALL, Llm(lambda _: next(answers))
    )
    asked = found.told["asked"]
    assert (asked["eliminated"], asked["failed"]) == (["cats"], "nonsense")
    assert best(found) == "dogs"
    assert np.nanargmin(found.quality) == 0


async def test_a_thought_without_an_end_is_no_answer() -> None:
    asking = Asking(Llm(lambda _: "<think>Expert 2 is about dogs, and"), "wise", None)
    assert await asking.say("who?", max_tokens=7) is None
    assert asking.failed == "empty"


async def test_a_number_that_is_nobody_s_is_passed_over() -> None:
    llm = Llm(lambda q: "Of the 17 experts it is 2." if "2." in q else "1")
    found = await router(method="elimination", candidates=2).score(Query("my cat purrs"), ALL, llm)
    assert len(found.told["asked"]["eliminated"]) == 1


async def test_of_a_conversation_the_llm_is_asked_once_with_all_turns() -> None:
    llm = Llm(lambda _: "Bake bread")
    query = Query("and in French?", ("how do I bake?", "  ", "why flour?"))
    found, turns = await score(router(), query, ALL, llm)
    assert (best(found), turns) == ("bread", 3)
    assert len(llm.questions) == 1
    assert "how do I bake?\nwhy flour?\nand in French?" in llm.questions[0]
    for long in (Query("and?", ("x" * 9000,)), Query("x" * 9000)):
        await score(router(), long, ALL, llm)
        assert len(llm.questions[-1]) < ASKED_CHARS + 1000


async def test_what_retrieval_reads_beside_the_llm_reaches_the_last_turn() -> None:
    embedder = WordEmbedder()
    made = LlmRouter.build(EXPERTS, LlmSettings(expert="wise", method="elimination"), embedder)
    read: list[str] = []
    embed = embedder.embed

    async def noted(text: str) -> FloatArray:
        read.append(text)
        return await embed(text)

    embedder.embed = noted  # type: ignore[method-assign]
    llm = Llm(lambda _: "1")
    await score(made, Query("my cat purrs", ("x " * 3000,)), ALL, llm)
    assert read
    assert all(len(text) <= READ_CHARS + 10 and text.endswith("my cat purrs") for text in read)
    assert all("x " * 1000 in question for question in llm.questions)


async def test_of_a_conversation_nobody_can_be_asked_about_three_readings_are_scored() -> None:
    found, turns = await score(router(), Query("and this", ("my cat purrs",)), ALL)
    assert (best(found), turns) == ("cats", 2)
    assert found.told["asked"] == found.told["asked"] | {"failed": "not_asked", "calls": 0}


def test_settings_name_who_is_asked() -> None:
    settings = LlmSettings(expert="wise")
    assert LlmRouter.asks(settings) == router().asked == "wise"
    with pytest.raises(ValueError, match="need a router trained on outcomes"):
        LlmRouter.check(EXPERTS, settings, Demands(curve=True))
    with pytest.raises(ValueError, match="expert"):
        LlmSettings.model_validate({})


async def test_one_bound_for_all_questions() -> None:
    llm = Llm(lambda _: "yes")
    asking = Asking(llm, "wise", 0.08)
    llm.wait_s = 0.05
    assert await asking.say("first?", max_tokens=5) == "yes"
    llm.wait_s = 60
    assert await asking.say("second?", max_tokens=5) is None
    assert asking.failed == "timeout"
    assert asking.told["calls"] == 2

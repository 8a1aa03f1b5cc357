"""Conversations through the pipeline: the whole of them is routed, sessions keep their experts, and
the conversations that judge it are as they should be."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.conversations import System as Shown
from benchmarks.conversations import conversations, described, shown
from composer.errors import EngineError
from composer.outcome import Outcome
from composer.prompting import PromptSpec
from composer.routing.sessions import Sessions
from composer.types import Expert, Message, Plan, Request
from examples.tiny.tasks import SKILLS
from tests.fakes import request, stage
from tests.test_pipeline import Bench
from tests.test_unseen_wordings import seen


def talk(*texts: str, **fields: Any) -> Request:
    """The request of a turn: the user's texts so far, with answers between them."""
    messages: list[Message] = []
    for text in texts[:-1]:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "done"}]
    return request(messages=(*messages, {"role": "user", "content": texts[-1]}), **fields)


async def planned(bench: Bench, asked: Request) -> Plan:
    """Answered to its end; the plan it had."""
    async with await bench.pipeline.answer(asked) as answer:
        _ = [chunk async for chunk in answer]
    return last_plan(bench.outcomes)


def last_plan(outcomes: list[Outcome]) -> Plan:
    plan = outcomes[-1].plan
    assert plan is not None
    return plan


# --- what is routed -----------------------------------------------------------------------


async def test_a_follow_up_goes_to_the_expert_of_what_it_follows() -> None:
    plan = await planned(Bench(stage()), talk("please beta", "and this one"))
    assert (plan.best, plan.reasons["turns_read"]) == ("beta", 2)


async def test_a_new_subject_goes_to_its_own_expert() -> None:
    plan = await planned(Bench(stage()), talk("please beta", "and more", "now alpha"))
    assert (plan.best, plan.reasons["turns_read"]) == ("alpha", 1)


async def test_answers_and_system_messages_are_not_routed_by() -> None:
    messages: tuple[Message, ...] = (
        {"role": "system", "content": "alpha alpha"},
        {"role": "user", "content": "please beta"},
        {"role": "assistant", "content": "says alpha"},
        {"role": "user", "content": "and more"},
    )
    assert (await planned(Bench(stage()), request(messages=messages))).best == "beta"


async def test_a_single_turn_says_nothing_of_turns() -> None:
    assert "turns_read" not in (await planned(Bench(stage()), talk("please beta"))).reasons


async def test_an_expert_with_a_template_finds_its_input_in_an_earlier_turn() -> None:
    steps = [{"regex": "word (?P<word>[a-z]+)"}]
    spec = PromptSpec.model_validate({"template": "do {word}", "extract": steps})
    bench = Bench(stage(experts={"beta": Expert(id="beta", server="server", prompt=spec)}))
    for texts in (("word fox", "word hen", "backwards?"), ("word fox", "the word hen")):
        async with await bench.pipeline.answer(talk(*texts)) as answer:
            assert "".join([chunk.text async for chunk in answer]) == "beta:do hen"


# --- sessions -----------------------------------------------------------------------------

EVEN = "please alpha beta"
"""A turn for which both experts are as good, so that the earlier one, alpha, would be taken."""


def staying(**policy: Any) -> Bench:
    return Bench(stage(policy={"stay": 0.05, **policy}))


async def test_a_session_keeps_its_expert_where_nothing_is_gained_by_another() -> None:
    bench = staying()
    assert (await planned(bench, talk("please beta"))).best == "beta"
    plan = await planned(bench, talk("please beta", EVEN))
    assert (plan.best, plan.reasons["rule"]) == ("beta", "session_stay")
    assert plan.reasons["instead_of"] == ["alpha"]
    assert plan.reasons["gave_up"] == 0.0


async def test_a_session_leaves_its_expert_for_a_better_one_and_keeps_that() -> None:
    bench = staying()
    for texts, best in (
        (("please beta",), "beta"),
        (("please beta", "now alpha"), "alpha"),
        (("please beta", "now alpha", EVEN), "alpha"),
    ):
        assert (await planned(bench, talk(*texts))).best == best


async def test_a_session_is_digested_once_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made, digest = 0, Sessions._digest

    def counted(*args: Any) -> bytes:
        nonlocal made
        made += 1
        return digest(*args)

    monkeypatch.setattr(Sessions, "_digest", counted)
    bench = staying()
    await planned(bench, talk("please beta"))
    await planned(bench, talk("please beta", EVEN))
    assert made == 2


async def test_a_policy_that_does_not_stay_knows_no_session() -> None:
    bench = Bench(stage())
    await planned(bench, talk("please beta", session="s"))
    assert (await planned(bench, talk(EVEN, session="s"))).best == "alpha"


async def test_a_key_makes_one_session_of_what_begins_otherwise() -> None:
    bench = staying()
    await planned(bench, talk("please beta", session="s"))
    assert (await planned(bench, talk(EVEN, session="s"))).best == "beta"
    assert (await planned(bench, talk(EVEN, session="t"))).best == "alpha"
    assert (await planned(bench, talk(EVEN, session="s", caller="bob"))).best == "alpha"


async def test_opting_out_of_the_sessions_expert_gives_it_nothing() -> None:
    bench = staying()
    await planned(bench, talk("please beta", session="s"))
    asked = talk(EVEN, session="s", exclude=frozenset({"beta"}))
    plan = await planned(bench, asked)
    assert plan.best == "alpha"
    assert "beta" not in plan.scores
    assert [call.expert for call in bench.staged.engine.calls] == ["beta", "alpha"]


async def test_an_expert_that_failed_is_not_the_sessions() -> None:
    bench = staying()
    await planned(bench, talk("please alpha", session="s"))
    bench.staged.engine.fail = EngineError("the server fell over")
    with pytest.raises(EngineError):
        await planned(bench, talk("please beta", session="s"))
    bench.staged.engine.fail = None
    assert (await planned(bench, talk(EVEN, session="s"))).best == "alpha"


async def test_an_expert_that_has_left_the_catalog_is_forgotten() -> None:
    bench = staying()
    await planned(bench, talk("please beta", session="s"))
    later = stage(("alpha", "gamma"), version=2, policy={"stay": 0.05})
    bench.generations.swap(later.generation)
    plan = await planned(bench, talk("please alpha gamma", session="s"))
    assert (plan.best, plan.reasons["rule"]) == ("alpha", "best_score")


async def test_an_expert_whose_server_went_has_nothing_warm_to_stay_for() -> None:
    bench = staying()
    await planned(bench, talk("please beta", session="s"))
    bench.scheduler.resident = lambda server: False  # type: ignore[method-assign]
    assert (await planned(bench, talk(EVEN, session="s"))).best == "alpha"


# --- the conversations that judge it ------------------------------------------------------


def test_sixty_conversations_of_three_turns_six_a_skill() -> None:
    asked = conversations()
    assert [len(turns) for turns in asked] == [3] * 60
    first = [turns[0][0] for turns in asked]
    assert {skill: first.count(skill) for skill in SKILLS} == dict.fromkeys(SKILLS, 6)
    assert {expert for turns in asked for expert, _ in turns} == SKILLS.keys()


def test_hardly_a_follow_up_is_worded_as_an_expert_shows() -> None:
    """They were written blind, so a few plain ones are bound to be the same: three of 120."""
    inputs = re.compile(r"\{[a-z]+\}")
    patterns = [
        re.compile("[a-z0-9]+".join(map(re.escape, inputs.split(wording))))
        for wording in seen()
        if inputs.sub("", wording).strip()  # the bare input is a wording too
    ]
    assert len(patterns) > 400
    texts = [text for turns in conversations() for _, text in turns[1:]]
    plain = [re.sub(r"[^a-z0-9]+", " ", text.lower()).strip() for text in texts]
    same = [text for text in plain if any(pattern.fullmatch(text) for pattern in patterns)]
    assert len(same) <= 3, same


def test_what_each_system_is_shown() -> None:
    texts = ["a", "b", "c"]
    assert shown(Shown("", whole=False), texts) == ({"role": "user", "content": "c"},)
    assert shown(Shown("", whole=False, one_text=True), texts)[0]["content"] == "a\nb\nc"
    whole = shown(Shown(""), texts)
    assert [m["content"] for m in whole if m["role"] == "user"] == texts
    assert len(whole) == 5


def test_a_row_counts_switches_and_follow_ups_only() -> None:
    asked = [[("a", ""), ("a", ""), ("b", "")], [("a", ""), ("b", ""), ("b", "")]]
    row = described("s", asked, [["b", "a", "b"], ["a", "a", "a"]])
    assert (row["first_turns"], row["follow_ups"]) == (50.0, 50.0)
    assert (row["same_skill"], row["other_skill"]) == (50.0, 50.0)
    assert (row["switches"], row["needless"]) == (2, 1)

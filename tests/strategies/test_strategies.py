"""Single and vote over experts that answer, fail, stall and stream as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from composer.errors import EngineError, Unsupported
from composer.strategies.base import Strategy
from composer.strategies.single import Single, SingleSettings
from composer.strategies.vote import Vote, VoteSettings
from composer.strategies.voting.counting import settled, winner
from composer.types import (
    Choice,
    Chunk,
    Message,
    Plan,
    Request,
    Sampling,
    TokenLogprob,
    Usage,
)

REQUEST = Request(id="r", model="auto", prompt="?")


def plan(*weights: float) -> Plan:
    experts = [f"e{i}" for i in range(len(weights))]
    choices = tuple(Choice(e, w) for e, w in zip(experts, weights, strict=True))
    return Plan("p", "vote", choices, tuple(experts))


@dataclass
class Experts:
    """`answers[expert]` is streamed by the character after `steps[expert]` turns of the loop; an
    exception is raised there, and None never answers."""

    answers: dict[str, str | Exception | None]
    steps: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    verbatim: list[str] = field(default_factory=list)
    later: dict[str, list[str]] = field(default_factory=dict)

    async def __call__(
        self,
        expert: str,
        *,
        messages: Sequence[Message] | None = None,
        sampling: Sampling | None = None,
        later: Sequence[str] = (),
        verbatim: bool = False,
    ) -> AsyncGenerator[Chunk, None]:
        self.asked.append(expert)
        self.later[expert] = list(later)
        if verbatim:
            self.verbatim.append(expert)
        answer = self.answers[expert]
        try:
            for _ in range(self.steps.get(expert, 0)):
                await asyncio.sleep(0)
            if answer is None:
                await asyncio.Event().wait()
            if isinstance(answer, Exception):
                raise answer
            assert answer is not None
            for letter in answer:
                yield Chunk(letter, logprobs=(TokenLogprob(letter, -0.1),))
            yield Chunk(finish_reason="length", usage=Usage(3, len(answer)))
        finally:
            self.closed.append(expert)


async def collect(strategy: Strategy, plan: Plan, ask: Experts) -> list[Chunk]:
    async with aclosing(strategy.run(REQUEST, plan, ask)) as chunks:
        return [chunk async for chunk in chunks]


def vote(**settings: object) -> Vote:
    return Vote(VoteSettings(**settings))  # type: ignore[arg-type]


# --- single -----------------------------------------------------------------------------


async def test_single_passes_the_best_experts_stream_on() -> None:
    ask = Experts({"e0": "abc", "e1": "no"})
    chunks = await collect(Single(SingleSettings()), plan(0.6, 0.4), ask)
    assert [c.text for c in chunks] == ["a", "b", "c", ""]
    assert {c.expert for c in chunks} == {"e0"}
    assert chunks[0].logprobs == (TokenLogprob("a", -0.1),)
    assert (chunks[-1].finish_reason, chunks[-1].usage) == ("length", Usage(3, 3))
    assert ask.asked == ask.closed == ask.verbatim == ["e0"]


async def test_single_closes_the_call_when_it_is_closed() -> None:
    ask = Experts({"e0": "abc"})
    stream = Single(SingleSettings()).run(REQUEST, plan(1.0), ask)
    await anext(stream)
    assert ask.closed == []
    await stream.aclose()
    assert ask.closed == ["e0"]


# --- vote -------------------------------------------------------------------------------


async def test_the_heaviest_answer_wins_in_its_best_experts_words() -> None:
    ask = Experts({"e0": "it is 7", "e1": "8", "e2": "so: 8.0"})
    (chunk,) = await collect(vote(extractor="number", early_stop=False), plan(0.4, 0.35, 0.25), ask)
    assert ask.verbatim == []  # answers that are compared have to be read
    assert (chunk.text, chunk.expert, chunk.finish_reason) == ("8", "e1", "length")
    assert [t.token for t in chunk.logprobs] == ["8"]
    assert chunk.usage == Usage(9, 7 + 1 + 7)


async def test_weights_are_a_setting() -> None:
    ask = Experts({"e0": "a", "e1": "b", "e2": "b"})
    weighted = await collect(vote(), plan(0.6, 0.2, 0.2), ask)
    majority = await collect(vote(weights="majority"), plan(0.6, 0.2, 0.2), ask)
    assert (weighted[0].text, majority[0].text) == ("a", "b")


async def test_a_tie_goes_to_the_better_score() -> None:
    ask = Experts({"e0": "a", "e1": "b", "e2": "b", "e3": "a"}, steps={"e0": 20})
    (chunk,) = await collect(vote(weights="majority", early_stop=False), plan(*[0.25] * 4), ask)
    assert (chunk.text, chunk.expert) == ("a", "e0")


async def test_who_says_nothing_countable_abstains() -> None:
    ask = Experts({"e0": "no idea", "e1": "5"})
    (chunk,) = await collect(vote(extractor="number"), plan(0.9, 0.1), ask)
    assert chunk.expert == "e1"
    ask = Experts({"e0": "no idea", "e1": "none"})
    (chunk,) = await collect(vote(extractor="number"), plan(0.9, 0.1), ask)
    assert chunk.expert == "e0"


async def test_experts_are_asked_at_the_same_time() -> None:
    ask = Experts({f"e{i}": "x" for i in range(3)}, steps={f"e{i}": 3 for i in range(3)})
    task = asyncio.create_task(collect(vote(), plan(0.4, 0.3, 0.3), ask))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(ask.asked) == ["e0", "e1", "e2"]
    await task


async def test_a_settled_vote_cancels_the_rest() -> None:
    ask = Experts({"e0": "a", "e1": "a", "e2": None})
    (chunk,) = await asyncio.wait_for(collect(vote(), plan(0.4, 0.3, 0.3), ask), 5)
    assert (chunk.text, chunk.usage) == ("a", Usage(6, 2))
    assert sorted(ask.closed) == ["e0", "e1", "e2"]


async def test_without_early_stop_everybody_is_heard() -> None:
    ask = Experts({"e0": "a", "e1": "a", "e2": None})
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect(vote(early_stop=False), plan(0.4, 0.3, 0.3), ask), 0.05)
    assert sorted(ask.closed) == ["e0", "e1", "e2"]


async def test_failures_do_not_count_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    ask = Experts({"e0": EngineError("broke"), "e1": "b", "e2": "c"})
    (chunk,) = await collect(vote(), plan(0.5, 0.3, 0.2), ask)
    assert (chunk.text, chunk.usage) == ("b", Usage(6, 2))
    assert "'e0' did not vote: broke" in caplog.text


async def test_when_all_fail_the_best_experts_error_is_raised() -> None:
    ask = Experts({"e0": EngineError("first"), "e1": EngineError("second")}, steps={"e0": 9})
    with pytest.raises(EngineError, match="first"):
        await collect(vote(), plan(0.5, 0.5), ask)


async def test_a_bug_is_not_a_lost_vote() -> None:
    ask = Experts({"e0": TypeError("bug"), "e1": None})
    with pytest.raises(TypeError, match="bug"):
        await collect(vote(), plan(0.5, 0.5), ask)
    assert sorted(ask.closed) == ["e0", "e1"]


async def test_cancelling_a_vote_closes_every_call() -> None:
    ask = Experts({"e0": "a", "e1": None, "e2": None})
    task = asyncio.create_task(collect(vote(), plan(0.4, 0.3, 0.3), ask))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ask.closed) == ["e0", "e1", "e2"]


async def test_one_expert_needs_no_count_and_streams() -> None:
    ask = Experts({"e0": "abc"})
    assert [c.text for c in await collect(vote(), plan(1.0), ask)] == ["a", "b", "c", ""]


def test_a_vote_gives_one_answer() -> None:
    with pytest.raises(Unsupported) as refused:
        vote().check(Request(id="r", model="auto", prompt="?", sampling=Sampling(n=2)))
    assert refused.value.param == "n"
    with pytest.raises(Unsupported, match="calls of tools"):
        vote().check(Request(id="r", model="auto", prompt="?", needs=frozenset({"tools"})))
    vote().check(REQUEST)


@pytest.mark.parametrize(
    "wrong",
    [
        {"extractor": "words"},
        {"extractor": "regex"},
        {"weights": "loud"},
        {"k": 3},
        {"first": 2, "early_stop": False},
        {"first": 2, "confidence": 0.9},
        {"weights": "log_odds", "confidence": 0.9},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        VoteSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "keys", "still_open", "expected"),
    [
        ([1, 1], {0: "a"}, [1], True),  # a tie would go to the better score, which has spoken
        ([1, 1], {1: "a"}, [0], False),  # … and which has not
        ([1, 1, 1], {0: "a", 1: "b"}, [2], False),  # the last joins either
        ([2, 1, 1], {0: "a", 1: "b"}, [2], True),
        ([1, 1, 1], {0: "a", 1: "a"}, [2], True),
        ([1, 1], {0: None}, [1], False),
        ([1, 1], {}, [0, 1], False),
    ],
)
def test_when_a_vote_is_settled(
    weights: list[float], keys: dict[int, str | None], still_open: list[int], expected: bool
) -> None:
    assert settled(weights, keys, still_open) is expected


ballots = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 4).map(float), st.floats(0, 1)),
        st.sampled_from(["a", "b", "c", None]),
    ),
    min_size=1,
    max_size=7,
)


@given(ballots, st.randoms())
def test_the_winner_does_not_depend_on_the_order_of_arrival(
    cast: list[tuple[float, str | None]], chance: object
) -> None:
    weights = [weight for weight, _ in cast]
    keys = {rank: key for rank, (_, key) in enumerate(cast)}
    order = list(keys)
    chance.shuffle(order)  # type: ignore[attr-defined]
    assert winner(weights, {rank: keys[rank] for rank in order}) == winner(weights, keys)


@given(ballots, st.randoms(), st.sets(st.integers(0, 6)))
def test_early_stop_never_changes_the_winning_answer(
    cast: list[tuple[float, str | None]], chance: object, failing: set[int]
) -> None:
    weights = [weight for weight, _ in cast]
    keys = {rank: key for rank, (_, key) in enumerate(cast) if rank not in failing}
    order = list(range(len(cast)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    seen: dict[int, str | None] = {}
    for place, rank in enumerate(order):
        if rank in keys:
            seen[rank] = keys[rank]
        if settled(weights, seen, order[place + 1 :]):
            assert keys[winner(weights, seen)] == keys[winner(weights, keys)]


@given(ballots)
def test_a_vote_is_settled_when_everybody_has_spoken(cast: list[tuple[float, str | None]]) -> None:
    keys = {rank: key for rank, (_, key) in enumerate(cast)}
    spoken = any(key is not None for key in keys.values())
    assert settled([weight for weight, _ in cast], keys, ()) == spoken

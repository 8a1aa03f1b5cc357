"""The way of a request over fake parts: decided, run and recorded once, closed from every exit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.errors import EngineError, UnknownModel, Unsupported
from composer.generations import Generations
from composer.outcome import Outcome
from composer.pipeline import Pipeline
from composer.prompting import PromptSpec
from composer.types import Adapter, Expert, FloatArray, Gated
from tests.fakes import FakeScheduler, Stage, request, stage


class Bench:
    """A pipeline over one stage, and what it reported."""

    def __init__(self, staged: Stage) -> None:
        self.staged = staged
        self.outcomes: list[Outcome] = []
        self.scheduler = FakeScheduler()
        self.generations = Generations(lambda _: None)
        self.generations.swap(staged.generation)
        self.pipeline = Pipeline(self.generations, self.scheduler, self.outcomes.append)

    def assert_settled(self, status: str) -> Outcome:
        assert self.scheduler.out == {}
        assert self.generations.holds == 0
        [outcome] = self.outcomes
        assert outcome.status == status
        return outcome


async def test_the_routed_expert_answers_and_the_outcome_says_so() -> None:
    bench = Bench(stage())
    async with await bench.pipeline.answer(request("please beta")) as answer:
        text = "".join([chunk.text async for chunk in answer])
    assert text == "beta:please beta"
    outcome = bench.assert_settled("ok")
    assert outcome.experts == ["beta"]
    assert outcome.plan is not None
    assert outcome.plan.best == "beta"
    assert outcome.plan.scores == {"beta": 0.9, "alpha": 0.1}
    assert outcome.usage.completion_tokens == 2
    assert outcome.timings.total_ms >= outcome.timings.decision_ms > 0
    assert outcome.timings.first_token_ms is not None


async def test_a_model_that_is_an_expert_is_asked_without_routing() -> None:
    bench = Bench(stage())
    async with await bench.pipeline.answer(request("please beta", model="alpha")) as answer:
        assert {chunk.expert async for chunk in answer} == {"alpha"}
    assert bench.assert_settled("ok").plan.reasons == {"rule": "named"}  # type: ignore[union-attr]


@pytest.mark.parametrize("wish", [{"quality": 0.9}, {"max_cost": 0.001}])
async def test_one_expert_cannot_be_held_to_an_aim(wish: dict[str, float]) -> None:
    bench = Bench(stage())
    with pytest.raises(Unsupported, match="name a policy") as caught:
        await bench.pipeline.answer(request("please beta", model="alpha", **wish))
    assert caught.value.param == f"composer.{next(iter(wish))}"


async def test_opting_out_gives_the_excluded_expert_nothing() -> None:
    bench = Bench(stage(("alpha", "beta", "gamma")))
    asked = request("please beta", exclude=frozenset({"beta"}))
    async with await bench.pipeline.answer(asked) as answer:
        assert {chunk.expert async for chunk in answer} == {"alpha"}
    assert "beta" not in bench.assert_settled("ok").plan.scores  # type: ignore[union-attr]


async def test_below_the_threshold_the_default_expert_answers() -> None:
    bench = Bench(stage(policy={"threshold": 0.5, "default_expert": "beta"}))
    async with await bench.pipeline.answer(request("nothing known")) as answer:
        assert {chunk.expert async for chunk in answer} == {"beta"}
    assert bench.assert_settled("ok").plan.reasons["rule"] == "below_threshold"  # type: ignore[union-attr]


async def test_an_excluded_default_expert_is_not_asked_below_the_threshold() -> None:
    bench = Bench(stage(policy={"threshold": 0.5, "default_expert": "beta"}))
    asked = request("nothing known", exclude=frozenset({"beta"}))
    async with await bench.pipeline.answer(asked) as answer:
        assert {chunk.expert async for chunk in answer} == {"alpha"}


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request(model="nobody"), UnknownModel),
        (request(model="alpha", exclude=frozenset({"alpha"})), Unsupported),
        (request(needs=frozenset({"tools"})), Unsupported),
    ],
)
async def test_a_refused_request_is_recorded_and_holds_nothing(
    asked: object, error: type[Exception]
) -> None:
    bench = Bench(stage())
    with pytest.raises(error):
        await bench.pipeline.answer(asked)  # type: ignore[arg-type]
    assert bench.assert_settled("error").plan is None


async def test_an_engine_failure_reaches_the_caller_and_the_record() -> None:
    staged = stage()
    staged.engine.fail = EngineError("the server fell over")
    bench = Bench(staged)
    with pytest.raises(EngineError, match="fell over"):
        async with await bench.pipeline.answer(request()) as answer:
            _ = [chunk async for chunk in answer]
    assert bench.assert_settled("error").error == "engine_error"


async def test_an_answer_never_begun_is_closed_and_counts_as_cancelled() -> None:
    bench = Bench(stage())
    answer = await bench.pipeline.answer(request())
    await answer.aclose()
    await answer.aclose()
    bench.assert_settled("cancelled")
    assert bench.staged.engine.calls == []


async def test_a_caller_who_leaves_in_the_middle_cancels_the_call() -> None:
    bench = Bench(stage())
    async with await bench.pipeline.answer(request("please alpha go on")) as answer:
        async for _ in answer:
            break
    assert bench.assert_settled("cancelled").cost_usd is None  # not free, but unknown
    assert bench.staged.engine.cancelled == ["r1/0"]


async def test_a_cancelled_task_cancels_the_call() -> None:
    staged = stage()
    staged.engine.gate = asyncio.Event()
    bench = Bench(staged)

    async def work() -> None:
        async with await bench.pipeline.answer(request()) as answer:
            _ = [chunk async for chunk in answer]

    task = asyncio.create_task(work())
    while not staged.engine.calls:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    bench.assert_settled("cancelled")


async def test_a_request_sees_one_catalog_for_its_whole_life() -> None:
    old = stage(version=1)
    old.engine.gate = asyncio.Event()
    bench = Bench(old)
    task = asyncio.create_task(_texts(bench.pipeline, request("please alpha")))
    while not old.engine.calls:
        await asyncio.sleep(0)
    bench.generations.swap(stage(("beta",), version=2).generation)
    old.engine.gate.set()
    assert await task == "alpha:please alpha"
    assert bench.outcomes[0].catalog_version == 1
    assert await _texts(bench.pipeline, request("please alpha")) == "beta:please alpha"


async def test_a_prompt_template_is_filled_from_the_last_user_message() -> None:
    spec = PromptSpec.model_validate(
        {"extract": [{"regex": r"(?P<word>\w+) loudly"}], "template": "uppercase {word}"}
    )
    bench = Bench(stage(experts={"alpha": Expert(id="alpha", server="server", prompt=spec)}))
    messages = (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "say fox loudly"},
    )
    assert await _texts(bench.pipeline, request(messages=messages)) == "alpha:uppercase fox"
    assert len(bench.staged.engine.calls[0].messages) == 1


async def test_a_raw_prompt_is_read_by_a_template_and_sent_as_a_message() -> None:
    spec = PromptSpec.model_validate(
        {"extract": [{"regex": r"(?P<word>\w+) loudly"}], "template": "uppercase {word}"}
    )
    bench = Bench(stage(experts={"alpha": Expert(id="alpha", server="server", prompt=spec)}))
    asked = request(messages=(), prompt="say fox loudly")
    assert await _texts(bench.pipeline, asked) == "alpha:uppercase fox"
    assert bench.staged.engine.calls[0].prompt is None


async def _texts(pipeline: Pipeline, asked: object) -> str:
    async with await pipeline.answer(asked) as answer:  # type: ignore[arg-type]
        return "".join([chunk.text async for chunk in answer])


def gated(**settings: Any) -> Expert:
    gate = Gated("glider", ("x",), ("sha256:1",), **settings)
    return Expert("beta", "server", adapter=Adapter(Path("g"), "sha256:2", 1, 1.0, (), gate=gate))


async def test_a_gate_that_reads_the_request_is_given_its_embedding() -> None:
    experts = {"alpha": Expert("alpha", "server"), "beta": gated(per_request=True)}
    bench = Bench(stage(experts=experts))
    texts: list[str] = []

    async def embed(text: str) -> FloatArray:
        texts.append(text)
        return np.array([0.6, 0.8], np.float32)

    pipeline = Pipeline(bench.generations, bench.scheduler, bench.outcomes.append, embed=embed)
    for text in ("please beta", "please alpha"):
        async with await pipeline.answer(request(text, gates="all")) as answer:
            assert [chunk async for chunk in answer]
    asked = {call.expert: call for call in bench.staged.engine.calls}
    assert asked["beta"].embedding == pytest.approx((0.6, 0.8))
    assert asked["alpha"].embedding is None
    assert (texts, asked["beta"].gates) == (["please beta"], "all")


async def test_gates_are_asked_of_those_who_may_have_one() -> None:
    bench = Bench(stage())
    with pytest.raises(Unsupported, match="no expert of model 'auto' has a gate"):
        await bench.pipeline.answer(request("please beta", gates="all"))

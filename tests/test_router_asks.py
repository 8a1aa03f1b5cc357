"""A router's call of an LLM is one of its request's: counted in timings, usage and cost, under a
lease, cancelled with it, and made without what the request wants of its answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from api.wire import composer_body
from composer.build import load, make_embedder
from composer.errors import CatalogError
from composer.generations import Generations
from composer.outcome import Outcome
from composer.pipeline import Pipeline
from composer.recording import record_of
from composer.routing.artefact import EmbedderStamp
from composer.routing.asking import Asking
from composer.routing.base import Query, Scores
from composer.routing.outcomes import Outcomes
from composer.settings import Settings
from composer.types import Ask, BoolArray, Call, Chunk, Cost, Expert, Usage
from router_training.train import train
from tests.batch.helpers import Bench as Batch
from tests.batch.helpers import content, line, write
from tests.engines.scripted import Scripted, chooses, serve
from tests.fakes import FakeEngine, FakeRouter, FakeScheduler, Stage, request, stage
from tests.tiny import ROOT, chat, serving

PRICE = Cost(input_per_1m=1.0, output_per_1m=10.0)


class AskingRouter(FakeRouter):
    """Chooses the expert that `wise` names."""

    asked = "wise"

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        asking = Asking(ask, "wise", None)
        said = await asking.say("who?", max_tokens=7)
        scores = await super().score(Query(said or query.text), eligible)
        return Scores(
            scores.experts, scores.quality, scores.uncertainty, {}, told={"asked": asking.told}
        )


class WiseEngine(FakeEngine):
    """`wise` says beta; usage of 100 and 10 tokens."""

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        if call.expert != "wise":
            async for chunk in super().run(call):
                yield chunk
            return
        self.calls.append(call)
        try:
            if self.gate is not None:
                await self.gate.wait()
            yield Chunk(text="beta")
            yield Chunk(finish_reason="stop", usage=Usage(100, 10))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(call.id)
            raise


@dataclass
class Bench:
    staged: Stage
    scheduler: FakeScheduler
    pipeline: Pipeline
    outcomes: list[Outcome]


def asking() -> Stage:
    experts = {
        id_: Expert(id=id_, server="server", cost=PRICE) for id_ in ("alpha", "beta", "wise")
    }
    staged = stage(experts=experts, engine=WiseEngine("server"))
    way = staged.generation.ways["auto"]
    way_asking = type(way)(
        way.policy, way.eligibility, way.cost, AskingRouter(way.policy.experts), way.strategy
    )
    staged.generation.ways["auto"] = way_asking  # type: ignore[index]
    return staged


def bench() -> Bench:
    staged = asking()
    generations = Generations(lambda _: None)
    generations.swap(staged.generation)
    outcomes: list[Outcome] = []
    scheduler = FakeScheduler()
    return Bench(staged, scheduler, Pipeline(generations, scheduler, outcomes.append), outcomes)


async def text_of(pipeline: Pipeline, asked: Any) -> str:
    async with await pipeline.answer(asked) as answer:
        return "".join([chunk.text async for chunk in answer])


async def test_the_call_counts_in_timings_usage_and_cost_and_takes_a_lease() -> None:
    at = bench()
    assert await text_of(at.pipeline, request("anything")) == "beta:anything"
    [outcome] = at.outcomes
    assert at.scheduler.granted == 2
    assert at.scheduler.out == {}
    first, second = outcome.timings.calls
    assert (first["id"], first["expert"], first["routing"]) == ("r1/0", "wise", True)
    assert (second["id"], second["expert"]) == ("r1/1", "beta")
    assert "routing" not in second
    assert outcome.timings.run_ms >= first["run_ms"]
    answered = Usage(len("anything"), 1)
    assert outcome.usage == Usage(100, 10) + answered
    assert outcome.cost_usd == pytest.approx(PRICE.of(Usage(100, 10)) + PRICE.of(answered))
    assert outcome.plan is not None
    assert outcome.plan.reasons["asked"]["calls"] == 1
    assert outcome.experts == ["beta"]
    # Nobody who only routed is taken for one who answered.
    assert record_of(outcome, content=False).experts == ("beta",)
    assert composer_body(outcome)["experts"] == ["beta"]


async def test_the_question_has_nothing_of_what_the_answer_is_to_be() -> None:
    at = bench()
    asked = request("anything", extra={"tools": [1]}, stream=True)
    await text_of(at.pipeline, asked)
    question, answer = at.staged.engine.calls
    assert (dict(question.extra), question.stream, question.forward) == ({}, False, None)
    assert question.messages == ({"role": "user", "content": "who?"},)
    assert (question.sampling.max_tokens, question.sampling.n) == (7, 1)
    assert answer.extra == {"tools": [1]}


async def test_a_caller_who_leaves_while_it_is_decided_cancels_the_question() -> None:
    at = bench()
    at.staged.engine.gate = asyncio.Event()
    task = asyncio.create_task(text_of(at.pipeline, request("anything")))
    while not at.staged.engine.calls:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [outcome] = at.outcomes
    assert outcome.status == "cancelled"
    assert at.staged.engine.cancelled == ["r1/0"]
    assert at.scheduler.out == {}
    assert record_of(outcome, content=False).experts == ()


async def test_an_expert_that_the_request_excludes_is_not_asked_either() -> None:
    at = bench()
    asked = request("anything alpha", exclude=frozenset({"wise"}))
    assert await text_of(at.pipeline, asked) == "alpha:anything alpha"
    [outcome] = at.outcomes
    assert outcome.plan is not None
    assert outcome.plan.reasons["asked"]["failed"] == "not_asked"
    assert [call.expert for call in at.staged.engine.calls] == ["alpha"]


async def test_a_decision_that_takes_a_call_is_not_made_ahead() -> None:
    at = bench()
    assert await at.pipeline.plan(request("anything")) is None
    assert at.staged.engine.calls == []
    assert await at.pipeline.plan(request("anything", model="alpha")) is not None


async def test_a_batch_decides_such_lines_in_their_turn(tmp_path: Path) -> None:
    staged = asking()
    at = Batch(staged)
    source = write(tmp_path / "in", [line(f"id-{i}", f"please alpha {i}") for i in range(30)])
    answered = await at.run(source, tmp_path / "out")
    assert [content(one) for one in answered] == [f"beta:please alpha {i}" for i in range(30)]
    for one, outcome in zip(answered, at.outcomes, strict=True):
        assert one["response"]["body"]["composer"]["reasons"]["asked"]["calls"] == 1
        assert [call.get("routing") for call in outcome.timings.calls] == [True, None]
    assert len(staged.engine.calls) == 60


# --- the real service ---------------------------------------------------------------------------

OTHERS = {
    "reverse": "writes a word backwards",
    "plural": "gives the plural of a noun",
    "sums": "adds up numbers",
}
INSTRUCTION = "Write the given word backwards."


def script(text: str) -> str:
    if text.startswith("Below "):
        return chooses("reverse", instruction=INSTRUCTION)(text)
    return f"an answer to {text}"


def config(server: dict[str, Any], **routers: dict[str, Any]) -> str:
    own = {"server": "scripted", "context_window": 4096}
    experts: dict[str, Any] = {id_: {**own, "description": what} for id_, what in OTHERS.items()}
    experts["wise"] = {**own, "cost": {"input_per_1m": 1, "output_per_1m": 1}}
    policies = {
        id_: {"router": router, "strategy": {"name": "single"}, "experts": ["*", "!wise"]}
        for id_, router in routers.items()
    }
    return yaml.safe_dump(
        {"version": 1, "servers": {"scripted": server}, "experts": experts, "policies": policies}
    )


async def test_served_with_a_real_call(tmp_path: Any) -> None:
    async with serve(Scripted(script=script)) as fake:
        text = config(
            fake.server,
            auto={"name": "llm", "expert": "wise"},
            out={"name": "llm", "expert": "wise", "method": "elimination"},
        )
        async with serving(tmp_path, text) as (client, _):
            for model, calls in (("auto", 1), ("out", 2)):
                fake.requests.clear()
                body = chat("do that thing to fox", model)
                answer = (await client.post("/v1/chat/completions", json=body)).json()
                told = answer["composer"]
                assert told["expert"] == "reverse", told
                asked = told["reasons"]["asked"]
                assert asked["calls"] == calls
                assert asked["ms"] <= told["decision_ms"]
                assert len(fake.generations()) == calls + 1
                words = len(answer["choices"][0]["message"]["content"].split())
                assert answer["usage"]["completion_tokens"] > words
            assert told["reasons"]["asked"]["eliminated"] == ["plural", "sums"]
            [_, question] = fake.generations()[:2]
            assert question.body["temperature"] == 0
            fake.faults.refuse = [(500, {"error": {"message": "boom"}}, {})]
            body = chat("write fox backwards", "auto")
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            assert answer["composer"]["expert"] == "reverse"
            assert "failed" in answer["composer"]["reasons"]["asked"]


def train_skills(folder: Path) -> None:
    """Questions of three skills, each of which one expert masters."""
    asked = [(f"{skill} question {i}", skill) for skill in OTHERS for i in range(12)]
    right = np.array([[expert == skill for expert in OTHERS] for _, skill in asked], np.float32)
    n = len(asked)
    outcomes = Outcomes(
        experts=tuple(OTHERS),
        text=tuple(text for text, _ in asked),
        quality=right,
        cost=np.full_like(right, np.nan),
        category=tuple(skill for _, skill in asked),
        benchmark=("",) * n,
        group=np.arange(n),
    )
    embedder = make_embedder(Settings(cache_dir=ROOT / ".cache" / "composer"))
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    train(outcomes, "skills", embedder.encode, stamp).artefact().save(folder)


async def test_skills_named_by_an_expert_are_served(tmp_path: Path) -> None:
    train_skills(tmp_path / "router")
    samples = itertools.cycle(["plural, nouns", "Plural", "sums"])

    def script(text: str) -> str:
        return next(samples) if text.startswith("Below ") else "an answer"

    async with serve(Scripted(script=script)) as fake:
        learned = {"name": "learned", "artefact": "./router"}
        text = config(
            fake.server,
            auto={**learned, "skills": {"expert": "wise", "samples": 3}},
            drawn={**learned, "draw": "distinct"},
        )
        async with serving(tmp_path, text) as (client, _):
            body = chat("sums question 3")
            told = (await client.post("/v1/chat/completions", json=body)).json()["composer"]
            assert told["expert"] == "plural"
            asked = told["reasons"]["asked"]
            assert (asked["keywords"], asked["skills"]) == (["plural"], ["plural"])
            assert asked["calls"] == 3
            assert len(fake.generations()) == 4
            # Without whom it asks, embedding infers.
            without = body | {"composer": {"exclude": ["wise"]}}
            told = (await client.post("/v1/chat/completions", json=without)).json()["composer"]
            assert (told["expert"], told["reasons"]["asked"]["failed"]) == ("sums", "not_asked")
            body = chat("sums question 3", "drawn")
            told = (await client.post("/v1/chat/completions", json=body)).json()["composer"]
            assert told["reasons"]["rule"] == "drawn"
            assert told["reasons"]["drawn"].keys() == {told["expert"]}


@pytest.mark.parametrize(
    ("expert", "said"),
    [
        ("wize", "it asks 'wize', and no expert is called 'wize'"),
        ("strict", "reads only what its `prompt` template makes of a request"),
    ],
)
def test_who_cannot_be_asked_is_told_at_check(tmp_path: Any, expert: str, said: str) -> None:
    server = {"engine": "openai", "url": "http://127.0.0.1:9/v1", "model": "m"}
    data = yaml.safe_load(config(server, auto={"name": "llm", "expert": expert}))
    data["experts"]["strict"] = {
        **data["experts"]["reverse"],
        "prompt": {"template": "do {word}", "extract": [{"leftover": "[a-z]+", "field": "word"}]},
    }
    file = tmp_path / "experts.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(CatalogError) as refused:
        load(Settings(experts=file))
    [problem] = refused.value.problems
    assert said in problem.message
    assert problem.path == "policies.auto.router"
    assert problem.remedy.startswith(("Known here: `plural`", "Did you mean", "Name an expert"))

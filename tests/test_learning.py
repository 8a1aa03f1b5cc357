"""Feedback given to the real service moves its online router, and a restart goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from composer.learning import Learning
from composer.routing.learners import LearningRouter
from composer.service import Service
from composer.store import Lessons
from tests.tiny import ASKED, chat, registry, serving

QUESTION = ASKED["plural"][0]


def online(**router: Any) -> str:
    config = yaml.safe_load(registry("uppercase", "plural"))
    config["policies"]["auto"]["router"] = {"name": "online", "floor": 0.0, "dim": 8, **router}
    return yaml.safe_dump(config)


def router_of(service: Service) -> LearningRouter:
    router = service.generations.current.ways["auto"].router
    assert isinstance(router, LearningRouter)
    return router


async def learn(service: Service) -> None:
    """What the background task does, now."""
    await service.recorder.flush()
    while await service.learning.step():
        pass


async def asked(client: Any, **ours: Any) -> dict[str, Any]:
    body = chat(QUESTION) | {"composer": ours}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_feedback_moves_the_router_and_a_restart_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path, online(feedback="full", rate=0.5)) as (client, service):
        first = await asked(client)
        assert first["composer"]["expert"] == "plural"
        assert first["composer"]["reasons"]["exploration"]["propensity"] == 1.0
        assert "context" not in str(first["composer"])
        for number in range(20):
            said = {
                "response_id": first["id"],
                "id": f"mine-{number}",
                "score": 0,
                "labels": {"experts": {"uppercase": 1, "nobody": 1}},
            }
            given = await client.post("/v1/feedback", json=said)
            assert given.status_code == 201
        await learn(service)
        assert router_of(service).learner.seen == 40
        second = await asked(client)
        assert second["composer"]["expert"] == "uppercase"
    async with serving(tmp_path, online(feedback="full", rate=0.5)) as (client, service):
        assert router_of(service).learner.seen == 40
        third = await asked(client)
        assert third["composer"]["scores"] == second["composer"]["scores"]
        assert await service.learning.step() == 0
    async with serving(tmp_path, online(feedback="bandit")) as (_, service):
        assert router_of(service).learner.seen == 0  # what the other kind learnt is no use to it


async def test_of_two_processes_one_learns_and_the_other_takes_it_up(tmp_path: Path) -> None:
    async with serving(tmp_path, online(feedback="bandit")) as (client, service):
        answer = await asked(client, explore=False)
        said = {"response_id": answer["id"], "score": 0}
        await client.post("/v1/feedback", json=said)
        await learn(service)
        router = router_of(service)
        assert router.learner.seen == 1
        # A second process, as far as the database can see, that stands where this one began.
        other = Learning(Lessons(service.store), service.generations)
        fresh = type(router)(router.base, router._settings, router._embedder)  # type: ignore[attr-defined, call-arg]
        router.use(fresh.learner)
        assert await other.step() == 0
        assert router.learner.seen == 1


async def test_a_request_not_to_be_explored_on_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path, online(floor=1.0)) as (client, _):
        held = [(await asked(client, explore=False))["composer"] for _ in range(8)]
        free = [(await asked(client))["composer"] for _ in range(24)]
    assert {one["expert"] for one in held} == {"plural"}
    assert {one["reasons"]["exploration"]["propensity"] for one in held} == {1.0}
    assert {one["expert"] for one in free} == {"plural", "uppercase"}
    assert {one["reasons"]["exploration"]["propensity"] for one in free} == {0.5}


async def test_a_conversation_under_way_is_not_moved_to_try_somebody_out(tmp_path: Path) -> None:
    config = yaml.safe_load(online(floor=1.0))
    config["policies"]["auto"]["stay"] = 0.1
    async with serving(tmp_path, yaml.safe_dump(config)) as (client, _):
        for number in range(6):
            first = chat(f"{QUESTION} number {number}")
            answer = (await client.post("/v1/chat/completions", json=first)).json()
            turns = [
                *first["messages"],
                answer["choices"][0]["message"],
                {"role": "user", "content": "and of hen?"},
            ]
            second = await client.post("/v1/chat/completions", json=first | {"messages": turns})
            told = second.json()["composer"]["reasons"]["exploration"]
            assert told["propensity"] == 1.0

"""Feedback given to the real service moves its online router, and a restart goes on from there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from composer.learning import Learning
from composer.routing.learners import Learner, LearningRouter, Observed
from composer.service import Service
from composer.store import Lesson, Lessons
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
        learning = (await client.get("/health")).json()["learning"]
        assert learning == {"learnt": 20, "policies": {"auto": {"seen": 40, "version": 1}}}
        assert "composer_feedback_learnt_total 20.0" in (await client.get("/metrics")).text
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


async def test_a_kept_state_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    async with serving(tmp_path, online()) as (client, service):
        answer = await asked(client)
        await client.post("/v1/feedback", json={"response_id": answer["id"], "score": 0})
        await learn(service)
        lessons = Lessons(service.store)
        kept = (await lessons.kept(["auto"]))["auto"]
        broken = replace(kept, version=kept.version + 1, state=kept.state[:-1])
        await lessons.keep([broken], [])
    async with serving(tmp_path, online()) as (client, service):
        router = router_of(service)
        assert router.learner.seen == 0
        answer = await asked(client)
        await client.post("/v1/feedback", json={"response_id": answer["id"], "score": 0})
        await learn(service)
        assert router.learner.seen == 1
        assert (await Lessons(service.store).versions(["auto"]))["auto"] == broken.version + 1


async def test_a_policy_that_is_gone_is_not_held(tmp_path: Path) -> None:
    config = yaml.safe_load(online())
    config["policies"]["second"] = config["policies"]["auto"]
    config["default_policy"] = "auto"
    async with serving(tmp_path, yaml.safe_dump(config)) as (_, service):
        assert service.learning.stats()["policies"].keys() == {"auto", "second"}
        del config["policies"]["second"]
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(config))
        await service.changes.reload()
        await learn(service)
        assert service.learning.stats()["policies"].keys() == {"auto"}


async def test_a_fault_does_not_end_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, online()) as (client, service):
        answer = await asked(client)
        await client.post("/v1/feedback", json={"response_id": answer["id"], "score": 0})
        await service.recorder.flush()
        router, stop, tries = router_of(service), asyncio.Event(), 0
        after = router.after

        def faulty(observed: Sequence[Observed]) -> Learner:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise RuntimeError("a fault")
            return after(observed)

        monkeypatch.setattr(router, "after", faulty)
        learning = Learning(Lessons(service.store), service.generations, every_s=0.01)
        running = asyncio.create_task(learning.run(stop))
        async with asyncio.timeout(30):
            while not router.learner.seen:
                await asyncio.sleep(0.01)
        stop.set()
        await running
    assert "a fault" in caplog.text


async def test_what_another_process_learns_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def idle(_: Learning, stop: asyncio.Event) -> None:
        await stop.wait()

    monkeypatch.setattr(Learning, "run", idle)  # each step is this test's
    async with serving(tmp_path, online()) as (client, service):
        answer = await asked(client)
        await client.post("/v1/feedback", json={"response_id": answer["id"], "score": 0})
        await service.recorder.flush()
        router, lessons = router_of(service), Lessons(service.store)
        state = router.packed(router.learner)
        loop, after = asyncio.get_running_loop(), router.after

        async def elsewhere() -> None:
            await lessons.keep([Lesson("auto", router.fingerprint, 1, state)], [])
            await service.learning.take_up(service.generations.current)

        def meanwhile(observed: Sequence[Observed]) -> Learner:
            learner = after(observed)
            asyncio.run_coroutine_threadsafe(elsewhere(), loop).result(10)
            return learner

        with monkeypatch.context() as patch:
            patch.setattr(router, "after", meanwhile)
            assert await service.learning.step() == 0
        kept = (await lessons.kept(["auto"]))["auto"]
        assert (kept.version, kept.state) == (1, state)
        assert await service.learning.step() == 1
        assert (await lessons.versions(["auto"]))["auto"] == 2


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

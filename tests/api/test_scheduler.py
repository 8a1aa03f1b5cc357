"""GET /v1/scheduler and GET /metrics over a real scheduler."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from composer.engines.base import Capacity
from composer.metrics import Metrics
from composer.scheduling.events import Arrived, DevicePolicy, Finished
from composer.scheduling.log import decode, read_lines, replay
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from composer.settings import Settings
from tests.api.conftest import InProcess
from tests.api.fakes import SECRET, World, until
from tests.scheduling.fakes import Fifo


class Scheduled(World):
    """A world under the real scheduler."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        policy: Callable[[], DevicePolicy] = Fifo,
        log: Path | None = None,
        in_flight: int = 1,
        queue: int = 1,
    ) -> None:
        self.real = DeviceScheduler(policy, log=log)
        own = settings or Settings(api_key=None)
        super().__init__(Capacity(in_flight, queue), own, scheduler=self.real)
        self.service.metrics = Metrics(self.real, lambda: ("auto",))


@pytest.fixture
async def scheduled() -> AsyncIterator[tuple[httpx.AsyncClient, Scheduled]]:
    world = Scheduled()
    async with InProcess(world) as client:
        yield client, world


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hello shout"}], **fields}
    return await client.post("/v1/chat/completions", json=body)


def samples(response: httpx.Response) -> dict[str, float]:
    """As Prometheus writes them, labels in the order of their names."""
    told = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={sample.labels[name]}" for name in sorted(sample.labels))
            told[f"{sample.name}{{{labels}}}"] = sample.value
    return told


async def test_it_shows_who_runs_waits_and_was_refused(
    scheduled: tuple[httpx.AsyncClient, Scheduled],
) -> None:
    client, world = scheduled
    world.engine.held = True
    running = asyncio.create_task(ask(client, model="shout"))
    await until(lambda: world.engine.running)
    waiting = asyncio.create_task(ask(client, model="team/sort"))
    await until(lambda: world.real.stats()["box"]["waiting"])
    refused = await ask(client, model="shout")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) == 8

    state = (await client.get("/v1/scheduler")).json()
    assert state["servers"] == {"box": {"running": 1, "waiting": 1, "in_flight": 1, "queue": 1}}
    device = state["devices"]["box"]
    assert device["residents"] == ["box"]
    assert device["running"] == {"box": 1}
    assert device["queue"] == [
        {"server": "box", "expert": "team/sort", "interactive": 1, "batch": 0}
    ]
    assert device["refused"] == {"full": 1}
    assert device["wait_s"]["interactive"]["calls"] == 1
    assert device["swaps"] == 0
    assert device["timeline"] == [
        {
            "model": "box",
            "state": "resident",
            "from": pytest.approx(state["now"], abs=60),
            "to": None,
        }
    ]
    assert (await client.get("/health")).json()["scheduler"] == state["servers"]

    told = samples(await client.get("/metrics"))
    assert told["composer_running{server=box}"] == 1
    assert told["composer_queue{expert=team/sort,priority=interactive,server=box}"] == 1
    assert told["composer_refused_total{device=box,reason=full}"] == 1
    assert told["composer_resident{device=box,server=box}"] == 1
    assert told["composer_wait_seconds_bucket{device=box,le=+Inf,priority=interactive}"] == 1

    world.engine.held = False
    assert (await running).status_code == (await waiting).status_code == 200
    state = (await client.get("/v1/scheduler")).json()
    assert state["devices"]["box"]["queue"] == []
    waits = state["devices"]["box"]["wait_s"]["interactive"]
    assert waits["calls"] == 2
    assert 0 <= waits["p50"] <= waits["p95"] <= waits["p99"] <= waits["max"] > 0
    told = samples(await client.get("/metrics"))
    assert not any(name.startswith("composer_queue{") for name in told)
    assert told["composer_wait_seconds_count{device=box,priority=interactive}"] == 2
    assert told["composer_wait_seconds_sum{device=box,priority=interactive}"] > 0


async def test_a_failures_words_name_no_path(
    scheduled: tuple[httpx.AsyncClient, Scheduled],
) -> None:
    client, world = scheduled
    world.real.owners["box"].failures["box"] = f"no file {SECRET}; put it there"
    response = await client.get("/v1/scheduler")
    assert response.json()["devices"]["box"]["failures"] == {"box": "no file …; put it there"}
    assert SECRET not in response.text


@pytest.mark.parametrize("path", ["/v1/scheduler", "/metrics"])
async def test_both_are_behind_the_key(path: str) -> None:
    async with InProcess(Scheduled(Settings(api_key="the-key"))) as client:
        assert (await client.get(path)).status_code == 401
        headers = {"authorization": "Bearer the-key"}
        assert (await client.get(path, headers=headers)).status_code == 200


async def test_metrics_are_in_prometheus_text_format(
    scheduled: tuple[httpx.AsyncClient, Scheduled],
) -> None:
    client, _ = scheduled
    response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("composer_") for family in families)
    assert all(family.documentation for family in families)


async def test_the_newest_events_are_shown_when_asked_for(
    scheduled: tuple[httpx.AsyncClient, Scheduled],
) -> None:
    client, _ = scheduled
    await ask(client, model="shout")
    assert (await client.get("/v1/scheduler")).json()["events"] == []
    events = (await client.get("/v1/scheduler?events=2")).json()["events"]
    assert [event["event"]["kind"] for event in events] == ["arrived", "finished"]
    assert events[0]["actions"] == [{"kind": "grant", "call": 1}]
    assert events[0]["expert"] == "shout"
    assert (await client.get("/v1/scheduler?events=-1")).status_code == 400


async def test_the_services_own_log_replayed_gives_the_same_decisions(tmp_path: Path) -> None:
    """Requests over HTTP, some of whose callers leave, on the real clock and policy."""
    path = tmp_path / "scheduler.jsonl"
    world = Scheduled(policy=SwapPolicy, log=path, in_flight=2, queue=12)
    draw = random.Random(1)
    async with InProcess(world) as client:

        async def one(number: int) -> int:
            await asyncio.sleep(draw.uniform(0, 0.3))
            expert = draw.choice(["shout", "team/sort", "auto"])
            return (await ask(client, model=expert)).status_code

        tasks = [asyncio.create_task(one(number)) for number in range(80)]
        for task in draw.sample(tasks, 20):
            asyncio.get_running_loop().call_later(draw.uniform(0, 0.4), task.cancel)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert ended.count(200) > 20
    lines = list(read_lines(path))
    kinds = Counter(step.event.__class__ for line in lines if (step := decode(line)))
    assert kinds[Arrived] > 30
    assert kinds[Finished] > 20
    assert replay(lines, SwapPolicy) == []

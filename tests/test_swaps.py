"""Two models and room for one, in the whole service: real registry, engines, policy and clock.

What was decided is read from the scheduler's own log, so that no assertion rests on how fast the
machine is.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import yaml

from composer.engines.local import EmbeddedEngine
from composer.scheduling.events import (
    Action,
    Arrived,
    Finished,
    Load,
    Loaded,
    Refuse,
    Ticked,
    Unload,
    Unloaded,
    Wake,
)
from composer.scheduling.log import Step, decode, read_lines, replay
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.state import PolicySettings
from tests.tiny import ASKED, TINY, chat, serving

SKILLS = ("uppercase", "plural")
SERVERS = ("large", "small")
MAX_WAIT_S, PATIENCE, DRAIN_S = 60.0, 0.02, 30.0
"""Nobody is refused, and a swap is put off for a second at most."""


def registry(*, room: float = 1, max_batch: int = 16, start_s: float = 1.0) -> str:
    """Both tiny bases, each with two skills, on one device."""

    def server(base: str) -> dict[str, Any]:
        return {
            "engine": "embedded",
            "model": str(TINY / "bases" / base),
            "model_name": f"composer/tiny-{base}",
            "max_batch": max_batch,
            "placement": {"device": "box", "memory_gb": 1, "start_s": start_s, "stop_s": 0.1},
        }

    return yaml.safe_dump(
        {
            "version": 1,
            "devices": {"box": {"memory_gb": room}},
            "servers": {base: server(base) for base in SERVERS},
            "adapters_from": [
                {
                    "path": str(TINY / "experts" / base / skill),
                    "server": base,
                    "id_prefix": f"{base}-",
                }
                for base in SERVERS
                for skill in SKILLS
            ],
            "policies": {
                "auto": {"router": {"name": "neighbours"}, "strategy": {"name": "single"}}
            },
        }
    )


class Service:
    """A client of the running service, and its scheduler's log."""

    def __init__(self, client: httpx.AsyncClient, log: Path) -> None:
        self.client = client
        self.log = log

    async def ask(self, base: str, skill: str = "uppercase", **composer: Any) -> httpx.Response:
        body = chat(ASKED[skill][0], f"{base}-{skill}") | {"composer": composer}
        return await self.client.post("/v1/chat/completions", json=body)

    async def answer(self, base: str, skill: str = "uppercase") -> dict[str, Any]:
        """The `composer` field of an answer that is right."""
        response = await self.ask(base, skill)
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["choices"][0]["message"]["content"] == ASKED[skill][1]
        told: dict[str, Any] = body["composer"]
        assert told["expert"] == f"{base}-{skill}"
        return told

    async def device(self) -> dict[str, Any]:
        state: dict[str, Any] = (await self.client.get("/v1/scheduler")).json()["devices"]["box"]
        return state

    async def steps(self) -> list[Step]:
        """The newest first thousand of what happened so far."""
        state = (await self.client.get("/v1/scheduler?events=10000")).json()
        return [step for line in state["events"] if (step := decode(orjson.dumps(line)))]


@asynccontextmanager
async def service(folder: Path, text: str, **settings: Any) -> AsyncIterator[Service]:
    log = folder / "scheduler.jsonl"
    given = {"max_wait_s": MAX_WAIT_S, "patience": PATIENCE, "drain_s": DRAIN_S, **settings}
    async with serving(folder, text, scheduler_log=log, **given) as (client, _):
        yield Service(client, log)


def with_action(steps: Sequence[Step], action: Action) -> Step:
    """The only step in which this was decided."""
    (step,) = [step for step in steps if action in step.actions]
    return step


def arrivals(steps: Sequence[Step], model: str) -> list[Step]:
    return [s for s in steps if isinstance(s.event, Arrived) and s.event.call.model == model]


def never_more_than(memory_gb: float, device: dict[str, Any]) -> None:
    """Along the timeline; every model here takes 1 GB from its load's begin to its unload's end."""
    changes = [(one["from"], 1.0) for one in device["timeline"]]
    changes += [(one["to"], -1.0) for one in device["timeline"] if one["to"] is not None]
    used = list(itertools.accumulate(change for _, change in sorted(changes)))
    assert max(used) == memory_gb
    assert device["used_gb"] <= memory_gb


@pytest.fixture
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """How many engines held memory at once, as counts of moments: from the begin of a start to
    the end of a stop, whatever the scheduler believes."""
    there: set[EmbeddedEngine] = set()
    seen: Counter[int] = Counter()
    start, stop = EmbeddedEngine.start, EmbeddedEngine.stop

    async def started(self: EmbeddedEngine) -> None:
        there.add(self)
        seen[len(there)] += 1
        try:
            await start(self)
        except BaseException:
            there.discard(self)
            raise

    async def stopped(self: EmbeddedEngine) -> None:
        await stop(self)
        there.discard(self)

    monkeypatch.setattr(EmbeddedEngine, "start", started)
    monkeypatch.setattr(EmbeddedEngine, "stop", stopped)
    yield seen
    assert not there


async def test_sixty_requests_by_turns_swap_once_and_replay_as_they_were(
    tmp_path: Path, on_the_device: Counter[int]
) -> None:
    turns = list(itertools.islice(itertools.product(range(15), SKILLS, SERVERS), 60))
    async with service(tmp_path, registry()) as served:
        await asyncio.gather(*(served.answer(base, skill) for _, skill, base in turns))
        device = await served.device()
    # One visit of each model serves all, as all are there before the first model has to leave.
    # Each of the two more that are allowed would be for a request that came later than that.
    assert 2 <= device["swaps"] <= 4
    assert device["wait_s"]["interactive"]["calls"] == 60
    assert device["refused"] == {}
    assert device["policy_faults"] == 0
    never_more_than(1, device)
    assert set(on_the_device) == {1}

    lines = list(read_lines(served.log))
    settings = PolicySettings(patience=PATIENCE, drain_s=DRAIN_S, preload=True)
    assert asdict(settings).items() <= orjson.loads(lines[0]).items()
    steps = [step for line in lines if (step := decode(line))]
    kinds = Counter(type(step.event) for step in steps)
    assert kinds[Arrived] == kinds[Finished] == 60
    assert kinds[Loaded] == device["swaps"]
    assert kinds[Unloaded] == device["swaps"] - 1
    assert replay(lines, lambda: SwapPolicy(settings)) == []
    # And it is the policy that is compared: another one's decisions are others.
    assert replay(lines, lambda: SwapPolicy(PolicySettings(patience=1.0))) != []


async def test_a_call_that_no_swap_can_serve_in_time_is_refused_at_once(tmp_path: Path) -> None:
    async with service(tmp_path, registry(start_s=40.0), patience=1.0) as served:
        await served.answer("large")
        refused = await served.ask("small", max_wait_s=20.0)
        steps = await served.steps()
        await served.answer("large")
        device = await served.device()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    (arrived,) = arrivals(steps, "small")
    assert isinstance(arrived.event, Arrived)
    assert [
        (action.call, action.reason) for action in arrived.actions if type(action) is Refuse
    ] == [(arrived.event.call.id, "late")]
    assert device["refused"] == {"late": 1}


async def test_an_idle_model_leaves_for_another_before_patience_is_over(tmp_path: Path) -> None:
    async with service(tmp_path, registry()) as served:
        await served.answer("large")
        waited_s = (await served.answer("small"))["queue_ms"] / 1000
        device, steps = await served.device(), await served.steps()
    (arrived,) = arrivals(steps, "small")
    leaving = with_action(steps, Unload("large"))
    assert leaving.seq >= arrived.seq
    if leaving is not arrived:  # then at the time it had itself woken for
        assert isinstance(leaving.event, Ticked)
        wakes = [a.at for s in steps if s.seq < leaving.seq for a in s.actions if type(a) is Wake]
        assert arrived.at <= wakes[-1] <= arrived.at + PATIENCE * MAX_WAIT_S
    loading = with_action(steps, Load("small"))
    unloaded = next(s for s in steps if s.event == Unloaded("large"))
    assert 0 <= loading.at - unloaded.at < 1
    # The rest of the wait is the swap itself.
    swap_s = (
        device["moved"]["large"]["unload"]["seconds"] + device["moved"]["small"]["load"]["seconds"]
    )
    assert waited_s == pytest.approx(leaving.at - arrived.at + swap_s, abs=0.01)
    assert device["swaps"] == 2


async def test_where_there_is_room_another_model_is_loaded_at_once(tmp_path: Path) -> None:
    async with service(tmp_path, registry(room=2), preload=False) as served:
        await served.answer("large")
        await served.answer("small")
        device, steps = await served.device(), await served.steps()
    (arrived,) = arrivals(steps, "small")
    loading = with_action(steps, Load("small"))
    assert loading.seq - arrived.seq <= 1  # at the end of the same moment
    assert sorted(device["residents"]) == list(SERVERS)
    assert not any(isinstance(action, Unload) for step in steps for action in step.actions)
    never_more_than(2, device)


async def test_what_fits_is_loaded_before_anybody_asks(tmp_path: Path) -> None:
    """In the order of configuration; nobody waits for it to be ready, or is evicted for it."""
    for room, loaded in ((2, ["large", "small"]), (1, ["large"])):
        async with service(tmp_path, registry(room=room)) as served:
            assert (await served.client.get("/health")).json()["status"] == "ok"
            async with asyncio.timeout(60):
                while sorted((device := await served.device())["residents"]) != loaded:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            device = await served.device()
        assert sorted(device["residents"]) == loaded
        assert device["swaps"] == len(loaded)
        assert device["moving"] == []


async def test_a_placed_servers_settings_change_under_load(
    tmp_path: Path, on_the_device: Counter[int]
) -> None:
    async with service(tmp_path, registry()) as served:
        ended = False
        answers: Counter[str] = Counter()

        async def keep_asking(turns: Iterator[tuple[str, str]]) -> None:
            while not ended:
                base, skill = next(turns)
                await served.answer(base, skill)
                answers[base] += 1

        async def until(version: int) -> None:
            """That catalog is there, what came before it has left, and both models answered
            under it."""
            while True:
                health = (await served.client.get("/health")).json()
                assert health["catalog"]["reload"]["ok"], health
                if health["catalog"]["version"] == version and len(health["scheduler"]) == 2:
                    break
                assert len(health["scheduler"]) <= 6
                await asyncio.sleep(0.02)
            before = answers.copy()
            while not all(answers[base] > before[base] for base in SERVERS):
                await asyncio.sleep(0.02)

        turns = itertools.cycle(itertools.product(SERVERS, SKILLS))
        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(keep_asking(turns))
            await until(1)
            for version, max_batch in ((2, 8), (3, 4), (4, 6)):
                (tmp_path / "experts.yaml").write_text(registry(max_batch=max_batch))
                await until(version)
            ended = True
        device = await served.device()
        servers = (await served.client.get("/health")).json()["scheduler"]
    assert {line["in_flight"] for line in servers.values()} == {6}
    assert set(device["running"]) == set(servers)
    assert device["refused"] == {}
    assert device["failures"] == {}
    assert device["losses"] == {}
    assert device["policy_faults"] == 0
    assert set(on_the_device) == {1}
    lines = list(read_lines(served.log))
    settings = PolicySettings(patience=PATIENCE, drain_s=DRAIN_S, preload=True)
    assert replay(lines, lambda: SwapPolicy(settings)) == []

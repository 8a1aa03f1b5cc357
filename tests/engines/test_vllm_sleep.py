"""Sleep mode, which needs a GPU: tried on an imitation, in the order vLLM documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from composer.engines import vllm_server
from composer.engines.adapters import name_of
from composer.engines.vllm import VllmEngine
from composer.engines.vllm_launch import VllmSettings
from composer.errors import EngineUnavailable
from composer.types import Placement
from tests.engines.test_vllm import MakeAdapter, call, chunks_of, make_adapter, text_of
from tests.engines.upstream import FakeVllm, Serving

__all__ = ["make_adapter"]


class InProcess:
    """ManagedProcess's face, the imitation behind it: what it counts as starts are cold starts."""

    fake: FakeVllm
    starts = 0

    def __init__(
        self,
        name: str,
        launch: Any,
        command: Any,
        env: dict[str, str],
        ready: Callable[[], Awaitable[bool]],
        restarted: Any,
    ) -> None:
        self.fake.api_key = env["VLLM_API_KEY"]
        self.fake.dev_mode = env.get("VLLM_SERVER_DEV_MODE") == "1"
        self._serving = Serving(self.fake)
        self._ready = ready
        self.alive = False

    @property
    def port(self) -> int:
        return self._serving.port

    async def start(self) -> None:
        if not self.alive:
            type(self).starts += 1
            self.fake.weights = "base"
            self.fake.sleeping = None
            self.fake._awake.set()
            self.fake._aborting.clear()
            await self._serving.start()
            assert await self._ready()
            self.alive = True

    async def stop(self) -> None:
        if self.alive:
            self.alive = False
            await self._serving.kill()

    close = stop


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm(served_name="big", max_loras=2)
    monkeypatch.setattr(InProcess, "fake", fake, raising=False)
    monkeypatch.setattr(InProcess, "starts", 0)
    monkeypatch.setattr(vllm_server, "ManagedProcess", InProcess)
    return fake


Make = Callable[[int], VllmEngine]


@pytest_asyncio.fixture
async def make(fake: FakeVllm) -> AsyncIterator[Make]:
    made = []

    def make(level: Any) -> VllmEngine:
        settings = VllmSettings(launch={}, model="weights", max_loras=2)
        placement = Placement("gpu0", 1.0, sleep_level=level)
        made.append(VllmEngine("big", settings, placement=placement))
        return made[-1]

    yield make
    for engine in made:
        await engine.close()


@pytest.mark.parametrize("level", [1, 2])
async def test_it_sleeps_and_wakes_with_its_adapters(
    make: Make, fake: FakeVllm, make_adapter: MakeAdapter, level: int
) -> None:
    engine = make(level)
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.start()
    await engine.prepare([red])
    for sleeps in (1, 2):
        await engine.stop()
        await engine.stop()
        assert fake.sleeping == level
        assert (await engine.health()).ok
        await engine.prepare([blue])
        with pytest.raises(EngineUnavailable, match="not running"):
            await text_of(engine, call(adapter=red))
        await asyncio.gather(engine.start(), engine.start())
        assert fake.sleeping is None
        assert await text_of(engine, call()) == "base: one two"
        assert await text_of(engine, call(adapter=red)) == "red: one two"
        assert await text_of(engine, call(adapter=blue)) == "blue: one two"
        # Read anew, not only named: what the server still had in memory may be damaged.
        assert fake.loads.count(name_of(red)) == 1 + sleeps
    assert InProcess.starts == 1
    assert fake.slept == [level, level]


async def test_calls_that_run_when_it_falls_asleep_end(make: Make, fake: FakeVllm) -> None:
    engine = make(1)
    await engine.start()
    fake.faults.first_s = 30.0
    running = [
        asyncio.create_task(chunks_of(engine, call(stream=stream))) for stream in (True, False)
    ]
    while len(fake.generations()) < 2:
        await asyncio.sleep(0.005)
    await engine.stop()
    for end in await asyncio.gather(*running, return_exceptions=True):
        assert type(end) is EngineUnavailable


async def test_adapters_lost_over_a_sleep_are_seen_and_the_server_is_started_anew(
    make: Make, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    engine = make(1)
    red = make_adapter("red")
    await engine.start()
    await engine.prepare([red])
    await engine.stop()
    assert fake.slept == [1]
    fake.faults.wake_loses_adapters = True
    await engine.start()
    assert InProcess.starts == 2
    assert await text_of(engine, call(adapter=red)) == "red: one two"


async def test_weights_that_are_not_what_they_were_are_seen(make: Make, fake: FakeVllm) -> None:
    engine = make(2)
    await engine.start()
    fake.faults.reload_forgotten = True
    await engine.stop()
    await engine.start()
    assert InProcess.starts == 2
    assert await text_of(engine, call()) == "base: one two"


async def test_a_server_that_does_not_wake_is_started_anew(make: Make, fake: FakeVllm) -> None:
    engine = make(1)
    await engine.start()
    fake.faults.wake_fails = True
    await engine.stop()
    await engine.start()
    assert InProcess.starts == 2
    assert await text_of(engine, call()) == "base: one two"


async def test_a_server_that_cannot_sleep_is_stopped(
    make: Make, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(1)
    fake.dev_mode = False
    await engine.start()
    await engine.stop()
    assert fake.slept == []
    await engine.start()
    assert InProcess.starts == 2
    assert await text_of(engine, call()) == "base: one two"

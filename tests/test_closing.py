"""The end of a service: what runs comes to its end, what only waits for a load does not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from composer import draining
from composer.engines.base import Capacity
from composer.engines.processes import free_port
from composer.errors import EngineUnavailable
from composer.generations import Generation
from composer.scheduling.base import Scheduler
from composer.settings import Settings
from composer.types import Catalog
from tests.api.conftest import InProcess
from tests.api.fakes import ScriptedEngine, World, until

BODY = {"model": "shout", "messages": [{"role": "user", "content": "hello there"}]}
PATIENT = Settings(api_key=None, drain_timeout_s=3600.0)


class LoadingEngine(ScriptedEngine):
    """Comes to no end of its start, until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    async def start(self) -> None:
        self.moves.append("start")
        await self._ended.wait()
        raise EngineUnavailable("server 'box' was stopped while it started")

    async def close(self) -> None:
        await super().close()
        self._ended.set()


class AwayWorld(World):
    """Its server is not there yet."""

    async def _build(self, catalog: Catalog, live: Sequence[Generation]) -> Generation:
        made = await super()._build(catalog, live)
        return replace(
            made, places={id_: replace(p, there=False) for id_, p in made.places.items()}
        )


async def test_what_waits_for_a_load_is_refused_and_the_load_is_broken_off() -> None:
    engine = LoadingEngine()
    world = AwayWorld(Capacity(64, 64), PATIENT, engine)
    async with InProcess(world) as client:
        waiting = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
        await until(lambda: engine.moves and world.scheduler.stats()["box"]["waiting"])
        async with asyncio.timeout(60):
            await world.service.drain()
            refused = await waiting
        assert engine.closed
        assert engine.moves == ["start"]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"


async def test_what_runs_and_what_waits_behind_it_comes_to_its_end() -> None:
    engine = ScriptedEngine()
    engine.held = True
    world = World(Capacity(1, 64), PATIENT, engine)
    async with InProcess(world) as client:
        asked = [
            asyncio.create_task(client.post("/v1/chat/completions", json=BODY)) for _ in range(3)
        ]
        await until(lambda: engine.running and world.scheduler.stats()["box"]["waiting"] == 2)
        draining = asyncio.create_task(world.service.drain())
        await asyncio.sleep(0.3)
        assert not draining.done()
        assert not engine.closed
        engine.held = False
        async with asyncio.timeout(60):
            await draining
            answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200] * 3


class Loads:
    """What a scheduler says of its servers; none is loaded."""

    def __init__(self, **waiting: int) -> None:
        self._waiting = waiting

    def stats(self) -> Mapping[str, Any]:
        return {name: {"running": 0, "waiting": count} for name, count in self._waiting.items()}

    def resident(self, server: str) -> bool:
        return False


def test_a_request_that_has_no_call_yet_is_not_refused_for_those_that_wait() -> None:
    """It may be answered by what is loaded."""
    assert not draining._only_wait(cast(Scheduler, Loads(a=1)), 2)
    assert not draining._only_wait(cast(Scheduler, Loads(a=0)), 1)
    assert draining._only_wait(cast(Scheduler, Loads(a=1, b=1)), 2)
    assert draining._only_wait(cast(Scheduler, Loads(a=2)), 1)


REGISTRY = """\
version: 1
servers:
  slow:
    engine: vllm
    model: %(base)s
    model_name: composer/tiny-large
    context_window: 512
    launch: {python: %(python)s, env: {PYTHONPATH: %(path)s}, log: slow.log}
experts:
  plain: {server: slow, description: anything}
policies:
  auto: {router: {name: neighbours}, strategy: {name: single}, experts: ["*"]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_boot_that_is_broken_off_leaves_no_server_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    root = Path(__file__).resolve().parent.parent
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    # As vLLM while it loads: deaf to being asked to end.
    (package / "api_server.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('PID', os.getpid(), flush=True)\n"
        "time.sleep(3600)\n"
    )
    (tmp_path / "experts.yaml").write_text(
        REGISTRY
        % {
            "base": root / "examples/tiny/bases/large",
            "python": sys.executable,
            "path": tmp_path / "path",
        }
    )
    service = subprocess.Popen(
        [sys.executable, "-m", "composer.cli", "serve"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "COMPOSER_CACHE_DIR": str(root / ".cache" / "composer"),
            "COMPOSER_PORT": str(free_port()),
        },
        stderr=subprocess.PIPE,
    )
    try:
        log, until_s = tmp_path / "slow.log", time.monotonic() + 300
        while "PID" not in (log.read_text() if log.exists() else ""):
            assert service.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.1)
        server = psutil.Process(int(log.read_text().split()[1]))
        service.send_signal(number)
        _, said = service.communicate(timeout=120)
    finally:
        service.kill()
    assert service.returncode == 130
    assert b"stopped before it was ready" in said
    assert b"Traceback" not in said
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE

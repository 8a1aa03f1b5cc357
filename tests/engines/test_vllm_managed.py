"""The `vllm` engine with a server of its own: real processes, a stand-in for vLLM in them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from composer.engines.launch import Restarts
from composer.engines.vllm import VllmEngine
from composer.engines.vllm_launch import VllmSettings
from composer.errors import EngineError, EngineMisconfigured, EngineUnavailable
from composer.types import Placement
from tests.engines.test_vllm import MakeAdapter, call, make_adapter, text_of

__all__ = ["make_adapter"]

ROOT = Path(__file__).parents[2]
SHIM = "from tests.engines.upstream import main\nmain()\n"


def stand_in(folder: Path) -> str:
    """A PYTHONPATH on which `vllm.entrypoints.openai.api_server` is the stand-in."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for level in (package, package.parent, package.parent.parent):
        (level / "__init__.py").touch()
    (package / "api_server.py").write_text(SHIM)
    return os.pathsep.join([str(folder), str(ROOT)])


Make = Callable[..., VllmEngine]


@pytest_asyncio.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[VllmEngine] = []

    def make(placement: Placement | None = None, **args: Any) -> VllmEngine:
        launch = {
            "python": sys.executable,
            "env": {"PYTHONPATH": stand_in(tmp_path / f"path{len(made)}")},
            "args": args,
            "log": tmp_path / f"server{len(made)}.log",
            "start_timeout_s": 60.0,
            "restarts": {"first_s": 0.05},
        }
        settings = VllmSettings(launch=launch, model="weights", max_loras=2, max_cpu_loras=4)
        made.append(VllmEngine("big", settings, placement=placement))
        return made[-1]

    yield make
    for engine in made:
        await engine.close()


def process_of(engine: VllmEngine) -> psutil.Process:
    """Who listens for it."""
    assert engine._server.process is not None
    for found in psutil.net_connections("tcp"):
        if found.status == "LISTEN" and found.laddr.port == engine._server.process.port:
            return psutil.Process(found.pid)
    raise AssertionError("nobody listens")


@pytest.mark.slow
async def test_a_managed_server_from_start_to_end(make: Make, make_adapter: MakeAdapter) -> None:
    engine = make(Placement("gpu0", 1.0))
    red = make_adapter("red")
    await engine.prepare([red])
    assert (await engine.health()).ok
    await asyncio.gather(engine.start(), engine.start())
    assert await text_of(engine, call()) == "base: one two"
    assert await text_of(engine, call(adapter=red)) == "red: one two"
    process = process_of(engine)
    argv = process.cmdline()
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert engine._server.key is not None
    assert engine._server.key not in " ".join(argv)
    assert process.environ()["VLLM_API_KEY"] == engine._server.key
    await engine.stop()
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert (await engine.health()).ok
    with pytest.raises(EngineUnavailable, match="not running"):
        await text_of(engine, call())
    await engine.start()
    assert await text_of(engine, call(adapter=red)) == "red: one two"
    assert process_of(engine).pid != process.pid
    await engine.close()


@pytest.mark.slow
async def test_a_server_killed_under_load_comes_back_with_its_adapters(
    make: Make, make_adapter: MakeAdapter
) -> None:
    engine = make(token_s=0.05)
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.start()
    await engine.prepare([red, blue])
    for _ in range(2):
        calls = [call("w " * 40, a, stream=i % 2 == 0) for i in range(6) for a in (red, blue)]
        running = [asyncio.create_task(text_of(engine, each)) for each in calls]
        await asyncio.sleep(0.3)
        process_of(engine).send_signal(signal.SIGKILL)
        ends = await asyncio.gather(*running, return_exceptions=True)
        assert {type(end) for end in ends} == {EngineUnavailable}
        await engine.start()
        assert await text_of(engine, call(adapter=red)) == "red: one two"
        assert await text_of(engine, call(adapter=blue)) == "blue: one two"
        assert (await engine.health()).ok


@pytest.mark.slow
async def test_a_server_that_does_not_start_says_why(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """What it wrote stands in our log; /health names the file."""
    engine = make(fail="CUDA out of memory")
    with pytest.raises(EngineUnavailable, match=r"ended with status 1 .* see its log, .*0\.log"):
        await engine.start()
    assert "CUDA out of memory" in caplog.text
    health = await engine.health()
    assert health.state == "failed"
    assert "see its log" in str(health.reason)
    assert "CUDA" not in str(health.reason)


async def test_a_program_that_cannot_be_run_refuses_calls_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not wait for it until their bound; it is tried again after a while."""
    python = tmp_path / "python"
    launch = {
        "python": str(python),
        "env": {"PYTHONPATH": stand_in(tmp_path / "path")},
        "log": tmp_path / "server.log",
    }
    engine = VllmEngine("big", VllmSettings.model_validate({"launch": launch, "model": "weights"}))
    await engine.start()
    for again_s in (60.0, 0.0, 0.0):
        monkeypatch.setattr("composer.engines.vllm_server.AGAIN_PROGRAM_S", again_s)
        with pytest.raises(EngineMisconfigured, match=r"correct `launch\.python`"):
            await text_of(engine, call())
    health = await engine.health()
    assert health.state == "failed"
    assert "`launch.python`" in str(health.reason)
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len([line for line in said if "No such file" in line]) == 1
    assert len(said) == 2  # what the system says, and what follows
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("composer.engines.vllm_server.LOOK_S", 0.0)
    with pytest.raises(EngineUnavailable, match="not running"):  # it comes: waited for in the queue
        await text_of(engine, call())
    monkeypatch.undo()
    await engine.start()
    assert await text_of(engine, call()) == "base: one two"
    await engine.close()


async def test_health_names_what_a_process_died_of(make: Make) -> None:
    """Also while calls wait for it, and the service knows no more than that it is gone."""
    engine = make()
    await engine.start()
    process = engine._server.process
    assert process is not None
    process._launch = process._launch.model_copy(update={"restarts": Restarts(first_s=60)})
    process_of(engine).send_signal(signal.SIGKILL)
    async with asyncio.timeout(60):
        while process.alive:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(engine.start())
        while process.failure is None or engine._server._failure is None:
            await asyncio.sleep(0.01)
    health = await engine.health()
    assert health.state == "failed"
    assert "died with status 137" in str(health.reason)
    assert "started again in" in str(health.reason)
    waiting.cancel()
    await engine.close()


async def test_without_max_loras_it_takes_no_adapters(make_adapter: MakeAdapter) -> None:
    engine = VllmEngine("big", VllmSettings(launch={}, model="weights"))
    with pytest.raises(EngineError, match="give the server `max_loras`"):
        await engine.prepare([make_adapter("red")])
    await engine.prepare([])
    await engine.close()

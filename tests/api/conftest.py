"""The edge over a fake world: in-process for most tests, behind a server where sockets matter."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from tests.api.fakes import World, make_world


@pytest.fixture(autouse=True)
def no_files_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping the real watch takes longer than most tests here."""

    async def idle(watcher: object, changed: object, stop: asyncio.Event) -> None:
        await stop.wait()

    monkeypatch.setattr("composer.registry.watch.Watcher.run", idle)


@pytest.fixture(autouse=True)
def no_batches_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An app goes on with the batches that it finds where it runs."""
    monkeypatch.setenv("COMPOSER_FILES_DIR", str(tmp_path / "files"))


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `world`, no sockets. What the edge does not catch is raised in the test."""
    async with InProcess(world) as client:
        yield client


class InProcess(httpx.AsyncClient):
    """An in-process client that starts and closes its world's service."""

    def __init__(self, world: World) -> None:
        self._world = world
        transport = httpx.ASGITransport(create_app(world.service))
        super().__init__(transport=transport, base_url="http://composer")

    async def __aenter__(self) -> InProcess:
        await self._world.service.start()
        await super().__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__()
        await self._world.service.close()


@dataclass
class Live:
    """A world behind a real server on a port of its own."""

    world: World
    url: str


@pytest.fixture
def live(world: World) -> Iterator[Live]:
    with Serving(create_app(world.service)) as url:
        yield Live(world, url)


class Serving:
    """Runs an app in uvicorn in a thread with its own event loop; gives its URL."""

    def __init__(self, app: FastAPI, *, start_timeout_s: float = 60) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._start_timeout_s = start_timeout_s

    def __enter__(self) -> str:
        self._thread.start()
        until = time.monotonic() + self._start_timeout_s
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the server did not start; its log says why")
            time.sleep(0.01)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)
        self._socket.close()
        assert not self._thread.is_alive()

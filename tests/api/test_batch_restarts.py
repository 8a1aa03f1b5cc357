"""Batches over kills, restarts, a full disk and other processes: nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from composer.batch import jobs
from composer.batch.jobs import Batches
from composer.batch.store import BatchStore
from composer.settings import Settings
from tests.api.batches import ENDED, WAIT_S, Running, create, wait
from tests.api.fakes import World, make_world
from tests.batch.helpers import line
from tests.tiny import ROOT


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(settings=Settings(files_dir=tmp_path / "files", max_file_mb=1))


@pytest.fixture
async def running(world: World) -> AsyncIterator[Running]:
    async with Running(world) as running:
        yield running


async def test_a_batch_goes_on_after_a_restart(world: World, tmp_path: Path) -> None:
    world.engine.held, world.engine.free = True, 2
    async with Running(world) as before:
        id_ = await before.create(
            [line(f"{i}", "hi" if i < 5 else "hi there shout") for i in range(20)]
        )
        await before.wait(id_, lambda batch: batch["request_counts"]["completed"] == 5)
    again = make_world(settings=world.service.settings)
    async with Running(again) as after:
        batch = await after.wait(id_, lambda batch: batch["status"] == "completed")
        assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
        assert len(again.engine.calls) == 15


async def test_a_batch_killed_while_it_was_finalized_is_completed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is over meanwhile; and what was written of its output is written again."""

    async def killed(self: Batches, job: jobs._Job, *rest: object) -> None:
        batch = job.batch
        batch.become("finalizing")
        batch.expires_at = 1
        await self._save(batch)
        self._files.make(jobs.file_id(batch.id, "output"), Path.touch, "half", "batch_output")
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "_finish", killed)
        async with Running(world) as before:
            id_ = await before.create([line("a"), line("b")])
            await before.wait(id_, lambda batch: batch["status"] == "finalizing")
            await asyncio.sleep(0.1)
    again = make_world(settings=world.service.settings)
    async with Running(again) as after:
        batch = await after.wait(id_, lambda batch: batch["status"] in ENDED)
        assert batch["status"] == "completed"
        output = await after.client.get(f"/v1/files/{batch['output_file_id']}/content")
        assert len(output.text.splitlines()) == 2
        assert again.engine.calls == []


async def test_what_another_process_leaves_unfinished_is_taken_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.05)
    world.engine.held = True
    async with Running(make_world(settings=world.service.settings)) as after:
        async with Running(world) as before:
            id_ = await before.create([line("a")])
            await before.wait(id_, lambda batch: batch["status"] == "in_progress")
            await after.batches.start()
        await after.wait(id_, lambda batch: batch["status"] == "completed")


@pytest.mark.parametrize("waits", [True, False])
async def test_a_batch_that_another_process_has_ended_stays_as_it_ended(
    world: World, waits: bool
) -> None:
    """Also for one that read it before, and then had no room for it."""
    async with Running(world) as one, Running(make_world(settings=world.service.settings)) as two:
        id_ = await one.create([line("a")])
        ended = await one.wait(id_, lambda batch: batch["status"] in ENDED)
        while one.batches._jobs:
            await asyncio.sleep(0.005)
        stale = await two.batches.get(id_)
        stale.become("in_progress")
        stale.status = "in_progress"
        folder = world.service.settings.files_dir / id_
        if not waits:  # it ends at this moment, its input not yet taken away
            (folder / "input.jsonl").write_text(json.dumps(line("a")) + "\n")
        two.batches._begin(stale)
        while two.batches._jobs:
            await asyncio.sleep(0.005)
        assert (await two.client.get(f"/v1/batches/{id_}")).json() == ended
        assert [path.name for path in folder.iterdir()] == ["batch.json"]


async def test_a_batch_is_cancelled_while_it_is_saved(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = threading.Event()
    real = BatchStore.save

    def slowly(self: BatchStore, batch: Any) -> None:
        if batch.status == "in_progress":
            saving.set()
            time.sleep(0.05)
        real(self, batch)

    running.world.engine.held = True
    monkeypatch.setattr(BatchStore, "save", slowly)
    id_ = await running.create([line("a")])
    await asyncio.to_thread(saving.wait, WAIT_S)
    reply = await running.client.post(f"/v1/batches/{id_}/cancel")
    assert reply.status_code == 200
    await running.wait(id_, lambda batch: batch["status"] == "cancelled")


async def test_a_cancel_that_could_not_be_kept_is_still_one(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.world.engine.held = True
    id_ = await running.create([line("a")])
    await running.wait(id_, lambda batch: batch["status"] == "in_progress")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", full)
        assert (await running.client.post(f"/v1/batches/{id_}/cancel")).status_code == 503
    await running.wait(id_, lambda batch: batch["status"] == "cancelled")


async def test_a_disk_that_is_full_for_a_while(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.05)
    real, full = os.fsync, Counter[str]()

    def fsync(fd: int) -> None:
        if "answers" in os.readlink(f"/proc/self/fd/{fd}") and full["times"] < 3:
            full["times"] += 1
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    id_ = await running.create([line(f"{i}") for i in range(5)])
    batch = await running.wait(id_, lambda batch: batch["status"] in ENDED)
    assert batch["status"] == "completed"
    assert full["times"] == 3


async def test_a_bug_fails_the_batch_and_says_where_to_look(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*given: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Batches, "_answer", broken)
    id_ = await running.create([line("a")])
    batch = await running.wait(id_, lambda batch: batch["status"] in ENDED)
    assert batch["status"] == "failed"
    assert [error["code"] for error in batch["errors"]["data"]] == ["internal_error"]


SERVER = """
import sys
from pathlib import Path
import uvicorn
from api.app import create_app
from composer.registry.watch import Watcher
from composer.settings import Settings
from tests.api.fakes import make_world
from tests.batch.child import TracingEngine, idle

Watcher.run = idle
world = make_world(in_flight=8, settings=Settings(files_dir=Path(sys.argv[1])))
capacity = world.engine.capacity
world.engine = TracingEngine(Path(sys.argv[2]))
world.engine.capacity = capacity
uvicorn.run(create_app(world.service), port=int(sys.argv[3]), log_level="error")
"""


class Served:
    """A service in a process of its own over slow experts, to be started as often as wanted."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.files = folder / "files"
        self.trace = folder / "trace"
        self._command: list[str | Path] = [
            sys.executable,
            "-c",
            SERVER,
            self.files,
            self.trace,
            str(port),
        ]
        url = f"http://127.0.0.1:{port}/v1"
        self.ai = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def create(self, count: int) -> str:
        """A batch, as soon as the service answers."""
        end = time.monotonic() + WAIT_S
        while True:
            try:
                lines = [line(f"{i}", f"question {i} shout") for i in range(count)]
                return create(self.ai, lines).id
            except openai.APIConnectionError:
                assert time.monotonic() < end
                time.sleep(0.05)


async def test_a_batch_that_another_real_process_runs_is_cancelled(tmp_path: Path) -> None:
    served = Served(tmp_path)
    child = served.start()
    try:
        id_ = await asyncio.to_thread(served.create, 4000)
        await asyncio.to_thread(wait, served.ai, id_, completed=50)
        world = make_world(settings=Settings(files_dir=served.files))
        async with Running(world) as here:
            reply = await here.client.post(f"/v1/batches/{id_}/cancel")
            assert (reply.status_code, reply.json()["status"]) == (200, "cancelling")
            batch = await here.wait(id_, lambda batch: batch["status"] in ENDED)
        assert batch["status"] == "cancelled"
        assert 50 <= batch["request_counts"]["completed"] < 4000
        assert world.engine.calls == []
        output = served.ai.files.content(batch["output_file_id"]).text.splitlines()
        errors = served.ai.files.content(batch["error_file_id"]).text.splitlines()
        assert len(output) == batch["request_counts"]["completed"]
        ids = {json.loads(text)["custom_id"] for text in output + errors}
        assert ids == {f"{i}" for i in range(4000)}
        assert len(output + errors) == 4000
    finally:
        served.ai.close()
        child.kill()
        child.wait()


def test_a_service_killed_twice_ends_the_batch(tmp_path: Path) -> None:
    served = Served(tmp_path)
    ai, trace = served.ai, served.trace
    id_, child = "", None

    def completed() -> int:
        try:
            return ai.batches.retrieve(id_).request_counts.completed  # type: ignore[union-attr]
        except openai.APIConnectionError:
            return -1

    try:
        for kill_at in (100, 250, None):
            child = served.start()
            end = time.monotonic() + WAIT_S
            id_ = id_ or served.create(400)
            while completed() < (400 if kill_at is None else kill_at):
                assert time.monotonic() < end
                time.sleep(0.01)
            if kill_at is not None:
                child.send_signal(signal.SIGKILL)
                child.wait()
        batch = wait(ai, id_, *ENDED)
        assert batch.status == "completed"
        assert batch.output_file_id is not None
        output = ai.files.content(batch.output_file_id).text.splitlines()
        ids = [json.loads(text)["custom_id"] for text in output]
        assert ids == [f"{i}" for i in range(400)]
        asked = trace.read_text().splitlines()
        assert len(asked) - 400 <= 2 * (8 + 32)  # what was under way at the kills
    finally:
        ai.close()
        if child is not None:
            child.kill()
            child.wait()

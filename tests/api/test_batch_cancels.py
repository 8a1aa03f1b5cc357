"""Batches cancelled by whichever process is asked, at any moment; nobody ends one twice."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from composer.batch import jobs
from composer.batch.answers import Answers
from composer.batch.jobs import Batches
from composer.batch.lines import Lines
from composer.batch.store import BatchStore
from composer.settings import Settings
from tests.api.batches import ENDED, WAIT_S, Running
from tests.api.fakes import World, make_world, until
from tests.batch.helpers import line


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(settings=Settings(files_dir=tmp_path / "files", max_file_mb=1))


@pytest.fixture
async def running(world: World) -> AsyncIterator[Running]:
    async with Running(world) as running:
        yield running


async def test_a_cancelled_batch_is_still_cancelled_after_a_restart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 60)
    world.engine.held = True
    async with Running(world) as before:
        id_ = await before.create([line("a")])
        await before.wait(id_, lambda batch: batch["status"] == "in_progress")
        before.batches._store.cancel(id_)  # and the process dies
    again = make_world(settings=world.service.settings)
    async with Running(again) as after:
        batch = await after.wait(id_, lambda batch: batch["status"] == "cancelled")
        assert batch["cancelling_at"] is not None
        assert again.engine.calls == []


async def test_a_batch_of_a_living_process_is_left_to_it(world: World) -> None:
    world.engine.held = True
    async with Running(world) as one:
        id_ = await one.create([line("a")])
        await one.wait(id_, lambda batch: batch["status"] == "in_progress")
        other = make_world(settings=world.service.settings)
        async with Running(other) as two:
            async with asyncio.timeout(WAIT_S):
                while two.batches._jobs:
                    await asyncio.sleep(0.005)
            assert (await two.batches.get(id_)).status == "in_progress"
            assert other.engine.calls == []
            world.engine.held = False
            await two.wait(id_, lambda batch: batch["status"] == "completed")


async def test_a_batch_is_cancelled_by_whichever_process_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has is kept; the process that was asked runs nothing of it."""
    monkeypatch.setattr(jobs, "LOOK_S", 0.2)
    world.engine.held, world.engine.free = True, 2
    other = make_world(settings=world.service.settings)
    async with Running(world) as one, Running(other) as two:
        id_ = await one.create([line("a", "hi"), *(line(f"{i}", "hi there") for i in range(5))])
        await one.wait(id_, lambda batch: batch["request_counts"]["completed"] == 1)
        for _ in range(2):  # again, it is the same
            reply = await two.client.post(f"/v1/batches/{id_}/cancel")
            assert (reply.status_code, reply.json()["status"]) == (200, "cancelling")
            assert reply.json()["cancelling_at"] is not None
        listed = (await two.client.get("/v1/batches")).json()["data"]
        assert [batch["status"] for batch in listed] == ["cancelling"]
        await one.wait(id_, lambda batch: batch["status"] == "cancelled")
        batch = await two.wait(id_, lambda batch: batch["status"] == "cancelled")
        assert batch["request_counts"] == {"total": 6, "completed": 1, "failed": 0}
        assert batch["cancelling_at"] <= batch["cancelled_at"]
        output = await two.client.get(f"/v1/files/{batch['output_file_id']}/content")
        assert [json.loads(text)["custom_id"] for text in output.text.splitlines()] == ["a"]
        errors = await two.client.get(f"/v1/files/{batch['error_file_id']}/content")
        assert len(errors.text.splitlines()) == 5
        assert (world.engine.running, other.engine.calls) == (0, [])
        reply = await two.client.post(f"/v1/batches/{id_}/cancel")
        assert reply.status_code == 409
        while one.batches._jobs:
            await asyncio.sleep(0.005)
    folder = world.service.settings.files_dir / id_
    assert [path.name for path in folder.iterdir()] == ["batch.json"]


async def test_a_cancel_by_another_process_is_done_or_refused_at_any_moment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never taken and then forgotten, never refused and then done."""
    monkeypatch.setattr(jobs, "LOOK_S", 0.001)
    rng = random.Random(3)
    other = make_world(settings=world.service.settings)
    async with Running(world) as one, Running(other) as two:
        for _ in range(30):
            id_ = await one.create([line(f"{i}", "hi") for i in range(8)])
            await asyncio.sleep(rng.uniform(0, 0.15))
            reply = await two.client.post(f"/v1/batches/{id_}/cancel")
            batch = await two.wait(id_, lambda batch: batch["status"] in ENDED)
            want = {200: "cancelled", 409: "completed"}[reply.status_code]
            assert batch["status"] == want
            total = 0
            for kind in ("output", "error"):
                if (file := batch[f"{kind}_file_id"]) is not None:
                    lines = (await two.client.get(f"/v1/files/{file}/content")).text.splitlines()
                    total += len(lines)
            assert total == 8


async def test_an_answer_that_is_on_its_way_to_the_disk_is_kept(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel comes between an answer and the moment at which it is safe."""
    committing, go_on = threading.Event(), threading.Event()
    real = Answers._commit

    def slowly(self: Answers, puts: Any) -> None:
        committing.set()
        assert go_on.wait(WAIT_S)
        real(self, puts)

    monkeypatch.setattr(Answers, "_commit", slowly)
    id_ = await running.create([line("a")])
    await asyncio.to_thread(committing.wait, WAIT_S)
    assert (await running.client.post(f"/v1/batches/{id_}/cancel")).status_code == 200
    await asyncio.sleep(0.05)
    go_on.set()
    batch = await running.wait(id_, lambda batch: batch["status"] in ENDED)
    assert batch["status"] == "cancelled"
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert batch["error_file_id"] is None
    output = await running.client.get(f"/v1/files/{batch['output_file_id']}/content")
    assert len(output.text.splitlines()) == 1


async def test_nobody_cancels_what_is_being_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, go_on = threading.Event(), threading.Event()
    real = Batches._write

    def slowly(self: Batches, *given: Any) -> None:
        ending.set()
        assert go_on.wait(WAIT_S)
        real(self, *given)

    monkeypatch.setattr(Batches, "_write", slowly)
    monkeypatch.setattr(jobs, "WINDOW_S", 0)  # what expires is not `finalizing` meanwhile
    other = make_world(settings=world.service.settings)
    async with Running(world) as one, Running(other) as two:
        id_ = await one.create([line("a")])
        await asyncio.to_thread(ending.wait, WAIT_S)
        for running in (one, two):
            reply = await running.client.post(f"/v1/batches/{id_}/cancel")
            assert reply.status_code == 409
            assert "nothing to cancel" in reply.json()["error"]["message"]
        go_on.set()
        await two.wait(id_, lambda batch: batch["status"] == "expired")


@pytest.mark.parametrize("ending", ["completed", "cancelled", "expired"])
async def test_a_batch_is_seen_to_have_ended_when_that_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Before, a crash would undo it, and a cancel would be taken."""
    keeping, go_on = threading.Event(), threading.Event()
    real = BatchStore.save

    def slowly(self: BatchStore, batch: Any) -> None:
        if batch.status in ENDED:
            keeping.set()
            assert go_on.wait(WAIT_S)
        real(self, batch)

    monkeypatch.setattr(BatchStore, "save", slowly)
    if ending == "expired":
        monkeypatch.setattr(jobs, "WINDOW_S", 0)
    world.engine.held = ending == "cancelled"
    async with Running(world) as running:
        id_ = await running.create([line("a")])
        if ending == "cancelled":
            await running.wait(id_, lambda batch: batch["status"] == "in_progress")
            assert (await running.client.post(f"/v1/batches/{id_}/cancel")).status_code == 200
        assert await asyncio.to_thread(keeping.wait, WAIT_S)
        try:
            batch = (await running.client.get(f"/v1/batches/{id_}")).json()
            assert batch["status"] not in ENDED
            assert batch[f"{ending}_at"] is None
        finally:
            go_on.set()
        batch = await running.wait(id_, lambda batch: batch["status"] in ENDED)
        assert batch["status"] == ending
        assert batch[f"{ending}_at"] is not None
        assert (await running.client.post(f"/v1/batches/{id_}/cancel")).status_code == 409


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_cancelled_batch_does_not_wait_for_room(
    world: World, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """Whichever process is asked; and the places of the others stay theirs."""
    monkeypatch.setattr(jobs, "AT_ONCE", 1)
    monkeypatch.setattr(jobs, "LOOK_S", 0.01)
    world.engine.held = True
    other = make_world(settings=world.service.settings)
    async with Running(world) as one, Running(other) as two:
        first = await one.create([line("a")])
        await one.wait(first, lambda batch: batch["status"] == "in_progress")
        waiting, next_ = [await one.create([line("a"), line("b")]) for _ in range(2)]
        asked = two if elsewhere else one
        assert (await asked.client.post(f"/v1/batches/{waiting}/cancel")).status_code == 200
        batch = await one.wait(waiting, lambda batch: batch["status"] in ENDED)
        assert batch["status"] == "cancelled"
        errors = await one.client.get(f"/v1/files/{batch['error_file_id']}/content")
        assert len(errors.text.splitlines()) == 2
        listed = (await one.client.get("/v1/batches")).json()["data"]
        statuses = {batch["id"]: batch["status"] for batch in listed}
        assert (statuses[first], statuses[next_]) == ("in_progress", "validating")
        assert len(world.engine.calls) == 1
        world.engine.held = False
        for id_ in (first, next_):
            await one.wait(id_, lambda batch: batch["status"] == "completed")
        while one.batches._jobs:
            await asyncio.sleep(0.005)
        assert one.batches._room._value == 1


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_cancel_while_a_wrong_input_is_read_is_done(
    world: World, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """What is wrong with the input is told all the same."""
    reading, go_on = threading.Event(), threading.Event()

    def slowly(*given: Any, **named: Any) -> Lines:
        reading.set()
        assert go_on.wait(WAIT_S)
        return Lines(*given, **named)

    monkeypatch.setattr(jobs, "Lines", slowly)
    slowly.close = Lines.close  # type: ignore[attr-defined]
    other = make_world(settings=world.service.settings)
    async with Running(world) as one, Running(other) as two:
        id_ = await one.create([line("a", method="GET")])
        assert await asyncio.to_thread(reading.wait, WAIT_S)
        try:
            asked = two if elsewhere else one
            reply = await asked.client.post(f"/v1/batches/{id_}/cancel")
            assert (reply.status_code, reply.json()["status"]) == (200, "cancelling")
        finally:
            go_on.set()
        batch = await one.wait(id_, lambda batch: batch["status"] in ENDED)
        assert batch["status"] == "cancelled"
        assert batch["cancelling_at"] <= batch["cancelled_at"]
        assert batch["failed_at"] is None
        assert [error["code"] for error in batch["errors"]["data"]] == ["invalid_method"]
        while one.batches._jobs:
            await asyncio.sleep(0.005)
    folder = world.service.settings.files_dir / id_
    assert [path.name for path in folder.iterdir()] == ["batch.json"]


async def test_nobody_cancels_what_is_being_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, go_on = threading.Event(), threading.Event()
    real = BatchStore.save

    def slowly(self: BatchStore, batch: Any) -> None:
        if batch.status == "failed":
            failing.set()
            assert go_on.wait(WAIT_S)
        real(self, batch)

    monkeypatch.setattr(BatchStore, "save", slowly)
    other = make_world(settings=world.service.settings)
    async with Running(world) as one, Running(other) as two:
        id_ = await one.create([line("a", method="GET")])
        assert await asyncio.to_thread(failing.wait, WAIT_S)
        try:
            for running in (one, two):
                reply = await running.client.post(f"/v1/batches/{id_}/cancel")
                assert reply.status_code == 409
        finally:
            go_on.set()
        batch = await one.wait(id_, lambda batch: batch["status"] in ENDED)
        assert (batch["status"], batch["cancelling_at"]) == ("failed", None)


async def test_a_batch_whose_folder_is_taken_away_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By who runs it, and by who would have looked for it again: each says so once."""
    monkeypatch.setattr(jobs, "RETRY_S", 0.05)
    world.engine.held = True
    looked, gone = asyncio.Event(), asyncio.Event()
    real = Batches._look_again

    async def later(self: Batches, id: str) -> None:
        looked.set()
        await gone.wait()
        await real(self, id)

    monkeypatch.setattr(Batches, "_look_again", later)
    other = make_world(settings=world.service.settings)
    async with Running(world) as one, Running(other) as two:
        id_ = await one.create([line("a")])
        await until(lambda: world.engine.calls)  # all before is on the disk
        await two.batches.start()
        await looked.wait()
        shutil.rmtree(world.service.settings.files_dir / id_)
        gone.set()
        world.engine.held = False
        async with asyncio.timeout(WAIT_S):
            while one.batches._tasks or two.batches._tasks:
                await asyncio.sleep(0.005)
        gc.collect()  # which tells of exceptions that nobody took
        said = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
        assert said == [jobs.GONE % id_] * 2
        assert (await one.client.get(f"/v1/batches/{id_}")).status_code == 404

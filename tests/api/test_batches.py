"""Files and batches by the unmodified `openai` client, and over kills and restarts."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from api.app import create_app
from composer.batch import jobs
from composer.batch.answers import Answers
from composer.batch.jobs import Batches
from composer.batch.lines import Lines
from composer.batch.store import BatchStore
from composer.settings import Settings
from tests.api.conftest import Live
from tests.api.fakes import World, make_world, until
from tests.batch.helpers import content, line
from tests.tiny import ROOT


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(settings=Settings(files_dir=tmp_path / "files", max_file_mb=1))


@pytest.fixture
def ai(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


def jsonl(lines: list[Any]) -> BytesIO:
    file = BytesIO(b"".join(json.dumps(one).encode() + b"\n" for one in lines))
    file.name = "in.jsonl"
    return file


def create(ai: openai.OpenAI, lines: list[Any], **more: Any) -> Batch:
    uploaded = ai.files.create(file=jsonl(lines), purpose="batch")
    return ai.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        **more,
    )


WAIT_S = 120
"""Only ends a test that has failed."""


def wait(ai: openai.OpenAI, id: str, *statuses: str, completed: int = 0) -> Batch:
    """Until it has one of the statuses, or any where none is given, and so many answers."""
    end = time.monotonic() + WAIT_S
    while True:
        batch = ai.batches.retrieve(id)
        assert batch.request_counts is not None
        if batch.request_counts.completed >= completed and batch.status in (statuses or ANY):
            return batch
        assert time.monotonic() < end, batch
        time.sleep(0.01)


ENDED = ("completed", "failed", "cancelled", "expired")
ANY = (*ENDED, "validating", "in_progress", "finalizing", "cancelling")


# --- files ---------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(ai: openai.OpenAI) -> None:
    data = os.urandom(300_000)
    made = ai.files.create(file=("näme.jsonl", data), purpose="batch")
    assert (made.object, made.bytes, made.purpose) == ("file", 300_000, "batch")
    assert made.filename == "näme.jsonl"
    assert abs(made.created_at - time.time()) < 10
    assert ai.files.retrieve(made.id) == made
    assert ai.files.content(made.id).read() == data
    assert ai.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        ai.files.retrieve(made.id)


def test_files_are_listed_the_newest_first_in_pages(ai: openai.OpenAI) -> None:
    ids = [ai.files.create(file=(f"{i}", b"x"), purpose="batch").id for i in range(5)]
    assert [file.id for file in ai.files.list()] == ids[::-1]
    assert [file.id for file in ai.files.list(order="asc", limit=2)] == ids  # page by page
    first = ai.files.list(limit=2)
    assert [file.id for file in first.data] == ids[:2:-1]
    assert first.has_more
    assert [file.id for file in ai.files.list(purpose="batch_output")] == []


@pytest.mark.parametrize(
    ("id_", "status"),
    [("file-nothing", 404), ("file-" + "0" * 32, 404), ("..", 404), ("file-..%2F..%2Fx", 404)],
)
def test_ids_that_are_none(live: Live, id_: str, status: int) -> None:
    for end in ("", "/content"):
        assert httpx.get(f"{live.url}/v1/files/{id_}{end}").status_code == status
    assert httpx.get(f"{live.url}/v1/batches/{id_}").status_code == status


def test_uploads_that_are_wrong(live: Live) -> None:
    def post(**what: Any) -> tuple[int, str]:
        reply = httpx.post(f"{live.url}/v1/files", **what)
        return reply.status_code, reply.json()["error"]["message"]

    file = {"file": ("a", b"x")}
    assert post(json={})[1] == "a file is sent as multipart/form-data"
    assert post(files=file)[1] == "the only purpose here is `batch`"
    assert post(files=file, data={"purpose": "vision"})[0] == 400
    assert post(files={"purpose": (None, "batch")})[1] == "the form needs a file"
    assert post(files={**file, "purpose": (None, "batch"), "x": (None, "1")})[0] == 400
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert post(content=b"--y\r\n", headers=broken)[0] == 400
    assert list((Path(live.world.service.settings.files_dir)).iterdir()) == []


def test_the_size_limit_of_uploads_is_their_own(live: Live, ai: openai.OpenAI) -> None:
    assert ai.files.create(file=("a", b"x" * 2**20), purpose="batch").bytes == 2**20
    with pytest.raises(openai.APIStatusError, match="exceeds") as caught:
        ai.files.create(file=("a", b"x" * (2**20 + 2**17)), purpose="batch")
    assert caught.value.status_code == 413

    def endless() -> Iterator[bytes]:  # declares no length
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(20):
            yield b"x" * 2**17

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert httpx.post(f"{live.url}/v1/files", content=endless(), headers=headers).status_code == 413


# --- batches -------------------------------------------------------------------------------


def test_a_batch_from_upload_to_result(ai: openai.OpenAI, world: World) -> None:
    made = create(ai, [line(f"id-{i}", f"hello {i} shout") for i in range(30)], metadata={"k": "v"})
    assert (made.object, made.status, made.completion_window) == ("batch", "validating", "24h")
    assert made.expires_at == made.created_at + 24 * 3600
    assert made.metadata == {"k": "v"}
    batch = wait(ai, made.id, *ENDED)
    assert batch.status == "completed"
    assert batch.errors is None
    assert batch.error_file_id is None
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 30, "completed": 30, "failed": 0}
    assert batch.in_progress_at
    assert batch.finalizing_at
    assert batch.completed_at
    assert batch.output_file_id is not None
    output = ai.files.content(batch.output_file_id).text.splitlines()
    answered = {one["custom_id"]: one for one in map(json.loads, output)}
    assert len(output) == len(answered) == 30
    assert content(answered["id-7"]) == "SHOUT: HELLO 7 SHOUT"
    assert ai.files.retrieve(batch.output_file_id).purpose == "batch_output"
    # The very body that the route gives.
    plain = ai.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "hello 7 shout"}]
    ).to_dict()
    body = answered["id-7"]["response"]["body"]
    assert set(body) == set(plain)
    assert body["choices"] == plain["choices"]
    assert len(world.engine.calls) == 31
    left = {path.name for path in (world.service.settings.files_dir / batch.id).iterdir()}
    assert left == {"batch.json"}


def test_failed_lines_are_in_the_error_file(ai: openai.OpenAI) -> None:
    batch = create(ai, [line("good"), line("bad", body={"model": "nobody"})])
    batch = wait(ai, batch.id, *ENDED)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 1, "failed": 1}
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    [good] = map(json.loads, ai.files.content(batch.output_file_id).text.splitlines())
    [bad] = map(json.loads, ai.files.content(batch.error_file_id).text.splitlines())
    assert good["custom_id"] == "good"
    assert bad["response"]["status_code"] == 404
    assert bad["response"]["body"]["error"]["code"] == "model_not_found"


def test_an_input_that_is_wrong_fails_with_its_lines(ai: openai.OpenAI, world: World) -> None:
    lines = [line("a"), line("b", method="GET"), line("a"), line("c", url="/v1/completions")]
    batch = wait(ai, create(ai, lines).id, *ENDED)
    assert batch.status == "failed"
    assert batch.failed_at
    assert batch.errors is not None
    assert batch.errors.data is not None
    found = [(error.line, error.code) for error in batch.errors.data]
    assert found == [(2, "invalid_method"), (3, "duplicate_custom_id"), (4, "invalid_url")]
    assert batch.output_file_id is None
    assert world.engine.calls == []


def test_a_cancelled_batch_keeps_what_it_has(ai: openai.OpenAI, world: World) -> None:
    world.engine.held, world.engine.free = True, 2
    batch = create(ai, [line("a", "hi"), *(line(f"{i}", "hi there shout") for i in range(9))])
    wait(ai, batch.id, completed=1)  # one answer is short enough to end
    assert ai.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = wait(ai, batch.id, *ENDED)
    assert batch.status == "cancelled"
    assert batch.cancelling_at
    assert batch.cancelled_at
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    errors = list(map(json.loads, ai.files.content(batch.error_file_id).text.splitlines()))
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    assert {one["response"] for one in errors} == {None}
    assert len(errors) == 9
    assert world.engine.running == 0
    with pytest.raises(openai.ConflictError, match="nothing to cancel"):
        ai.batches.cancel(batch.id)


def test_a_batch_that_runs_out_of_time(
    ai: openai.OpenAI, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WINDOW_S", 1)
    world.engine.held = True
    batch = wait(ai, create(ai, [line("a"), line("b")]).id, *ENDED)
    assert batch.status == "expired"
    assert batch.expired_at
    assert batch.output_file_id is None
    assert batch.error_file_id is not None
    errors = list(map(json.loads, ai.files.content(batch.error_file_id).text.splitlines()))
    assert [one["error"]["code"] for one in errors] == ["batch_expired"] * 2


def test_batches_are_listed_the_newest_first_in_pages(ai: openai.OpenAI) -> None:
    ids = [create(ai, [line("a")]).id for _ in range(5)]
    assert [batch.id for batch in ai.batches.list(limit=2)] == ids[::-1]
    page = ai.batches.list(limit=2, after=ids[3])
    assert [batch.id for batch in page.data] == [ids[2], ids[1]]
    with pytest.raises(openai.NotFoundError):
        ai.batches.list(after="batch_nothing")


def test_more_batches_than_run_at_once_all_end(ai: openai.OpenAI) -> None:
    ids = [create(ai, [line("a")]).id for _ in range(jobs.AT_ONCE + 3)]
    assert {wait(ai, id_, *ENDED).status for id_ in ids} == {"completed"}


def test_bodies_that_are_wrong(live: Live, ai: openai.OpenAI) -> None:
    file = ai.files.create(file=jsonl([line("a")]), purpose="batch").id
    good = {
        "input_file_id": file,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    for wrong, status, param in (
        ({"input_file_id": "file-no"}, 404, "file_id"),
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"metadata": {"k": 1}}, 400, "metadata.k"),
        ({"else": 1}, 400, "else"),
    ):
        reply = httpx.post(f"{live.url}/v1/batches", json=good | wrong)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    done = wait(ai, ai.batches.create(**good).id, *ENDED)  # type: ignore[arg-type]
    reply = httpx.post(f"{live.url}/v1/batches", json=good | {"input_file_id": done.output_file_id})
    assert reply.status_code == 409


def test_the_input_may_be_deleted_while_it_is_answered(ai: openai.OpenAI, world: World) -> None:
    world.engine.held = True
    batch = create(ai, [line("a"), line("b")])
    ai.files.delete(batch.input_file_id)
    world.engine.held = False
    assert wait(ai, batch.id, *ENDED).status == "completed"


# --- restarts ------------------------------------------------------------------------------


class Running:
    """A service with its batches, without sockets."""

    def __init__(self, world: World) -> None:
        self.world = world
        app = create_app(world.service)
        self.batches: Batches = app.state.batches
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://composer"
        )

    async def __aenter__(self) -> Running:
        await self.world.service.start()
        await self.batches.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.batches.close()
        await self.world.service.close()
        await self.client.aclose()

    async def create(self, lines: list[Any]) -> str:
        files = {"file": ("in.jsonl", jsonl(lines).getvalue())}
        file = await self.client.post("/v1/files", files=files, data={"purpose": "batch"})
        body = {
            "input_file_id": file.json()["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        id_: str = (await self.client.post("/v1/batches", json=body)).json()["id"]
        return id_

    async def wait(self, id_: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                body: dict[str, Any] = (await self.client.get(f"/v1/batches/{id_}")).json()
                if true(body):
                    return body
                await asyncio.sleep(0.005)


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

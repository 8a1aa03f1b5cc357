"""Files and batches by the unmodified `openai` client."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from composer.batch import jobs
from composer.settings import Settings
from tests.api.batches import ENDED, create, jsonl, wait
from tests.api.conftest import Live
from tests.api.fakes import World, make_world
from tests.batch.helpers import content, line


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(settings=Settings(files_dir=tmp_path / "files", max_file_mb=1))


@pytest.fixture
def ai(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


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

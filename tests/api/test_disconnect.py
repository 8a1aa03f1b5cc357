"""A client that leaves frees everything, wherever its request stands. Through real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest

from api.app import create_app
from tests.api.conftest import Live
from tests.api.fakes import World, until

HELLO = {"messages": [{"role": "user", "content": "hello shout how are you"}]}


def leave(live: Live, body: dict[str, Any]) -> socket.socket:
    """Sends a request by hand, so that leaving is closing the socket and nothing else."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: composer\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


async def assert_settled(world: World, status: str = "cancelled") -> None:
    await until(lambda: world.recorder.records)
    await until(lambda: world.service.generations.holds == 0)
    assert world.engine.running == 0
    assert [record.status for record in world.recorder.records] == [status]
    assert world.service.scheduler.stats()["box"]["running"] == 0


@pytest.mark.parametrize("model", ["auto", "panel"])
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token_cancels(live: Live, stream: bool, model: str) -> None:
    live.world.engine.held = True
    connection = leave(live, {**HELLO, "stream": stream, "model": model})
    calls = 2 if model == "panel" else 1
    await until(lambda: live.world.engine.running == calls)
    assert live.world.service.generations.holds == 1
    connection.close()
    await assert_settled(live.world)
    assert len(live.world.engine.cancelled) == calls


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_in_mid_answer_cancels(live: Live, stream: bool) -> None:
    live.world.engine.held, live.world.engine.free = True, 2
    connection = leave(live, {**HELLO, "stream": stream})
    await until(lambda: live.world.engine.running == 1)
    if stream:
        received = b""
        while b"HELLO" not in received:
            received += await asyncio.to_thread(connection.recv, 4096)
    connection.close()
    await assert_settled(live.world)
    assert len(live.world.engine.cancelled) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_the_queue_frees_the_place(live: Live, stream: bool) -> None:
    world = live.world
    world.limit(in_flight=1, queue=1)
    world.engine.held = True
    first = leave(live, HELLO)
    await until(lambda: world.engine.running == 1)
    second = leave(live, {**HELLO, "stream": stream})
    await until(lambda: world.service.scheduler.stats()["box"]["waiting"] == 1)
    second.close()
    await until(lambda: world.service.scheduler.stats()["box"]["waiting"] == 0)
    await until(lambda: world.recorder.records)
    assert world.recorder.records[0].status == "cancelled"
    assert len(world.engine.calls) == 1
    world.engine.held = False
    assert (await asyncio.to_thread(first.recv, 4096)).startswith(b"HTTP/1.1 200")
    first.close()
    await until(lambda: world.service.generations.holds == 0)
    assert [record.status for record in world.recorder.records] == ["cancelled", "ok"]


async def test_a_reader_that_stops_reading_and_leaves_is_noticed(live: Live) -> None:
    """The server is blocked in sending, not in waiting for the engine."""
    body = {**HELLO, "stream": True, "n": 8}
    body["messages"] = [{"role": "user", "content": "shout " + "a" * 250}]
    live.world.engine.held, live.world.engine.free = True, 1
    connection = leave(live, body)
    await until(lambda: live.world.engine.running == 1)
    connection.shutdown(socket.SHUT_RD)
    live.world.engine.held = False
    connection.close()
    await until(lambda: live.world.recorder.records)
    await until(lambda: live.world.service.generations.holds == 0)
    assert live.world.engine.running == 0


async def test_many_that_leave_at_random_leave_nothing_behind(live: Live) -> None:
    world = live.world
    world.limit(in_flight=4, queue=100)

    async def one(i: int) -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=0.001 * (i % 40 + 1)) as client:
            body = {**HELLO, "stream": i % 2 == 0, "model": "panel" if i % 3 else "auto"}
            try:
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    async for _ in response.aiter_bytes():
                        pass
            except httpx.TimeoutException:
                pass

    await asyncio.gather(*(one(i) for i in range(60)))
    await until(lambda: world.service.generations.holds == 0)
    assert world.engine.running == 0
    assert world.service.scheduler.stats()["box"]["running"] == 0
    assert world.service.scheduler.stats()["box"]["waiting"] == 0
    ids = [record.id for record in world.recorder.records]
    assert len(ids) == len(set(ids))
    assert {record.status for record in world.recorder.records} <= {"ok", "cancelled"}


async def test_a_response_never_sent_is_closed(world: World) -> None:
    """A server that fails at the first byte must not keep the generation."""
    await world.service.start()
    app = create_app(world.service)

    async def broken(message: Any) -> None:
        raise OSError("the pipe is broken")

    content = json.dumps({**HELLO, "stream": True}).encode()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "asgi": {"version": "3.0"},
    }
    with pytest.raises(OSError, match="pipe"):
        await app(scope, receive, broken)
    assert world.service.generations.holds == 0
    assert world.engine.running == 0
    assert [record.status for record in world.recorder.records] == ["cancelled"]
    await world.service.close()

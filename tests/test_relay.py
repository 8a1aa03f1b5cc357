"""A service in front of another one: the `openai` engine against this project's own endpoint.

Both ends hold to OpenAI's shape, so each is the other's judge; the events of the one behind are
passed on as they come.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from api.app import create_app
from composer.service import Service
from composer.types import Usage
from tests.api.conftest import Serving
from tests.api.fakes import RelayEngine, World, make_remote
from tests.api.test_chat import events
from tests.api.test_remote import CALLS, MADE, TOOLS
from tests.tiny import serving


@pytest.fixture
def behind() -> World:
    return make_remote()


@pytest.fixture
def url(behind: World) -> Iterator[str]:
    with Serving(create_app(behind.service)) as url:
        yield f"{url}/v1"


@pytest.fixture
async def front(url: str, tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    single = {"router": {"name": "neighbours"}, "strategy": {"name": "single"}}
    config = {
        "version": 1,
        "servers": {"far": {"engine": "openai", "url": url, "model": "caller"}},
        "experts": {
            "distant": {
                "server": "far",
                "context_window": 4096,
                "abilities": ["tools", "json", "logprobs"],
            }
        },
        "policies": {"auto": single},
    }
    async with serving(tmp_path, yaml.safe_dump(config)) as (client, service):
        yield client, service


HELLO = [{"role": "user", "content": "hello"}]
SALT = {"presence_penalty": 0.5, "logit_bias": {"1": -1}, "reasoning_effort": "low"}


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def engine(world: World) -> RelayEngine:
    assert isinstance(world.engine, RelayEngine)
    return world.engine


async def test_whole(front: tuple[httpx.AsyncClient, Service], behind: World) -> None:
    client, _ = front
    answer = (await post(client, max_tokens=9, temperature=0, **SALT)).json()
    assert answer["choices"][0]["message"]["content"] == "one two"
    assert answer["usage"]["total_tokens"] == 9
    assert answer["model"] == "auto"
    assert answer["composer"]["expert"] == "distant"
    [call] = behind.engine.calls
    assert call.extra == SALT
    assert (call.sampling.max_tokens, call.sampling.temperature) == (9, 0)


@pytest.mark.parametrize("n", [1, 3])
async def test_streamed(n: int, front: tuple[httpx.AsyncClient, Service], behind: World) -> None:
    client, _ = front
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await post(client, n=n, **options)
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    for index in range(n):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == "one two"
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{response.headers['x-request-id']}"}
    assert {chunk["model"] for chunk in chunks} == {"auto"}
    assert chunks[-1]["composer"]["expert"] == "distant"
    assert "caller" not in response.text  # who answered behind is not told in front
    assert usage["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2 * n,
        "total_tokens": 7 + 2 * n,
    }
    assert behind.engine.calls[0].stream


async def test_tool_calls_there_and_back(
    front: tuple[httpx.AsyncClient, Service], behind: World
) -> None:
    client, _ = front
    engine(behind).deltas, engine(behind).reason = CALLS[1:], "tool_calls"
    message = (await post(client, tools=TOOLS)).json()["choices"][0]["message"]
    assert message["tool_calls"] == MADE
    assert message["content"] is None
    result = {"role": "tool", "tool_call_id": "c0", "content": "42"}
    streamed = await post(client, messages=[*HELLO, message, result], tools=TOOLS, stream=True)
    *chunks, _ = events(streamed.text)
    parts = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls") or ()]
    arguments = "".join(part["function"]["arguments"] for part in parts if part["index"] == 0)
    assert json.loads(arguments) == {"a": 1}
    assert behind.engine.calls[1].messages[1]["tool_calls"] == MADE


async def test_a_completion(front: tuple[httpx.AsyncClient, Service]) -> None:
    client, _ = front
    body = {"prompt": "hello", "stream": True}
    *chunks, _ = events((await client.post("/v1/completions", json=body)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two"


async def test_the_record_knows_the_usage_of_events_nobody_read(
    front: tuple[httpx.AsyncClient, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = front
    records: list[Any] = []
    monkeypatch.setattr(service.recorder, "put", records.append)
    await post(client, stream=True)
    assert [record.usage for record in records] == [Usage(7, 2)]
    assert [record.status for record in records] == ["ok"]


async def test_what_fails_behind_is_told_in_front(
    front: tuple[httpx.AsyncClient, Service], behind: World
) -> None:
    client, _ = front
    engine(behind).fail_at = 1
    *_, last = events((await post(client, stream=True)).text)
    assert last["error"]["type"] == "server_error"
    engine(behind).fail_at = 0
    refused = await post(client)
    assert refused.status_code in (502, 503)
    assert refused.json()["error"]["type"] == "server_error"

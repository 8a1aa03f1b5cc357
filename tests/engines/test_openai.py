"""The `openai` engine against a server on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
import pytest
import pytest_asyncio
from pydantic import ValidationError

from composer.engines.base import Capacity
from composer.engines.http import Timeouts
from composer.engines.openai import OpenAIEngine, OpenAISettings
from composer.errors import (
    ContextTooLong,
    EngineError,
    EngineMisconfigured,
    EngineUnavailable,
    Overloaded,
    RequestError,
)
from composer.types import Adapter, Call, Chunk, Forward, Placement, Sampling, Usage
from tests.engines.upstream import FakeVllm, Serving, serve

KEY = "a-key"


@pytest_asyncio.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeVllm]:
    monkeypatch.setenv("TEST_KEY", KEY)
    async with serve(FakeVllm(api_key=KEY, served_name="m")) as fake:
        yield fake


@pytest_asyncio.fixture
async def engine(fake: FakeVllm) -> AsyncIterator[OpenAIEngine]:
    engine = engine_at(fake.url)
    await engine.start()
    yield engine
    await engine.close()


def engine_at(url: str, **settings: Any) -> OpenAIEngine:
    given = {"url": url, "model": "m", "api_key_env": "TEST_KEY"} | settings
    return OpenAIEngine("s", OpenAISettings(**given))


def call(text: str = "one two three", **changes: Any) -> Call:
    plain = Call(
        id="chatcmpl-7/0",
        expert="e",
        server="s",
        adapter=None,
        messages=({"role": "user", "content": text},),
        prompt=None,
        sampling=Sampling(),
        context_window=512,
    )
    return dataclasses.replace(plain, **changes)


async def chunks_of(engine: OpenAIEngine, call: Call) -> list[Chunk]:
    async with aclosing(engine.run(call)) as chunks:
        return [chunk async for chunk in chunks]


async def test_a_whole_answer_is_one_request(engine: OpenAIEngine, fake: FakeVllm) -> None:
    (chunk,) = await chunks_of(engine, call())
    assert chunk == Chunk(text="base: one two three", finish_reason="stop", usage=Usage(6, 4))
    (seen,) = fake.requests
    assert seen.path == "/v1/chat/completions"
    assert "stream" not in seen.body
    assert seen.headers["x-request-id"] == "chatcmpl-7/0"


async def test_a_stream_comes_piece_by_piece(engine: OpenAIEngine, fake: FakeVllm) -> None:
    chunks = await chunks_of(engine, call(stream=True))
    assert [c.text for c in chunks] == ["", "base:", " one", " two", " three", ""]
    assert chunks[-2].finish_reason == "stop"
    assert chunks[-1].usage == Usage(6, 4)
    assert [c.usage for c in chunks[:-1]] == [None] * 5
    assert fake.requests[0].body["stream_options"] == {"include_usage": True}


async def test_a_prompt_goes_to_completions(engine: OpenAIEngine, fake: FakeVllm) -> None:
    plain = call(messages=(), prompt="one two")
    for stream in (False, True):
        chunks = await chunks_of(engine, dataclasses.replace(plain, stream=stream))
        assert "".join(c.text for c in chunks) == "base: one two"
        assert chunks[-1].usage == Usage(2, 3)
    assert {seen.path for seen in fake.requests} == {"/v1/completions"}


async def test_handed_on_bytes_say_what_decoded_ones_do(
    engine: OpenAIEngine, fake: FakeVllm
) -> None:
    text = '"model":"m" "id":"chatcmpl-rid" é😀'
    forward = Forward(id="chatcmpl-rid", model="auto")
    handed = await chunks_of(engine, call(text, stream=True, forward=forward))
    assert fake.requests[0].headers["x-request-id"] == "rid"
    events = [orjson.loads(c.raw[6:]) for c in handed[:-1] if c.raw is not None]
    assert len(events) == len(handed) - 1
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == f"base: {text}"
    assert {(e["id"], e["model"]) for e in events} == {("chatcmpl-rid", "auto")}
    assert handed[-1] == Chunk(usage=Usage(3 + len(text.split()), 1 + len(text.split())))


async def test_several_choices_interleave(engine: OpenAIEngine) -> None:
    sampling = Sampling(n=3, temperature=1.0)
    for changes in ({}, {"stream": True}, {"stream": True, "forward": Forward("i", "m")}):
        chunks = await chunks_of(engine, call(sampling=sampling, **changes))
        ends = [c.index for c in chunks if c.finish_reason is not None]
        assert sorted(ends) == [0, 1, 2]
        assert chunks[-1].usage == Usage(6, 12)
        if not changes.get("forward"):
            texts = ["".join(c.text for c in chunks if c.index == i) for i in range(3)]
            assert texts == ["base: one two three"] * 3


async def test_logprobs_of_both_endpoints_streamed_or_not(engine: OpenAIEngine) -> None:
    sampling = Sampling(logprobs=2, max_tokens=3)
    calls = [call(sampling=sampling), call(sampling=sampling, messages=(), prompt="one two three")]
    seen = []
    for plain in calls:
        for stream in (False, True):
            chunks = await chunks_of(engine, dataclasses.replace(plain, stream=stream))
            seen.append([entry for chunk in chunks for entry in chunk.logprobs])
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert [entry.token for entry in seen[0]] == ["base:", " one", " two"]
    assert all(len(entry.top) == 2 and entry.top[0][0] == entry.token for entry in seen[0])


async def test_extra_fields_go_through_and_other_fields_come_back(
    engine: OpenAIEngine, fake: FakeVllm
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    extra = {"tools": tools, "tool_choice": "auto", "response_format": {"type": "json_object"}}
    (whole,) = await chunks_of(engine, call(extra=extra))
    streamed = await chunks_of(engine, call(extra=extra, stream=True))
    (made,) = whole.delta["tool_calls"]
    assert made["function"]["name"] == "f"
    assert [c.delta for c in streamed if c.delta] == [{"tool_calls": [made]}]
    assert extra.items() <= fake.requests[0].body.items()


async def test_closing_aborts_upstream_and_the_pool_serves_on(
    engine: OpenAIEngine, fake: FakeVllm
) -> None:
    fake.faults.token_s = 0.02
    chunks = engine.run(call("word " * 200, stream=True))
    async for chunk in chunks:
        if chunk.text:
            break
    await chunks.aclose()
    waiting = asyncio.create_task(chunks_of(engine, call("word " * 200)))
    while len(fake.requests) < 2:
        await asyncio.sleep(0.005)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    async with asyncio.timeout(5):
        while not all(seen.aborted for seen in fake.requests):
            await asyncio.sleep(0.005)
    assert fake.requests[0].tokens < 20
    fake.faults.token_s = 0
    assert (await chunks_of(engine, call()))[0].text == "base: one two three"


async def test_streams_use_a_connection_again(
    engine: OpenAIEngine, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = 0
    connect = asyncio.get_running_loop().create_connection

    async def counted(*args: Any, **more: Any) -> Any:
        nonlocal opened
        opened += 1
        return await connect(*args, **more)

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", counted)
    for stream in (True, True, False, True):
        await chunks_of(engine, call(stream=stream))
    assert opened <= 1


# --- errors ------------------------------------------------------------------------------------


def limits(**seconds: float) -> dict[str, Any]:
    return {"timeouts": Timeouts(**seconds)}


@pytest.mark.parametrize(
    ("faults", "limit", "stream", "phase"),
    [
        ({"first_s": 5.0}, "first_token_s", True, "no first token in 0.05 s"),
        ({"hang_after": 2}, "between_tokens_s", True, "no token in 0.05 s after another"),
        ({"hang_after": 2, "keep_alive_s": 0.01}, "between_tokens_s", True, "after another"),
        ({"first_s": 5.0, "keep_alive_s": 0.01}, "first_token_s", True, "no first token"),
        ({"first_s": 5.0}, "answer_s", False, "no whole answer"),
    ],
)
async def test_each_phase_has_its_own_limit(
    fake: FakeVllm, faults: dict[str, Any], limit: str, stream: bool, phase: str
) -> None:
    engine = engine_at(fake.url, **limits(**{limit: 0.05}))
    await engine.start()
    for name, value in faults.items():
        setattr(fake.faults, name, value)
    with pytest.raises(EngineError, match=phase) as caught:
        await chunks_of(engine, call(stream=stream))
    assert not isinstance(caught.value, EngineUnavailable)
    assert limit in str(caught.value)
    async with asyncio.timeout(5):
        while not fake.requests[0].aborted:
            await asyncio.sleep(0.005)
    await engine.close()


async def test_a_slow_reader_is_no_slow_server(fake: FakeVllm) -> None:
    engine = engine_at(fake.url, **limits(between_tokens_s=0.05))
    await engine.start()
    async with aclosing(engine.run(call(stream=True))) as chunks:
        texts = []
        async for chunk in chunks:
            texts.append(chunk.text)
            await asyncio.sleep(0.07)
    assert "".join(texts) == "base: one two three"
    await engine.close()


@pytest.mark.parametrize("after", [0, 2])
async def test_a_connection_that_is_cut_is_a_server_that_is_gone(
    engine: OpenAIEngine, fake: FakeVllm, after: int
) -> None:
    fake.faults.drop_after = after
    with pytest.raises(EngineUnavailable):
        await chunks_of(engine, call(stream=True))


async def test_a_server_killed_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    fake = FakeVllm(api_key=KEY, served_name="m")
    serving = Serving(fake)
    await serving.start()
    engine = engine_at(fake.url)
    await engine.start()
    fake.faults.first_s = 30.0
    running = [
        asyncio.create_task(chunks_of(engine, call(stream=stream))) for stream in (True, False)
    ]
    while len(fake.requests) < 2:
        await asyncio.sleep(0.005)
    await serving.kill()
    for end in await asyncio.gather(*running, return_exceptions=True):
        assert type(end) is EngineUnavailable
    with pytest.raises(EngineUnavailable, match="ConnectError"):
        await chunks_of(engine, call())
    assert not (await engine.health()).ok
    with pytest.raises(EngineUnavailable):
        await engine.start()
    fake.faults.first_s = 0.0
    await serving.start()
    assert (await chunks_of(engine, call()))[0].text == "base: one two three"
    await engine.close()
    await serving.kill()


async def test_stop_ends_what_runs(engine: OpenAIEngine, fake: FakeVllm) -> None:
    fake.faults.first_s = 30.0
    running = [
        asyncio.create_task(chunks_of(engine, call(stream=stream))) for stream in (True, False)
    ]
    while len(fake.requests) < 2:
        await asyncio.sleep(0.005)
    await engine.stop()
    for end in await asyncio.gather(*running, return_exceptions=True):
        assert type(end) is EngineUnavailable
        assert "was stopped" in str(end)
    fake.faults.first_s = 0.0
    with pytest.raises(EngineUnavailable, match="not running"):
        await chunks_of(engine, call())
    await engine.start()
    assert (await chunks_of(engine, call()))[0].text == "base: one two three"


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ((429, {"error": {"message": "slow"}}, {"retry-after": "3"}), Overloaded, "no more calls"),
        ((400, {"error": {"message": "bad", "param": "seed"}}, {}), RequestError, "bad"),
        ((500, {"error": {"message": "oops"}}, {}), EngineError, "oops"),
        ((503, {"error": {"message": "loading"}}, {}), EngineUnavailable, "loading"),
        ((404, {"error": {"message": "no m"}}, {}), EngineError, "correct the server's `model`"),
        ((200, {"object": "list"}, {}), EngineError, "'s'"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_refusals_are_ours(
    engine: OpenAIEngine,
    fake: FakeVllm,
    answer: tuple[int, Any, dict[str, str]],
    kind: type[Exception],
    says: str,
    stream: bool,
) -> None:
    fake.faults.refuse = [answer]
    with pytest.raises(kind, match=says) as caught:
        await chunks_of(engine, call(stream=stream))
    assert type(caught.value) is kind


async def test_a_default_limit_that_does_not_fit_is_left_out(
    engine: OpenAIEngine, fake: FakeVllm
) -> None:
    sampling = Sampling(max_tokens=600)
    with pytest.raises(ContextTooLong):
        await chunks_of(engine, call(sampling=sampling))
    for stream in (True, False):
        chunks = await chunks_of(
            engine, call(sampling=sampling, max_tokens_asked=False, stream=stream)
        )
        assert "".join(c.text for c in chunks) == "base: one two three"
    with pytest.raises(ContextTooLong):
        await chunks_of(engine, call("w " * 600, sampling=sampling, max_tokens_asked=False))
    assert len(fake.requests) == 1 + 2 * 2 + 2


async def test_the_key_comes_from_the_environment_and_is_named(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that wants another key is there: its calls are refused at once, and not waited for
    until it comes. They are served from the moment that its key is ours."""
    for key, variable, says in (
        ("another", "TEST_KEY", "'s' answered 401: correct its API key .* 'TEST_KEY'"),
        (None, "TEST_KEY", "'s' has no API key: the environment variable 'TEST_KEY' is not set"),
        (None, None, "'s' answered 401: it wants an API key: .* `api_key_env`"),
    ):
        if key is None:
            monkeypatch.delenv("TEST_KEY", raising=False)
        else:
            monkeypatch.setenv("TEST_KEY", key)
        engine = engine_at(fake.url, api_key_env=variable)
        await engine.start()
        health = await engine.health()
        assert health.state == "failed"
        assert re.search(says, str(health.reason))
        for stream in (True, False):
            with pytest.raises(EngineMisconfigured, match=says):
                await chunks_of(engine, call(stream=stream))
        if key is not None:
            monkeypatch.setattr(fake, "api_key", "another")
            assert (await chunks_of(engine, call()))[0].text == "base: one two three"
            monkeypatch.setattr(fake, "api_key", KEY)
        await engine.close()


async def test_a_server_that_is_away_says_why(unused_tcp_port: int) -> None:
    engine = engine_at(f"http://127.0.0.1:{unused_tcp_port}/v1", api_key_env=None)
    health = await engine.health()
    assert health.state == "failed"
    assert "'s' is not there: ConnectError" in str(health.reason)
    await engine.close()


async def test_a_proxy_of_the_environment_is_not_used(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    engine = engine_at(fake.url)
    await engine.start()
    assert await chunks_of(engine, call())
    await engine.close()


async def test_counting_asks_for_one_token(engine: OpenAIEngine, fake: FakeVllm) -> None:
    assert await engine.count_tokens(call().messages, None) == 6
    assert await engine.count_tokens((), "a b c d") == 4
    assert all(seen.body["max_tokens"] == 1 for seen in fake.requests)
    fake.faults.usage = False
    with pytest.raises(EngineError, match="cannot count"):
        await engine.count_tokens((), "a")


async def test_a_server_that_reports_no_usage(engine: OpenAIEngine, fake: FakeVllm) -> None:
    fake.faults.usage = False
    for stream in (True, False):
        chunks = await chunks_of(engine, call(stream=stream))
        assert "".join(c.text for c in chunks) == "base: one two three"
        assert all(c.usage is None for c in chunks)


async def test_its_life(engine: OpenAIEngine, tmp_path: Any) -> None:
    assert (await engine.health()).ok
    assert engine.capacity == Capacity(32, 256, None)
    adapter = Adapter(tmp_path, "0" * 64, 8, 16.0, ("q_proj",))
    with pytest.raises(EngineError, match="takes no adapters"):
        await engine.prepare([adapter])
    await engine.prepare([])
    await engine.retain([])
    await engine.close()
    await engine.close()
    assert not (await engine.health()).ok
    with pytest.raises(EngineUnavailable):
        await engine.start()
    with pytest.raises(EngineUnavailable):
        await chunks_of(engine, call())


def test_it_cannot_be_placed() -> None:
    settings = OpenAISettings(url="https://host/v1", model="m")
    OpenAIEngine.check(settings, None)
    with pytest.raises(ValueError, match="remove `placement`"):
        OpenAIEngine.check(settings, Placement("gpu", 1.0))


@pytest.mark.parametrize(
    "url", ["host/v1", "ftp://host/v1", "http://", "http://u:p@host/v1", "http://host/v1?key=1"]
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"URL|query"):
        OpenAISettings(url=url, model="m")

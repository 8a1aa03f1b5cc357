"""The `vllm` engine at somebody else's server: calls and adapters."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from composer.engines.adapters import Probe, name_of
from composer.engines.base import Health
from composer.engines.http import Timeouts
from composer.engines.vllm import VllmEngine
from composer.engines.vllm_launch import VllmSettings
from composer.errors import (
    ComposerError,
    ContextTooLong,
    EngineError,
    EngineMisconfigured,
    EngineRefused,
    EngineUnavailable,
    Unsupported,
)
from composer.types import Adapter, Call, Chunk, Forward, Sampling, Usage
from tests.engines.upstream import FakeVllm, Serving, serve

MakeAdapter = Callable[[str], Adapter]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """An adapter folder whose name is what it answers."""

    def make(name: str, rank: int = 8) -> Adapter:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
        return Adapter(folder, name.encode().hex().ljust(64, "0"), rank, 16.0, ("q_proj",))

    return make


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeVllm]:
    async with serve(FakeVllm(max_loras=2, max_cpu_loras=4)) as fake:
        yield fake


def engine_at(url: str, **settings: Any) -> VllmEngine:
    return VllmEngine("s", VllmSettings(url=url, max_loras=2, **settings))


@pytest_asyncio.fixture
async def engine(fake: FakeVllm) -> AsyncIterator[VllmEngine]:
    engine = engine_at(fake.url)
    await engine.start()
    yield engine
    await engine.close()


def call(text: str = "one two", adapter: Adapter | None = None, **changes: Any) -> Call:
    plain = Call(
        id="chatcmpl-7/0",
        expert="e",
        server="s",
        adapter=adapter,
        messages=({"role": "user", "content": text},),
        prompt=None,
        sampling=Sampling(),
        context_window=512,
    )
    return dataclasses.replace(plain, **changes)


async def chunks_of(engine: VllmEngine, call: Call) -> list[Chunk]:
    async with aclosing(engine.run(call)) as chunks:
        return [chunk async for chunk in chunks]


async def text_of(engine: VllmEngine, call: Call) -> str:
    return "".join(chunk.text for chunk in await chunks_of(engine, call))


# --- calls -------------------------------------------------------------------------------------


async def test_the_base_and_its_adapters_answer(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.prepare([red, blue])
    assert set(fake.registered) == {name_of(red), name_of(blue)}
    assert name_of(red) == f"lora-{red.digest[:32]}"
    for stream in (False, True):
        assert await text_of(engine, call(stream=stream)) == "base: one two"
        assert await text_of(engine, call(adapter=red, stream=stream)) == "red: one two"
        assert await text_of(engine, call(adapter=blue, stream=stream)) == "blue: one two"
    assert {seen.model for seen in fake.generations()} == {
        "base-model", name_of(red), name_of(blue)
    }  # fmt: skip


async def test_images_are_not_fetched_for_callers_unless_allowed(fake: FakeVllm) -> None:
    def seeing(url: str) -> Call:
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": "what is this"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        return call(messages=({"role": "user", "content": parts},))

    for allowed in (False, True):
        engine = engine_at(fake.url, remote_images=allowed)
        await engine.start()
        assert await chunks_of(engine, seeing("data:image/png;base64,AAAA"))
        before = len(fake.requests)
        if allowed:
            assert await chunks_of(engine, seeing("http://169.254.169.254/meta"))
        else:
            with pytest.raises(Unsupported, match="send them as data: URLs"):
                await chunks_of(engine, seeing("http://169.254.169.254/meta"))
            assert len(fake.requests) == before
        await engine.close()


async def test_what_is_open_is_neutral(engine: VllmEngine, fake: FakeVllm) -> None:
    await chunks_of(engine, call())
    await chunks_of(engine, call(sampling=Sampling(temperature=0.0, top_p=0.5)))
    first, second = fake.generations()
    assert (first.body["temperature"], first.body["top_p"]) == (1.0, 1.0)
    assert (second.body["temperature"], second.body["top_p"]) == (0.0, 0.5)


async def test_handed_on_events_bear_our_names(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red = make_adapter("red")
    text = f'"model":"{name_of(red)}" {name_of(red)}'
    forward = Forward(id="chatcmpl-rid", model="auto")
    chunks = await chunks_of(engine, call(text, red, stream=True, forward=forward))
    events = [orjson.loads(chunk.raw[6:]) for chunk in chunks if chunk.raw is not None]
    assert {(event["id"], event["model"]) for event in events} == {("chatcmpl-rid", "auto")}
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == f"red: {text}"
    assert fake.generations()[0].headers["x-request-id"] == "rid"
    assert chunks[-1] == Chunk(usage=Usage(5, 3))


async def test_an_experts_smaller_window_is_held_exactly(
    engine: VllmEngine, fake: FakeVllm
) -> None:
    small = call("w " * 20, context_window=30, sampling=Sampling(max_tokens=8))
    with pytest.raises(ContextTooLong, match="23 tokens and max_tokens 8"):
        await chunks_of(engine, small)
    fits = dataclasses.replace(small, max_tokens_asked=False)
    chunks = await chunks_of(engine, fits)
    assert fake.generations()[-1].body["max_tokens"] == 7
    assert chunks[-1].finish_reason == "length"
    open_ended = dataclasses.replace(small, sampling=Sampling())
    await chunks_of(engine, open_ended)
    assert fake.generations()[-1].body["max_tokens"] == 7


async def test_the_servers_window_is_held_for_what_was_asked(
    engine: VllmEngine, fake: FakeVllm
) -> None:
    long = call("w " * 400, context_window=4096, sampling=Sampling(max_tokens=200))
    with pytest.raises(ContextTooLong, match="403 tokens and max_tokens 200 exceed"):
        await chunks_of(engine, long)
    assert not fake.generations()
    for limit in (200, 600):  # a default is cut by the server, or left out
        default = dataclasses.replace(
            long, max_tokens_asked=False, sampling=Sampling(max_tokens=limit)
        )
        assert (await chunks_of(engine, default))[-1].finish_reason == "length"
    assert [seen.body.get("max_tokens") for seen in fake.generations()] == [200, 600, None]
    with pytest.raises(ContextTooLong, match="even without any output"):
        await chunks_of(engine, call("w " * 600, context_window=4096))


async def test_an_open_completion_gets_the_room_there_is(
    engine: VllmEngine, fake: FakeVllm
) -> None:
    plain = call(messages=(), prompt="one two three")
    assert await text_of(engine, plain) == "base: one two three"
    assert fake.generations()[-1].body["max_tokens"] == 512 - 3


async def test_counting(engine: VllmEngine) -> None:
    assert await engine.count_tokens(call().messages, None) == 5
    assert await engine.count_tokens((), "a b") == 2


async def test_a_model_that_is_served_under_another_name(fake: FakeVllm) -> None:
    engine = engine_at(fake.url, served_name="other")
    with pytest.raises(EngineUnavailable, match="serves no other; correct its `served_name`"):
        await engine.start()
    assert not (await engine.health()).ok
    await engine.close()


@pytest.mark.parametrize("message", ["context length 9", "The model `lora-x` does not exist."])
async def test_what_fails_after_it_began_is_not_begun_again(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter, message: str
) -> None:
    red = make_adapter("red")
    await engine.prepare([red])
    code = 400 if "context" in message else 404
    fake.faults.error_after = (2, {"message": message, "code": code})
    seen = []

    async def read() -> None:
        asked = Sampling(max_tokens=9)
        streamed = call(adapter=red, stream=True, sampling=asked, max_tokens_asked=False)
        async with aclosing(engine.run(streamed)) as chunks:
            async for chunk in chunks:
                seen.append(chunk.text)

    with pytest.raises(ComposerError, match=message):
        await read()
    assert "".join(seen) == "red: one"
    assert len(fake.generations()) == 1


# --- adapters ----------------------------------------------------------------------------------


async def test_an_adapter_is_known_by_its_content(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red = make_adapter("red")
    copy = dataclasses.replace(red, path=Path("/elsewhere"))
    await engine.prepare([red])
    await engine.prepare([copy, red])
    assert fake.loads == [name_of(red)]
    await engine.retain([copy])
    assert set(fake.registered) == {name_of(red)}
    await engine.retain([])
    assert not fake.registered


async def test_the_path_is_as_the_server_sees_it(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red = make_adapter("red")
    seen_there = str(red.path)
    await engine.prepare(
        [dataclasses.replace(red, path=Path("/only/here"), server_path=seen_there)]
    )
    assert fake.registered == {name_of(red): seen_there}
    blue = make_adapter("blue")
    with pytest.raises(EngineError, match=r"/only/here.*`server_path`"):
        await engine.prepare([dataclasses.replace(blue, path=Path("/only/here"))])


async def test_all_or_nothing(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red, blue, wide = make_adapter("red"), make_adapter("blue"), make_adapter("wide")
    (wide.path / "adapter_config.json").write_text('{"r": 128}')
    await engine.prepare([red])
    with pytest.raises(EngineError, match="rank 128"):
        await engine.prepare([blue, wide])
    assert set(fake.registered) == {name_of(red)}
    (wide.path / "adapter_config.json").write_text('{"r": 8}')
    await engine.prepare([blue, wide])
    assert set(fake.registered) == {name_of(red), name_of(blue), name_of(wide)}


async def test_many_that_wait_for_one_adapter_load_it_once(
    fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    engine = engine_at(fake.url, preload=0)
    await engine.start()
    red = make_adapter("red")
    await engine.prepare([red])
    assert fake.loads == []
    fake.faults.load_s = 0.05
    texts = await asyncio.gather(*(text_of(engine, call(adapter=red)) for _ in range(20)))
    assert texts == ["red: one two"] * 20
    assert fake.loads == [name_of(red)]
    await engine.close()


async def test_a_waiter_that_leaves_takes_the_load_not_along(
    fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    engine = engine_at(fake.url, preload=0)
    await engine.start()
    red = make_adapter("red")
    fake.faults.load_s = 0.05
    first, second = (asyncio.create_task(text_of(engine, call(adapter=red))) for _ in range(2))
    await asyncio.sleep(0.02)
    first.cancel()
    assert await second == "red: one two"
    assert first.cancelled()
    await engine.close()


async def test_beyond_preload_they_are_loaded_by_their_first_call(
    fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    engine = engine_at(fake.url, preload=3)
    await engine.start()
    adapters = [make_adapter(f"a{i}") for i in range(10)]
    await engine.prepare(adapters)
    assert len(fake.registered) == 3
    assert await text_of(engine, call(adapter=adapters[9])) == "a9: one two"
    assert set(fake.registered) == {name_of(adapters[i]) for i in (0, 1, 2, 9)}
    await engine.close()


async def test_a_server_that_has_forgotten_is_told_again(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.prepare([red, blue])
    fake.forget_adapters()
    calls = [call(adapter=a, stream=i % 3 == 0) for i in range(10) for a in (red, blue)]
    texts = await asyncio.gather(*(text_of(engine, each) for each in calls))
    assert texts == ["red: one two", "blue: one two"] * 10
    assert sorted(fake.loads[2:]) == sorted([name_of(red), name_of(blue)])


async def test_what_another_service_left_there_is_taken(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red = make_adapter("red")
    await engine.prepare([red])
    other = engine_at(fake.url)
    await other.start()
    await other.prepare([red])
    assert await text_of(other, call(adapter=red)) == "red: one two"
    await other.close()


@pytest.mark.parametrize(
    ("behaviour", "says"), [("green", "differently after a reload; "), ("base", "it was lost")]
)
async def test_a_reloaded_adapter_must_answer_as_before(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter, behaviour: str, says: str
) -> None:
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.prepare([red, blue])
    fake.forget_adapters()
    moved = red.path.rename(red.path.with_name(behaviour))
    wrong = dataclasses.replace(red, path=moved)
    with pytest.raises(EngineError, match=says):
        await text_of(engine, call(adapter=wrong))
    assert name_of(red) not in fake.registered
    assert await text_of(engine, call(adapter=blue)) == "blue: one two"
    moved.rename(red.path)
    assert await text_of(engine, call(adapter=red)) == "red: one two"


def test_the_distance_of_probes() -> None:
    one = Probe({"a": -0.1, "b": -3.0})
    assert one.distance(one) == 0.0
    assert one.distance(Probe({"a": -0.3, "b": -2.9})) == pytest.approx(0.2)
    # `b` is at most as likely as the last that is listed there, so nothing is known to differ.
    assert one.distance(Probe({"a": -0.1, "c": -3.0})) == 0.0
    assert one.distance(Probe({"c": -0.1, "d": -3.0})) == pytest.approx(2.9)


async def test_a_server_without_runtime_adapters(make_adapter: MakeAdapter) -> None:
    async with serve(FakeVllm(runtime_loras=False)) as fake:
        engine = engine_at(fake.url)
        await engine.start()
        with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            await engine.prepare([make_adapter("red")])
        await engine.close()


# --- there or not ------------------------------------------------------------------------------


async def test_a_server_that_comes_back_gets_its_adapters_back(make_adapter: MakeAdapter) -> None:
    fake = FakeVllm(max_loras=2)
    serving = Serving(fake)
    await serving.start()
    engine = engine_at(fake.url)
    await engine.start()
    red = make_adapter("red")
    await engine.prepare([red])
    await serving.kill()
    with pytest.raises(EngineUnavailable):
        await text_of(engine, call(adapter=red))
    assert not (await engine.health()).ok
    coming = [asyncio.create_task(engine.start()) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not (await engine.health()).ok
    await serving.start()
    await asyncio.gather(*coming)
    assert set(fake.registered) == {name_of(red)}
    assert await text_of(engine, call(adapter=red)) == "red: one two"
    assert (await engine.health()).ok
    await engine.close()
    await serving.kill()


async def test_another_model_at_the_same_place_is_taken_as_new(make_adapter: MakeAdapter) -> None:
    fake = FakeVllm(max_loras=2)
    serving = Serving(fake)
    await serving.start()
    engine = engine_at(fake.url)
    await engine.start()
    red = make_adapter("red")
    await engine.prepare([red])
    await serving.kill()
    fake.weights = "other"
    await serving.start()
    await engine.stop()
    await engine.start()
    assert await text_of(engine, call(adapter=red)) == "other: one two"
    await engine.close()
    await serving.kill()


async def test_what_is_prepared_while_it_is_stopped_is_loaded_at_its_start(
    fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    engine = engine_at(fake.url)
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.prepare([red, blue])
    await engine.retain([red])
    assert (await engine.health()).ok
    with pytest.raises(EngineUnavailable, match="not running"):
        await text_of(engine, call(adapter=red))
    await engine.start()
    assert set(fake.registered) == {name_of(red)}
    await engine.close()


async def test_the_log_says_which_adapters_were_loaded_and_how_long_it_took(
    fake: FakeVllm, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(fake.url, preload=1)
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.prepare([red, blue])
    with caplog.at_level("INFO", "composer.engines.adapters"):
        await engine.start()
        await text_of(engine, call(adapter=blue))
        await text_of(engine, call(adapter=blue))
    said = [re.sub(r"\d+\.\d+ s", "T s", line) for line in caplog.messages]
    assert said == [
        f"server 's': adapter {red.digest[:12]} (red) loaded in T s",
        f"server 's': adapter {blue.digest[:12]} (blue) loaded in T s",
    ]
    await engine.close()


async def test_one_adapter_that_does_not_come_back_leaves_the_others(
    engine: VllmEngine, fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    red, blue = make_adapter("red"), make_adapter("blue")
    await engine.prepare([red, blue])
    fake.forget_adapters()
    (red.path / "adapter_config.json").unlink()
    await engine.stop()
    await engine.start()
    assert await text_of(engine, call(adapter=blue)) == "blue: one two"
    with pytest.raises(EngineError, match="finds no adapter"):
        await text_of(engine, call(adapter=red))


async def test_a_server_that_wants_another_key_refuses_its_calls_at_once(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not waited for, as if it were away; and it is asked again after a while."""
    monkeypatch.setattr("composer.engines.vllm_server.AGAIN_S", 0.0)
    monkeypatch.setenv("TEST_KEY", "ours")
    red = make_adapter("red")
    async with serve(FakeVllm(api_key="theirs", max_loras=2)) as fake:
        engine = engine_at(fake.url, api_key_env="TEST_KEY")
        await engine.prepare([red])
        await engine.start()
        for each in (call(), call(adapter=red, stream=True)):
            with pytest.raises(EngineMisconfigured, match=r"'s' answered 401: .*'TEST_KEY'"):
                await text_of(engine, each)
        health = await engine.health()
        assert health.state == "failed"
        assert "TEST_KEY" in str(health.reason)

        fake.api_key = "ours"
        assert await text_of(engine, call(adapter=red)) == "red: one two"
        assert await engine.health() == Health("ready")

        fake.api_key = "newer"
        with pytest.raises(EngineMisconfigured):
            await text_of(engine, call())
        assert (await engine.health()).state == "failed"
        await engine.close()


async def test_a_server_that_wants_another_key_is_not_asked_for_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    async with serve(FakeVllm()) as fake:
        engine = engine_at(fake.url, api_key_env="TEST_KEY")
        await engine.start()
        monkeypatch.setenv("TEST_KEY", "any")
        with pytest.raises(EngineMisconfigured, match="'TEST_KEY' is not set"):
            await text_of(engine, call())
        await engine.close()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_refused_takes_the_server_from_nobody(
    fake: FakeVllm, make_adapter: MakeAdapter, status: int, stream: bool
) -> None:
    """A gateway's word on one request, its model or its origin: the key is as good as before."""
    engine, red = engine_at(fake.url), make_adapter("red")
    await engine.prepare([red])
    await engine.start()
    loads, asked = list(fake.loads), len(fake.requests)
    fake.faults.refuse = [(status, {"error": {"message": "moderated"}}, {})]
    with pytest.raises(EngineRefused, match=rf"'s' refuses this request .*{status}") as refused:
        await text_of(engine, call(stream=stream))
    assert "key" not in str(refused.value)
    assert "moderated" not in str(refused.value)
    assert await engine.health() == Health("ready")
    assert await text_of(engine, call(adapter=red)) == "red: one two"
    assert fake.loads == loads
    assert len(fake.requests) == len(fake.generations()) + asked  # nothing was probed anew
    await engine.close()


async def test_a_call_that_is_refused_while_the_server_goes_marks_no_key(fake: FakeVllm) -> None:
    engine = engine_at(fake.url)
    await engine.start()
    error = EngineMisconfigured("server 's' answered 401")
    async with serve(FakeVllm()) as other:
        gone = other.url
    engine._server.upstream.client._url = lambda: gone
    with pytest.raises(EngineRefused):
        async with engine._server.call():
            raise error
    assert engine._server.running
    await engine.close()


async def test_health_looks_again_at_an_idle_server_that_wanted_another_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("composer.engines.vllm_server.AGAIN_S", 0.0)
    monkeypatch.setenv("TEST_KEY", "ours")
    async with serve(FakeVllm(api_key="theirs")) as fake:
        engine = engine_at(fake.url, api_key_env="TEST_KEY")
        await engine.start()
        for _ in range(3):
            health = await engine.health()
            assert health.state == "failed"
            assert "which needs no new start" in str(health.reason)
        said = [line for line in caplog.messages if "until then its calls fail" in line]
        assert len(said) == 1
        fake.api_key = "ours"
        assert await engine.health() == Health("ready")
        await engine.close()


async def test_a_start_that_is_forbidden_is_the_operators_to_mend(
    monkeypatch: pytest.MonkeyPatch, make_adapter: MakeAdapter
) -> None:
    """Of a gateway that answers a wrong key so, say: calls are refused and do not wait."""
    async with serve(FakeVllm()) as fake:
        fake.faults.refuse = [(403, "no", {})] * 8
        engine = engine_at(fake.url)
        await engine.prepare([make_adapter("red")])
        await engine.start()
        with pytest.raises(EngineMisconfigured, match="forbids what a start asks of it"):
            await text_of(engine, call())
        await engine.close()


async def test_a_server_that_is_not_there(unused_tcp_port: int) -> None:
    engine = engine_at(f"http://127.0.0.1:{unused_tcp_port}", start_timeout_s=0.05)
    assert await engine.health() == Health("off")
    with pytest.raises(EngineUnavailable, match="start it, or correct its `url`"):
        await engine.start()
    health = await engine.health()
    assert health.state == "failed"
    assert "'s' is not there: ConnectError" in str(health.reason)
    await engine.close()


async def test_a_start_that_is_stopped_says_so(unused_tcp_port: int) -> None:
    engine = engine_at(f"http://127.0.0.1:{unused_tcp_port}", start_timeout_s=60)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.02)
    await engine.stop()
    with pytest.raises(EngineUnavailable, match="stopped while it started"):
        await starting
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.02)
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await starting


async def test_stop_ends_what_runs_and_what_waits_for_an_adapter(
    fake: FakeVllm, make_adapter: MakeAdapter
) -> None:
    engine = engine_at(fake.url, preload=0)
    await engine.start()
    fake.faults.first_s = 30.0
    running = asyncio.create_task(chunks_of(engine, call(stream=True)))
    while not fake.generations():
        await asyncio.sleep(0.005)
    fake.faults.load_s = 30.0
    loading = asyncio.create_task(chunks_of(engine, call(adapter=make_adapter("red"))))
    await asyncio.sleep(0.05)
    await engine.stop()
    for end in await asyncio.gather(running, loading, return_exceptions=True):
        assert type(end) is EngineUnavailable
    await engine.close()


async def test_limits_of_an_adapters_load(fake: FakeVllm, make_adapter: MakeAdapter) -> None:
    engine = engine_at(fake.url, preload=0, timeouts=Timeouts(first_token_s=0.2))
    await engine.start()
    fake.faults.load_s = 30.0
    with pytest.raises(EngineError, match="took too long"):
        await text_of(engine, call(adapter=make_adapter("red")))
    await engine.close()

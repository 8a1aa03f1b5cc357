"""The `vllm` engine with the real vLLM (its CPU build) and the tiny experts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio

from composer.engines.adapters import name_of
from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.engines.vllm import VllmEngine
from composer.engines.vllm_launch import VllmSettings
from composer.errors import ContextTooLong, EngineError, RequestError
from composer.types import Adapter, Call, Chunk, Forward, Sampling
from examples.tiny.experts import EXPERTS, base_folder, expert_folder
from examples.tiny.tasks import SKILLS
from tests.engines.conftest import with_own_digest
from tests.vllm import ENVIRONMENT, python, vllm_marks

pytestmark = [*vllm_marks, pytest.mark.asyncio(loop_scope="module")]

SKILLS_OF_LARGE = EXPERTS["large"]
PROMPTS = 50


def adapter_of(skill: str) -> Adapter:
    folder = expert_folder("large", skill)
    config = json.loads((folder / "adapter_config.json").read_text())
    written = Adapter(
        folder, "", config["r"], config["lora_alpha"], tuple(sorted(config["target_modules"]))
    )
    return with_own_digest(written)


ADAPTERS = {skill: adapter_of(skill) for skill in SKILLS_OF_LARGE}


def call(text: str, adapter: Adapter | None = None, **changes: Any) -> Call:
    plain = Call(
        id="chatcmpl-1/0",
        expert="e",
        server="s",
        adapter=adapter,
        messages=({"role": "user", "content": text},),
        prompt=None,
        sampling=Sampling(max_tokens=48, temperature=0.0),
        context_window=512,
    )
    return dataclasses.replace(plain, **changes)


def sampled(call: Call, **changes: Any) -> Call:
    return dataclasses.replace(call, sampling=dataclasses.replace(call.sampling, **changes))


async def chunks_of(engine: Any, call: Call) -> list[Chunk]:
    async with aclosing(engine.run(call)) as chunks:
        return [chunk async for chunk in chunks]


async def text_of(engine: Any, call: Call) -> str:
    return "".join(chunk.text for chunk in await chunks_of(engine, call))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("vllm")
    settings = VllmSettings(
        launch={
            "python": python(),
            "args": {"dtype": "float32", "enforce_eager": True},
            "env": ENVIRONMENT,
            "log": folder / "vllm.log",
            "start_timeout_s": 300,
        },
        model=str(base_folder("large")),
        max_loras=2,
        max_cpu_loras=4,
        max_lora_rank=8,
        context_window=512,
    )
    engine = VllmEngine("tiny", settings)
    try:
        await engine.start()
        await engine.prepare(ADAPTERS.values())
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def embedded() -> AsyncIterator[EmbeddedEngine]:
    settings = EmbeddedSettings(model=str(base_folder("large")), max_batch=16)
    engine = EmbeddedEngine("local", settings)
    await engine.start()
    await engine.prepare(ADAPTERS.values())
    yield engine
    await engine.close()


async def at_most(count: int, engine: Any, calls: list[Call]) -> list[str]:
    room = asyncio.Semaphore(count)

    async def one(call: Call) -> str:
        async with room:
            return await text_of(engine, call)

    return await asyncio.gather(*map(one, calls))


@pytest.mark.parametrize("skill", SKILLS_OF_LARGE)
async def test_the_same_answers_as_the_embedded_engine(
    engine: VllmEngine, embedded: EmbeddedEngine, skill: str
) -> None:
    items = SKILLS[skill].sample("test", PROMPTS, seed=3)
    assert len(items) == PROMPTS
    calls = [call(item.prompt, ADAPTERS[skill]) for item in items]
    ours = await at_most(16, embedded, calls)
    theirs = await at_most(16, engine, calls)
    assert theirs == ours
    right = sum(text.strip() == item.answer for text, item in zip(theirs, items, strict=True))
    assert right > 0.5 * PROMPTS  # so that not both are silent


async def test_streamed_whole_and_handed_on_are_one(engine: VllmEngine) -> None:
    plain = call("reverse shade", ADAPTERS["reverse"])
    (whole,) = await chunks_of(engine, plain)
    assert whole.text == "edahs"
    streamed = await chunks_of(engine, dataclasses.replace(plain, stream=True))
    assert "".join(chunk.text for chunk in streamed) == whole.text
    assert streamed[-1].usage == whole.usage
    forward = Forward(id="chatcmpl-rid7", model="auto")
    handed = await chunks_of(engine, dataclasses.replace(plain, stream=True, forward=forward))
    events = [orjson.loads(chunk.raw[6:]) for chunk in handed[:-1] if chunk.raw is not None]
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == whole.text
    assert {(e["id"], e["model"]) for e in events} == {("chatcmpl-rid7", "auto")}
    assert handed[-1].usage == whole.usage
    assert [chunk.finish_reason for chunk in handed[-2:]] == ["stop", None]


async def test_vllm_answers_under_our_id(engine: VllmEngine) -> None:
    """So its log and ours speak of one request by one name."""
    seen = []
    send = engine._server.upstream.client._http.send

    async def watched(request: httpx.Request, **more: Any) -> httpx.Response:
        response = await send(request, **more)
        seen.append(response)
        return response

    engine._server.upstream.client._http.send = watched  # type: ignore[method-assign]
    try:
        await chunks_of(engine, call("reverse shade", ADAPTERS["reverse"]))
    finally:
        engine._server.upstream.client._http.send = send  # type: ignore[method-assign]
    assert seen[-1].json()["id"] == "chatcmpl-chatcmpl-1/0"
    assert seen[-1].json()["model"] == name_of(ADAPTERS["reverse"])


@pytest.mark.parametrize("prompted", [False, True])
async def test_log_probabilities_are_those_of_the_embedded_engine(
    engine: VllmEngine, embedded: EmbeddedEngine, prompted: bool
) -> None:
    plain = sampled(call("reverse shade", ADAPTERS["reverse"]), logprobs=3)
    if prompted:
        plain = dataclasses.replace(plain, messages=(), prompt="reverse shade")
        plain = sampled(plain, max_tokens=8)
    for stream in (False, True):
        each = dataclasses.replace(plain, stream=stream)
        theirs = [t for c in await chunks_of(engine, each) for t in c.logprobs]
        ours = [t for c in await chunks_of(embedded, each) for t in c.logprobs]
        if not prompted:  # vLLM also lists the token that ends the answer, which is not in its text
            assert theirs.pop().token == "</s>"
        assert [t.token for t in theirs] == [t.token for t in ours]
        for their, our in zip(theirs, ours, strict=True):
            assert their.logprob == pytest.approx(our.logprob, abs=1e-3)
            assert [token for token, _ in their.top] == [token for token, _ in our.top]
            assert [lp for _, lp in their.top] == pytest.approx([lp for _, lp in our.top], abs=1e-3)


async def test_several_choices(engine: VllmEngine) -> None:
    plain = sampled(call("reverse shade", ADAPTERS["reverse"]), n=3, temperature=1.0, seed=5)
    whole = await chunks_of(engine, plain)
    streamed = await chunks_of(engine, dataclasses.replace(plain, stream=True))
    for index in range(3):
        texts = [
            "".join(c.text for c in chunks if c.index == index) for chunks in (whole, streamed)
        ]
        assert texts[0] == texts[1]
    assert whole[-1].usage == streamed[-1].usage
    with pytest.raises(RequestError, match="n must be 1"):
        await chunks_of(engine, sampled(plain, temperature=0.0))


async def test_a_schema_is_kept_to(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    extra = {"response_format": wanted}
    (chunk,) = await chunks_of(engine, call("is it so", extra=extra))
    text = chunk.text + " "  # the tiny model may spend its tokens on the blanks JSON allows
    assert text.lstrip().startswith("{")
    if chunk.finish_reason == "stop":
        assert json.loads(chunk.text)["answer"] in ("yes", "no")


async def test_parameters_and_tools_reach_the_server(engine: VllmEngine) -> None:
    plain = call("reverse shade", ADAPTERS["reverse"])
    (short,) = await chunks_of(engine, dataclasses.replace(plain, extra={"bad_words": ["e"]}))
    assert not short.text.startswith("e")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(RequestError, match="tool"):  # this server has no parser for them
        await chunks_of(engine, dataclasses.replace(plain, extra={"tools": tools}))


async def test_windows(engine: VllmEngine, embedded: EmbeddedEngine) -> None:
    plain = call("reverse shade", ADAPTERS["reverse"])
    count = await engine.count_tokens(plain.messages, None)
    assert count == await embedded.count_tokens(plain.messages, None)
    assert await engine.count_tokens((), "shade") == await embedded.count_tokens((), "shade")
    long = call("shade " * 90, ADAPTERS["reverse"])
    with pytest.raises(ContextTooLong):
        await chunks_of(engine, long)
    for tokens in (512 - count + 1, 600):
        with pytest.raises(ContextTooLong):
            await chunks_of(engine, sampled(plain, max_tokens=tokens))
        default = dataclasses.replace(sampled(plain, max_tokens=tokens), max_tokens_asked=False)
        assert await text_of(engine, default) == "edahs"
    narrow = sampled(dataclasses.replace(plain, context_window=count + 3), max_tokens=100)
    default = dataclasses.replace(narrow, max_tokens_asked=False)
    (chunk,) = await chunks_of(engine, sampled(default, temperature=1.0))
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens <= 3


async def measured(engine: VllmEngine, metric: str) -> float:
    """One of vLLM's own metrics, all its series added up."""
    assert engine._server.process is not None
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"http://127.0.0.1:{engine._server.process.port}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{metric}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_aborts_the_generation(engine: VllmEngine, stream: bool) -> None:
    endless = dataclasses.replace(
        sampled(call("x"), max_tokens=480), stream=stream, extra={"ignore_eos": True}
    )
    before = await measured(engine, "generation_tokens_total")
    begun = asyncio.Event()

    async def read() -> None:
        async with aclosing(engine.run(endless)) as chunks:
            async for _ in chunks:
                begun.set()

    async with asyncio.timeout(60):
        # So many that those read whole cannot have ended before anybody looks.
        tasks = [asyncio.create_task(read()) for _ in range(64)]
        if stream:
            await begun.wait()  # a look at the metrics would wait behind all the events
        else:
            while not await measured(engine, "num_requests_running"):
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while await measured(engine, "num_requests_running"):
            await asyncio.sleep(0.01)
    assert all(task.cancelled() for task in tasks)
    assert await measured(engine, "generation_tokens_total") - before < 64 * 480 / 2


async def test_an_adapter_that_is_not_there(engine: VllmEngine, tmp_path: Path) -> None:
    gone = dataclasses.replace(ADAPTERS["add"], path=tmp_path, digest="1" * 64)
    with pytest.raises(EngineError, match="finds no adapter"):
        await engine.prepare([gone])
    assert await text_of(engine, call("reverse shade", ADAPTERS["reverse"])) == "edahs"


@pytest.mark.slow
async def test_a_restart_brings_the_same_answers_back(engine: VllmEngine) -> None:
    calls = [call(SKILLS[s].sample("test", 1, 9)[0].prompt, a) for s, a in ADAPTERS.items()]
    before = await at_most(4, engine, calls)
    await engine.stop()
    await engine.start()
    assert await at_most(4, engine, calls) == before

"""POST /v1/chat/completions, whole and streamed, without sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from api.app import create_app
from tests.api.fakes import SECRET, World, until

HELLO = [{"role": "user", "content": "hello shout"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": HELLO, **fields}


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body(**fields))


def events(text: str) -> list[Any]:
    """The data of every event; `[DONE]` as it is."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    response = await post(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


# --- whole -------------------------------------------------------------------------------


async def test_an_answer_in_openais_shape(client: httpx.AsyncClient, world: World) -> None:
    response = await post(client)
    assert response.status_code == 200
    answer = response.json()
    composer = answer.pop("composer")
    assert isinstance(answer.pop("created"), int)
    id_ = answer.pop("id")
    assert answer == {
        "object": "chat.completion",
        "model": "auto",
        "system_fingerprint": "fp_shout-team/s",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "SHOUT: HELLO SHOUT", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }
    assert composer.pop("decision_ms") > 0
    assert composer.pop("run_ms") > 0
    assert composer.pop("queue_ms") >= 0
    assert composer.pop("first_token_ms") > 0
    assert composer == {
        "expert": "shout",
        "experts": ["shout"],
        "policy": "auto",
        "strategy": "single",
        "scores": {"shout": 0.9, "team/sort": 0.1},
        "reasons": {
            "rule": "best_score",
            "evidence": {"shout": {"similarity": 0.5, "nearest": "hello shout"}},
        },
        "catalog_version": 1,
        "cost_usd": composer["cost_usd"],
    }
    assert id_ == f"chatcmpl-{response.headers['x-request-id']}"
    assert [record.id for record in world.recorder.records] == [id_]
    assert response.headers["x-composer-expert"] == "shout"
    assert float(response.headers["x-composer-decision-ms"]) > 0


@pytest.mark.parametrize(
    ("model", "expert", "policy"),
    [
        ("auto", "shout", "auto"),
        ("shout", "shout", "shout"),
        ("team/sort", "team/sort", "team/sort"),
        (None, "shout", "auto"),
    ],
)
async def test_model_is_a_policy_or_an_expert(
    client: httpx.AsyncClient, model: str | None, expert: str, policy: str
) -> None:
    answer = (await post(client, model=model)).json()
    assert answer["composer"]["expert"] == expert
    assert answer["composer"]["policy"] == policy
    assert answer["model"] == (model or "auto")


async def test_a_vote_names_all_who_were_asked(client: httpx.AsyncClient) -> None:
    response = await post(client, model="panel")
    composer = response.json()["composer"]
    assert composer["strategy"] == "vote"
    assert composer["expert"] == "shout"
    assert set(composer["experts"]) == {"shout", "team/sort"}
    assert response.headers["x-composer-expert"] == "shout"


async def test_opting_out_gives_the_expert_nothing(client: httpx.AsyncClient, world: World) -> None:
    answer = (await post(client, composer={"exclude": ["shout"]})).json()
    assert answer["composer"]["expert"] == "team/sort"
    assert [call.expert for call in world.engine.calls] == ["team/sort"]


async def test_sampling_reaches_the_engine(client: httpx.AsyncClient, world: World) -> None:
    fields = {"temperature": 0, "top_p": 0.5, "seed": 7, "n": 2, "stop": "X", "max_tokens": 3}
    assert (await post(client, **fields)).status_code == 200
    [call] = world.engine.calls
    assert call.sampling.temperature == 0
    assert call.sampling.top_p == 0.5
    assert call.sampling.seed == 7
    assert call.sampling.n == 2
    assert call.sampling.stop == ("X",)
    assert call.sampling.max_tokens == 3
    assert call.sampling.logprobs is None
    assert call.extra == {}


async def test_max_completion_tokens_is_max_tokens(client: httpx.AsyncClient) -> None:
    answer = (await post(client, max_completion_tokens=2)).json()
    assert answer["choices"][0]["message"]["content"] == "SHOUT: HELLO"
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_logprobs_in_openais_shape(client: httpx.AsyncClient) -> None:
    choice = (await post(client, logprobs=True, top_logprobs=1)).json()["choices"][0]
    first = choice["logprobs"]["content"][0]
    assert first == {
        "token": "SHOUT:",
        "logprob": -0.5,
        "bytes": list(b"SHOUT:"),
        # Probability zero has no logarithm in JSON.
        "top_logprobs": [{"token": "SHOUT:0", "logprob": -9999.0, "bytes": list(b"SHOUT:0")}],
    }
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert "".join(tokens) == choice["message"]["content"]


async def test_an_answer_without_end_is_the_engines_fault(
    client: httpx.AsyncClient, world: World
) -> None:
    world.engine.ends = False
    response = await post(client)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "engine_error"
    assert world.service.generations.holds == 0


async def test_a_bug_is_a_500_that_tells_nothing(client: httpx.AsyncClient, world: World) -> None:
    world.engine.fail_at = 0
    response = await post(client)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert SECRET not in response.text
    assert response.headers["x-request-id"]
    assert world.service.generations.holds == 0
    assert [record.status for record in world.recorder.records] == ["error"]


# --- streamed ----------------------------------------------------------------------------


async def test_a_stream_is_the_whole_answer_in_parts(
    client: httpx.AsyncClient, world: World
) -> None:
    *chunks, done = await stream(client)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {world.recorder.records[0].id}
    assert {chunk["model"] for chunk in chunks} == {"auto"}
    assert not any("usage" in chunk for chunk in chunks)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(c["delta"].get("content", "") for c in choices) == "SHOUT: HELLO SHOUT"
    assert [c["finish_reason"] for c in choices] == [None, None, None, None, "stop"]
    assert choices[-1]["delta"] == {}
    assert [chunk["composer"]["expert"] for chunk in chunks if "composer" in chunk] == ["shout"]
    assert chunks[-1]["composer"]["run_ms"] > 0


async def test_the_headers_of_a_stream_name_the_planned_expert(client: httpx.AsyncClient) -> None:
    response = await post(client, stream=True)
    assert response.headers["x-composer-expert"] == "shout"
    assert float(response.headers["x-composer-decision-ms"]) > 0
    assert response.headers["x-request-id"]


async def test_usage_comes_last_when_asked_for_and_carries_composer_too(
    client: httpx.AsyncClient,
) -> None:
    *chunks, usage, done = await stream(client, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert usage["composer"] == chunks[-1]["composer"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_each_of_n_choices_is_opened_and_ended_once(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, n=2)
    for index in (0, 1):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [c["delta"].get("role") for c in own] == ["assistant", None, None, None, None]
        assert [c["finish_reason"] for c in own] == [None, None, None, None, "stop"]
    assert [("composer" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_a_vote_streams_too(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, model="panel")
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "SHOUT: HELLO SHOUT"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert set(chunks[-1]["composer"]["experts"]) == {"shout", "team/sort"}


async def test_streamed_logprobs_cover_the_text(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, logprobs=True)
    entries = [
        entry
        for chunk in chunks
        if (logprobs := chunk["choices"][0]["logprobs"]) is not None
        for entry in logprobs["content"]
    ]
    assert "".join(entry["token"] for entry in entries) == "SHOUT: HELLO SHOUT"
    assert all(entry["top_logprobs"] == [] for entry in entries)


async def test_an_error_before_the_first_token_is_a_status(
    client: httpx.AsyncClient, world: World
) -> None:
    world.engine.fail_at = 0
    response = await post(client, stream=True)
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/json"


async def test_an_error_in_mid_stream_is_the_last_event(
    client: httpx.AsyncClient, world: World
) -> None:
    world.engine.fail_at = 2
    *chunks, last = await stream(client)
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "SHOUT:", " HELLO"]
    assert last["error"]["type"] == "server_error"
    assert SECRET not in json.dumps(last)
    assert world.service.generations.holds == 0
    assert [record.status for record in world.recorder.records] == ["error"]


async def test_a_stream_without_end_says_so(client: httpx.AsyncClient, world: World) -> None:
    world.engine.ends = False
    *_, last = await stream(client)
    assert last["error"]["code"] == "engine_error"


async def test_the_record_is_made_before_the_client_sees_the_end(world: World) -> None:
    """Else feedback sent at once could meet an id that nobody knows yet."""
    records_at_done: list[int] = []
    app = create_app(world.service)

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def watching(message: Any) -> None:
            if b"[DONE]" in message.get("body", b""):
                records_at_done.append(len(world.recorder.records))
            await send(message)

        await app(scope, receive, watching)

    transport = httpx.ASGITransport(watched)
    await world.service.start()
    async with httpx.AsyncClient(transport=transport, base_url="http://composer") as client:
        await stream(client)
    await world.service.close()
    assert records_at_done == [1]
    assert world.recorder.records[0].status == "ok"


# --- refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_unknown_model_is_a_404(client: httpx.AsyncClient, streamed: bool) -> None:
    response = await post(client, model="nobody", stream=streamed)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


async def test_a_prompt_beyond_every_window_is_a_400(client: httpx.AsyncClient) -> None:
    response = await post(client, messages=[{"role": "user", "content": "x" * 100_000}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
    ],
)
async def test_what_no_expert_can_do_is_refused(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], param: str
) -> None:
    response = await post(client, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported"
    assert response.json()["error"]["param"] == param
    assert world.engine.calls == []


async def test_a_full_queue_is_a_503_with_retry_after(
    client: httpx.AsyncClient, world: World
) -> None:
    world.limit(in_flight=1, queue=1)
    world.engine.held = True
    one = asyncio.create_task(post(client))
    await until(lambda: world.engine.running == 1)
    two = asyncio.create_task(post(client))
    await until(lambda: world.service.scheduler.stats()["box"]["waiting"] == 1)
    refused = await post(client)
    world.engine.held = False
    assert [(await one).status_code, (await two).status_code] == [200, 200]
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "overloaded"

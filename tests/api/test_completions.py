"""POST /v1/completions, whole and streamed."""

from __future__ import annotations

from typing import Any

import httpx

from tests.api.fakes import World
from tests.api.test_chat import events


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "auto", "prompt": "hello shout", **fields}
    return await client.post("/v1/completions", json=body)


async def test_an_answer_in_openais_shape(client: httpx.AsyncClient, world: World) -> None:
    response = await post(client)
    answer = response.json()
    assert answer["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert answer["id"] == world.recorder.records[0].id
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "SHOUT: HELLO SHOUT", "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"]["total_tokens"] == 5
    assert answer["composer"]["expert"] == "shout"
    [call] = world.engine.calls
    assert call.prompt == "hello shout"
    assert call.messages == ()


async def test_one_prompt_may_come_in_a_list(client: httpx.AsyncClient) -> None:
    answer = (await post(client, prompt=["a b"])).json()
    assert answer["choices"][0]["text"] == "SHOUT: A B"


async def test_several_prompts_are_refused_with_the_remedy(client: httpx.AsyncClient) -> None:
    message = (await post(client, prompt=["a", "b"])).json()["error"]["message"]
    assert "send one request for each" in message
    message = (await post(client, prompt=[1, 2])).json()["error"]["message"]
    assert "not as token ids" in message


async def test_logprobs_in_the_older_shape(client: httpx.AsyncClient) -> None:
    logprobs = (await post(client, logprobs=1)).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["SHOUT:", " HELLO", " SHOUT"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [
            {"SHOUT:0": -9999.0, "SHOUT:": -0.5},
            {" HELLO0": -9999.0, " HELLO": -0.5},
            {" SHOUT0": -9999.0, " SHOUT": -0.5},
        ],
        "text_offset": [0, 6, 12],
    }
    logprobs = (await post(client, logprobs=0)).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] is None
    assert logprobs["tokens"] == ["SHOUT:", " HELLO", " SHOUT"]


async def test_a_stream_is_the_whole_answer_in_parts(client: httpx.AsyncClient) -> None:
    response = await post(client, stream=True, logprobs=0, n=2)
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    for index in (0, 1):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == "SHOUT: HELLO SHOUT"
        assert [c["finish_reason"] for c in own] == [None, None, None, "stop"]
        offsets = [c["logprobs"]["text_offset"] for c in own if c["logprobs"]]
        assert offsets == [[0], [6], [12]]
    assert chunks[-1]["composer"]["expert"] == "shout"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


async def test_stop_and_length(client: httpx.AsyncClient) -> None:
    choice = (await post(client, stop=" SHOUT")).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("SHOUT: HELLO", "stop")
    choice = (await post(client, max_tokens=1)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("SHOUT:", "length")

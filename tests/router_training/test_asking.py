"""Experts asked over the wire: what is waited out, what is given up, what is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from router_training.asking import Endpoint, How, Said
from router_training.errors import AskError, AskFailed, AskRefused

HELLO: Any = [{"role": "user", "content": "hello"}]
MODELS = {"data": [{"id": "auto", "composer": {"kind": "policy"}},
                   {"id": "poet", "composer": {"kind": "expert"}}]}  # fmt: skip
ANSWER = {
    "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    "composer": {"cost_usd": 0.5},
}

Handler = Callable[[httpx.Request], httpx.Response]


def endpoint(handler: Handler, **settings: Any) -> Endpoint:
    return Endpoint("http://there/v1/", transport=httpx.MockTransport(handler), **settings)


def replies(*responses: httpx.Response | Exception) -> tuple[Handler, list[httpx.Request]]:
    """One after the other, the last for ever."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        reply = responses[min(len(seen), len(responses)) - 1]
        if isinstance(reply, Exception):
            raise reply
        return reply

    return handler, seen


def refusal(status: int, message: str = "no", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}}, headers=headers)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is slept; no time passes."""
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(0)

    monkeypatch.setattr("router_training.asking.asyncio.sleep", sleep)
    return slept


async def test_what_is_sent_and_what_is_read() -> None:
    handler, seen = replies(httpx.Response(200, json=MODELS), httpx.Response(200, json=ANSWER))
    how = How(max_tokens=7, more={"seed": 1})
    async with endpoint(handler, api_key="secret", how=how) as ask:
        assert await ask.check([]) == ("poet",)
        assert await ask("poet", HELLO) == Said("hi", "stop", 3, 1, 0.5)
    assert seen[0].url == "http://there/v1/models"
    assert seen[1].headers["authorization"] == "Bearer secret"
    body = httpx.Response(200, content=seen[1].content).json()
    assert body == {
        "model": "poet",
        "messages": HELLO,
        "temperature": 0.0,
        "max_tokens": 7,
        "seed": 1,
        "composer": {"priority": "batch"},
    }


async def test_whose_answers_they_are() -> None:
    told = {"id": "poet", "composer": {"kind": "expert", "revision": "ab12"}}
    async with endpoint(replies(httpx.Response(200, json={"data": [told]}))[0]) as ask:
        await ask.check([])
        assert ask.source("poet") == "revision ab12"  # at any address
    async with endpoint(replies(httpx.Response(200, json=MODELS))[0]) as ask:
        await ask.check([])
        assert ask.source("poet") == "http://there"


async def test_somebody_elses_service_is_told_nothing_of_ours() -> None:
    foreign = {"choices": [{"message": {"content": None}}], "usage": None}
    handler, seen = replies(
        httpx.Response(200, json={"data": [{"id": "gpt"}]}), httpx.Response(200, json=foreign)
    )
    async with endpoint(handler) as ask:
        assert await ask.check(["gpt"]) == ("gpt",)
        assert await ask("gpt", HELLO) == Said("")
    assert b"composer" not in seen[1].content


@pytest.mark.parametrize("status", [429, 503])
async def test_a_full_service_is_waited_for_as_long_as_it_says(
    status: int, pauses: list[float]
) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    handler, seen = replies(
        refusal(status, **{"retry-after": "7"}),
        refusal(status, **{"retry-after": later}),
        refusal(status),
        httpx.Response(200, json=ANSWER),
    )
    async with endpoint(handler) as ask:
        assert (await ask("poet", HELLO)).text == "hi"
    assert len(seen) == 4
    assert pauses[0] == 7
    assert 80 < pauses[1] <= 90
    assert 2 <= pauses[2] <= 4


async def test_not_for_ever(pauses: list[float]) -> None:
    handler, seen = replies(refusal(503, "full", **{"retry-after": "30"}))
    async with endpoint(handler, wait_s=20) as ask:
        with pytest.raises(AskFailed, match=r"'poet' fails \(status 503\): full"):
            await ask("poet", HELLO)
    assert len(seen) == 1
    assert pauses == []


@pytest.mark.parametrize("status", [502, 408, 409])
async def test_a_fault_is_tried_twice_more(status: int, pauses: list[float]) -> None:
    handler, seen = replies(refusal(status, "broke"))
    async with endpoint(handler) as ask:
        with pytest.raises(AskFailed, match="broke"):
            await ask("poet", HELLO)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (refusal(400, "too long"), AskRefused, r"status 400\): too long"),
        (refusal(403, "not that"), AskRefused, "not that"),
        (refusal(401, "key?"), AskError, "wants another key: key"),
        (refusal(402, "no credit"), AskError, "wants to be paid: no credit"),
        (refusal(404, "no model"), AskError, "no model; see GET /v1/models"),
        (httpx.ReadTimeout("slow"), AskFailed, "did not answer within"),
        (httpx.Response(200, text="<html>"), AskFailed, "not OpenAI's chat format"),
        (httpx.Response(200, json={"choices": []}), AskFailed, "not OpenAI's chat format"),
    ],
)
async def test_what_is_not_tried_again(
    reply: Any, error: type[AskError], words: str, pauses: list[float]
) -> None:
    handler, seen = replies(reply)
    async with endpoint(handler) as ask:
        with pytest.raises(error, match=words) as raised:
            await ask("poet", HELLO)
    assert raised.type is error
    assert len(seen) == 1


async def test_a_service_that_is_restarted_is_waited_for(pauses: list[float]) -> None:
    gone = httpx.ConnectError("refused")
    handler, _ = replies(gone, gone, httpx.Response(200, json=ANSWER))
    async with endpoint(handler) as ask:
        assert (await ask("poet", HELLO)).text == "hi"
    handler, _ = replies(gone)
    async with endpoint(handler, wait_s=0) as ask:
        with pytest.raises(AskError, match="start it") as raised:
            await ask("poet", HELLO)
    assert raised.type is AskError


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (httpx.ConnectError("refused"), r"no service answers at http://there \(refused\)"),
        (httpx.Response(404, text="a page"), "there: a page"),
        (httpx.Response(500, text="a page"), "status 500: a page; name the address"),
        (httpx.Response(200, text="a page"), "no list of models"),
        (httpx.Response(200, json=[1]), "no list of models"),
        (httpx.Response(200, json={"data": []}), "has no experts"),
        (refusal(401, "who?"), "wants another key"),
    ],
)
async def test_nobody_there_is_said_at_once(reply: Any, words: str) -> None:
    async with endpoint(replies(reply)[0]) as ask:
        with pytest.raises(AskError, match=words):
            await ask.check([])


async def test_an_unknown_expert_is_named_beside_those_there() -> None:
    async with endpoint(replies(httpx.Response(200, json=MODELS))[0]) as ask:
        with pytest.raises(AskError, match="has no expert bard; it has: poet"):
            await ask.check(["poet", "bard"])


@pytest.mark.parametrize("url", ["", "there:8000", "ftp://there", "http://there:port"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(AskError, match="is no address"):
        Endpoint(url)

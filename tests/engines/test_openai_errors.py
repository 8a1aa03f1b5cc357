"""Foreign errors become ours at one boundary, all of them."""

from __future__ import annotations

import asyncio
import inspect

import httpx
import pytest

from composer.engines.http import (
    AT_FAULT,
    GONE,
    Flight,
    UnknownUpstreamModel,
    refusal,
    translated,
)
from composer.errors import (
    ContextTooLong,
    EngineError,
    EngineMisconfigured,
    EngineRefused,
    EngineUnavailable,
    Overloaded,
    RequestError,
    Unsupported,
)

HTTPX = [
    thing
    for name in httpx.__all__
    if inspect.isclass(thing := getattr(httpx, name)) and issubclass(thing, Exception)
]


def made(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "words")
    return error


@pytest.mark.parametrize("kind", HTTPX, ids=lambda kind: kind.__name__)
def test_every_error_of_httpx_is_translated(kind: type[Exception]) -> None:
    if kind in (httpx.HTTPError, httpx.RequestError, httpx.TransportError):
        # Never raised themselves, and every error below them stands in the table.
        below = [other for other in HTTPX if issubclass(other, kind) and other is not kind]
        assert below
        return
    if kind is httpx.ProtocolError:
        assert {httpx.LocalProtocolError, httpx.RemoteProtocolError} <= set(kind.__subclasses__())
        return
    assert issubclass(kind, GONE) != issubclass(kind, AT_FAULT)
    with pytest.raises(EngineError, match=kind.__name__) as caught, translated("s"):
        raise made(kind)
    assert isinstance(caught.value, EngineUnavailable) == issubclass(kind, GONE)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), translated("s"):
        raise ZeroDivisionError


def body(message: str, **more: object) -> dict[str, object]:
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (400, body("temperature must be non-negative", param="temperature"), RequestError),
        (400, body("This model's maximum context length is 512 tokens."), ContextTooLong),
        (400, body("max_tokens=600 cannot be greater than max_model_len=512."), ContextTooLong),
        (400, body("too big", code="context_length_exceeded"), ContextTooLong),
        (422, body("no"), RequestError),
        (501, body("beam search"), Unsupported),
        (401, {"error": "Unauthorized"}, EngineMisconfigured),
        (403, "go away", EngineRefused),
        (404, body("The model `x` does not exist."), UnknownUpstreamModel),
        (404, {"detail": "Not Found"}, UnknownUpstreamModel),
        (429, body("slow down"), Overloaded),
        (500, body("oops"), EngineError),
        (500, body("EngineCore encountered an issue."), EngineUnavailable),
        (502, "<html>", EngineUnavailable),
        (503, body("loading"), EngineUnavailable),
        (302, "", EngineError),
    ],
)
def test_refusals(status: int, said: object, kind: type[Exception]) -> None:
    error = refusal("s", status, said, key_hint="set KEY")
    assert type(error) is kind
    assert ("set KEY" in str(error)) == (status == 401)
    if status == 400 and "temperature" in str(said):
        assert isinstance(error, RequestError)
        assert error.param == "temperature"


@pytest.mark.parametrize(
    ("status", "headers"), [(429, {}), (503, {"retry-after": "3"}), (401, {}), (403, {})]
)
def test_what_callers_read_of_a_refusal_is_ours_and_the_log_has_the_servers_words(
    status: int, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = "organisation org-77 has used up its quota"
    error = refusal("s", status, body(theirs), headers, key_hint="set KEY")
    assert "org-77" not in str(error)
    assert "'s'" in str(error)
    assert str(status) in str(error)
    assert theirs in caplog.text


def test_retry_after() -> None:
    def after(status: int, value: str) -> float:
        error = refusal("s", status, "", {"retry-after": value})
        assert isinstance(error, Overloaded)
        return error.retry_after

    assert after(429, "7") == 7.0
    assert after(503, "2.5") == 2.5
    assert after(429, "-3") == 0.0
    assert after(429, "soon") == 1.0
    assert after(503, "Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert after(503, "Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


async def test_a_flight_ends_by_its_limit_or_from_outside() -> None:
    clock = asyncio.get_running_loop().time
    flight = Flight("s")
    assert await flight.wait(asyncio.sleep(0, "done"), clock() + 60, "x") == "done"
    with pytest.raises(EngineError, match="took too long: no token"):
        await flight.wait(asyncio.Event().wait(), clock(), "no token")
    waiting = asyncio.create_task(flight.wait(asyncio.Event().wait(), clock() + 60, "x"))
    await asyncio.sleep(0)
    flight.end("was stopped")
    with pytest.raises(EngineUnavailable, match="'s' was stopped"):
        await waiting
    with pytest.raises(EngineUnavailable, match="was stopped"):
        await flight.wait(asyncio.Event().wait(), clock() + 60, "x")


async def test_a_flight_may_be_ended_while_it_ends() -> None:
    """By its own limit, or by an earlier word: a stop must not fail of it."""

    async def slow_to_go() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.02)
            raise

    clock = asyncio.get_running_loop().time
    for until in (clock(), clock() + 60):
        flight = Flight("s")
        waiting = asyncio.create_task(flight.wait(slow_to_go(), until, "no token"))
        await asyncio.sleep(0)
        if until > clock():
            flight.end("was stopped")
        await asyncio.sleep(0.01)
        flight.end("was closed")
        with pytest.raises(EngineUnavailable, match="was closed"):
            await waiting

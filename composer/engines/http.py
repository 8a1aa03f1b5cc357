"""One HTTP server as the engines see it: a pooled client, a limit for each wait, and the one place
where httpx's errors and a server's refusals become ours. Knows nothing of models or adapters."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, TypeVar

import httpx
import orjson
from pydantic import BaseModel, ConfigDict, Field

from composer.errors import (
    ComposerError,
    ContextTooLong,
    EngineError,
    EngineMisconfigured,
    EngineRefused,
    EngineUnavailable,
    Overloaded,
    RequestError,
    Unsupported,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

KEEP_IDLE_S = 2.0
"""Uvicorn closes an idle connection after 5 s; one reused at that moment would look like a server
that died."""


class Timeouts(BaseModel):
    """In seconds. `first_token_s` counts from the request's sending (so the server's own queue and
    the prefill are in it), `answer_s` is for an answer that is sent whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect_s: Seconds = 5.0
    first_token_s: Seconds = 300.0
    between_tokens_s: Seconds = 60.0
    answer_s: Seconds = 900.0


class UnknownUpstreamModel(EngineError):
    """The server does not know the model (any more) that it was asked for."""


# --- foreign errors ------------------------------------------------------------------------

GONE: tuple[type[Exception], ...] = (
    httpx.TimeoutException,
    httpx.NetworkError,
    httpx.RemoteProtocolError,
    httpx.ProxyError,
)
"""The server is not there (any more): another attempt may succeed once it is back."""

AT_FAULT: tuple[type[Exception], ...] = (
    httpx.LocalProtocolError,
    httpx.UnsupportedProtocol,
    httpx.DecodingError,
    httpx.TooManyRedirects,
    httpx.HTTPStatusError,
    httpx.InvalidURL,
    httpx.CookieConflict,
    httpx.StreamError,
)
"""It is there and what it sends, or what we sent, is wrong: the same again would fail again."""


@contextmanager
def translated(server: str) -> Iterator[None]:
    """httpx's errors as EngineUnavailable or EngineError."""
    try:
        yield
    except GONE as error:
        raise EngineUnavailable(f"server {server!r} is not there: {_named(error)}") from error
    except AT_FAULT as error:
        raise EngineError(f"server {server!r} failed: {_named(error)}") from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# --- a wait that ends ------------------------------------------------------------------------


class Flight:
    """One call under way. Each of its waits has a limit, and `end` ends it from outside."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._waiting: asyncio.Timeout | None = None
        self._ended: str | None = None

    def end(self, why: str) -> None:
        """What it waits for now, or next, raises EngineUnavailable."""
        self._ended = why
        if self._waiting is not None and not self._waiting.expired():  # else it ends by itself
            self._waiting.reschedule(0.0)

    async def wait(self, awaited: Awaitable[T], until: float, phase: str) -> T:
        """`until` is on the loop's clock. Raises EngineError naming the phase when it is over."""
        try:
            async with asyncio.timeout_at(until if self._ended is None else 0.0) as waiting:
                self._waiting = waiting
                return await awaited
        except TimeoutError:
            if self._ended is not None:
                raise EngineUnavailable(f"server {self._server!r} {self._ended}") from None
            raise EngineError(f"server {self._server!r} took too long: {phase}") from None
        finally:
            self._waiting = None


# --- the client ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. `body` is the decoded JSON, or the text where it is none."""

    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class Client:
    """A pool of connections to one server. `url()` is asked at each request, since a server of
    ours has a new port at each start. The environment's proxies are not used: adapters' paths and
    keys go to no one else."""

    def __init__(
        self,
        server: str,
        url: Callable[[], str],
        timeouts: Timeouts,
        *,
        key: Callable[[], str | None],
        in_flight: int,
        tls: bool,
    ) -> None:
        """`tls` False: its URLs are http alone, so no certificates are read (50 ms)."""
        self.server = server
        self.timeouts = timeouts
        self._url = url
        self._key = key
        self._http = httpx.AsyncClient(
            # Waits for an answer are limited by phase, by `Flight`.
            timeout=httpx.Timeout(None, connect=timeouts.connect_s),
            limits=httpx.Limits(
                max_connections=None,  # the leases bound them
                max_keepalive_connections=in_flight + 8,
                keepalive_expiry=KEEP_IDLE_S,
            ),
            trust_env=False,
            verify=tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # which trusts nobody
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        limit_s: float,
        phase: str,
        flight: Flight | None = None,
        request_id: str = "",
    ) -> Reply:
        """One request, its answer whole, whatever its status; `path` is below the base URL, or a
        URL itself. Raises EngineUnavailable, EngineError when it takes longer than `limit_s`
        seconds."""
        flight = flight or Flight(self.server)
        request = self._request(method, path, body, request_id)
        until = asyncio.get_running_loop().time() + limit_s
        limit = f"{phase} in {limit_s:g} s"
        with translated(self.server):
            response = await flight.wait(self._http.send(request), until, f"no {limit}")
        return Reply(response.status_code, decoded(response.content), response.headers)

    @asynccontextmanager
    async def stream(
        self, path: str, body: Any, *, flight: Flight, until: float, phase: str, request_id: str
    ) -> AsyncGenerator[httpx.Response, None]:
        """The response once its headers are there; leaving closes the connection unless all has
        been read. To be used inside `translated`."""
        request = self._request("POST", path, body, request_id)
        response = await flight.wait(self._http.send(request, stream=True), until, phase)
        try:
            yield response
        finally:
            await response.aclose()

    def _request(self, method: str, path: str, body: Any, request_id: str) -> httpx.Request:
        headers = {"accept-encoding": "identity"}
        if (key := self._key()) is not None:
            headers["authorization"] = f"Bearer {key}"
        if request_id:
            headers["x-request-id"] = re.sub(r"[^\w./-]", "_", request_id, flags=re.ASCII)
        content = None
        if body is not None:
            headers["content-type"] = "application/json"
            content = orjson.dumps(body)
        with translated(self.server):
            url = path if path.startswith("http") else self._url() + path
            return self._http.build_request(method, url, content=content, headers=headers)


def decoded(content: bytes) -> Any:
    """JSON, or the text where it is none."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return content.decode(errors="replace")


# --- refusals --------------------------------------------------------------------------------

_TOO_LONG = re.compile(
    r"context[ _]length|context window|max_model_len|maximum.{0,20} tokens|too many tokens", re.I
)
_ENGINE_DEAD = "EngineCore encountered an issue"  # vLLM's API server, when its engine has died


def refusal(
    server: str,
    status: int,
    body: Any,
    headers: Mapping[str, str] | None = None,
    *,
    key_hint: str = "",
) -> ComposerError:
    """The error for an answer that is none, by OpenAI's and vLLM's conventions. `key_hint` says
    where the key comes from. What callers may read of it has the server's words only where these
    are about the request; the others go to the log."""
    message, param, code = _said(body)
    told = f"server {server!r} answered {status}: {message}"
    if status in (400, 413, 422):
        if code == "context_length_exceeded" or _TOO_LONG.search(message):
            return ContextTooLong(message, param=param)
        return RequestError(message, param=param)
    if status == 501:
        return Unsupported(message, param=param)
    if status == 403:  # of the request, by gateways: its words, the model, where it comes from
        log.warning(told)
        return forbidden(server, status)
    if status == 401:
        log.warning(told)
        hint = key_hint or "it wants another API key"
        return EngineMisconfigured(f"server {server!r} answered {status}: {hint}")
    if status == 404:
        return UnknownUpstreamModel(told)
    after = retry_after(headers or {})
    if status == 429 or (status == 503 and after is not None):
        log.warning(told)
        return Overloaded(
            f"server {server!r} takes no more calls now (it answered {status}); try again later",
            retry_after=after if after is not None else 1.0,
        )
    if status in (502, 503, 504) or _ENGINE_DEAD in message:
        return EngineUnavailable(told)
    return EngineError(told)


def forbidden(server: str, status: int) -> EngineRefused:
    return EngineRefused(
        f"server {server!r} refuses this request (it answered {status}); change the request, or "
        "ask another expert"
    )


def _said(body: Any) -> tuple[str, str | None, str | None]:
    """Message, param and code of an error body; servers differ in how they nest them."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:2000], None, None
    message = error.get("message") or error.get("detail") or error
    param, code = error.get("param"), error.get("code")
    return (
        str(message)[:2000],
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """In seconds from now; RFC 9110, section 10.2.3, allows a number or a date."""
    written = headers.get("retry-after")
    if written is None:
        return None
    try:
        return max(float(written), 0.0)
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(written)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max((when - datetime.fromtimestamp(time.time(), UTC)).total_seconds(), 0.0)

"""One call on one OpenAI-compatible server, whole or streamed. Knows nothing of adapters, of
processes, or of how the server came to be there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import httpx

from composer.engines.http import Client, Flight, Reply, Timeouts, decoded, refusal, translated
from composer.engines.keys import key_hint
from composer.engines.openai_wire import StreamReader, path_of, whole
from composer.engines.sse import EventSplitter, TooLong
from composer.errors import ContextTooLong, EngineError
from composer.types import Call, Chunk

AFTER_END_S = 0.5
"""How long the end of a stream is waited for after its `[DONE]`, so that its connection can be
used again."""


class Upstream:
    """Calls on one server. `url()` is its base, ending in `/v1`; `key_variable` is the environment
    variable that its operator corrects where it wants another key."""

    def __init__(
        self,
        server: str,
        url: Callable[[], str],
        timeouts: Timeouts,
        *,
        key: Callable[[], str | None],
        key_variable: str | None,
        in_flight: int,
        tls: bool,
    ) -> None:
        self.client = Client(server, url, timeouts, key=key, in_flight=in_flight, tls=tls)
        self._server = server
        self._timeouts = timeouts
        self._key_hint = key_hint(key_variable)
        self._flights: set[Flight] = set()

    @contextmanager
    def flight(self) -> Iterator[Flight]:
        """A call's waits, from its first to its last."""
        flight = Flight(self._server)
        self._flights.add(flight)
        try:
            yield flight
        finally:
            self._flights.discard(flight)

    def end_all(self, why: str) -> None:
        """Every running call raises EngineUnavailable: "server '…' {why}"."""
        for flight in self._flights:
            flight.end(why)

    async def close(self) -> None:
        self.end_all("was closed")
        await self.client.close()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        limit_s: float | None = None,
        flight: Flight | None = None,
    ) -> Reply:
        """A question about the server itself; `limit_s` None: that for an answer's beginning."""
        limit_s = self._timeouts.first_token_s if limit_s is None else limit_s
        return await self.client.ask(
            method,
            path,
            body,
            limit_s=limit_s,
            phase=f"answer to {method} {path}",
            flight=flight,
        )

    async def demand(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        limit_s: float | None = None,
        flight: Flight | None = None,
    ) -> Any:
        """The same, where anything but success is an error."""
        reply = await self.ask(method, path, body, limit_s=limit_s, flight=flight)
        if not reply.ok:
            raise self._refusal(reply.status, reply.body, reply.headers)
        return reply.body

    async def answer(
        self, call: Call, body: Mapping[str, Any], flight: Flight
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to `body`, which `call` was made into. A `max_tokens` that is only the
        expert's default and does not fit is left out: the server then uses the room there is."""
        way = self._streamed if call.stream else self._whole
        limits = ("max_tokens", "max_completion_tokens")
        begun = False
        for may_clip in (not call.max_tokens_asked, False):
            try:
                async with aclosing(way(call, body, flight)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except ContextTooLong:
                if begun or not may_clip or not any(name in body for name in limits):
                    raise
                body = {name: value for name, value in body.items() if name not in limits}

    async def _whole(
        self, call: Call, body: Mapping[str, Any], flight: Flight
    ) -> AsyncGenerator[Chunk, None]:
        reply = await self.client.ask(
            "POST",
            path_of(call),
            body,
            limit_s=self._timeouts.answer_s,
            phase="whole answer (answer_s)",
            flight=flight,
            request_id=_request_id(call),
        )
        if not reply.ok:
            raise self._refusal(reply.status, reply.body, reply.headers)
        for chunk in whole(self._server, call, reply.body):
            yield chunk

    async def _streamed(
        self, call: Call, body: Mapping[str, Any], flight: Flight
    ) -> AsyncGenerator[Chunk, None]:
        limits = self._timeouts
        clock = asyncio.get_running_loop().time
        first = f"no first token in {limits.first_token_s:g} s (first_token_s)"
        next_ = f"no token in {limits.between_tokens_s:g} s after another (between_tokens_s)"
        begun, until = False, clock() + limits.first_token_s
        reader, splitter = StreamReader(self._server, call), EventSplitter()
        with translated(self._server):
            async with self.client.stream(
                path_of(call),
                body,
                flight=flight,
                until=until,
                phase=first,
                request_id=_request_id(call),
            ) as response:
                await self._must_stream(response, flight, until, first)
                received = response.aiter_bytes()
                while not reader.done:
                    data = await flight.wait(_next(received), until, next_ if begun else first)
                    if data is None:
                        break
                    events = self._split(splitter, data)
                    for event in events:
                        for chunk in reader.read(event):
                            yield chunk
                    if events:  # a comment that keeps the connection alive is no token
                        begun, until = True, clock() + limits.between_tokens_s
                for chunk in reader.last():
                    yield chunk
                await _to_the_end(received)

    async def _must_stream(
        self, response: httpx.Response, flight: Flight, until: float, phase: str
    ) -> None:
        kind = response.headers.get("content-type", "")
        if response.is_success and kind.startswith("text/event-stream"):
            return
        await flight.wait(response.aread(), until, phase)
        body = decoded(response.content)
        if response.is_success:
            raise EngineError(
                f"server {self._server!r} was asked for a stream and sent {kind or 'something'}: "
                f"{body!r:.500}"
            )
        raise self._refusal(response.status_code, body, response.headers)

    def _split(self, splitter: EventSplitter, data: bytes) -> list[bytes]:
        try:
            return splitter.feed(data)
        except TooLong as error:
            raise EngineError(f"server {self._server!r} sent {error}") from None

    def _refusal(self, status: int, body: Any, headers: Mapping[str, str]) -> Exception:
        return refusal(self._server, status, body, headers, key_hint=self._key_hint)


def _request_id(call: Call) -> str:
    """vLLM answers under `chatcmpl-<X-Request-Id>` or `cmpl-…`: of a call that is handed on, so
    that both sides know the answer by one id."""
    if call.forward is None:
        return call.id
    return call.forward.id.removeprefix("chatcmpl-").removeprefix("cmpl-")


async def _next(received: AsyncIterator[bytes]) -> bytes | None:
    return await anext(received, None)


async def _to_the_end(received: AsyncIterator[bytes]) -> None:
    try:
        async with asyncio.timeout(AFTER_END_S):
            async for _ in received:
                pass
    except (TimeoutError, httpx.HTTPError):
        pass  # the answer is complete: the connection is closed instead

"""One answer as one HTTP response, streamed or whole. Knows nothing about OpenAI's fields.

The whole way, decision included, runs in one task that is cancelled when the client leaves;
nothing is sent before the first chunk is there, so that an error until then is a real status.

A stream's events, in order: per choice an opening (chat only), texts, one ending; the last
choice's ending comes when all is done and carries the `composer` field; with
`stream_options.include_usage` one more without choices, which carries `composer` too; `[DONE]`.
`composer` rides on a chunk that has a choice because many clients read `choices[0]` of every
chunk. An error after the first byte is an event with `error`, and no `[DONE]` follows.

Events that come ready from the expert's server (`Chunk.raw`) are sent as they are, undecoded; to
the one that ends the last choice `composer` is added as bytes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import logged
from api.responses import DONE, Json, event, with_field
from api.wire import Wire, answered_by, beside, collect, composer_body, usage_body
from composer.errors import EngineError
from composer.pipeline import Answer, Pipeline
from composer.types import Chunk, Request

log = logging.getLogger(__name__)

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is left to answer."""


class Answering(Response):
    """`request.id` is the response id: the request's id behind the wire's prefix."""

    def __init__(
        self, pipeline: Pipeline, request: Request, wire: Wire, *, include_usage: bool
    ) -> None:
        super().__init__()
        self._pipeline = pipeline
        self._request = request
        self._wire = wire
        self._include_usage = include_usage
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            if self._request.stream:
                await unless_gone(receive, self._stream(scope, send))
            else:
                response = await unless_gone(receive, self._whole())
                await response(scope, receive, send)

    # --- whole ---------------------------------------------------------------------------

    async def _whole(self) -> Response:
        answer = await self._pipeline.answer(self._request)
        body = await whole(answer, self._request, self._wire, self._created)
        return Json(body, headers=_headers(answer))

    # --- streamed ------------------------------------------------------------------------

    async def _stream(self, scope: Scope, send: Send) -> None:
        async with await self._pipeline.answer(self._request) as answer, _each(answer) as chunks:
            first = await anext(chunks, None)
            if first is None:
                raise EngineError("the answer ended before it began")
            await _start(send, _headers(answer))
            try:
                await self._events(answer, first, chunks, send)
            except Exception as error:
                # The status line is out; the error is the stream's last event instead.
                wire = logged(error, scope["state"]["request_id"])
                await _send(send, event(wire.body))
            await _send(send, b"", more=False)

    async def _events(
        self, answer: Answer, first: Chunk, chunks: AsyncGenerator[Chunk, None], send: Send
    ) -> None:
        head = self._head(answer, self._wire.part)
        if self._include_usage:
            head["usage"] = None
        opened: set[int] = set()
        ended: set[int] = set()
        held = b""

        chunk: Chunk | None = first
        while chunk is not None:
            out: list[bytes] = []
            if chunk.raw is not None:
                opened.add(chunk.index)
                out.append(chunk.raw)
            else:
                parts = self._parts(chunk, opened)
                out += [event(head | {"choices": [part]}) for part in parts]
            if chunk.finish_reason is not None:
                ended.add(chunk.index)
                if len(ended) == self._request.sampling.n and not held:
                    held = out.pop()  # the last choice's ending waits for `composer`
            if out:
                await _send(send, b"".join(out))
            chunk = await anext(chunks, None)

        if not held:
            raise EngineError(f"the answer ended with {len(ended)} of its choices finished")
        # Closed, and so recorded, before the client can know the end and send feedback.
        await answer.aclose()
        body = composer_body(answer.outcome)
        tail = with_field(held, "composer", body)
        if self._include_usage:
            usage = {"choices": [], "usage": usage_body(answer.outcome.usage), "composer": body}
            tail += event(head | usage)
        await _send(send, tail + DONE)

    def _parts(self, chunk: Chunk, opened: set[int]) -> Iterator[dict[str, Any]]:
        """The choices of the events that a chunk makes: one event each."""
        if chunk.index not in opened:
            opened.add(chunk.index)
            opening = self._wire.opening(chunk.index)
            if opening is not None:
                yield opening
        if chunk.text or chunk.logprobs or chunk.delta:
            yield self._wire.piece(chunk)
        if chunk.finish_reason is not None:
            yield self._wire.ending(chunk.index, chunk.finish_reason)

    def _head(self, answer: Answer, kind: str) -> dict[str, Any]:
        return _head(answer, self._request, kind, self._created)


async def whole(answer: Answer, request: Request, wire: Wire, created: int) -> dict[str, Any]:
    """The body of an answer that is not streamed; closes it. `created` is in Unix seconds."""
    async with answer, _each(answer) as chunks:
        seen = [chunk async for chunk in chunks]
        choices = collect(seen, request.sampling.n)
    return _head(answer, request, wire.whole, created) | {
        "choices": [wire.choice(i, choice) for i, choice in enumerate(choices)],
        "usage": usage_body(answer.outcome.usage),
        "composer": composer_body(answer.outcome),
        **beside(choices),
    }


def _head(answer: Answer, request: Request, kind: str, created: int) -> dict[str, Any]:
    """What every body begins with. `model` is what was asked for; who answered is in
    `composer`. The fingerprint is the catalog's: equal ones mean equal experts."""
    outcome = answer.outcome
    assert outcome.plan is not None
    return {
        "id": request.id,
        "object": kind,
        "created": created,
        "model": request.model or outcome.plan.policy,
        "system_fingerprint": f"fp_{outcome.catalog_digest.removeprefix('sha256:')[:12]}",
    }


def _each(answer: Answer) -> aclosing[AsyncGenerator[Chunk, None]]:
    """The answer's chunks, ended at the exit also when they were left half-way."""
    return aclosing(aiter(answer))


def _headers(answer: Answer) -> dict[str, str]:
    return {
        "x-composer-expert": answered_by(answer.outcome),
        "x-composer-decision-ms": f"{answer.outcome.timings.decision_ms:.3f}",
    }


async def _start(send: Send, headers: dict[str, str]) -> None:
    streaming = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",  # nginx would hold the events back
    }
    raw = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in (streaming | headers).items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns or raises. When the client leaves first, the work is cancelled,
    its clean-up awaited, and ClientGone raised. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        running = [one for one in (task, gone) if not one.done()]
        for one in running:
            one.cancel()
        for left in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(left, Exception):
                log.error("cleaning up after a client that left failed", exc_info=left)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

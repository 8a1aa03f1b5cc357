"""One call of one expert, from the request's words to the engine's chunks, a lease in between.

Knows nothing of plans, strategies or records.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any

from composer.engines.base import Engine
from composer.errors import EngineError, EngineUnavailable
from composer.prompting import render
from composer.scheduling.base import Scheduler
from composer.types import (
    Call,
    Chunk,
    Expert,
    Message,
    Request,
    Sampling,
    user_texts,
)

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 10
"""Of one call on a server that keeps going away: beyond it, the server is at fault for good."""


class CallRun:
    """One call until it has been answered. While nothing has come of it, a server that is lost
    is waited for, within the call's bound: what was asked can be asked again. Times are in
    milliseconds, over all attempts; `uncounted`: it ran, and no usage came."""

    def __init__(self, scheduler: Scheduler, call: Call, entry: dict[str, Any]) -> None:
        self._scheduler = scheduler
        self._call = call
        self._entry = entry
        self.queue_ms = 0.0
        self.run_ms = 0.0
        self.uncounted = False

    async def chunks(self, engine: Engine) -> AsyncGenerator[Chunk, None]:
        while True:
            lease = await self._scheduler.acquire(self._call)
            self._entry["queue_ms"] = round(self.queue_ms + lease.queue_s * 1000, 3)
            self.queue_ms += lease.queue_s * 1000
            begun, began, lost = perf_counter(), False, False
            self.uncounted = True
            try:
                unfinished = set(range(self._call.sampling.n))
                async with aclosing(engine.run(self._call)) as chunks:
                    async for chunk in chunks:
                        began = True
                        if chunk.finish_reason is not None:
                            unfinished.discard(chunk.index)
                        if chunk.usage is not None:
                            self.uncounted = False
                        yield chunk
                if unfinished:
                    raise EngineError(
                        f"server {self._call.server!r} broke off without a finish reason"
                    )
                return
            except EngineUnavailable as error:
                lost = True
                attempts = self._entry.get("attempts", 1)
                if began or attempts == MOST_ATTEMPTS:
                    raise
                self._entry["attempts"] = attempts + 1
                log.warning("call %s will be tried again: %s", self._call.id, error)
            finally:
                self._scheduler.release(lease, lost=lost)
                self.run_ms += (perf_counter() - begun) * 1000
                self._entry["run_ms"] = round(self.run_ms, 3)


def call_of(
    request: Request,
    expert: Expert,
    *,
    number: int,
    messages: Sequence[Message] | None,
    sampling: Sampling,
) -> Call:
    """The call as the engine sees it: the expert's prompt template, if any, is filled here.

    A template reads the prompt or the last user message, and one before it where that has no
    input ("and backwards?"); nothing else of the conversation is sent, because an expert that needs
    a template knows none. The filled template is always sent as a message: it is the form the
    expert was trained on, also where a raw prompt was given.
    """
    prompt = request.prompt if messages is None else None
    chat: tuple[Message, ...] = tuple(messages) if messages is not None else request.messages
    if expert.prompt is not None:
        *earlier, text = user_texts(chat) if prompt is None else (prompt,)
        filled = render(expert.prompt, text, earlier)
        chat, prompt = ({"role": "user", "content": filled},), None
    return Call(
        id=f"{request.id}/{number}",
        expert=expert.id,
        server=expert.server,
        adapter=expert.adapter,
        messages=chat if prompt is None else (),
        prompt=prompt,
        sampling=sampling.with_defaults(expert.sampling),
        context_window=expert.context_window,
        extra=request.extra,
        max_tokens_asked=sampling.max_tokens is not None,
        stream=request.stream,
        priority=request.priority,
        gates=request.gates,
    )

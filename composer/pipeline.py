"""The way of a request: filter → score → choose → strategy → record, on one screen.

Names no concrete router, strategy, engine or store, and knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from composer.errors import ComposerError, EngineError, UnknownModel, Unsupported
from composer.generations import Generation, Generations, Hold, Way
from composer.prompting import render
from composer.routing.base import Query
from composer.routing.choose import choose
from composer.scheduling.base import Scheduler
from composer.types import (
    Ask,
    Call,
    Choice,
    Chunk,
    Expert,
    Message,
    Plan,
    Request,
    Sampling,
    Timings,
    Usage,
    message_text,
)

log = logging.getLogger(__name__)


class Pipeline:
    """Answers requests under the current generation.

    `ended` is called once per request, whatever became of it, and must neither block nor raise.
    """

    def __init__(
        self,
        generations: Generations,
        scheduler: Scheduler,
        ended: Callable[[Outcome], None],
    ) -> None:
        self._generations = generations
        self._scheduler = scheduler
        self._ended = ended

    async def answer(self, request: Request) -> Answer:
        """Decides, and returns the answer not yet begun: the caller iterates it and closes it."""
        outcome = Outcome(request, started=perf_counter())
        hold = self._generations.hold()
        try:
            outcome.catalog_version = hold.generation.catalog.version
            outcome.catalog_digest = hold.generation.catalog.digest
            way, outcome.plan = await decide(request, hold.generation)
            outcome.timings.decision_ms = _ms_since(outcome.started)
            ask = self._ask(request, hold.generation, outcome)
            chunks = way.strategy.run(request, outcome.plan, ask)
        except BaseException as error:
            hold.release()
            outcome.end(error)
            self._ended(outcome)
            raise
        return Answer(outcome, chunks, hold, self._ended)

    def _ask(self, request: Request, generation: Generation, outcome: Outcome) -> Ask:
        timings = outcome.timings
        catalog = generation.catalog

        async def ask(
            expert: str,
            *,
            messages: Sequence[Message] | None = None,
            sampling: Sampling | None = None,
        ) -> AsyncGenerator[Chunk, None]:
            call = call_of(
                request,
                catalog.experts[expert],
                number=len(timings.calls),
                messages=messages,
                sampling=sampling or request.sampling,
            )
            entry: dict[str, object] = {"id": call.id, "expert": expert}
            timings.calls.append(entry)
            lease = await self._scheduler.acquire(call)
            begun = perf_counter()
            counted = False
            try:
                entry["queue_ms"] = round(lease.queue_s * 1000, 3)
                timings.queue_ms += lease.queue_s * 1000
                unfinished = set(range(call.sampling.n))
                async with aclosing(generation.engines[call.server].run(call)) as chunks:
                    async for chunk in chunks:
                        if chunk.finish_reason is not None:
                            unfinished.discard(chunk.index)
                        if chunk.usage is not None:
                            counted = True
                            outcome.spend(catalog.experts[expert], chunk.usage)
                        yield chunk if chunk.expert else dataclasses.replace(chunk, expert=expert)
                if unfinished:
                    raise EngineError(f"server {call.server!r} broke off without a finish reason")
            finally:
                self._scheduler.release(lease)
                if not counted:
                    outcome.cost_usd = None  # it ran, and nobody said for how many tokens
                entry["run_ms"] = round(_ms_since(begun), 3)
                timings.run_ms += _ms_since(begun)

        return ask


async def decide(request: Request, generation: Generation) -> tuple[Way, Plan]:
    """The plan for a request, nothing run. Raises RequestError when none is possible."""
    way = way_of(request, generation)
    way.strategy.check(request)
    eligible = way.eligibility.mask(request)
    if way.router is None:
        expert = way.eligibility.experts[0]
        return way, Plan(
            policy=way.policy.id,
            strategy=way.policy.strategy.name,
            choices=(Choice(expert, 1.0),),
            calls=(expert,),
            reasons={"rule": "named"},
        )
    scores = await way.router.score(Query(request.text), eligible)
    return way, choose(scores, way.cost, way.policy)


Status = Literal["running", "ok", "error", "cancelled"]


@dataclass(slots=True)
class Outcome:
    """What became of a request. `started` is on the `perf_counter` clock, in seconds."""

    request: Request
    started: float
    plan: Plan | None = None
    catalog_version: int = 0
    catalog_digest: str = ""
    timings: Timings = field(default_factory=Timings)
    usage: Usage = field(default_factory=Usage)
    experts: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    cost_usd: float | None = 0.0
    status: Status = "running"
    error: str | None = None

    def spend(self, expert: Expert, usage: Usage) -> None:
        """Adds a call's price. One unknown price makes the sum unknown: it is never guessed."""
        if self.cost_usd is not None:
            self.cost_usd = self.cost_usd + expert.cost.of(usage) if expert.cost else None

    def end(self, error: BaseException | None) -> None:
        """Settles the status. Only the first end counts."""
        if self.status != "running":
            return
        self.timings.total_ms = _ms_since(self.started)
        if error is None:
            self.status = "ok"
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.status = "cancelled"
        else:
            self.status = "error"
            self.error = error.code if isinstance(error, ComposerError) else "internal_error"


class Answer:
    """One answer on its way: iterate it once, and close it from every exit."""

    def __init__(
        self,
        outcome: Outcome,
        chunks: AsyncGenerator[Chunk, None],
        hold: Hold,
        ended: Callable[[Outcome], None],
    ) -> None:
        self.outcome = outcome
        self._chunks = chunks
        self._hold = hold
        self._ended = ended
        self._closed = False

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        outcome = self.outcome
        try:
            async for chunk in self._chunks:
                if outcome.timings.first_token_ms is None:
                    outcome.timings.first_token_ms = _ms_since(outcome.started)
                if chunk.usage is not None:
                    outcome.usage = outcome.usage + chunk.usage
                if chunk.expert and chunk.expert not in outcome.experts:
                    outcome.experts.append(chunk.expert)
                outcome.text.append(chunk.text)
                yield chunk
            outcome.end(None)
        except BaseException as error:
            outcome.end(error)
            raise

    async def aclose(self) -> None:
        """Cancels what still runs, lets the generation go and records the outcome. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._chunks.aclose()
        finally:
            self.outcome.end(asyncio.CancelledError())
            self._hold.release()
            self._ended(self.outcome)

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def way_of(request: Request, generation: Generation) -> Way:
    """The policy the request names, or the plain way to the one expert it names."""
    catalog = generation.catalog
    model = request.model or catalog.default_policy
    if model in generation.ways:
        return generation.ways[model]
    if model not in catalog.experts:
        raise UnknownModel(
            f"there is no model {model!r}; GET /v1/models lists the policies and experts",
            param="model",
        )
    if model in request.exclude:
        raise Unsupported(
            f"{model!r} is both asked for and excluded; drop one of the two",
            param="composer.exclude",
        )
    return generation.named(model)


def call_of(
    request: Request,
    expert: Expert,
    *,
    number: int,
    messages: Sequence[Message] | None,
    sampling: Sampling,
) -> Call:
    """The call as the engine sees it: the expert's prompt template, if any, is filled here.

    A template reads the prompt or the last user message; what came before it is not sent,
    because an expert that needs a template knows no conversation. The filled template is always
    sent as a message: it is the form the expert was trained on, also where a raw prompt was given.
    """
    prompt = request.prompt if messages is None else None
    chat: tuple[Message, ...] = tuple(messages) if messages is not None else request.messages
    if expert.prompt is not None:
        if prompt is None:
            prompt = message_text(
                next((m for m in reversed(chat) if m["role"] == "user"), chat[-1])
            )
        chat, prompt = ({"role": "user", "content": render(expert.prompt, prompt)},), None
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
    )


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1000

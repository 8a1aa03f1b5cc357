"""The way of a request: filter → score → choose → strategy → record, on one screen.

Names no concrete router, strategy, engine or store, and knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from composer.blending import with_whole
from composer.calling import CallRun, call_of
from composer.deciding import decide, way_of
from composer.eligibility import restricted
from composer.generations import Generation, Generations, Hold
from composer.mixing import Mixing, alone
from composer.outcome import Outcome, ms_since
from composer.routing.sessions import Sessions
from composer.scheduling.base import Scheduler
from composer.types import (
    Ask,
    Call,
    Chunk,
    Expert,
    FloatArray,
    Forward,
    Message,
    Mix,
    Plan,
    Policy,
    Request,
    Sampling,
    last_user_text,
)
from composer.weighing import weighed

log = logging.getLogger(__name__)

_NO_WISHES: Mapping[str, Any] = {"extra": {}, "stream": False, "gates": None}
"""Of a request whose call is none for its answer (tools, formats, a stream)."""

_ONE_TOKEN = Sampling(max_tokens=1, temperature=0.0)
"""Of a call that is made for what the prompt alone tells."""


class Pipeline:
    """Answers requests under the current generation.

    `ended` is called once per request, whatever became of it, and must neither block nor raise.
    """

    def __init__(
        self,
        generations: Generations,
        scheduler: Scheduler,
        ended: Callable[[Outcome], None],
        *,
        max_wait_s: float = 300.0,
        reads_text: bool = False,
        embed: Callable[[str], Awaitable[FloatArray]] | None = None,
        mixing: Mixing = alone,
    ) -> None:
        """`max_wait_s` bounds the wait for a lease where a policy says nothing; `reads_text`
        (records hold answers) keeps streams from being handed on unread; `embed` makes the unit
        vectors of texts for experts whose gate reads the request; `mixing` makes one expert of
        several."""
        self._generations = generations
        self._scheduler = scheduler
        self._ended = ended
        self._max_wait_s = max_wait_s
        self._reads_text = reads_text
        self._embed = embed
        self._mixing = mixing
        self._sessions = Sessions()

    def behind(self, scheduler: Scheduler) -> Pipeline:
        """The same pipeline, whose calls get their leases from another scheduler."""
        other = copy.copy(self)
        other._scheduler = scheduler
        return other

    async def plan(self, request: Request) -> Planned | None:
        """The decision alone, for whoever orders requests before they run. What is resident now
        says nothing about then, so it does not count. None where the decision itself takes a call,
        which is the request's own: it is made in its turn. Raises as `decide`; nothing is
        recorded."""
        started = perf_counter()
        with self._generations.hold() as generation:
            way = way_of(request, generation)
            if way.router is not None and way.router.asked is not None:
                return None
            plan = await decide(request, generation, way)
            return Planned(generation.catalog.digest, plan, ms_since(started))

    async def answer(self, request: Request, planned: Planned | None = None) -> Answer:
        """Decides, and returns the answer not yet begun: the caller iterates it and closes it.
        What was `planned` for this request stands where the catalog is still the same."""
        outcome = Outcome(request, started=perf_counter())
        hold = self._generations.hold()
        try:
            outcome.catalog_version = hold.generation.catalog.version
            outcome.catalog_digest = hold.generation.catalog.digest
            way = way_of(request, hold.generation)
            if planned is not None and planned.catalog_digest == outcome.catalog_digest:
                outcome.plan = planned.plan
                outcome.timings.decision_ms = planned.decision_ms
            else:
                outcome.session = self._sessions.of(request, way.policy)
                last = () if outcome.session is None else self._sessions.experts(outcome.session)
                ask = self._ask(request, hold.generation, way.policy, outcome, routing=True)
                outcome.plan = await decide(
                    request, hold.generation, way, self._scheduler.resident, last, ask
                )
                outcome.timings.decision_ms = ms_since(outcome.started)
            ask = self._ask(request, hold.generation, way.policy, outcome)
            chunks = way.strategy.run(request, outcome.plan, ask)
        except BaseException as error:
            hold.release()
            outcome.end(error)
            self._ended(outcome)
            raise
        return Answer(outcome, chunks, hold, self._settled)

    def _settled(self, outcome: Outcome) -> None:
        """Before the caller can know the end, so that its next turn finds its session."""
        if outcome.session is not None and outcome.status == "ok":
            self._sessions.keep(outcome.session, outcome.experts)
        self._ended(outcome)

    def _ask(
        self,
        request: Request,
        generation: Generation,
        policy: Policy,
        outcome: Outcome,
        *,
        routing: bool = False,
    ) -> Ask:
        """`routing`: for the router's own questions. Of the request they have what orders and
        bounds its calls, and nothing of how it wants to be answered (tools, formats, a stream)."""
        if routing:
            request = dataclasses.replace(request, prompt=None, **_NO_WISHES)
        timings = outcome.timings
        catalog = generation.catalog

        async def ask(
            expert: str | Mix,
            *,
            messages: Sequence[Message] | None = None,
            sampling: Sampling | None = None,
            later: Sequence[str] = (),
            verbatim: bool = False,
        ) -> AsyncGenerator[Chunk, None]:
            if isinstance(expert, Mix):
                excluded = restricted(request, catalog).exclude
                first = expert.shares[0][0]
                if expert.gate is not None:
                    expert = await weighed(
                        expert,
                        catalog,
                        excluded,
                        lambda who: chunks_of(who, messages, _ONE_TOKEN, (first,), weigh=True),
                    )
                if expert.whole:
                    others = [id_ for id_ in policy.experts if id_ not in excluded]
                    expert = with_whole(expert, others)
            async with (
                self._mixing(expert, generation) as (who, details),
                aclosing(chunks_of(who, messages, sampling, later, verbatim=verbatim)) as chunks,
            ):
                async for chunk in chunks:
                    if details:  # with the first chunk: the headers want them too
                        chunk = dataclasses.replace(chunk, details={**details, **chunk.details})
                        details = {}
                    yield chunk

        async def chunks_of(
            expert: Expert,
            messages: Sequence[Message] | None,
            sampling: Sampling | None,
            later: Sequence[str],
            *,
            verbatim: bool = False,
            weigh: bool = False,
        ) -> AsyncGenerator[Chunk, None]:
            """`weigh`: for the weights of the expert's gate; the request's wishes for its answer
            are none of this call's."""
            call = call_of(
                dataclasses.replace(request, **_NO_WISHES) if weigh else request,
                expert,
                number=len(timings.calls),
                messages=messages,
                sampling=sampling or request.sampling,
            )
            call = dataclasses.replace(
                call,
                server=generation.place(call.server),
                arrived=self._scheduler.now(),
                max_wait_s=self._bound(request, policy),
                later=tuple(generation.place(catalog.experts[one].server) for one in later),
                forward=self._forward(request, call, policy) if verbatim else None,
                weigh=weigh,
                embedding=await self._embedding(
                    expert,
                    request.text if messages is None else last_user_text(messages),
                ),
            )
            engine = generation.engines[expert.server]
            entry: dict[str, Any] = {"id": call.id, "expert": expert.id}
            if routing or weigh:
                entry["routing" if routing else "weighing"] = True
            timings.calls.append(entry)
            run = CallRun(self._scheduler, call, entry)
            try:
                async with aclosing(run.chunks(engine)) as chunks:
                    async for chunk in chunks:
                        if chunk.usage is not None:
                            outcome.spend(expert, chunk.usage)
                            if (
                                routing or weigh
                            ):  # no part of the answer, whose usage is its chunks'
                                outcome.usage = outcome.usage + chunk.usage
                        if chunk.gates is not None:
                            outcome.gates[expert.id] = chunk.gates
                        if not chunk.expert:
                            chunk = dataclasses.replace(chunk, expert=expert.id)
                        yield chunk
            finally:
                timings.queue_ms += run.queue_ms
                timings.run_ms += run.run_ms
                if run.uncounted:
                    outcome.cost_usd = None  # it ran, and nobody said for how many tokens

        return ask

    async def _embedding(self, expert: Expert, text: str) -> tuple[float, ...] | None:
        gate = None if expert.adapter is None else expert.adapter.gate
        if gate is None or not gate.per_request or self._embed is None:
            return None
        vector = await self._embed(text)
        return tuple(vector.tolist())

    def _bound(self, request: Request, policy: Policy) -> float | None:
        """Seconds that each call may wait; the caller's own bound can only tighten it."""
        if request.priority == "batch":
            return request.max_wait_s
        bound = self._max_wait_s if policy.max_wait_s is None else policy.max_wait_s
        return bound if request.max_wait_s is None else min(bound, request.max_wait_s)

    def _forward(self, request: Request, call: Call, policy: Policy) -> Forward | None:
        if not request.stream or self._reads_text:
            return None
        if (call.prompt is None) != (request.prompt is None):
            return (
                None  # an expert's template made a message of the prompt: events of another shape
            )
        return Forward(id=request.id, model=request.model or policy.id)


@dataclass(frozen=True, slots=True)
class Planned:
    """A decision made before its request's turn, and the catalog under which it holds."""

    catalog_digest: str
    plan: Plan
    decision_ms: float


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
                    outcome.timings.first_token_ms = ms_since(outcome.started)
                if chunk.usage is not None:
                    outcome.usage = outcome.usage + chunk.usage
                if chunk.expert and chunk.expert not in outcome.experts:
                    outcome.experts.append(chunk.expert)
                outcome.text.append(chunk.text)
                outcome.details.update(chunk.details)
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

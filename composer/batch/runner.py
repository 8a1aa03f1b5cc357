"""A batch from its first line to its last: plan all, begin in the backlog's order, keep answers.

Knows no wire format and no concrete scheduler. What a run has put down is never asked again; what
it had not when it ended, however it ended, the next run asks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import orjson

from composer.batch.answers import Answers
from composer.batch.backlog import Backlog, Calls
from composer.batch.base import Codec, Line, Reply, Watch
from composer.batch.gate import Gate
from composer.batch.lines import Lines
from composer.engines.base import Capacity
from composer.errors import ComposerError, EngineUnavailable, Overloaded
from composer.generations import Generation, Generations
from composer.pipeline import Pipeline, Planned
from composer.scheduling.base import Scheduler
from composer.types import Call

log = logging.getLogger(__name__)

SECTION = 50_000
"""Lines planned and ordered at a time, so that memory does not grow with the file: a plan takes
about 2 kB. Each section may load each model once more."""

PLANNING = 32
"""Lines planned at once: the embedder makes batches of them, and an interactive request waits for
one such batch at most."""

CONCURRENCY = 4096
"""Most lines begun and not ended: about 15 kB each, see `Backlog`."""

WINDOW = 4
"""Calls kept begun per server, as a multiple of those it runs at once: those that run, twice as
many that wait where the scheduler sees them, and as many that are on their way there."""

PAUSES_S = (1.0, 5.0, 30.0)
"""Before a line is tried again whose server was not there or had no room."""

LONGEST_PAUSE_S = 60.0
"""Of those that a server asks for itself (429 with Retry-After)."""


@dataclass(eq=False, slots=True)
class _Begun:
    """A line that is being answered. `replied`: its answer is there and only to be kept."""

    task: asyncio.Task[None]
    call_ended: Callable[[str], None]
    replied: bool = False


class Runner:
    """Runs batches, several at once where asked to; their calls pass one gate."""

    def __init__(
        self,
        pipeline: Pipeline,
        generations: Generations,
        scheduler: Scheduler,
        codec: Codec,
        *,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self.codec = codec
        self._generations = generations
        self._concurrency = concurrency
        self._gate = Gate(scheduler, self._capacity, self._call_ended, self._call_came)
        self._pipeline = pipeline.behind(self._gate)
        self._begun: set[_Begun] = set()
        self._requests: dict[str, _Begun] = {}
        self._draining = False

    async def run(self, lines: Lines, answers: Answers, watch: Watch) -> None:
        """Returns when every line has its answer on disk, or after `drain` those that ran.

        A line that fails is answered with its error. Raises StoreError where answers cannot be
        written, RequestError where the input was changed meanwhile, EngineUnavailable when the
        service closes; cancelled or raising, it leaves no task behind and nothing half-written.
        """
        for section in _sections(answers.missing()):
            planned = await self._plan_all(lines, section, watch)
            await self._answer_all(lines, section, planned, answers, watch)

    def drain(self) -> int:
        """Lets what runs on a server come to its end, and begins nothing any more; how many lines
        that are. A line that waits for a server, or comes to wait, is given up: it has no answer,
        and is asked again by the next run. For good."""
        self._draining = True
        waiting = {_request(call) for call in self._gate.waiting}
        ending = {
            begun
            for call in self._gate.running
            if (request := _request(call)) not in waiting
            and (begun := self._requests.get(request)) is not None
        }
        ending |= {begun for begun in self._begun if begun.replied}
        for begun in self._begun - ending:
            begun.task.cancel()
        return len(ending)

    # --- first: who answers --------------------------------------------------------------

    async def _plan_all(
        self, lines: Lines, section: Sequence[int], watch: Watch
    ) -> dict[int, Planned]:
        """What cannot be planned is left out: when its turn comes it fails as any request
        would, and is recorded. So is what takes a call to be planned, which is decided then."""
        planned: dict[int, Planned] = {}
        todo = iter(section)

        async def some() -> None:
            for index in todo:
                if self._draining:
                    return
                try:
                    # An id of its own: who is tried out on a line is drawn by it.
                    asked = self.codec.read(lines[index], uuid4().hex)
                    plan = await self._pipeline.plan(asked.request)
                except EngineUnavailable:
                    raise
                except ComposerError:
                    watch.planned("")
                    continue
                if plan is not None:
                    planned[index] = plan
                watch.planned("" if plan is None else plan.plan.best)

        await _together(some() for _ in range(PLANNING))
        return planned

    # --- then: their answers -------------------------------------------------------------

    async def _answer_all(
        self,
        lines: Lines,
        section: Sequence[int],
        planned: dict[int, Planned],
        answers: Answers,
        watch: Watch,
    ) -> None:
        generation = self._generations.current
        backlog = Backlog(
            {index: _calls(planned.get(index), generation) for index in section},
            windows={
                generation.place(server): WINDOW * engine.capacity.in_flight
                for server, engine in generation.engines.items()
            },
            most=self._concurrency,
        )
        changed = asyncio.Event()

        async def one(index: int) -> None:
            plan = planned.pop(index, None)

            def call_ended(server: str) -> None:
                backlog.called(index, server)
                changed.set()

            try:
                if self._draining:  # since this task was made
                    return
                with self._answering(call_ended) as begun:
                    ok = await self._answer(lines[index], plan, answers, begun)
            finally:
                backlog.ended(index)
                changed.set()
            watch.answered("" if plan is None else plan.plan.best, ok)

        async def begin(tasks: asyncio.TaskGroup) -> None:
            while not backlog.empty and not self._draining:
                while (index := backlog.next()) is not None:
                    tasks.create_task(one(index))
                changed.clear()
                await changed.wait()

        await _in_group(begin)

    @contextmanager
    def _answering(self, call_ended: Callable[[str], None]) -> Iterator[_Begun]:
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        begun = _Begun(task, call_ended)
        self._begun.add(begun)
        try:
            yield begun
        finally:
            self._begun.remove(begun)

    async def _answer(
        self,
        line: Line,
        planned: Planned | None,
        answers: Answers,
        begun: _Begun,
    ) -> bool:
        """Whether it succeeded; its answer or error is on disk then."""
        for pause_s in (*PAUSES_S, None):
            id_ = uuid4().hex
            try:
                reply = await self._reply(line, id_, planned, begun)
            except (EngineUnavailable, Overloaded) as error:
                self._generations.current  # noqa: B018 (raises when the service is closing)
                if self._draining:
                    raise asyncio.CancelledError from error  # given up, as in `drain`
                if pause_s is not None:
                    told_s = error.retry_after if isinstance(error, Overloaded) else 0.0
                    await asyncio.sleep(max(pause_s, min(told_s, LONGEST_PAUSE_S)))
                    continue
                reply = self.codec.failed(error, id_)
            except Exception as error:  # whatever it is, it is this line's and stops no other
                reply = self.codec.failed(error, id_)
            break
        begun.replied = True
        await answers.put(line.index, reply.status, output_line(line, id_, reply))
        return reply.status < 400

    async def _reply(self, line: Line, id_: str, planned: Planned | None, begun: _Begun) -> Reply:
        asked = self.codec.read(line, id_)
        self._requests[asked.request.id] = begun
        try:
            return await asked.reply(self._pipeline, planned)
        finally:
            del self._requests[asked.request.id]

    # --- for the gate --------------------------------------------------------------------

    def _capacity(self, place: str) -> Capacity:
        for generation in reversed(self._generations.live):
            for server, engine in generation.engines.items():
                if generation.place(server) == place:
                    return engine.capacity
        return Capacity(in_flight=1, queue=1)

    def _call_came(self, call: Call) -> None:
        begun = self._requests.get(_request(call))
        if self._draining and begun is not None:
            if begun.task is not asyncio.current_task():  # one of several calls of its line
                begun.task.cancel()
            raise asyncio.CancelledError  # given up, as in `drain`

    def _call_ended(self, call: Call) -> None:
        begun = self._requests.get(_request(call))
        if begun is not None:
            begun.call_ended(call.server)


@dataclass(frozen=True, slots=True)
class Unwatched:
    """For runs that nobody looks at."""

    def planned(self, expert: str) -> None: ...

    def answered(self, expert: str, ok: bool) -> None: ...


def output_line(line: Line, id_: str, reply: Reply) -> bytes:
    """The line's answer, or its error, in OpenAI's batch format."""
    return orjson.dumps(
        {
            "id": f"batch_req_{id_}",
            "custom_id": line.custom_id,
            "response": {
                "status_code": reply.status,
                "request_id": id_,
                "body": orjson.Fragment(reply.body),
            },
            "error": None,
        }
    )


def unanswered_line(line: Line, code: str, message: str) -> bytes:
    """The line of a batch that ended before its turn."""
    return orjson.dumps(
        {
            "id": f"batch_req_{uuid4().hex}",
            "custom_id": line.custom_id,
            "response": None,
            "error": {"code": code, "message": message},
        }
    )


def _request(call: Call) -> str:
    """The id of the request that the call is one of."""
    return call.id.rpartition("/")[0]


def _calls(planned: Planned | None, generation: Generation) -> Calls:
    """The calls that a plan is known to make, by the names the scheduler has for servers."""
    if planned is None:
        return ()
    experts = [generation.catalog.experts.get(expert) for expert in planned.plan.calls]
    return tuple(
        (generation.place(e.server), "" if e.adapter is None else e.adapter.digest)
        for e in experts
        if e is not None
    )


def _sections(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), SECTION):
        yield indices[start : start + SECTION]


async def _together(work: Iterator[Awaitable[None]]) -> None:
    """Runs all at once; the first error ends the others and is raised alone."""

    async def each(tasks: asyncio.TaskGroup) -> None:
        for one in work:
            tasks.create_task(_awaited(one))

    await _in_group(each)


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def _in_group(body: Callable[[asyncio.TaskGroup], Awaitable[None]]) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            await body(tasks)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None

"""Batches with a life of their own: made, run beside each other, resumed after a restart.

Knows no HTTP, and nothing of how batches are kept or shared between processes (`store`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from composer.batch.answers import Answers, Locked
from composer.batch.files import Files
from composer.batch.lines import InvalidBatch, LineProblem, Lines
from composer.batch.runner import Runner, Unwatched, unanswered_line
from composer.batch.status import CANCELLABLE, ENDED, UNANSWERED, Batch, Ending
from composer.batch.store import BatchStore
from composer.batch.threads import to_end
from composer.errors import Conflict, EngineUnavailable, NotFound, StoreError

log = logging.getLogger(__name__)

WINDOW_S = 24 * 3600
"""Of OpenAI's only completion window, "24h"."""

AT_ONCE = 4
"""Batches run beside each other; the others wait in `validating`, or as they were found. One that
is cancelled has only to be ended and does not count."""

RETRY_S = 30.0
"""Pause after the disk refused something, in seconds."""

GONE = "batch %s is given up: its folder was taken away while it had not ended"

LOOK_S = 1.0
"""How often it is looked whether another process wants a batch cancelled, in seconds."""


@dataclass(eq=False, slots=True)
class _Job:
    """A batch that this process runs, or would if no other did."""

    batch: Batch
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    answers: Answers | None = None

    def cancel(self) -> None:
        self.cancelled.set()
        if self.batch.status in CANCELLABLE:
            self.batch.become("cancelling")


class Batches:
    """All batches of a folder, and the running of those that nobody else runs. Used from one
    event loop; what blocks on the disk is done in threads."""

    def __init__(self, folder: Path, files: Files, runner: Runner) -> None:
        self._store = BatchStore(folder)
        self._files = files
        self._runner = runner
        self._jobs: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(AT_ONCE)

    async def start(self) -> None:
        """Goes on with what has not ended. Raises StoreError when the folder cannot be used."""
        await asyncio.to_thread(self._files.start)
        for batch in reversed(await self.all()):
            if batch.status not in ENDED:
                self._begin(batch)

    async def close(self) -> None:
        """Stops what runs; the next start goes on with it. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- for callers ---------------------------------------------------------------------

    async def create(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        metadata: dict[str, str] | None,
        key: str = "",
    ) -> Batch:
        """Raises NotFound for an unknown file, Conflict for one that is no input, StoreError."""
        if (await asyncio.to_thread(self._files.get, input_file_id)).purpose != "batch":
            raise Conflict(
                f"file {input_file_id!r} was not uploaded with the purpose `batch`",
                param="input_file_id",
            )
        now = time.time_ns()
        batch = Batch(
            id=f"batch_{uuid4().hex}",
            endpoint=endpoint,
            input_file_id=input_file_id,
            created_ns=now,
            expires_at=now // 10**9 + WINDOW_S,
            metadata=metadata,
            key=key,
        )
        source = await asyncio.to_thread(self._files.content, input_file_id)
        await to_end(lambda: self._store.add(batch, source))
        self._begin(batch)
        return batch

    async def get(self, id: str) -> Batch:
        """Raises NotFound."""
        running = self._running(id)
        return await asyncio.to_thread(self._store.load, id) if running is None else running

    async def all(self) -> list[Batch]:
        """The newest first."""
        found = await asyncio.to_thread(self._store.all)
        return [self._running(batch.id) or batch for batch in found]

    async def cancel(self, id: str) -> Batch:
        """Its running requests are cut, its answers so far stay; whichever process runs it does
        so within `LOOK_S`. Raises NotFound, Conflict for one that has ended or is about to,
        StoreError."""
        try:
            await to_end(lambda: self._store.cancel(id))
        except StoreError:
            if id in self._jobs:  # what cannot be kept is done all the same
                self._jobs[id].cancel()
            raise
        if id in self._jobs:
            self._jobs[id].cancel()
        return await self.get(id)

    def _running(self, id: str) -> Batch | None:
        job = self._jobs.get(id)
        if job is None or job.answers is None:
            return None
        job.batch.count(job.answers)
        return job.batch

    # --- the life of one -----------------------------------------------------------------

    def _begin(self, batch: Batch) -> None:
        job = self._jobs[batch.id] = _Job(batch)
        self._spawn(self._live(job))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, job: _Job) -> None:
        id_ = job.batch.id
        try:
            async with self._place(job):
                while True:
                    if await self._try(job):
                        return
                    await asyncio.sleep(RETRY_S)
        except Locked:
            log.debug("batch %s is run by another process", id_)
            self._spawn(self._look_again(id_))
        except EngineUnavailable as error:
            log.info("batch %s waits for the next start: %s", id_, error)
        except NotFound:
            log.warning(GONE, id_)
        finally:
            del self._jobs[id_]

    @asynccontextmanager
    async def _place(self, job: _Job) -> AsyncIterator[None]:
        """One of the `AT_ONCE`, waited for; or none, once the batch is to be cancelled."""
        place = asyncio.create_task(self._room.acquire())
        told = asyncio.create_task(self._told(job))
        try:
            try:
                await asyncio.wait({place, told}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                place.cancel()  # which leaves a place that is taken as it is
                told.cancel()
            yield
        finally:
            await asyncio.gather(place, told, return_exceptions=True)
            if not place.cancelled():
                self._room.release()

    async def _look_again(self, id: str) -> None:
        """The process that runs it may end before it: then it is ours."""
        await asyncio.sleep(RETRY_S)
        try:
            batch = await asyncio.to_thread(self._store.load, id)
        except NotFound:
            log.warning(GONE, id)
            return
        if batch.status not in ENDED and id not in self._jobs:
            self._begin(batch)

    async def _try(self, job: _Job) -> bool:
        """Whether the batch has come to its end; False: the disk refused, and may not later. Raises
        Locked, EngineUnavailable, and NotFound where its folder was taken away."""
        id_ = job.batch.id
        try:
            try:
                await self._run(job)
            except InvalidBatch as error:
                problems = error.problems
                await to_end(lambda: self._fail(job, problems))
            except (Locked, EngineUnavailable, NotFound, StoreError):
                raise
            except Exception:
                log.exception("batch %s failed", id_)
                words = "the service failed; its log has the cause under this batch's id"
                bug = LineProblem("internal_error", words)
                await to_end(lambda: self._fail(job, [bug]))
                return True  # what it had stays on the disk
            await to_end(lambda: self._store.clear(id_))
        except StoreError as error:
            log.error("batch %s pauses for %g s: %s", id_, RETRY_S, error)
            return False
        return True

    async def _run(self, job: _Job) -> None:
        id_, endpoint, key = job.batch.id, job.batch.endpoint, job.batch.key
        lines = await to_end(
            lambda: Lines(self._store.input(id_), {endpoint}, key=key), undo=Lines.close
        )
        try:
            answers = await to_end(
                lambda: Answers(self._store.answers(id_), digest=lines.digest, lines=len(lines)),
                undo=Answers.close,
            )
            try:
                # From here on it is ours; another process may have run it meanwhile.
                batch = job.batch = await asyncio.to_thread(self._store.load, id_)
                if batch.status in ENDED:
                    return
                if batch.status == "cancelling" or job.cancelled.is_set():
                    job.cancel()
                job.answers = answers
                batch.total = len(lines)
                if batch.status == "validating":
                    batch.become("in_progress")
                    await self._save(batch)
                ending = await self._answer(job, lines, answers)
                await answers.settled()
                await self._finish(job, lines, answers, ending)
            finally:
                job.answers = None
                await answers.aclose()
        finally:
            lines.close()

    async def _answer(self, job: _Job, lines: Lines, answers: Answers) -> Ending:
        """Until all are answered, the batch is cancelled, or its time is over."""
        if job.cancelled.is_set():
            return "cancelled"
        if answers.answered == len(lines):
            return "completed"  # also where its time was over before it could be finalized
        work = asyncio.create_task(self._runner.run(lines, answers, Unwatched()))
        told = asyncio.create_task(self._told(job))
        left_s = job.batch.expires_at - time.time()
        try:
            await asyncio.wait(
                {work, told}, timeout=max(0, left_s), return_when=asyncio.FIRST_COMPLETED
            )
            if job.cancelled.is_set():
                return "cancelled"
            if not work.done():
                return "expired"
            work.result()
            return "completed"
        finally:
            work.cancel()
            told.cancel()
            await asyncio.gather(work, told, return_exceptions=True)

    async def _told(self, job: _Job) -> None:
        """Returns when the batch is to be cancelled, whichever process was asked for it."""
        while not job.cancelled.is_set():
            if await asyncio.to_thread(self._store.cancelled, job.batch.id):
                job.cancel()
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await job.cancelled.wait()

    async def _finish(self, job: _Job, lines: Lines, answers: Answers, ending: Ending) -> None:
        """Done again after a crash half-way, it makes the same files."""
        batch = job.batch
        with ExitStack() as held:
            if await to_end(lambda: held.enter_context(self._store.seal(batch.id))):
                job.cancel()
                ending = "cancelled"
            batch.count(answers)
            if ending == "completed":
                batch.become("finalizing")
                await self._save(batch)
            await to_end(lambda: self._write(batch, lines, answers, ending))
            ended = replace(batch, times=dict(batch.times))
            ended.become(ending)
            await self._save(ended)
            job.batch = ended  # seen to have ended from here on, when nothing can undo it

    def _write(self, batch: Batch, lines: Lines, answers: Answers, ending: Ending) -> None:
        """The files that callers fetch: of those that succeeded, and of all others."""

        def unanswered(index: int) -> bytes:
            return unanswered_line(lines[index], *UNANSWERED[ending])

        if batch.completed:
            id_ = file_id(batch.id, "output")
            name = f"{batch.id}_output.jsonl"
            self._files.make(id_, lambda p: answers.write(p, ok=True), name, "batch_output")
            batch.output_file_id = id_
        if batch.failed or len(lines) > answers.answered:
            id_ = file_id(batch.id, "error")
            name = f"{batch.id}_error.jsonl"
            self._files.make(
                id_,
                lambda p: answers.write(p, ok=False, otherwise=unanswered),
                name,
                "batch_output",
            )
            batch.error_file_id = id_

    def _fail(self, job: _Job, problems: Sequence[LineProblem]) -> None:
        """Cancelled where that was asked for, which leaves no files either. Does nothing where
        another process has ended it, which took its input away. Blocks."""
        with self._store.seal(job.batch.id) as cancelled:
            batch = self._store.load(job.batch.id)
            if batch.status in ENDED:
                return
            batch.errors = [problem.body for problem in problems]
            if cancelled or job.cancelled.is_set():
                batch.become("cancelling")
                batch.become("cancelled")
            else:
                batch.become("failed")
            self._store.save(batch)

    async def _save(self, batch: Batch) -> None:
        now = replace(batch, times=dict(batch.times))  # it may be cancelled meanwhile
        await to_end(lambda: self._store.save(now))


def file_id(batch: str, kind: str) -> str:
    """Always the same, so that a crash between file and batch leaves no file behind."""
    return f"file-{hashlib.sha256(f'{batch}/{kind}'.encode()).hexdigest()[:32]}"

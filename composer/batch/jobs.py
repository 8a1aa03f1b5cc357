"""Batches with a life of their own: made, run beside each other, resumed after a restart.

    FOLDER/batch_…/batch.json        the batch as callers see it
    FOLDER/batch_…/input.jsonl       its input, a link: the file may be deleted meanwhile
    FOLDER/batch_…/answers           see `answers`; gone when the batch has ended

Knows no HTTP. The life of a batch, in OpenAI's words:

    validating → in_progress → finalizing → completed
         │            ├→ cancelling → cancelled
         └→ failed    └→ expired
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import orjson

from composer.batch.answers import Answers, Locked
from composer.batch.files import Files, save
from composer.batch.lines import InvalidBatch, LineProblem, Lines
from composer.batch.runner import Runner, Unwatched, unanswered_line
from composer.batch.threads import to_end
from composer.errors import Conflict, EngineUnavailable, NotFound, StoreError

log = logging.getLogger(__name__)

WINDOW_S = 24 * 3600
"""Of OpenAI's only completion window, "24h"."""

AT_ONCE = 4
"""Batches run beside each other; the others wait in `validating`, or as they were found."""

RETRY_S = 30.0
"""Pause after the disk refused something, in seconds."""

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "cancelling",
    "cancelled",
    "expired",
]
Ending = Literal["completed", "cancelled", "expired"]
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled", "expired"})

UNANSWERED: Mapping[Ending, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was answered."),
    "expired": (
        "batch_expired",
        "This request could not be answered before the completion window expired.",
    ),
}

_ID = re.compile(r"batch_[0-9a-f]{32}")


@dataclass(slots=True)
class Batch:
    """Times are in Unix seconds, `created_ns` in nanoseconds."""

    id: str
    endpoint: str
    input_file_id: str
    created_ns: int
    expires_at: int
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: dict[str, int] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0

    def become(self, status: Status) -> None:
        self.status = status
        self.times.setdefault(f"{status}_at", int(time.time()))

    def count(self, answers: Answers) -> None:
        self.completed = answers.answered - answers.failed
        self.failed = answers.failed

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": None if self.errors is None else {"object": "list", "data": self.errors},
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_ns // 10**9,
            "expires_at": self.expires_at,
            **{f"{name}_at": self.times.get(f"{name}_at") for name in (*names, "cancelled")},
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "metadata": self.metadata,
        }


@dataclass(eq=False, slots=True)
class _Job:
    """A batch that this process runs."""

    batch: Batch
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    answers: Answers | None = None


class Batches:
    """All batches of a folder, and the running of those that nobody else runs. Used from one
    event loop; what blocks on the disk is done in threads."""

    def __init__(self, folder: Path, files: Files, runner: Runner) -> None:
        self._folder = folder
        self._files = files
        self._runner = runner
        self._jobs: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._saving = asyncio.Lock()

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
        self, *, input_file_id: str, endpoint: str, metadata: dict[str, str] | None
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
        )
        source = await asyncio.to_thread(self._files.content, input_file_id)
        await to_end(lambda: self._found(batch, source))
        self._begin(batch)
        return batch

    async def get(self, id: str) -> Batch:
        """Raises NotFound."""
        if id in self._jobs:
            return self._current(self._jobs[id])
        if _ID.fullmatch(id):
            with suppress(FileNotFoundError):
                return await asyncio.to_thread(self._stored, id)
        raise NotFound(f"there is no batch {id!r}; GET /v1/batches lists them", param="batch_id")

    async def all(self) -> list[Batch]:
        """The newest first."""

        def load() -> list[Batch]:
            return [_load(path) for path in self._folder.glob("batch_*/batch.json")]

        found = [
            self._current(self._jobs[batch.id]) if batch.id in self._jobs else batch
            for batch in await asyncio.to_thread(load)
        ]
        return sorted(found, key=lambda batch: (batch.created_ns, batch.id), reverse=True)

    async def cancel(self, id: str) -> Batch:
        """Its running requests are cut, its answers so far stay. Raises NotFound, Conflict for
        one that has ended or belongs to another process, StoreError."""
        batch = await self.get(id)
        if batch.status in ENDED or batch.status == "finalizing":
            raise Conflict(f"batch {id!r} is {batch.status}: there is nothing to cancel")
        job = self._jobs.get(id)
        if job is None:
            raise Conflict(f"batch {id!r} is run by another process; cancel it there")
        if job.batch.status != "cancelling":
            job.batch.become("cancelling")
            job.cancelled.set()  # also where it cannot be kept: its end is kept later
            await self._save(job.batch)
        return job.batch

    # --- the life of one -----------------------------------------------------------------

    def _begin(self, batch: Batch) -> None:
        job = self._jobs[batch.id] = _Job(batch)
        if batch.status == "cancelling":
            job.cancelled.set()
        self._spawn(self._live(job))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, job: _Job) -> None:
        batch = job.batch
        try:
            async with self._room:
                while True:
                    if await self._try(job):
                        return
                    await asyncio.sleep(RETRY_S)
        except Locked:
            log.debug("batch %s is run by another process", batch.id)
            self._spawn(self._look_again(batch.id))
        except EngineUnavailable as error:
            log.info("batch %s waits for the next start: %s", batch.id, error)
        finally:
            del self._jobs[batch.id]

    async def _look_again(self, id: str) -> None:
        """The process that runs it may end before it: then it is ours."""
        await asyncio.sleep(RETRY_S)
        batch = await asyncio.to_thread(self._stored, id)
        if batch.status not in ENDED and id not in self._jobs:
            self._begin(batch)

    async def _try(self, job: _Job) -> bool:
        """Whether the batch has come to its end; False: the disk refused, and may not later."""
        batch = job.batch
        try:
            try:
                await self._run(job)
            except InvalidBatch as error:
                await self._fail(batch, error.problems)
            except (Locked, EngineUnavailable, StoreError):
                raise
            except Exception:
                log.exception("batch %s failed", batch.id)
                words = "the service failed; its log has the cause under this batch's id"
                await self._fail(batch, [LineProblem("internal_error", words)])
                return True  # what it had stays on the disk
            await to_end(lambda: _clear(self._folder / batch.id))
        except StoreError as error:
            log.error("batch %s pauses for %g s: %s", batch.id, RETRY_S, error)
            return False
        return True

    async def _run(self, job: _Job) -> None:
        batch, folder = job.batch, self._folder / job.batch.id
        lines = await to_end(
            lambda: Lines(folder / "input.jsonl", {batch.endpoint}), undo=Lines.close
        )
        try:
            answers = await to_end(
                lambda: Answers(folder / "answers", digest=lines.digest, lines=len(lines)),
                undo=Answers.close,
            )
            try:
                stored = await asyncio.to_thread(self._stored, batch.id)
                if stored.status in ENDED:  # by another process, while this one waited
                    return
                if stored.status == "cancelling" and not job.cancelled.is_set():
                    batch.become("cancelling")
                    job.cancelled.set()
                job.answers = answers
                batch.total = len(lines)
                if batch.status == "validating":
                    batch.become("in_progress")
                    await self._save(batch)
                ending = await self._answer(job, lines, answers)
                await self._finish(batch, lines, answers, ending)
            finally:
                job.answers = None
                await answers.aclose()
        finally:
            lines.close()

    async def _answer(self, job: _Job, lines: Lines, answers: Answers) -> Ending:
        """Until all are answered, the batch is cancelled, or its time is over."""
        if answers.answered == len(lines) and not job.cancelled.is_set():
            return "completed"  # also where its time was over before it could be finalized
        work = asyncio.create_task(self._runner.run(lines, answers, Unwatched()))
        told = asyncio.create_task(job.cancelled.wait())
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

    async def _finish(self, batch: Batch, lines: Lines, answers: Answers, ending: Ending) -> None:
        """Done again after a crash half-way, it makes the same files."""
        batch.count(answers)
        if ending == "completed":
            batch.become("finalizing")
            await self._save(batch)

        def unanswered(index: int) -> bytes:
            return unanswered_line(lines[index], *UNANSWERED[ending])

        def write() -> None:
            left = len(lines) - answers.answered
            if batch.completed:
                id_ = _file_id(batch.id, "output")
                name = f"{batch.id}_output.jsonl"
                self._files.make(id_, lambda p: answers.write(p, ok=True), name, "batch_output")
                batch.output_file_id = id_
            if batch.failed or left:
                id_ = _file_id(batch.id, "error")
                name = f"{batch.id}_error.jsonl"
                self._files.make(
                    id_,
                    lambda p: answers.write(p, ok=False, otherwise=unanswered),
                    name,
                    "batch_output",
                )
                batch.error_file_id = id_

        await to_end(write)
        batch.become(ending)
        await self._save(batch)

    async def _fail(self, batch: Batch, problems: Sequence[LineProblem]) -> None:
        """Unless another process has ended it, which took its input away."""
        if (await asyncio.to_thread(self._stored, batch.id)).status in ENDED:
            return
        batch.errors = [problem.body for problem in problems]
        batch.become("failed")
        await self._save(batch)

    # --- the disk ------------------------------------------------------------------------

    def _current(self, job: _Job) -> Batch:
        if job.answers is not None:
            job.batch.count(job.answers)
        return job.batch

    async def _save(self, batch: Batch) -> None:
        """One at a time: a batch may be cancelled while its own task saves it."""
        async with self._saving:
            content = asdict(batch)
            try:
                await to_end(lambda: save(self._folder / batch.id / "batch.json", content))
            except OSError as error:
                raise StoreError(f"batch {batch.id} cannot be kept: {error.strerror}") from error

    def _stored(self, id: str) -> Batch:
        return _load(self._folder / id / "batch.json")

    def _found(self, batch: Batch, source: Path) -> None:
        folder = self._folder / batch.id
        try:
            folder.mkdir()
            try:
                os.link(source, folder / "input.jsonl")
            except OSError:  # a file system without links
                shutil.copyfile(source, folder / "input.jsonl")
            save(folder / "batch.json", asdict(batch))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise StoreError(f"the batch cannot be kept: {error.strerror}") from error


def _load(path: Path) -> Batch:
    return Batch(**orjson.loads(path.read_bytes()))


def _clear(folder: Path) -> None:
    """What an ended batch needs no more."""
    for name in ("answers", "input.jsonl"):
        with suppress(OSError):
            (folder / name).unlink()


def _file_id(batch: str, kind: str) -> str:
    """Always the same, so that a crash between file and batch leaves no file behind."""
    return f"file-{hashlib.sha256(f'{batch}/{kind}'.encode()).hexdigest()[:32]}"

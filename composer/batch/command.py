"""`composer batch in.jsonl out.jsonl`: a file of requests answered without an HTTP edge.

What it has is in `out.jsonl.partial`; the last step turns that into `out.jsonl`, in the input's
order. Knows nothing of how a service is made.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from composer.batch.answers import Answers
from composer.batch.base import Codec
from composer.batch.lines import Lines
from composer.batch.runner import CONCURRENCY, Runner
from composer.batch.threads import to_end
from composer.errors import Conflict, RequestError
from composer.service import Service

NOBODY = "(cannot be planned)"


@dataclass(frozen=True, slots=True)
class Done:
    """What a batch came to: its requests, those that failed, those answered by this run."""

    requests: int
    failed: int
    now: int


def answer_file(
    make_service: Callable[[], Service],
    codec: Codec,
    source: Path,
    target: Path,
    *,
    fresh: bool = False,
    concurrency: int | None = None,
    console: Console,
) -> Done | None:
    """Answers all of `source` into `target`, going on where an earlier run stopped. Blocks. None:
    an earlier run had come to the end, and nothing was done.

    Raises InvalidBatch before anything runs, Conflict, and as a service's start does;
    KeyboardInterrupt and CancelledError where it was told to stop, everything put away.
    """
    job = Job(source, target, endpoints=codec.endpoints, fresh=fresh)
    if job.finished:
        job.lines.close()
        return None

    async def run() -> Done:
        with stopped_by_sigterm():
            try:
                service = await asyncio.to_thread(make_service)
                try:
                    await service.start()
                    runner = Runner(
                        service.pipeline,
                        service.generations,
                        service.scheduler,
                        codec,
                        concurrency=concurrency or CONCURRENCY,
                    )
                    return await job.run(runner, console)
                finally:
                    await service.close()
            finally:
                await job.aclose()

    return asyncio.run(run())


class Job:
    """One input and one output file. Opening checks the whole input, before anything runs."""

    def __init__(self, source: Path, target: Path, *, endpoints: Collection[str], fresh: bool):
        """Blocks. Raises InvalidBatch for an input that cannot be run, Conflict for a target
        that belongs to another input or process. `fresh` throws away what an earlier run had."""
        self._target = target
        self._partial = target.with_name(target.name + ".partial")
        if source.resolve() in (target.resolve(), self._partial.resolve()):
            raise RequestError("the output cannot be the input; give another name")
        if not target.parent.is_dir():
            raise RequestError(f"there is no folder {target.parent}; make it first")
        self.lines = Lines(source, endpoints)
        try:
            self.finished = not fresh and not self._partial.exists() and target.exists()
            if self.finished:
                self._check_done()
                return
            self._answers = Answers(
                self._partial, digest=self.lines.digest, lines=len(self.lines), fresh=fresh
            )
        except BaseException:
            self.lines.close()
            raise

    def _check_done(self) -> None:
        """A finished output names no input, so its ids say whose it is."""
        with self._target.open("rb") as file:
            for custom_id in self.lines.custom_ids():
                with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                    if orjson.loads(file.readline())["custom_id"] == custom_id:
                        continue
                break
            else:
                if not file.readline():
                    return
        raise Conflict(
            f"{self._target} is there and does not answer this input; give another name, or "
            "--fresh to replace it"
        )

    async def run(self, runner: Runner, console: Console) -> Done:
        """Goes on where an earlier run stopped, to the end. May be cancelled at any moment."""
        before = self._answers.answered
        with Bars(console, total=len(self.lines), before=before) as bars:
            await runner.run(self.lines, self._answers, bars)
        await to_end(lambda: self._answers.write(self._target))
        self._partial.unlink()
        return Done(len(self.lines), self._answers.failed, len(self.lines) - before)

    async def aclose(self) -> None:
        await self._answers.aclose()
        self.lines.close()


@dataclass
class Bars:
    """A bar for all lines and one for each expert's. Where nobody looks (no terminal), silent."""

    console: Console
    total: int
    before: int
    _experts: dict[str, TaskID] = field(default_factory=dict)

    def __enter__(self) -> Bars:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._progress.start()
        self._all = self._progress.add_task("all", total=self.total, completed=self.before)
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def planned(self, expert: str) -> None:
        task = self._task(expert)
        total = self._progress.tasks[task].total or 0
        self._progress.update(task, total=total + 1)

    def answered(self, expert: str, ok: bool) -> None:
        self._progress.advance(self._task(expert))
        self._progress.advance(self._all)

    def _task(self, expert: str) -> TaskID:
        if expert not in self._experts:
            self._experts[expert] = self._progress.add_task(expert or NOBODY, total=0)
        return self._experts[expert]


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the running task as Ctrl-C does, so that servers are stopped on the way out."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)

"""`composer batch in.jsonl out.jsonl`: a file of requests answered without an HTTP edge.

What it has is in `out.jsonl.partial`; the last step turns that into `out.jsonl`, in the input's
order. Knows nothing of how a service is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from composer.batch.stopping import first_signal
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

    Told to stop by Ctrl-C or SIGTERM, it says so, begins nothing any more, lets what runs come to
    its end and puts everything away; told so again, it is ended by that signal at once. What it
    has is safe either way.

    Raises InvalidBatch before anything runs, Conflict, and as a service's start does;
    KeyboardInterrupt where it was told to stop.
    """
    job = Job(source, target, endpoints=codec.endpoints, fresh=fresh, console=console)
    if job.finished:
        job.lines.close()
        return None
    try:
        done = asyncio.run(job.run(make_service, codec, concurrency or CONCURRENCY))
    except asyncio.CancelledError:
        done = None
    if done is None:
        raise KeyboardInterrupt
    return done


class Job:
    """One input and one output file. Opening checks the whole input, before anything runs."""

    def __init__(
        self,
        source: Path,
        target: Path,
        *,
        endpoints: Collection[str],
        fresh: bool,
        console: Console,
    ) -> None:
        """Blocks. Raises InvalidBatch for an input that cannot be run, Conflict for a target
        that belongs to another input or process. `fresh` throws away what an earlier run had."""
        self._console = console
        self._task: asyncio.Task[Any] | None = None
        self._runner: Runner | None = None
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
            self._before = self._answers.answered
            self._bars = Bars(console, total=len(self.lines), before=self._before)
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

    async def run(
        self, make_service: Callable[[], Service], codec: Codec, concurrency: int
    ) -> Done | None:
        """Goes on where an earlier run stopped; None: it was told to stop before the end. Leaves
        everything closed. May be cancelled at any moment."""
        self._task = asyncio.current_task()
        with first_signal(self._stop):
            try:
                service = await asyncio.to_thread(make_service)
                try:
                    await service.start()
                    self._runner = Runner(
                        service.pipeline,
                        service.generations,
                        service.scheduler,
                        codec,
                        concurrency=concurrency,
                    )
                    return await self._answer(self._runner)
                finally:
                    await service.close()
            finally:
                await self._answers.aclose()
                self.lines.close()

    async def _answer(self, runner: Runner) -> Done | None:
        with self._bars:
            await runner.run(self.lines, self._answers, self._bars)
        if self._answers.missing():
            return None
        await to_end(lambda: self._answers.write(self._target))
        self._partial.unlink()
        return Done(len(self.lines), self._answers.failed, len(self.lines) - self._before)

    def _stop(self) -> None:
        self._bars.stop()  # the next signal would leave no time for it
        running = 0
        if self._runner is not None:
            running = self._runner.drain()
        elif self._task is not None:  # there is nothing to finish
            self._task.cancel()
        words = f"finishing what runs (requests: {running})" if running else "stopping"
        self._console.print(f"{words}; once more stops at once", soft_wrap=True, highlight=False)


@dataclass
class Bars:
    """A bar for all lines and one for each expert's. Where nobody looks (no terminal), silent."""

    console: Console
    total: int
    before: int
    _experts: dict[str, TaskID] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._all = self._progress.add_task("all", total=self.total, completed=self.before)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves them as they stand. Safe to call twice."""
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

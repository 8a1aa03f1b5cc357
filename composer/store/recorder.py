"""Takes records off the answer's path: a queue in memory, then the database, or the journal.

Knows neither SQL nor files.

    put ──► queue ───────── batch ────────► database
              │ full, old, or the               ▲
              │ database away                   │ by id: what is there already is left alone
              └────────► journal ──── replay ───┘

What can be lost, and when: nothing, unless the process is killed (kill -9, power cut) or the
journal's disk fails while the database is away too. A kill loses what is in memory only: the
batch on its way to the database (at most `batch_size` records, for at most the store's timeout)
and what was put within the last `spill_after_s` plus one write to the journal; never more than
2 · `queue_size` records. While the database keeps up, that is the last few milliseconds' records.
Everything in the journal is replayed, by this process or by the next. Feedback is never in
memory alone: it is acknowledged once it is committed or journaled.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from composer.errors import StoreError, UnknownResponse
from composer.store.backlog import Backlog
from composer.store.failures import DatabaseAway
from composer.store.records import Feedback, Record
from composer.store.repository import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Feedback made durable: `stored` says where it lies now."""

    id: str
    stored: Literal["database", "journal"]


@dataclass(frozen=True, slots=True)
class _Held:
    """A record in memory since `since`, on the `monotonic` clock."""

    record: Record
    since: float


class Recorder:
    """One per process and started store, used on one event loop.

    `queue_size` records in memory start the spill to the journal, and twice as many are the
    most it ever holds; `spill_after_s` is how old a record may grow in the queue before it goes
    to the journal. While the database is away it is tried again after `backoff_s[0]` seconds,
    doubling up to `backoff_s[1]`; while nothing is to be written it is asked every `probe_s`
    whether it is there. `unknown_grace_s` is how long feedback for an id that nobody has
    recorded may wait in the journal for another process to record it.
    """

    def __init__(
        self,
        store: Store,
        journal_dir: Path,
        *,
        queue_size: int = 10_000,
        batch_size: int = 100,
        spill_after_s: float = 1.0,
        backoff_s: tuple[float, float] = (0.1, 5.0),
        probe_s: float = 10.0,
        close_timeout_s: float = 5.0,
        unknown_grace_s: float = 600.0,
    ) -> None:
        self._store = store
        self._backlog = Backlog(
            store, journal_dir, batch_size=batch_size, unknown_grace_s=unknown_grace_s
        )
        self._queue_size = queue_size
        self._batch_size = batch_size
        self._spill_after_s = spill_after_s
        self._backoff_s = backoff_s
        self._probe_s = probe_s
        self._close_timeout_s = close_timeout_s

        # A record is in one of these three until it is durable, by id, oldest first.
        self._queue: dict[str, _Held] = {}
        self._writing: dict[str, _Held] = {}
        self._spilling: dict[str, _Held] = {}

        self._state: Literal["new", "running", "closed"] = "new"
        self._database_up = True
        self._wake = asyncio.Event()
        self._spill = asyncio.Event()
        self._progress = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._written = self._lost = 0

    # --- life ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to write, and to replay what the journal holds. Raises StoreError when its
        folder cannot be used."""
        await self._backlog.open()
        self._state = "running"
        self._tasks = [
            asyncio.create_task(_for_ever(step), name=f"recorder {step.__name__}")
            for step in (self._write_and_replay, self._spill_now_and_then)
        ]

    async def close(self) -> None:
        """Writes what is in memory to the database, or after `close_timeout_s` to the journal.

        Raises StoreError when neither takes it.
        """
        if self._state != "running":
            self._state = "closed"
            return
        self._state = "closed"
        if self._database_up:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._close_timeout_s):
                    await self.flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        left = [held.record for held in self._queue.values()]
        try:
            await self._backlog.append(left)
        except OSError as error:
            raise StoreError(f"{len(left)} records are lost at the stop: {error}") from error
        finally:
            await self._backlog.close()

    # --- records -------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        """Takes a record; never blocks, never raises. Of two with one id the first counts."""
        if self._state == "closed" or self._held() >= 2 * self._queue_size:
            if self._lost == 0:
                log.error("records are lost: the recorder is closed, or its journal takes nothing")
            self._lost += 1
            return
        self._queue.setdefault(record.id, _Held(record, monotonic()))
        self._wake.set()
        if not self._database_up or len(self._queue) >= self._queue_size:
            self._spill.set()

    async def flush(self) -> None:
        """Returns when nothing is in memory alone: all is in the database or in the journal."""
        while self._held():
            await self._progress.wait()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, for /health. `lost` and `rejected` should stay 0;
        `queued` is in memory and `journal_bytes` on disk, both on their way to the database."""
        return {
            "database_up": self._database_up,
            "queued": self._held(),
            "written": self._written,
            "journaled": self._backlog.journaled,
            "replayed": self._backlog.replayed,
            "rejected": self._backlog.rejected,
            "lost": self._lost,
            "journal_bytes": self._backlog.bytes,
        }

    def _held(self) -> int:
        return len(self._queue) + len(self._writing) + len(self._spilling)

    # --- feedback ------------------------------------------------------------------------

    async def add_feedback(self, item: Feedback) -> Receipt:
        """Attaches an outcome to a response; durable when it returns.

        The response may have been answered a moment ago: its record is waited for. (A record
        still in another process's memory is unknown here for the moments until it is written.)
        While the database is away, or records wait in the journal, an id that cannot be found is
        taken on trust: the feedback is journaled, and set aside in the rejected file if nobody
        has recorded the response `unknown_grace_s` after it was given.

        Raises UnknownResponse, Conflict (the same feedback id, saying otherwise), and StoreError
        when neither database nor journal takes it.
        """
        if self._state != "running":
            raise StoreError("the recorder is not running, so feedback cannot be kept")
        try:
            # A record leaves the memory at the latest when its write times out and it spills.
            patience = self._spill_after_s + 2 * self._store.timeout_s
            async with asyncio.timeout(patience):
                await self._durable(item.response_id)
        except TimeoutError:
            raise StoreError("neither the database nor the journal takes records") from None
        if self._database_up:
            # Asked before the database is: a replay may end in between.
            perhaps_journaled = await self._backlog.may_hold_records()
            try:
                await self._store.add_feedback(item)
                return Receipt(item.id, "database")
            except UnknownResponse:
                if not perhaps_journaled:
                    raise
            except DatabaseAway as error:
                self._went_away(error)
        try:
            await self._backlog.append([item])
        except OSError as error:
            raise StoreError(f"feedback cannot be kept, the journal fails: {error}") from error
        self._wake.set()
        return Receipt(item.id, "journal")

    async def _durable(self, id: str) -> None:
        while id in self._queue or id in self._writing or id in self._spilling:
            await self._progress.wait()

    # --- queue and journal → database ----------------------------------------------------

    async def _write_and_replay(self) -> None:
        """New records and old ones in turns while the database answers; else waits for it."""
        pause, longest = self._backoff_s
        while True:
            try:
                if not self._database_up:
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, longest)
                    await self._store.ping()
                    self._came_back()
                self._wake.clear()
                written = await self._write_batch()
                replayed = await self._backlog.replay()
                pause = self._backoff_s[0]
                if not written and not replayed:
                    await self._idle()
            except DatabaseAway as error:
                self._went_away(error)

    async def _write_batch(self) -> bool:
        """The oldest records of the queue into the database; False if there were none."""
        batch = list(islice(self._queue.items(), self._batch_size))
        if not batch:
            return False
        self._writing = dict(batch)
        for id in self._writing:
            del self._queue[id]
        try:
            self._written += await self._backlog.write([held.record for _, held in batch])
        except BaseException:
            # Perhaps it was committed, perhaps not: written again by id, it is there once.
            self._queue = {**self._writing, **self._queue}
            raise
        finally:
            self._writing = {}
            self._moved_on()
        return True

    async def _idle(self) -> None:
        """Until there is something to do; asks now and then whether the database is there, so
        that an outage is known before a batch runs into it."""
        try:
            patience = min(self._probe_s, self._backlog.due_in() or self._probe_s)
            async with asyncio.timeout(patience):
                await self._wake.wait()
        except TimeoutError:
            await self._store.ping()

    def _went_away(self, error: DatabaseAway) -> None:
        if self._database_up:
            log.warning("the database is away, records go to the journal: %s", error)
        self._database_up = False
        self._spill.set()
        self._wake.set()

    def _came_back(self) -> None:
        log.info("the database is back")
        self._database_up = True

    # --- queue → journal -----------------------------------------------------------------

    async def _spill_now_and_then(self) -> None:
        """Moves what waits in the queue to the journal when it should not wait in memory."""
        while True:
            with suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it can swallow the cancellation of `close`.
                async with asyncio.timeout(self._spill_after_s / 4):
                    await self._spill.wait()
            self._spill.clear()
            if not self._must_spill():
                continue
            try:
                await self._spill_queue()
            except OSError as error:
                log.error("the journal takes nothing, records stay in memory: %s", error)
                await asyncio.sleep(1)

    def _must_spill(self) -> bool:
        oldest = next(iter(self._queue.values()), None)
        if oldest is None:
            return False
        too_old = monotonic() - oldest.since >= self._spill_after_s
        return not self._database_up or len(self._queue) >= self._queue_size or too_old

    async def _spill_queue(self) -> None:
        self._spilling, self._queue = self._queue, {}
        try:
            await self._backlog.append([held.record for held in self._spilling.values()])
        except BaseException:
            self._queue = {**self._spilling, **self._queue}
            raise
        finally:
            self._spilling = {}
            self._moved_on()
        self._wake.set()

    def _moved_on(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()


async def _for_ever(work: Callable[[], Awaitable[None]]) -> None:
    """A background task must outlive what nobody foresaw: it says so, and goes on."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("the recorder stumbled and goes on")
            await asyncio.sleep(1)

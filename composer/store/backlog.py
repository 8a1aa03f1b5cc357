"""What waits in the journal for the database: appended here, replayed from here, or set aside.

Knows neither SQL nor the journal's file format, and nothing of the queue before it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from composer.errors import ComposerError, Conflict, UnknownResponse
from composer.store.failures import RecordRefused
from composer.store.journal import Damaged, Journal
from composer.store.records import Entry, Feedback, Record, decode, encode
from composer.store.repository import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 5.0
"""Pause before feedback for an id not yet recorded is tried again."""


class Backlog:
    """The journal with its own thread, so that its disk never holds up the event loop.

    Entries are replayed oldest first, a segment forgotten only when every line of it is
    committed or set aside: a process killed on the way replays it again, by id, to no effect
    (but a line may then be twice in the rejected file).
    """

    def __init__(
        self, store: Store, folder: Path, *, batch_size: int, unknown_grace_s: float
    ) -> None:
        self._store = store
        self._journal = Journal(folder)
        self._batch_size = batch_size
        self._unknown_grace = timedelta(seconds=unknown_grace_s)
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._reading: tuple[Path, deque[bytes | Damaged]] | None = None
        self._last_with_records = 0  # the newest segment that may hold records
        self._seal_at = 0.0  # on `monotonic`: the newest segment is not replayed before
        self.journaled = self.replayed = self.rejected = 0
        self.bytes = 0

    async def open(self) -> None:
        """Raises StoreError when the journal's folder cannot be used."""
        await self._on_disk(self._journal.open)
        self.bytes = await self._on_disk(self._journal.size)
        newest = await self._on_disk(self._journal.newest)
        self._last_with_records = 0 if newest is None else newest
        if self.bytes:
            log.info("%d bytes of journal from before will be replayed", self.bytes)

    async def close(self) -> None:
        """What is not replayed stays for the next process."""
        await self._on_disk(self._journal.close)
        self._disk.shutdown()

    async def may_hold_records(self) -> bool:
        """Whether some record may still be in the journal alone."""
        if not self.bytes:
            return False
        oldest = await self._on_disk(self._journal.oldest)
        return oldest is not None and oldest <= self._last_with_records

    def due_in(self) -> float:
        """Seconds until what is in the newest segment may be replayed."""
        return max(self._seal_at - monotonic(), 0.0)

    # --- in ------------------------------------------------------------------------------

    async def append(self, entries: Sequence[Entry]) -> None:
        """Durable when it returns; what has no JSON form is set aside.

        Raises OSError when the disk takes nothing.
        """

        def work() -> tuple[int, int, list[tuple[Entry, TypeError]]]:
            payloads: list[bytes] = []
            bad: list[tuple[Entry, TypeError]] = []
            for entry in entries:
                try:
                    payloads.append(encode(entry))
                except TypeError as error:
                    bad.append((entry, error))
            return self._journal.append(payloads), self._journal.size(), bad

        segment, self.bytes, bad = await self._on_disk(work)
        if any(isinstance(entry, Record) for entry in entries):
            self._last_with_records = max(self._last_with_records, segment)
        self.journaled += len(entries) - len(bad)
        for entry, error in bad:
            await self.reject(entry, error)

    async def reject(self, entry: Entry | bytes, error: Exception) -> None:
        """Sets an entry aside, durably, with the reason."""
        if not isinstance(entry, bytes):
            try:
                entry = encode(entry)
            except TypeError:  # what has no JSON form, repr still shows to a person
                entry = repr(entry).encode("utf-8", "replace")
        log.error("an entry is set aside in the rejected file: %s", error)
        await self._on_disk(self._journal.reject, entry, str(error))
        self.rejected += 1

    # --- out -----------------------------------------------------------------------------

    async def write(self, records: Sequence[Record]) -> int:
        """All of them into the database, but for those it refuses: these are set aside.

        Returns how many it took. Raises DatabaseAway; then perhaps some are there.
        """
        try:
            await self._store.add_requests(records)
            return len(records)
        except RecordRefused as error:
            if len(records) == 1:
                await self.reject(records[0], error)
                return 0
        return sum([await self.write([record]) for record in records])

    async def replay(self) -> bool:
        """One batch of the oldest entries into the database; False if there are none.

        Raises DatabaseAway; the batch is then tried again at the next call.
        """
        if self._reading is None:
            self._reading = await self._on_disk(self._oldest_segment)
            if self._reading is None:
                return False
        path, lines = self._reading
        batch = list(islice(lines, self._batch_size))
        records: list[Record] = []
        feedback: list[Feedback] = []
        unreadable: list[tuple[bytes, ValueError]] = []
        for line in batch:
            payload = line.raw if isinstance(line, Damaged) else line
            try:
                if isinstance(line, Damaged):
                    raise ValueError("the line's checksum does not hold")
                entry = decode(payload)
            except ValueError as error:
                unreadable.append((payload, error))
                continue
            if isinstance(entry, Record):
                records.append(entry)
            else:
                feedback.append(entry)
        # Records first: feedback never stands before its record in the journal.
        self.replayed += await self.write(records)
        await self._write_feedback(feedback)
        for payload, reason in unreadable:
            await self.reject(payload, reason)
        for _ in batch:
            lines.popleft()
        if not lines:
            self.bytes = await self._on_disk(self._forget, path)
            self._reading = None
        return True

    async def _write_feedback(self, items: Sequence[Feedback]) -> None:
        """All of it into the database; what it refuses is set aside, or tried again later."""
        try:
            await self._store.add_feedback(*items)
            self.replayed += len(items)
            return
        except (UnknownResponse, Conflict, RecordRefused) as error:
            if len(items) == 1:
                await self._refused(items[0], error)
                return
        for item in items:
            await self._write_feedback([item])

    async def _refused(self, item: Feedback, error: ComposerError) -> None:
        age = datetime.now(UTC) - item.created
        if not isinstance(error, UnknownResponse) or age >= self._unknown_grace:
            await self.reject(item, error)
            return
        # Another process may hold the record in its own journal. To the end of ours.
        await self._on_disk(self._journal.append, [encode(item)])
        self._seal_at = monotonic() + RETRY_S

    # --- on the disk's thread ------------------------------------------------------------

    def _oldest_segment(self) -> tuple[Path, deque[bytes | Damaged]] | None:
        path = self._journal.oldest_sealed()
        if path is None and monotonic() >= self._seal_at:
            self._journal.seal()
            path = self._journal.oldest_sealed()
        return None if path is None else (path, deque(self._journal.read(path)))

    def _forget(self, path: Path) -> int:
        self._journal.remove(path)
        return self._journal.size()

    async def _on_disk(self, work: Callable[..., T], *arguments: Any) -> T:
        """On the one thread that touches the journal, so that its calls come one by one."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *arguments)

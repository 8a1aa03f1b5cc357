"""The answers of a batch so far, in one file that survives the process. Knows no requests.

    CRC {"input": "sha256…", "lines": 2000, "version": 1}
    CRC 17 200 {"id": …, "custom_id": …, "response": …}      line 17 (from 0) and its status

An answer is safe once `put` returned: written and synced, together with those that came
meanwhile (group commit). A process killed while it writes leaves at most one torn tail, which
the next one cuts off: only whole lines whose checksum holds count, so a line is either answered
or will be asked again, and never both.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from composer.durable import framed, replace_file, sync_folder, unframed, write_all
from composer.errors import Conflict, StoreError

VERSION = 1


class Locked(Conflict):
    """Another process has the answers open."""


@dataclass(frozen=True, slots=True)
class _Put:
    index: int
    status: int
    text: bytes
    done: asyncio.Future[None]


class Answers:
    """The answers to the `lines` requests of the input with this digest, 17 bytes of memory a
    line. One process at a time has them open. Opening and `write` block; used from one event
    loop."""

    def __init__(self, path: Path, *, digest: str, lines: int, fresh: bool = False) -> None:
        """Takes up what is there, or begins; `fresh` throws away what is there, whatever input it
        belongs to. Raises Conflict where the file belongs to another input, Locked where to another
        process, and StoreError where it cannot be written."""
        self._path = path
        self._head = {"version": VERSION, "input": digest, "lines": lines}
        self._at = array("q", [-1]) * lines
        self._sizes = array("q", [0]) * lines
        self._ok = bytearray(lines)
        self.answered = self.failed = 0  # `failed` are those answered with an error
        self._waiting: list[_Put] = []
        self._writer: asyncio.Task[None] | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._take()
            if fresh:
                os.ftruncate(self._fd, 0)
            self._end = self._recover()
        except OSError as error:
            os.close(self._fd)
            raise StoreError(f"{path} cannot be used: {error}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def __contains__(self, index: int) -> bool:
        return self._at[index] >= 0

    def missing(self) -> list[int]:
        """The lines that have no answer yet."""
        return [index for index, at in enumerate(self._at) if at < 0]

    async def put(self, index: int, status: int, text: bytes) -> None:
        """Durable when it returns. `text` holds no line break.

        Raises StoreError when it cannot be written; then nothing of it counts. Raises ValueError
        for a line that has its answer.
        """
        if index in self:
            raise ValueError(f"line {index} is answered already")
        put = _Put(index, status, text, asyncio.get_running_loop().create_future())
        self._waiting.append(put)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all())
        await put.done

    async def settled(self) -> None:
        """Returns when all that was put is written, also where who put it did not wait for that.
        Before then, two looks at the answers may differ."""
        while self._writer is not None:
            await asyncio.wait({self._writer})

    async def aclose(self) -> None:
        """What was put is written first. The file stays; safe to call twice."""
        await self.settled()
        self.close()

    def close(self) -> None:
        """For answers to which nothing is being put."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)  # and gives the lock back

    # --- reading back --------------------------------------------------------------------

    def write(
        self,
        path: Path,
        *,
        ok: bool | None = None,
        otherwise: Callable[[int], bytes] | None = None,
    ) -> int:
        """The answers as a file, in the order of the input; how many there are. `ok` selects
        those that succeeded or those that did not; `otherwise` makes the lines that have no
        answer. The file is whole or not there, also after a crash. Raises StoreError."""
        count = 0

        def lines() -> Iterator[bytes]:
            nonlocal count
            for text in self._texts(ok, otherwise):
                count += 1
                yield text + b"\n"

        try:
            replace_file(path, lines())
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}") from error
        return count

    def _texts(self, ok: bool | None, otherwise: Callable[[int], bytes] | None) -> Iterator[bytes]:
        for index, at in enumerate(self._at):
            if at < 0:
                if otherwise is not None:
                    yield otherwise(index)
            elif ok is None or bool(self._ok[index]) == ok:
                yield os.pread(self._fd, self._sizes[index], at)

    # --- the file ------------------------------------------------------------------------

    def _take(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Locked(f"{self._path} is being written by another process") from error

    def _recover(self) -> int:
        """Reads what is there and cuts off a torn tail; the length of what counts."""
        head = framed(orjson.dumps(self._head))
        end = 0
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for raw in file:
                payload = _payload(raw)
                if payload is None:
                    break
                if end == 0:
                    self._check_head(payload)
                else:
                    self._note(payload, end + len(raw))
                end += len(raw)
        os.ftruncate(self._fd, end)
        if end == 0:
            self._append(head)
            sync_folder(self._path.parent)
            end = len(head)
        return end

    def _check_head(self, payload: bytes) -> None:
        found = orjson.loads(payload)
        if found != self._head:
            what = "another version of composer" if found["version"] != VERSION else "another input"
            raise Conflict(
                f"{self._path} holds answers to {what}: the input was changed since; put it back "
                "as it was, or begin anew"
            )

    def _note(self, payload: bytes, end: int) -> None:
        """`end` is where the line ends in the file, its line break included."""
        index, status, text = payload.split(b" ", 2)
        self._count(int(index), int(status), end - 1 - len(text), len(text))

    def _count(self, index: int, status: int, at: int, size: int) -> None:
        self._at[index], self._sizes[index] = at, size
        self._ok[index] = status < 400
        self.answered += 1
        self.failed += status >= 400

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                puts, self._waiting = self._waiting, []
                try:
                    await asyncio.to_thread(self._commit, puts)
                except Exception as error:
                    why = error.strerror if isinstance(error, OSError) else repr(error)
                    for put in puts:
                        if not put.done.cancelled():
                            put.done.set_exception(
                                StoreError(
                                    f"{self._path} cannot be written: {why}; what was "
                                    "answered before is safe"
                                )
                            )
                    continue
                for put in puts:
                    if not put.done.cancelled():
                        put.done.set_result(None)
        finally:
            self._writer = None

    def _commit(self, puts: Sequence[_Put]) -> None:
        lines = [framed(b"%d %d %b" % (put.index, put.status, put.text)) for put in puts]
        try:
            self._append(b"".join(lines))
        except OSError:
            os.ftruncate(self._fd, self._end)  # never append behind a torn line
            raise
        for put, line in zip(puts, lines, strict=True):
            self._end += len(line)
            self._count(put.index, put.status, self._end - 1 - len(put.text), len(put.text))

    def _append(self, data: bytes) -> None:
        write_all(self._fd, data)
        os.fsync(self._fd)


def _payload(raw: bytes) -> bytes | None:
    """What a line says, or None where it is torn or damaged."""
    return unframed(raw[:-1]) if raw.endswith(b"\n") else None

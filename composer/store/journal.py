"""An append-only journal of opaque lines in segment files. Knows neither records nor databases.

Layout, one slot per running process, held by an advisory lock that dies with its holder:

    journal/0/lock
    journal/0/00000007.jsonl     a segment: lines `crc32-of-payload SP payload LF`
    journal/0/rejected.jsonl     lines nobody could store, each with the reason

A line is safe once `append` returned: written and fsynced, its segment's name too. A process
killed while appending leaves at most one torn tail, of lines never acknowledged. Segments are
numbered in the order they were written; only the newest is written to, and a reader takes the
older ones, so sealing one is nothing but starting the next.

Everything here blocks and none of it is safe to call from two threads at once.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from composer.durable import framed, sync_folder, unframed, write_all
from composer.errors import StoreError

log = logging.getLogger(__name__)

SEGMENT_BYTES = 4 << 20
"""A segment is sealed at this size: small enough to be read whole, large enough to be rare."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A line that was ended but whose checksum does not hold: the disk's fault."""

    raw: bytes


class Journal:
    """One process's slot under `root`. `open` takes it, with what dead processes left behind."""

    def __init__(self, root: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._root = root
        self._segment_bytes = segment_bytes
        self._lock: int | None = None
        self._folder = root
        self._active: int | None = None  # the file descriptor of the newest segment
        self._size = 0  # bytes of it known to be whole lines
        self._number = 0  # of the newest segment ever made

    # --- life ----------------------------------------------------------------------------

    def open(self) -> None:
        """Takes the first free slot and the segments of slots whose process is gone.

        Raises StoreError when the folder cannot be made or written.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            slot = 0
            while (lock := _lock(self._root / str(slot))) is None:
                slot += 1
            self._lock, self._folder = lock, self._root / str(slot)
            self._number = self.newest() or 0
            self._adopt()
        except OSError as error:
            self.close()
            raise StoreError(
                f"the journal folder {self._root} cannot be used: {error}; "
                "make it writable, or set COMPOSER_JOURNAL to another folder"
            ) from error

    def close(self) -> None:
        """Lets the slot go; its segments stay for the next process."""
        self.seal()
        if self._lock is not None:
            os.close(self._lock)  # closing releases the lock
            self._lock = None

    def _adopt(self) -> None:
        for folder in sorted(path for path in self._root.iterdir() if path.name.isdigit()):
            if folder == self._folder or (lock := _lock(folder)) is None:
                continue
            try:
                for path in _segments(folder):
                    self._number += 1
                    path.rename(self._path(self._number))
                sync_folder(self._folder)
                sync_folder(folder)
            finally:
                os.close(lock)

    # --- writing -------------------------------------------------------------------------

    def append(self, payloads: Sequence[bytes]) -> int:
        """Makes the payloads durable, in order, and returns their segment's number.

        A payload holds no line break. All of them or none: on OSError (a full disk, say) what
        was written is cut off again, or left as a tail that fails its checksum.
        """
        if not payloads:
            return self._number
        if self._active is None or self._size >= self._segment_bytes:
            self._start_segment()
        assert self._active is not None
        data = b"".join(framed(payload) for payload in payloads)
        try:
            write_all(self._active, data)
            os.fsync(self._active)
        except OSError:
            # Never append behind a torn line, nor trust pages after a failed fsync.
            active, self._active = self._active, None
            try:
                os.ftruncate(active, self._size)
            except OSError as error:
                log.warning("segment %d keeps a torn tail: %s", self._number, error)
            finally:
                os.close(active)
            raise
        self._size += len(data)
        return self._number

    def seal(self) -> None:
        """Ends the newest segment, so that `sealed` offers it; the next append starts another."""
        if self._active is not None:
            os.close(self._active)
            self._active = None

    def reject(self, payload: bytes, reason: str) -> None:
        """Sets a payload aside for a person, durably."""
        entry = {
            "rejected": datetime.now(UTC),
            "reason": reason,
            "payload": payload.decode("utf-8", "replace"),
        }
        path = self._folder / "rejected.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            write_all(file, orjson.dumps(entry) + b"\n")
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(self._folder)

    def _start_segment(self) -> None:
        self.seal()
        self._number += 1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._active = os.open(self._path(self._number), flags, 0o600)
        self._size = 0
        sync_folder(self._folder)

    # --- reading -------------------------------------------------------------------------

    def segments(self) -> list[Path]:
        """All segments, oldest first, the one being written among them."""
        return _segments(self._folder)

    def oldest_sealed(self) -> Path | None:
        """The next segment to replay, if any; the one being written is not offered."""
        active = self._path(self._number) if self._active is not None else None
        return next((path for path in self.segments() if path != active), None)

    def oldest(self) -> int | None:
        """The number of the oldest segment, if any."""
        return next((_number(path) for path in self.segments()), None)

    def newest(self) -> int | None:
        """The number of the newest segment, if any."""
        return max((_number(path) for path in self.segments()), default=None)

    def size(self) -> int:
        """Bytes in all segments."""
        return sum(path.stat().st_size for path in self.segments())

    @staticmethod
    def read(path: Path) -> Iterator[bytes | Damaged]:
        """The payloads of a segment in order; a torn tail is left out, and logged."""
        *lines, tail = path.read_bytes().split(b"\n")
        for line in lines:
            payload = unframed(line)
            yield Damaged(line) if payload is None else payload
        whole = unframed(tail)
        if whole is not None:
            yield whole
        elif tail:
            log.warning("%s: a torn tail of %d bytes is left out", path, len(tail))

    def remove(self, path: Path) -> None:
        """Forgets a segment whose every line is stored elsewhere."""
        path.unlink()
        sync_folder(self._folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.jsonl"


def _number(path: Path) -> int:
    return int(path.stem)


def _segments(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("*.jsonl") if path.stem.isdigit())
    return sorted(found, key=_number)


def _lock(folder: Path) -> int | None:
    """The slot's lock as a file descriptor, or None while another process holds it."""
    folder.mkdir(exist_ok=True)
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return file

"""A file of lines that grows in the background and is rotated by size. Knows not what it holds."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any

import orjson

from composer.errors import SettingsError

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**20
FILES = 8
"""A file is rotated when it is so large; so many are kept: `path`, and from the newest to the
oldest `path.1` … `path.7`."""

PAUSE_S = 0.25
"""Between two writes: what a crash can lose."""

MAX_PENDING = 200_000
"""Items in memory while the disk takes nothing; beyond it they are counted and left out."""

BATCH = 1000


class LogFile:
    """`put` takes an item at once; a thread of its own turns it into a line and writes it.

    Each process begins a new file, the first line of which is `header`; so is that of a file
    which rotation began.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        encode: Callable[[Any], bytes],
        *,
        max_bytes: int = MAX_BYTES,
        files: int = FILES,
    ) -> None:
        """`encode` gives a line with its end. Raises SettingsError when the file cannot be
        opened."""
        self._path, self._encode = path, encode
        self._max_bytes, self._files = max_bytes, files
        self._header = {**header, "began": datetime.now(UTC).isoformat()}
        self._part = 0
        self._pending: deque[Any] = deque()
        self.written = self.lost = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise SettingsError(
                f"the scheduler's log {path} cannot be written: {error.strerror}; mend or unset "
                "COMPOSER_SCHEDULER_LOG"
            ) from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler log", daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        if len(self._pending) >= MAX_PENDING or self._stop.is_set():
            self.lost += 1
        else:
            self._pending.append(item)

    def stats(self) -> Mapping[str, int]:
        return {"written": self.written, "lost": self.lost, "pending": len(self._pending)}

    def close(self) -> None:
        """Blocks until all is written, or cannot be. Safe to call twice."""
        self._stop.set()
        self._thread.join()

    # --- on the thread -------------------------------------------------------------------

    def _run(self) -> None:
        failing = False
        while True:
            stopping = self._stop.wait(PAUSE_S)
            try:
                self._write_pending()
                failing = False
            except OSError as error:
                if not failing or stopping:
                    log.error("the scheduler's log %s cannot be written: %s", self._path, error)
                failing = True
            if stopping:
                self._file.close()
                return

    def _write_pending(self) -> None:
        """What could not be written stays pending."""
        while self._pending:
            if self._file.closed or self._file.tell() >= self._max_bytes:
                self._file.close()
                self._part += 1
                self._file = self._open()
            size = min(len(self._pending), BATCH)
            # By index: an iterator breaks when the event loop puts in more meanwhile.
            lines = [self._line(self._pending[i]) for i in range(size)]
            self._write(b"".join(lines))
            for _ in range(size):
                self._pending.popleft()
            self.written += size

    def _line(self, item: Any) -> bytes:
        try:
            return self._encode(item)
        except Exception:  # one strange item must not end the log
            log.exception("the scheduler's log left out %r", item)
            self.lost += 1
            return b""

    def _write(self, data: bytes) -> None:
        """All of it, or none that would be read."""
        begin, view = self._file.tell(), memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            with suppress(OSError):
                self._file.seek(begin)
                self._file.truncate()
            raise

    def _open(self) -> FileIO:
        """A new file at `path`, those before it moved on by one number."""
        moved = range(self._files - 1, 0, -1) if self._path.exists() else ()
        for number in moved:  # none where an earlier attempt moved them and could not begin
            with suppress(FileNotFoundError):
                numbered(self._path, number - 1).replace(numbered(self._path, number))
        self._file = FileIO(self._path, "w")
        self._write(
            orjson.dumps({**self._header, "part": self._part}, option=orjson.OPT_APPEND_NEWLINE)
        )
        return self._file


def numbered(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of the newest recording at `path`, oldest first, over all of its files that are
    still there. A last line that a crash cut short is left out. Raises OSError."""
    files, began = [path], _header(path).get("began")
    for number in count(1):
        older = numbered(path, number)
        if not older.exists() or _header(older).get("began") != began:
            break
        files.append(older)
    for file in reversed(files):
        with file.open("rb") as lines:
            yield from (line for line in lines if line.endswith(b"\n"))


def _header(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as lines:
        try:
            header = orjson.loads(lines.readline())
        except ValueError:
            return {}
    return header if isinstance(header, dict) else {}

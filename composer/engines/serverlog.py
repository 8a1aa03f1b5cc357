"""The file that a server writes its output to: a new one per start, the last few kept, none
without bound. Knows nothing of what is written."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

KEPT = 3
MAX_BYTES = 64 * 2**20
TAIL_BYTES = 16 * 2**10
MAX_LINE = 200

_NOISE = re.compile(
    r"- leaked |- \.\.\. skipped remainder|nanobind: |.*resource_tracker: There appear"
)
"""What C++ extensions and Python's resource tracker write at the end of many a vLLM, below the
lines that say why it ended."""

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class ServerLog:
    """`path` is the newest; `path.1` to `path.3` are those before it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> BinaryIO:
        """An empty file to append to; what was there is moved one number up."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            self._make_room()
            self.path.replace(self._older(1))
        return self.path.open("ab")

    def bound(self, max_bytes: int = MAX_BYTES) -> None:
        """Moves the content away once it has grown beyond `max_bytes`. The server appends to the
        file it was given, so that is copied and emptied; lines written in between are lost."""
        if self.path.stat().st_size <= max_bytes:
            return
        self._make_room()
        shutil.copyfile(self.path, self._older(1))
        os.truncate(self.path, 0)

    def tail(self, lines: int) -> list[str]:
        """The last lines that say something, without colours; fewer where there are not as many in
        its last kilobytes."""
        try:
            with self.path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        # A progress bar rewrites its line; what counts is its last state.
        said = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
        clean = (_ESCAPES.sub("", line).strip()[:MAX_LINE] for line in said)
        return [line for line in clean if line and not _NOISE.match(line)][-lines:]

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _make_room(self) -> None:
        for number in range(KEPT - 1, 0, -1):
            if self._older(number).exists():
                self._older(number).replace(self._older(number + 1))

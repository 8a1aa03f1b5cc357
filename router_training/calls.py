"""What experts have said, kept in a file line by line, so that nobody is asked twice. Knows neither
questions nor scores."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from composer.types import Message
from router_training.asking import Ask, How, Said
from router_training.errors import AskRefused, TrainingError


class Journal:
    """A file of JSON lines that only grows, one answer or final refusal a line; a context manager.

    A line that a kill cut off is dropped at the next opening: that call is made again. Only one
    process writes at a time.
    """

    def __init__(self, path: Path) -> None:
        """Raises TrainingError where another run writes it or it is no journal, OSError where it
        cannot be opened."""
        self.path = path
        self._said: dict[str, Said | str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def _begin(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{self.path} is being written by another run; let it end, or name another output"
            ) from error
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = orjson.loads(line)
                refused = entry.get("refused")
                self._said[entry["key"]] = refused or Said(**entry["said"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TrainingError(
                    f"{self.path}, line {number}, is no answer that a run has kept; remove the "
                    "line, or name another output"
                ) from error
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return len(self._said)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """A journal without a line is not left behind."""
        if not self._said:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def get(self, key: str) -> Said | str | None:
        """The answer, the words of a final refusal, or None."""
        return self._said.get(key)

    def keep(self, key: str, expert: str, said: Said | str) -> None:
        """On disk, as far as a killed process goes, when this returns. Raises OSError."""
        entry: dict[str, Any] = {"key": key, "expert": expert}
        entry |= {"refused": said} if isinstance(said, str) else {"said": said}
        self._file.write(orjson.dumps(entry) + b"\n")
        self._file.flush()
        self._said[key] = said


class Remembered:
    """An `Ask` that looks into a journal first. Calls are the same where expert, messages and what
    they are asked with are; two at the same time are made once."""

    def __init__(self, ask: Ask, journal: Journal, how: How) -> None:
        self._ask = ask
        self._journal = journal
        self._how = orjson.dumps(how.body(), option=orjson.OPT_SORT_KEYS)
        self._running: dict[str, asyncio.Future[Said]] = {}

    async def __call__(self, expert: str, messages: Sequence[Message]) -> Said:
        key = self._key(expert, messages)
        known = self._journal.get(key)
        if isinstance(known, str):
            raise AskRefused(known)
        if known is not None:
            return known
        if (running := self._running.get(key)) is not None:
            return await asyncio.shield(running)
        running = self._running[key] = asyncio.ensure_future(self._kept(key, expert, messages))
        try:
            return await running
        finally:
            del self._running[key]

    async def _kept(self, key: str, expert: str, messages: Sequence[Message]) -> Said:
        try:
            said = await self._ask(expert, messages)
        except AskRefused as error:
            self._journal.keep(key, expert, str(error))
            raise
        self._journal.keep(key, expert, said)
        return said

    def _key(self, expert: str, messages: Sequence[Message]) -> str:
        asked = orjson.dumps([expert, list(messages)], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(self._how + b"\n" + asked).hexdigest()[:32]

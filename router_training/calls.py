"""What experts have said, kept in a file line by line, so that nobody is asked twice. Knows neither
questions nor scores."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from composer.types import Message
from router_training.asking import Ask, How, Said
from router_training.errors import AskRefused, TrainingError

UNTOLD = "an unknown source"
"""Of lines that do not say."""


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
        self._sources: dict[str, dict[str, int]] = {}
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
                self._count(entry["expert"], entry.get("source", UNTOLD))
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

    def check(self, expert: str, source: str) -> None:
        """Raises TrainingError where it keeps answers of this expert from elsewhere."""
        others = {name: n for name, n in self._sources.get(expert, {}).items() if name != source}
        if others:
            name, count = next(iter(others.items()))
            raise TrainingError(
                f"{self.path} keeps {count} answers of {expert!r} from {name}, and those asked for "
                f"now are from {source}: two services, or an expert before and after a change, "
                "would be mixed; name another output, or remove the file to ask everything anew"
            )

    def keep(self, key: str, expert: str, said: Said | str, source: str) -> None:
        """On disk, as far as a killed process goes, when this returns. Raises OSError."""
        entry: dict[str, Any] = {"key": key, "expert": expert, "source": source}
        entry |= {"refused": said} if isinstance(said, str) else {"said": said}
        self._file.write(orjson.dumps(entry) + b"\n")
        self._file.flush()
        self._said[key] = said
        self._count(expert, source)

    def _count(self, expert: str, source: str) -> None:
        of = self._sources.setdefault(expert, {})
        of[source] = of.get(source, 0) + 1


class Remembered:
    """An `Ask` that looks into a journal first. Calls are the same where expert, messages and what
    they are asked with are; two at the same time are made once. The journal says from where its
    answers are: those of two services are not mixed (`check`)."""

    def __init__(
        self, ask: Ask, journal: Journal, how: How, source: Callable[[str], str] = lambda _: ""
    ) -> None:
        """`source` says of an expert whose answers these are (`Endpoint.source`)."""
        self._source = source
        self._ask = ask
        self._journal = journal
        self._how = orjson.dumps(how.body(), option=orjson.OPT_SORT_KEYS)
        self._running: dict[str, asyncio.Future[Said]] = {}

    def check(self, experts: Iterable[str]) -> None:
        """Before anybody is asked. Raises TrainingError where the journal has answers of one of
        these experts from another source."""
        for expert in experts:
            self._journal.check(expert, self._source(expert))

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
            self._journal.keep(key, expert, str(error), self._source(expert))
            raise
        self._journal.keep(key, expert, said, self._source(expert))
        return said

    def _key(self, expert: str, messages: Sequence[Message]) -> str:
        asked = orjson.dumps([expert, list(messages)], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(self._how + b"\n" + asked).hexdigest()[:32]

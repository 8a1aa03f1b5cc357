"""One run of a server process under its guardian, as the service sees it. Knows nothing of health,
restarts or what the process serves."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import BinaryIO

from composer.engines import guardian
from composer.errors import EngineError

MARK = "COMPOSER_PROCESS"
"""An environment variable that all descendants of a run inherit and no other process has."""

MARGIN_S = 5.0
LINE_WAIT_S = 0.2
"""For what a guardian wrote before it ended to be read."""


class Child:
    """A server process, its guardian and whatever they start. Made by `spawn`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        mark: str,
        grace_s: float,
    ) -> None:
        self._process = process
        self._writer = writer
        self._mark = f"{MARK}={mark}".encode()
        self._grace_s = grace_s
        self._status = asyncio.create_task(self._read_status(reader))

    @classmethod
    async def spawn(
        cls, command: Sequence[str], env: Mapping[str, str], log: BinaryIO, *, grace_s: float
    ) -> Child:
        """Starts it in a session of its own, so that a terminal's Ctrl-C reaches us alone. All it
        writes goes to `log`; so does the reason why it could not be run. Raises OSError."""
        mark = uuid.uuid4().hex
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-I",
                    "-S",
                    guardian.__file__,
                    str(grace_s),
                    str(os.getpid()),
                    *command,
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=log,
                    env={**env, MARK: mark},
                    start_new_session=True,
                )
            except BaseException:
                writer.close()
                raise
        return cls(process, reader, writer, mark, grace_s)

    @property
    def pid(self) -> int:
        """The guardian's; the server is its first child."""
        return self._process.pid

    async def died(self) -> int:
        """Until the server has ended: its exit status, or 128 + signal. A guardian that was killed
        took the server with it."""
        return await asyncio.shield(self._status)

    async def gone(self) -> None:
        """Until none of it is left, once the server has ended. Raises EngineError when something
        survives even SIGKILL."""
        await self._process.wait()
        self._writer.close()
        left = await self._sweep()
        if left:
            raise EngineError(
                f"processes {left} of a server survived SIGKILL, so its memory is not free; look "
                "for one that is stuck in a driver"
            )

    async def end(self, grace_s: float | None = None) -> None:
        """Ends it: asks first, kills after `grace_s` (None: that of the spawn). At once where it
        has ended. Raises EngineError when something survives even SIGKILL."""
        if grace_s is not None and not self._writer.is_closing():
            self._writer.write(str(grace_s).encode())
        self._writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s + guardian.KILL_WAIT_S + MARGIN_S):
                await self._process.wait()
        if self._process.returncode is None:  # the guardian hangs; it was stopped, say
            self._process.kill()
        await self.gone()

    async def _read_status(self, reader: asyncio.StreamReader) -> int:
        line = asyncio.ensure_future(reader.readline())
        exit = asyncio.ensure_future(self._process.wait())
        # The end of the socket alone does not tell: uvloop keeps a copy of the guardian's end.
        await asyncio.wait((line, exit), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((line,), timeout=LINE_WAIT_S)
        said = b"" if not line.done() or line.exception() else line.result()
        line.cancel()
        exit.cancel()
        return int(said) if said.endswith(b"\n") else 128 + signal.SIGKILL

    def _left(self) -> list[int]:
        """What is left, by two marks, for either can be lost: a daemon leaves the guardian's
        session, and a process that writes its own title may write over its environment."""
        return [
            process.pid
            for process in guardian.processes(with_environment=True)
            if process.session == self.pid or self._mark in process.environment.split(b"\0")
        ]

    async def _sweep(self) -> list[int]:
        """Kills what a guardian that was killed could not. Returns what survives that."""
        killing = guardian.Killing()
        while (left := self._left()) and not killing.over:
            killing.round(left)
            await asyncio.sleep(guardian.TICK_S)
        return left

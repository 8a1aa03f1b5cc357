"""Managed stand-in servers, for tests. Run as a program it is a service with one such server:

python -m tests.engines.managed FOLDER [FLAG…]
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx
import psutil

from composer.engines.launch import Launch, Restarts
from composer.engines.processes import ManagedProcess

STANDIN = Path(__file__).with_name("standin.py")


class Standin:
    """A managed stand-in server in `folder`, and what is to be known of it."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        restarted: Callable[[], Awaitable[None]] | None = None,
        **launch: object,
    ) -> None:
        self.pids_file = folder / "pids"
        self.log = folder / "server.log"
        self.restarts_seen = 0
        self._restarted = restarted
        self._flags = flags
        values: dict[str, object] = {
            "log": self.log,
            "start_timeout_s": 20,
            "stop_timeout_s": 5,
            "restarts": Restarts(first_s=0.05, most_s=0.2),
        }
        self.process = ManagedProcess(
            "standin",
            Launch.model_validate(values | launch),
            self._command,
            {"FROM_ENGINE": "1"},
            self._ready,
            self._on_restart,
        )

    def _command(self, port: int) -> Sequence[str]:
        flags = ["--port", str(port), "--pids", str(self.pids_file), *self._flags]
        return [sys.executable, str(STANDIN), *flags]

    async def _ready(self) -> bool:
        return await self.get("/health")

    async def _on_restart(self) -> None:
        assert not self.process.alive
        self.restarts_seen += 1
        if self._restarted is not None:
            await self._restarted()

    async def get(self, path: str) -> bool:
        try:
            async with httpx.AsyncClient(trust_env=False, verify=False) as client:
                url = f"http://127.0.0.1:{self.process.port}{path}"
                return (await client.get(url, timeout=5)).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(server, its child that left the session) of every run so far."""
        if not self.pids_file.exists():
            return []
        lines = self.pids_file.read_text().splitlines()
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]

    @property
    def guardian(self) -> int:
        return guardian_of(self.runs[-1][0])

    def left(self) -> list[int]:
        """Those of all runs that still run."""
        return [pid for run in self.runs for pid in run if running(pid)]


def guardian_of(server: int) -> int:
    parent = psutil.Process(server).parent()
    assert parent is not None
    assert "guardian.py" in " ".join(parent.cmdline())
    return parent.pid


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


async def service(folder: Path, flags: Sequence[str]) -> None:
    """With --forked it has a child, made by fork alone, that sleeps: its pid is printed."""
    standin = Standin(folder, *(flag for flag in flags if flag != "--forked"))
    await standin.process.start()
    print("ready", flush=True)
    if "--forked" in flags:
        print(sleeping_fork(), flush=True)
    await asyncio.sleep(600)


def sleeping_fork() -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    return pid


if __name__ == "__main__":
    asyncio.run(service(Path(sys.argv[1]), sys.argv[2:]))

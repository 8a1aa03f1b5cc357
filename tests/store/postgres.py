"""A private PostgreSQL server for tests: its own folder, a free loopback port, nothing shared."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

_INSTALLED = Path("/usr/lib/postgresql")  # where Debian keeps them, off the PATH


def find_binaries() -> Path | None:
    """The folder that holds initdb and pg_ctl, newest version first; None if there is none."""
    on_path = shutil.which("pg_ctl")
    if on_path is not None and shutil.which("initdb") is not None:
        return Path(on_path).parent
    versions = [path for path in _INSTALLED.glob("*/bin") if (path / "initdb").exists()]
    return max(versions, key=lambda path: float(path.parent.name), default=None)


@contextmanager
def running_server() -> Iterator[PostgresServer]:
    """For fixtures: one that runs, and is gone afterwards. Skips where none is installed."""
    if find_binaries() is None:
        pytest.skip("no PostgreSQL server binaries (apt install postgresql)")
    server = PostgresServer()
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.destroy()


class PostgresServer:
    """`create`, then `start` and `stop` as often as wanted, at last `destroy`.

    The server refuses to run as root, so root runs it as the user `postgres`.
    """

    def __init__(self) -> None:
        binaries = find_binaries()
        if binaries is None:
            raise FileNotFoundError("no PostgreSQL server is installed (apt install postgresql)")
        self._bin = binaries
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self.folder = Path(tempfile.mkdtemp(prefix="composer-pg-"))
        self._data = self.folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def create(self) -> None:
        if self._user:
            shutil.chown(self.folder, "postgres", "postgres")
        self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8")

    def start(self) -> None:
        """Returns when it accepts connections, after whatever recovery it needs."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        log = self.folder / "server.log"
        self._run("pg_ctl", "-D", self._data, "-l", log, "-o", options, "-w", "-t", "60", "start")

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash: connections cut, recovery at the next start."""
        self._run("pg_ctl", "-D", self._data, "-m", mode, "-w", "-t", "60", "stop")

    def pause(self) -> None:
        """From now on it hangs: the port takes connections, and nothing is ever answered."""
        for process in self._processes():
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        for process in self._processes():
            process.send_signal(signal.SIGCONT)

    def destroy(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.resume()
            self.stop("immediate")
        shutil.rmtree(self.folder)

    def _processes(self) -> list[psutil.Process]:
        pid = int((self._data / "postmaster.pid").read_text().split("\n")[0])
        postmaster = psutil.Process(pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        # Not a pipe: the server that pg_ctl leaves behind would hold it open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, cwd=self.folder, stdout=output, stderr=output, timeout=120, **self._user
            )
            if done.returncode != 0:
                output.seek(0)
                raise RuntimeError(f"{program}: {output.read().decode(errors='replace')}")

"""Somebody else's Python program, run with nothing in reach. Knows nothing of questions and scores.

With bubblewrap: namespaces of its own (no network, no other process), the interpreter and /usr
read-only, /tmp in memory, nothing else of the disk. Without it, or where namespaces are not
allowed: a process with limits alone, which can read, write and connect to whatever this user can;
`confined` says which. In both, limits of time, memory, file size and number of processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from router_training.errors import TrainingError

TIMEOUT_S = 10.0
MEMORY_MB = 1024
"""Of address space, for each process."""

FILES_MB = 64
PROCESSES = 16
USERS = range(60_600, 60_664)
"""Whom root's programs become, each another one at a time: processes are counted by user. No user
and no service has these numbers (systemd, "Users, Groups, UIDs and GIDs")."""

_OUTPUT = 65_536  # bytes that are read of what a program lets out past its closed output
_START_S = 20.0  # the interpreter's own start on a busy machine is not the program's time

_BOOTSTRAP = r"""
import json, os, resource, sys
asked = json.loads(sys.stdin.buffer.read())
if asked["drop"] is not None:
    os.setgroups([])
    os.setresgid(*[asked["drop"]] * 3)
    os.setresuid(*[asked["drop"]] * 3)
for name, most in asked["limits"].items():
    which = getattr(resource, name)
    hard = resource.getrlimit(which)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))
result = os.fdopen(os.dup(1), "w")
os.set_inheritable(result.fileno(), False)
nothing = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(nothing, fd)
print(asked["token"], "began", file=result, flush=True)
try:
    names = {"__name__": "answer"}
    for part in ("code", "tests"):
        exec(compile(asked[part], part, "exec"), names)
except BaseException as error:
    said = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    print(asked["token"], "failed", said, file=result, flush=True)
else:
    print(asked["token"], "passed", file=result, flush=True)
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """`why` it did not pass, in a few words."""

    passed: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Way:
    """How the interpreter is started. `drop`: it becomes one of USERS."""

    command: tuple[str, ...]
    drop: bool
    confined: bool


class Sandbox:
    """`confined`: nothing outside is in reach. `warning` says what is wrong where it is not."""

    def __init__(self, way: _Way, timeout_s: float, memory_mb: int, warning: str | None) -> None:
        self._way = way
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._users: queue.SimpleQueue[int] = queue.SimpleQueue()
        for user in random.sample(USERS, len(USERS)):  # other runs on this machine have them, too
            self._users.put(user)
        self.warning = warning

    @property
    def confined(self) -> bool:
        return self._way.confined

    @classmethod
    def open(
        cls,
        *,
        timeout_s: float = TIMEOUT_S,
        memory_mb: int = MEMORY_MB,
        bwrap: str | None = "bwrap",
    ) -> Sandbox:
        """The first way that works here, tried out. `bwrap` None goes without. Raises TrainingError
        where not even a plain process can be started."""
        program = None if bwrap is None else shutil.which(bwrap)
        reasons: list[str] = [] if program else ["there is no bubblewrap"]
        for way in _ways(program):
            warning = None
            if not way.confined:
                warning = (
                    f"{'; '.join(reasons)}: the code of answers runs with limits of time and "
                    "memory alone, and can read, write and connect to whatever this user can; "
                    "install bubblewrap"
                )
            sandbox = cls(way, timeout_s, memory_mb, warning)
            try:
                ran = sandbox._run("import decimal, socket\nx = 1", "assert x == 1")
            except TrainingError as error:
                reasons.append(str(error))
                continue
            if ran.passed:
                return sandbox
            reasons.append(ran.why)
        raise TrainingError(
            f"no program can be run here ({'; '.join(reasons)}); install bubblewrap"
            + (", or be another user than root" if os.geteuid() == 0 else "")
        )

    async def run(self, code: str, tests: str) -> Ran:
        """The code and then the tests in one namespace, which is no `__main__`; passed where
        neither raises and both come to their end. Raises TrainingError where it could not be
        started."""
        return await asyncio.to_thread(self._run, code, tests)

    def _run(self, code: str, tests: str) -> Ran:
        if not self._way.drop:
            return self._run_as(None, code, tests)
        user = self._users.get()
        try:
            return self._run_as(user, code, tests)
        finally:
            self._users.put(user)

    def _run_as(self, user: int | None, code: str, tests: str) -> Ran:
        token = secrets.token_hex(8)
        asked = {
            "code": code,
            "tests": tests,
            "token": token,
            "drop": user,
            "limits": self._limits(),
        }
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) as folder,
        ):
            given.write(json.dumps(asked).encode())
            given.seek(0)
            if user is not None and not self._way.confined:
                os.chown(folder, user, user)
            try:
                process = subprocess.Popen(
                    self._way.command,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": folder},
                    start_new_session=True,
                )
            except OSError as error:
                raise TrainingError(f"the program did not start: {error.strerror}") from error
            with process:
                try:
                    assert process.stdout is not None
                    return self._watched(process.stdout.fileno(), token)
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def _watched(self, output: int, token: str) -> Ran:
        said = b""
        began = False
        until = monotonic() + _START_S
        while len(said) < _OUTPUT:
            if not select.select([output], [], [], max(0.0, until - monotonic()))[0]:
                if began:
                    return Ran(False, f"not done after {self._timeout_s:g} s")
                break
            part = os.read(output, _OUTPUT)
            if not part:
                break
            said += part
            for line in said.decode(errors="replace").split("\n")[:-1]:
                mark, _, rest = line.partition(" ")
                if mark != token:
                    continue
                if rest == "passed":
                    return Ran(True)
                if rest.startswith("failed"):
                    return Ran(False, rest.removeprefix("failed "))
                if not began:
                    began = True
                    until = monotonic() + self._timeout_s
        if began:
            return Ran(False, "it ended itself, or was killed by a limit")
        words = " ".join(said.decode(errors="replace").split())[-200:]
        raise TrainingError(f"the program did not start: {words or 'nothing is said'}")

    def _limits(self) -> dict[str, int]:
        processes = PROCESSES
        if not self._way.confined and not self._way.drop:
            processes += _own_threads()  # they are counted together
        return {
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": int(self._timeout_s) + 1,
            "RLIMIT_FSIZE": FILES_MB << 20,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_AS": self._memory_mb << 20,
            "RLIMIT_NPROC": processes,
        }


def _ways(bwrap: str | None) -> list[_Way]:
    """The best first. Root's number of processes is not limited, in a namespace of its own neither,
    so there the program becomes somebody else or is not run."""
    python = (sys.executable, "-I", "-c", _BOOTSTRAP)
    drop = os.geteuid() == 0
    ways = [_Way(python, drop, False)]
    if bwrap is not None:
        apart: tuple[str, ...] = ("--unshare-all", "--cap-drop", "ALL")
        if drop:
            # A namespace of users would leave it root's processes; becoming another needs these.
            apart = tuple(f"--unshare-{what}" for what in ("ipc", "pid", "net", "uts"))
            apart += ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        ways.insert(0, _Way((bwrap, *apart, *_mounts(), "--", *python), drop, True))
    return ways


def _mounts() -> Sequence[str]:
    args = ["--die-with-parent", "--new-session", "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        path = Path(name)
        if path.is_symlink():
            args += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            args += ["--ro-bind", name, name]
    # Before what may lie in it: the interpreter's own folder.
    args += ["--size", str(FILES_MB << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    for prefix in dict.fromkeys((sys.base_prefix, sys.prefix)):
        if not Path(prefix).is_relative_to("/usr"):
            # What lies above a mount would be made for root alone.
            for above in reversed(Path(prefix).parents[:-1]):
                if above != Path("/tmp"):
                    args += ["--perms", "0755", "--dir", str(above)]
            args += ["--ro-bind", prefix, prefix]
    args += ["--perms", "0755", "--dir", "/etc"]
    args += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    args += ["--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp", "--setenv", "HOME", "/tmp"]
    return args


def _own_threads() -> int:
    """Of all processes of this user."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.geteuid():
                total += sum(1 for _ in (process / "task").iterdir())
    return total

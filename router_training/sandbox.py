"""Somebody else's Python program, run with nothing in reach. Knows nothing of questions and scores.

With bubblewrap: namespaces of its own (no network, no other process), the interpreter and /usr
read-only, /tmp in memory, nothing else of the disk. Without it, or where namespaces are not
allowed: a process with limits alone, which can read, write and connect to whatever this user can;
`confined` says which. In both, limits of time, memory, file size and number of processes, and tests
that run apart from what they test (`examiner.py`), as far as they can (`testform.py`).

Without namespaces a supervisor ends what a program leaves behind, in whatever session, and programs
that count as one user's processes take turns: this user's are one at a time. A program that means
harm and is the same user can end the supervisor, or have others start something for it: that only
bubblewrap, or a user of its own (which root gives it), keeps from it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

from router_training.errors import TrainingError
from router_training.testform import why_together

TIMEOUT_S = 10.0
MEMORY_MB = 1024
"""Of address space, for each process."""

FILES_MB = 64
PROCESSES = 16
USERS = range(60_600, 60_664)
"""Whom root's programs become, each another one at a time: processes are counted by user. No user
and no service has these numbers (systemd, "Users, Groups, UIDs and GIDs")."""

TURN_S = 600.0
"""How long a program waits for its turn. One ahead of it takes 45 s at the most (its start, its
time and its end), so this is more than a dozen of the slowest."""

_OUTPUT = 65_536  # bytes that are read of what a program lets out past its closed output
_SWEEP_S = 15.0
_START_S = 20.0  # the interpreter's own start on a busy machine is not the program's time


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


_SUPERVISOR = _text("supervisor.py")
_EXAMINER = f"""
import sys, types
sys.modules["router_training.carrying"] = carrying = types.ModuleType("carrying")
exec({_text("carrying.py")!r}, carrying.__dict__)
exec({_text("examiner.py")!r})
"""  # this package is not to be seen in there
_TRIAL = "import colorsys, wave\nx = 1"  # what the examiner has not read as somebody else
_HELPERS = 3  # processes of ours beside the program's


@dataclass(frozen=True, slots=True)
class Ran:
    """`why` it did not pass, in a few words. `together`: why the tests ran in the code's own
    process, where it could have forged the verdict; None where they ran apart."""

    passed: bool
    why: str = ""
    together: str | None = None


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
        self._together: Counter[str] = Counter()
        self._escaped = 0
        self.warning = warning

    @property
    def confined(self) -> bool:
        return self._way.confined

    @property
    def notes(self) -> list[str]:
        """What is to be known of the verdicts so far."""
        notes = [
            f"{count} answers ran in one process with their tests, and could have forged their "
            f"scores ({why}); tests of another form are run apart"
            for why, count in self._together.most_common()
        ]
        if self._escaped:
            notes.append(
                f"{self._escaped} programs ended whoever watched over them, or could not be ended, "
                "and count as wrong: look for what they left running, and install bubblewrap"
            )
        return notes

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
                ran = sandbox._run(_TRIAL, "assert x == 1")
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
        """The code, as no `__main__`, and then the tests, which see its names; passed where
        neither raises and both come to their end. Raises TrainingError where it could not be
        started, or had no turn for `TURN_S`."""
        ran = await asyncio.to_thread(self._run, code, tests)
        if ran.together is not None:
            self._together[ran.together] += 1
        return ran

    def _run(self, code: str, tests: str) -> Ran:
        with suppress(SyntaxError, ValueError, RecursionError):  # which the run will show
            if why := why_together(tests):
                return replace(self._turn(code, tests, True), together=why)
        ran = self._turn(code, tests, False)
        if ran.together is None:
            return ran
        return replace(self._turn(code, tests, True), together=ran.together)

    def _turn(self, code: str, tests: str, together: bool) -> Ran:
        if self._way.drop:
            with _claimed(random.sample(USERS, len(USERS))) as user:
                return self._run_as(user, code, tests, together)
        if self._way.confined:
            return self._run_as(None, code, tests, together)
        with _claimed([os.geteuid()]):  # all processes of this user are counted as one's
            return self._run_as(None, code, tests, together)

    def _run_as(self, user: int | None, code: str, tests: str, together: bool) -> Ran:
        token = secrets.token_hex(8)
        asked = {
            "code": code,
            "tests": tests,
            "together": together,
            "token": token,
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
                    self._command("" if user is None else str(user)),
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
                    ran = self._watched(process.stdout.fileno(), token)
                finally:
                    ended = self._end(process)
            if ended:
                return ran
            self._escaped += 1
            return Ran(False, "it ended whoever watched over it, or cannot be ended")

    def _command(self, user: str) -> list[str]:
        if self._way.confined:
            return [*self._way.command, user]
        return [sys.executable, "-I", "-c", _SUPERVISOR, user, *self._way.command, user]

    def _end(self, process: subprocess.Popen[bytes]) -> bool:
        """And all that it has started; False where a supervisor could not do it."""
        if self._way.confined:  # they end with the first process of their namespace
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return True
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            status = process.wait(_SWEEP_S)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return status == 0

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
                verdict, _, why = rest.partition(" ")
                if verdict == "passed":
                    return Ran(True)
                if verdict == "failed":
                    return Ran(False, why)
                if verdict == "uncarried":
                    return Ran(False, why, together=why)
                if not began:
                    began = True
                    until = monotonic() + self._timeout_s
        if began:
            return Ran(False, "it ended itself, or was killed by a limit")
        words = " ".join(said.decode(errors="replace").split())[-200:]
        raise TrainingError(f"the program did not start: {words or 'nothing is said'}")

    def _limits(self) -> dict[str, int]:
        processes = PROCESSES + _HELPERS
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
    python = (sys.executable, "-I", "-c", _EXAMINER)
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


@contextmanager
def _claimed(users: Sequence[int]) -> Iterator[int]:
    """One of these users, whom no other program of this kind has meanwhile on this machine. Waits
    for `TURN_S`, and raises TrainingError then. An abstract socket's name is free again when its
    process ends, however it does."""
    until = monotonic() + TURN_S
    while True:
        for user in users:
            with socket.socket(socket.AF_UNIX) as claim:
                try:
                    claim.bind(f"\0router-training/{user}")
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                    continue
                yield user
                return
        if monotonic() >= until:
            alone = len(users) == 1
            raise TrainingError(
                f"an answer's program waited {TURN_S:g} s for its turn as "
                f"{f'user {users[0]}' if alone else f'one of {len(users)} users'}: others run on "
                "this machine all the time, or one hangs; see whose they are (`ss -xap | grep "
                f"router-training`) and end them{', or install bubblewrap' if alone else ''}"
            )
        sleep(0.02)


def _own_threads() -> int:
    """Of all processes of this user."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.geteuid():
                total += sum(1 for _ in (process / "task").iterdir())
    return total

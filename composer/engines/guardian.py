"""Runs one server for the service and leaves nothing of it behind. Knows nothing of ours: it is run
as a script, with the standard library alone, so that it starts in milliseconds.

    python -I -S guardian.py GRACE_S SERVICE_PID COMMAND…

Standard input is a socket of the service, which closes when the service wants the server gone, or
is gone itself, SIGKILL included. The server and all its descendants are then told to end (SIGTERM
to the server's group), and killed after GRACE_S, or the seconds that the service wrote instead. Its
status (or 128 + signal) is written to the socket the moment the server has ended; the guardian ends
when nothing of it is left.

Linux: descendants are found wherever they hide, because what has lost its parent becomes a child
of this process (PR_SET_CHILD_SUBREAPER), and a guardian that is killed takes the server with it
(PR_SET_PDEATHSIG). Elsewhere only the server's process group is known: descendants that left it
survive, and so does the server when the guardian is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from types import FrameType
from typing import NamedTuple, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

CANNOT_RUN = 127
"""The exit status where the command is not there."""

ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Each means that the server is to end."""

TICK_S = 0.02
ORPHAN_TICK_S = 1.0
CRASH_GRACE_S = 1.0
"""What a server that died leaves behind is told to end, and has this long to do so."""
KILL_WAIT_S = 10.0
TRACKER_S = 3.0


class Process(NamedTuple):
    pid: int
    parent: int
    session: int
    environment: bytes = b""


def processes(*, with_environment: bool = False) -> list[Process]:
    """All that run now, zombies left out; empty where there is no /proc. The environment is that
    of the start, and empty where it is not ours to read."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):  # gone meanwhile
            continue
        if state in b"ZX":
            continue
        environment = b""
        if with_environment:
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = file.read()
            except OSError:  # gone, or somebody else's
                pass
        found.append(Process(int(name), int(parent), int(session), environment))
    return found


def descendants(of: int) -> list[int]:
    """Pids of all processes below `of`."""
    children: dict[int, list[int]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process.pid)
    below: list[int] = []
    todo = [of]
    while todo:
        todo = [child for pid in todo for child in children.get(pid, ())]
        below += todo
    return below


def tell(pids: Collection[int], number: signal.Signals) -> None:
    """Sends a signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Killing:
    """SIGKILL for what is left, round after round, since it may fork meanwhile.

    Python's resource trackers go last, and have TRACKER_S to go by themselves: one of them removes
    the shared memory of those that were killed, as soon as all of them are gone. It would stay in
    /dev/shm otherwise, a quarter of a gigabyte for each worker of vLLM.
    """

    def __init__(self) -> None:
        self._since = time.monotonic()

    @property
    def over(self) -> bool:
        return time.monotonic() - self._since > KILL_WAIT_S

    def round(self, pids: Collection[int]) -> None:
        late = time.monotonic() - self._since > TRACKER_S
        tell([pid for pid in pids if late or not is_tracker(pid)], signal.SIGKILL)


def is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


def prctl(option: int, value: int) -> None:
    """Linux's process control; nothing elsewhere. Raises OSError when it is refused."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


class Guardian:
    """One server: started, waited for, ended."""

    def __init__(self, command: list[str], *, grace_s: float, service: int) -> None:
        self._command = command
        self._grace_s = grace_s
        self._service = service
        self._asked = False
        self._status: int | None = None
        self._wake, wakeup = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in ORDERS:
            signal.signal(number, self._ask)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._server = self._fork()

    def run(self) -> None:
        """Until the server has ended, by itself or because it was to, and none of it is left."""
        while self._status is None and not self._asked and os.getppid() == self._service:
            ready, _, _ = select.select([0, self._wake], [], [], ORPHAN_TICK_S)
            if 0 in ready:
                self._grace_s = float(os.read(0, 64) or self._grace_s)
                break
            self._drain()
            self._reap()
        crashed = self._status is not None
        if not self._end(min(self._grace_s, CRASH_GRACE_S) if crashed else self._grace_s):
            self._say("what is left of the server did not end in time and is killed")
            if not self._kill():
                self._say(
                    f"the server's processes {self._left()} survive SIGKILL: is a driver stuck?"
                )

    def _fork(self) -> int:
        guardian = os.getpid()
        # What comes between fork and exec would be taken by our own handlers, and be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)
        pid = os.fork()
        if pid == 0:
            self._become_server(guardian)
        with suppress(PermissionError):  # it has done so itself, and has gone on to exec
            os.setpgid(pid, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERS)
        return pid

    def _become_server(self, guardian: int) -> NoReturn:
        try:
            os.setpgid(0, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guardian:  # killed before the line above
                os._exit(CANNOT_RUN)
            signal.set_wakeup_fd(-1)
            for number in (*ORDERS, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERS)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.execvp(self._command[0], self._command)
        except OSError as error:
            self._say(f"the server cannot be started: {self._command[0]}: {error.strerror}")
        os._exit(CANNOT_RUN)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def _reap(self) -> None:
        """Collects every child that has ended, adopted ones too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._server:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code
                with suppress(OSError):  # nobody there to hear it
                    os.write(0, f"{self._status}\n".encode())

    def _end(self, grace_s: float) -> bool:
        """Asks everything to end: the server's group first, what is left once the server has ended
        then. Whether it did in time."""
        deadline = time.monotonic() + grace_s
        told = self._status is not None
        if told:
            self._tell_all(signal.SIGTERM)
        else:
            kill_group(self._server, signal.SIGTERM)
        while self._left():
            if time.monotonic() > deadline:
                return False
            time.sleep(TICK_S)
            if not told and self._status is not None:
                told = True
                self._tell_all(signal.SIGTERM)
        return True

    def _kill(self) -> bool:
        """Whether nothing is left in the end."""
        killing = Killing()
        while left := self._left():
            if killing.over:
                return False
            if sys.platform == "linux":
                killing.round(left)
            else:
                kill_group(self._server, signal.SIGKILL)
            time.sleep(TICK_S)
        return True

    def _tell_all(self, number: signal.Signals) -> None:
        if sys.platform == "linux":
            tell(descendants(os.getpid()), number)
        else:
            kill_group(self._server, number)

    def _left(self) -> list[int]:
        self._reap()
        if sys.platform == "linux":
            return descendants(os.getpid())
        return [self._server] if kill_group(self._server, None) else []

    @staticmethod
    def _say(text: str) -> None:
        """Into the server's log, which is our standard error too. A full disk must not end us
        before the server has."""
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def kill_group(group: int, number: signal.Signals | None) -> bool:
    """Whether there was anyone to receive it; None only asks."""
    try:
        os.killpg(group, number or 0)
    except (ProcessLookupError, PermissionError):  # macOS: zombies alone are "not permitted"
        return False
    return True


def main(arguments: Sequence[str]) -> None:
    grace_s, service, *command = arguments
    Guardian(command, grace_s=float(grace_s), service=int(service)).run()


if __name__ == "__main__":
    main(sys.argv[1:])

"""The program that watches over another and ends all that it leaves behind. Run as text by a bare
interpreter: knows the standard library alone, and nothing of what it starts.

    python -I -c TEXT USER COMMAND …

It waits until SIGTERM comes, or its parent has died, and then ends every descendant: it is their
reaper, and so the parent of whatever they orphan, in another session or not. USER: whose processes
they become, where that is nobody else's, or nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

SUBREAPER, PARENT_DIES = 36, 1  # prctl(2)
SWEEPS = 2000


def main() -> None:
    user, *command = sys.argv[1:]
    awaited = {signal.SIGTERM, signal.SIGCHLD}
    _prctl(SUBREAPER, 1)
    _prctl(PARENT_DIES, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    if os.fork() == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        os.execv(command[0], command)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # the output has ended when the program has
        os.dup2(nothing, fd)
    while signal.sigwait(awaited) != signal.SIGTERM:
        _reaped()
    for _ in range(SWEEPS):
        for process in _descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if user and os.fork() == 0:
            os.setresuid(int(user), int(user), int(user))
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of this user at once: none can fork away
            os._exit(0)
        if _reaped():
            os._exit(0)
        signal.sigtimedwait({signal.SIGCHLD}, 0.005)
    os._exit(1)


def _reaped() -> bool:
    """True where no child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _descendants(process: int) -> list[int]:
    """Parents first, so that they have no more children when these are ended."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b") ")[2].split()[1])
            except (OSError, ValueError, IndexError):  # it has ended meanwhile
                continue
            children.setdefault(parent, []).append(int(name))
    found = [process]
    for one in found:
        found += children.get(one, ())
    return found[1:]


def _prctl(what: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(what, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({what})")


if __name__ == "__main__":
    main()

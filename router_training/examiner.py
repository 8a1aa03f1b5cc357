"""The program that a sandbox starts: an answer's code in one process, its tests in another, which
alone can tell the verdict. Run as text by a bare interpreter: knows the standard library alone.

The examiner runs the tests. Names that these do not define themselves are the answer's: functions,
classes and objects are stand-ins (`Remote`), through which the candidate process is asked, and
plain values come over as copies, to be compared here. So the answer's code cannot say what a
verdict is, and a plain value is equal to none of its objects but by that object's plain base.
Built-in names stay the built-in ones, whatever the answer defines; what it prints is not seen; a
list that it is given is brought up to date when its call returns. Of objects of its own classes the
tests can only ask what it says of them: where a test compares two of these, orders one
(`abs(f(1) - 2) < 1e-6`) or asks whether it is true, their own methods decide.

Tests for which that does not do (`together` in what is asked) are run by the candidate itself,
which can then say of them what it likes.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import json
import os
import resource
import socket
import sys
from typing import Any

from router_training.carrying import Gone, Link, Module, Uncarried

DUMPABLE = 4  # prctl(2)


class Names(dict[str, Any]):
    """The tests' globals: what they do not define themselves is the answer's, unless built in."""

    def __init__(self, link: Link) -> None:
        super().__init__(__name__="tests")
        self._link = link

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        value = self._link.ask("name", name)
        if value is Module:
            self[name] = value = importlib.import_module(name)
        return value


def candidate(end: socket.socket) -> None:
    """Runs the answer's code and answers for it; never comes back."""
    link = Link(end, trusted=False)
    limits, code, tests = link.receive()
    _limit(limits)
    _prctl(DUMPABLE, 1)  # else it could not read its own /proc
    own: dict[str, Any] = {"__name__": "answer"}
    link.mine[0] = own
    try:
        exec(compile(code, "code", "exec"), own)
        if tests is not None:
            exec(compile(tests, "tests", "exec"), own)
    except BaseException as error:
        link.send(["failed", _words(error)])
        os._exit(0)
    link.send(["ran"])
    try:
        while True:
            link.serve(link.receive())
    except BaseException:
        os._exit(0)


def examine(link: Link, asked: dict[str, Any]) -> tuple[str, str]:
    """(passed, failed or uncarried, why)."""
    together = asked["together"]
    try:
        link.send([asked["limits"], asked["code"], asked["tests"] if together else None])
        said = link.receive()
        if said[0] != "ran":
            return "failed", str(said[1])
        if not together:
            exec(compile(asked["tests"], "tests", "exec"), Names(link))
            if link.gone:
                raise Gone
    except Gone:
        return "failed", "it ended itself, or was killed by a limit"
    except Uncarried as error:
        return "uncarried", f"a test hands over a {error}"
    except BaseException as error:
        return "failed", _words(error)
    return "passed", ""


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    except BaseException:
        return type(error).__name__


def _limit(limits: dict[str, int]) -> None:
    for name, most in limits.items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (bound, bound))


def _prctl(what: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(what, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({what})")


def _nowhere() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)


def main() -> None:
    if sys.argv[1]:  # root's programs become somebody else
        user = int(sys.argv[1])
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:  # before anything is read that it should not know
        kept = theirs.fileno()
        _nowhere()
        os.closerange(3, kept)
        os.closerange(kept + 1, 65536)
        candidate(theirs)
    theirs.close()
    _prctl(DUMPABLE, 0)  # nobody of this user reads its memory or opens its descriptors
    asked = json.loads(sys.stdin.buffer.read())
    os.ftruncate(0, 0)  # bubblewrap's own process has it open as well, and may be read
    result = os.fdopen(os.dup(1), "w")
    os.set_inheritable(result.fileno(), False)
    _nowhere()
    _limit(asked["limits"])
    print(asked["token"], "began", file=result, flush=True)
    verdict, why = examine(Link(ours, trusted=True), asked)
    print(asked["token"], verdict, why, file=result, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

"""What somebody else's program cannot do. Bombs are small: if they are not held, nothing breaks."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from router_training import supervisor
from router_training.errors import TrainingError
from router_training.sandbox import MEMORY_MB, PROCESSES, Ran, Sandbox, _claimed
from router_training.scorers import Code
from router_training.scoring import Example

BWRAP = shutil.which("bwrap")

TIMEOUT_S = 2.0


def opened(bwrap: str | None) -> Sandbox:
    try:
        return Sandbox.open(timeout_s=TIMEOUT_S, bwrap=bwrap)
    except TrainingError as error:
        pytest.skip(str(error))


@pytest.fixture(
    scope="module",
    params=[
        "limits",
        pytest.param(
            "bwrap", marks=pytest.mark.skipif(BWRAP is None, reason="needs Debian's bubblewrap")
        ),
    ],
)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Either kind: limits hold in both."""
    return opened("bwrap" if request.param == "bwrap" else None)


@pytest.fixture(scope="module")
def confined() -> Sandbox:
    if BWRAP is None:
        pytest.skip("needs Debian's bubblewrap")
    sandbox = opened("bwrap")
    if not sandbox.confined:
        pytest.skip(sandbox.warning or "")
    return sandbox


FORGES = """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b"passed\\n")
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    ("code", "tests", "passed"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", True),
        ("def f(x): return x", "assert f(1) == 2", False),
        ("def f(x): return x + 1\nif __name__ == '__main__': input()", "assert f(1) == 2", True),
        ("print('x' * 100_000)", "pass", True),
        ("import os; os._exit(0)", "pass", False),
        ("raise SystemExit(0)", "pass", False),
        (FORGES, "assert False", False),
        ("class Y:\n    __eq__ = lambda *_: True\ndef f(x): return Y()", "assert f(1) == 2", False),
        ("import builtins\nbuiltins.all = all = lambda _: True", "assert all([f])", False),
        ("def f(x): return 0", "assert all(f(i) == 1 for i in range(3))", False),
        ("def f(): raise SystemExit(0)", "f()", False),
        ("import os\ndef f(): os._exit(0)", "try:\n    f()\nexcept:\n    pass", False),
        ("import os\ndef f(): os.kill(os.getppid(), 9)", "f()", False),
        ("open('own', 'w').write('x')\nassert open('own').read() == 'x'", "pass", True),
    ],
)  # fmt: skip
async def test_what_passes(sandbox: Sandbox, code: str, tests: str, passed: bool) -> None:
    assert (await sandbox.run(code, tests)).passed is passed


PEEKS = """
import os
def f():
    for name in ("fd/1", "mem", "environ"):
        try:
            open(f"/proc/{os.getppid()}/{name}", "rb")
        except OSError:
            continue
        return name
"""


async def test_an_answer_sees_nothing_of_the_process_that_judges_it(sandbox: Sandbox) -> None:
    assert await sandbox.run(PEEKS, "assert f() is None") == Ran(True)


READS = """
import os, stat
def f(mark):
    for process in filter(str.isdigit, os.listdir("/proc")):
        name = f"/proc/{process}/fd/0"
        try:
            if stat.S_ISREG(os.stat(name).st_mode) and mark in open(name).read(65536):
                return process
        except (OSError, ValueError):
            continue
"""


async def test_what_was_asked_is_not_left_for_an_answer_to_read(sandbox: Sandbox) -> None:
    """With it anybody could write the verdict: bubblewrap's own process holds both descriptors."""
    mark = f"mark-{time.monotonic_ns()}"
    assert await sandbox.run(READS, f"assert f({mark!r}) is None") == Ran(True)


STACK = """
class Stack:
    def __init__(self): self.held = []
    def push(self, one): self.held.append(one)
    def pop(self): return self.held.pop()
    def __len__(self): return len(self.held)
    def __repr__(self): return f"Stack({self.held})"
"""

NODES = """
class Node:
    def __init__(self, value, after=None): self.value, self.after = value, after
assert total(Node(1, Node(2))) == 3
"""


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("import math\nhalf = .5\ndef f(): return 1", "assert math.floor(half) + f() == 1"),
        ("def f(a): a.sort()", "given = [3, 1]\nassert f(given) is None\nassert given == [1, 3]"),
        ("def f(a, key): return sorted(a, key=key)", "assert f([1, 2], lambda x: -x) == [2, 1]"),
        ("def f(): return {1: {2, 3}, (4,): b'x', 'n': 2**70}",
         "assert f() == {1: {2, 3}, (4,): b'x', 'n': 2**70}"),
        ("from datetime import date\ndef f(): return [date(2020, 1, 2), 1j, float('inf')]",
         "import datetime\nassert f() == [datetime.date(2020, 1, 2), 1j, float('inf')]"),
        ("from collections import *\nP = namedtuple('P', 'x y')\n"
         "def f(): return P(1, Counter('aa'))",
         "assert f().y['a'] == 2 and f() == (1, {'a': 2})"),
        ("from enum import IntEnum\nclass C(IntEnum): RED = 1\ndef f(): return C.RED",
         "assert f() == 1 and f() == C.RED and f().name == 'RED'"),
        (STACK, "s = Stack()\ns.push(3)\nassert isinstance(s, Stack) and len(s) == 1\n"
                "assert repr(s) == 'Stack([3])' and s.pop() == 3\nassert not s"),
        ("class V:\n    def __init__(s, x): s.x = x\n"
         "    def __add__(s, o): return V(s.x + o.x)\n"
         "    def __eq__(s, o): return s.x == o.x", "assert V(1) + V(2) == V(3) != V(4)"),
        ("def f(n):\n    yield from range(n)",
         "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0"),
        ("def total(n):\n    s = 0\n    while n:\n        s, n = s + n.value, n.after\n"
         "    return s",
         NODES),
        ("class Odd(ValueError): pass\ndef f(): raise Odd('no')",
         "for kind in (Odd, ValueError):\n    try:\n        f()\n        assert False\n"
         "    except kind as e:\n        assert str(e) == 'no'"),
        ("seen = []\ndef f(x): seen.append(x)", "f(1)\nf(2)\nassert seen == [1, 2]"),
    ],
)  # fmt: skip
async def test_tests_run_apart_as_beside_the_code(sandbox: Sandbox, code: str, tests: str) -> None:
    assert await sandbox.run(code, tests) == Ran(True)


@pytest.mark.parametrize(
    ("code", "tests", "why"),
    [
        ("async def f(): return 1", "import asyncio\nassert asyncio.run(f()) == 1",
         "they use asyncio"),
        ("class A: pass", "class B(A): pass\nassert issubclass(B, A)", "they "),
        ("def f(x): return x.read()", "import io\nassert f(io.StringIO('a')) == 'a'",
         "a test hands over a StringIO"),
    ],
)  # fmt: skip
async def test_tests_that_need_the_code_itself_say_so(
    sandbox: Sandbox, code: str, tests: str, why: str
) -> None:
    ran = await sandbox.run(code, tests)
    assert ran.passed
    assert ran.together is not None
    assert ran.together.startswith(why)
    assert any(ran.together in note for note in sandbox.notes)


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
async def test_what_does_not_end_is_ended(sandbox: Sandbox, code: str) -> None:
    began = time.monotonic()
    ran = await sandbox.run(code, "pass")
    assert ran == Ran(False, "not done after 2 s")
    assert time.monotonic() - began < 30


FORKS = f"""
import os, time
made = 0
try:
    for _ in range({4 * PROCESSES}):
        if os.fork() == 0:
            time.sleep({TIMEOUT_S})
            os._exit(0)
        made += 1
except OSError:
    raise RuntimeError(f"held after {{made}}")
"""

GROWS = f"x = bytearray({2 * MEMORY_MB} << 20)"

FILLS = """
with open("much", "wb") as file:
    for _ in range(100):
        file.write(bytes(1 << 20))
        file.flush()
"""


STARTS = f"""
import threading, time
begun = [threading.Thread(target=time.sleep, args=(0.7,)) for _ in range({PROCESSES // 2})]
for one in begun:
    one.start()
for one in begun:
    one.join()
"""


async def test_answers_that_run_at_once_are_counted_apart(confined: Sandbox) -> None:
    ran = await asyncio.gather(*(confined.run(STARTS, "assert True") for _ in range(4)))
    assert ran == [Ran(True)] * 4


@pytest.mark.parametrize(
    ("code", "why"),
    [(FORKS, "RuntimeError: held after"), (GROWS, "MemoryError"), (FILLS, "OSError")],
)
async def test_limits(sandbox: Sandbox, code: str, why: str) -> None:
    ran = await sandbox.run(code, "pass")
    assert not ran.passed
    assert ran.why.startswith(why)


def test_nothing_is_left_running(sandbox: Sandbox) -> None:
    mark = f"left-{os.getpid()}-{time.monotonic_ns()}"
    code = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', "
    code += f"'import time; time.sleep(60)', {mark!r}])"
    asyncio.run(sandbox.run(code, "pass"))
    until = time.monotonic() + 20
    while running := [p for p in Path("/proc").glob("[0-9]*/cmdline") if _holds(p, mark)]:
        assert time.monotonic() < until, running
        time.sleep(0.05)


def _holds(file: Path, mark: str) -> bool:
    try:
        return mark.encode() in file.read_bytes()
    except OSError:
        return False


LEAVES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]])
os.wait()
print("left", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_supervisor_ends_what_was_left_in_another_session(end: signal.Signals) -> None:
    """Told to, or because whoever started it has been killed."""
    mark = f"left-{os.getpid()}-{time.monotonic_ns()}"
    text = Path(supervisor.__file__).read_text()
    watched = [sys.executable, "-c", text, "", sys.executable, "-c", LEAVES, mark]
    starts = f"import subprocess, time; p = subprocess.Popen({watched!r}); print(p.pid, flush=True)"
    starter = subprocess.Popen(
        [sys.executable, "-c", starts + "; time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    with starter:
        assert starter.stdout is not None
        told = [starter.stdout.readline().strip() for _ in range(2)]
        watcher = int(next(line for line in told if line.isdigit()))
        os.kill(watcher if end == signal.SIGTERM else starter.pid, end)
        until = time.monotonic() + 20
        while [p for p in Path("/proc").glob("[0-9]*/cmdline") if _runs(p, mark)]:
            assert time.monotonic() < until
            time.sleep(0.05)
        starter.kill()


def _runs(file: Path, mark: str) -> bool:
    """The program that was left, not those whose text names it."""
    try:
        return file.read_bytes().split(b"\0")[-2:-1] == [mark.encode()]
    except OSError:
        return False


def test_programs_of_one_user_take_turns() -> None:
    number = 10**9 + os.getpid()
    with _claimed([number]), ThreadPoolExecutor(1) as pool:

        def claim() -> int:
            with _claimed([number, number + 1]) as own:
                return own

        assert pool.submit(claim).result(20) == number + 1
    with _claimed([number]) as own:
        assert own == number


def test_nobody_waits_for_a_turn_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_training.sandbox.TURN_S", 0.1)
    first, second = 10**9 + os.getpid(), 10**9 + 2**22 + os.getpid()
    with _claimed([first]), _claimed([second]):
        for users, who in (([first], f"user {first}"), ([first, second], "one of 2 users")):
            says = pytest.raises(TrainingError, match=f"waited 0.1 s for its turn as {who}: ")
            with says, _claimed(users):
                pass
    with _claimed([first]) as own:
        assert own == first


OUTSIDE = str(Path(__file__).resolve())


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (f"open({OUTSIDE!r})", "FileNotFoundError"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/usr/written', 'w')", "OSError"),
        ("import sys; open(sys.prefix + '/written', 'w')", "OSError"),
        ("import socket; socket.create_connection(('127.0.0.1', {port}), 5)", "ConnectionRefused"),
        ("import socket; socket.create_connection(('192.0.2.1', 80), 5)", "OSError"),
        ("import os; os.kill({pid}, 0)", "ProcessLookupError"),
        ("import os; os.environ['COMPOSER_API_KEY']", "KeyError"),
        ("import os; assert len([p for p in os.listdir('/proc') if p.isdigit()]) > 3",
         "AssertionError"),
    ],
)  # fmt: skip
async def test_nothing_outside_is_in_reach(
    confined: Sandbox, code: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPOSER_API_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = code.replace("{port}", str(server.getsockname()[1]))
        ran = await confined.run(code.replace("{pid}", str(os.getpid())), "pass")
    assert not ran.passed
    assert ran.why.startswith(why), ran.why
    assert confined.warning is None


async def test_one_program_finds_nothing_of_another(confined: Sandbox) -> None:
    assert (await confined.run("open('/tmp/mine', 'w').write('x')", "pass")).passed
    ran = await confined.run("open('/tmp/mine')", "pass")
    assert ran.why.startswith("FileNotFoundError")


def test_without_bubblewrap_it_says_so() -> None:
    sandbox = opened(None)
    assert not sandbox.confined
    assert sandbox.warning is not None
    assert "there is no bubblewrap" in sandbox.warning
    assert "install bubblewrap" in sandbox.warning


def test_a_bubblewrap_that_cannot_work_is_told_of(tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no permissions to create namespaces' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = "no permissions to create namespaces"
    try:
        sandbox = Sandbox.open(bwrap=str(broken))
    except TrainingError as error:  # nor can a program be run without
        told = str(error)
    else:
        assert not sandbox.confined
        told = sandbox.warning or ""
    assert said in told


def test_where_nothing_can_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(TrainingError, match=r"no program can be run here .*install bubblewrap"):
        Sandbox.open(bwrap=None)


async def test_the_scorer(confined: Sandbox) -> None:
    scorer = Code(confined)
    example = Example("double", tests="assert double(2) == 4")
    assert scorer.lack(example) is None
    for answer, score in (
        ("Here:\n```python\ndef double(x):\n    return 2 * x\n```", 1.0),
        ("```python\ndef double(x):\n    return x\n```", 0.0),
        ("I would rather not.", 0.0),
    ):
        assert await scorer(answer, example) == score
    for tests, words in ((None, "there is nothing"), ("assert (", "not Python")):
        lack = scorer.lack(Example("double", tests=tests))
        assert lack is not None
        assert (lack.column, lack.message) == ("tests", words)

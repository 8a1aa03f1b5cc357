"""What somebody else's program cannot do. Bombs are small: if they are not held, nothing breaks."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from router_training.errors import TrainingError
from router_training.sandbox import MEMORY_MB, PROCESSES, Ran, Sandbox
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
        ("open('own', 'w').write('x')\nassert open('own').read() == 'x'", "pass", True),
    ],
)  # fmt: skip
async def test_what_passes(sandbox: Sandbox, code: str, tests: str, passed: bool) -> None:
    assert (await sandbox.run(code, tests)).passed is passed


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

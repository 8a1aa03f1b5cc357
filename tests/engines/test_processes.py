"""Managed servers: started, watched, restarted, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import uvloop
from pydantic import ValidationError

from composer.engines import guardian, processes
from composer.engines.launch import Launch, Restarts
from composer.engines.processes import ManagedProcess
from composer.errors import EngineError, EngineMisconfigured, EngineUnavailable
from tests.engines.managed import Standin, guardian_of, running, until

ROOT = Path(__file__).resolve().parents[2]

Make = Callable[..., Standin]
NewLoop = Callable[[], asyncio.AbstractEventLoop]


@pytest_asyncio.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Standin] = []

    def make(*flags: str, **options: object) -> Standin:
        made.append(Standin(tmp_path, *flags, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for standin in made:
        await standin.process.close()
        assert not standin.left()


# --- start ---------------------------------------------------------------------------


async def test_a_started_server_answers_and_a_stopped_one_leaves_nothing(make: Make) -> None:
    standin = make("--delay", "0.2")
    assert not standin.process.alive
    await standin.process.start()
    assert standin.process.alive
    assert await standin.get("/health")
    await standin.process.start()  # at once
    assert len(standin.runs) == 1
    await standin.process.stop()
    assert not standin.process.alive
    assert not standin.left()
    await standin.process.stop()
    await standin.process.start()
    assert await standin.get("/health")
    assert len(standin.runs) == 2


async def test_many_starts_make_one_process(make: Make) -> None:
    standin = make("--delay", "0.2")
    await asyncio.gather(*(standin.process.start() for _ in range(20)))
    assert len(standin.runs) == 1


async def test_a_caller_that_gives_up_does_not_end_the_start(make: Make) -> None:
    standin = make("--delay", "0.3")
    first = asyncio.create_task(standin.process.start())
    second = asyncio.create_task(standin.process.start())
    await until(lambda: bool(standin.runs))
    first.cancel()
    await second
    assert len(standin.runs) == 1
    assert first.cancelled()


async def test_a_start_that_fails_names_the_log_whose_last_lines_are_in_ours(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    standin = make("--fail", "no such model: tiny-large")
    with pytest.raises(EngineUnavailable) as failure:
        await standin.process.start()
    message = str(failure.value)
    assert "server standin ended with status 1" in message
    assert str(standin.log) in message
    assert "tiny-large" not in message  # it is shown to callers
    assert "    loading weights\n    no such model: tiny-large" in caplog.text  # without colours
    assert not standin.process.alive
    assert not standin.left()
    with pytest.raises(EngineUnavailable):  # tried anew, not remembered
        await standin.process.start()
    assert len(standin.runs) == 2


async def test_a_command_that_is_not_there_says_so(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    standin = make()
    standin.process._command = lambda port: ["/no/such/python", "-m", "vllm"]
    for _ in range(3):
        with pytest.raises(EngineMisconfigured, match=r"correct `launch.python`$"):
            await standin.process.start()
    (said,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "the server cannot be started: /no/such/python: No such file" in said
    assert "guardian" not in caplog.text


async def test_a_log_that_cannot_be_written_says_so(tmp_path: Path, make: Make) -> None:
    (tmp_path / "file").touch()
    standin = make(log=tmp_path / "file" / "server.log")
    with pytest.raises(EngineUnavailable, match=r"cannot be started with log .*server\.log"):
        await standin.process.start()
    assert not standin.runs


async def test_a_start_that_takes_too_long_fails_and_leaves_nothing(make: Make) -> None:
    standin = make("--delay", "60", start_timeout_s=1)
    with pytest.raises(EngineUnavailable, match=r"not ready 1 s after.*start_timeout_s"):
        await standin.process.start()
    assert standin.runs
    assert not standin.left()


async def test_what_ready_raises_fails_the_start(make: Make) -> None:
    standin = make()

    async def ready() -> bool:
        raise EngineError("it serves another model")

    standin.process._ready = ready
    with pytest.raises(EngineError, match="it serves another model"):
        await standin.process.start()
    assert not standin.left()


async def test_a_ready_that_hangs_does_not_hide_a_death(make: Make) -> None:
    standin = make("--fail", "out of memory")
    standin.process._ready = lambda: asyncio.sleep(60, result=True)
    async with asyncio.timeout(20):
        with pytest.raises(EngineUnavailable, match="ended with status 1"):
            await standin.process.start()


async def test_a_fixed_port_that_is_taken_is_named(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        standin = make(port=port)
        with pytest.raises(EngineUnavailable, match=f"port {port} of 127.0.0.1 is taken"):
            await standin.process.start()
    assert not standin.runs
    await standin.process.start()
    assert standin.process.port == port
    assert standin.process.alive
    await standin.process.stop()
    await standin.process.start()  # its old connections are no hindrance
    assert standin.process.port == port


async def test_a_free_port_that_is_taken_meanwhile_is_replaced(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_port = processes.free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1]]
        monkeypatch.setattr(processes, "free_port", lambda: ports.pop() if ports else free_port())
        standin = make()
        await standin.process.start()
        assert standin.process.port != taken.getsockname()[1]
    assert len(standin.runs) == 2


async def test_the_environment_and_the_devices_reach_the_server(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPOSER_API_KEY", "secret")
    monkeypatch.setenv("INHERITED", "yes")
    standin = make(devices=(2, 3), env={"FROM_LAUNCH": "2"})
    await standin.process.start()
    environment = psutil.Process(standin.runs[-1][0]).environ()
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["INHERITED"] == "yes"
    assert environment["FROM_ENGINE"] == "1"
    assert environment["FROM_LAUNCH"] == "2"
    assert environment["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    assert "COMPOSER_API_KEY" not in environment


async def test_waiting_is_logged_with_the_servers_last_line(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.engines.progress.LOG_EVERY_S", 0.1)
    standin = make("--delay", "0.5")
    with caplog.at_level(logging.INFO):
        await standin.process.start()
    port = standin.process.port
    assert any(
        message.startswith(f"server standin is starting on port {port}, ")
        and message.endswith(" s: loading weights")
        for message in caplog.messages
    )


# --- death ---------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("victim", ["server", "guardian"])
def test_kill_9_is_followed_by_a_restart_and_leaves_nothing(
    tmp_path: Path, loop: NewLoop, victim: str, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn runs the service on uvloop, which has its own way with processes and sockets."""

    async def scenario() -> None:
        standin = Standin(tmp_path)
        await standin.process.start()
        first = standin.runs[0]
        os.kill(first[0] if victim == "server" else standin.guardian, signal.SIGKILL)
        await until(lambda: not standin.process.alive)
        await standin.process.start()  # joins the restart
        assert standin.process.alive
        assert standin.restarts_seen == 1
        assert len(standin.runs) == 2
        assert not any(running(pid) for pid in first)
        assert await standin.get("/health")
        assert "server standin died with status 137" in caplog.text
        await standin.process.close()
        assert not standin.left()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())


async def test_it_comes_back_by_itself_again_and_again(make: Make) -> None:
    standin = make()
    await standin.process.start()
    for death in range(1, 4):
        assert not await standin.get("/die")
        await until(lambda death=death: standin.restarts_seen == death and standin.process.alive)
    assert len(standin.runs) == 4
    assert standin.process.restarts == 3
    assert sorted(standin.left()) == sorted(standin.runs[-1])


async def test_pauses_double_and_a_start_hears_of_a_failed_restart(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 3

    async def restarted() -> None:
        if standin.restarts_seen <= failures:
            raise EngineError("the adapters are gone")

    standin = make(restarted=restarted)
    pauses: list[float] = []
    begin_again = standin.process._begin_again

    async def recorded(pause: float) -> bool:
        pauses.append(pause)
        return await begin_again(pause)

    standin.process._begin_again = recorded  # type: ignore[method-assign]
    await standin.process.start()
    os.kill(standin.runs[-1][0], signal.SIGKILL)
    await until(lambda: not standin.process.alive)
    with pytest.raises(EngineError, match="the adapters are gone"):
        await standin.process.start()
    await until(lambda: standin.process.alive)
    assert pauses == [0.05, 0.1, 0.2, 0.2]
    assert standin.restarts_seen == failures + 1
    assert sorted(standin.left()) == sorted(standin.runs[-1])
    assert caplog.text.count("could not be restarted: the adapters are gone") == failures


async def test_a_server_that_was_healthy_for_long_starts_again_soon(make: Make) -> None:
    standin = make(restarts=Restarts(first_s=0.05, most_s=60, healthy_s=0.01))
    pauses: list[float] = []
    begin_again = standin.process._begin_again

    async def recorded(pause: float) -> bool:
        pauses.append(pause)
        return await begin_again(pause)

    standin.process._begin_again = recorded  # type: ignore[method-assign]
    await standin.process.start()
    for death in range(1, 4):
        await asyncio.sleep(0.02)
        os.kill(standin.runs[-1][0], signal.SIGKILL)
        await until(lambda death=death: standin.restarts_seen == death and standin.process.alive)
    assert pauses == [0.05, 0.05, 0.05]


# --- stop ----------------------------------------------------------------------------


async def test_what_ignores_sigterm_is_killed(make: Make) -> None:
    standin = make("--stubborn", stop_timeout_s=0.3)
    await standin.process.start()
    await standin.process.stop()
    assert not standin.left()
    assert standin.process.log.tail(1) == [
        "what is left of the server did not end in time and is killed"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /dev/full")
async def test_a_full_disk_keeps_no_server_from_being_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    stubborn = f"trap '' TERM; echo $$ > {ready}; exec sleep 60"
    ours, theirs = socket.socketpair()
    full = os.open("/dev/full", os.O_WRONLY)
    with theirs:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guardian.__file__, "0.1", str(os.getpid())),
            *("sh", "-c", stubborn),
            stdin=theirs,
            stderr=full,
        )
    os.close(full)
    await until(lambda: ready.exists() and ready.read_text().endswith("\n"))
    ours.close()
    assert await child.wait() == 0
    assert not running(int(ready.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm")
@pytest.mark.parametrize("how", ["stop", "server", "guardian"])
async def test_shared_memory_of_a_killed_server_is_removed(
    make: Make, tmp_path: Path, how: str
) -> None:
    """By Python's resource tracker, which is one of the processes that are to go."""
    standin = make(
        *("--stubborn", "--shared", str(tmp_path / "shared")),
        stop_timeout_s=0.3,
        restarts=Restarts(first_s=60),
    )
    await standin.process.start()
    memory = Path("/dev/shm") / (tmp_path / "shared").read_text()
    assert memory.exists()
    if how == "stop":
        await standin.process.stop()
    else:
        os.kill(standin.runs[-1][0] if how == "server" else standin.guardian, signal.SIGKILL)
        await until(lambda: not standin.left())
    await until(lambda: not memory.exists())


async def test_a_guardian_that_hangs_is_killed_and_its_server_too(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.engines.guardian.KILL_WAIT_S", 1.0)
    monkeypatch.setattr("composer.engines.child.MARGIN_S", 0.0)
    standin = make(stop_timeout_s=0.1)
    await standin.process.start()
    os.kill(standin.guardian, signal.SIGSTOP)
    await standin.process.stop()
    assert not standin.left()


async def test_stop_cancels_a_start_and_its_callers_hear_of_it(make: Make) -> None:
    standin = make("--delay", "60")
    starts = [asyncio.create_task(standin.process.start()) for _ in range(3)]
    await until(lambda: bool(standin.runs))
    await standin.process.stop()
    for failure in await asyncio.gather(*starts, return_exceptions=True):
        assert isinstance(failure, EngineUnavailable)
        assert "was stopped while it started" in str(failure)
    assert not standin.left()


async def test_a_start_is_cancelled_soon_however_stubborn_the_server(make: Make) -> None:
    """vLLM does not heed SIGTERM while its engine starts."""
    standin = make("--delay", "600", "--stubborn", stop_timeout_s=300)
    start = asyncio.create_task(standin.process.start())
    await until(lambda: bool(standin.runs))
    async with asyncio.timeout(60):
        await standin.process.stop()
    assert not standin.left()
    with pytest.raises(EngineUnavailable, match="was stopped while it started"):
        await start


async def test_stop_cancels_a_restart(make: Make) -> None:
    standin = make(restarts=Restarts(first_s=60))
    await standin.process.start()
    os.kill(standin.runs[-1][0], signal.SIGKILL)
    await until(lambda: not standin.process.alive)
    waiting = asyncio.create_task(standin.process.start())
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await standin.process.stop()
    with pytest.raises(EngineUnavailable, match="was stopped"):
        await waiting
    assert standin.restarts_seen == 0
    await standin.process.start()
    assert len(standin.runs) == 2


async def test_a_start_during_a_stop_comes_after_it(make: Make) -> None:
    standin = make()
    await standin.process.start()
    stops = [asyncio.create_task(standin.process.stop()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not standin.process.alive
    await standin.process.start()
    assert standin.process.alive
    assert all(stop.done() for stop in stops)
    assert sorted(standin.left()) == sorted(standin.runs[-1])


async def test_a_closed_one_does_not_start(make: Make) -> None:
    standin = make()
    await standin.process.start()
    await standin.process.close()
    await standin.process.close()
    assert not standin.left()
    with pytest.raises(EngineUnavailable, match="is closed"):
        await standin.process.start()


# --- the service's own death ---------------------------------------------------------


@pytest.mark.parametrize("victims", ["ready", "starting", "group"])
async def test_kill_9_of_the_service_leaves_nothing(tmp_path: Path, victims: str) -> None:
    delay = "60" if victims == "starting" else "0"
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.engines.managed", str(tmp_path), "--delay", delay),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    pids = tmp_path / "pids"
    if victims == "starting":
        await until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    else:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
    server, grandchild = map(int, pids.read_text().split())
    guardian = guardian_of(server)
    if victims == "group":
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    await child.communicate()
    await until(lambda: not any(running(pid) for pid in (server, grandchild, guardian)))


async def test_ctrl_c_in_the_terminal_reaches_the_service_alone(make: Make) -> None:
    standin = make()
    await standin.process.start()
    server, _ = standin.runs[-1]
    sessions = {os.getsid(pid) for pid in (server, standin.guardian)}
    assert os.getsid(0) not in sessions
    assert os.getpgid(server) == server


async def test_sigterm_for_the_guardian_is_an_order_to_end(make: Make) -> None:
    """As systemd sends it to all processes of a service."""
    standin = make(restarts=Restarts(first_s=60))
    await standin.process.start()
    os.kill(standin.guardian, signal.SIGTERM)
    await until(lambda: not standin.process.alive and not standin.left())
    assert standin.process.log.tail(1) == ["loading weights"]  # asked, not killed


async def test_a_fork_of_the_service_that_outlives_it_keeps_nothing_alive(tmp_path: Path) -> None:
    """It holds our end of the socket open, so that the guardian has to look at its parent."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.engines.managed", str(tmp_path), "--forked"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"ready\n"
    fork = int(await child.stdout.readline())
    server, grandchild = map(int, (tmp_path / "pids").read_text().split())
    child.kill()
    try:
        await until(lambda: not running(server) and not running(grandchild))
        assert running(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
        await child.communicate()


# --- settings ------------------------------------------------------------------------


def test_flags_are_written_as_the_command_line_wants_them() -> None:
    launch = Launch(
        args={
            "dtype": "bfloat16",
            "max_loras": 2,
            "enforce_eager": True,
            "enable-prefix-caching": False,
            "gpu_memory_utilization": 0.5,
            "served_model_name": ["a", "b"],
        }
    )
    assert launch.flags() == [
        *("--dtype", "bfloat16", "--max-loras", "2", "--enforce-eager"),
        *("--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5"),
        *("--served-model-name", "a", "b"),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"args": {"--dtype": "float32"}},
        {"args": {"": 1}},
        {"port": 0},
        {"devices": [-1]},
        {"stop_timeout_s": 0},
        {"pyhton": "python"},
        {"restarts": {"first_s": 0}},
    ],
)
def test_a_wrong_launch_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Launch.model_validate(wrong)


def test_equal_launches_are_equal() -> None:
    assert Launch(args={"a": 1}) == Launch(args={"a": 1})
    assert Launch(args={"a": 1}) != Launch(args={"a": 2})


async def test_the_log_has_a_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def ready() -> bool:
        return False

    async def restarted() -> None:
        raise AssertionError

    process = ManagedProcess("tiny", Launch(), lambda port: ["/bin/false"], {}, ready, restarted)
    with pytest.raises(EngineUnavailable, match=r"see its log, data/logs/tiny\.log"):
        await process.start()
    assert (tmp_path / "data" / "logs" / "tiny.log").exists()
    with pytest.raises(EngineUnavailable, match="has not been started"):
        _ = ManagedProcess("other", Launch(), lambda port: [], {}, ready, restarted).port

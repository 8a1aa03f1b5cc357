"""`composer batch` as a person uses it: what it refuses, what it says, where it goes on."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from api.batching import WireCodec
from composer.batch.answers import Answers
from composer.batch.command import Done, answer_file
from composer.batch.lines import InvalidBatch, Lines
from composer.cli import app
from composer.errors import Conflict, RequestError
from composer.service import Service
from tests.api.fakes import World, make_world
from tests.batch.child import idle
from tests.batch.helpers import ENDPOINTS, content, line, read, write
from tests.tiny import ROOT

QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def no_files_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer.registry.watch.Watcher.run", idle)


@pytest.fixture
def world() -> World:
    return make_world()


def never() -> Service:
    raise AssertionError("nothing may run")


def run(
    make: Callable[[], Service], source: Path, target: Path, *, fresh: bool = False
) -> Done | None:
    return answer_file(make, WireCodec(), source, target, fresh=fresh, console=QUIET)


async def part_done(source: Path, target: Path, *indices: int) -> None:
    """As a killed run leaves it."""
    lines = Lines(source, ENDPOINTS)
    partial = target.with_name(target.name + ".partial")
    answers = Answers(partial, digest=lines.digest, lines=len(lines))
    for index in indices:
        await answers.put(index, 200, b'{"custom_id":"%d"}' % index)
    await answers.aclose()
    lines.close()


def test_a_file_is_answered_and_a_second_time_is_not(world: World, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a", "hi shout"), line("b", body={"model": "nobody"})])
    target = tmp_path / "out"
    assert run(lambda: world.service, source, target) == Done(requests=2, failed=1, now=2)
    good, bad = read(target)
    assert content(good) == "SHOUT: HI SHOUT"
    assert bad["response"]["status_code"] == 404
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert run(never, source, target) is None
    again = make_world()
    assert run(lambda: again.service, source, target, fresh=True) == Done(2, 1, 2)
    assert len(again.engine.calls) == 1


def test_an_output_of_another_input_is_not_overwritten(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a"), line("b")])
    for other in ([line("a")], [line("a"), line("b"), line("c")], [line("b"), line("a")], ["{"]):
        target = write(tmp_path / "out", other)
        before = target.read_bytes()
        with pytest.raises(Conflict, match="does not answer this input"):
            run(never, source, target)
        assert target.read_bytes() == before


def test_it_goes_on_where_it_stopped(world: World, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line(f"{i}", f"hi {i} shout") for i in range(6)])
    asyncio.run(part_done(source, tmp_path / "out", 1, 4))
    assert run(lambda: world.service, source, tmp_path / "out") == Done(6, 0, 4)
    assert [one["custom_id"] for one in read(tmp_path / "out")] == [f"{i}" for i in range(6)]
    assert len(world.engine.calls) == 4


def test_fresh_throws_away_what_was_there(world: World, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line(f"{i}", f"hi {i} shout") for i in range(6)])
    asyncio.run(part_done(source, tmp_path / "out", 1, 4))
    assert run(lambda: world.service, source, tmp_path / "out", fresh=True) == Done(6, 0, 6)


def test_fresh_begins_anew_with_a_changed_input(world: World, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("0"), line("1")])
    asyncio.run(part_done(source, tmp_path / "out", 1))
    write(source, [line("0"), line("1", "another question"), line("2")])
    assert run(lambda: world.service, source, tmp_path / "out", fresh=True) == Done(3, 0, 3)


def test_a_changed_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("0"), line("1")])
    asyncio.run(part_done(source, tmp_path / "out", 1))
    write(source, [line("0"), line("1", "another question")])
    with pytest.raises(Conflict, match="the input was changed since"):
        run(never, source, tmp_path / "out")


def test_a_wrong_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a"), line("b"), line("a")])
    with pytest.raises(InvalidBatch, match="in:3: custom_id 'a' is also that of line 1"):
        run(never, source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_names_that_cannot_be(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a")])
    for target, words in (
        (source, "cannot be the input"),
        (tmp_path / "none" / "out", "there is no folder"),
    ):
        with pytest.raises(RequestError, match=words):
            run(never, source, target)


def test_the_command_line_tells_every_wrong_line(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a"), "{", line("a")])
    result = CliRunner().invoke(app, ["batch", str(source), str(tmp_path / "out")])
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first.startswith(f"{source}:2: not JSON")
    assert second == f"{source}:3: custom_id 'a' is also that of line 1; give it another"


def test_the_command_line_says_that_it_was_done(world: World, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a", "hi shout")])
    run(lambda: world.service, source, tmp_path / "out")
    result = CliRunner().invoke(app, ["batch", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'out'} is complete; --fresh asks everything anew\n"


def when(true: Callable[[], bool], *actions: Callable[[], object]) -> threading.Thread:
    """Does them in a thread of its own once it is true."""

    def work() -> None:
        until = time.monotonic() + 30
        while not true():
            assert time.monotonic() < until
            time.sleep(0.01)
        for action in actions:
            action()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def answered(target: Path) -> int:
    partial = target.with_name(target.name + ".partial")
    return partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_finishes_what_runs_and_begins_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    world = make_world(in_flight=2)
    source = write(tmp_path / "in", [line(f"{i}", f"hi {i} shout") for i in range(6)])
    world.engine.held = True
    said = io.StringIO()

    def go_on() -> None:
        world.engine.held = False

    def make() -> Service:
        when(lambda: world.engine.running == 2, lambda: os.kill(os.getpid(), number))
        when(lambda: "\n" in said.getvalue(), go_on)
        return world.service

    with pytest.raises(KeyboardInterrupt):
        answer_file(make, WireCodec(), source, tmp_path / "out", console=Console(file=said))
    assert said.getvalue() == "finishing what runs (requests: 2); once more stops at once\n"
    assert (len(world.engine.calls), world.engine.cancelled) == (2, [])
    assert answered(tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    again = make_world()
    assert run(lambda: again.service, source, tmp_path / "out") == Done(6, 0, 4)
    assert [one["custom_id"] for one in read(tmp_path / "out")] == [f"{i}" for i in range(6)]


def test_a_signal_before_anything_is_asked_stops_at_once(world: World, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a")])
    said = io.StringIO()

    def make() -> Service:
        os.kill(os.getpid(), signal.SIGTERM)
        return world.service

    with pytest.raises(KeyboardInterrupt):
        answer_file(make, WireCodec(), source, tmp_path / "out", console=Console(file=said))
    assert said.getvalue() == "stopping; once more stops at once\n"
    assert world.engine.calls == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_it_at_once(tmp_path: Path, number: signal.Signals) -> None:
    source = write(
        tmp_path / "in", [line("quick", "hi"), line("stuck", "hi there"), line("a", "hi")]
    )
    target, trace = tmp_path / "out", tmp_path / "trace"
    command = [sys.executable, "-m", "tests.batch.child", source, target, trace, "there"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            when(lambda: answered(target) == 2, lambda: child.send_signal(number)).join()
            assert child.stderr.readline().startswith("finishing what runs (requests: ")
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.3)
            child.send_signal(number)
            assert child.wait(5) == -number
        finally:
            child.kill()
    again = make_world()
    assert run(lambda: again.service, source, target) == Done(3, 0, 1)
    assert len(again.engine.calls) == 1

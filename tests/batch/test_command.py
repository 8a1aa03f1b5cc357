"""`composer batch` as a person uses it: what it refuses, what it says, where it goes on."""

from __future__ import annotations

import asyncio
import io
import os
import signal
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
    with pytest.raises(InvalidBatch, match="line 3: custom_id 'a' stands in line 1 too"):
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
    assert first.startswith("line 2: this is not JSON")
    assert second == "line 3: custom_id 'a' stands in line 1 too; make it another"


def test_the_command_line_says_that_it_was_done(world: World, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a", "hi shout")])
    run(lambda: world.service, source, tmp_path / "out")
    result = CliRunner().invoke(app, ["batch", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'out'} is complete; --fresh asks everything anew\n"


def test_sigterm_leaves_what_it_has(world: World, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in", [line("quick", "hi"), line("slow", "never ends, says the shout")]
    )
    world.engine.held, world.engine.free = True, 2

    def make() -> Service:
        def stop() -> None:
            until = time.monotonic() + 30
            while (tmp_path / "out.partial").read_bytes().count(b"\n") != 2:
                assert time.monotonic() < until
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop).start()
        return world.service

    with pytest.raises(asyncio.CancelledError):
        run(make, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = make_world()
    assert run(lambda: again.service, source, tmp_path / "out") == Done(2, 0, 1)

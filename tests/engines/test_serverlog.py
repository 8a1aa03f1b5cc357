"""The log files of managed servers, and the line that says what is being waited for."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console
from rich.logging import RichHandler

from composer.engines.progress import waiting
from composer.engines.serverlog import ServerLog


def test_each_start_has_its_own_file_and_the_last_three_are_kept(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "logs" / "a.log")
    for number in range(6):
        with log.open() as file:
            file.write(f"run {number}\n".encode())
    kept = {path.name: path.read_text() for path in log.path.parent.iterdir()}
    assert kept == {
        "a.log": "run 5\n",
        "a.log.1": "run 4\n",
        "a.log.2": "run 3\n",
        "a.log.3": "run 2\n",
    }


def test_a_log_that_grows_is_moved_away_while_it_is_written(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "a.log")
    with log.open() as file:
        for number in range(3):
            file.write(b"x" * 100 + str(number).encode() + b"\n")
            file.flush()
            log.bound(max_bytes=50)
            log.bound(max_bytes=50)
        file.write(b"end\n")
    assert log.path.read_text() == "end\n"
    assert (tmp_path / "a.log.1").read_text().endswith("2\n")
    assert (tmp_path / "a.log.3").read_text().endswith("0\n")


def test_the_tail_is_what_a_person_would_see(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "a.log")
    assert log.tail(3) == []
    with log.open() as file:
        file.write(b"first\n\x1b[1;31mred\x1b[0m alert\r\n\n  \n")
        file.write(b' - leaked type "x"\nnanobind: this is likely\n')
        file.write(b"loading:  10%\rloading:  90%\n\xff broken\n")
    assert log.tail(2) == ["loading:  90%", "\ufffd broken"]
    assert log.tail(9) == ["first", "red alert", "loading:  90%", "\ufffd broken"]
    with log.path.open("ab") as file:
        file.write(b"y" * 10**6 + b"\nlast")
    assert log.tail(1) == ["last"]
    assert len(log.tail(2)[0]) == 200


def test_a_file_gets_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("test")
    monkeypatch.setattr("composer.engines.progress.LOG_EVERY_S", 0)
    with caplog.at_level(logging.INFO), waiting("a starts", log) as tell:
        tell("one")
        tell("two")
    assert caplog.messages == ["a starts, 0 s: one", "a starts, 0 s: two"]
    caplog.clear()
    monkeypatch.undo()
    with caplog.at_level(logging.INFO), waiting("a starts", log) as tell:
        tell("one")
    assert not caplog.messages


def test_a_terminal_gets_a_moving_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(logging.getLogger(), "handlers", [RichHandler(console=console)])
    log = logging.getLogger("test")
    with waiting("a starts", log) as tell_a:
        tell_a("first [of] two")
        with waiting("b starts", log) as tell_b:
            tell_b("second")
            log.warning("meanwhile")
        tell_a("again")
    shown = screen.getvalue()
    assert "a starts, 0 s: first [of] two" in shown  # no markup in what a server writes
    assert "b starts, 0 s: second" in shown
    assert "meanwhile" in shown
    screen.truncate(0)
    console.print("after")  # the display has let go of the terminal
    assert screen.getvalue().strip("\0") == "after\n"

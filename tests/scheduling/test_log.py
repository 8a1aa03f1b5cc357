"""The event log: what a run of the driver wrote gives the same decisions when it is replayed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import SettingsError
from composer.scheduling import logfile
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    DevicePolicy,
    Event,
    Finished,
    Grant,
    Model,
    Refuse,
    Ticked,
    Waiting,
    Wake,
)
from composer.scheduling.log import EventLog, Step, decode, encode, read_lines, replay
from composer.scheduling.logfile import LogFile
from composer.scheduling.policy import PolicySettings, SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from tests.scheduling.fakes import Fifo, call, fifo, standing
from tests.scheduling.workload import Day

# --- a recorded run, replayed --------------------------------------------------------------


async def recorded(
    path: Path, seed: int = 1, policy: Callable[[], DevicePolicy] = Fifo
) -> list[bytes]:
    """The lines of a day, and of what follows when a device leaves and comes back."""
    day = Day(seed, policy, log_file=path)
    await day.run()
    day.configure("s")
    await day.clock.advance(60)
    day.configure("abcs")
    await day.clock.advance(60)
    day.scheduler.configure({}, {})
    await day.clock.advance(60)
    await day.scheduler.close()
    return list(read_lines(path))


@pytest.mark.parametrize("policy", [Fifo, SwapPolicy])
@pytest.mark.parametrize("seed", range(5))
async def test_a_recorded_run_replayed_gives_the_same_decisions(
    tmp_path: Path, seed: int, policy: Callable[[], DevicePolicy]
) -> None:
    lines = await recorded(tmp_path / "log" / "scheduler.jsonl", seed, policy)
    assert len(lines) > 100
    header = orjson.loads(lines[0])
    assert (header["log"], header["seed"]) == ("composer scheduler log", seed)
    kinds = {orjson.loads(line)["event"]["kind"] for line in lines[1:]}
    assert kinds >= {"configured", "arrived", "finished", "loaded", "unloaded", "lost"}
    assert replay(lines, policy) == []


async def test_another_policy_decides_otherwise(tmp_path: Path) -> None:
    lines = await recorded(tmp_path / "scheduler.jsonl", policy=SwapPolicy)
    eager = PolicySettings(patience=0.05)
    assert replay(lines, lambda: SwapPolicy(eager))


async def test_one_changed_number_is_found(tmp_path: Path) -> None:
    lines = await recorded(tmp_path / "scheduler.jsonl")
    at = next(i for i, line in enumerate(lines) if b'"kind":"grant"' in line)
    step = decode(lines[at])
    assert step is not None
    lines[at] = encode(replace(step, actions=(Grant(10_000),)))
    found = replay(lines, Fifo)
    assert [mismatch.step.seq for mismatch in found] == [step.seq]
    assert found[0].actions == step.actions


async def test_a_call_that_comes_a_bound_too_late_is_decided_otherwise(tmp_path: Path) -> None:
    """Times and deadlines are part of what is replayed."""
    lines = await recorded(tmp_path / "scheduler.jsonl")
    for at, line in enumerate(lines):
        step = decode(line)
        if step is None or not isinstance(step.event, Arrived):
            continue
        if step.event.call.deadline is not None and Grant(step.event.call.id) in step.actions:
            late = replace(step.event.call, deadline=step.at - 1)
            lines[at] = encode(replace(step, event=Arrived(late)))
            break
    assert any(m.step.seq == step.seq for m in replay(lines, Fifo))  # type: ignore[union-attr]


async def test_the_newest_steps_are_in_memory() -> None:
    scheduler = fifo()
    for _ in range(3):
        scheduler.release(await scheduler.acquire(call(expert="math")))
    steps = scheduler.events.last()
    assert [step.seq for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert replay(map(encode, steps), Fifo) == []
    assert steps[1].expert == "math"
    assert scheduler.events.last(2) == steps[-2:]
    assert scheduler.events.last(0) == []
    assert scheduler.events.stats() == {"steps": 7}


async def test_memory_is_bounded() -> None:
    log = EventLog(kept=3)
    for number in range(10):
        log.add(1, "gpu", float(number), Ticked(), ())
    assert [step.seq for step in log.last()] == [8, 9, 10]


class Raising:
    def on(self, event: Event, now: float) -> list[Action]:
        raise KeyError("a bug")


async def test_what_a_policy_raised_is_replayed_too() -> None:
    scheduler = DeviceScheduler(Raising)
    scheduler.configure(standing(), {})
    lines = [encode(step) for step in scheduler.events.last()]
    assert replay(lines, Raising) == []
    assert [m.fault for m in replay(lines, Fifo)] == [None]


def test_a_recording_without_its_beginning_or_with_gaps_is_refused() -> None:
    lines = [encode(Step(seq, 1, "gpu", 0.0, Ticked(), ())) for seq in (1, 2, 4)]
    with pytest.raises(ValueError, match="after step 2 comes step 4"):
        replay(lines, Fifo)
    with pytest.raises(ValueError, match="after step 0 comes step 2"):
        replay(lines[1:], Fifo)


# --- lines -----------------------------------------------------------------------------------

times = st.floats(-1e9, 1e9) | st.integers(0, 10**6).map(float)
calls = st.builds(
    Waiting,
    id=st.integers(0, 2**53),
    model=st.text(st.characters(exclude_categories=["Cs"])),
    arrived=times,
    adapter=st.none() | st.just("sha256:1"),
    deadline=st.none() | times,
    batch=st.booleans(),
    later=st.lists(st.sampled_from("abc")).map(tuple),
)
models = st.builds(Model, id=st.text("ab"), in_flight=st.integers(1, 9), queue=st.integers(0, 9))
events = st.one_of(
    st.builds(Arrived, calls),
    st.builds(Configured, st.lists(models).map(tuple), times, st.just(("a",))),
    st.builds(Finished, st.integers(0, 10**9)),
    st.just(Ticked()),
)
actions = st.one_of(
    st.builds(Grant, st.integers(0, 9)),
    st.builds(Refuse, st.integers(0, 9), st.sampled_from(["full", "late"]), times),
    st.builds(Wake, times),
)


@given(
    st.builds(
        Step,
        st.integers(1, 2**53),
        st.integers(1, 9),
        st.text("gpu:0"),
        times,
        events,
        st.lists(actions).map(tuple),
        st.none() | st.just("math"),
        st.none() | st.just("ValueError: x"),
    )
)
def test_a_line_says_exactly_what_happened(step: Step) -> None:
    line = encode(step)
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert decode(line) == step


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        "not json",
        '{"log": "another"}',
        '{"log": "composer scheduler log", "version": 99}',
        '{"seq": 1, "owner": 1, "device": "d", "at": 0, "event": {"kind": "x"}, "actions": []}',
        '{"seq": 1, "owner": 1, "device": "d", "at": 0, "event": {"kind": "left"}, "actions": []}',
    ],
)
def test_a_line_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(line)


# --- the file ----------------------------------------------------------------------------------


def number_line(number: int) -> bytes:
    return b'{"number":%d}\n' % number


def numbers(path: Path) -> list[int]:
    return [said["number"] for line in read_lines(path) if "number" in (said := orjson.loads(line))]


def test_a_large_file_is_rotated_and_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for last in (999, 20_000):
        file = LogFile(path, {"who": "me"}, number_line, max_bytes=10_000, files=4)
        for number in range(last):
            file.put(number)
        file.close()
        file.close()
        assert file.stats() == {"written": last, "lost": 0, "pending": 0}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "log.jsonl",
        *(f"log.jsonl.{i}" for i in (1, 2, 3)),
    ]
    read = numbers(path)
    assert read == list(range(read[0], 20_000))
    assert 1000 < len(read) < 20_000  # the oldest are gone, and so is the recording before
    small = tmp_path / "small.jsonl"
    for run in (1, 2):
        file = LogFile(small, {}, number_line)
        file.put(run)
        file.close()
    assert numbers(small) == [2]
    assert [orjson.loads(line)["part"] for line in read_lines(small) if b"part" in line] == [0]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    file = LogFile(path, {}, number_line)
    file.put(1)
    file.put(2)
    file.close()
    path.write_bytes(path.read_bytes()[:-3])
    assert numbers(path) == [1]


def test_a_disk_that_fails_stops_nobody_and_what_waited_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("composer.scheduling.logfile.PAUSE_S", 0.001)
    monkeypatch.setattr("composer.scheduling.logfile.MAX_PENDING", 3)
    file = LogFile(tmp_path / "log.jsonl", {}, number_line)
    tried, full, real = threading.Event(), True, file._write

    def write(data: bytes) -> None:
        tried.set()
        if full:
            raise OSError(28, "No space left on device")
        real(data)

    monkeypatch.setattr(file, "_write", write)
    for number in range(5):
        file.put(number)
    assert tried.wait(10)
    full = False
    file.close()
    assert numbers(tmp_path / "log.jsonl") == [0, 1, 2]
    assert file.stats() == {"written": 3, "lost": 2, "pending": 0}


def test_a_rotation_that_fails_is_tried_again_and_costs_no_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.scheduling.logfile.PAUSE_S", 0.001)
    path = tmp_path / "log.jsonl"
    file = LogFile(path, {}, number_line, max_bytes=10)
    file.put(1)
    while file.stats()["pending"]:
        time.sleep(0.001)
    real, tries = logfile.FileIO, []

    def none_left(path: Path, mode: str) -> logfile.FileIO:
        tries.append(path)
        if len(tries) < 20:
            raise OSError(24, "Too many open files")
        return real(path, mode)

    monkeypatch.setattr(logfile, "FileIO", none_left)
    file.put(2)
    until = time.monotonic() + 10
    while file.stats()["pending"]:
        assert time.monotonic() < until
        time.sleep(0.001)
    file.close()
    assert numbers(path) == [1, 2]
    names = {"log.jsonl", "log.jsonl.1", "log.jsonl.2"}  # a header alone, and one line each
    assert {one.name for one in tmp_path.iterdir()} == names


def test_half_a_write_is_taken_back(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "log.jsonl", {}, number_line)
    file.put(1)
    file.close()

    class Full:
        """Takes ten bytes and no more."""

        def __init__(self, path: Path) -> None:
            self.real = path.open("r+b", buffering=0)
            self.real.seek(0, 2)
            self.room = 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            self.room = 0
            return self.real.write(data[:10])

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    file._file = Full(tmp_path / "log.jsonl")  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        file._write(b'{"number":2}\n')
    assert numbers(tmp_path / "log.jsonl") == [1]


def test_an_item_that_cannot_be_encoded_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = LogFile(tmp_path / "log.jsonl", {}, number_line)
    for item in (1, "two", 3):
        file.put(item)
    file.close()
    assert numbers(tmp_path / "log.jsonl") == [1, 3]
    assert caplog.records[-1].levelno == logging.ERROR


def test_a_file_that_cannot_be_opened_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="COMPOSER_SCHEDULER_LOG"):
        DeviceScheduler(Fifo, log=tmp_path / "file" / "log.jsonl")

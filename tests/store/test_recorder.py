"""The recorder loses nothing and holds up nobody: database there, away, hanging or refusing."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from composer.errors import Conflict, StoreError, UnknownResponse
from composer.store import Feedback, Record, Recorder, Store
from composer.store.backlog import Backlog
from composer.store.failures import DatabaseAway
from composer.store.journal import Journal
from composer.store.records import decode, encode
from tests.store.records import make_record

T = TypeVar("T")


class SwitchedStore(Store):
    """A store whose database can be taken away, held up, or made to lose its answer."""

    away = False
    deaf = False  # commits, and then fails to say so
    calls = 0

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout_s=1.0)
        self.open = asyncio.Event()
        self.open.set()

    async def run(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        what: str,
        *,
        writes: bool = False,
    ) -> T:
        self.calls += 1
        await self.open.wait()
        if self.away:
            raise DatabaseAway("switched off")
        result = await super().run(work, what, writes=writes)
        if self.deaf and writes:
            raise DatabaseAway("the answer was lost")
        return result


@pytest.fixture
async def switched(sqlite_url: str) -> AsyncIterator[SwitchedStore]:
    store = SwitchedStore(sqlite_url)
    await store.start()
    yield store
    store.open.set()
    store.away = store.deaf = False
    await store.close()


@pytest.fixture
async def make(
    switched: SwitchedStore, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[Recorder]]]:
    """Makes started recorders on one store and one journal folder."""
    made: list[Recorder] = []

    async def make(**options: Any) -> Recorder:
        options = {"backoff_s": (0.01, 0.05), "probe_s": 0.05, "close_timeout_s": 1.0} | options
        recorder = Recorder(switched, tmp_path / "journal", **options)
        made.append(recorder)
        await recorder.start()
        return recorder

    yield make
    for recorder in made:
        await recorder.close()


async def until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)


async def ids(store: Store) -> list[str]:
    """Given all the time it needs: only the recorder is to find the store slow."""
    timeout_s, store.timeout_s = store.timeout_s, 60.0
    try:
        return sorted([record.id async for record in store.iter_requests()])
    finally:
        store.timeout_s = timeout_s


def journal_entries(folder: Path) -> list[Any]:
    paths = sorted(folder.glob("journal/*/0*.jsonl"))
    return [
        decode(line) for path in paths for line in Journal.read(path) if isinstance(line, bytes)
    ]


def rejected(folder: Path) -> list[dict[str, Any]]:
    paths = folder.glob("journal/*/rejected.jsonl")
    return [orjson.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def named(number: int, prefix: str = "r") -> list[str]:
    return [f"{prefix}{i:04d}" for i in range(number)]


Make = Callable[..., Awaitable[Recorder]]


# --- the database is there ---------------------------------------------------------------


async def test_records_reach_the_database_and_leave_no_journal(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make(batch_size=7)
    for id in named(50):
        recorder.put(make_record(id))
    await recorder.flush()
    assert await ids(switched) == named(50)
    assert recorder.stats() == {
        "database_up": True, "queued": 0, "written": 50, "journaled": 0, "replayed": 0,
        "rejected": 0, "lost": 0, "journal_bytes": 0,
    }  # fmt: skip
    assert journal_entries(tmp_path) == []


async def test_close_writes_what_is_queued(make: Make, switched: SwitchedStore) -> None:
    recorder = await make()
    for id in named(300):
        recorder.put(make_record(id))
    await recorder.close()
    await recorder.close()
    assert await ids(switched) == named(300)
    recorder.put(make_record("late"))
    assert recorder.stats()["lost"] == 1
    with pytest.raises(StoreError, match="not running"):
        await recorder.add_feedback(Feedback.checked("r0000", 1))


async def test_a_recorder_never_started_closes_quietly(
    switched: SwitchedStore, tmp_path: Path
) -> None:
    await Recorder(switched, tmp_path / "journal").close()


async def test_of_two_records_with_one_id_the_first_counts(
    make: Make, switched: SwitchedStore
) -> None:
    recorder = await make()
    for stream in (False, True):
        recorder.put(make_record("twice", stream=stream))
    await recorder.flush()
    recorder.put(make_record("twice", stream=True))
    await recorder.flush()
    assert [record.stream async for record in switched.iter_requests()] == [False]


# --- the database is away, hangs, or is slow ---------------------------------------------


async def test_records_wait_in_the_journal_while_the_database_is_away(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make(batch_size=10)
    switched.away = True
    for id in named(100):
        recorder.put(make_record(id))
        await asyncio.sleep(0)
    await recorder.flush()
    assert recorder.stats()["database_up"] is False
    assert sorted(entry.id for entry in journal_entries(tmp_path)) == named(100)
    assert recorder.stats()["journal_bytes"] > 0

    switched.away = False
    await until(lambda: recorder.stats()["replayed"] >= 100)
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert await ids(switched) == named(100)
    assert recorder.stats()["database_up"] is True
    assert journal_entries(tmp_path) == []


async def test_an_idle_recorder_sees_the_database_go(make: Make, switched: SwitchedStore) -> None:
    recorder = await make()
    switched.away = True
    await until(lambda: recorder.stats()["database_up"] is False)
    switched.away = False
    await until(lambda: recorder.stats()["database_up"] is True)


async def test_a_batch_whose_answer_was_lost_is_there_once(
    make: Make, switched: SwitchedStore
) -> None:
    recorder = await make()
    switched.deaf = True
    for id in named(20):
        recorder.put(make_record(id))
    await recorder.flush()
    assert await ids(switched) == named(20)  # committed, though we were told otherwise
    switched.deaf = False
    await until(lambda: recorder.stats()["replayed"] == 20)
    assert await ids(switched) == named(20)


async def test_a_full_queue_spills_while_the_database_hangs(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make(queue_size=20, batch_size=5, spill_after_s=60)
    switched.open.clear()
    await asyncio.sleep(0.1)  # the probe hangs now
    for id in named(100):
        recorder.put(make_record(id))
        # Only the journal can make room now, however slow the disk is.
        await until(lambda: recorder.stats()["queued"] < 40)
    await until(lambda: recorder.stats()["journaled"] > 0)
    assert recorder.stats()["lost"] == 0
    switched.open.set()
    await recorder.flush()
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert await ids(switched) == named(100)


async def test_what_grows_old_in_the_queue_spills(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make(spill_after_s=0.1)
    switched.open.clear()
    await asyncio.sleep(0.1)
    recorder.put(make_record("old"))
    await until(lambda: recorder.stats()["journaled"] == 1)
    assert recorder.stats()["database_up"] is True  # it never said otherwise
    assert [entry.id for entry in journal_entries(tmp_path)] == ["old"]
    switched.open.set()
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert await ids(switched) == ["old"]


async def test_without_database_and_disk_the_memory_is_bounded_and_losses_are_counted(
    make: Make, switched: SwitchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, payloads: Sequence[bytes]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    append = Journal.append
    monkeypatch.setattr(Journal, "append", full)
    recorder = await make(queue_size=10)
    switched.away = True
    for id in named(50):
        recorder.put(make_record(id))
        await asyncio.sleep(0.001)
    assert recorder.stats()["queued"] == 20
    assert recorder.stats()["lost"] == 30
    with pytest.raises(StoreError, match="feedback cannot be kept, the journal fails"):
        await recorder.add_feedback(Feedback.checked("elsewhere", 1))

    monkeypatch.setattr(Journal, "append", append)
    switched.away = False
    await recorder.flush()
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert await ids(switched) == named(20)


async def test_close_while_the_database_is_away_journals_and_the_next_boot_replays(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make()
    switched.away = True
    for id in named(30):
        recorder.put(make_record(id))
    await recorder.close()
    assert sorted(entry.id for entry in journal_entries(tmp_path)) == named(30)
    switched.away = False
    again = await make()
    await until(lambda: again.stats()["replayed"] == 30)
    assert await ids(switched) == named(30)


async def test_close_while_the_database_hangs_is_bounded(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make(close_timeout_s=0.1, spill_after_s=60)
    switched.open.clear()
    for id in named(30):
        recorder.put(make_record(id))
    async with asyncio.timeout(5):
        await recorder.close()
    assert sorted(entry.id for entry in journal_entries(tmp_path)) == named(30)


async def test_close_without_database_and_disk_says_what_is_lost(
    make: Make, switched: SwitchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, payloads: Sequence[bytes]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = await make()
    switched.away = True
    monkeypatch.setattr(Journal, "append", full)
    recorder.put(make_record("a"))
    await until(lambda: recorder.stats()["database_up"] is False)
    with pytest.raises(StoreError, match=r"1 records are lost at the stop: .*No space"):
        await recorder.close()


async def test_what_nobody_foresaw_is_logged_and_survived(
    make: Make,
    switched: SwitchedStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write = Backlog.write
    stumbles = 1

    async def broken(self: Backlog, records: Sequence[Record]) -> int:
        nonlocal stumbles
        if records and stumbles:
            stumbles -= 1
            raise AttributeError("a bug")
        return await write(self, records)

    monkeypatch.setattr(Backlog, "write", broken)
    recorder = await make()
    recorder.put(make_record("a"))
    await recorder.flush()
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert await ids(switched) == ["a"]
    assert "the recorder stumbled and goes on" in caplog.text


# --- what nobody can store ---------------------------------------------------------------


async def test_a_refused_record_is_set_aside_and_the_others_are_kept(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make()
    for id in named(5):
        recorder.put(make_record(id))
    recorder.put(make_record("huge", catalog_version=2**70))
    recorder.put(make_record("odd", plan=object()))
    await recorder.flush()
    assert await ids(switched) == named(5)
    assert recorder.stats()["rejected"] == 2
    assert recorder.stats()["written"] == 5
    reasons = {entry["payload"]: entry["reason"] for entry in rejected(tmp_path)}
    assert any("huge" in payload for payload in reasons)
    assert any("JSON" in reason for reason in reasons.values())


async def test_lines_that_cannot_be_replayed_are_set_aside(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    good = [encode(make_record(id)) for id in named(3)]
    big = encode(make_record("wide", catalog_version=2**63))
    journal.append([good[0], b"gibberish", good[1], b'{"kind":"?","entry":{}}', big, good[2]])
    path = journal.segments()[0]
    journal.close()
    path.write_bytes(path.read_bytes().replace(b"r0001", b"r9999"))  # a checksum fails

    recorder = await make()
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert await ids(switched) == ["r0000", "r0002"]
    assert recorder.stats()["rejected"] == 4
    assert len(rejected(tmp_path)) == 4
    assert sum("checksum" in entry["reason"] for entry in rejected(tmp_path)) == 1


async def test_a_replay_cut_short_is_repeated_to_no_effect(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    journal.append([encode(make_record(id)) for id in named(30)])
    journal.append([encode(Feedback.checked("r0003", 1, id="f"))])
    journal.close()
    await switched.add_requests([make_record(id) for id in named(15)])  # got this far, killed
    recorder = await make(batch_size=4)
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert await ids(switched) == named(30)
    assert [item.id for item in await switched.feedback_for("r0003")] == ["f"]


# --- feedback ----------------------------------------------------------------------------


async def test_feedback_may_come_before_its_record_is_written(
    make: Make, switched: SwitchedStore
) -> None:
    recorder = await make()
    recorder.put(make_record("a"))
    receipt = await recorder.add_feedback(Feedback.checked("a", 0.75, id="mine"))
    assert (receipt.id, receipt.stored) == ("mine", "database")
    assert [item.score for item in await switched.feedback_for("a")] == [0.75]


async def test_feedback_for_nothing_is_refused(make: Make) -> None:
    recorder = await make()
    recorder.put(make_record("a"))
    with pytest.raises(UnknownResponse, match="'b'"):
        await recorder.add_feedback(Feedback.checked("b", 1))
    await recorder.add_feedback(Feedback.checked("a", 1, id="mine"))
    await recorder.add_feedback(Feedback.checked("a", 1, id="mine"))
    with pytest.raises(Conflict):
        await recorder.add_feedback(Feedback.checked("a", 0, id="mine"))


async def test_feedback_is_journaled_behind_its_record_while_the_database_is_away(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make()
    switched.away = True
    recorder.put(make_record("a"))
    receipt = await recorder.add_feedback(Feedback.checked("a", 0.5))
    assert receipt.stored == "journal"
    kinds = [type(entry) for entry in journal_entries(tmp_path)]
    assert kinds == [Record, Feedback]
    switched.away = False
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert [item.id for item in await switched.feedback_for("a")] == [receipt.id]
    assert recorder.stats()["rejected"] == 0


async def test_feedback_for_a_record_still_in_the_journal_is_taken(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    """The database is back, the record not yet replayed: the id cannot be checked."""
    journal = Journal(tmp_path / "journal")
    journal.open()
    journal.append([encode(make_record(id)) for id in named(200)])
    journal.close()
    recorder = await make(batch_size=1)
    receipt = await recorder.add_feedback(Feedback.checked("r0199", 0.5))
    assert receipt.stored == "journal"
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert [item.id for item in await switched.feedback_for("r0199")] == [receipt.id]
    with pytest.raises(UnknownResponse):
        await recorder.add_feedback(Feedback.checked("nobody", 0.5))


async def test_feedback_taken_on_trust_is_set_aside_if_nobody_recorded_its_response(
    make: Make, switched: SwitchedStore, tmp_path: Path
) -> None:
    recorder = await make(unknown_grace_s=0)
    switched.away = True
    await recorder.add_feedback(Feedback.checked("nobody", 0.5))
    switched.away = False
    await until(lambda: recorder.stats()["rejected"] == 1)
    assert "'nobody'" in rejected(tmp_path)[0]["reason"]
    await until(lambda: recorder.stats()["journal_bytes"] == 0)


async def test_feedback_waits_for_another_process_to_record_its_response(
    make: Make, switched: SwitchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.store.backlog.RETRY_S", 0.05)
    here = await make()
    switched.away = True
    await here.add_feedback(Feedback.checked("theirs", 0.5))
    old = datetime.now(UTC) - timedelta(hours=1)
    await here.add_feedback(Feedback("nobodys", 0.5, "late", created=old))
    switched.away = False
    await until(lambda: here.stats()["rejected"] == 1)
    assert here.stats()["journal_bytes"] > 0
    # Only feedback waits now, so an unknown id is unknown again.
    with pytest.raises(UnknownResponse):
        await here.add_feedback(Feedback.checked("nobody", 1))
    await switched.add_requests([make_record("theirs")])
    await until(lambda: here.stats()["journal_bytes"] == 0)
    assert len(await switched.feedback_for("theirs")) == 1


async def test_feedback_whose_write_fails_is_journaled(make: Make, switched: SwitchedStore) -> None:
    recorder = await make(probe_s=60)
    recorder.put(make_record("a"))
    await recorder.flush()
    switched.deaf = True
    receipt = await recorder.add_feedback(Feedback.checked("a", 1))
    assert receipt.stored == "journal"
    switched.deaf = False
    await until(lambda: recorder.stats()["journal_bytes"] == 0)
    assert len(await switched.feedback_for("a")) == 1

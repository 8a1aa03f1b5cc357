"""What the store promises, on both databases."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings

from composer.errors import Conflict, StoreError, UnknownResponse
from composer.store import Feedback, Record, Store
from composer.store.engine import parse_url
from composer.store.failures import DatabaseAway, RecordRefused
from composer.store.records import decode, encode
from tests.store.records import NOON, failed_record, full_record, make_record, records


async def test_a_record_comes_back_as_it_was_put(store: Store) -> None:
    for record in (make_record("a"), full_record("b"), failed_record("c")):
        await store.add_requests([record])
        again = await store.get_request(record.id)
        assert again == record
        np.testing.assert_array_equal(again.query_embedding, record.query_embedding)
    assert await store.get_request("nobody") is None


@given(record=records)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_any_record_the_journal_can_hold_both_databases_can(
    store: Store, record: Record
) -> None:
    await store.add_requests([record])
    journaled = decode(encode(record))
    assert isinstance(journaled, Record)
    id = f"{record.id}-{await _count(store)}"
    await store.add_requests([replace(journaled, id=id)])
    again = await store.get_request(id)
    assert again is not None
    if "\ufffd".encode() not in encode(record):  # nothing had to be mended
        assert replace(again, id=record.id) == record


async def test_the_first_record_of_an_id_stays(store: Store) -> None:
    await store.add_requests([make_record("a", stream=False)])
    await store.add_requests([make_record("a", stream=True), make_record("b")])
    assert [record.stream async for record in store.iter_requests()] == [False, False]


async def test_a_batch_is_committed_whole_or_not_at_all(store: Store) -> None:
    bad = make_record("bad", catalog_version=2**70)
    with pytest.raises(RecordRefused, match="writing records was refused"):
        await store.add_requests([make_record("good"), bad])
    assert await store.get_request("good") is None


async def test_iteration_is_by_time_across_pages(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.store.repository._PAGE", 3)
    # Pairs share their time, so that a page ends between two of one instant.
    made = [make_record(f"r{i}", created=NOON + timedelta(seconds=i // 2)) for i in range(10)]
    await store.add_requests(made[::-1])
    assert [record.id async for record in store.iter_requests()] == [r.id for r in made]
    since = NOON + timedelta(seconds=2)
    assert [r.id async for r in store.iter_requests(since)] == [r.id for r in made[4:]]
    assert [r.id async for r in store.iter_requests(NOON + timedelta(days=1))] == []


async def test_feedback_needs_its_response_and_counts_once(store: Store) -> None:
    with pytest.raises(UnknownResponse, match="'a'"):
        await store.add_feedback(Feedback.checked("a", 1.0))
    await store.add_requests([make_record("a"), make_record("b")])

    first = Feedback.checked("a", 1, id="mine", comment="good", labels={"lang": "en", "n": 1})
    second = Feedback.checked("a", 0.25)
    for item in (first, second, first):
        await store.add_feedback(item)
    found = await store.feedback_for("a")
    assert sorted(found, key=lambda f: f.created) == [first, second]

    with pytest.raises(Conflict, match="'mine'"):
        await store.add_feedback(Feedback.checked("a", 0.9, id="mine"))
    await store.add_feedback(Feedback.checked("b", 0.9, id="mine"))  # ids are per response
    assert [item.score for item in await store.feedback_for("b")] == [0.9]


async def test_runtime_experts_come_and_go(store: Store) -> None:
    spec = {"id": "shout", "server": "tiny", "examples": ["fox"], "prompt": None}
    await store.put_expert("shout", spec)
    await store.put_expert("lower", {"id": "lower"})
    with pytest.raises(Conflict, match="'shout'"):
        await store.put_expert("shout", {"id": "shout", "server": "other"})
    assert await store.list_experts() == [spec, {"id": "lower"}]
    await store.delete_expert("shout")
    await store.delete_expert("shout")
    assert await store.list_experts() == [{"id": "lower"}]


async def test_everything_is_there_after_a_restart(url: str) -> None:
    for turn in range(2):
        store = Store(url)
        await store.start()
        await store.add_requests([make_record(f"r{turn}")])
        assert len([r async for r in store.iter_requests()]) == turn + 1
        await store.close()
        await store.close()
    with pytest.raises(DatabaseAway, match="closed"):
        await store.ping()


async def test_writers_and_readers_side_by_side(url: str) -> None:
    """Two processes' worth of stores on one database: nobody fails for a lock."""
    stores = [Store(url), Store(url)]
    for store in stores:
        await store.start()

    async def write(store: Store, name: str) -> None:
        for i in range(10):
            await store.add_requests([make_record(f"{name}{i}")])
            await store.add_feedback(Feedback.checked(f"{name}{i}", 0.5))
            await store.get_request("a0")

    writers = [write(store, f"{n}{m}-") for n, store in enumerate(stores) for m in range(3)]
    await asyncio.gather(*writers)
    assert len([record async for record in stores[0].iter_requests()]) == 60
    for store in stores:
        await store.close()


async def _count(store: Store) -> int:
    return len([record async for record in store.iter_requests()])


# --- URLs and boot -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_url", "used"),
    [
        ("sqlite:///a/b.db", "sqlite+aiosqlite:///a/b.db"),
        ("sqlite+aiosqlite:////a/b.db", "sqlite+aiosqlite:////a/b.db"),
        ("postgres://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgresql://u:p@h:1/d?sslmode=require", "postgresql+asyncpg://u:p@h:1/d?ssl=require"),
        ("postgresql+asyncpg://h/d", "postgresql+asyncpg://h/d"),
    ],
)
def test_urls_get_their_async_driver(given_url: str, used: str) -> None:
    assert parse_url(given_url).render_as_string(hide_password=False) == used


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("composer.db", "write sqlite:///path/to/file.db or postgresql://user@host/name"),
        ("postgresql+psycopg2://h/d", r"'postgresql\+psycopg2' .* write postgresql\+asyncpg://"),
        ("sqlite+pysqlite:///a.db", r"write sqlite\+aiosqlite://"),
        ("mysql://h/d", "SQLite and PostgreSQL are supported"),
        ("sqlite://", "in-memory"),
        ("sqlite:///:memory:", "write sqlite:///path/to/file.db"),
    ],
)
def test_other_urls_are_refused_with_the_remedy(bad: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store(bad)


async def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    store = Store("postgresql://me:secret@127.0.0.1:1/d", timeout_s=2)
    message = r"127\.0\.0\.1:1/d cannot be used: .*Connect call failed"
    with pytest.raises(StoreError, match=message) as caught:
        await store.start()
    assert "secret" not in str(caught.value)
    assert "COMPOSER_DATABASE_URL" in str(caught.value)


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(f"sqlite:///{tmp_path}/file/composer.db")
    with pytest.raises(StoreError, match=r"folder .*/file cannot be made: .*COMPOSER_DATABASE_URL"):
        await store.start()


async def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("shopping: eggs, milk\n" * 100)
    with pytest.raises(StoreError, match=r"notes\.db cannot be used: .*not a database"):
        await Store(f"sqlite:///{tmp_path}/notes.db").start()


async def test_a_locked_sqlite_file_is_away_and_then_back(sqlite_url: str) -> None:
    store = Store(sqlite_url, timeout_s=0.3)
    await store.start()
    other = sa.create_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseAway):
            await store.add_requests([make_record("a")])
        assert await store.get_request("a") is None  # readers are not held up
        connection.exec_driver_sql("ROLLBACK")
    other.dispose()
    await store.add_requests([make_record("a")])
    await store.close()


async def test_a_cancelled_call_leaves_the_store_usable(store: Store) -> None:
    for _ in range(12):  # more than the pool holds
        task = asyncio.create_task(store.add_requests([make_record("a")]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await store.add_requests([make_record("b")])
    assert await store.get_request("b") == make_record("b")

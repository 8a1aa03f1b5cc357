"""The service's own database as outcomes: what is there is used, what is missing is named."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from composer.errors import StoreError
from composer.store import Feedback, Record, Store, reading
from composer.types import Plan
from router_training.data import load
from router_training.errors import DataError
from tests.router_training.helpers import NAN
from tests.store.records import make_record


def fill(url: str, records: list[Record], feedback: list[Feedback]) -> None:
    async def run() -> None:
        store = Store(url)
        await store.start()
        await store.add_requests(records)
        await store.add_feedback(*feedback)
        await store.close()

    asyncio.run(run())


def asked(id: str, text: str | None, *experts: str, **changes: Any) -> Record:
    messages = None if text is None else ({"role": "user", "content": text},)
    return make_record(id, **{"messages": messages, "experts": experts, "answer": "yes", **changes})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/a folder/composer.db"


def test_what_callers_said_of_single_experts(url: str) -> None:
    fill(
        url,
        [
            asked("1", "one", "a", cost_usd=0.5),
            asked("2", "one", "b", cost_usd=None),
            asked("3", "two", "a", "b"),
            asked("4", None, "a"),
            asked("5", "three", "a", status="error"),
            asked("6", "unjudged", "a"),
            asked("7", "four", "b"),
        ],
        [
            Feedback.checked("1", 1.0, labels={"category": "sums", "split": "dev"}),
            Feedback.checked("1", 0.5, labels={"benchmark": "maths"}),
            *(Feedback.checked(id, 0.0) for id in "23457"),
        ],
    )
    data = load(url)
    found = data.outcomes
    assert found.text == ("one", "four")
    assert found.experts == ("a", "b")
    np.testing.assert_array_equal(found.quality, np.array([[0.75, 0], [NAN, 0]], np.float32))
    np.testing.assert_allclose(found.cost, [[0.5, NAN], [NAN, 0.000125]], rtol=1e-6)
    assert found.category == ("sums", "")
    assert found.benchmark == ("maths", "")
    assert data.answers is not None
    assert data.answers.given.tolist() == [["yes", "yes"], [None, "yes"]]
    assert data.notes[:3] == (
        "1 requests with feedback have no text: it was not stored",
        "1 answers were made by several experts: nobody's own outcome",
        "1 requests with feedback failed or were cancelled",
    )
    assert load(url, split="dev").outcomes.text == ("one",)


def test_a_conversation_is_read_as_far_back_as_the_router_read_it(url: str) -> None:
    turns = ("please plural fox", "and hen", "and this one: cat")
    messages = tuple({"role": "user", "content": turn} for turn in turns)
    reached = {"alone": 1, "two": 2, "all": 3, "named": None}
    plans = {
        id: Plan("auto", "single", (), (), reasons={} if n is None else {"turns_read": n})
        for id, n in reached.items()
    }
    records = [asked(id, "", "a", messages=messages, plan=plan) for id, plan in plans.items()]
    fill(url, records, [Feedback.checked(id, 1.0) for id in plans])
    assert sorted(load(url).outcomes.text) == sorted(
        {turns[-1], "and hen\nand this one: cat", "\n".join(turns)}
    )


def test_many_pages(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PAGE", 7)
    n = 28 + 3
    fill(
        url,
        [asked(str(i), f"question {i}", "a") for i in range(n)],
        [Feedback.checked(str(i), i % 2) for i in range(n)],
    )
    found = load(url).outcomes
    assert set(found.text) == {f"question {i}" for i in range(n)}
    odd = [int(text.split()[1]) % 2 for text in found.text]
    assert found.quality[:, 0].tolist() == odd


def test_nothing_is_written(url: str, tmp_path: Path) -> None:
    fill(url, [asked("1", "one", "a")], [Feedback.checked("1", 1.0)])
    file = tmp_path / "a folder" / "composer.db"
    before = file.read_bytes()
    file.chmod(0o444)
    load(url)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("records", "feedback", "said"),
    [
        ([], [], "no request is recorded"),
        ([asked("1", "x", "a")], [], "none of the 1 requests recorded has feedback"),
        ([asked("1", None, "a")], ["1"], "COMPOSER_LOG_CONTENT=true"),
        ([asked("1", "x", "a", "b")], ["1"], "1 answers were made by several experts"),
    ],
)
def test_what_is_missing_is_said(
    url: str, records: list[Record], feedback: list[str], said: str
) -> None:
    fill(url, records, [Feedback.checked(id, 1.0) for id in feedback])
    with pytest.raises(DataError, match=said):
        load(url)


def test_databases_that_are_none_of_ours(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match="there is no database"):
        load(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("no database at all, but a text of some length" * 99)
    with pytest.raises(StoreError, match="not a database"):
        load(f"sqlite:///{tmp_path}/text.db")
    fill(url, [], [])
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
    with pytest.raises(StoreError, match="has the schema 0000"):
        load(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM alembic_version"))
    engine.dispose()
    with pytest.raises(StoreError, match="no database of the service"):
        load(url)

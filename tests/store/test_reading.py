"""Those who only look: every judged request once, on either database, and nothing written."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from composer.errors import StoreError
from composer.store import Feedback, Store
from composer.store.reading import Census, Reading
from tests.store.records import NOON, make_record


async def test_judged_requests_with_all_their_feedback(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.store.reading._PAGE", 2)
    said = ({"role": "user", "content": "hello"},)
    await store.add_requests([make_record(str(i), messages=said) for i in range(5)])
    await store.add_requests([make_record("5", created=NOON.replace(hour=11))])
    for id, score in [("0", 1.0), ("1", 0.5), ("3", 0.0), ("3", 1.0), ("5", 0.25)]:
        await store.add_feedback(Feedback.checked(id, score, id=f"{id}/{score}"))
    async with Reading(url) as reading:  # beside the running service
        assert await reading.census() == Census(requests=6, judged=4, judged_with_text=3)
        found = [(r.id, sorted(f.score for f in given)) async for r, given in reading.judged()]
    assert found == [("5", [0.25]), ("0", [1.0]), ("1", [0.5]), ("3", [0.0, 1.0])]


async def test_it_cannot_write(store: Store, url: str) -> None:
    async with Reading(url) as reading:
        with pytest.raises(StoreError, match=r"(?i)read-?only"):
            await reading._rows(
                sa.text("DELETE FROM requests RETURNING id").columns(sa.column("id"))  # type: ignore[arg-type]
            )


async def test_an_empty_database_is_none_of_the_services(url: str) -> None:
    with pytest.raises(StoreError, match=r"no database"):
        async with Reading(url):
            pass

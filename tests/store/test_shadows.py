"""Choices in shadow beside what was done, and promotions."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from composer.store import Feedback, Promotion, ShadowChoice, Shadows, Store
from composer.store.rows import plan_of
from tests.store.records import NOON, failed_record, make_record


async def test_judged_decisions_come_with_the_shadows_choice(store: Store) -> None:
    ids = ("old", "new", "unjudged", "failed", "other")
    later = {id_: NOON + timedelta(seconds=i) for i, id_ in enumerate(ids)}
    shadows = Shadows(store)
    await shadows.add([])
    chosen = [ShadowChoice(id_, "auto", "digest", "sort", {"sort": 0.7}) for id_ in ids[:4]]
    await shadows.add([*chosen, ShadowChoice("other", "auto", "another", "sort", {})])
    await shadows.add([ShadowChoice("old", "auto", "another", "upper", {})])  # left as it is
    records = [make_record(id_, created=later[id_]) for id_ in ids if id_ != "failed"]
    await store.add_requests([*records, failed_record("failed")])
    for number, (id_, score) in enumerate(
        [("old", 1.0), ("old", 0.0), ("new", 1.0), ("failed", 1.0), ("other", 1.0)]
    ):
        await store.add_feedback(Feedback(id_, score, f"fb-{number}"))
    found = await shadows.compared("auto", "digest")
    assert [(one.score, one.expert, one.choice) for one in found] == [
        (1.0, "upper", "sort"),
        (0.5, "upper", "sort"),
    ]
    assert found[0].plan == records[1].plan
    assert found[0].scores == {"sort": 0.7}
    assert await shadows.compared("other", "digest") == []


async def test_more_than_are_read_leave_the_newest_or_the_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.store.shadows.MOST", 3)
    shadows, ids = Shadows(store), [f"r{i}" for i in range(5)]
    times = [NOON + timedelta(seconds=i) for i in range(5)]
    pairs = zip(ids, times, strict=True)
    await store.add_requests([make_record(id_, created=at) for id_, at in pairs])
    await shadows.add([ShadowChoice(id_, "auto", "digest", id_, {}) for id_ in ids])
    await store.add_feedback(*(Feedback(id_, 1.0, f"fb-{id_}") for id_ in ids))
    newest = await shadows.compared("auto", "digest")
    first = await shadows.compared("auto", "digest", first=True)
    assert [one.choice for one in newest] == ["r4", "r3", "r2"]
    assert [one.choice for one in first] == ["r2", "r1", "r0"]


async def test_a_policy_has_one_promotion_or_none(store: Store) -> None:
    shadows = Shadows(store)
    await shadows.undo("auto")
    first = Promotion("auto", "one", NOON, {"low": 0.1})
    await shadows.promote(first)
    second = Promotion("auto", "two", NOON, {"low": 0.2})
    await shadows.promote(second)
    await shadows.promote(Promotion("other", "one", NOON, {}))
    assert (await shadows.promotions())["auto"] == second
    await shadows.undo("auto")
    assert list(await shadows.promotions()) == ["other"]


async def test_a_long_comparison_lets_others_go_on(store: Store) -> None:
    """Turning rows into plans takes this process's time, so it is done a part at a time."""
    part = 20
    shadows, n = Shadows(store), 3 * part + 1
    ids = [f"r{i}" for i in range(n)]
    await store.add_requests([make_record(id_, created=NOON) for id_ in ids])
    await shadows.add([ShadowChoice(id_, "auto", "digest", "sort", {}) for id_ in ids])
    await store.add_feedback(*(Feedback(id_, 1.0, f"fb-{id_}") for id_ in ids))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    seen: list[int] = []
    made = plan_of

    def counted(value: Any) -> Any:
        seen.append(turns)
        return made(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("composer.store.shadows.plan_of", counted)
        patch.setattr("composer.store.shadows.PART", part)
        assert len(await shadows.compared("auto", "digest")) == n
    task.cancel()
    assert max(Counter(seen).values()) <= part

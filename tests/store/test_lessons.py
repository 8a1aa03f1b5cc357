"""What routers learnt and the feedback they learnt it from: kept together, by one at a time."""

from __future__ import annotations

from datetime import timedelta

import pytest

from composer.errors import Conflict
from composer.store import Feedback, Lesson, Lessons, Store
from tests.store.records import NOON, failed_record, make_record


def feedback(response: str, number: int, score: float = 1.0) -> Feedback:
    created = NOON + timedelta(seconds=number)
    return Feedback(response, score, f"fb-{number}", created=created)


@pytest.fixture
async def lessons(store: Store) -> Lessons:
    await store.add_requests([make_record("one"), failed_record("two")])
    await store.add_feedback(feedback("one", 2), feedback("two", 1, 0.0), feedback("one", 3, 0.5))
    return Lessons(store)


async def test_feedback_waits_oldest_first_with_the_decision_it_judges(lessons: Lessons) -> None:
    waiting = await lessons.waiting(10)
    assert [one.feedback.id for one in waiting] == ["fb-1", "fb-2", "fb-3"]
    assert [(one.policy, one.expert) for one in waiting] == [(None, None), *[("auto", "upper")] * 2]
    assert waiting[0].plan is None
    assert waiting[1].plan == make_record("one").plan
    assert [one.feedback.id for one in await lessons.waiting(2)] == ["fb-1", "fb-2"]


async def test_what_was_learnt_from_waits_no_more(lessons: Lessons) -> None:
    waiting = await lessons.waiting(2)
    await lessons.keep([Lesson("auto", "f", 1, b"state")], [one.feedback for one in waiting])
    assert [one.feedback.id for one in await lessons.waiting(10)] == ["fb-3"]
    assert await lessons.kept(["auto", "other"]) == {"auto": Lesson("auto", "f", 1, b"state")}
    await lessons.keep([Lesson("auto", "g", 2, b"more")], [])
    assert await lessons.versions(["auto"]) == {"auto": 2}


async def test_a_lesson_that_is_not_the_next_changes_nothing(lessons: Lessons) -> None:
    [first, second, _] = await lessons.waiting(10)
    await lessons.keep([Lesson("auto", "f", 1, b"mine")], [])
    for version in (1, 3):
        late = [Lesson("new", "f", 1, b"theirs"), Lesson("auto", "f", version, b"theirs")]
        with pytest.raises(Conflict):
            await lessons.keep(late, [first.feedback])
    assert await lessons.kept(["auto", "new"]) == {"auto": Lesson("auto", "f", 1, b"mine")}
    assert len(await lessons.waiting(10)) == 3
    await lessons.keep([], [first.feedback])
    with pytest.raises(Conflict):  # somebody has learnt from one of the two
        await lessons.keep([Lesson("auto", "f", 2, b"")], [first.feedback, second.feedback])
    assert await lessons.versions(["auto"]) == {"auto": 1}

"""One generation follows another: nothing is retired while it is held, everything is in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import EngineUnavailable
from composer.generations import Generation, Generations, Hold
from tests.fakes import stage


def test_before_the_first_generation_the_service_is_starting() -> None:
    with pytest.raises(EngineUnavailable, match="starting"):
        Generations(lambda _: None).hold()


def test_the_old_one_lives_until_its_last_request_ends() -> None:
    retired: list[Generation] = []
    generations = Generations(retired.append)
    old, new = stage(version=1).generation, stage(version=2).generation
    generations.swap(old)
    first, second = generations.hold(), generations.hold()
    generations.swap(new)
    assert generations.current is new
    first.release()
    first.release()  # once is once
    assert retired == []
    second.release()
    assert retired == [old]
    assert generations.live == (new,)


@given(st.lists(st.one_of(st.just("hold"), st.just("swap"), st.integers(0, 20)), max_size=60))
def test_retired_exactly_when_neither_current_nor_held(steps: list[str | int]) -> None:
    retired: list[Generation] = []
    generations = Generations(retired.append)
    made = [stage(version=0).generation]
    generations.swap(made[0])
    holds: list[Hold] = []
    for step in steps:
        if step == "hold":
            holds.append(generations.hold())
        elif step == "swap":
            made.append(stage(version=len(made)).generation)
            generations.swap(made[-1])
        elif holds:
            holds.pop(int(step) % len(holds)).release()
        held = {id(h.generation) for h in holds} | {id(generations.current)}
        assert {id(g) for g in generations.live} == held
        assert {id(g) for g in retired} == {id(g) for g in made} - held
        assert generations.holds == len(holds)
    for hold in holds:
        hold.release()
    generations.swap(None)
    assert sorted(g.catalog.version for g in retired) == [g.catalog.version for g in made]

"""A full engine: compositions that nobody uses make room, what the registry names and what is
answering never does."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from composer.adapters.shelf import Shelf
from composer.adapters.verify import verify_adapter
from composer.errors import EngineFull, Overloaded
from composer.generations import Generation
from composer.mixing import Mixed, Mixer
from composer.types import Adapter, Expert, Mix
from tests.fakes import FakeEngine, stage
from tests.registry.world import write_adapter

NAMES = ("fox", "owl", "bear", "newt")

PAIRS = [Mix((("fox", 1.0), (other, 1.0))) for other in ("owl", "bear")]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        write_adapter(folder / name, seed=seed)
    return {name: verify_adapter(folder / name, None, roots=[folder]) for name in NAMES}


@pytest.fixture
async def engine(adapters: dict[str, Adapter]) -> FakeEngine:
    """With room for the three first and two more."""
    engine = FakeEngine("server")
    await engine.prepare([adapters[name] for name in NAMES[:3]])
    engine.most = 5
    return engine


@pytest.fixture
def where(adapters: dict[str, Adapter], engine: FakeEngine) -> Generation:
    return of(adapters, engine, *NAMES[:3])


@pytest.fixture
def mixer(tmp_path: Path, where: Generation) -> Mixer:
    made = Mixer(Shelf(tmp_path / "queries", 2**26), most=8)
    made.live = lambda: [where]
    return made


def of(adapters: dict[str, Adapter], engine: FakeEngine, *names: str) -> Generation:
    experts = {name: Expert(name, "server", adapter=adapters[name]) for name in names}
    return stage(experts=experts, engine=engine).generation


async def called(mixer: Mixer, mix: Mix, where: Generation) -> Mixed:
    async with mixer.expert(mix, where) as mixed:
        return mixed


def digest(mixed: Mixed) -> str:
    assert mixed.expert.adapter is not None
    return mixed.expert.adapter.digest


async def test_the_longest_unused_composition_makes_room_for_a_new_one(
    engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    first, second = [await called(mixer, mix, where) for mix in PAIRS]
    third = await called(mixer, Mix((("fox", 0.25), ("owl", 0.75))), where)
    assert digest(first) not in engine.loaded
    assert {digest(second), digest(third)} < engine.loaded.keys()
    again = await called(mixer, PAIRS[0], where)  # loaded once more, and not built
    assert again.details["composition"]["built"] is False
    assert digest(first) in engine.loaded
    assert digest(second) not in engine.loaded


async def test_where_all_are_answering_the_heaviest_answers_alone(
    engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    async with AsyncExitStack() as answering:
        used = [await answering.enter_async_context(mixer.expert(mix, where)) for mix in PAIRS]
        third = await called(mixer, Mix((("fox", 0.25), ("owl", 0.75))), where)
        assert third.expert is where.catalog.experts["owl"]
        assert "6 adapters" in third.details["composition"]["failed"]
        assert {digest(one) for one in used} < engine.loaded.keys()


async def test_an_expert_that_comes_takes_the_place_of_an_unused_composition(
    adapters: dict[str, Adapter], engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    async with mixer.expert(PAIRS[0], where) as used:
        idle = await called(mixer, PAIRS[1], where)
        await mixer.prepare(of(adapters, engine, *NAMES), [where])
        assert adapters["newt"].digest in engine.loaded
        assert digest(used) in engine.loaded
        assert digest(idle) not in engine.loaded


async def test_what_a_coming_generation_loaded_stays_while_it_is_built(
    adapters: dict[str, Adapter], engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    """Though no live one names it yet; also a composition that the registry names from then on."""
    idle = await called(mixer, PAIRS[0], where)
    half = replace(adapters["newt"], digest=digest(idle))
    await mixer.prepare(of({**adapters, "newt": half}, engine, *NAMES), [where])
    assert len(engine.loaded) == 4
    second = await called(mixer, PAIRS[1], where)
    third = await called(mixer, Mix((("fox", 0.25), ("owl", 0.75))), where)
    assert digest(second) not in engine.loaded
    assert {digest(idle), digest(third)} < engine.loaded.keys()


async def test_what_a_generation_that_is_not_to_be_loaded_is_no_longer_kept(
    adapters: dict[str, Adapter], engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    engine.most = 6
    await mixer.prepare(of(adapters, engine, *NAMES), [where])
    mixer.dropped()
    for mix in (*PAIRS, Mix((("fox", 0.25), ("owl", 0.75))), Mix((("fox", 0.25), ("bear", 0.75)))):
        await called(mixer, mix, where)
    assert adapters["newt"].digest not in engine.loaded


async def test_where_compositions_are_answering_it_is_to_be_tried_again(
    adapters: dict[str, Adapter], engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    coming = of(adapters, engine, *NAMES)
    async with AsyncExitStack() as answering:
        for mix in PAIRS:
            await answering.enter_async_context(mixer.expert(mix, where))
        before = dict(engine.loaded)
        with pytest.raises(Overloaded, match="2 of them were composed for requests"):
            await mixer.prepare(coming, [where])
        assert engine.loaded == before
    await mixer.prepare(coming, [where])
    assert adapters["newt"].digest in engine.loaded


async def test_where_even_all_compositions_give_no_room_none_has_to_go(
    adapters: dict[str, Adapter], engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    engine.most = 4
    idle = await called(mixer, PAIRS[0], where)
    more = {f"more-{i}": replace(adapters["newt"], digest=f"digest-{i}") for i in range(2)}
    with pytest.raises(EngineFull):
        await mixer.prepare(of({**adapters, **more}, engine, *NAMES[:3], *more), [where])
    assert digest(idle) in engine.loaded


async def test_two_that_want_the_last_place_both_get_an_answer(
    engine: FakeEngine, where: Generation, mixer: Mixer
) -> None:
    engine.most = 4
    found = await asyncio.gather(*(called(mixer, mix, where) for mix in PAIRS))
    assert [one.details["composition"].get("failed") for one in found].count(None) >= 1
    assert len(engine.loaded) == 4

"""Several experts as one: weights rounded, adapters built once, kept while used, then dropped."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.adapters.factors import read_lora
from composer.adapters.recipe import Member, Recipe
from composer.adapters.shelf import Shelf
from composer.adapters.verify import verify_adapter
from composer.blending import quantised
from composer.eligibility import composed_of
from composer.errors import EngineError
from composer.generations import Generation, adapters_on
from composer.mixing import Mixed, Mixer
from composer.types import Adapter, Composed, Expert, Gated, MemberShare, Mix, Server
from tests.fakes import FakeEngine, FakeSettings, stage
from tests.registry.world import write_adapter

MB = 2**20


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("fox", "owl", "bear")):
        write_adapter(folder / name, seed=seed)
    names = ("fox", "owl", "bear")
    return {name: verify_adapter(folder / name, None, roots=[folder]) for name in names}


def generation(adapters: dict[str, Adapter], **more: Any) -> Generation:
    experts = {
        name: Expert(name, "server", adapter=adapter, context_window=100 + len(name))
        for name, adapter in adapters.items()
    }
    experts["base"] = Expert("base", "server")
    experts["far"] = Expert("far", "elsewhere")
    return stage(experts=experts, **more).generation


def mixer(folder: Path, *, most: int = 8, budget: int = 64 * MB) -> Mixer:
    return Mixer(Shelf(folder / "queries", budget), most=most)


async def called(made: Mixer, asked: str | Mix, where: Generation) -> Mixed:
    async with made.expert(asked, where) as mixed:
        return mixed


def engine_of(where: Generation) -> FakeEngine:
    engine = where.engines["server"]
    assert isinstance(engine, FakeEngine)
    return engine


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda w: max(w) > 1e-6),
    st.integers(1, 64),
)
def test_rounded_weights_add_up_and_are_near(weights: list[float], steps: int) -> None:
    whole = quantised(weights, steps)
    assert sum(whole) == steps
    total = sum(weights)
    for weight, share in zip(weights, whole, strict=True):
        assert abs(share - weight / total * steps) < 1 + 1e-6
        assert share >= 0


async def test_a_mix_is_the_exact_sum_and_reads_as_its_heaviest(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    where, made = generation(adapters), mixer(tmp_path)
    mixed = await called(made, Mix((("fox", 0.6), ("owl", 0.41))), where)
    told = mixed.details["composition"]
    assert told["members"] == {"fox": 0.625, "owl": 0.375}
    assert told["built"] is True
    assert mixed.expert.id == "0.625*fox+0.375*owl"
    assert mixed.expert.context_window == 103
    adapter = mixed.expert.adapter
    assert adapter is not None
    assert adapter.digest in engine_of(where).loaded
    got = read_lora(adapter.path)
    assert got.digest == adapter.digest
    fox, owl = (read_lora(adapters[name].path).modules for name in ("fox", "owl"))
    for module, factors in got.modules.items():
        want = 0.625 * fox[module].delta() + 0.375 * owl[module].delta()
        assert (factors.delta() - want).abs().max() < 1e-5


async def test_like_weights_share_one_adapter_and_one_build(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    where, made = generation(adapters), mixer(tmp_path)
    mixes = [
        Mix((("fox", 0.5), ("owl", 0.5))),
        Mix((("owl", 0.52), ("fox", 0.49))),
        Mix((("fox", 2.0), ("owl", 2.0))),
    ]
    found = await asyncio.gather(*(called(made, mix, where) for mix in mixes))
    assert len({mixed.expert.adapter for mixed in found}) == 1
    assert (made.built, made.reused) == (1, 2)
    again = await called(made, mixes[0], where)
    assert again.details["composition"]["built"] is False


async def test_one_expert_with_all_the_weight_is_that_expert(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    where, made = generation(adapters), mixer(tmp_path)
    mixed = await called(made, Mix((("fox", 0.97), ("owl", 0.03))), where)
    assert mixed.expert is where.catalog.experts["fox"]
    assert (await called(made, "owl", where)).expert is where.catalog.experts["owl"]
    assert made.built == 0
    assert not (tmp_path / "queries").exists()


async def test_the_base_model_is_a_share_of_nothing_and_other_servers_stay_out(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    where, made = generation(adapters), mixer(tmp_path)
    mix = Mix((("fox", 0.5), ("base", 0.5), ("far", 0.4)))
    mixed = await called(made, mix, where)
    assert mixed.details["composition"]["members"] == {"fox": 0.5, "base": 0.5}
    assert mixed.details["composition"]["left_out"] == ["far"]
    fox = read_lora(adapters["fox"].path).modules
    assert mixed.expert.adapter is not None
    for module, factors in read_lora(mixed.expert.adapter.path).modules.items():
        assert (factors.delta() - 0.5 * fox[module].delta()).abs().max() < 1e-5


async def test_its_rank_fits_the_server(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    class Limited(FakeSettings):
        max_lora_rank: int = 3

    where, made = generation(adapters), mixer(tmp_path)
    servers = {"server": Server("server", "fake", Limited())}
    where = replace(where, catalog=replace(where.catalog, servers=servers))
    told = (await called(made, Mix((("fox", 1.0), ("owl", 1.0))), where)).details["composition"]
    assert told["rank"] == 3
    assert 0 < told["energy"] < 1


async def test_what_is_in_use_is_not_dropped(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    where, made = generation(adapters), mixer(tmp_path, most=1, budget=0)
    crowded: list[None] = []
    made.crowded = lambda: crowded.append(None)
    mixes = [Mix((("fox", 1.0), (other, 1.0))) for other in ("owl", "bear")]
    async with AsyncExitStack() as uses:
        for mix in mixes:
            mixed = await uses.enter_async_context(made.expert(mix, where))
        await made.trim([where])
        assert len(engine_of(where).loaded) == 2
        assert mixed.expert.adapter is not None
        assert mixed.expert.adapter.path.is_dir()
    assert crowded
    await made.trim([where])
    assert len(engine_of(where).loaded) == len(adapters)  # what the catalog itself names
    assert not mixed.expert.adapter.path.exists()
    again = await called(made, mixes[1], where)  # and it can be made anew
    assert again.details["composition"]["built"] is True


async def test_equal_sums_are_one_composition(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    """However they are written: else the one that is dropped takes the other's adapter with it."""
    where, made = generation(adapters), mixer(tmp_path, most=1)
    halves = [Mix((("fox", 1.0), ("owl", 1.0)), steps) for steps in (8, 2)]
    async with made.expert(halves[0], where) as mixed:
        assert (await called(made, halves[1], where)).expert.adapter == mixed.expert.adapter
        await made.trim([where])
        assert mixed.expert.adapter is not None
        assert mixed.expert.adapter.digest in engine_of(where).loaded
    assert (made.built, made.reused) == (1, 1)


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_trim_at_once_takes_nothing_that_is_waited_for(
    adapters: dict[str, Adapter], tmp_path: Path, leaves: bool
) -> None:
    """And what its caller did not wait for is not kept for it."""
    where, made = generation(adapters), mixer(tmp_path, most=0, budget=0)
    trims: list[asyncio.Task[None]] = []
    made.crowded = lambda: trims.append(asyncio.create_task(made.trim([where])))
    calling = asyncio.create_task(called(made, Mix((("fox", 1.0), ("owl", 1.0))), where))
    if leaves:
        await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        async with asyncio.timeout(20):
            while not trims:
                await asyncio.sleep(0.01)
    else:
        assert (await asyncio.wait_for(calling, 20)).details["composition"]["built"] is True
    async with asyncio.timeout(20):
        while len(engine_of(where).loaded) > len(adapters) or not trims[-1].done():
            await asyncio.sleep(0.01)
    assert made.built == 1


async def test_too_many_lose_the_longest_unused(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    where, made = generation(adapters), mixer(tmp_path, most=2)
    pairs = [("fox", "owl"), ("fox", "bear"), ("owl", "bear")]
    mixes = [Mix(((one, 1.0), (other, 1.0))) for one, other in pairs]
    first, second, _ = [await called(made, mix, where) for mix in mixes]
    await called(made, mixes[0], where)
    await made.trim([where])
    kept = engine_of(where).loaded
    assert first.expert.adapter is not None
    assert second.expert.adapter is not None
    assert first.expert.adapter.digest in kept
    assert second.expert.adapter.digest not in kept
    # It is no longer loaded, but within the budget of the disk: loaded again, not built.
    assert second.expert.adapter.path.is_dir()
    assert (await called(made, mixes[1], where)).details["composition"]["built"] is False
    assert second.expert.adapter.digest in engine_of(where).loaded


async def test_a_member_that_goes_takes_its_compositions_with_it(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    engine = FakeEngine("server")
    before, made = generation(adapters, engine=engine), mixer(tmp_path)
    with_owl = await called(made, Mix((("fox", 1.0), ("owl", 1.0))), before)
    without = await called(made, Mix((("fox", 1.0), ("bear", 1.0))), before)
    rest = {name: adapter for name, adapter in adapters.items() if name != "owl"}
    after = generation(rest, engine=engine)
    await made.trim([after])
    assert with_owl.expert.adapter is not None
    assert without.expert.adapter is not None
    assert not with_owl.expert.adapter.path.exists()
    assert without.expert.adapter.path.exists()
    # Under the new catalog it is loaded again, since the old one's adapters are forgotten with it.
    await engine.retain(adapters_on("server", [after]))
    assert without.expert.adapter.digest not in engine.loaded
    again = await called(made, Mix((("fox", 1.0), ("bear", 1.0))), after)
    assert again.details["composition"]["built"] is False
    assert without.expert.adapter.digest in engine.loaded
    assert {a.digest for a in adapters_on("server", [after])} == set(engine.loaded)


async def test_where_no_adapter_is_left_none_is_composed(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    """A registry of plain models knows no digest at all, which is not "whatever there is"."""
    engine = FakeEngine("server")
    before, made = generation(adapters, engine=engine), mixer(tmp_path)
    mixed = await called(made, Mix((("fox", 1.0), ("owl", 1.0))), before)
    assert mixed.expert.adapter is not None
    await made.trim([generation({}, engine=engine)])
    assert not mixed.expert.adapter.path.exists()


async def test_where_nothing_can_be_composed_the_heaviest_answers_and_it_is_told(
    adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, made = generation(adapters), mixer(tmp_path)

    async def full(self: FakeEngine, adapters: object) -> None:
        raise EngineError("it holds 64 adapters already")

    monkeypatch.setattr(FakeEngine, "prepare", full)
    mixed = await called(made, Mix((("fox", 0.4), ("owl", 0.6))), where)
    assert mixed.expert is where.catalog.experts["owl"]
    assert "it holds 64 adapters already" in mixed.details["composition"]["failed"]
    assert adapters_on("server", [where]) == adapters_on("server", [generation(adapters)])
    monkeypatch.undo()

    changed = replace(adapters["fox"], digest=f"sha256:{'0' * 64}")
    where = generation({**adapters, "fox": changed})
    mixed = await called(made, Mix((("fox", 0.5), ("owl", 0.5))), where)
    assert "has the digest" in mixed.details["composition"]["failed"]
    assert made.failed == 2


async def test_of_two_first_requests_the_second_takes_what_the_first_loaded(
    adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not load it again, which may fail and must not unname what is in use."""
    where, made = generation(adapters), mixer(tmp_path)
    prepare, loads = FakeEngine.prepare, 0

    async def once(self: FakeEngine, adapters: Any) -> None:
        nonlocal loads
        loads += 1
        if loads > 1:
            raise EngineError("the server died")
        await prepare(self, adapters)

    monkeypatch.setattr(FakeEngine, "prepare", once)
    mix = Mix((("fox", 1.0), ("owl", 1.0)))
    found = await asyncio.gather(*(called(made, mix, where) for _ in range(2)))
    assert (loads, made.built, made.reused, made.failed) == (1, 1, 1, 0)
    adapter = found[1].expert.adapter
    assert adapter is not None
    assert adapter in adapters_on("server", [where])


async def test_a_caller_that_goes_does_not_take_the_build_with_it(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    where, made = generation(adapters), mixer(tmp_path)
    mix = Mix((("fox", 1.0), ("owl", 1.0)))
    gone = asyncio.create_task(called(made, mix, where))
    await asyncio.sleep(0)
    stays = asyncio.create_task(called(made, mix, where))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays).expert.adapter is not None
    assert made.built == 1


def test_shelves_of_two_processes_leave_each_other_what_they_hold(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    ours, theirs = (Shelf(tmp_path / "shelf", 0) for _ in range(2))
    recipe = Recipe(tuple(Member(n, a.path, 1.0, a.digest) for n, a in adapters.items()))
    known = {adapter.digest for adapter in adapters.values()}
    made = theirs.make(recipe)
    assert ours.make(recipe).built is False
    ours.let_go(made.folder)
    assert ours.trim(known) == 0
    assert ours.trim(()) == 0
    theirs.close()
    assert ours.trim(known) == 1
    assert list((tmp_path / "shelf").iterdir()) == []


async def test_a_gate_is_not_mixed(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    gate = Gated("arrow", ("owl", "bear"), tuple(adapters[n].digest for n in ("owl", "bear")))
    where = generation({**adapters, "gate": replace(adapters["bear"], digest="g", gate=gate)})
    made = mixer(tmp_path)
    mixed = await called(made, Mix((("gate", 0.6), ("owl", 0.4))), where)
    assert mixed.expert is where.catalog.experts["gate"]
    mixed = await called(made, Mix((("gate", 0.4), ("owl", 0.6))), where)
    assert mixed.expert is where.catalog.experts["owl"]
    assert mixed.details["composition"]["left_out"] == ["gate"]
    assert composed_of(frozenset({"owl"}), where.catalog) == {"owl", "gate"}


def test_who_excludes_an_expert_excludes_what_is_composed_of_it(
    adapters: dict[str, Adapter],
) -> None:
    def made(digest: str, *of: str) -> Adapter:
        return replace(adapters["bear"], digest=digest, composed=Composed("cat", _shares(of)))

    def _shares(of: tuple[str, ...]) -> Any:
        return tuple(MemberShare("any name", digest, 1.0) for digest in of)

    half = made("half", adapters["fox"].digest)
    experts = {**adapters, "half": half, "whole": made("whole", "half")}
    catalog = generation(experts).catalog
    assert composed_of(frozenset({"fox"}), catalog) == {"fox", "half", "whole"}
    assert composed_of(frozenset({"owl"}), catalog) == {"owl"}
    assert composed_of(frozenset(), catalog) == frozenset()

"""Every line is answered once, in the order that loads least, whatever happens on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from composer.batch.answers import Answers
from composer.batch.lines import Lines
from composer.batch.runner import Unwatched
from composer.errors import EngineError, EngineUnavailable, Overloaded, RequestError, StoreError
from composer.routing.base import Exploration, Query, Scores
from composer.scheduling.base import Lease, Place
from composer.scheduling.events import Model
from composer.scheduling.policy import PolicySettings, SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from composer.strategies.vote import Vote, VoteSettings
from composer.types import Ask, BoolArray, Call, Chunk, Component, Expert, Server
from tests.batch.helpers import ENDPOINTS, Bench, content, line, read, write
from tests.fakes import FakeEngine, FakeRouter, FakeScheduler, FakeSettings, Stage, place, stage


async def test_answers_come_in_the_inputs_order_with_openais_fields(tmp_path: Path) -> None:
    bench = Bench(stage())
    source = write(
        tmp_path / "in",
        [line(f"id-{i}", f"please {'beta' if i % 3 else 'alpha'} {i}") for i in range(20)],
    )
    answered = await bench.run(source, tmp_path / "out")
    assert [one["custom_id"] for one in answered] == [f"id-{i}" for i in range(20)]
    for i, one in enumerate(answered):
        expert = "beta" if i % 3 else "alpha"
        assert content(one) == f"{expert}:please {expert} {i}"
        assert set(one) == {"id", "custom_id", "response", "error"}
        assert one["id"].startswith("batch_req_")
        assert one["error"] is None
        assert one["response"]["status_code"] == 200
        body = one["response"]["body"]
        assert body["id"] == f"chatcmpl-{one['response']['request_id']}"
        assert body["object"] == "chat.completion"
        assert body["composer"]["expert"] == expert
    assert len({one["id"] for one in answered}) == 20
    assert {o.request.priority for o in bench.outcomes} == {"batch"}
    assert len(bench.outcomes) == 20


async def test_plain_completions_too(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in", [{**line("a"), "url": "/v1/completions", "body": {"prompt": "hi alpha"}}]
    )
    [answered] = await Bench(stage()).run(source, tmp_path / "out")
    assert answered["response"]["body"]["choices"][0]["text"] == "alpha:hi alpha"


async def test_a_line_that_fails_says_why_and_stops_no_other(tmp_path: Path) -> None:
    staged = stage()
    source = write(
        tmp_path / "in",
        [
            line("good"),
            line("model", body={"model": "nobody"}),
            line("field", body={"temperature": "hot"}),
            line("stream", body={"stream": True}),
            line("tools", body={"tools": [{"type": "function", "function": {"name": "f"}}]}),
            line("also good", "please beta"),
        ],
    )
    bench = Bench(staged)
    answered = {one["custom_id"]: one for one in await bench.run(source, tmp_path / "out")}
    assert content(answered["good"]) == "alpha:please alpha"
    assert content(answered["also good"]) == "beta:please beta"
    found = {
        name: (one["response"]["status_code"], one["response"]["body"]["error"]["param"])
        for name, one in answered.items()
        if one["response"]["status_code"] != 200
    }
    assert found == {
        "model": (404, "model"),
        "field": (400, "temperature"),
        "stream": (400, "stream"),
        "tools": (400, "tools"),
    }
    # What reached the pipeline is recorded as any other request.
    assert sorted(o.status for o in bench.outcomes) == ["error", "error", "ok", "ok"]


async def test_a_servers_failure_is_the_lines_error(tmp_path: Path) -> None:
    staged = stage()
    staged.engine.fail = EngineError("weights broken")
    source = write(tmp_path / "in", [line("a"), line("b")])
    answered = await Bench(staged).run(source, tmp_path / "out")
    assert [one["response"]["status_code"] for one in answered] == [502, 502]


async def test_what_is_answered_is_not_asked_again(tmp_path: Path) -> None:
    staged = stage()
    bench = Bench(staged)
    source = write(tmp_path / "in", [line(f"{i}") for i in range(50)])
    staged.engine.gate = asyncio.Event()
    run = asyncio.create_task(bench.run(source, tmp_path / "out"))
    while len(staged.engine.calls) < 50:
        await asyncio.sleep(0.001)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert bench.scheduler.out == {}  # type: ignore[attr-defined]
    assert len(staged.engine.cancelled) == 50

    again = stage()
    lines = Lines(source, ENDPOINTS)
    answers = Answers(tmp_path / "out.partial", digest=lines.digest, lines=50)
    for index in range(0, 50, 2):
        await answers.put(index, 200, b'{"custom_id": "%d"}' % index)
    await answers.aclose()
    answered = await Bench(again).run(source, tmp_path / "out")
    assert [one["custom_id"] for one in answered] == [f"{i}" for i in range(50)]
    assert len(again.engine.calls) == 25


# --- told to stop --------------------------------------------------------------------------


async def drained(
    bench: Bench, source: Path, partial: Path, then: Callable[[], object] = lambda: None
) -> tuple[list[int], int]:
    """The lines that a run answers which is told to stop once calls run everywhere they can, and
    how many it says it is finishing. `then` is done before those calls go on."""
    lines = Lines(source, ENDPOINTS)
    answers = Answers(partial, digest=lines.digest, lines=len(lines))
    engines = bench.generations.current.engines.values()
    gate = asyncio.Event()
    for engine in engines:
        engine.gate = gate  # type: ignore[attr-defined]
    run = asyncio.create_task(bench.runner.run(lines, answers, Unwatched()))
    async with asyncio.timeout(10):
        calls = -1
        while calls != (calls := sum(len(e.calls) for e in engines)) or not calls:  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
        finishing = bench.runner.drain()
        await asyncio.sleep(0.01)
        assert not run.done()
        then()
        gate.set()
        await run
    assert bench.generations.holds == 0
    await answers.aclose()
    return [index for index in range(len(lines)) if index in answers], finishing


async def test_told_to_stop_it_ends_what_runs_and_begins_nothing(tmp_path: Path) -> None:
    staged = stage()
    bench = Bench(staged)
    bench.scheduler.configure({"server": place(staged.engine, in_flight=3, queue=64)}, {})
    source = write(tmp_path / "in", [line(f"{i}") for i in range(50)])
    kept, finishing = await drained(bench, source, tmp_path / "out.partial")
    assert len(kept) == finishing == len(staged.engine.calls) == 3
    assert staged.engine.cancelled == []
    again = stage()
    answered = await Bench(again).run(source, tmp_path / "out")
    assert [one["custom_id"] for one in answered] == [f"{i}" for i in range(50)]
    assert len(again.engine.calls) == 47


async def test_told_to_stop_it_keeps_no_answer_of_half_the_calls(tmp_path: Path) -> None:
    """Of three votes one has both its calls running; one call of each other waits."""
    staged, engines = voting({"ab": "", "ac": ""})
    source = write(
        tmp_path / "in",
        [line(f"{i}", "go", body={"model": name}) for i, name in enumerate(["ab", "ab", "ac"])],
    )
    bench = Bench(staged)
    places = {s: place(e, in_flight=2 if s == "A" else 1, queue=64) for s, e in engines.items()}
    bench.scheduler.configure(places, {})
    kept, finishing = await drained(bench, source, tmp_path / "out.partial")
    assert (kept, finishing) == ([0], 1)
    assert {outcome.status for outcome in bench.outcomes} == {"ok", "cancelled"}


async def test_told_to_stop_it_asks_nothing_again(tmp_path: Path) -> None:
    """The server dies under the calls that were to be finished."""

    class Dying(FakeEngine):
        dead = False

        async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
            async for chunk in super().run(call):
                if self.dead:
                    raise EngineUnavailable("it died")
                yield chunk

    engine = Dying("server")
    bench = Bench(stage(engine=engine))
    source = write(tmp_path / "in", [line("a"), line("b")])
    kept = await drained(bench, source, tmp_path / "p", then=lambda: setattr(engine, "dead", True))
    assert kept == ([], 2)
    assert len(engine.calls) == 2


async def test_told_to_stop_it_waits_for_no_server(tmp_path: Path) -> None:
    class Away(FakeScheduler):
        async def acquire(self, call: Call) -> Lease:
            raise EngineUnavailable("starting")

    bench = Bench(stage(), Away())
    lines = Lines(write(tmp_path / "in", [line("a"), line("b")]), ENDPOINTS)
    answers = Answers(tmp_path / "p", digest=lines.digest, lines=2)
    run = asyncio.create_task(bench.runner.run(lines, answers, Unwatched()))
    await asyncio.sleep(0.1)  # into the pause before the next try
    assert bench.runner.drain() == 0
    async with asyncio.timeout(0.9):
        await run
    assert answers.missing() == [0, 1]
    await answers.aclose()


# --- servers that are away -----------------------------------------------------------------


async def test_a_server_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.batch.runner.PAUSES_S", (0.01, 0.01))

    class Away(FakeScheduler):
        refusals = 2

        async def acquire(self, call: Call) -> Lease:
            if self.refusals:
                self.refusals -= 1
                raise EngineUnavailable("the server is not served (any more)")
            return await super().acquire(call)

    source = write(tmp_path / "in", [line("a")])
    scheduler = Away()
    [answered] = await Bench(stage(), scheduler).run(source, tmp_path / "out")
    assert answered["response"]["status_code"] == 200
    scheduler.refusals = 99
    [answered] = await Bench(stage(), scheduler).run(source, tmp_path / "out2")
    assert answered["response"]["status_code"] == 503


async def test_a_server_that_says_when_to_come_back_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, real = [], asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    source = write(tmp_path / "in", [line("a")])
    for told, waited in ((7.0, [7.0, 7.0, 30.0]), (900.0, [60.0, 60.0, 60.0])):
        staged = stage()
        staged.engine.fail = Overloaded("it answered 429", retry_after=told)
        with monkeypatch.context() as patch:
            patch.setattr("composer.batch.runner.asyncio.sleep", sleep)
            [answered] = await Bench(staged).run(source, tmp_path / f"out{told}")
        assert answered["response"]["status_code"] == 503
        assert [seconds for seconds in pauses if seconds] == waited
        pauses.clear()


async def test_when_the_service_closes_nothing_is_put_down_as_failed(tmp_path: Path) -> None:
    staged = stage()
    bench = Bench(staged)
    source = write(tmp_path / "in", [line("a"), line("b")])
    staged.engine.fail = EngineUnavailable("the engine is closed")
    bench.generations.swap(None)
    with pytest.raises(EngineUnavailable, match="starting or closing"):
        await bench.run(source, tmp_path / "out")
    lines = Lines(source, ENDPOINTS)
    answers = Answers(tmp_path / "out.partial", digest=lines.digest, lines=2)
    assert answers.missing() == [0, 1]
    await answers.aclose()


async def test_a_full_disk_ends_the_run_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Answers, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    bench = Bench(stage())
    source = write(tmp_path / "in", [line(f"{i}") for i in range(100)])
    lines = Lines(source, ENDPOINTS)
    answers = Answers(tmp_path / "p", digest=lines.digest, lines=100)
    monkeypatch.setattr(Answers, "_append", full)
    with pytest.raises(StoreError, match="No space left"):
        await bench.runner.run(lines, answers, Unwatched())
    await answers.aclose()
    assert bench.generations.holds == 0


async def test_an_input_changed_meanwhile_ends_the_run(tmp_path: Path) -> None:
    bench = Bench(stage())
    source = write(tmp_path / "in", [line("a")])
    lines = Lines(source, ENDPOINTS)
    answers = Answers(tmp_path / "p", digest=lines.digest, lines=1)
    write(source, [line("changed")])
    with pytest.raises(RequestError, match="was changed while"):
        await bench.runner.run(lines, answers, Unwatched())
    await answers.aclose()


async def test_plans_made_before_a_reload_are_made_anew(tmp_path: Path) -> None:
    """The expert planned for is gone when its lines' turn comes."""
    staged = stage()
    bench = Bench(staged)
    real = bench.runner._plan_all

    async def then_reload(*given: Any) -> Any:
        planned = await real(*given)
        bench.generations.swap(stage(("beta",), version=2).generation)
        return planned

    bench.runner._plan_all = then_reload  # type: ignore[method-assign]
    source = write(tmp_path / "in", [line("a"), line("b", "please beta")])
    answered = await bench.run(source, tmp_path / "out")
    assert [content(one) for one in answered] == ["beta:please alpha", "beta:please beta"]


class Exploring(FakeRouter):
    """Spreads every request evenly over its experts."""

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        return replace(await super().score(query, eligible), exploration=Exploration(1.0))


async def test_each_line_is_explored_on_by_a_draw_of_its_own(tmp_path: Path) -> None:
    staged = stage()
    way = staged.generation.ways["auto"]
    exploring = replace(way, router=Exploring(way.policy.experts))
    staged.generation.ways["auto"] = exploring  # type: ignore[index]
    source = write(tmp_path / "in", [line(f"id-{i}") for i in range(40)])
    answered = await Bench(staged).run(source, tmp_path / "out")
    assert {content(one).split(":")[0] for one in answered} == {"alpha", "beta"}


async def test_memory_holds_few_lines(tmp_path: Path) -> None:
    most = 0

    class Watching(FakeScheduler):
        async def acquire(self, call: Call) -> Lease:
            nonlocal most
            await asyncio.sleep(0.001)
            most = max(most, bench.generations.holds)
            return await super().acquire(call)

    bench = Bench(stage(), Watching(), concurrency=7)
    source = write(tmp_path / "in", [line(f"{i}") for i in range(100)])
    await bench.run(source, tmp_path / "out")
    assert most == 7


# --- loads ---------------------------------------------------------------------------------


class OneSlot(FakeScheduler):
    """A device with room for one server, which stays while it has calls. `loads` is its history;
    an idle moment is a few steps of the event loop without a call for what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self._queues: dict[str, list[asyncio.Future[None]]] = {}
        self._busy = 0
        self._mover: asyncio.Task[None] | None = None

    async def acquire(self, call: Call) -> Lease:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(call.server, []).append(turn)
        if self._mover is None or self._mover.done():
            self._mover = asyncio.create_task(self._move())
        await turn
        return await super().acquire(call)

    def release(self, lease: Lease, *, lost: bool = False) -> None:
        self._busy -= 1
        super().release(lease, lost=lost)

    async def _move(self) -> None:
        while any(self._queues.values()) or self._busy:
            loaded = self.loads[-1] if self.loads else ""
            if queue := self._queues.get(loaded):
                if self._busy < 4:
                    self._busy += 1
                    queue.pop(0).set_result(None)
                await asyncio.sleep(0)
                continue
            await asyncio.sleep(0.002)
            if not self._queues.get(loaded) and not self._busy:
                waiting = [server for server, queue in self._queues.items() if queue]
                self.loads += [max(waiting, key=lambda s: len(self._queues[s]))] if waiting else []


class Slow(FakeEngine):
    """Takes a while, as all engines do."""

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        await asyncio.sleep(0.002)
        async for chunk in super().run(call):
            yield chunk


def voting(plans: Mapping[str, str]) -> tuple[Stage, dict[str, FakeEngine]]:
    """Experts `a`, `b` … on servers A, B …; a policy per plan, named so, whose members vote."""
    ids = sorted({expert for plan in plans for expert in plan})
    experts = {e: Expert(id=e, server=e.upper()) for e in ids}
    staged = stage(experts=experts)
    engines: dict[str, FakeEngine] = {e.upper(): Slow(e.upper()) for e in ids}
    auto = staged.generation.ways["auto"]
    ways = {}
    for plan in plans:
        policy = replace(
            auto.policy,
            id=plan,
            k=len(plan),
            strategy=Component("vote", VoteSettings(early_stop=False)),
        )
        ways[plan] = replace(auto, policy=policy, strategy=Vote(VoteSettings(early_stop=False)))
    generation = replace(
        staged.generation,
        catalog=replace(
            staged.generation.catalog,
            servers={s: Server(s, "fake", FakeSettings()) for s in engines},
            policies={plan: way.policy for plan, way in ways.items()},
            default_policy=next(iter(plans)),
        ),
        ways=ways,
        engines=engines,
        places={s: Place("gpu", Model(s, 4, 16), engine) for s, engine in engines.items()},
    )
    return Stage(generation, engines["A"]), engines


async def test_each_server_is_loaded_once_though_plans_cross_servers(tmp_path: Path) -> None:
    """Votes of a+b, of b+c, of a+c and single lines, mixed: three loads, not hundreds."""
    plans = {"ab": "", "bc": "", "ac": "", "a": "", "b": "", "c": ""}
    staged, engines = voting(plans)
    for engine in engines.values():
        engine.capacity = replace(engine.capacity, in_flight=4, queue=16)
    rng = random.Random(3)
    names = [rng.choice(sorted(plans)) for _ in range(300)]
    source = write(
        tmp_path / "in",
        [line(f"{i}", " ".join(name), body={"model": name}) for i, name in enumerate(names)],
    )
    scheduler = OneSlot()
    answered = await Bench(staged, scheduler).run(source, tmp_path / "out")
    assert {one["response"]["status_code"] for one in answered} == {200}
    assert sum(len(e.calls) for e in engines.values()) == sum(len(name) for name in names)
    assert sorted(scheduler.loads) == ["A", "B", "C"]


async def test_few_lines_at_once_cost_loads_where_plans_cross_servers(tmp_path: Path) -> None:
    """What `concurrency` buys: with 20 half-done lines at most, both come back for the next 20."""
    staged, _ = voting({"ab": ""})
    source = write(tmp_path / "in", [line(f"{i}", "a b", body={"model": "ab"}) for i in range(100)])
    scheduler = OneSlot()
    await Bench(staged, scheduler, concurrency=20).run(source, tmp_path / "out")
    assert 5 <= len(scheduler.loads) <= 10


async def test_a_reply_that_breaks_off_is_that_lines_error(tmp_path: Path) -> None:
    class Cut(FakeEngine):
        async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
            yield Chunk(text="half")

    source = write(tmp_path / "in", [line("a")])
    [answered] = await Bench(stage(engine=Cut("server"))).run(source, tmp_path / "out")
    assert answered["response"]["status_code"] == 502
    assert read(tmp_path / "out") == [answered]


@pytest.mark.parametrize("room", [1, 2])
async def test_the_real_scheduler_loads_each_server_once(tmp_path: Path, room: int) -> None:
    """Batch calls alone, servers of equal size, room for one or two of the four."""
    plans = {"ab": "", "bc": "", "ad": "", "a": "", "c": "", "d": ""}
    staged, engines = voting(plans)
    rng = random.Random(4)
    names = [rng.choice(sorted(plans)) for _ in range(400)]
    source = write(
        tmp_path / "in",
        [line(f"{i}", " ".join(name), body={"model": name}) for i, name in enumerate(names)],
    )
    for server, engine in engines.items():
        engine.capacity = replace(engine.capacity, in_flight=4, queue=8)
        model = Model(server, 4, 8, memory_gb=1.0, load_s=0.01, unload_s=0.01, movable=True)
        staged.generation.places[server] = Place("gpu", model, engine)  # type: ignore[index]
    scheduler = DeviceScheduler(lambda: SwapPolicy(PolicySettings()))
    scheduler.configure(staged.generation.places, {"gpu": float(room)})
    answered = await Bench(staged, scheduler).run(source, tmp_path / "out")
    await scheduler.close()
    assert {one["response"]["status_code"] for one in answered} == {200}
    assert all(engine.moves.count("start") == 1 for engine in engines.values())

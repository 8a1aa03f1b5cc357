"""The swap policy: calls of one model grouped by adapter, and batch calls."""

from __future__ import annotations

import random
import time

import pytest

from composer.scheduling.events import (
    Arrived,
    Finished,
)
from composer.scheduling.state import PolicySettings
from tests.scheduling.device import (
    Device,
    arrive,
    call,
    device,
    job,
    model,
    moves,
)

# --- adapters ------------------------------------------------------------------------


def adapter_loads(order: list[str | None], slots: int) -> int:
    """Loads of an LRU of adapters, as vLLM keeps one."""
    kept: list[str | None] = []
    loads = 0
    for adapter in order:
        if adapter in kept:
            kept.remove(adapter)
        else:
            loads += 1
            del kept[: len(kept) - slots + 1]
        kept.append(adapter)
    return loads


def closed_loop(adapters: list[str], wait: float, concurrency: int) -> Device:
    """So many callers at once, each asking again as soon as it has its answer."""
    rng = random.Random(0)
    on = device(model("a", in_flight=8, adapters=2, movable=False), settings=PolicySettings())
    on.lasts = lambda what, name: rng.lognormvariate(0, 0.5)
    coming = iter(enumerate(adapters))
    happens = on.happens

    def next_call() -> None:
        number, adapter = next(coming, (None, None))
        if number is not None:
            on.at(on.now, Arrived(call(number, "a", on.now, wait, adapter=adapter)))

    def and_again(event: object) -> None:
        happens(event)  # type: ignore[arg-type]
        if isinstance(event, Finished):
            next_call()

    on.happens = and_again  # type: ignore[method-assign]
    for _ in range(concurrency):
        next_call()
    return on.run()


def test_calls_are_grouped_by_adapter() -> None:
    rng = random.Random(1)
    adapters = [f"adapter-{rng.randrange(12)}" for _ in range(300)]
    on = closed_loop(adapters, 60.0, 32)
    assert len(on.granted) == 300
    granted = [adapters[number] for number in on.granted]
    assert adapter_loads(granted, 2) <= adapter_loads(list(adapters), 2) / 2


def test_an_adapter_in_use_overtakes_only_who_has_patience() -> None:
    """x's calls come faster than they end, for ever; y's waits for half its bound at most, and
    then until those ahead of it have ended."""
    on = device(model("a", in_flight=1, adapters=1, movable=False))
    arrive(on, call(1, "a", 0.5, wait=20.0, adapter="y"))
    arrive(on, *[call(10 + n, "a", 0.9 * n, wait=20.0, adapter="x") for n in range(60)])
    on.run()
    assert 8.0 <= on.granted[1] <= 13.0


def test_the_base_model_needs_no_adapter_slot() -> None:
    on = device(model("a", adapters=1, movable=False))
    arrive(on, call(1, "a", adapter="x"), call(2, "a"), call(3, "a", adapter="y"))
    on.run()
    assert on.granted == {1: 0.0, 2: 0.0, 3: 1.0}


# --- batches -------------------------------------------------------------------------


def test_batch_calls_give_way() -> None:
    on = device(model("a", in_flight=1, movable=False))
    arrive(on, job(1, "a"), job(2, "a"), call(3, "a", 0.5))
    on.run()
    assert on.granted == {1: 0.0, 3: 1.0, 2: 2.0}


def test_batch_calls_use_free_slots_while_a_swap_is_to_come() -> None:
    """a leaves at 48 s. Its batch calls of 10 s are granted up to 38 s, and then a leaves early,
    since nobody else asks for it: it would be idle."""
    on = device(model("a", in_flight=1, run_s=10.0), model("b"))
    arrive(on, call(1, "a"), *[job(10 + n, "a") for n in range(10)])
    on.at(0.1, Arrived(call(2, "b")))
    on.run()
    assert sum(at <= 38.0 for number, at in on.granted.items() if number >= 10) == 2
    assert on.granted[2] <= 60.0
    assert len(on.granted) == 12
    assert on.loads == ["a", "b", "a"]


def test_a_batch_is_done_in_the_fewest_loads() -> None:
    """Two stages each: all of a and b first, then c, which both feed."""
    on = device(model("a"), model("b"), model("c"))
    jobs = [job(n, "ab"[n % 2], later=("c",)) for n in range(20)]
    arrive(on, *jobs)
    happens = on.happens

    def then_c(event: object) -> None:
        happens(event)  # type: ignore[arg-type]
        if isinstance(event, Finished) and event.call < 100:
            on.at(on.now, Arrived(job(event.call + 100, "c", on.now)))

    on.happens = then_c  # type: ignore[method-assign]
    on.run()
    assert sorted(on.loads) == ["a", "b", "c"]
    assert on.loads[-1] == "c"
    assert len(on.granted) == 40


def test_a_batch_waits_until_an_interactive_model_has_been_quiet() -> None:
    on = device(model("a"), model("b"))
    arrive(on, *[call(n, "a", 5.0 * n) for n in range(10)], job(50, "b", 1.0))
    on.run()
    assert moves(on)[1] == (pytest.approx(45.0 + 2 * 12.0), "-a")
    assert on.granted[50] > 69.0


def test_ten_thousand_batch_calls_are_quick() -> None:
    """Each event costs far less than it would if all that wait were looked at."""
    on = device(*[model(f"m{i}", in_flight=16, adapters=2) for i in range(8)], memory_gb=20.0)
    arrive(on, *[job(n, f"m{n % 8}", adapter=f"x{n % 5}") for n in range(10_000)])
    began = time.process_time()
    on.run()
    assert len(on.granted) == 10_000
    assert len(on.loads) == 8
    assert (time.process_time() - began) / len(on.log) < 1e-3

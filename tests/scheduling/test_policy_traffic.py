"""The swap policy under random traffic: what it guarantees whatever comes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from composer.scheduling.events import (
    Arrived,
    Configured,
    Left,
    Lost,
    Model,
    Refuse,
    Unload,
    Waiting,
)
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.state import PolicySettings
from tests.scheduling.device import (
    Device,
    arrive,
    model,
)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Model], float]:
    """Models and a memory, which holds any one of them."""
    n = draw(st.integers(1, 5))
    models = [
        Model(
            f"m{i}",
            in_flight=draw(st.integers(1, 4)),
            queue=draw(st.sampled_from([2, 5, 50])),
            adapters=draw(st.sampled_from([None, None, 1, 2])),
            memory_gb=draw(st.sampled_from([4.0, 8.0, 10.0, 16.0])),
            load_s=draw(st.sampled_from([0.5, 3.0, 10.0])),
            unload_s=draw(st.sampled_from([0.0, 0.5, 2.0])),
            run_s=draw(st.sampled_from([0.2, 1.0, 4.0])),
            movable=i == 0 or draw(st.integers(0, 5)) > 0,
        )
        for i in range(n)
    ]
    return models, draw(st.sampled_from([16.0, 20.0, 26.0]))


@st.composite
def traffic(draw: st.DrawFn, models: list[Model], most: int = 40) -> list[Waiting]:
    """Calls in order of arrival; a few of them for batches, some of them without a bound."""
    calls, at = [], 0.0
    for number in range(draw(st.integers(1, most))):
        at += draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 5.0, 20.0]))
        name = draw(st.sampled_from([m.id for m in models]))
        batch = draw(st.integers(0, 4)) == 0
        wait = None if batch else draw(st.sampled_from([None, 2.0, 15.0, 15.0, 30.0, 60.0, 120.0]))
        calls.append(
            Waiting(
                number,
                name,
                at,
                adapter=draw(st.sampled_from([None, "a", "b", "c", "d"])),
                deadline=None if wait is None else at + wait,
                batch=batch,
                later=tuple(draw(st.lists(st.sampled_from([m.id for m in models]), max_size=2))),
            )
        )
    return calls


def shorter(seed: int, models: list[Model]) -> Callable[[str, str], float]:
    """Durations of at most the models' figures, often just those."""
    rng = random.Random(seed)
    named = {m.id: m for m in models}
    return lambda what, name: (
        float(getattr(named[name], f"{what}_s")) * rng.choice([1.0, 1.0, 0.7, 0.3, 0.01])
    )


def any_length(seed: int, models: list[Model]) -> Callable[[str, str], float]:
    """Durations that the models' figures say little about."""
    rng = random.Random(seed)
    named = {m.id: m for m in models}
    return lambda what, name: float(getattr(named[name], f"{what}_s")) * rng.lognormvariate(0, 1)


KNOBS = st.builds(
    PolicySettings,
    patience=st.sampled_from([0.01, 0.5, 1.0]),
    learn=st.just(False),
    drain_s=st.sampled_from([5.0, 30.0]),
    adapter_patience=st.sampled_from([0.0, 0.5, 1.0]),
    preload=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), fleet=fleets(), knobs=KNOBS, seed=st.integers(0, 10**6))
def test_under_sound_estimates_no_admitted_call_is_late(
    data: st.DataObject, fleet: tuple[list[Model], float], knobs: PolicySettings, seed: int
) -> None:
    models, memory = fleet
    calls = data.draw(traffic(models))
    on = Device(SwapPolicy(knobs), {m.id: m for m in models}, memory, shorter(seed, models)).start()
    arrive(on, *calls)
    rng = random.Random(seed)
    for one in rng.sample(calls, len(calls) // 5):  # who leaves makes nobody late
        on.at(one.arrived + rng.choice([0.0, 1.0, 10.0]), Left(one.id))
    on.run()
    on.check_all_ended(calls)
    arrivals = {c.id: c for c in calls}
    for now, event, actions in on.log:
        for action in actions:
            if isinstance(action, Refuse):
                arriving = isinstance(event, Arrived) and event.call.id == action.call
                assert arriving, f"{arrivals[action.call]} was admitted, and refused at {now}"
    assert not on.cut


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    fleet=fleets(),
    knobs=KNOBS,
    learn=st.booleans(),
    drain_s=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_whatever_happens_every_call_ends_once_and_in_time(
    data: st.DataObject,
    fleet: tuple[list[Model], float],
    knobs: PolicySettings,
    learn: bool,
    drain_s: float,
    seed: int,
) -> None:
    """Loads fail, servers die, callers leave, models come and go, and nothing lasts as expected."""
    models, memory = fleet
    calls = data.draw(traffic(models))
    rng = random.Random(seed)
    policy = SwapPolicy(replace(knobs, learn=learn, drain_s=drain_s))
    on = Device(
        policy,
        {m.id: m for m in models},
        memory,
        any_length(seed, models),
        fails=lambda name: rng.random() < 0.2,
    ).start()
    arrive(on, *calls)
    last = calls[-1].arrived
    for _ in range(data.draw(st.integers(0, 6))):
        at = rng.uniform(0, last + 30)
        on.at(at, rng.choice([Lost(rng.choice(models).id), Left(rng.choice(calls).id)]))
    if data.draw(st.booleans()):
        on.at(rng.uniform(0, last + 10), Configured(tuple(models[1:]), memory + 2))
        on.at(rng.uniform(last + 10, last + 20), Configured(tuple(models), memory))
    on.run()
    on.check_all_ended(calls)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), fleet=fleets(), seed=st.integers(0, 10**6))
def test_the_same_events_give_the_same_actions(
    data: st.DataObject, fleet: tuple[list[Model], float], seed: int
) -> None:
    models, memory = fleet
    calls = data.draw(traffic(models))
    on = Device(SwapPolicy(), {m.id: m for m in models}, memory, any_length(seed, models)).start()
    arrive(on, *calls)
    on.run()
    other = SwapPolicy()
    for now, event, actions in on.log:
        assert other.on(event, now) == actions


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_models_that_all_fit_are_loaded_once(data: st.DataObject, seed: int) -> None:
    models = [model(f"m{i}") for i in range(4)]
    calls = data.draw(traffic(models))
    on = Device(SwapPolicy(), {m.id: m for m in models}, 40.0, any_length(seed, models)).start()
    arrive(on, *calls)
    on.run()
    assert sorted(on.loads) == sorted(set(on.loads))
    assert not any(isinstance(a, Unload) for _, _, actions in on.log for a in actions)

"""The order of a batch's loads: it can be carried out, and it is as cheap as can be."""

from __future__ import annotations

import heapq
from itertools import chain as flatten
from itertools import combinations, count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composer.scheduling.batch_order import (
    ModelCost,
    Step,
    completes,
    load_seconds,
    local_search,
    order,
)
from composer.scheduling.batch_problem import Problem

Instance = tuple[dict[tuple[str, ...], int], dict[str, ModelCost], float, list[str]]


def brute(
    chains: dict[tuple[str, ...], int],
    models: dict[str, ModelCost],
    memory_gb: float,
    resident: list[str],
) -> float:
    """Dijkstra over (resident set, stages left of each chain); any load, any eviction."""

    def work(inside: frozenset[str], left: tuple[tuple[str, ...], ...]) -> tuple:
        done = []
        for stages in left:
            while stages and stages[0] in inside:
                stages = stages[1:]
            done.append(stages)
        return tuple(sorted(filter(None, done)))

    start = frozenset(resident)
    number = count()
    queue = [(0.0, next(number), start, work(start, tuple(chains)))]
    seen = set()
    while queue:
        spent, _, inside, left = heapq.heappop(queue)
        if not left:
            return spent
        if (inside, left) in seen:
            continue
        seen.add((inside, left))
        for name in set(flatten(*left)) - inside:
            for n in range(len(inside) + 1):
                for gone in combinations(inside, n):
                    then = (inside - set(gone)) | {name}
                    if sum(models[m].memory_gb for m in then) <= memory_gb + 1e-9:
                        cost = spent + models[name].load_s
                        heapq.heappush(queue, (cost, next(number), then, work(then, left)))
    raise AssertionError


@st.composite
def instances(draw: st.DrawFn, *, most_models: int = 5, most_chains: int = 7) -> Instance:
    names = "abcdefghij"[: draw(st.integers(1, most_models))]
    models = {
        name: ModelCost(
            float(draw(st.integers(1, 9))), float(draw(st.sampled_from([1, 1.5, 2, 3])))
        )
        for name in names
    }
    memory = draw(st.sampled_from([3.0, 4.0, 5.5]))
    chain = st.lists(st.sampled_from(names), min_size=1, max_size=3).map(tuple)
    chains = draw(st.dictionaries(chain, st.integers(1, 50), min_size=1, max_size=most_chains))
    resident: list[str] = []
    for name in draw(st.permutations(names)):
        if draw(st.booleans()):
            taken = sum(models[m].memory_gb for m in resident)
            if taken + models[name].memory_gb <= memory:
                resident.append(name)
    return chains, models, memory, resident


@given(instance=instances())
@settings(max_examples=150, deadline=None)
def test_it_is_as_cheap_as_an_exhaustive_search(instance: Instance):
    chains, models, memory, resident = instance
    steps = order(*instance)
    assert completes(steps, chains, models, memory, resident)
    assert load_seconds(steps, models) == pytest.approx(brute(*instance))


@given(instance=instances(most_models=10, most_chains=25))
@settings(max_examples=40, deadline=None)
def test_the_local_search_is_valid_and_hardly_dearer(instance: Instance):
    chains, models, memory, resident = instance
    steps = order(*instance, exact_states=0, search_loads=3000)
    assert completes(steps, chains, models, memory, resident)
    best = load_seconds(order(*instance), models)
    assert best - 1e-9 <= load_seconds(steps, models) <= 1.35 * best + 1e-9


COSTS = {"a": ModelCost(4, 10), "b": ModelCost(6, 10), "c": ModelCost(5, 10)}


def test_plain_jobs_are_grouped_and_residents_go_first():
    steps = order({("a",): 5, ("b",): 2, ("c",): 1}, COSTS, 10, ["b"])
    assert [step.load for step in steps] == ["a", "c"]
    assert steps[0] == Step("a", ("b",))


def test_chains_are_loaded_in_their_order():
    steps = order({("b", "a"): 1, ("c", "b"): 1}, COSTS, 10)
    assert [step.load for step in steps] == ["c", "b", "a"]


def test_of_a_circle_the_cheapest_comes_twice():
    assert [s.load for s in order({("a", "b"): 9, ("b", "a"): 1}, COSTS, 10)] == ["a", "b", "a"]


def test_models_that_fit_together_come_once():
    assert load_seconds(order({("a", "b"): 9, ("b", "a"): 1}, COSTS, 20), COSTS) == 10


def test_nothing_leaves_before_its_room_is_needed():
    assert [step.evict for step in order({("a",): 1, ("b",): 1, ("c",): 1}, COSTS, 20)][:2] == [
        (),
        (),
    ]


def test_more_jobs_first_where_the_cost_is_equal():
    assert order({("a",): 1, ("b",): 100}, COSTS, 10)[0].load == "b"


def test_nothing_to_do():
    assert order({}, COSTS, 10) == []
    assert order({("a", "b", "a"): 3}, COSTS, 20, ["a", "b"]) == []


@pytest.mark.parametrize(
    ("chains", "memory", "resident", "words"),
    [
        ({("x",): 1}, 10, [], "without a cost: x"),
        ({("a",): 1}, 9, [], "a needs more than the 9 GB"),
        ({("a",): 1}, 15, ["b", "c"], "resident models need more"),
    ],
)
def test_what_cannot_be_is_refused(chains, memory, resident, words):
    with pytest.raises(ValueError, match=words):
        order(chains, COSTS, memory, resident)


def many(n: int = 64, jobs: int = 10_000) -> Instance:
    import random

    chance = random.Random(1)
    names = [f"m{i:02d}" for i in range(n)]
    models = {m: ModelCost(chance.uniform(3, 15), chance.randrange(16, 65) / 2) for m in names}
    weights = [1 / (r + 1) for r in range(n)]
    chains: dict[tuple[str, ...], int] = {}
    for _ in range(jobs):
        pair = tuple(chance.choices(names, weights, k=2))
        chains[pair] = chains.get(pair, 0) + 1
    return chains, models, 64.0, names[:1]


def test_many_jobs_over_many_models_and_the_same_answer_again():
    chains, models, memory, resident = many()
    steps = order(chains, models, memory, resident, exact_states=0, search_loads=2000)
    assert completes(steps, chains, models, memory, resident)
    # Loading everything in turn, twice, would always do.
    assert load_seconds(steps, models) < 2 * sum(cost.load_s for cost in models.values())
    again = order(chains, models, memory, resident, exact_states=0, search_loads=2000)
    assert again == steps


@given(instance=instances())
@example(  # a resident model that waits for another one may have been there the first time
    instance=(
        {("b", "a"): 1, ("c", "a", "b"): 1},
        {"a": ModelCost(1, 1), "b": ModelCost(1, 3), "c": ModelCost(1, 1)},
        3.0,
        ["a"],
    )
)
@settings(max_examples=150, deadline=None)
def test_the_bound_never_exceeds_the_optimum(instance: Instance):
    problem = Problem(*instance)
    assert problem.bound(problem.start()) <= brute(*instance) + 1e-9
    assert local_search(problem, 500).spent >= problem.bound(problem.start()) - 1e-9

"""In which order to load models so that a batch is done with the fewest seconds of loading.

Pure: knows no clock, queue or server. A job is a chain of models, each stage being done while its
model is resident, in order; how many jobs share a chain changes no cost, so 10,000 jobs are as
quick as one of each kind. For a single model per job the answer is plain grouping. With room for
one model, chains make it a feedback vertex set: models that wait for each other in a circle need
one of them twice; with more room, models that are resident together spare it again.

Loading counts, evicting does not. Two searches: A* over (what is resident, which stages are done)
where it ends soon, else local search over sequences of models.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence

from composer.scheduling.batch_problem import SLACK_GB, ModelCost, Problem, State, Step, bits

__all__ = ["ModelCost", "Step", "completes", "load_seconds", "order"]

EXACT_STATES = 3_000
"""States that the exact search may open before the local search takes over."""

SEARCH_LOADS = 60_000
"""Loads that the local search may try out in all: a second or so."""

DEVIATION = 0.05
"""How much worse than the best, at first, the local search's present sequence may be."""


def order(
    chains: Mapping[tuple[str, ...], int],
    models: Mapping[str, ModelCost],
    memory_gb: float,
    resident: Sequence[str] = (),
    *,
    exact_states: int | None = EXACT_STATES,
    search_loads: int = SEARCH_LOADS,
) -> list[Step]:
    """The loads that let every chain's stages be done in order; none where all is resident.

    `chains` counts the jobs per chain; among equally cheap orders one that does more jobs sooner
    is preferred. The answer is optimal where the exact search ends within `exact_states` (None:
    however long that takes); `search_loads` bounds the effort beyond. Deterministic. Raises
    ValueError for a chain with an unknown model, a model too large for the memory, or residents
    that do not fit.
    """
    problem = Problem(chains, models, memory_gb, resident)
    found = exact(problem, exact_states)
    return problem.steps(found or local_search(problem, search_loads))


def load_seconds(steps: Sequence[Step], models: Mapping[str, ModelCost]) -> float:
    """What these loads take together."""
    return sum(models[step.load].load_s for step in steps)


def completes(
    steps: Sequence[Step],
    chains: Mapping[tuple[str, ...], int],
    models: Mapping[str, ModelCost],
    memory_gb: float,
    resident: Sequence[str] = (),
) -> bool:
    """Whether the steps can be carried out and leave no stage of any chain undone."""
    inside = set(resident)
    left = [list(chain) for chain in chains]

    def work() -> None:
        for chain in left:
            while chain and chain[0] in inside:
                del chain[0]

    work()
    for step in steps:
        if step.load in inside or not inside.issuperset(step.evict):
            return False
        inside.difference_update(step.evict)
        inside.add(step.load)
        if sum(models[name].memory_gb for name in inside) > memory_gb + SLACK_GB:
            return False
        work()
    return not any(left)


def exact(problem: Problem, limit: int | None) -> State | None:
    """A*, with the bound of `Problem.bound`; None where more than `limit` states would have to
    be opened."""
    start = problem.start()
    queue = [(problem.bound(start), 0, 0, start)]
    cheapest = {(start.inside, start.done): 0.0}
    opened = serial = 0
    while queue:
        state = heapq.heappop(queue)[3]
        if state.done == problem.all:
            return state
        if state.spent > cheapest[state.inside, state.done]:
            continue
        opened += 1
        if limit is not None and opened > limit:
            return None
        for after in problem.next(state):
            key = (after.inside, after.done)
            if after.spent < cheapest.get(key, float("inf")):
                cheapest[key] = after.spent
                serial += 1
                # Rounded, so that equal sums of seconds are equal and jobs decide.
                total = round(after.spent + problem.bound(after), 9)
                heapq.heappush(queue, (total, -after.jobs, serial, after))
    raise AssertionError("every chain can be done: each model fits alone")


def local_search(problem: Problem, loads: int = SEARCH_LOADS) -> State:
    """Starts from loading a feedback vertex set first and last and all others between them, in
    the order of their chains; then moves, doubles and drops entries of that sequence. What it
    goes on from may be worse than the best so far by a share that sinks to nothing
    (record-to-record travel, Dueck 1993)."""
    chance = random.Random(0)  # a fixed seed: the same batch, the same order
    # A set for room for one, and one that leaves circles to models that fit together.
    starts = [_first_sequence(problem, apart_only=False), _first_sequence(problem, apart_only=True)]
    best = min((decode(problem, sequence) for sequence in starts), key=_worth)
    least = problem.bound(problem.start())
    sequence, left = _path(best), loads
    while left > 0 and len(sequence) > 1 and best.spent > least + 1e-9:
        tried = decode(problem, _neighbour(sequence, chance))
        left -= len(sequence) + 1
        if _worth(tried) <= best.spent * (1 + DEVIATION * left / loads):
            sequence = _path(tried)
            if _worth(tried) < _worth(best):
                best = tried
    return best


def decode(problem: Problem, sequence: Sequence[int]) -> State:
    """Loads models in this order, leaving out loads that would do nothing and evicting what the
    sequence wants last; where it does not get everything done, the models with the most
    stages ready per second of loading follow."""
    state = problem.start()
    turns: dict[int, list[int]] = {}
    for place in range(len(sequence) - 1, -1, -1):
        turns.setdefault(sequence[place], []).append(place)
    for place, model in enumerate(sequence):
        while turns[model] and turns[model][-1] <= place:
            turns[model].pop()
        if not state.inside >> model & 1 and problem.ready(state) & problem.stages[model]:
            state = _load(problem, state, model, turns)
    while state.done != problem.all:
        ready = problem.ready(state)
        model = min(
            (m for m in range(len(problem.names)) if ready & problem.stages[m]),
            key=lambda m: (problem.load_s[m] / (ready & problem.stages[m]).bit_count(), m),
        )
        state = _load(problem, state, model, turns)
    return state


def _load(problem: Problem, state: State, model: int, turns: Mapping[int, Sequence[int]]) -> State:
    members = list(bits(state.inside))
    free = (
        problem.memory_gb + SLACK_GB - problem.size[model] - sum(problem.size[m] for m in members)
    )
    evicted = []
    if free < 0:
        # Wanted last leaves first; what is wanted never again, the cheapest.
        def keep(m: int) -> tuple[float, float]:
            return (-turns[m][-1] if turns.get(m) else float("-inf"), problem.load_s[m])

        for m in sorted(members, key=keep):
            if free >= 0:
                break
            evicted.append(m)
            free += problem.size[m]
        for m in evicted[-2::-1]:  # the last one was needed
            if free >= problem.size[m]:
                evicted.remove(m)
                free -= problem.size[m]
    inside = state.inside | 1 << model
    for m in evicted:
        inside &= ~(1 << m)
    return problem.settled(inside, state.done, state.spent + problem.load_s[model], model, state)


def _worth(state: State) -> float:
    return round(state.spent, 9)


def _path(state: State) -> list[int]:
    loads = []
    while state.before is not None:
        loads.append(state.load)
        state = state.before
    return loads[::-1]


def _neighbour(sequence: Sequence[int], chance: random.Random) -> list[int]:
    changed = list(sequence)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(changed))
        kind = chance.random()
        if kind < 0.3 and len(changed) > 1:
            del changed[at]
        elif kind < 0.85:
            model = changed.pop(at)
            changed.insert(chance.randrange(len(changed) + 1), model)
        else:
            changed.insert(chance.randrange(len(changed) + 1), changed[at])
    return changed


def _first_sequence(problem: Problem, *, apart_only: bool) -> list[int]:
    """A greedy feedback vertex set of "is called before", then the others in that order, then the
    set again."""
    n = len(problem.names)
    after: list[set[int]] = [set() for _ in range(n)]
    ahead: list[set[int]] = [set() for _ in range(n)]
    for a, b in problem.before:
        if not apart_only or problem.apart(a, b):
            after[a].add(b)
            ahead[b].add(a)
    left = set(range(n))
    early: list[int] = []  # free of what is ahead of them
    late: list[int] = []  # nothing comes after them
    twice: list[int] = []
    while left:
        source = min((m for m in left if not ahead[m] & left), default=None)
        sink = min((m for m in left if not after[m] & left), default=None)
        if source is not None:
            early.append(source)
            chosen = source
        elif sink is not None:
            late.append(sink)
            chosen = sink
        else:
            chosen = min(
                left,
                key=lambda m: (
                    problem.load_s[m] / (len(after[m] & left) * len(ahead[m] & left)),
                    m,
                ),
            )
            twice.append(chosen)
        left.remove(chosen)
    return twice + early + late[::-1] + twice

"""A batch of jobs, each a chain of models, as sets of stages in bits. Knows no search.

The stages of a chain are numbered one after the other, so that `done << 1` are those that come
next, and thousands of chains advance in one operation on an integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

SLACK_GB = 1e-9


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Seconds to load a model, and its memory."""

    load_s: float
    memory_gb: float


@dataclass(frozen=True, slots=True)
class Step:
    """Evict these, then load this one."""

    load: str
    evict: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """`inside` are the resident models that still have something to do, as bits; `done` the
    stages. `before` is the state it came from, by loading `load` in place of `evict`."""

    inside: int
    done: int
    spent: float
    jobs: int
    load: int = -1
    before: State | None = None


class Problem:
    """Models and stages as numbers, sets of them as bits. The stages of a chain are numbered one
    after the other, so that `done << 1` are those that come next."""

    def __init__(
        self,
        chains: Mapping[tuple[str, ...], int],
        models: Mapping[str, ModelCost],
        memory_gb: float,
        resident: Sequence[str],
    ) -> None:
        called = {name for chain in chains for name in chain}
        if unknown := sorted((called | set(resident)) - models.keys()):
            raise ValueError(f"models without a cost: {', '.join(unknown)}; give each one's cost")
        if large := [n for n in sorted(called) if models[n].memory_gb > memory_gb + SLACK_GB]:
            raise ValueError(f"{large[0]} needs more than the {memory_gb} GB of the device")
        self.costs, self.memory_gb = models, memory_gb
        self.resident = tuple(dict.fromkeys(resident))
        if sum(models[name].memory_gb for name in self.resident) > memory_gb + SLACK_GB:
            raise ValueError(f"the resident models need more than the {memory_gb} GB of the device")
        self.names = sorted(called)
        number = {name: n for n, name in enumerate(self.names)}
        self.load_s = [models[name].load_s for name in self.names]
        self.size = [models[name].memory_gb for name in self.names]
        self.stages = [0] * len(self.names)  # of a model
        self.first = self.later = 0
        self.last = 0
        self.jobs: dict[int, int] = {}  # of the chain with this last stage
        # (a, b): stages of `a` that come before `b` within a chain
        self.before: dict[tuple[int, int], int] = {}
        at = 0
        for chain, count in sorted(_shortened(chains).items()):
            for place, name in enumerate(chain):
                bit = 1 << at
                self.stages[number[name]] |= bit
                if place:
                    self.later |= bit
                else:
                    self.first |= bit
                for after in chain[place + 1 :]:
                    pair = (number[name], number[after])
                    self.before[pair] = self.before.get(pair, 0) | bit
                at += 1
            self.last |= 1 << (at - 1)
            self.jobs[at - 1] = count
        self.all = (1 << at) - 1
        # Two models that never fit together and need each other's stages done first.
        self.crossed = sorted(
            (
                (a, b, stages, self.before[b, a])
                for (a, b), stages in self.before.items()
                if a < b and (b, a) in self.before and self.apart(a, b)
            ),
            key=lambda entry: (-min(self.load_s[entry[0]], self.load_s[entry[1]]), entry[:2]),
        )
        # A model's stages that come after a stage of one that it does not fit beside.
        self.far = [0] * len(self.names)
        for (a, b), stages in self.before.items():
            if self.apart(a, b):
                self.far[b] |= stages

    def apart(self, a: int, b: int) -> bool:
        """Whether two models never fit together."""
        return a != b and self.size[a] + self.size[b] > self.memory_gb + SLACK_GB

    def start(self) -> State:
        inside = 0
        for number, name in enumerate(self.names):
            if name in self.resident:
                inside |= 1 << number
        return self.settled(inside, 0, 0.0, -1, None)

    def settled(
        self, inside: int, done: int, spent: float, load: int, before: State | None
    ) -> State:
        """With all done that the resident models can do, and those forgotten that have no stage
        left."""
        stages, undone = 0, self.all & ~done
        for model in bits(inside):
            stages |= self.stages[model]
        while new := stages & ~done & (self.first | ((done << 1) & self.later)):
            done |= new
        for model in bits(inside):
            if not self.stages[model] & ~done:
                inside &= ~(1 << model)
        jobs = sum(self.jobs[last] for last in bits(self.last & undone & done))
        return State(inside, done, spent, jobs + (before.jobs if before else 0), load, before)

    def bound(self, state: State) -> float:
        """Seconds of loading that are surely still to come: every model with stages left and
        not resident once; a resident one whose stages wait for one that it does not fit
        beside; and, of two absent ones that wait for each other and do not fit together, one
        a second time (a feasible dual of the vertex cover over such pairs)."""
        left = self.all & ~state.done
        total = 0.0
        for model, stages in enumerate(self.stages):
            if stages & left:
                away = not state.inside >> model & 1
                if away or self.far[model] & left:
                    total += self.load_s[model]
        free = self.load_s.copy()
        for a, b, first, second in self.crossed:
            if state.inside & (1 << a | 1 << b):
                continue  # its being there may be one of the two times
            if free[a] and free[b] and first & left and second & left:
                share = min(free[a], free[b])
                total += share
                free[a] -= share
                free[b] -= share
        return total

    def ready(self, state: State) -> int:
        """Stages that their models could do now."""
        return self.all & ~state.done & (self.first | ((state.done << 1) & self.later))

    def next(self, state: State) -> Iterator[State]:
        """The states that one useful load leads to: of a model with a stage that is ready (any
        other load can be put off until it has one), in place of no more than it needs."""
        ready = self.ready(state)
        taken = sum(self.size[model] for model in bits(state.inside))
        for model, stages in enumerate(self.stages):
            if not stages & ready or state.inside >> model & 1:
                continue
            short = taken + self.size[model] - self.memory_gb - SLACK_GB
            spent = state.spent + self.load_s[model]
            for evict in self._evictions(state.inside, short):
                inside = (state.inside & ~evict) | 1 << model
                yield self.settled(inside, state.done, spent, model, state)

    def _evictions(self, inside: int, short: float) -> Iterator[int]:
        """Sets of residents that free `short` GB, none of whose proper subsets does."""
        if short <= 0:
            yield 0
            return
        members = list(bits(inside))
        for n in range(1, len(members) + 1):
            for group in combinations(members, n):
                freed = sum(self.size[m] for m in group)
                if freed >= short and freed - min(self.size[m] for m in group) < short:
                    yield sum(1 << m for m in group)

    def steps(self, state: State) -> list[Step]:
        """The loads that led to a state. Models that have nothing left to do leave only when
        their room is needed, the cheapest to load first."""
        path = []
        while state.before is not None:
            path.append(state)
            state = state.before
        steps = []
        inside = list(self.resident)
        for state in reversed(path):
            assert state.before is not None
            name = self.names[state.load]
            kept = {self.names[m] for m in bits(state.inside | 1 << state.load)}
            useful = {self.names[m] for m in bits(state.before.inside)}
            # What had stages left and has gone without doing them was evicted by the search.
            evict = self._evicted(state, useful)
            free = self.memory_gb + SLACK_GB - self.costs[name].memory_gb
            free -= sum(self.costs[m].memory_gb for m in inside if m not in evict)
            spare = [m for m in inside if m not in evict and m not in useful]
            for other in sorted(spare, key=lambda m: (self.costs[m].load_s, m)):
                if free >= 0:
                    break
                evict.add(other)
                free += self.costs[other].memory_gb
            assert kept.isdisjoint(evict)
            steps.append(Step(name, tuple(m for m in inside if m in evict)))
            inside = [m for m in inside if m not in evict] + [name]
        return steps

    def _evicted(self, state: State, useful: set[str]) -> set[str]:
        still = {self.names[m] for m in bits(state.inside)}
        left = self.all & ~state.done
        return {name for name in useful - still if self.stages[self.names.index(name)] & left}


def _shortened(chains: Mapping[tuple[str, ...], int]) -> dict[tuple[str, ...], int]:
    """Without repeats of a model in a row, and without chains of one model that another chain
    visits anyway; their jobs are counted with it."""
    merged: dict[tuple[str, ...], int] = {}
    for chain, count in chains.items():
        short = tuple(name for n, name in enumerate(chain) if n == 0 or name != chain[n - 1])
        if short:
            merged[short] = merged.get(short, 0) + count
    visited = {name for chain in merged if len(chain) > 1 for name in chain}
    return {c: n for c, n in merged.items() if len(c) > 1 or c[0] not in visited}


def bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low

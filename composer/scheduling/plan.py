"""Which models to load next, in what order and in place of which others, and when at the latest.
Pure functions of a `View`; knows no queues, events or estimates.

A plan is an order of loads, each with the models that leave for it. Its times are bounds: every
duration is taken at its estimate, memory is handed out strictly in the plan's order, and whatever
is served before a model leaves is served from now on. All times are maxima and sums of durations,
so a plan that holds still holds when things take less long than estimated.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

ROUNDING_GB = 1e-6
MOST_COMBINED = 6
"""Models among which the cheapest set to leave is found by trying all sets."""

SEARCHED_STEPS = 3
"""Steps of a plan whose victims are searched; those of later ones, which will be planned again
before they are begun, are taken greedily."""


@dataclass(slots=True)
class Holder:
    """A model that holds memory and may be told to leave: it has ended its calls by `done`, then
    leaves in `unload_s`. `regret` is what its leaving is expected to cost, in swap seconds a
    second; `variance` (s²) is that of how long it takes to go."""

    model: str
    memory_gb: float
    unload_s: float
    done: float
    regret: float
    variance: float = 0.0


@dataclass(slots=True)
class Demand:
    """A visit that a model is to make. It must be loaded by `latest` and should be by `target`
    so that its calls are granted in time; they have ended `busy_s` after it is loaded, and
    `growth` × (time from now until then) later still, if calls keep arriving as they did.
    It can't be loaded before `earliest`. `variance` (s²) is that of load and visit."""

    model: str
    memory_gb: float
    load_s: float
    unload_s: float
    latest: float
    target: float
    busy_s: float
    regret: float
    growth: float = 0.0
    variance: float = 0.0
    earliest: float = -math.inf


Visit = tuple[str, int]
"""A model and the number of the visit, 0 or 1: calls that can't all be served in one."""


@dataclass(slots=True)
class View:
    """The device at `now`. `free_gb` is not promised to anybody; `leaving` are (time, GB) that
    will be. `claims` are loads already decided on, first to last, which come before all others.
    `slack` is that of the calls being served by what is there. `margin`: spreads by which the
    plan is to stand above what is expected."""

    now: float
    free_gb: float
    leaving: list[tuple[float, float]]
    holders: dict[str, Holder]
    claims: list[Demand]
    demands: dict[Visit, Demand]
    slack: float = math.inf
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """A load. `victims` must have ended their calls by `leave_by` at the latest; for a load without
    victims that is the time to begin it. `ready` is when it will be loaded if begun now."""

    visit: Visit
    victims: tuple[str, ...]
    ready: float
    leave_by: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`slack` is the least time by which a call is expected to be granted before its deadline;
    negative: some call will be late. `leave_by` has the victims' times, `ready` when each visit
    begins if all is begun now; `regret` sums the victims'. `spare` is `slack` less the margin for
    what may last longer; `end` is when the last visit's calls have ended."""

    steps: tuple[Step, ...] = ()
    slack: float = math.inf
    leave_by: Mapping[str, float] = field(default_factory=dict)
    ready: Mapping[Visit, float] = field(default_factory=dict)
    regret: float = 0.0
    spare: float = math.inf
    end: float = -math.inf

    @property
    def order(self) -> list[Visit]:
        return [step.visit for step in self.steps]

    @property
    def victims(self) -> dict[Visit, tuple[str, ...]]:
        return {step.visit: step.victims for step in self.steps}


HOPELESS = Plan(slack=-math.inf, spare=-math.inf)


@dataclass(slots=True)
class _Timed:
    visit: Visit
    victims: list[str]
    begun: float
    ready: float
    spare: float


class _Memory:
    """Memory that becomes free, and is handed out strictly in the order of asking."""

    def __init__(self, now: float, free_gb: float, leaving: list[tuple[float, float]]) -> None:
        self._releases = sorted([(now, free_gb), *leaving])
        self._total = sum([gb for _, gb in self._releases])
        self._need = 0.0
        self._next = 0  # releases before this one come to `_freed`
        self._freed = 0.0

    def short(self, gb: float) -> float:
        """What is missing for one more taker of so much, if nobody else leaves."""
        return self._need + gb - self._total

    def release(self, at: float, gb: float) -> None:
        place = bisect_right(self._releases, (at, gb))
        self._releases.insert(place, (at, gb))
        self._total += gb
        if place < self._next:
            self._next += 1
            self._freed += gb

    def take(self, gb: float) -> float:
        """When so much is free for the next taker."""
        self._need += gb
        while self._freed < self._need - ROUNDING_GB:
            if self._next == len(self._releases):
                return math.inf
            self._freed += self._releases[self._next][1]
            self._next += 1
        # What was released since may have made an earlier time enough.
        while self._next > 1:
            gb = self._releases[self._next - 1][1]
            if self._freed - gb < self._need - ROUNDING_GB:
                break
            self._next -= 1
            self._freed -= gb
        return self._releases[max(self._next - 1, 0)][0]


def evaluate(
    view: View,
    order: Sequence[Visit],
    victims: Mapping[Visit, tuple[str, ...]] | None = None,
    *,
    fast: bool = False,
    growing: bool = False,
) -> Plan | None:
    """The plan that loads in this order. Where `victims` names none or too few, the cheapest
    leave, or with `fast` those gone first. `growing`: queues grow as expected meanwhile. None
    where memory does not suffice."""
    now, margin = view.now, view.margin
    memory = _Memory(now, view.free_gb, view.leaving)
    variance = 0.0
    holders = dict(view.holders)
    slack = view.slack
    ready_at: dict[Visit, float] = {}

    def enter(demand: Demand, ready: float) -> None:
        busy = demand.busy_s + (demand.growth * (ready - now) if growing else 0.0)
        holders[demand.model] = Holder(
            demand.model,
            demand.memory_gb,
            demand.unload_s,
            ready + busy,
            demand.regret,
        )

    for claim in view.claims:
        variance += claim.variance
        ready = max(memory.take(claim.memory_gb), claim.earliest) + claim.load_s
        slack = min(slack, claim.latest - ready)
        ready_at[claim.model, 0] = ready
        enter(claim, ready)
    timed: list[_Timed] = []
    regret = 0.0
    for visit in order:
        demand = view.demands[visit]
        variance += demand.variance
        stays = holders.get(demand.model)
        if stays is not None:  # still there from its last visit
            slack = min(slack, demand.latest - stays.done)
            ready_at[visit] = stays.done
            holders[demand.model] = Holder(
                stays.model,
                stays.memory_gb,
                stays.unload_s,
                stays.done + demand.busy_s,
                stays.regret,
                stays.variance,
            )
            continue
        leave = [name for name in victims.get(visit, ()) if name in holders] if victims else []
        short = memory.short(demand.memory_gb) - sum([holders[n].memory_gb for n in leave])
        if short > ROUNDING_GB:
            more = choose_victims(
                [h for h in holders.values() if h.model not in leave],
                short,
                fast=fast,
                search=len(timed) < SEARCHED_STEPS,
            )
            if more is None:
                return None
            leave.extend([holder.model for holder in more])
        unload_s = 0.0
        for name in leave:
            holder = holders.pop(name)
            memory.release(max(now, holder.done) + holder.unload_s, holder.memory_gb)
            unload_s = max(unload_s, holder.unload_s)
            regret += holder.regret
            variance += holder.variance
        start = max(memory.take(demand.memory_gb), demand.earliest)
        ready = start + demand.load_s
        spare = margin * math.sqrt(variance)
        slack = min(slack, demand.latest - ready)
        timed.append(
            _Timed(
                visit,
                leave,
                start - unload_s,
                ready,
                demand.latest - ready - spare,
            )
        )
        ready_at[visit] = ready
        enter(demand, ready)
    steps: list[Step] = []
    leave_by: dict[str, float] = {}
    rest = math.inf
    for step in reversed(timed):
        rest = min(rest, step.spare)
        latest = step.begun + rest
        steps.append(
            Step(
                step.visit,
                tuple(step.victims),
                step.ready,
                latest,
            )
        )
        for name in step.victims:
            leave_by[name] = latest
    steps.reverse()
    end = max(
        [holders[step.visit[0]].done for step in timed if step.visit[0] in holders], default=now
    )
    return Plan(tuple(steps), slack, leave_by, ready_at, regret, min(slack, rest), end)


def choose_victims(
    holders: list[Holder], short: float, *, fast: bool = False, search: bool = True
) -> Sequence[Holder] | None:
    """The models to leave so that `short` GB come free: of least regret, or gone first."""
    enough = short - ROUNDING_GB
    if search and len(holders) <= MOST_COMBINED:
        best: tuple[float, float] | None = None
        group: Sequence[Holder] | None = None
        for size in range(1, len(holders) + 1):
            for candidate in combinations(holders, size):
                if sum([h.memory_gb for h in candidate]) >= enough:
                    regret = sum([h.regret for h in candidate])
                    gone = max([h.done + h.unload_s for h in candidate])
                    key = (gone, regret) if fast else (regret, gone)
                    if best is None or key < best:
                        best, group = key, candidate
        return group
    chosen: list[Holder] = []
    freed = 0.0
    for holder in sorted(holders, key=_gone if fast else _regret):
        if freed >= enough:
            break
        chosen.append(holder)
        freed += holder.memory_gb
    if freed < enough:
        return None
    for holder in list(reversed(chosen)):  # what a larger one made needless
        if freed - holder.memory_gb >= enough:
            chosen.remove(holder)
            freed -= holder.memory_gb
    return chosen


def _gone(holder: Holder) -> tuple[float, float]:
    return holder.done + holder.unload_s, holder.regret


def _regret(holder: Holder) -> tuple[float, float]:
    return holder.regret, holder.done


def best_plan(view: View, previous: Plan, enough: float) -> Plan:
    """A plan that serves every waiting call in time, by at least `enough` seconds, with cheap
    victims if there is one; where none is found, the one with most slack.

    Orders tried: by latest start; by due date of the visit's end, which minimises the greatest
    lateness where only one model fits (Jackson, 1955: earliest due date first); and the previous
    plan's, which holds if it did.
    """
    demands = view.demands
    if not demands:
        return evaluate(view, ()) or HOPELESS
    by_due = _in_turn(sorted(demands, key=_key(view, lambda d: d.latest + d.busy_s + d.unload_s)))
    by_start = _in_turn(sorted(demands, key=_key(view, lambda d: d.latest - d.load_s)))
    old = [visit for visit in previous.order if visit in demands]
    old = _in_turn(old + [visit for visit in by_due if visit not in old])
    tried: list[tuple[list[Visit], dict[Visit, tuple[str, ...]], bool]] = [
        (by_due, {}, False),
        (by_start, {}, False),
        (by_due, {}, True),
        (by_start, {}, True),
        (old, _carried(previous, old), True),
    ]
    best: Plan | None = None
    for order, victims, fast in tried:
        plan = evaluate(view, order, victims, fast=fast)
        if plan is None:
            continue
        if plan.slack >= enough:
            return plan
        if best is None or plan.slack > best.slack:
            best = plan
    return best or HOPELESS


def _key(view: View, of: Callable[[Demand], float]) -> Callable[[Visit], tuple[float, str, int]]:
    """Ties go to the first visit, then by name, so that the order never hangs on a dict."""
    return lambda visit: (of(view.demands[visit]), visit[0], visit[1])


def _in_turn(order: list[Visit]) -> list[Visit]:
    """With a model's second visit behind its first."""
    for place, (model, again) in enumerate(order):
        first = (model, 0)
        if again and first in order and order.index(first) > place:
            other = order.index(first)
            order[place], order[other] = order[other], order[place]
    return order


def _carried(previous: Plan, order: list[Visit]) -> dict[Visit, tuple[str, ...]]:
    """The previous plan's victims; those of a step that fell away leave for the next one."""
    kept = set(order)
    victims: dict[Visit, tuple[str, ...]] = {}
    over: tuple[str, ...] = ()
    for step in previous.steps:
        over = tuple(dict.fromkeys(over + step.victims))
        if step.visit in kept:
            victims[step.visit] = over
            over = ()
    return victims

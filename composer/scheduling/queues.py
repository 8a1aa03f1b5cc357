"""The calls that wait for one model, in the order in which they will be granted, and how long that
takes. Knows no other model, no memory and no plan.

The order is a promise: calls are granted strictly from its head (list scheduling), so that the time
at which each starts can be bounded in advance. That bound is monotone: where calls run shorter
than assumed, none starts later. (Proof by induction along the order: at any time not before the
start of the call ahead, the calls still running, and so their adapters, are a subset of those
assumed to.) Graham's anomalies need precedence constraints or skipping; here are neither.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from composer.scheduling.events import Waiting


@dataclass(eq=False, slots=True)
class Entry:
    """A waiting interactive call. It must be granted by `deadline` (may be infinite) and should
    be by `target`; from `firm` on it is not overtaken for an adapter's sake. All in seconds on the
    policy's clock."""

    call: Waiting
    deadline: float
    target: float
    firm: float


@dataclass(frozen=True, slots=True)
class Running:
    """A granted call, as far as its slot and its adapter matter. `until` is when it will have
    ended, in seconds."""

    until: float
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Service:
    """How a model works: `slots` calls at once with at most `adapters` distinct adapters, each
    for `run_s` seconds; `spread_s` is added once for those that run longer."""

    slots: int
    adapters: int | None
    run_s: float
    spread_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What comes of a queue that is served from a given time on. `slack` is the least of
    (deadline − start) over its calls and `target_slack` of (target − start), infinite for none;
    `done` is when the last call has ended. All in seconds, `done` on the given time's clock."""

    slack: float = math.inf
    target_slack: float = math.inf
    done: float = 0.0


def free_slots(running: Iterable[Running], slots: int, now: float) -> list[float]:
    """When each of the slots can take a call, rising. Calls beyond the slots hold none."""
    ends = sorted(max(call.until, now) for call in running)
    return ends[-slots:] if len(ends) >= slots else [now] * (slots - len(ends)) + ends


def start_of(k: int, free: Sequence[float], service: Service) -> float:
    """When the k-th call, from 0, starts if all last the same: in rounds, each call on the slot
    that frees next. `spread_s` covers what differs, except for a call that starts at once."""
    rounds, place = divmod(k, service.slots)
    at = free[place] + rounds * service.run_s
    return at + service.spread_s if rounds else at


def end_of(n: int, free: Sequence[float], service: Service) -> float:
    """When all of n calls have ended, and those that run now."""
    if n == 0:
        return free[-1]
    rounds, place = divmod(n - 1, service.slots)
    last = free[place] + (rounds + 1) * service.run_s + service.spread_s
    return max(last, free[-1])


def serve(
    entries: Sequence[Entry], service: Service, running: Iterable[Running] = (), now: float = 0.0
) -> Outlook:
    """The queue's outlook if the model serves it from `now` on, beside what runs already."""
    if service.adapters is not None:
        held = [(max(call.until, now), call.adapter) for call in running]
        return _serve_adapters(entries, service, held, now)
    free = free_slots(running, service.slots, now)
    slack = target_slack = math.inf
    for k, entry in enumerate(entries):
        start = start_of(k, free, service)
        slack = min(slack, entry.deadline - start)
        target_slack = min(target_slack, entry.target - start)
    return Outlook(slack, target_slack, end_of(len(entries), free, service))


def _serve_adapters(
    entries: Sequence[Entry], service: Service, held: list[tuple[float, str | None]], now: float
) -> Outlook:
    """The same, where a call may also have to wait until an adapter has no call left."""
    assert service.adapters is not None
    heap = [(until, number, adapter) for number, (until, adapter) in enumerate(held)]
    heapq.heapify(heap)
    using: dict[str, int] = {}
    for _, adapter in held:
        if adapter is not None:
            using[adapter] = using.get(adapter, 0) + 1
    at, slack, target_slack = now, math.inf, math.inf
    done = max((until for until, _ in held), default=now)
    for number, entry in enumerate(entries, start=len(heap)):
        adapter = entry.call.adapter
        while len(heap) >= service.slots or (
            adapter is not None and adapter not in using and len(using) >= service.adapters
        ):
            until, _, freed = heapq.heappop(heap)
            at = max(at, until)
            if freed is not None:
                using[freed] -= 1
                if not using[freed]:
                    del using[freed]
        if adapter is not None:
            using[adapter] = using.get(adapter, 0) + 1
        heapq.heappush(heap, (at + service.run_s, number, adapter))
        late = 0.0 if at <= now else service.spread_s
        slack = min(slack, entry.deadline - at - late)
        target_slack = min(target_slack, entry.target - at - late)
        done = max(done, at + service.run_s + service.spread_s)
    return Outlook(slack, target_slack, done)


class BatchQueue:
    """Batch calls in order of arrival, those of adapters in use first."""

    def __init__(self) -> None:
        self._calls: dict[int, Waiting] = {}
        self._groups: dict[str | None, dict[int, Waiting]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._calls.values()))

    def __getitem__(self, number: int) -> Waiting:
        return self._calls[number]

    def add(self, call: Waiting) -> None:
        self._calls[call.id] = call
        self._groups.setdefault(call.adapter, {})[call.id] = call

    def pop(self, number: int) -> Waiting:
        call = self._calls.pop(number)
        group = self._groups[call.adapter]
        del group[number]
        if not group:
            del self._groups[call.adapter]
        return call

    def first(self, in_use: Collection[str], limit: int | None) -> Waiting | None:
        """The call to run next, where at most `limit` adapters may be in use."""
        more = limit is None or len(in_use) < limit
        found: Waiting | None = None
        for adapter, group in self._groups.items():
            if adapter is None or adapter in in_use:
                return next(iter(group.values()))
            if found is None and more:
                found = next(iter(group.values()))
        return found


@dataclass(slots=True)
class Queue:
    """Interactive calls in the order of granting, and batch calls.

    The first `now_on` of `order` are for the model's present visit on the device, or the next
    one where it is not there; the others wait for the visit after that.
    """

    order: list[Entry] = field(default_factory=list)
    now_on: int = 0
    batch: BatchQueue = field(default_factory=BatchQueue)
    _fresh: tuple[Service, Outlook] | None = None

    @property
    def current(self) -> list[Entry]:
        return self.order[: self.now_on]

    @property
    def later(self) -> list[Entry]:
        return self.order[self.now_on :]

    def place(self, entry: Entry, *, grouped: bool, in_use: bool, now: float) -> int:
        """The index that suits an entry of the present visit.

        Ungrouped: by deadline, then by arrival. Grouped by adapter: behind the last call with the
        same adapter, or where that is `in_use` and none waits, at the head; but not before a call
        that is not to be overtaken any more. Where that fails, at the end. The base model alone
        counts as always in use.
        """
        order, end = self.order, self.now_on
        if not grouped:
            return bisect_right(order, entry.deadline, 0, end, key=_deadline)
        adapter = entry.call.adapter
        index = next((i for i in range(end, 0, -1) if order[i - 1].call.adapter == adapter), None)
        if index is None:
            if not in_use and adapter is not None:
                return end
            index = 0
        if any(other.firm <= now for other in order[index:end]):
            return end
        return index

    def insert(self, index: int, entry: Entry) -> None:
        """For the present visit."""
        n = self.now_on
        self.order.insert(index, entry)
        self.now_on += 1
        if self._fresh is not None and index == n and self._fresh[0].adapters is None:
            service, before = self._fresh
            idle = [0.0] * service.slots
            start = start_of(n, idle, service)
            self._fresh = (
                service,
                Outlook(
                    min(before.slack, entry.deadline - start),
                    min(before.target_slack, entry.target - start),
                    end_of(n + 1, idle, service),
                ),
            )
        else:
            self._fresh = None

    def append_later(self, entry: Entry) -> None:
        """For the visit after that."""
        self.order.insert(
            bisect_right(self.order, entry.deadline, self.now_on, key=_deadline), entry
        )

    def merge(self, *, grouped: bool) -> None:
        """All calls are for one visit."""
        if self.now_on != len(self.order):
            self.now_on = len(self.order)
            self._fresh = None
            if not grouped:
                self.order.sort(key=_deadline)

    def cut(self, index: int) -> None:
        """The calls from this place on are for the later visit."""
        self.order[index:] = sorted(self.order[index:], key=_deadline)
        self.now_on = index
        self._fresh = None

    def restore(self, order: list[Entry], now_on: int) -> None:
        """As it was before."""
        self.order, self.now_on = order, now_on
        self._fresh = None

    def remove(self, entry: Entry) -> None:
        index = self.order.index(entry)
        del self.order[index]
        if index < self.now_on:
            self.now_on -= 1
            self._fresh = None

    def fresh(self, service: Service) -> Outlook:
        """The outlook of the coming visit, on a clock that starts when the model is loaded."""
        if self._fresh is None or self._fresh[0] != service:
            self._fresh = (service, serve(self.current, service))
        return self._fresh[1]


def _deadline(entry: Entry) -> float:
    return entry.deadline

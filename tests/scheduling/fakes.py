"""A clock that only tests move, servers that load for as long as they are told, a policy that
says what a test tells it to, and one that is simple and right."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterable

from composer.errors import EngineUnavailable
from composer.scheduling.base import Place
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    Event,
    Finished,
    Grant,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Model,
    Refuse,
    Unload,
    Unloaded,
    Waiting,
    Wake,
)
from composer.scheduling.scheduler import DeviceScheduler
from composer.types import Call, Priority, Sampling


async def settle() -> None:
    """Lets everything happen that waits for nothing but its turn."""
    for _ in range(25):
        await asyncio.sleep(0)


class FakeAlarm:
    def __init__(self, at: float, ring: Callable[[], None]) -> None:
        self.at, self.ring, self.off = at, ring, False

    def cancel(self) -> None:
        self.off = True


class FakeClock:
    def __init__(self, now: float = 100.0) -> None:
        self.time = now
        self._alarms: list[tuple[float, int, FakeAlarm]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        return self.time

    def call_at(self, at: float, ring: Callable[[], None]) -> FakeAlarm:
        alarm = FakeAlarm(at, ring)
        heapq.heappush(self._alarms, (at, next(self._numbers), alarm))
        return alarm

    async def advance(self, seconds: float) -> None:
        """Rings what is due on the way, each at its own time."""
        until = self.time + seconds
        await settle()
        while (at := self.next()) is not None and at <= until:
            self.time = max(self.time, at)
            heapq.heappop(self._alarms)[2].ring()
            await settle()
        self.time = until
        await settle()

    async def stall(self, seconds: float) -> None:
        """The loop stands still (a starved CPU): what is due meanwhile rings at its end, in one
        turn and in order of time, before anything else gets its turn."""
        self.time += seconds
        while (at := self.next()) is not None and at <= self.time:
            heapq.heappop(self._alarms)[2].ring()
        await settle()

    def next(self) -> float | None:
        """When the next alarm rings."""
        while self._alarms and self._alarms[0][2].off:
            heapq.heappop(self._alarms)
        return self._alarms[0][0] if self._alarms else None

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            over = asyncio.get_running_loop().create_future()
            self.call_at(self.time + seconds, lambda: over.done() or over.set_result(None))
            await over


class FakeMover:
    """`log` tells what was begun and what was done; `fail` is raised at the end of a move."""

    def __init__(
        self, clock: FakeClock, log: list[str], name: str, *, start_s: float = 0, stop_s: float = 0
    ) -> None:
        self.clock, self.log, self.name = clock, log, name
        self.start_s, self.stop_s = start_s, stop_s
        self.up = False
        self.fail: BaseException | None = None

    async def start(self) -> None:
        self.log.append(f"start {self.name}")
        await self.clock.sleep(self.start_s)
        if self.fail is not None:
            raise self.fail
        self.up = True
        self.log.append(f"up {self.name}")

    async def stop(self) -> None:
        self.log.append(f"stop {self.name}")
        self.up = False
        await self.clock.sleep(self.stop_s)
        if self.fail is not None:
            raise self.fail
        self.log.append(f"down {self.name}")

    def check_up(self) -> None:
        if not self.up:
            raise EngineUnavailable(f"{self.name} is not up")


class Scripted:
    """Answers what `say` returns, and keeps what it heard."""

    def __init__(self, say: Callable[[Event], Iterable[Action]] = lambda event: ()) -> None:
        self.say = say
        self.heard: list[Event] = []
        self.times: list[float] = []

    def on(self, event: Event, now: float) -> list[Action]:
        self.heard.append(event)
        self.times.append(now)
        return list(self.say(event))

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.heard]


class Fifo:
    """First come, first served: the model of the call that came first is loaded, in the place of
    those that no call runs on. Simple, right, and far from the fewest swaps."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.memory_gb = 0.0
        self.where: dict[str, str] = {}  # on, loading, unloading; else it is not there
        self.sizes: dict[str, float] = {}
        self.movable: set[str] = set()
        self.waiting: dict[int, Waiting] = {}
        self.running: dict[int, str] = {}
        self.retry_at = 0.0

    def on(self, event: Event, now: float) -> list[Action]:
        said: list[Action] = []
        match event:
            case Configured():
                self._configured(event, said)
            case Arrived(call) if call.model not in self.models:
                said.append(Refuse(call.id, "gone", 1.0))
            case Arrived(call):
                self.waiting[call.id] = call
            case Left(number):
                del self.waiting[number]
            case Finished(number):
                del self.running[number]
            case Loaded(name):
                assert self.where[name] == "loading"
                self.where[name] = "on"
            case LoadFailed(name):
                assert self.where.pop(name) == "loading"
                self.retry_at = now + 1.0
                said.append(Wake(self.retry_at))
            case Unloaded(name):
                assert self.where.pop(name) == "unloading"
            case Lost(name):
                if self.where.get(name) == "on":
                    self._load(name, said)
            case _:
                pass
        self._expire(now, said)
        self._grant(said)
        self._swap(now, said)
        if isinstance(event, Arrived) and event.call.id in self.waiting:
            line = [w for w in self.waiting.values() if w.model == event.call.model]
            if len(line) > self.models[event.call.model].queue:
                del self.waiting[event.call.id]
                said.append(Refuse(event.call.id, "full", 8.0))
        bounds = [w.deadline for w in self.waiting.values() if w.deadline is not None]
        if bounds:
            said.append(Wake(min(bounds)))
        return said

    def _configured(self, event: Configured, said: list[Action]) -> None:
        self.memory_gb = event.memory_gb
        self.models = {model.id: model for model in event.models}
        self.sizes |= {model.id: model.memory_gb for model in event.models}
        self.movable |= {model.id for model in event.models if model.movable}
        self.where |= {name: "on" for name in event.resident if name not in self.where}
        for number, call in list(self.waiting.items()):
            if call.model not in self.models:
                del self.waiting[number]
                said.append(Refuse(number, "gone", 1.0))

    def _expire(self, now: float, said: list[Action]) -> None:
        for number, call in list(self.waiting.items()):
            if call.deadline is not None and call.deadline <= now:
                del self.waiting[number]
                said.append(Refuse(number, "late", 2.0))

    def _grant(self, said: list[Action]) -> None:
        for number, call in list(self.waiting.items()):
            running = list(self.running.values()).count(call.model)
            if self.where.get(call.model) == "on" and running < self.models[call.model].in_flight:
                self.running[number] = call.model
                del self.waiting[number]
                said.append(Grant(number))

    def _swap(self, now: float, said: list[Action]) -> None:
        used = set(self.running.values())
        idle = [m for m, where in self.where.items() if where == "on" and m not in used]
        for name in idle:
            if name not in self.models:  # it left
                self._unload(name, said)
        away = [w.model for w in self.waiting.values() if w.model not in self.where]
        if not away or now < self.retry_at:
            return
        room = self.memory_gb - sum(self.sizes[m] for m in self.where)
        if self.sizes[away[0]] <= room:
            self._load(away[0], said)
        elif "unloading" not in self.where.values():
            victims = [m for m in idle if m in self.where and m in self.movable]
            if victims:
                self._unload(victims[0], said)

    def _load(self, name: str, said: list[Action]) -> None:
        self.where[name] = "loading"
        said.append(Load(name))

    def _unload(self, name: str, said: list[Action]) -> None:
        if name in self.movable:
            self.where[name] = "unloading"
            said.append(Unload(name))
        else:
            del self.where[name]


def call(
    server: str = "s",
    expert: str = "e",
    *,
    priority: Priority = "interactive",
    max_wait_s: float | None = None,
    arrived: float | None = None,
) -> Call:
    return Call(
        "id", expert, server, None, (), "hi", Sampling(), 100,
        priority=priority, max_wait_s=max_wait_s, arrived=arrived,
    )  # fmt: skip


def standing(server: str = "s", in_flight: int = 1, queue: int = 8) -> dict[str, Place]:
    """A server on a device of its own, always there."""
    mover = FakeMover(FakeClock(), [], server)
    return {server: Place(server, Model(server, in_flight, queue), mover)}


def fifo(in_flight: int = 1, queue: int = 8, clock: FakeClock | None = None) -> DeviceScheduler:
    made = DeviceScheduler(Fifo, clock=clock or FakeClock())
    made.configure(standing("s", in_flight, queue), {})
    return made


def grant_all(event: Event) -> list[Action]:
    return [Grant(event.call.id)] if isinstance(event, Arrived) else []


def refuse_all(event: Event, reason: str, retry_after_s: float = 5.0) -> list[Action]:
    return [Refuse(event.call.id, reason, retry_after_s)] if isinstance(event, Arrived) else []

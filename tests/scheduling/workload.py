"""A day in a scheduler's life, drawn at random: arrivals, bounds, callers that leave, servers
that die or fail to start, changes of what is served. All on a clock that only tests move."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from composer.errors import EngineUnavailable, Overloaded
from composer.scheduling.base import Place
from composer.scheduling.events import DevicePolicy, Model
from composer.scheduling.scheduler import DeviceScheduler
from tests.scheduling.fakes import FakeClock, FakeMover, call, settle

MEMORY_GB = 10.0


class MemoryMover(FakeMover):
    """Holds memory from the beginning of its start to the end of its stop. Checks what a device
    could not do: more than its memory, two moves of one server at once."""

    def __init__(self, world: Day, name: str, memory_gb: float, start_s: float) -> None:
        super().__init__(world.clock, world.log, name, start_s=start_s, stop_s=1.0)
        self.world, self.memory_gb, self.moving = world, memory_gb, False

    async def start(self) -> None:
        self._begin()
        self.world.held[self.name] = self.memory_gb
        assert sum(self.world.held.values()) <= MEMORY_GB, self.world.held
        if self.world.random.random() < self.world.failing:
            self.fail = EngineUnavailable("it would not")
        try:
            await super().start()
        except EngineUnavailable:
            del self.world.held[self.name]
            raise
        finally:
            self.moving, self.fail = False, None

    async def stop(self) -> None:
        self._begin()
        try:
            await super().stop()
        finally:
            self.moving = False
            self.world.held.pop(self.name, None)

    def _begin(self) -> None:
        assert not self.moving, self.name
        self.moving = True


@dataclass
class Told:
    """How one call ended, and how long it waited for that."""

    how: str
    waited_s: float
    bound_s: float | None


@dataclass
class Day:
    """Three movable servers on a device with room for one or two, and one that is always there."""

    seed: int
    make_policy: Callable[[], DevicePolicy]
    log_file: Path | None = None
    calls: int = 60
    failing: float = 0.1
    dying: float = 0.05
    leaving: float = 0.1
    changing: bool = True
    stalling: float = 0.0
    """How often the event loop stands still, for up to five seconds, instead of going on."""
    clock: FakeClock = field(default_factory=FakeClock)
    log: list[str] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    out: dict[str, int] = field(default_factory=dict)
    granted: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.scheduler = DeviceScheduler(
            self.make_policy, clock=self.clock, log=self.log_file, header={"seed": self.seed}
        )
        self.movers = {
            name: MemoryMover(self, name, memory, start_s)
            for name, memory, start_s in (("a", 6.0, 4.0), ("b", 6.0, 8.0), ("c", 4.0, 2.0))
        }
        self.movers["s"] = MemoryMover(self, "s", 0.0, 1.0)
        self.movers["s"].up = True
        self.configure("abcs")

    def configure(self, names: str) -> None:
        places = {}
        for name in names:
            mover = self.movers[name]
            movable = name != "s"
            model = Model(
                name, 2, 6,
                memory_gb=mover.memory_gb, load_s=mover.start_s, unload_s=1.0, movable=movable,
            )  # fmt: skip
            places[name] = Place("gpu" if movable else "server:s", model, mover)
        self.scheduler.configure(places, {"gpu": MEMORY_GB})

    async def run(self) -> list[Told]:
        """To the end of the day: every caller has been told something, and nothing is out."""
        tasks = [asyncio.create_task(self._caller(i)) for i in range(self.calls)]
        if self.changing:
            tasks.append(asyncio.create_task(self._changes()))
        while not all(task.done() for task in tasks):
            if self.stalling and self.random.random() < self.stalling:
                # In the middle of a moment: what has just happened is not over yet.
                await asyncio.sleep(0)
                await self.clock.stall(self.random.uniform(0.5, 5.0))
            await settle()
            if all(task.done() for task in tasks):
                break
            at = self.clock.next()
            assert at is not None, f"{sum(not t.done() for t in tasks)} hang for ever"
            await self.clock.advance(max(at - self.clock.time, 0.0))
        for task in tasks:
            task.result()
        assert not any(self.out.values()), self.out
        return self.told

    async def _caller(self, number: int) -> None:
        draw = self.random
        await self.clock.sleep(draw.uniform(0, 120))
        server = draw.choice("aabbbcs")
        bound = draw.choice([None, 0.5, 10.0, 30.0, 60.0])
        leaves = draw.uniform(0, 20) if draw.random() < self.leaving else None
        asked = self.clock.now()
        work = asyncio.create_task(self._ask(server, number, bound))
        if leaves is not None:
            self.clock.call_at(asked + leaves, work.cancel)
        try:
            lease_at = await work
            self.told.append(Told("ok", lease_at - asked, bound))
        except asyncio.CancelledError:
            self.told.append(Told("left", self.clock.now() - asked, bound))
        except (Overloaded, EngineUnavailable) as error:
            self.told.append(Told(type(error).__name__, self.clock.now() - asked, bound))

    async def _ask(self, server: str, number: int, bound: float | None) -> float:
        draw = self.random
        asked = call(
            server, f"e{number % 5}",
            priority=draw.choice(["interactive", "batch"]),
            max_wait_s=bound, arrived=self.clock.now(),
        )  # fmt: skip
        lease = await self.scheduler.acquire(asked)
        at, lost = self.clock.now(), False
        self.granted += 1
        self.out[server] = self.out.get(server, 0) + 1
        assert self.out[server] <= 2, "more than fit"
        mover = self.movers[server]
        try:
            await self.clock.sleep(draw.uniform(0.1, 3.0))
            if draw.random() < self.dying:
                mover.up = False
            lost = not mover.up
        finally:
            self.out[server] -= 1
            self.scheduler.release(lease, lost=lost)
        return at

    async def _changes(self) -> None:
        for names in ("abs", "abcs", "cs", "abcs"):
            await self.clock.sleep(25)
            self.configure(names)

"""Stand-ins with the real interfaces: an engine that echoes, a router that reads its answer off
the query, a scheduler that only counts. First-class, so that the core is tested without models."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from composer.adapters.lora_config import AdapterFeature
from composer.eligibility import Eligibility
from composer.engines.base import Capacity, Health
from composer.errors import EngineFull, Overloaded
from composer.generations import Generation, Way
from composer.routing.base import Query, Scores
from composer.routing.curve import Curve
from composer.scheduling.base import Lease, Place
from composer.scheduling.events import Model
from composer.strategies.single import Single
from composer.types import (
    Ability,
    Adapter,
    Ask,
    BoolArray,
    Call,
    Catalog,
    Chunk,
    Component,
    Expert,
    Message,
    Placement,
    Policy,
    Request,
    Server,
    Tier,
    Usage,
    message_text,
)


class FakeSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    max_batch: int = 4
    queue: int = 8


class FakeEngine:
    """Answers `expert:text`, a word a chunk. `gate`, when set, is awaited before each chunk."""

    name: ClassVar[str] = "fake"
    tier: ClassVar[Tier] = "supported"
    settings: ClassVar[type[BaseModel]] = FakeSettings
    honours: ClassVar[frozenset[Ability]] = frozenset({"logprobs"})
    adapter_features: ClassVar[frozenset[AdapterFeature]] = frozenset()
    model_field: ClassVar[str | None] = None
    path_fields: ClassVar[tuple[str, ...]] = ()
    program_fields: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def check(cls, settings: Any, placement: Placement | None) -> None:
        """Fits everywhere."""

    @classmethod
    def check_adapters(cls, settings: Any) -> None:
        """Takes them."""

    def __init__(
        self, server: str, settings: Any = None, *, placement: Placement | None = None
    ) -> None:
        self.server = server
        self.placement = placement
        self.capacity = Capacity(in_flight=64, queue=64)
        self.moves: list[str] = []
        self.loaded: dict[str, Adapter] = {}
        self.most: int | None = None
        self.calls: list[Call] = []
        self.cancelled: list[str] = []
        self.closed = False
        self.gate: asyncio.Event | None = None
        self.fail: Exception | None = None

    @property
    def external(self) -> bool:
        return False

    async def start(self) -> None:
        self.moves.append("start")

    async def stop(self) -> None:
        self.moves.append("stop")

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        wanted = self.loaded | {adapter.digest: adapter for adapter in adapters}
        if self.most is not None and len(wanted) > self.most:
            raise EngineFull(f"{len(wanted)} adapters", over=len(wanted) - self.most)
        self.loaded = wanted

    async def retain(self, adapters: Collection[Adapter]) -> None:
        self.loaded = {adapter.digest: adapter for adapter in adapters}

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        text = call.prompt if call.prompt is not None else message_text(call.messages[-1])
        words = f"{call.expert}:{text}".split(" ")
        try:
            for number, word in enumerate(words):
                if self.gate is not None:
                    await self.gate.wait()
                if self.fail is not None:
                    raise self.fail
                yield Chunk(text=word if number == 0 else f" {word}")
            yield Chunk(finish_reason="stop", usage=Usage(len(text), len(words)))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(call.id)
            raise

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        return len(prompt or "") + sum(len(message_text(message)) for message in messages)

    async def health(self) -> Health:
        return Health("failed", "it is closed") if self.closed else Health("ready")

    async def close(self) -> None:
        self.closed = True


class FakeRouter:
    """Quality 0.9 for the expert whose id stands in the query, 0.1 for the others."""

    name: ClassVar[str] = "fake"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = ""
    settings: ClassVar[type[BaseModel]] = FakeSettings
    needs_texts: ClassVar[bool] = True
    path_fields: ClassVar[tuple[str, ...]] = ()
    curve: Curve | None = None
    asked: str | None = None

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = tuple(experts)

    @classmethod
    def build(cls, experts: Sequence[Expert], settings: Any, embedder: Any) -> FakeRouter:
        return cls([expert.id for expert in experts])

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        quality = np.array([0.9 if e in query.text else 0.1 for e in self.experts], np.float32)
        quality[~eligible] = np.nan
        return Scores(self.experts, quality, np.zeros_like(quality), {})


class FakeScheduler:
    """Keeps to `in_flight` and `queue` of the servers it was told of, first come, first served,
    and moves nothing; other servers have room for everything. `lost` are the servers of leases
    that were given back as lost."""

    def __init__(self) -> None:
        self.out: dict[int, Lease] = {}
        self.granted = 0
        self.lost: list[str] = []
        self.places: Mapping[str, Place] = {}
        self.closed = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._running: Counter[str] = Counter()
        self._numbers = itertools.count(1)

    async def acquire(self, call: Call) -> Lease:
        server, arrived = call.server, self.now()
        model = self._model(server)
        waiting = self._waiting.setdefault(server, deque())
        if model is not None and self._running[server] >= model.in_flight:
            if len(waiting) >= model.queue:
                raise Overloaded(f"server {server!r} is full", retry_after=1.0)
            turn = asyncio.get_running_loop().create_future()
            waiting.append(turn)
            try:
                await turn
            except BaseException:
                if turn in waiting:
                    waiting.remove(turn)
                elif not turn.cancelled():  # its turn came in the very step it was cancelled
                    self._next(server)
                raise
        else:
            self._running[server] += 1
        self.granted += 1
        lease = Lease(next(self._numbers), server, call.expert, self.now() - arrived)
        self.out[lease.id] = lease
        return lease

    def release(self, lease: Lease, *, lost: bool = False) -> None:
        if self.out.pop(lease.id, None) is None:
            raise ValueError(f"lease {lease.id} is not out")
        if lost:
            self.lost.append(lease.server)
        self._next(lease.server)

    def configure(self, places: Mapping[str, Place], memory_gb: Mapping[str, float]) -> None:
        self.places = dict(places)

    def resident(self, server: str) -> bool:
        return True

    def now(self) -> float:
        return time.monotonic()

    def snapshot(self, *, events: int = 0) -> dict[str, Any]:
        return {
            "now": self.now(),
            "servers": self.stats(),
            "devices": {},
            "log": {},
            "events": [],
        }

    def stats(self) -> dict[str, Any]:
        return {
            server: {
                "in_flight": place.model.in_flight,
                "running": self._running[server],
                "waiting": len(self._waiting.get(server, ())),
            }
            for server, place in self.places.items()
        }

    async def close(self) -> None:
        self.closed = True

    def _model(self, server: str) -> Model | None:
        place = self.places.get(server)
        return None if place is None else place.model

    def _next(self, server: str) -> None:
        """The lease's room goes to the next in line, or is free."""
        waiting = self._waiting.get(server)
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._running[server] -= 1


def place(engine: FakeEngine, *, in_flight: int = 64, queue: int = 64, device: str = "") -> Place:
    """The place of a server that is always there."""
    return Place(device or engine.server, Model(engine.server, in_flight, queue), engine)


@dataclass
class Stage:
    """A generation over fake parts, with handles on the parts."""

    generation: Generation
    engine: FakeEngine


def stage(
    ids: Sequence[str] = ("alpha", "beta"),
    *,
    version: int = 1,
    experts: Mapping[str, Expert] | None = None,
    policy: Mapping[str, Any] | None = None,
    engine: FakeEngine | None = None,
) -> Stage:
    """One fake server with these experts behind the policy `auto`."""
    engine = engine or FakeEngine("server")
    made = dict(experts) if experts else {id_: Expert(id=id_, server="server") for id_ in ids}
    single = Component("single", Single.settings())
    auto = Policy(
        id="auto",
        router=Component("fake", FakeSettings()),
        strategy=single,
        experts=tuple(made),
        **(policy or {}),
    )

    def way(policy: Policy, router: FakeRouter | None) -> Way:
        chosen = [made[expert] for expert in policy.experts]
        cost = np.array([e.cost.output_per_1m if e.cost else 0 for e in chosen], np.float32)
        return Way(policy, Eligibility.of(chosen), cost, router, Single(Single.settings()))

    def named(expert: str) -> Way:
        return way(Policy(id=expert, router=single, strategy=single, experts=(expert,)), None)

    servers = {"server", *(expert.server for expert in made.values())}
    catalog = Catalog(
        version=version,
        digest=f"digest-{version}",
        servers={id_: Server(id_, "fake", FakeSettings()) for id_ in sorted(servers)},
        experts=made,
        policies={"auto": auto},
    )
    ways = {"auto": way(auto, FakeRouter(auto.experts))}
    places = {"server": place(engine)}
    return Stage(Generation(catalog, ways, named, {"server": engine}, places), engine)


def request(text: str = "please alpha", **fields: Any) -> Request:
    return Request(
        **{
            "id": "r1",
            "model": "auto",
            "messages": ({"role": "user", "content": text},),
            **fields,
        }
    )

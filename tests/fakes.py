"""Stand-ins with the real interfaces: an engine that echoes, a router that reads its answer off
the query, a scheduler that only counts. First-class, so that the core is tested without models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from composer.eligibility import Eligibility
from composer.generations import Generation, Way
from composer.routing.base import Query, Scores
from composer.scheduling.base import Lease, Limits
from composer.strategies.single import Single
from composer.types import (
    Ability,
    Adapter,
    BoolArray,
    Call,
    Catalog,
    Chunk,
    Component,
    Expert,
    Message,
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

    def __init__(self, server: str, settings: Any = None) -> None:
        self.server = server
        self.loaded: dict[str, Adapter] = {}
        self.calls: list[Call] = []
        self.cancelled: list[str] = []
        self.closed = False
        self.gate: asyncio.Event | None = None
        self.fail: Exception | None = None

    async def start(self) -> None: ...

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        self.loaded |= {adapter.digest: adapter for adapter in adapters}

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

    async def healthy(self) -> bool:
        return not self.closed

    async def close(self) -> None:
        self.closed = True


class FakeRouter:
    """Quality 0.9 for the expert whose id stands in the query, 0.1 for the others."""

    name: ClassVar[str] = "fake"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = ""
    settings: ClassVar[type[BaseModel]] = FakeSettings

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = tuple(experts)

    @classmethod
    def build(cls, experts: Sequence[Expert], settings: Any, embedder: Any) -> FakeRouter:
        return cls([expert.id for expert in experts])

    async def score(self, query: Query, eligible: BoolArray) -> Scores:
        quality = np.array([0.9 if e in query.text else 0.1 for e in self.experts], np.float32)
        quality[~eligible] = np.nan
        return Scores(self.experts, quality, np.zeros_like(quality), {})


class FakeScheduler:
    """Grants everything at once and counts what is out."""

    def __init__(self) -> None:
        self.out: dict[int, Lease] = {}
        self.granted = 0

    async def acquire(self, call: Call) -> Lease:
        self.granted += 1
        lease = Lease(self.granted, call.server, call.expert, 0.0)
        self.out[lease.id] = lease
        return lease

    def release(self, lease: Lease) -> None:
        if self.out.pop(lease.id, None) is None:
            raise ValueError(f"lease {lease.id} is not out")

    def configure(self, servers: Mapping[str, Limits]) -> None: ...

    def stats(self) -> dict[str, Any]:
        return {"running": len(self.out)}


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

    catalog = Catalog(
        version=version,
        digest=f"digest-{version}",
        servers={"server": Server("server", "fake", FakeSettings())},
        experts=made,
        policies={"auto": auto},
    )
    ways = {"auto": way(auto, FakeRouter(auto.experts))}
    return Stage(Generation(catalog, ways, named, {"server": engine}), engine)


def request(text: str = "please alpha", **fields: Any) -> Request:
    return Request(
        **{
            "id": "r1",
            "model": "auto",
            "messages": ({"role": "user", "content": text},),
            **fields,
        }
    )

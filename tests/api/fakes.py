"""A real Service over stand-ins for what is slow or remote: engine, router, embedder, store.

Pipeline, generations, scheduler and strategies are the real ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer.build import make_mixer, make_scheduler
from composer.eligibility import Eligibility
from composer.engines.base import Capacity
from composer.errors import CatalogError, Conflict, Problem, UnknownResponse
from composer.generations import Generation, Way
from composer.registry import Loaded
from composer.routing.base import Query, Scores
from composer.scheduling.scheduler import DeviceScheduler
from composer.service import Service
from composer.settings import Settings
from composer.store import Feedback, Receipt, Record
from composer.strategies.single import Single
from composer.strategies.vote import Vote, VoteSettings
from composer.types import (
    SAFE_PARAMETERS,
    Adapter,
    ApiKey,
    Ask,
    BoolArray,
    Call,
    Catalog,
    Chunk,
    Component,
    Expert,
    FinishReason,
    FloatArray,
    Policy,
    Server,
    TokenLogprob,
    Usage,
    message_text,
)
from tests.fakes import FakeEngine, FakeRouter, FakeSettings, place

SECRET = "/srv/very/secret"


class ScriptedEngine(FakeEngine):
    """Says `EXPERT: TEXT` in capitals, one word a token, and honours the sampling that the edge
    passes on. `held` stops it before every token but the first `free`; `fail_at` makes it raise
    `error` before that token; without `ends` it forgets the finish reason."""

    def __init__(self) -> None:
        super().__init__("box")
        self.held = False
        self.free = 0
        self.fail_at: int | None = None
        self.error: Exception = RuntimeError(f"a bug that names {SECRET}")
        self.ends = True
        self.running = 0

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        self.running += 1
        sampling = call.sampling
        words, reason = self._words(call)
        try:
            for index in range(sampling.n):
                for i, word in enumerate(words):
                    await self._pause(i)
                    yield Chunk(text=word, index=index, logprobs=self._logprobs(call, word))
                if self.ends:
                    yield Chunk(index=index, finish_reason=reason)
            usage = Usage(len(_text(call).split()), len(words) * sampling.n)
            yield Chunk(index=sampling.n - 1, usage=usage)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(call.id)
            raise
        finally:
            self.running -= 1

    @staticmethod
    def _words(call: Call) -> tuple[list[str], FinishReason]:
        text = f"{call.expert}: {_text(call)}".upper()
        for stop in call.sampling.stop:
            text = text.partition(stop)[0]
        words = [word if i == 0 else f" {word}" for i, word in enumerate(text.split(" "))]
        limit = call.sampling.max_tokens
        if limit is not None and len(words) > limit:
            return words[:limit], "length"
        return words, "stop"

    async def _pause(self, i: int) -> None:
        if self.fail_at == i:
            raise self.error
        await asyncio.sleep(0)
        while self.held and i >= self.free:
            await asyncio.sleep(0.002)

    @staticmethod
    def _logprobs(call: Call, word: str) -> tuple[TokenLogprob, ...]:
        k = call.sampling.logprobs
        if k is None:
            return ()
        return (TokenLogprob(word, -0.5, tuple((f"{word}{j}", float("-inf")) for j in range(k))),)


class RelayEngine(ScriptedEngine):
    """Says `deltas` in each choice, in turn: as a server's own events where the call allows it.
    `reason` ends each choice."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas: list[dict[str, Any]] = [{"content": "one"}, {"content": " two"}]
        self.reason: FinishReason = "stop"

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        for i, delta in enumerate(self.deltas):
            for index in range(call.sampling.n):
                await self._pause(i)
                yield self._said(call, index, delta)
        if self.ends:
            for index in range(call.sampling.n):
                yield self._said(call, index, {}, self.reason)
        yield Chunk(usage=Usage(7, len(self.deltas) * call.sampling.n))

    @staticmethod
    def _said(
        call: Call, index: int, delta: dict[str, Any], reason: FinishReason | None = None
    ) -> Chunk:
        if call.forward is None:
            rest = {key: value for key, value in delta.items() if key != "content"}
            text = delta.get("content") or ""
            return Chunk(text=text, index=index, delta=rest, finish_reason=reason)
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
        choice |= {"delta": delta} if call.prompt is None else {"text": delta.get("content", "")}
        event = {
            "id": call.forward.id,
            "object": "chat.completion.chunk" if call.prompt is None else "text_completion",
            "created": 1,
            "model": call.forward.model,
            "choices": [choice],
        }
        return Chunk(raw=RAW % json.dumps(event).encode(), index=index, finish_reason=reason)


RAW = b"data: %b\n\n"


def _text(call: Call) -> str:
    return call.prompt if call.prompt is not None else message_text(call.messages[-1])


class ExplainingRouter(FakeRouter):
    """Gives its reasons in numpy's numbers, as a router may; the edge must cope."""

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        scores = await super().score(query, eligible, ask)
        best = scores.experts[int(np.nanargmax(scores.quality))]
        reasons = {best: {"similarity": np.float32(0.5), "nearest": query.text}}
        return dataclasses.replace(scores, reasons=reasons)


class FakeEmbedder:
    id = "fake-embedder"
    digest = "sha256:0"
    dim = 3
    max_tokens = 50

    def encode(self, texts: Sequence[str]) -> FloatArray:
        rows = np.array([[len(text), text.count("a") + 1, 1] for text in texts], np.float32)
        unit: FloatArray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    async def embed(self, text: str) -> FloatArray:
        row: FloatArray = self.encode([text])[0]
        return row

    def cached(self, text: str) -> FloatArray | None:
        return None

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    async def close(self) -> None: ...


class FakeStore:
    def __init__(self) -> None:
        self.rows: dict[str, Mapping[str, Any]] = {}
        self.fail: Exception | None = None

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def list_experts(self) -> list[Mapping[str, Any]]:
        if self.fail is not None:
            raise self.fail
        return list(self.rows.values())

    async def put_expert(self, id: str, spec: Mapping[str, Any]) -> None:
        if self.fail is not None:
            raise self.fail
        self.rows[id] = spec

    async def delete_expert(self, id: str) -> None:
        del self.rows[id]

    async def run(self, work: Any, what: str, *, writes: bool = False) -> dict[str, Any]:
        """Has learnt nothing, and promoted nobody."""
        if self.fail is not None:
            raise self.fail
        return {}


class FakeRecorder:
    """Keeps records in a list; knows feedback's ids as the real one does."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.feedback: dict[str, Feedback] = {}
        self.up = True
        self.fail: Exception | None = None

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def put(self, record: Record) -> None:
        self.records.append(record)

    async def add_feedback(self, item: Feedback) -> Receipt:
        if self.fail is not None:
            raise self.fail
        if all(record.id != item.response_id for record in self.records):
            raise UnknownResponse(f"there is no response {item.response_id!r}")
        if self.feedback.get(item.id, item).score != item.score:
            raise Conflict(f"feedback {item.id!r} says otherwise", param="id")
        self.feedback[item.id] = item
        return Receipt(item.id, "database")

    def stats(self) -> dict[str, Any]:
        return {"database_up": self.up}


EXPERTS = (
    Expert(
        id="shout", server="box", description="Shouts.", skills=("shouting",), context_window=100,
        abilities=frozenset({"logprobs"}),
    ),
    Expert(
        id="team/sort", server="box", context_window=100,
        adapter=Adapter(Path(SECRET), "sha256:1", 8, 16.0, ("q_proj",)),
        abilities=frozenset({"logprobs"}),
    ),
)  # fmt: skip


def policies(experts: Sequence[str], allowed: frozenset[str] | None) -> dict[str, Policy]:
    """`auto` and `panel`; `open` allows these parameters, None: there is no such policy."""
    router = Component("fake", FakeSettings())
    single = Component("single", None)
    vote = Component("vote", VoteSettings(weights="majority"))
    found = {
        "auto": Policy("auto", router, single, tuple(experts)),
        "panel": Policy("panel", router, vote, tuple(experts), k=2),
    }
    if allowed is not None:
        found["open"] = Policy("open", router, single, tuple(experts), parameters=allowed)
    return found


class World:
    """The service and everything in it that a test turns or reads."""

    def __init__(
        self,
        capacity: Capacity,
        settings: Settings,
        engine: ScriptedEngine | None = None,
        experts: Sequence[Expert] = EXPERTS,
        scheduler: DeviceScheduler | None = None,
    ) -> None:
        self.engine = engine or ScriptedEngine()
        self.engine.capacity = capacity
        self.experts = experts
        self.allowed: frozenset[str] | None = None
        self.keys: tuple[ApiKey, ...] = ()
        self.scheduler = scheduler or make_scheduler(settings)
        self.store = FakeStore()
        self.recorder = FakeRecorder()
        self.service = Service(
            settings,
            store=self.store,  # type: ignore[arg-type]
            recorder=self.recorder,  # type: ignore[arg-type]
            embedder=FakeEmbedder(),  # type: ignore[arg-type]
            scheduler=self.scheduler,
            load=self._load,
            build=self._build,
            mixer=make_mixer(settings),
        )

    def limit(self, *, in_flight: int, queue: int) -> None:
        """From now on that many calls run at once, and that many may wait."""
        self.scheduler.configure({"box": place(self.engine, in_flight=in_flight, queue=queue)}, {})

    def _load(
        self, rows: Sequence[Mapping[str, Any]], version: int, may_skip: Collection[str]
    ) -> Loaded:
        added = []
        for row in rows:
            if unknown := set(row) - {"id", "server", "description"}:
                raise CatalogError(
                    [
                        Problem(f"{SECRET}/experts.yaml", key, "is not known", "Remove it.", 3)
                        for key in sorted(unknown)
                    ]
                )
            added.append(Expert(**row, context_window=100, source="runtime"))
        experts = {expert.id: expert for expert in (*self.experts, *added)}
        catalog = Catalog(
            version=version,
            digest=f"sha256:{'-'.join(experts)}",
            servers={"box": Server("box", "fake", FakeSettings())},
            experts=experts,
            policies=policies(list(experts), self.allowed),
            keys={key.id: key for key in self.keys},
        )
        return Loaded(catalog, {})

    async def _build(self, catalog: Catalog, live: Sequence[Generation]) -> Generation:
        def way(policy: Policy, routed: bool = True) -> Way:
            experts = [catalog.experts[expert] for expert in policy.experts]
            strategy: Any = Single(None)  # type: ignore[arg-type]
            if policy.strategy.name == "vote":
                strategy = Vote(policy.strategy.settings)
            return Way(
                policy=policy,
                eligibility=Eligibility.of(experts),
                cost=np.zeros(len(experts), np.float32),
                router=ExplainingRouter(policy.experts) if routed else None,
                strategy=strategy,
            )

        def named(expert: str) -> Way:
            policy = dataclasses.replace(catalog.policies["auto"], id=expert, experts=(expert,))
            return way(policy, routed=False)

        ways = {policy.id: way(policy) for policy in catalog.policies.values()}
        capacity = self.engine.capacity
        box = place(self.engine, in_flight=capacity.in_flight, queue=capacity.queue)
        return Generation(catalog, ways, named, {"box": self.engine}, {"box": box})


def make_world(*, in_flight: int = 64, queue: int = 64, settings: Settings | None = None) -> World:
    return World(Capacity(in_flight, queue), settings or Settings(api_key=None))


REMOTE = (
    Expert(
        id="caller", server="box", description="Calls tools.", context_window=4096,
        abilities=frozenset({"tools", "json", "vision", "logprobs"}),
        parameters=SAFE_PARAMETERS | {"cache_salt", "prompt_logprobs"},
    ),
    Expert(id="plain", server="box", description="Knows text alone.", context_window=4096),
)  # fmt: skip


def make_remote(settings: Settings | None = None) -> World:
    """A world of experts on a remote server; `caller` can do all that such servers can."""
    return World(Capacity(64, 64), settings or Settings(api_key=None), RelayEngine(), REMOTE)


async def until(true: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Waits for the server's other tasks; the bound only ends a test that has failed."""
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.002)

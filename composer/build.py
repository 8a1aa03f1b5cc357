"""The composition root: the one place that names concrete routers, strategies and engines.

Adding one is a class in its own file and a line here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from composer.eligibility import Eligibility
from composer.embedder import TextEmbedder, load_embedder
from composer.engines.base import Engine
from composer.engines.local import EmbeddedEngine
from composer.generations import Generation, Way
from composer.registry import EngineFamily, Families, Loaded, load_catalog
from composer.routing.base import Embedder, Router
from composer.routing.neighbours import NeighboursRouter
from composer.scheduling.base import Limits
from composer.scheduling.fifo import FifoScheduler
from composer.service import Service, adapters_on
from composer.settings import Settings
from composer.store import Recorder, Store
from composer.strategies.base import Strategy
from composer.strategies.single import Single
from composer.strategies.vote import Vote
from composer.types import Catalog, Component, Expert, Policy

ROUTERS: Mapping[str, type[Router]] = {c.name: c for c in (NeighboursRouter,)}
STRATEGIES: Mapping[str, type[Strategy]] = {c.name: c for c in (Single, Vote)}
ENGINES: Mapping[str, type[Engine]] = {c.name: c for c in (EmbeddedEngine,)}


def families() -> Families:
    """What experts.yaml may name, with the settings model of each."""
    return Families(
        routers={name: router.settings for name, router in ROUTERS.items()},
        strategies={name: strategy.settings for name, strategy in STRATEGIES.items()},
        engines={
            name: EngineFamily(
                settings=engine.settings,
                honours=engine.honours,
                adapter_features=engine.adapter_features,
            )
            for name, engine in ENGINES.items()
        },
    )


def load(settings: Settings, runtime: Sequence[Mapping[str, Any]] = (), version: int = 1) -> Loaded:
    """The catalog that `settings.experts` and the runtime experts make. Raises CatalogError."""
    roots = settings.adapter_roots or (settings.experts.resolve().parent,)
    return load_catalog(settings.experts, families(), roots=roots, runtime=runtime, version=version)


def make_embedder(settings: Settings) -> TextEmbedder:
    """Blocks for a second or more: the first call on a machine also exports the ONNX model."""
    return load_embedder(
        settings.embedder,
        backend=settings.embedder_backend,
        cache_dir=settings.cache_dir,
        cache_size=settings.embedding_cache,
        threads=settings.threads,
    )


def make_service(settings: Settings) -> Service:
    """A service not yet started. Blocks while the embedder loads."""
    embedder = make_embedder(settings)
    store = Store(settings.database_url)

    async def build(catalog: Catalog, live: Sequence[Generation]) -> Generation:
        return await build_generation(catalog, live, embedder)

    return Service(
        settings,
        store=store,
        recorder=Recorder(store, settings.journal, queue_size=settings.record_queue),
        embedder=embedder,
        scheduler=FifoScheduler(),
        load=lambda runtime, version: load(settings, runtime, version),
        build=build,
        limits=limits_of,
    )


def limits_of(generation: Generation) -> dict[str, Limits]:
    return {
        server.id: Limits(in_flight=server.settings.max_batch, queue=server.settings.queue)
        for server in generation.catalog.servers.values()
    }


async def build_generation(
    catalog: Catalog, live: Sequence[Generation], embedder: Embedder
) -> Generation:
    """Everything one catalog needs, ready to serve. Engines of live generations whose server
    is unchanged are shared, so that a reload loads only what is new.

    On any error the engines started here are closed and shared ones forget what was loaded.
    """
    engines: dict[str, Engine] = {}
    started: list[Engine] = []
    making_ways = asyncio.create_task(build_ways(catalog, embedder))  # beside the engines
    try:
        for server in catalog.servers.values():
            engine = _running(server.id, catalog, live)
            if engine is None:
                engine = ENGINES[server.engine](server.id, server.settings)
                started.append(engine)
                await engine.start()
            engines[server.id] = engine
        wanted = Generation(catalog, {}, _nobody, engines)
        for server_id, engine in engines.items():
            await engine.prepare(adapters_on(server_id, [wanted]))
        ways = await making_ways
    except BaseException:
        making_ways.cancel()
        await asyncio.wait([making_ways])
        for engine in started:
            await engine.close()
        for server_id, engine in engines.items():
            if engine not in started:
                users = [g for g in live if g.engines.get(server_id) is engine]
                await engine.retain(adapters_on(server_id, users))
        raise
    return Generation(catalog, ways, named_ways(catalog), engines)


async def build_ways(catalog: Catalog, embedder: Embedder) -> dict[str, Way]:
    """Every policy made runnable; policies with the same router over the same experts share it.
    Starts no engine, so that a decision can be tried without one."""
    routers: dict[tuple[str, str, tuple[str, ...]], Router] = {}
    ways: dict[str, Way] = {}
    for policy in catalog.policies.values():
        experts = [catalog.experts[expert] for expert in policy.experts]
        key = (policy.router.name, repr(policy.router.settings), policy.experts)
        if key not in routers:
            kind = ROUTERS[policy.router.name]
            routers[key] = await asyncio.to_thread(
                kind.build, experts, policy.router.settings, embedder
            )
        ways[policy.id] = _way(policy, experts, routers[key])
    return ways


def named_ways(catalog: Catalog) -> Callable[[str], Way]:
    """The way to one expert by its id, made when first asked for."""

    @cache
    def named(expert: str) -> Way:
        single = Component(Single.name, Single.settings())
        policy = Policy(id=expert, router=single, strategy=single, experts=(expert,))
        return _way(policy, [catalog.experts[expert]], None)

    return named


def _way(policy: Policy, experts: Sequence[Expert], router: Router | None) -> Way:
    return Way(
        policy=policy,
        eligibility=Eligibility.of(experts),
        cost=np.array([e.cost.output_per_1m if e.cost else 0 for e in experts], np.float32),
        router=router,
        strategy=STRATEGIES[policy.strategy.name](policy.strategy.settings),
    )


def _running(server: str, catalog: Catalog, live: Sequence[Generation]) -> Engine | None:
    for generation in reversed(live):
        if generation.catalog.servers.get(server) == catalog.servers[server]:
            return generation.engines[server]
    return None


def _nobody(expert: str) -> Way:
    raise KeyError(expert)

"""The composition root: the one place that names concrete routers, strategies and engines.

Adding one is a class in its own file and a line here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from composer.eligibility import Eligibility
from composer.embedder import TextEmbedder, load_embedder
from composer.engines.base import Engine
from composer.engines.local import EmbeddedEngine
from composer.errors import ComposerError, Problem
from composer.generations import Generation, Way
from composer.registry import EngineFamily, Families, Loaded, RegistryError, load_catalog
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

log = logging.getLogger(__name__)

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
                takes_adapters=engine.takes_adapters,
                model_field=engine.model_field,
            )
            for name, engine in ENGINES.items()
        },
    )


def load(
    settings: Settings,
    runtime: Sequence[Mapping[str, Any]] = (),
    version: int = 1,
    may_skip: Collection[str] = (),
) -> Loaded:
    """The catalog that `settings.experts` and the runtime experts make. Raises CatalogError."""
    roots = settings.adapter_roots or (settings.experts.resolve().parent,)
    loaded = load_catalog(
        settings.experts,
        families(),
        roots=roots,
        runtime=runtime,
        version=version,
        may_skip=may_skip,
    )
    _check_routers(loaded, str(settings.experts))
    return loaded


def _check_routers(loaded: Loaded, file: str) -> None:
    """What a router asks of its experts is the router's to say, so the registry cannot."""
    catalog = loaded.catalog
    problems = []
    for policy in catalog.policies.values():
        experts = [catalog.experts[expert] for expert in policy.experts]
        try:
            ROUTERS[policy.router.name].check(experts, policy.router.settings)
        except ValueError as error:
            message, _, remedy = str(error).partition("; ")
            path = f"policies.{policy.id}.router"
            problems.append(Problem(file, path, message, f"{remedy[:1].upper()}{remedy[1:]}."))
    if problems:
        raise RegistryError(problems, loaded.watched)


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
        load=partial(load, settings),
        build=build,
        limits=limits_of,
    )


def limits_of(generation: Generation) -> dict[str, Limits]:
    return {server: Limits(*engine.capacity) for server, engine in generation.engines.items()}


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
            engine = await _running(server.id, catalog, live)
            if engine is None:
                engine = ENGINES[server.engine](server.id, server.settings)
                started.append(engine)
            engines[server.id] = engine
            if engine in started:
                await engine.start()
        wanted = Generation(catalog, {}, _nobody, engines)
        for server_id, engine in engines.items():
            await engine.prepare(adapters_on(server_id, [wanted]))
        ways = await making_ways
    except BaseException:
        making_ways.cancel()
        await asyncio.gather(making_ways, return_exceptions=True)
        await _undo(engines, started, live)
        raise
    return Generation(catalog, ways, named_ways(catalog), engines)


async def _undo(
    engines: Mapping[str, Engine], started: Sequence[Engine], live: Sequence[Generation]
) -> None:
    """What fails here is logged: the error that led here is the one to be told."""
    for server, engine in engines.items():
        try:
            if engine in started:
                await engine.close()
            else:
                users = [g for g in live if g.engines.get(server) is engine]
                await engine.retain(adapters_on(server, users))
        except ComposerError:
            log.exception("server %r could not be put back as it was", server)


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


async def _running(server: str, catalog: Catalog, live: Sequence[Generation]) -> Engine | None:
    """The engine of an unchanged server, unless it has died."""
    for generation in reversed(live):
        if generation.catalog.servers.get(server) == catalog.servers[server]:
            engine = generation.engines[server]
            return engine if await engine.healthy() else None
    return None


def _nobody(expert: str) -> Way:
    raise KeyError(expert)

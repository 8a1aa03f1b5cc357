"""The composition root: the one place that names concrete routers, strategies and engines.

Adding one is a class in its own file and a line here.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from composer.adapters.shelf import Shelf
from composer.eligibility import Eligibility
from composer.embedder import TextEmbedder, load_embedder
from composer.encoders import ModelFiles, find_model
from composer.engines import keys
from composer.engines.base import Engine
from composer.engines.local import EmbeddedEngine
from composer.engines.openai import OpenAIEngine
from composer.engines.replay import ReplayEngine
from composer.engines.vllm import VllmEngine
from composer.errors import Problem
from composer.generations import Generation, Way, let_go, prepared
from composer.mixing import Mixer
from composer.places import place_of, started
from composer.registry import (
    EngineFamily,
    Families,
    Loaded,
    RegistryError,
    RouterFamily,
    StrategyFamily,
    in_words,
    load_catalog,
)
from composer.routing.artefact import ArtefactError
from composer.routing.base import Demands, Embedder, Router, Vectors
from composer.routing.learned import LearnedRouter
from composer.routing.llm import LlmRouter
from composer.routing.neighbours import NeighboursRouter
from composer.routing.online import OnlineRouter
from composer.scheduling.base import Place
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from composer.scheduling.state import PolicySettings
from composer.service import Service
from composer.settings import Settings
from composer.store import Recorder, Store
from composer.strategies.base import Strategy
from composer.strategies.compose import Compose
from composer.strategies.single import Single
from composer.strategies.vote import Vote
from composer.types import Catalog, Component, Expert, Policy, Server

log = logging.getLogger(__name__)

COMPOSITIONS = Path("compositions")
"""Those of the registry, in the cache folder."""

ROUTERS: Mapping[str, type[Router]] = {
    c.name: c for c in (NeighboursRouter, LearnedRouter, OnlineRouter, LlmRouter)
}
STRATEGIES: Mapping[str, type[Strategy]] = {c.name: c for c in (Single, Vote, Compose)}
ENGINES: Mapping[str, type[Engine]] = {
    c.name: c for c in (EmbeddedEngine, OpenAIEngine, ReplayEngine, VllmEngine)
}


def families(embedder: Callable[[], Vectors] | None = None) -> Families:
    """What experts.yaml may name, with the settings model of each. `embedder` says what the service
    embeds with, where that is to be checked; it is called only where a policy names an artefact."""
    return Families(
        routers={
            name: RouterFamily(
                settings=router.settings,
                needs_texts=router.needs_texts,
                path_fields=router.path_fields,
                digest=router.digest,
                check=partial(_check_router, router, embedder),
                asks=router.asks,
            )
            for name, router in ROUTERS.items()
        },
        strategies={
            name: StrategyFamily(
                settings=strategy.settings,
                path_fields=strategy.path_fields,
                digest=partial(_files_digest, strategy.path_fields),
                check=partial(_check_strategy, strategy),
                weighs=strategy.weighs,
            )
            for name, strategy in STRATEGIES.items()
        },
        engines={
            name: EngineFamily(
                settings=engine.settings,
                honours=engine.honours,
                adapter_features=engine.adapter_features,
                model_field=engine.model_field,
                path_fields=engine.path_fields,
                program_fields=engine.program_fields,
                parameters=engine.parameters,
                check=engine.check,
                check_adapters=engine.check_adapters,
            )
            for name, engine in ENGINES.items()
        },
    )


def load(
    settings: Settings,
    runtime: Sequence[Mapping[str, Any]] = (),
    version: int = 1,
    may_skip: Collection[str] = (),
    *,
    embedder: Callable[[], Vectors] | None = None,
    compositions: Shelf | None = None,
) -> Loaded:
    """The catalog that `settings.experts` and the runtime experts make; `embedder` as `families`
    has it, default: the settings' own, by its files; `compositions` as `load_catalog` has it,
    default: in the cache folder. Raises CatalogError, and SettingsError for an embedder that is
    asked for and not there."""
    return load_catalog(
        settings.experts,
        families(embedder or partial(_embedder_files, settings.embedder)),
        roots=settings.adapter_roots or (settings.experts.resolve().parent,),
        runtime=runtime,
        version=version,
        may_skip=may_skip,
        compositions=compositions or settings.cache_dir / COMPOSITIONS,
    )


@cache
def _embedder_files(name: str) -> ModelFiles:
    """Its weights are read once for their digest: half a second, and no model is loaded."""
    return find_model(name)


def _check_router(
    router: type[Router],
    embedder: Callable[[], Vectors] | None,
    policy: Policy,
    experts: Sequence[Expert],
) -> None:
    demands = Demands(
        curve=policy.quality is not None or policy.max_cost is not None,
        quality=policy.quality,
        embedder=embedder() if embedder is not None and _names_files(router, policy) else None,
    )
    router.check(experts, policy.router.settings, demands)


def _names_files(router: type[Router], policy: Policy) -> bool:
    return bool(router.path_fields) and policy.router.digest != ""


def _check_strategy(strategy: type[Strategy], policy: Policy, experts: Sequence[Expert]) -> None:
    del experts  # a strategy goes by their ids
    strategy.check_experts(policy.strategy.settings, policy.experts, policy.k)


def _files_digest(fields: Sequence[str], settings: Any) -> str:
    """Of the files that these settings name; "" where there is none, or one cannot be read."""
    paths = [path for field in fields if (path := getattr(settings, field)) is not None]
    try:
        return "+".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    except OSError:
        return ""


def _problem(file: str, policy: Policy, error: ArtefactError) -> Problem:
    message, remedy = in_words(error)
    return Problem(file, f"policies.{policy.id}.router", message, remedy)


def make_embedder(settings: Settings) -> TextEmbedder:
    """Blocks for a second or more: the first call on a machine also exports the ONNX model."""
    return load_embedder(
        settings.embedder,
        backend=settings.embedder_backend,
        cache_dir=settings.cache_dir,
        cache_size=settings.embedding_cache,
        threads=settings.threads,
    )


def make_service(settings: Settings, embedder: TextEmbedder | None = None) -> Service:
    """A service not yet started. Blocks while the embedder loads, unless it is given: one that the
    settings do not name, or that is open already."""
    embedder = make_embedder(settings) if embedder is None else embedder
    store = Store(settings.database_url)

    mixer = make_mixer(settings)

    async def build(catalog: Catalog, live: Sequence[Generation]) -> Generation:
        return await build_generation(
            catalog, live, embedder, str(settings.experts), prepare=mixer.prepare
        )

    return Service(
        settings,
        store=store,
        recorder=Recorder(store, settings.journal, queue_size=settings.record_queue),
        embedder=embedder,
        scheduler=make_scheduler(settings),
        load=partial(load, settings, embedder=lambda: embedder, compositions=mixer.named),
        build=build,
        mixer=mixer,
    )


def make_mixer(settings: Settings) -> Mixer:
    """What it makes lies beside the registry's own compositions, which come and go with entries."""
    inside = COMPOSITIONS / "queries"
    seen = settings.server_cache_dir
    budget = settings.compositions_mb * 2**20
    return Mixer(
        Shelf(settings.cache_dir / inside, budget),
        named=Shelf(settings.cache_dir / COMPOSITIONS, budget),
        most=settings.compositions,
        seen_at=None if seen is None else str(seen / inside),
    )


def make_scheduler(settings: Settings) -> DeviceScheduler:
    """One owner per device, each with the same policy."""
    policy = PolicySettings(
        patience=settings.patience, drain_s=settings.drain_s, preload=settings.preload
    )
    return DeviceScheduler(
        lambda: SwapPolicy(policy), log=settings.scheduler_log, header=asdict(policy)
    )


Prepare = Callable[[Generation, Sequence[Generation]], Awaitable[None]]
"""Loads the adapters of a generation that is being built, beside the live ones'."""


async def build_generation(
    catalog: Catalog,
    live: Sequence[Generation],
    embedder: Embedder,
    file: str = "",
    *,
    prepare: Prepare = prepared,
) -> Generation:
    """Everything one catalog needs, ready to serve. Engines of live generations whose server
    is unchanged are shared, so that a reload loads only what is new.

    On any error the engines started here are closed and shared ones forget what was loaded.
    Raises RegistryError (see `build_ways`), EngineError, and what `prepare` raises.
    """
    engines: dict[str, Engine] = {}
    places: dict[str, Place] = {}
    keys.hide(
        variable
        for server in catalog.servers.values()
        if (variable := getattr(server.settings, "api_key_env", None)) is not None
    )
    keys.hide(key.variable for key in catalog.keys.values())
    making_ways = asyncio.create_task(build_ways(catalog, embedder, file))  # beside the engines
    try:
        for server in catalog.servers.values():
            engines[server.id], places[server.id] = await _engine_for(server, live)
        await prepare(Generation(catalog, {}, _nobody, engines), live)
        ways = await making_ways
    except BaseException:
        making_ways.cancel()
        await asyncio.gather(making_ways, return_exceptions=True)
        await let_go(engines, live)
        raise
    return Generation(catalog, ways, named_ways(catalog), engines, places)


async def _engine_for(server: Server, live: Sequence[Generation]) -> tuple[Engine, Place]:
    """The engine of an unchanged server, else a new one; started where no scheduler decides on
    that, which also brings back one that has died."""
    shared = next((g for g in reversed(live) if g.catalog.servers.get(server.id) == server), None)
    if shared is not None:
        engine, place = shared.engines[server.id], shared.places[server.id]
        if server.placement is None and not (await engine.health()).ok:
            await started(server.id, engine)
        return engine, place
    engine = ENGINES[server.engine](server.id, server.settings, placement=server.placement)
    try:
        there = server.placement is None and await started(server.id, engine)
    except BaseException:
        await engine.close()
        raise
    taken = {g.place(server.id) for g in live if server.id in g.engines}
    return engine, replace(place_of(server, engine, taken), there=there)


async def build_ways(catalog: Catalog, embedder: Embedder, file: str = "") -> dict[str, Way]:
    """Every policy made runnable; policies with the same router over the same experts share it,
    except that a router which learns is one policy's own. Starts no engine, so that a decision can
    be tried without one. Raises RegistryError, a problem of `file`, where a router's artefact
    cannot be used: what shows only with its arrays or the embedder at hand."""
    _check_embedded(catalog, embedder, file)
    routers: dict[tuple[str, str, tuple[str, ...], str], Router] = {}
    ways: dict[str, Way] = {}
    for policy in catalog.policies.values():
        experts = [catalog.experts[expert] for expert in policy.experts]
        kind = ROUTERS[policy.router.name]
        owner = policy.id if issubclass(kind, OnlineRouter) else ""
        key = (kind.name, repr(policy.router.settings), policy.experts, owner)
        if key not in routers:
            try:
                routers[key] = await asyncio.to_thread(
                    kind.build, experts, policy.router.settings, embedder
                )
            except ArtefactError as error:
                raise RegistryError([_problem(file, policy, error)], {}) from error
        ways[policy.id] = _way(policy, experts, routers[key])
    return ways


def _check_embedded(catalog: Catalog, embedder: Embedder, file: str) -> None:
    """Raises RegistryError for gates that read a request as another embedder sees it."""
    problems = [
        Problem(
            file,
            f"experts.{expert.id}.gate",
            f"it reads requests as the embedder {gate.embedder!r} sees them, and this service's is "
            f"{embedder.id!r}",
            "Set COMPOSER_EMBEDDER to that one, or make the gate again with this one.",
        )
        for expert in catalog.experts.values()
        if expert.adapter is not None
        and (gate := expert.adapter.gate) is not None
        and gate.per_request
        and gate.embedder_digest not in ("", embedder.digest)
    ]
    if problems:
        raise RegistryError(problems, {})


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


def _nobody(expert: str) -> Way:
    raise KeyError(expert)

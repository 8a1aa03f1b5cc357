"""All that is built from one catalog, and how one generation follows another.

A reload builds the next generation beside the current one, swaps one reference, and lets the
old one drain: its routers, engines and adapters live until the last request that began under it
has ended. Knows nothing about how a generation is built.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from composer.eligibility import Eligibility
from composer.engines.base import Engine
from composer.errors import ComposerError, EngineUnavailable
from composer.routing.base import Router
from composer.scheduling.base import Place
from composer.strategies.base import Strategy
from composer.types import Adapter, Catalog, FloatArray, Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Way:
    """A policy made runnable. `cost` (E,) is US dollars per million output tokens; `router` is
    None where there is nothing to choose (a model name that is one expert)."""

    policy: Policy
    eligibility: Eligibility
    cost: FloatArray
    router: Router | None
    strategy: Strategy


@dataclass(frozen=True, slots=True)
class Generation:
    """One catalog with all that serves it. `ways` is keyed by policy id, `engines` and `places`
    by server id. A server whose settings changed has a new engine and a new place, named apart,
    while calls of the generation before still run on the old ones. `mixed` are the adapters that
    were composed for requests of this generation: server → digest → adapter."""

    catalog: Catalog
    ways: Mapping[str, Way]
    named: Callable[[str], Way]
    engines: Mapping[str, Engine]
    places: Mapping[str, Place] = field(default_factory=dict)
    mixed: dict[str, dict[str, Adapter]] = field(default_factory=dict)

    def place(self, server: str) -> str:
        """The name under which the scheduler knows a server of this generation."""
        found = self.places.get(server)
        return server if found is None else found.model.id


class Hold:
    """Keeps a generation alive for one request. `release` may be called more than once."""

    __slots__ = ("_owner", "generation")

    def __init__(self, owner: Generations, generation: Generation) -> None:
        self._owner: Generations | None = owner
        self.generation = generation

    def release(self) -> None:
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._released(self.generation)

    def __enter__(self) -> Generation:
        return self.generation

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Generations:
    """The current generation and those still draining. Used from one event loop only."""

    def __init__(self, retired: Callable[[Generation], None]) -> None:
        """`retired` is called once for each generation that is neither current nor held."""
        self._retired = retired
        self._current: Generation | None = None
        self._holds: dict[int, int] = {}
        self._live: dict[int, Generation] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def current(self) -> Generation:
        if self._current is None:
            raise EngineUnavailable("the service is starting or closing; ask /ready")
        return self._current

    @property
    def live(self) -> tuple[Generation, ...]:
        """The current generation and those still held, oldest first."""
        return tuple(self._live.values())

    @property
    def holds(self) -> int:
        """Requests being answered now, over all generations."""
        return sum(self._holds.values())

    def hold(self) -> Hold:
        generation = self.current
        self._holds[id(generation)] += 1
        self._idle.clear()
        return Hold(self, generation)

    async def drained(self) -> None:
        """Returns once no request is being answered."""
        await self._idle.wait()

    def swap(self, new: Generation | None) -> None:
        """`new` serves every request that begins from now on; None: the service is closing."""
        old, self._current = self._current, new
        if new is not None:
            self._live[id(new)] = new
            self._holds[id(new)] = 0
        if old is not None:
            self._retire_if_free(old)

    def _released(self, generation: Generation) -> None:
        self._holds[id(generation)] -= 1
        if not self.holds:
            self._idle.set()
        self._retire_if_free(generation)

    def _retire_if_free(self, generation: Generation) -> None:
        if generation is self._current or self._holds.get(id(generation)) != 0:
            return
        del self._holds[id(generation)], self._live[id(generation)]
        self._retired(generation)


def adapters_on(server: str, generations: Collection[Generation]) -> tuple[Adapter, ...]:
    """The adapters that these generations use on a server, each once."""
    mixed = [generation.mixed.get(server, {}) for generation in generations]
    found = {
        expert.adapter.digest: expert.adapter
        for generation in generations
        for expert in generation.catalog.experts.values()
        if expert.server == server and expert.adapter is not None
    }
    return tuple({**found, **{d: a for own in mixed for d, a in own.items()}}.values())


async def prepared(coming: Generation, live: Collection[Generation]) -> None:
    """Its adapters are loaded on its engines. Raises EngineError."""
    del live  # what they use is loaded
    for server, engine in coming.engines.items():
        await engine.prepare(adapters_on(server, [coming]))


async def let_go(engines: Mapping[str, Engine], live: Collection[Generation]) -> None:
    """Closes those of the engines that no live generation uses; the others forget the adapters
    that no live one names. What fails is logged: nobody is left who could mend it."""
    for server, engine in engines.items():
        users = [generation for generation in live if generation.engines.get(server) is engine]
        try:
            if users:
                await engine.retain(adapters_on(server, users))
            else:
                await engine.close()
        except ComposerError:
            log.exception("server %r could not be put back as it was", server)

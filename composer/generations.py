"""All that is built from one catalog, and how one generation follows another.

A reload builds the next generation beside the current one, swaps one reference, and lets the
old one drain: its routers, engines and adapters live until the last request that began under it
has ended. Knows nothing about how a generation is built.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from composer.eligibility import Eligibility
from composer.engines.base import Engine
from composer.errors import EngineUnavailable
from composer.routing.base import Router
from composer.strategies.base import Strategy
from composer.types import Catalog, FloatArray, Policy


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
    """One catalog with all that serves it. `ways` is keyed by policy id, `engines` by server id."""

    catalog: Catalog
    ways: Mapping[str, Way]
    named: Callable[[str], Way]
    engines: Mapping[str, Engine]


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

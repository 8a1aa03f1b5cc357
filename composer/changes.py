"""What is served, changed: boot, reload, runtime experts, promotions. Names no concrete class, and
knows no request.

All are one path (`_install`): load → build beside the old → swap one reference → let the old drain.
Whatever fails on the way leaves the current generation as it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from composer.background import Background
from composer.errors import (
    CatalogError,
    ComposerError,
    Conflict,
    EngineUnavailable,
    Overloaded,
    Problem,
    StoreError,
    UnknownModel,
)
from composer.generations import Generation, Generations, let_go
from composer.health import ReloadState
from composer.learning import Learning
from composer.mixing import Mixer
from composer.promotion import Promotions
from composer.registry import Loaded, RegistryError
from composer.registry.watch import Watcher
from composer.scheduling.base import Scheduler
from composer.store import Promotion, Store
from composer.types import Catalog, Expert

log = logging.getLogger(__name__)

Load = Callable[[Sequence[Mapping[str, Any]], int, Collection[str]], Loaded]
"""Runtime experts' specs, the next version, and the ids of those that may be left out where they
are wrong → the catalog. Blocks; raises RegistryError."""

Build = Callable[[Catalog, Sequence[Generation]], Awaitable[Generation]]
"""The catalog and the live generations whose engines may be shared → the next generation."""


class Changes:
    """One at a time. `version` is the catalog's, `left_out` the run-time experts that were found
    wrong at boot with what is wrong, `state` how the last reload ended. `file` is the registry
    file's name, for people."""

    def __init__(
        self,
        file: str,
        *,
        store: Store,
        generations: Generations,
        scheduler: Scheduler,
        learning: Learning,
        promotions: Promotions,
        mixer: Mixer,
        load: Load,
        build: Build,
        background: Background,
    ) -> None:
        self.version = 0
        self.left_out: dict[str, str] = {}
        self.state = ReloadState()
        self._file = file
        self._store = store
        self._generations = generations
        self._scheduler = scheduler
        self._learning = learning
        self._promotions = promotions
        self._mixer = mixer
        self._load = load
        self._build = build
        self._background = background
        self._watcher = Watcher()
        self._warnings: tuple[Problem, ...] = ()
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._changing = asyncio.Lock()
        self._trimming = False

    async def boot(self) -> None:
        """The first generation. Raises CatalogError, StoreError or EngineError."""
        async with self._changing:
            self._rows = await self._store.list_experts()
            await self._promotions.read()
            await self._install(self._rows, booting=True)

    async def watch(self) -> None:
        """Reloads when the registry's files change, until the service closes."""
        await self._watcher.run(self.reload, self._background.stop)

    async def reload(self) -> None:
        """Takes the registry file as it now is; on any error the old catalog stays."""
        async with self._changing:
            try:
                self._rows = await self._store.list_experts()
            except StoreError as error:
                log.warning("runtime experts as last read, the database is away: %s", error)
            try:
                await self._install(self._rows)
            except Exception as error:  # whatever it is, /health must say that it failed
                problems = tuple(str(error).splitlines())
                self.state = ReloadState(datetime.now(UTC), ok=False, problems=problems)
                unforeseen = None if isinstance(error, ComposerError) else error
                message = "the catalog stays at version %d:\n%s"
                log.error(message, self.version, error, exc_info=unforeseen)
                if isinstance(error, Overloaded):  # by requests that will have ended by then
                    self._background.spawn(self._reload_after(error.retry_after))

    async def _reload_after(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._background.stop.wait(), seconds)
            return
        await self.reload()

    async def add_expert(self, spec: Mapping[str, Any]) -> Expert:
        """Serves one more expert from now on, and after a restart.

        Raises Conflict for an id already taken, CatalogError for a wrong spec, StoreError when
        it cannot be kept, EngineFull for a server without room for it, Overloaded where that will
        have room when running requests have ended; then nothing has changed.
        """
        async with self._changing:
            rows = await self._store.list_experts()
            id_ = spec.get("id")
            if id_ in self.left_out or id_ in self._generations.current.catalog.experts:
                raise Conflict(f"there is already an expert {id_!r}; choose another id", param="id")
            try:
                await self._install(
                    [*rows, spec], keep=lambda: self._store.put_expert(str(id_), spec)
                )
            except RegistryError as error:
                if set(own := error.about(id_)) == set(error.problems):
                    raise CatalogError(own) from error
                log.warning("expert %r cannot be added: %s", id_, error)
                raise Conflict(
                    "the registry file is wrong at present, so no expert can be added; /health "
                    "says what to mend in it"
                ) from error
            self._rows = [*rows, spec]
            return self._generations.current.catalog.experts[str(id_)]

    async def remove_expert(self, id_: str) -> None:
        """Raises UnknownModel, or Conflict for an expert that stands in the registry file."""
        async with self._changing:
            if id_ in self.left_out:
                await self._check_unnamed(id_)
                await self._store.delete_expert(id_)
                del self.left_out[id_]
                self._rows = [row for row in self._rows if row["id"] != id_]
                return
            expert = self._generations.current.catalog.experts.get(id_)
            if expert is None:
                raise UnknownModel(f"there is no expert {id_!r}", param="id")
            if expert.source == "file":
                raise Conflict(
                    f"expert {id_!r} stands in {self._file}; take it out there",
                    param="id",
                )
            rows = [row for row in await self._store.list_experts() if row["id"] != id_]
            try:
                await self._install(rows, keep=lambda: self._store.delete_expert(id_))
            except RegistryError as error:
                log.warning("expert %r cannot be taken away: %s", id_, error)
                raise Conflict(
                    f"the registry file names expert {id_!r}, or is wrong at present; mend it first"
                ) from error
            self._rows = rows

    async def _check_unnamed(self, id_: str) -> None:
        """Raises Conflict where the registry file names an expert that is left out: without its row
        that name is a mistake, and the next start would fail for it."""
        may_skip = list(self.left_out)
        try:
            await asyncio.to_thread(self._load, self._rows, self.version, may_skip)
        except RegistryError:
            return  # the file is wrong whatever becomes of the row
        rest = [row for row in self._rows if row["id"] != id_]
        try:
            await asyncio.to_thread(self._load, rest, self.version, may_skip)
        except RegistryError as error:
            raise Conflict(
                f"the registry file names expert {id_!r}; take it out there first"
            ) from error

    async def promote(self, policy: str, promotion: Promotion | None) -> None:
        """Serves it from now on, and after a restart; None undoes. Raises as `add_expert`,
        and Conflict where the registry as it now is has another router in shadow."""
        async with self._changing:
            with self._promotions.changed(policy, promotion) as keep:
                await self._install(self._rows, keep)

    async def _install(
        self,
        rows: Sequence[Mapping[str, Any]],
        keep: Callable[[], Awaitable[None]] | None = None,
        *,
        booting: bool = False,
    ) -> None:
        """The one path of boot, reload and runtime change. `keep` makes the change durable
        after everything is built and before anything is swapped.

        When booting, a runtime expert that has become wrong is left out rather than keeping
        everybody from being served. It stays in the database and is tried again at each reload,
        until it is mended or deleted.
        """
        began = perf_counter()
        may_skip = [row["id"] for row in rows] if booting else list(self.left_out)
        try:
            read = await asyncio.to_thread(self._load, rows, self.version + 1, may_skip)
            loaded = self._promotions.applied(read)
        except RegistryError as error:
            if keep is None:  # so that mending any of them is noticed
                self._watcher.looked_at(error.watched, in_part=True)
            raise
        if loaded.warnings != self._warnings:
            for warning in loaded.warnings:
                log.warning("%s", warning)
            self._warnings = loaded.warnings
        current = self._generations.live[-1] if self._generations.live else None
        if keep is None:  # a change that fails below must not pass for one of the file
            self._watcher.looked_at(loaded.watched)
        if (
            current is not None
            and loaded.catalog.digest == current.catalog.digest
            and all([(await engine.health()).ok for engine in current.engines.values()])
        ):
            if not self.state.ok:
                log.info(
                    "the registry is right again; the catalog stays at version %d", self.version
                )
            if keep is not None:  # as undoing a promotion that was passed over
                await keep()
            self.left_out = _told(loaded.skipped)
            self.state = ReloadState(datetime.now(UTC))
            return
        try:
            generation = await self._build(loaded.catalog, self._generations.live)
        except BaseException:
            self._mixer.dropped()
            raise
        try:
            await self._learning.take_up(generation)
            if keep is not None:
                await keep()
            if self._background.stop.is_set():
                raise EngineUnavailable("the service is closing")
        except BaseException:
            self._mixer.dropped()
            await self._release(generation)
            raise
        self.version = loaded.catalog.version
        self.left_out = _told(loaded.skipped)
        self._configure([*self._generations.live, generation])
        self._generations.swap(generation)
        self._watcher.looked_at(loaded.watched)
        self.state = ReloadState(datetime.now(UTC))
        log.info(
            "catalog version %d: %d experts, %d policies, built in %.2f s",
            self.version,
            len(loaded.catalog.experts),
            len(loaded.catalog.policies),
            perf_counter() - began,
        )

    def _configure(self, generations: Sequence[Generation]) -> None:
        """The places of these generations, oldest first; devices are as the newest has them."""
        places = {
            place.model.id: place
            for generation in generations
            for place in generation.places.values()
        }
        memory = {
            device.id: device.memory_gb
            for generation in generations
            for device in generation.catalog.devices.values()
        }
        self._scheduler.configure(places, memory)

    def retired(self, generation: Generation) -> None:
        """Nobody uses it any more; what it alone had is let go."""
        self._background.spawn(self._release_retired(generation))

    async def _release_retired(self, generation: Generation) -> None:
        # Under the lock: a generation being built has loaded adapters that no live one names yet.
        async with self._changing:
            await self._release(generation)
            await self._mixer.trim(self._generations.live)

    def crowded(self) -> None:
        """Compositions are to be trimmed, soon."""
        if not self._trimming and not self._background.stop.is_set():
            self._trimming = True
            self._background.spawn(self._trim())

    async def _trim(self) -> None:
        # Under the lock for the same reason.
        async with self._changing:
            self._trimming = False
            await self._mixer.trim(self._generations.live)

    async def _release(self, generation: Generation) -> None:
        """Frees what only this generation used: engines closed, adapters forgotten."""
        live = [g for g in self._generations.live if g is not generation]
        if live:
            self._configure(live)  # first, so that nothing is started there any more
        await let_go(generation.engines, live)


def _told(skipped: Mapping[str, Sequence[Problem]]) -> dict[str, str]:
    return {id_: "\n".join(map(str, problems)) for id_, problems in skipped.items()}

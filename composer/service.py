"""The running service: boot, reload, runtime experts, health, stop. Names no concrete class.

Boot and reload are one path (`_install`): load → build beside the old → swap one reference →
let the old drain. Whatever fails on the way leaves the current generation as it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from composer.draining import drained
from composer.embedder import TextEmbedder
from composer.engines.base import Engine
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
from composer.health import ReloadState, health_of
from composer.learning import Learning
from composer.metrics import Metrics
from composer.mixing import Mixer
from composer.outcome import Outcome
from composer.pipeline import Pipeline
from composer.promotion import Promotions
from composer.recording import record_of
from composer.registry import Loaded, RegistryError
from composer.registry.watch import Watcher
from composer.scheduling.base import Scheduler
from composer.settings import Settings
from composer.store import Lessons, Promotion, Recorder, Shadows, Store
from composer.types import Catalog, Expert

log = logging.getLogger(__name__)

Load = Callable[[Sequence[Mapping[str, Any]], int, Collection[str]], Loaded]
"""Runtime experts' specs, the next version, and the ids of those that may be left out where they
are wrong → the catalog. Blocks; raises RegistryError."""

Build = Callable[[Catalog, Sequence[Generation]], Awaitable[Generation]]
"""The catalog and the live generations whose engines may be shared → the next generation."""


class Service:
    """Everything with a life of its own. Make one by `composer.build.make_service`."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        recorder: Recorder,
        embedder: TextEmbedder,
        scheduler: Scheduler,
        load: Load,
        build: Build,
        mixer: Mixer,
    ) -> None:
        self.settings = settings
        self.store = store
        self.recorder = recorder
        self.embedder = embedder
        self.scheduler = scheduler
        self.generations = Generations(self._retired)
        self.mixer = mixer
        mixer.crowded = self._crowded
        mixer.live = lambda: self.generations.live
        self.learning = Learning(Lessons(store), self.generations)
        self.promotions = Promotions(Shadows(store), self.generations)
        self.metrics = Metrics(
            scheduler,
            self._policies,
            {
                "feedback_learnt": (
                    "Feedbacks that this process's online routers have learnt from.",
                    lambda: self.learning.learnt,
                ),
                "shadow_left_out": (
                    "Requests whose choice in shadow could not be made or written.",
                    lambda: self.promotions.left_out,
                ),
                **mixer.totals(),
            },
        )
        self.pipeline = Pipeline(
            self.generations,
            scheduler,
            self._ended,
            max_wait_s=settings.max_wait_s,
            reads_text=settings.log_content,
            embed=embedder.embed,
            mixing=mixer.expert,
        )
        self.reload_state = ReloadState()
        self._load = load
        self._build = build
        self._version = 0
        self._left_out: dict[str, str] = {}
        self._warnings: tuple[Problem, ...] = ()
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._watcher = Watcher()
        self._changing = asyncio.Lock()
        self._trimming = False
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = perf_counter()

    # --- life ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready to answer when it returns; at once where it has been started before. Raises
        CatalogError, StoreError or EngineError."""
        if self.generations.live:
            return
        try:
            await self.store.start()
            await self.recorder.start()
            async with self._changing:
                self._rows = await self.store.list_experts()
                await self.promotions.read()
                await self._install(self._rows, booting=True)
        except BaseException:
            await self.close()
            raise
        for work in (self.learning.run, self.promotions.run):
            self._spawn(work(self._stop))
        self._spawn(self._watcher.run(self.reload, self._stop))
        log.info("ready after %.1f s", perf_counter() - self._started)

    async def drain(self) -> None:
        """Lets requests end for up to `drain_timeout_s`; to be called when no new ones come. Those
        left then, or that only wait for servers to come, are refused, and the starts of these
        servers are broken off."""
        self._stop.set()
        timeout_s = self.settings.drain_timeout_s
        if not await drained(self.generations, self.scheduler, timeout_s):
            await self._close_engines(self._engines())

    async def close(self) -> None:
        """Drains, then stops everything, whatever a part raises. May be called twice, and after a
        failed start."""
        async with AsyncExitStack() as parts:  # closed from the last to the first
            parts.push_async_callback(self.store.close)
            parts.push_async_callback(self.recorder.close)
            parts.push_async_callback(self.embedder.close)
            parts.callback(self.mixer.close)
            parts.push_async_callback(self._finish_tasks)
            parts.push_async_callback(self._close_engines, self._engines())
            parts.callback(self.generations.swap, None)
            await self.drain()

    def _engines(self) -> Collection[Engine]:
        return {id(e): e for g in self.generations.live for e in g.engines.values()}.values()

    async def _close_engines(self, engines: Collection[Engine]) -> None:
        """Beside the scheduler, which begins no move any more and waits for those under way: an
        engine that is closed ends its own."""
        closing = (self.scheduler.close(), *(engine.close() for engine in engines))
        errors = [e for e in await asyncio.gather(*closing, return_exceptions=True) if e]
        if errors:
            raise BaseExceptionGroup("engines did not close", errors)

    async def _finish_tasks(self) -> None:
        """A reload under way sees the stop and puts back what it built."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.settings.drain_timeout_s)

    # --- changing what is served -----------------------------------------------------------

    async def reload(self) -> None:
        """Takes the registry file as it now is; on any error the old catalog stays."""
        async with self._changing:
            try:
                self._rows = await self.store.list_experts()
            except StoreError as error:
                log.warning("runtime experts as last read, the database is away: %s", error)
            try:
                await self._install(self._rows)
            except Exception as error:  # whatever it is, /health must say that it failed
                problems = tuple(str(error).splitlines())
                self.reload_state = ReloadState(datetime.now(UTC), ok=False, problems=problems)
                unforeseen = None if isinstance(error, ComposerError) else error
                message = "the catalog stays at version %d:\n%s"
                log.error(message, self._version, error, exc_info=unforeseen)
                if isinstance(error, Overloaded):  # by requests that will have ended by then
                    self._spawn(self._reload_after(error.retry_after))

    async def _reload_after(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
            return
        await self.reload()

    async def add_expert(self, spec: Mapping[str, Any]) -> Expert:
        """Serves one more expert from now on, and after a restart.

        Raises Conflict for an id already taken, CatalogError for a wrong spec, StoreError when
        it cannot be kept, EngineFull for a server without room for it, Overloaded where that will
        have room when running requests have ended; then nothing has changed.
        """
        async with self._changing:
            rows = await self.store.list_experts()
            id_ = spec.get("id")
            if id_ in self._left_out or id_ in self.generations.current.catalog.experts:
                raise Conflict(f"there is already an expert {id_!r}; choose another id", param="id")
            try:
                await self._install(
                    [*rows, spec], keep=lambda: self.store.put_expert(str(id_), spec)
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
            return self.generations.current.catalog.experts[str(id_)]

    async def remove_expert(self, id_: str) -> None:
        """Raises UnknownModel, or Conflict for an expert that stands in the registry file."""
        async with self._changing:
            if id_ in self._left_out:
                await self._check_unnamed(id_)
                await self.store.delete_expert(id_)
                del self._left_out[id_]
                self._rows = [row for row in self._rows if row["id"] != id_]
                return
            expert = self.generations.current.catalog.experts.get(id_)
            if expert is None:
                raise UnknownModel(f"there is no expert {id_!r}", param="id")
            if expert.source == "file":
                raise Conflict(
                    f"expert {id_!r} stands in {self.settings.experts.name}; take it out there",
                    param="id",
                )
            rows = [row for row in await self.store.list_experts() if row["id"] != id_]
            try:
                await self._install(rows, keep=lambda: self.store.delete_expert(id_))
            except RegistryError as error:
                log.warning("expert %r cannot be taken away: %s", id_, error)
                raise Conflict(
                    f"the registry file names expert {id_!r}, or is wrong at present; mend it first"
                ) from error
            self._rows = rows

    async def _check_unnamed(self, id_: str) -> None:
        """Raises Conflict where the registry file names an expert that is left out: without its row
        that name is a mistake, and the next start would fail for it."""
        may_skip = list(self._left_out)
        try:
            await asyncio.to_thread(self._load, self._rows, self._version, may_skip)
        except RegistryError:
            return  # the file is wrong whatever becomes of the row
        rest = [row for row in self._rows if row["id"] != id_]
        try:
            await asyncio.to_thread(self._load, rest, self._version, may_skip)
        except RegistryError as error:
            raise Conflict(
                f"the registry file names expert {id_!r}; take it out there first"
            ) from error

    async def promote(self, policy: str, promotion: Promotion | None) -> None:
        """Serves it from now on, and after a restart; None undoes. Raises as `add_expert`,
        and Conflict where the registry as it now is has another router in shadow."""
        async with self._changing:
            with self.promotions.changed(policy, promotion) as keep:
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
        may_skip = [row["id"] for row in rows] if booting else list(self._left_out)
        try:
            read = await asyncio.to_thread(self._load, rows, self._version + 1, may_skip)
            loaded = self.promotions.applied(read)
        except RegistryError as error:
            if keep is None:  # so that mending any of them is noticed
                self._watcher.looked_at(error.watched, in_part=True)
            raise
        if loaded.warnings != self._warnings:
            for warning in loaded.warnings:
                log.warning("%s", warning)
            self._warnings = loaded.warnings
        current = self.generations.live[-1] if self.generations.live else None
        if keep is None:  # a change that fails below must not pass for one of the file
            self._watcher.looked_at(loaded.watched)
        if (
            current is not None
            and loaded.catalog.digest == current.catalog.digest
            and all([(await engine.health()).ok for engine in current.engines.values()])
        ):
            if not self.reload_state.ok:
                log.info(
                    "the registry is right again; the catalog stays at version %d", self._version
                )
            if keep is not None:  # as undoing a promotion that was passed over
                await keep()
            self._left_out = _told(loaded.skipped)
            self.reload_state = ReloadState(datetime.now(UTC))
            return
        generation = await self._build(loaded.catalog, self.generations.live)
        try:
            await self.learning.take_up(generation)
            if keep is not None:
                await keep()
            if self._stop.is_set():
                raise EngineUnavailable("the service is closing")
        except BaseException:
            await self._release(generation)
            raise
        self._version = loaded.catalog.version
        self._left_out = _told(loaded.skipped)
        self._configure([*self.generations.live, generation])
        self.generations.swap(generation)
        self._watcher.looked_at(loaded.watched)
        self.reload_state = ReloadState(datetime.now(UTC))
        log.info(
            "catalog version %d: %d experts, %d policies, built in %.2f s",
            self._version,
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
        self.scheduler.configure(places, memory)

    def _retired(self, generation: Generation) -> None:
        self._spawn(self._release_retired(generation))

    async def _release_retired(self, generation: Generation) -> None:
        # Under the lock: a generation being built has loaded adapters that no live one names yet.
        async with self._changing:
            await self._release(generation)
            await self.mixer.trim(self.generations.live)

    def _crowded(self) -> None:
        if not self._trimming and not self._stop.is_set():
            self._trimming = True
            self._spawn(self._trim())

    async def _trim(self) -> None:
        # Under the lock for the same reason.
        async with self._changing:
            self._trimming = False
            await self.mixer.trim(self.generations.live)

    async def _release(self, generation: Generation) -> None:
        """Frees what only this generation used: engines closed, adapters forgotten."""
        live = [g for g in self.generations.live if g is not generation]
        if live:
            self._configure(live)  # first, so that nothing is started there any more
        await let_go(generation.engines, live)

    # --- records and health ----------------------------------------------------------------

    def _policies(self) -> Collection[str]:
        live = self.generations.live
        return live[-1].catalog.policies.keys() if live else ()

    def _ended(self, outcome: Outcome) -> None:
        self.metrics.answered(outcome)
        content = self.settings.log_content
        embedding = self.embedder.cached(outcome.request.text) if content else None
        self.promotions.put(outcome)
        self.recorder.put(record_of(outcome, content=content, embedding=embedding))

    async def health(self) -> dict[str, Any]:
        """What /health shows."""
        generation = self.generations.live[-1] if self.generations.live else None
        return await health_of(
            generation,
            version=self._version,
            reload=self.reload_state,
            left_out=self._left_out,
            rest={
                "uptime_s": round(perf_counter() - self._started, 1),
                "requests": {"running": self.generations.holds},
                "scheduler": self.scheduler.stats(),
                "recorder": self.recorder.stats(),
                "learning": self.learning.stats(),
            },
        )

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a background task failed", exc_info=task.exception())


def _told(skipped: Mapping[str, Sequence[Problem]]) -> dict[str, str]:
    return {id_: "\n".join(map(str, problems)) for id_, problems in skipped.items()}

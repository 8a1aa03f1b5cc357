"""The running service: its parts put together, their life, health and records. Names no concrete
class; how what is served changes is `changes.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any

from composer.background import Background
from composer.changes import Build, Changes, Load
from composer.draining import drained
from composer.embedder import TextEmbedder
from composer.engines.base import Engine
from composer.generations import Generations
from composer.health import health_of
from composer.learning import Learning
from composer.metrics import Metrics
from composer.mixing import Mixer
from composer.outcome import Outcome
from composer.pipeline import Pipeline
from composer.promotion import Promotions
from composer.recording import record_of
from composer.scheduling.base import Scheduler
from composer.settings import Settings
from composer.store import Lessons, Recorder, Shadows, Store

log = logging.getLogger(__name__)


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
        self.generations = Generations(lambda generation: self.changes.retired(generation))
        self.mixer = mixer
        mixer.crowded = lambda: self.changes.crowded()
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
        self._background = Background()
        self.changes = Changes(
            settings.experts.name,
            store=store,
            generations=self.generations,
            scheduler=scheduler,
            learning=self.learning,
            promotions=self.promotions,
            mixer=mixer,
            load=load,
            build=build,
            background=self._background,
        )
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
            await self.changes.boot()
        except BaseException:
            await self.close()
            raise
        for work in (self.learning.run, self.promotions.run):
            self._background.spawn(work(self._background.stop))
        self._background.spawn(self.changes.watch())
        self.changes.crowded()  # by what earlier processes left
        log.info("ready after %.1f s", perf_counter() - self._started)

    async def drain(self) -> None:
        """Lets requests end for up to `drain_timeout_s`; to be called when no new ones come. Those
        left then, or that only wait for servers to come, are refused, and the starts of these
        servers are broken off."""
        self._background.stop.set()
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
            # A reload under way sees the stop and puts back what it built.
            parts.push_async_callback(self._background.finish, self.settings.drain_timeout_s)
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
            version=self.changes.version,
            reload=self.changes.state,
            left_out=self.changes.left_out,
            rest={
                "uptime_s": round(perf_counter() - self._started, 1),
                "requests": {"running": self.generations.holds},
                "scheduler": self.scheduler.stats(),
                "recorder": self.recorder.stats(),
                "learning": self.learning.stats(),
            },
        )

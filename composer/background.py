"""Work of the service that nobody waits for. Knows nothing of what it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Background:
    """`stop` is set when the service closes; what runs for long looks at it. One that fails is
    logged, and ends no other."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    async def finish(self, within_s: float) -> None:
        """Waits for what runs, at most so many seconds; cancels nothing."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a background task failed", exc_info=task.exception())

"""Carries out a device's loads and unloads, by its servers' movers. Decides nothing.

A server whose settings changed has a new mover. What the old one has loaded is retired: stopped
when its last call has ended, and before anything else is loaded in its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from composer.errors import EngineUnavailable
from composer.scheduling.base import Mover, Place
from composer.scheduling.events import Loaded, LoadFailed, Unloaded

log = logging.getLogger(__name__)

RETIRE_S = 30.0
"""How long the calls of a replaced server may still run before they are cut."""

Ended = Callable[[Loaded | LoadFailed | Unloaded, str | None], None]
"""How a move ended; the message of one that failed."""


@dataclass(eq=False, slots=True)
class _Retiring:
    calls: set[int]
    drained: asyncio.Event = field(default_factory=asyncio.Event)


class Moves:
    """One device's movers and what they are doing. `ended` is told from the event loop."""

    def __init__(self, device: str, ended: Ended) -> None:
        self._device = device
        self._ended = ended
        self._movers: dict[str, Mover] = {}
        self._loaded: dict[str, Mover] = {}  # whose weights stand on the device, as far as we know
        self._under_way: dict[str, asyncio.Task[str | None]] = {}
        self._retiring: dict[asyncio.Task[None], _Retiring] = {}
        self._closed = False

    @property
    def idle(self) -> bool:
        return not (self._under_way or self._retiring or self._loaded)

    def movable(self, model: str) -> bool:
        """Whether a move of it may begin."""
        return model in self._movers and model not in self._under_way

    def place(
        self, places: Mapping[str, Place], running: Callable[[str], Collection[int]]
    ) -> list[str]:
        """The servers' movers from now on. Returns the models that another mover than the new
        one has loaded: these are retired, and have to be loaded anew. `running` are the calls
        that run on a model."""
        replaced = []
        for model, place in places.items():
            self._movers[model] = place.mover
            old = self._loaded.get(model)
            if old is None or old is place.mover or model in self._under_way:
                continue  # a move under way looks for itself when it is done
            del self._loaded[model]
            self._retire(model, old, running(model))
            replaced.append(model)
        for model in self._movers.keys() - places.keys():
            if model not in self._loaded and model not in self._under_way:
                del self._movers[model]
        return replaced

    def finished(self, call: int) -> None:
        for retiring in self._retiring.values():
            retiring.calls.discard(call)
            if not retiring.calls:
                retiring.drained.set()

    def load(self, model: str, *, movable: bool) -> None:
        self._begin(model, self._load(model, movable), partial(self._load_ended, model))

    def unload(self, model: str) -> None:
        self._begin(model, self._unload(model), partial(self._unload_ended, model))

    async def close(self) -> None:
        """Begins nothing more and waits for what is under way."""
        self._closed = True
        for retiring in self._retiring.values():
            retiring.drained.set()
        while tasks := [*self._under_way.values(), *self._retiring]:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)  # their callbacks take them out

    # --- the moves -----------------------------------------------------------------------

    async def _load(self, model: str, movable: bool) -> str | None:
        """Returns why it failed, None where it did not."""
        while self._retiring:
            await asyncio.wait(list(self._retiring))
            await asyncio.sleep(0)
        while not self._closed:
            mover = self._movers[model]
            try:
                await mover.start()
            except EngineUnavailable as error:
                log.warning("device %s: %s could not be loaded: %s", self._device, model, error)
                return str(error)
            if self._movers.get(model, mover) is mover:
                if movable:
                    self._loaded[model] = mover
                return None
            await mover.stop()
        return "the service is closing"

    async def _unload(self, model: str) -> None:
        mover = self._loaded.get(model) or self._movers[model]
        await mover.stop()

    def _retire(self, model: str, mover: Mover, calls: Collection[int]) -> None:
        retiring = _Retiring(set(calls))
        if not retiring.calls or self._closed:
            retiring.drained.set()

        async def retire() -> None:
            try:
                async with asyncio.timeout(RETIRE_S):
                    await retiring.drained.wait()
            except TimeoutError:
                log.warning(
                    "device %s: %s was replaced; %d of its calls are cut after %.0f s",
                    *(self._device, model, len(retiring.calls), RETIRE_S),
                )
            await mover.stop()

        def retired(task: asyncio.Task[None]) -> None:
            del self._retiring[task]
            if error := _error_of(task):
                log.error(
                    "device %s: %s was replaced, and its memory may not be free",
                    *(self._device, model),
                    exc_info=error,
                )

        task = asyncio.create_task(retire(), name=f"retire {model}")
        self._retiring[task] = retiring
        task.add_done_callback(retired)

    # --- how they end --------------------------------------------------------------------

    def _begin(
        self,
        model: str,
        work: Coroutine[Any, Any, str | None],
        ended: Callable[[asyncio.Task[str | None]], None],
    ) -> None:
        assert model not in self._under_way
        task = asyncio.create_task(work, name=f"move {model}")
        self._under_way[model] = task
        task.add_done_callback(ended)

    def _load_ended(self, model: str, task: asyncio.Task[str | None]) -> None:
        del self._under_way[model]
        if error := _error_of(task):
            log.error("device %s: loading %s failed", self._device, model, exc_info=error)
            reason: str | None = f"{type(error).__name__}: {error}"
        else:
            reason = task.result()
        if reason is None:
            self._ended(Loaded(model), None)
        else:
            self._loaded.pop(model, None)
            self._ended(LoadFailed(model), reason)

    def _unload_ended(self, model: str, task: asyncio.Task[str | None]) -> None:
        """A stop that failed counts as done: the device would stand still for ever otherwise. If
        the memory is not free, the next load fails and says so."""
        del self._under_way[model]
        self._loaded.pop(model, None)
        reason = None
        if error := _error_of(task):
            log.error("device %s: unloading %s failed", self._device, model, exc_info=error)
            reason = f"{type(error).__name__}: {error}"
        self._ended(Unloaded(model), reason)


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    return asyncio.CancelledError("cancelled") if task.cancelled() else task.exception()

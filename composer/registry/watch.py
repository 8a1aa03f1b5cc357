"""Notices that files changed and says so once they are at rest. Knows nothing of their content.

The file system's events (watchfiles) only wake it up; what decides is whether the paths' stamps
differ from those that the last load took before it read them. So replacing by rename, deleting
and creating again, swapped symlinks, and changes while nobody listened all come out the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from watchfiles import awatch

from composer.registry.stamps import Stamps, stamp

log = logging.getLogger(__name__)

_SETTLE_S = 0.15
"""Files count as at rest once their stamps have stayed equal for this long."""
_SETTLES = 4
"""So often it is tried; then what goes on changing (a long copy) counts as it is."""
_STEP_MS = 50
_AT_MOST_MS = 200
"""A stream of events is cut here, so that a busy neighbour file cannot hold a change back."""
_WAKE_MS = 500
_QUIET_WAKES = 10
"""Without any event the stamps are compared after one wake, for a change that came before the
listening began, and then after every so many, for file systems that send no events."""
_POLL_S = 0.5
"""Between looks where the system has no more watches to give."""


class Watcher:
    """Compares what is there with what was last looked at. Its methods belong to one event loop.

    A folder changes when anything directly in it does; a path that is not there, when it appears.
    """

    def __init__(self) -> None:
        self._known: Stamps = {}  # replaced, never changed: `is` tells whether a load looked

    def looked_at(self, stamps: Stamps, *, in_part: bool = False) -> None:
        """A load took these stamps, each before it read the path; what differs from them is a
        change, however long ago it came about. They are all that is watched from now on, unless
        the load came to a part of the paths only (it failed): then the others stay watched."""
        self._known = {**self._known, **stamps} if in_part else dict(stamps)

    async def run(self, changed: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
        """Calls `changed` after every change until `stop`. A change is told once, whether or not
        `changed` then looks at the path again. What `changed` raises is logged, and watching
        goes on."""
        while not stop.is_set():
            known = self._known
            now = await _present(known)
            if now == known:
                await self._wake(known, stop)
                continue
            now = await _at_rest(known, now)
            if now == known or known is not self._known or stop.is_set():
                continue  # undone, or looked at in the meantime: compare again
            self._known = now
            try:
                await changed()
            except Exception:
                log.exception("what follows a change of the registry failed")

    async def _wake(self, known: Stamps, stop: asyncio.Event) -> None:
        """Returns when it is time to compare again: something differs from `known`, something
        else was looked at, there are other places to listen at, or `stop` is set."""
        places = {_listening_place(path) for path in known}
        wakes = 0
        try:
            async for events in awatch(
                *places,
                watch_filter=None,
                debounce=_AT_MOST_MS,
                step=_STEP_MS,
                rust_timeout=_WAKE_MS,
                yield_on_timeout=True,
                recursive=False,
                stop_event=stop,
            ):
                if known is not self._known:
                    return
                wakes = 0 if events else wakes + 1
                if not events and wakes != 1 and wakes % _QUIET_WAKES:
                    continue
                if await _present(known) != known:
                    return
                if places != {_listening_place(path) for path in known}:
                    return
            return
        except (OSError, RuntimeError) as error:  # no watches left, or a folder is gone already
            log.warning("looking twice a second instead of listening for changes: %s", error)
        for _ in range(_QUIET_WAKES):  # then the listening is tried again
            await asyncio.sleep(_POLL_S)
            if stop.is_set() or known is not self._known or await _present(known) != known:
                return


def _listening_place(path: Path) -> Path:
    """The folder whose events tell of `path`: itself, or the nearest one that is there."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


async def _at_rest(known: Stamps, now: Stamps) -> Stamps:
    for _ in range(_SETTLES):
        await asyncio.sleep(_SETTLE_S)
        before, now = now, await _present(known)
        if now == before:
            break
    return now


async def _present(known: Stamps) -> Stamps:
    return await asyncio.to_thread(lambda: {path: stamp(path) for path in known})

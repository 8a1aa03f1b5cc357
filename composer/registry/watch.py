"""Notices that files changed and says so once they are at rest. Knows nothing of their content.

The file system's events (watchfiles) only wake it up; what decides is whether the watched paths'
stamps differ from those of the last call. So replacing by rename, deleting and creating again,
swapped symlinks and events that came while nobody listened all come out the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

from watchfiles import awatch

log = logging.getLogger(__name__)

_SETTLE_MS = 150
"""Events this close together count as one change."""
_AT_MOST_MS = 600
"""A stream of events is cut here, so that a busy neighbour file cannot hold a change back."""
_WAKE_MS = 500
_QUIET_WAKES = 10
"""Without any event the stamps are compared after one wake, for a change that came before the
listening began, and then after every so many, for file systems that send no events."""
_POLL_S = 0.5
"""Between looks where the system has no more watches to give."""

Stamps = Mapping[Path, object]


async def watch(
    paths: Callable[[], Collection[Path]],
    changed: Callable[[], Awaitable[None]],
    stop: asyncio.Event,
) -> None:
    """Calls `changed` after every change of the files and folders in `paths()`, until `stop`.

    A folder changes when anything directly in it does; a path that is not there, when it
    appears. `paths` is asked again after each call, since what is watched may have changed with
    it. Changes while `changed` runs lead to one more call. What `changed` raises is logged, and
    watching goes on.
    """
    known = await _stamps(paths())
    while not stop.is_set():
        watched = frozenset(paths())
        # A path that is newly watched counts from now on; a known one from what was last seen.
        now = await _stamps(watched)
        if all(known.get(path, stamp) == stamp for path, stamp in now.items()):
            known = now
            now = await _next_change(watched, known, stop)
            if now == known:
                continue  # stopped, or to listen in other places
        known = now
        try:
            await changed()
        except Exception:
            log.exception("what follows a change of the registry failed")


async def _next_change(watched: frozenset[Path], known: Stamps, stop: asyncio.Event) -> Stamps:
    """The stamps once they differ from the known ones; the known ones when `stop` is set or
    there are other places to listen at."""
    places = {_listening_place(path) for path in watched}
    wakes = 0
    try:
        async for events in awatch(
            *places,
            watch_filter=None,
            debounce=_AT_MOST_MS,
            step=_SETTLE_MS,
            rust_timeout=_WAKE_MS,
            yield_on_timeout=True,
            recursive=False,
            stop_event=stop,
        ):
            wakes = 0 if events else wakes + 1
            if not events and wakes != 1 and wakes % _QUIET_WAKES:
                continue
            now = await _stamps(watched)
            if now != known:
                return now
            if places != {_listening_place(path) for path in watched}:
                break
        return known
    except (OSError, RuntimeError) as error:  # no watches left, or a folder is gone already
        log.warning("looking twice a second instead of listening for changes: %s", error)
    for _ in range(_QUIET_WAKES):  # then the listening is tried again
        if stop.is_set():
            break
        await asyncio.sleep(_POLL_S)
        now = await _stamps(watched)
        if now != known:
            return now
    return known


def _listening_place(path: Path) -> Path:
    """The folder whose events tell of `path`: itself, or the nearest one that is there."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


async def _stamps(paths: Collection[Path]) -> Stamps:
    return await asyncio.to_thread(lambda: {path: _stamp(path) for path in paths})


def _stamp(path: Path) -> object:
    """Equal as long as the file, or the folder with what is directly in it, stays as it is."""
    try:
        if not path.is_dir():
            return _file_stamp(path)
        with os.scandir(path) as entries:
            return sorted((entry.name, _file_stamp(Path(entry.path))) for entry in entries)
    except OSError:
        return None  # not there (any more), which is a state too


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino

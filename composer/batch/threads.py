"""Blocking work off the event loop, for work whose leavings matter. Knows nothing of what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def to_end(work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """The result of `work`, run in a thread. A caller that is cancelled waits for it all the
    same, since a thread cannot be stopped and must not go on behind its back; then `undo` gets
    the result that nobody takes."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if undo is not None and running.exception() is None:
            undo(running.result())
        raise

"""vLLM's sleep mode over HTTP, in the order of its documentation. Experimental: it needs a GPU.

Level 1 moves the weights to main memory, level 2 drops them; both drop the cache. Knows nothing
of adapters, which a caller has to probe after a wake.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from composer.engines.upstream import Upstream
from composer.errors import EngineError

MOVE_S = 300.0
"""Most seconds for one step: level 1 copies the weights."""
POLL_S = 0.05


async def sleep(upstream: Upstream, root: str, level: Literal[1, 2]) -> None:
    """Ends what runs, and frees the device's memory. Raises EngineError."""
    await upstream.demand("POST", f"{root}/sleep?level={level}", limit_s=MOVE_S)
    await _until(upstream, root, asleep=True)


async def wake(upstream: Upstream, root: str, level: Literal[1, 2]) -> None:
    """Ready for requests, as far as the server itself says. Raises EngineError."""
    if level == 1:
        await upstream.demand("POST", f"{root}/wake_up", limit_s=MOVE_S)
    else:  # the weights' memory first, so that reading them anew does not stand beside the cache
        await upstream.demand("POST", f"{root}/wake_up?tags=weights", limit_s=MOVE_S)
        reload = {"method": "reload_weights"}
        await upstream.demand("POST", f"{root}/collective_rpc", reload, limit_s=MOVE_S)
        await upstream.demand("POST", f"{root}/wake_up?tags=kv_cache", limit_s=MOVE_S)
    await _until(upstream, root, asleep=False)


async def _until(upstream: Upstream, root: str, *, asleep: bool) -> None:
    clock = asyncio.get_running_loop().time
    until = clock() + MOVE_S
    while True:
        said = await upstream.demand("GET", f"{root}/is_sleeping", limit_s=MOVE_S)
        if not isinstance(said, dict) or "is_sleeping" not in said:
            raise EngineError(f"the server answered /is_sleeping with {said!r:.200}")
        if said["is_sleeping"] is asleep:
            return
        if clock() > until:
            raise EngineError(f"the server is {'not ' if asleep else ''}asleep after {MOVE_S:g} s")
        await asyncio.sleep(POLL_S)

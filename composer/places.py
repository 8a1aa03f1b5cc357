"""Where a server stands as the scheduler sees it, and whether it is there. Knows engines by their
interface alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace
from itertools import count

from composer.engines.base import Engine
from composer.errors import EngineUnavailable
from composer.scheduling.base import Place
from composer.scheduling.events import Model
from composer.types import Server

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How long a boot or a reload waits for a server that somebody else runs."""


def place_of(server: Server, engine: Engine, taken: Collection[str]) -> Place:
    """The server as the scheduler sees it, under a name that is not taken."""
    name = next(
        name
        for number in count(1)
        if (name := server.id if number == 1 else f"{server.id}#{number}") not in taken
    )
    capacity, placement = engine.capacity, server.placement
    model = Model(name, capacity.in_flight, capacity.queue, capacity.adapters)
    if placement is None:
        return Place(f"server:{name}", model, engine)  # no device's id has a colon
    asleep = placement.sleep_level is not None
    model = replace(
        model,
        movable=True,
        memory_gb=placement.memory_gb,
        load_s=placement.wake_s if asleep else placement.start_s,
        unload_s=placement.sleep_s if asleep else placement.stop_s,
    )
    return Place(placement.device, model, engine)


async def started(server: str, engine: Engine) -> bool:
    """Somebody else's server may be away: the scheduler then waits for it, and its calls with
    it, up to their bounds."""
    if not engine.external:
        await engine.start()
        return True
    try:
        async with asyncio.timeout(LOOK_S):
            await engine.start()
    except (EngineUnavailable, TimeoutError) as error:
        why = str(error) or f"no answer within {LOOK_S:g} s"
        log.warning("server %r is not there yet: %s", server, why)
        return False
    return True

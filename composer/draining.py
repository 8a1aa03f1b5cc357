"""How the requests of a service that closes come to their end. Knows no engine."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from time import perf_counter

from composer.generations import Generations
from composer.scheduling.base import Scheduler

log = logging.getLogger(__name__)

POLL_S = 0.05


async def drained(generations: Generations, scheduler: Scheduler, within_s: float) -> bool:
    """Waits until no request is being answered; to be called when no new ones come. False: after
    `within_s` seconds some still are, or all that are left wait for servers that are not there. A
    load takes minutes, which nobody is to wait for at the end."""
    until = perf_counter() + within_s
    waited = False
    while generations.holds:
        if perf_counter() > until:
            log.warning("stopping with %d requests unfinished", generations.holds)
            return False
        waits = _only_wait(scheduler, generations.holds)
        if waits and waited:  # and not just between two calls of a request
            return False
        waited = waits
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await generations.drained()
    return True


def _only_wait(scheduler: Scheduler, requests: int) -> bool:
    """Whether no call can end any more without a load. Where the calls are fewer than the requests,
    some request is still being routed or is between two calls, and may need none; a request of
    several calls can hide one such."""
    loads = scheduler.stats()
    if sum(load["running"] + load["waiting"] for load in loads.values()) < requests:
        return False
    return any(load["waiting"] for load in loads.values()) and not any(
        load["running"] or (load["waiting"] and scheduler.resident(server))
        for server, load in loads.items()
    )

"""GET /v1/scheduler: what is where, who waits, what swaps have cost."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from starlette.responses import Response

from api.deps import ADMIN, ServiceDep, make_router
from api.errors import without_paths
from api.responses import Json

MOST_EVENTS = 10_000

router = make_router()


@router.get("/v1/scheduler", dependencies=[ADMIN])
async def scheduler(
    service: ServiceDep, events: Annotated[int, Query(ge=0, le=MOST_EVENTS)] = 0
) -> Response:
    """Per device: memory, residents, moves, swaps and their seconds, the timeline of residency,
    queues per expert, waits, refusals, and the plan of its policy; `?events=100` adds what
    happened last and what was decided. Times are in seconds on the clock of `now`."""
    state = dict(service.scheduler.snapshot(events=events))
    for device in state["devices"].values():
        device["failures"] = {id_: without_paths(why) for id_, why in device["failures"].items()}
    return Json(state)

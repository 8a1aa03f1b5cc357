"""/v1/batches: many requests from a file, answered when there is room."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from starlette.responses import Response

from api.batching import BatchBody, BatchesDep
from api.deps import CallerDep, make_router
from api.responses import Json
from composer.batch.files import page

router = make_router()


@router.post("/v1/batches")
async def create(body: BatchBody, batches: BatchesDep, caller: CallerDep) -> Response:
    """Begin a batch. Its input is checked next; what is wrong in it is told by `errors`."""
    batch = await batches.create(
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        metadata=body.metadata,
        key=caller.key,
    )
    return Json(batch.body)


@router.get("/v1/batches")
async def list_all(
    batches: BatchesDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    return Json(page(await batches.all(), after=after, limit=limit))


@router.get("/v1/batches/{batch_id}")
async def get(batch_id: str, batches: BatchesDep) -> Response:
    return Json((await batches.get(batch_id)).body)


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel(batch_id: str, batches: BatchesDep) -> Response:
    """Requests that run are cut; what is answered already is in the output file."""
    return Json((await batches.cancel(batch_id)).body)

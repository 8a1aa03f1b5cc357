"""/v1/files: what batches read and write."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, Response

from api.batching import FilesDep
from api.deps import make_router
from api.responses import Json
from composer.batch.files import Order, page
from composer.batch.threads import to_end
from composer.errors import RequestError

router = make_router()

PATH = "/v1/files"

MAX_NAME = 255

FORM_BYTES = 64 * 2**10
"""Of an upload besides its file, at most."""


@router.post(PATH)
async def upload(request: Request, files: FilesDep) -> Response:
    """Keep a file, sent as `multipart/form-data` with the fields `file` and `purpose`, which is
    `batch`. It is not looked into before a batch is made of it."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise RequestError("a file is sent as multipart/form-data", param="file")
    async with request.form(max_files=1, max_fields=4) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if unknown := sorted(set(form) - {"file", "purpose"}):
            raise RequestError("this field is not known here; leave it out", param=unknown[0])
        if not isinstance(file, UploadFile):
            raise RequestError("the form needs a file", param="file")
        if purpose != "batch":
            raise RequestError("the only purpose here is `batch`", param="purpose")
        name = (file.filename or "upload.jsonl")[:MAX_NAME]
        kept = await to_end(lambda: files.add(file.file, name, "batch"))
    return Json(kept.body)


@router.get("/v1/files")
async def list_all(
    files: FilesDep,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
) -> Response:
    found = await asyncio.to_thread(files.all)
    wanted = [file for file in found if purpose in (None, file.purpose)]
    return Json(page(wanted if order == "desc" else wanted[::-1], after=after, limit=limit))


@router.get("/v1/files/{file_id}")
async def get(file_id: str, files: FilesDep) -> Response:
    return Json((await asyncio.to_thread(files.get, file_id)).body)


@router.get("/v1/files/{file_id}/content")
async def content(file_id: str, files: FilesDep) -> Response:
    path = await asyncio.to_thread(files.content, file_id)
    return FileResponse(path, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}")
async def delete(file_id: str, files: FilesDep) -> Response:
    """Batches that run on it go on to their end."""
    await asyncio.to_thread(files.delete, file_id)
    return Json({"id": file_id, "object": "file", "deleted": True})

"""POST /v1/embeddings: the router's own embedding model."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import Request
from starlette.responses import Response

from api.deps import ServiceDep, make_router
from api.responses import Json
from api.schemas import EmbeddingBody
from composer.errors import ContextTooLong, UnknownModel, Unsupported
from composer.types import FloatArray

router = make_router()


TURN = 16
"""Texts embedded at a time. Routing waits in the same line: between two turns it goes first,
so a long list delays a decision by one turn and not by the whole list."""


@router.post("/v1/embeddings")
async def embed(body: EmbeddingBody, request: Request, service: ServiceDep) -> Response:
    """Texts to unit vectors. There is one model; GET /v1/models lists it last."""
    embedder = service.embedder
    if body.model != embedder.id:
        raise UnknownModel(
            f"there is no embedding model {body.model!r}; ask {embedder.id!r}", param="model"
        )
    if body.dimensions not in (None, embedder.dim):
        raise Unsupported(
            f"vectors have {embedder.dim} dimensions and cannot be shortened; leave it out",
            param="dimensions",
        )
    tokens = await asyncio.to_thread(embedder.count_tokens, body.input)
    for i, count in enumerate(tokens):
        if count > embedder.max_tokens:
            raise ContextTooLong(
                f"the text has {count} tokens and {embedder.id!r} reads {embedder.max_tokens}; "
                "split it",
                param=f"input.{i}",
            )
    vectors: list[FloatArray] = []
    for start in range(0, len(body.input), TURN):
        if await request.is_disconnected():
            return Response(status_code=499)  # nobody is left to read it
        turn = body.input[start : start + TURN]
        vectors += await asyncio.gather(*(embedder.embed(text) for text in turn))
    shape = _base64 if body.encoding_format == "base64" else _floats
    content = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": shape(vector)}
            for i, vector in enumerate(vectors)
        ],
        "model": embedder.id,
        "usage": {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)},
    }
    return Json(content)


def _floats(vector: FloatArray) -> Any:
    return np.ascontiguousarray(vector)


def _base64(vector: FloatArray) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()

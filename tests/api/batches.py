"""What the tests of files and batches share: inputs, waiting, a service without sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import httpx
import openai
from openai.types import Batch

from api.app import create_app
from composer.batch.jobs import Batches
from tests.api.fakes import World


def jsonl(lines: list[Any]) -> BytesIO:
    file = BytesIO(b"".join(json.dumps(one).encode() + b"\n" for one in lines))
    file.name = "in.jsonl"
    return file


def create(ai: openai.OpenAI, lines: list[Any], **more: Any) -> Batch:
    uploaded = ai.files.create(file=jsonl(lines), purpose="batch")
    return ai.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        **more,
    )


WAIT_S = 120
"""Only ends a test that has failed."""


def wait(ai: openai.OpenAI, id: str, *statuses: str, completed: int = 0) -> Batch:
    """Until it has one of the statuses, or any where none is given, and so many answers."""
    end = time.monotonic() + WAIT_S
    while True:
        batch = ai.batches.retrieve(id)
        assert batch.request_counts is not None
        if batch.request_counts.completed >= completed and batch.status in (statuses or ANY):
            return batch
        assert time.monotonic() < end, batch
        time.sleep(0.01)


ENDED = ("completed", "failed", "cancelled", "expired")
ANY = (*ENDED, "validating", "in_progress", "finalizing", "cancelling")


class Running:
    """A service with its batches, without sockets."""

    def __init__(self, world: World) -> None:
        self.world = world
        app = create_app(world.service)
        self.batches: Batches = app.state.batches
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://composer"
        )

    async def __aenter__(self) -> Running:
        await self.world.service.start()
        await self.batches.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.batches.close()
        await self.world.service.close()
        await self.client.aclose()

    async def create(self, lines: list[Any]) -> str:
        files = {"file": ("in.jsonl", jsonl(lines).getvalue())}
        file = await self.client.post("/v1/files", files=files, data={"purpose": "batch"})
        body = {
            "input_file_id": file.json()["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        id_: str = (await self.client.post("/v1/batches", json=body)).json()["id"]
        return id_

    async def wait(self, id_: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                body: dict[str, Any] = (await self.client.get(f"/v1/batches/{id_}")).json()
                if true(body):
                    return body
                await asyncio.sleep(0.005)

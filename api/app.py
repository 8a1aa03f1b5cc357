"""The app factory. Nothing is built or started at import."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from api import errors
from api.batching import make_batches
from api.edge import Edge
from api.routes import batches as batches_route
from api.routes import (
    chat,
    completions,
    embeddings,
    experts,
    feedback,
    health,
    metrics,
    models,
    promotion,
    scheduler,
)
from api.routes import files as files_route
from api.schemas import ErrorBody
from composer.errors import SettingsError
from composer.service import Service


def create_app(service: Service) -> FastAPI:
    """The HTTP edge of a service that is not started yet: the app's lifespan starts and closes it.

    No /docs: FastAPI's page loads its script from somebody else's host. /openapi.json is there.
    Raises SettingsError for a key that would lock nothing.
    """
    if service.settings.api_key is not None and not service.settings.api_key.strip():
        raise SettingsError("COMPOSER_API_KEY is empty; unset it, or give it a key")

    files, batches = make_batches(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            await batches.start()
            yield
        finally:
            await batches.close()  # first: what it has begun would fail with the service
            await service.close()

    app = FastAPI(
        title="composer",
        version=version("composer"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.service = service
    app.state.created = int(time.time())
    app.state.files, app.state.batches = files, batches
    app.add_middleware(
        Edge,
        api_key=service.settings.api_key,
        keys=lambda: service.generations.current.catalog.keys.values(),
        larger={files_route.PATH: service.settings.max_file_mb * 2**20 + files_route.FORM_BYTES},
    )
    errors.install(app)
    for module in (
        chat,
        completions,
        files_route,
        batches_route,
        embeddings,
        models,
        experts,
        feedback,
        promotion,
        scheduler,
        metrics,
        health,
    ):
        app.include_router(module.router)
    return app

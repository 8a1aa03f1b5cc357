"""GET /v1/models: every name that `model` may take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from api.deps import Excluded, ServiceDep, make_router
from api.responses import Json
from composer.errors import UnknownModel
from composer.service import Service
from composer.types import Expert, Policy

router = make_router()


@router.get("/v1/models")
async def list_all(request: Request, service: ServiceDep, excluded: Excluded) -> Response:
    """Policies first, then experts, then the embedding model of /v1/embeddings. Whom the caller's
    key excludes is not there, nor a policy that has nobody else."""
    created = request.app.state.created
    return Json({"object": "list", "data": list(_models(service, created, excluded))})


@router.get("/v1/models/{model:path}")
async def get(model: str, request: Request, service: ServiceDep, excluded: Excluded) -> Response:
    for entry in _models(service, request.app.state.created, excluded):
        if entry["id"] == model:
            return Json(entry)
    raise UnknownModel(f"there is no model {model!r}; GET /v1/models lists them", param="model")


def _models(service: Service, created: int, excluded: frozenset[str]) -> Iterator[dict[str, Any]]:
    catalog = service.generations.current.catalog
    for policy in catalog.policies.values():
        if not excluded.issuperset(policy.experts):
            yield _model(policy.id, created, "composer", _policy(policy, excluded))
    for expert in catalog.experts.values():
        if expert.id not in excluded:
            about = {**_expert(expert), "revision": catalog.revision(expert.id)}
            yield _model(expert.id, created, expert.server, about)
    embedder = service.embedder
    yield _model(embedder.id, created, "composer", {"kind": "embedder", "dimensions": embedder.dim})


def _model(id_: str, created: int, owner: str, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "composer": more,
    }


def _policy(policy: Policy, excluded: frozenset[str]) -> dict[str, Any]:
    default = policy.default_expert
    return {
        "kind": "policy",
        "router": policy.router.name,
        "strategy": policy.strategy.name,
        "experts": [expert for expert in policy.experts if expert not in excluded],
        "default_expert": None if default in excluded else default,
    }


def _expert(expert: Expert) -> dict[str, Any]:
    return {
        "kind": "expert",
        "server": expert.server,
        "description": expert.description,
        "skills": expert.skills,
        "context_window": expert.context_window,
        "abilities": sorted(expert.abilities),
    }

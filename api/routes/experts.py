"""/v1/experts: experts added and taken away while the service runs."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from api.deps import ADMIN, Excluded, ServiceDep, make_router
from api.responses import Json
from api.schemas import ExpertBody
from composer.errors import UnknownModel
from composer.types import Expert, Gated

router = make_router()


@router.post("/v1/experts", status_code=201, dependencies=[ADMIN])
async def add(body: ExpertBody, service: ServiceDep) -> Response:
    """Serve one more expert, now and after a restart. The body is an entry of experts.yaml
    with its `id`; it joins every policy that takes all experts."""
    expert = await service.changes.add_expert(body.model_dump(exclude_unset=True))
    return Json(
        expert_body(expert), status_code=201, headers={"location": f"/v1/experts/{expert.id}"}
    )


@router.get("/v1/experts")
async def list_all(service: ServiceDep, excluded: Excluded) -> Response:
    """All but those that the caller's key excludes."""
    experts = service.generations.current.catalog.experts.values()
    data = [expert_body(expert) for expert in experts if expert.id not in excluded]
    return Json({"object": "list", "data": data})


@router.get("/v1/experts/{expert:path}")
async def get(expert: str, service: ServiceDep, excluded: Excluded) -> Response:
    found = service.generations.current.catalog.experts.get(expert)
    if found is None or expert in excluded:
        raise UnknownModel(f"there is no expert {expert!r}; GET /v1/experts lists them", param="id")
    return Json(expert_body(found))


@router.delete("/v1/experts/{expert:path}", dependencies=[ADMIN])
async def remove(expert: str, service: ServiceDep) -> Response:
    """Take an expert away that was added here. Requests it is answering go on to their end."""
    await service.changes.remove_expert(expert)
    return Json({"id": expert, "object": "expert", "deleted": True})


def expert_body(expert: Expert) -> dict[str, Any]:
    """An expert as callers may see it: no path of this machine."""
    adapter = expert.adapter
    return {
        "id": expert.id,
        "object": "expert",
        "source": expert.source,
        "server": expert.server,
        "description": expert.description,
        "skills": expert.skills,
        "examples": len(expert.examples),
        "context_window": expert.context_window,
        "abilities": sorted(expert.abilities),
        "cost": expert.cost,
        "adapter": None
        if adapter is None
        else {
            "digest": adapter.digest,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "target_modules": adapter.target_modules,
            "gate": None if adapter.gate is None else _gate_body(adapter.gate),
        },
    }


def _gate_body(gate: Gated) -> dict[str, Any]:
    named = zip(gate.members, gate.digests, strict=True)
    return {
        "kind": gate.kind,
        "members": [{"name": name, "digest": digest} for name, digest in named],
    }

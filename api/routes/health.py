"""/health for people and monitors, /ready for load balancers. Both need no key."""

from __future__ import annotations

from starlette.responses import Response

from api.deps import ServiceDep, make_router
from api.errors import without_paths
from api.responses import Json
from composer.errors import EngineUnavailable

router = make_router()


@router.get("/health")
async def health(service: ServiceDep) -> Response:
    """Always 200 while the process lives; `status` says ok, degraded or starting, and the
    rest says why. A server is `ready`, `off` (to make room for others), `starting` or `failed`,
    with the reason."""
    state = await service.health()
    for server in state["servers"].values():
        if "reason" in server:
            server["reason"] = without_paths(server["reason"])
    catalog = state["catalog"]
    catalog["left_out"] = {id_: without_paths(why) for id_, why in catalog["left_out"].items()}
    catalog["reload"]["problems"] = [without_paths(p) for p in catalog["reload"]["problems"]]
    return Json(state)


@router.get("/ready")
async def ready(service: ServiceDep) -> Response:
    """200 when requests are answered, 503 before the first catalog and after the last."""
    try:
        version = service.generations.current.catalog.version
    except EngineUnavailable as error:
        return Json({"ready": False, "reason": str(error)}, status_code=503)
    return Json({"ready": True, "catalog_version": version})

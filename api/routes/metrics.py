"""GET /metrics: Prometheus's text format. For admins' keys, where there are any."""

from __future__ import annotations

from starlette.responses import Response

from api.deps import ADMIN, ServiceDep, make_router
from composer.metrics import CONTENT_TYPE

router = make_router()


@router.get("/metrics", dependencies=[ADMIN])
async def metrics(service: ServiceDep) -> Response:
    """Swaps, residency, queues, waits, refusals, requests: see `composer/metrics.py`."""
    return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

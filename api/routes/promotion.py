"""/v1/policies/{policy}/promotion: the router in a policy's shadow, compared, promoted, undone."""

from __future__ import annotations

from typing import Literal

from starlette.responses import Response

from api.deps import ServiceDep, make_router
from api.responses import Json
from api.schemas import Body

router = make_router()


class PromotionBody(Body):
    action: Literal["promote", "undo"]


@router.get("/v1/policies/{policy}/promotion")
async def show(policy: str, service: ServiceDep) -> Response:
    """What serves and what runs in shadow, the doubly robust estimate of the difference with its
    95 % interval, and the promotion in force. `better`: the interval lies above 0."""
    return Json({"object": "promotion", **await service.promotions.status(policy)})


@router.post("/v1/policies/{policy}/promotion")
async def change(policy: str, body: PromotionBody, service: ServiceDep) -> Response:
    """Promote the artefact in shadow, where it proved better, or undo that. In force when this
    answers, and after a restart."""
    promotion = None
    if body.action == "promote":
        promotion = await service.promotions.promotion_of(policy)
    else:
        await service.promotions.status(policy)  # whether there is anything to undo
    await service.promote(policy, promotion)
    return Json({"object": "promotion", **await service.promotions.status(policy)})

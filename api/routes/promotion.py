"""/v1/policies/{policy}/promotion: the router in a policy's shadow, compared, promoted, undone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from starlette.responses import Response

from api.body import Body
from api.deps import ADMIN, ServiceDep, make_router
from api.responses import Json
from composer.errors import Conflict, UnknownModel

router = make_router()


class PromotionBody(Body):
    action: Literal["promote", "undo"]
    any_look: bool = Field(
        False,
        description="promote: only if it proved better by the bound that holds however often one "
        "has looked. What promotes without a person should say so.",
    )


@router.get("/v1/policies/{policy:path}/promotion", dependencies=[ADMIN])
async def show(policy: str, service: ServiceDep) -> Response:
    """What serves and what runs in shadow, the doubly robust estimate of the difference with its
    95 % interval, and the promotion in force. `better`: the interval lies above 0, which holds for
    one look; `always_better`: so does `always_low`, which holds for all looks at once, and counts
    the first judged requests (`series_ended`: those are full, and late feedback alone moves it).
    `left_out`: requests of all policies since the start that a comparison lacks."""
    return Json({"object": "promotion", **await service.promotions.status(policy)})


@router.post("/v1/policies/{policy:path}/promotion", dependencies=[ADMIN])
async def change(policy: str, body: PromotionBody, service: ServiceDep) -> Response:
    """Promote the artefact in shadow, where it proved better, or undo that. In force when this
    answers, and after a restart. One that the registry does not fit any more can be undone too."""
    promotions, promotion = service.promotions, None
    if body.action == "promote":
        promotion = await promotions.promotion_of(policy, any_look=body.any_look)
    elif policy not in promotions.wanted:
        await promotions.status(policy)  # says why there is nothing to undo
    await service.changes.promote(policy, promotion)
    try:
        status = await promotions.status(policy)
    except (Conflict, UnknownModel):  # undone, and nothing runs in shadow
        status = {"policy": policy, "promotion": None}
    return Json({"object": "promotion", **status})

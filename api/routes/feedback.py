"""POST /v1/feedback: how good an answer was."""

from __future__ import annotations

from starlette.responses import Response

from api.deps import ServiceDep, make_router
from api.responses import Json
from api.schemas import FeedbackBody
from composer.store import Feedback

router = make_router()


@router.post("/v1/feedback", status_code=201)
async def give(body: FeedbackBody, service: ServiceDep) -> Response:
    """Attach an outcome (0 bad, 1 good) to a response id. Answers once it is durable:
    `stored` says where, `database`, or `journal` while the database is away."""
    feedback = Feedback.checked(
        body.response_id, body.score, id=body.id, comment=body.comment, labels=body.labels
    )
    receipt = await service.recorder.add_feedback(feedback)
    content = {
        "id": receipt.id,
        "object": "feedback",
        "response_id": feedback.response_id,
        "score": feedback.score,
        "stored": receipt.stored,
    }
    return Json(content, status_code=201)

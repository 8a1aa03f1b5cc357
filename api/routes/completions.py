"""POST /v1/completions."""

from __future__ import annotations

from starlette.responses import Response

from api.answering import Answering
from api.deps import CallerDep, RequestId, ServiceDep, make_router
from api.schemas import CompletionBody
from api.wire import CompletionWire

router = make_router()


@router.post("/v1/completions")
async def complete(
    body: CompletionBody, service: ServiceDep, request_id: RequestId, caller: CallerDep
) -> Response:
    """Go on with a text. `model` is a policy (`auto` by default) or an expert."""
    request = body.request(CompletionWire.prefix + request_id, caller)
    return Answering(
        service.pipeline,
        request,
        CompletionWire(logprobs=request.sampling.logprobs),
        include_usage=body.include_usage,
    )
